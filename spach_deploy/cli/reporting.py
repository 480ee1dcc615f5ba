"""Reports of commands: where report.json and its HTML page are written, writing them, and opening the page."""

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
    """Destinations of a report and its page."""

    report: Destination
    page: Destination

    @classmethod
    def of(cls, report: Path) -> ReportDestinations:
        """The destinations for a report at `report`. UsageError where the page would overwrite the report."""
        from spach_deploy.report.page import page_beside

        return cls(Destination.of(report), Destination.of(page_beside(report)))


@dataclasses.dataclass(frozen=True)
class ReportRequest:
    """Where a report is to be written, and whether its page is to be opened.

    `bundle`: the bundle whose manifest the page shows. `target`: what is validated, if its report may go into its
    bundle; None for targets outside any bundle. `report`: the path that the user gave. `is_opened`: open the page.
    """

    bundle: Path
    target: Path | None
    report: Path | None
    as_json: bool
    is_opened: bool

    def check(self) -> ReportDestinations | None:
        """The report's destinations, None where none is to be written.

        UsageError or MissingPackageError, before the work begins, for what could not be written or opened at its end.
        """
        if self.report is not None:
            check_report(self.report)
        report = self.report or self._default_report()
        destinations = None if report is None else ReportDestinations.of(report)
        if self.is_opened:
            check_can_open()
            if destinations is None and (self.target is None or self.as_json or self.target.exists()):
                raise UsageError("--open needs a page, and none would be written.", "Give --report FILE.json too.")
        return destinations

    def _default_report(self) -> Path | None:
        """The report in the target's bundle, where the target is a bundle or one of its files; else None."""
        if self.as_json or self.target is None or not (self.target.is_dir() or self.target.name in _PARTS):
            return None
        try:
            return find_bundle(self.target) / REPORT
        except BundleError:
            return None


def check_report(file: Path) -> None:
    """UsageError where the report could not be written to `file`."""
    try:
        try_to_write(file)
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"The report {file} cannot be written ({reason}).", "Choose another --report FILE.") from None


def check_can_open() -> None:
    """MissingPackageError where pages cannot be made, and so not be opened."""
    from spach_deploy.report.page import check_can_make_pages

    check_can_make_pages()


def write_reports(validation: Validation, request: ReportRequest, destinations: ReportDestinations) -> None:
    """Write the report and its page. Where the user gave no path, failing to write into the bundle is no error."""
    from spach_deploy.validation.result import write_report

    try:
        write_report(validation, destinations.report)
    except UsageError as error:
        if request.report is not None:
            raise
        say(error.message)
        return
    if request.report is None:
        say(f"Report: {destinations.report.path}")
    _write_page(validation, request, destinations.page)


def _write_page(validation: Validation, request: ReportRequest, destination: Destination) -> None:
    """Write and open the page. Where that fails, a sentence says so: the report is there all the same."""
    from spach_deploy.bundle.store import Bundle
    from spach_deploy.report.page import page_problem

    problem = page_problem(validation, Bundle.open(request.bundle, verify=False).manifest, destination)
    say(problem or f"Page: {destination.path}")
    if request.is_opened and not problem:
        open_page(destination.path)


def open_page(page: Path) -> None:
    """Open a page in the user's browser; say so where there is no browser."""
    import webbrowser

    opened = False
    with contextlib.suppress(webbrowser.Error, OSError):
        opened = webbrowser.open(page.resolve().as_uri())
    if not opened:
        say(f"No browser could be opened here. The page is {page}")
