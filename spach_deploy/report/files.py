"""Where a page lies, and how it gets there."""

from __future__ import annotations

import contextlib
import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from spach_deploy.bundle.schema import Manifest
from spach_deploy.common.errors import BundleError, MissingPackageError, SpachError, UsageError
from spach_deploy.common.files import Destination
from spach_deploy.report.content import ReportContent, pictures_of
from spach_deploy.report.page import environment, is_ours, load_templates, render
from spach_deploy.report.plots import check_matplotlib
from spach_deploy.validation.result import write_whole

if TYPE_CHECKING:
    from spach_deploy.validation.result import Validation

_SUFFIX = ".html"


def page_beside(report: Path) -> Path:
    """The page of a report: of the same name, ending in .html. UsageError where that is the report itself."""
    page = report.with_suffix(_SUFFIX)
    if page == report:
        raise UsageError(f"--report {report} is where the page goes.", f"Give {report.with_suffix('.json').name}.")
    return page


def check_can_make_pages() -> None:
    """MissingPackageError without jinja2 or matplotlib."""
    environment()
    check_matplotlib()


def load_page_modules() -> None:
    """Load what a page needs, if it is here."""
    with contextlib.suppress(MissingPackageError):
        check_can_make_pages()
        load_templates()


def content_of(validation: Validation, manifest: Manifest | None) -> ReportContent:
    """A validation with the manifest of what it was made of, and the pictures that its page shows."""
    report = validation.to_dict()
    content = ReportContent(report, manifest)
    wanted = [answer["image"] for answer in content.first.get("answers", ())]
    pictures = {} if manifest is None else pictures_of(validation.eval_set.inputs, manifest.preprocessing, wanted)
    made = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return ReportContent(report, manifest, pictures, made)


def write_page(validation: Validation, manifest: Manifest | None, place: Destination) -> None:
    """Make the page and write it in one step.

    Raises MissingPackageError without jinja2 or matplotlib, UsageError where it cannot be written or another's page is
    there, BundleError for a manifest with numbers that mean nothing.
    """
    check_ours(place.path)
    try:
        text = render(content_of(validation, manifest))
    except SpachError:
        raise
    except Exception as error:  # a manifest that somebody changed may hold any number, and the work is done
        reason = f"{type(error).__name__}: {error}"
        raise BundleError(
            f"The page {place.path.name} was not made: an entry of the manifest or the report is not of its kind"
            f" ({reason}).",
            "The report itself is complete; export the bundle again for a page.",
        ) from error
    write_whole(place, text)


def page_problem(validation: Validation, manifest: Manifest | None, place: Destination) -> str:
    """Make the page; why it was not made, in a sentence, where that is so. The report itself is there in any case."""
    try:
        write_page(validation, manifest, place)
    except SpachError as error:
        return str(error)
    return ""


def check_ours(page: Path) -> None:
    """UsageError where somebody else's page is: it is left alone."""
    if not is_ours(page):
        raise UsageError(f"{page} is no page of spach-deploy and is left alone.", "Give another --report FILE.json.")
