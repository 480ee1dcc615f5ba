"""What commands do with a report: write it and its page, and open the page."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from spach_deploy.bundle.store import GRAPH, MANIFEST, PLAN, REPORT, find_bundle
from spach_deploy.cli.console import say
from spach_deploy.common.errors import BundleError, UsageError
from spach_deploy.common.files import Destination, try_to_write

if TYPE_CHECKING:
    from spach_deploy.validation.result import Validation

_PARTS = (GRAPH, PLAN, MANIFEST)


@dataclasses.dataclass(frozen=True)
class ReportDestinations:
    """Where a report and its page go."""

    report: Destination
    page: Destination

    @classmethod
    def of(cls, report: Path) -> ReportDestinations:
        """Those of `report`. UsageError where the page would be the report itself."""
        from spach_deploy.report.page import page_beside

        return cls(Destination.of(report), Destination.of(page_beside(report)))


@dataclasses.dataclass(frozen=True)
class ReportRequest:
    """Where a report goes and whether its page is to be opened.

    `bundle`: whose manifest the page tells of. `target`: a file or directory that may have a place of its own for the
    report; None for a target outside any bundle. `report`: the user's own place.
    """

    bundle: Path
    target: Path | None
    report: Path | None
    as_json: bool
    is_opened: bool

    def check(self) -> ReportDestinations | None:
        """Where the report goes, None where none is to be written.

        Refuses what could not be honoured at the end, before the work begins.
        """
        if self.report is not None:
            check_report(self.report)
        report = self.report or self._default_report()
        places = None if report is None else ReportDestinations.of(report)
        if self.is_opened:
            check_can_open()
            if places is None and (self.target is None or self.as_json or self.target.exists()):
                raise UsageError("--open needs a page, and none would be written.", "Give --report FILE.json too.")
        return places

    def _default_report(self) -> Path | None:
        """Where a report goes that nobody asked a place for: into the bundle, when the target is a part of it."""
        if self.as_json or self.target is None or not (self.target.is_dir() or self.target.name in _PARTS):
            return None
        try:
            return find_bundle(self.target) / REPORT
        except BundleError:
            return None


def check_report(file: Path) -> None:
    """UsageError where a report that the user asked for could not be written."""
    try:
        try_to_write(file)
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"The report {file} cannot be written ({reason}).", "Choose another --report FILE.") from None


def check_can_open() -> None:
    """MissingPackageError where no page could be made."""
    from spach_deploy.report.page import check_can_make_pages

    check_can_make_pages()


def write_reports(validation: Validation, asked: ReportRequest, places: ReportDestinations) -> None:
    """The report and its page. Where the user named no place, being unable to write into the bundle is no error."""
    from spach_deploy.validation.result import write_report

    try:
        write_report(validation, places.report)
    except UsageError as error:
        if asked.report is not None:
            raise
        say(error.message)
        return
    if asked.report is None:
        say(f"Report: {places.report.path}")
    _write_page(validation, asked, places.page)


def _write_page(validation: Validation, asked: ReportRequest, place: Destination) -> None:
    """The page; without it the report is still there, so that a sentence is enough."""
    from spach_deploy.bundle.store import Bundle
    from spach_deploy.report.page import page_problem

    problem = page_problem(validation, Bundle.open(asked.bundle, verify=False).manifest, place)
    say(problem or f"Page: {place.path}")
    if asked.is_opened and not problem:
        open_page(place.path)


def open_page(page: Path) -> None:
    """Show a page in the user's browser; a sentence where there is none."""
    import webbrowser

    opened = False
    with contextlib.suppress(webbrowser.Error, OSError):
        opened = webbrowser.open(page.resolve().as_uri())
    if not opened:
        say(f"No browser could be opened here. The page is {page}")
