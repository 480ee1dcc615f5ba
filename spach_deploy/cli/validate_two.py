"""spach-validate A B: which options belong to two bundles, what is printed and written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from spach_deploy.cli.console import say, show
from spach_deploy.cli.outputs import is_colored, width
from spach_deploy.cli.reporting import ReportPlaces, check_report, open_page
from spach_deploy.errors import SpachError, UsageError

if TYPE_CHECKING:
    from spach_deploy.files import Place
    from spach_deploy.validation.side_by_side import SideBySide
    from spach_deploy.validation.target import ValidationRequest


def check_options(misplaced: Mapping[str, object], report: Path | None, *, is_opened: bool) -> ReportPlaces | None:
    """Where the report goes. UsageError for options that are of one target, MissingPackageError where a page is asked
    for and cannot be."""
    given = [option for option, value in misplaced.items() if value]
    if given:
        raise UsageError(f"{given[0]} is for one target.", "Leave it out, or give one bundle.")
    if report is not None:
        check_report(report)
    places = None if report is None else ReportPlaces.of(report)
    if is_opened:
        from spach_deploy.report.files import check_can_make_pages

        check_can_make_pages()
        if places is None:
            raise UsageError("--open needs a page, and none would be written.", "Give --report FILE.json too.")
    return places


def validate_two(first: ValidationRequest, second: Path, command: str) -> SideBySide:
    """Both bundles validated with the same options, and compared."""
    from spach_deploy.validation.run import Run
    from spach_deploy.validation.side_by_side import compare_bundles

    compared = compare_bundles(first, dataclasses.replace(first, target=second), say)
    return dataclasses.replace(compared, run=Run.here(command))


def show_two(compared: SideBySide, places: ReportPlaces | None, *, as_json: bool, is_opened: bool) -> int:
    """Print the table or the JSON, write what was asked for; the exit code."""
    from spach_deploy.validation.report import dumped, write_whole
    from spach_deploy.validation.side_table import as_text
    from spach_deploy.validation.table import WIDTH

    show(dumped(compared.to_dict()).rstrip() if as_json else as_text(compared, width=width(WIDTH), color=is_colored()))
    if places is not None:
        write_whole(places.report, dumped(compared.to_dict()))
        _write_page(compared, places.page, is_opened=is_opened)
    return compared.exit_code


def _write_page(compared: SideBySide, place: Place, *, is_opened: bool) -> None:
    from spach_deploy.report.two import write_page_of_two

    try:
        write_page_of_two(compared, place)
    except SpachError as error:
        say(str(error))
        return
    say(f"Page: {place.path}")
    if is_opened:
        open_page(place.path)
