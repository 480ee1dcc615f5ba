"""spach-validate A B: which options belong to two bundles, what is printed and written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from spach_deploy.cli.console import say, show
from spach_deploy.cli.outputs import is_colored, width
from spach_deploy.errors import SpachError, UsageError

if TYPE_CHECKING:
    from spach_deploy.validation.side_by_side import SideBySide
    from spach_deploy.validation.target import ValidationRequest


def check_options(misplaced: Mapping[str, object], report: Path | None, *, is_opened: bool) -> None:
    """UsageError for options that are of one target, MissingPackageError where a page is asked for and cannot be."""
    given = [option for option, value in misplaced.items() if value]
    if given:
        raise UsageError(f"{given[0]} is for one target.", "Leave it out, or give one bundle.")
    if report is not None:
        from spach_deploy.report.files import page_beside

        page_beside(report)
    if is_opened:
        from spach_deploy.report.files import check_can_make_pages

        check_can_make_pages()
        if report is None:
            raise UsageError("--open needs a page, and none would be written.", "Give --report FILE.json too.")


def validate_two(first: ValidationRequest, second: Path, command: str) -> SideBySide:
    """Both bundles validated with the same options, and compared."""
    from spach_deploy.validation.run import Run
    from spach_deploy.validation.side_by_side import compare_bundles

    compared = compare_bundles(first, dataclasses.replace(first, target=second), say)
    return dataclasses.replace(compared, run=Run.here(command))


def show_two(compared: SideBySide, report: Path | None, *, as_json: bool, is_opened: bool) -> int:
    """Print the table or the JSON, write what was asked for; the exit code."""
    from spach_deploy.validation.report import dumped, write_whole
    from spach_deploy.validation.side_table import as_text
    from spach_deploy.validation.table import WIDTH

    show(dumped(compared.to_dict()).rstrip() if as_json else as_text(compared, width=width(WIDTH), color=is_colored()))
    if report is not None:
        write_whole(report, dumped(compared.to_dict()))
        _write_page(compared, report, is_opened=is_opened)
    return compared.exit_code


def _write_page(compared: SideBySide, report: Path, *, is_opened: bool) -> None:
    from spach_deploy.report.files import page_beside
    from spach_deploy.report.two import write_page_of_two

    page = page_beside(report)
    try:
        write_page_of_two(compared, page)
    except SpachError as error:
        say(str(error))
        return
    say(f"Page: {page}")
    if is_opened:
        from spach_deploy.cli.reporting import open_page

        open_page(page)
