"""What commands do with a report: write it and its page, and open the page."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from spach_deploy.cli.console import say
from spach_deploy.errors import UsageError

if TYPE_CHECKING:
    from spach_deploy.validation.validate import Validation


@dataclasses.dataclass(frozen=True)
class Asked:
    """Where a report goes and whether its page is to be opened.

    `bundle`: whose manifest the page tells of. `target`: a file or directory that may have a place of its own for the
    report; None for a target outside any bundle. `report`: the user's own place.
    """

    bundle: Path
    target: Path | None
    report: Path | None
    as_json: bool
    is_opened: bool

    def check(self) -> None:
        """Refuse what could not be honoured at the end, before the work begins."""
        if self.report is not None:
            from spach_deploy.report.files import page_beside

            page_beside(self.report)
        if self.is_opened:
            check_can_open()
            if self.report is None and (self.as_json or not self._has_place()):
                raise UsageError("--open needs a page, and none would be written.", "Give --report FILE.json too.")

    def _has_place(self) -> bool:
        from spach_deploy.validation.target import default_report

        return self.target is not None and (not self.target.exists() or default_report(self.target) is not None)


def check_can_open() -> None:
    """MissingPackageError where no page could be made."""
    from spach_deploy.report.files import check_can_make_pages

    check_can_make_pages()


def write_reports(validation: Validation, asked: Asked) -> None:
    """The report and its page. Where the user named no place, being unable to write into the bundle is no error."""
    from spach_deploy.validation.report import write_report
    from spach_deploy.validation.target import default_report

    if asked.report is not None:
        write_report(validation, asked.report)
        _write_page(validation, asked, asked.report)
    elif not asked.as_json and asked.target is not None and (default := default_report(asked.target)) is not None:
        try:
            write_report(validation, default)
        except UsageError as error:
            say(error.message)
            return
        say(f"Report: {default}")
        _write_page(validation, asked, default)


def _write_page(validation: Validation, asked: Asked, report: Path) -> None:
    """The page beside `report`; without it the report is still there, so that a sentence is enough."""
    from spach_deploy.bundle import Bundle
    from spach_deploy.report.files import page_beside, page_problem

    page, manifest = page_beside(report), Bundle.open(asked.bundle, verify=False).manifest
    problem = page_problem(validation, manifest.content, page)
    say(problem or f"Page: {page}")
    if asked.is_opened and not problem:
        open_page(page)


def open_page(page: Path) -> None:
    """Show a page in the user's browser; a sentence where there is none."""
    import webbrowser

    opened = False
    with contextlib.suppress(webbrowser.Error, OSError):
        opened = webbrowser.open(page.resolve().as_uri())
    if not opened:
        say(f"No browser could be opened here. The page is {page}")
