"""Make report.html, and the page that compares two bundles: sections in order, filled into templates.

    write_page(validation, manifest, destination)
    text = render(ReportContent(report, manifest, pictures))

`SECTIONS` lists the sections. `render` and `fill` make a page's text; the functions below them write it.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spach_deploy._version import __version__
from spach_deploy.bundle.schema import Manifest
from spach_deploy.common.errors import BundleError, MissingPackageError, SpachError, UsageError, printable_lines
from spach_deploy.common.files import Destination
from spach_deploy.common.versions import refuse_old
from spach_deploy.report import bundle_sections, validation_sections
from spach_deploy.report.content import FILTERS, ReportContent, general, pictures_of, scientific
from spach_deploy.report.plots import INSTALL, check_matplotlib
from spach_deploy.validation.result import write_whole
from spach_deploy.validation.side_by_side import figures

if TYPE_CHECKING:
    from jinja2 import Environment

    from spach_deploy.validation.result import Validation
    from spach_deploy.validation.side_by_side import Side, SideBySide


TEMPLATES = Path(__file__).with_name("templates")
GENERATOR = "spach-deploy"
"""The generator that our pages name in their head."""

_OWN_TAG = f'<meta name="generator" content="{GENERATOR}'
_HEAD_BYTES = 2048
_SUFFIX = ".html"


def is_own_page(page: Path) -> bool:
    """Whether the file is a page of spach-deploy, or does not exist. Others are never overwritten."""
    try:
        with page.open("rb") as stream:
            return _OWN_TAG.encode() in stream.read(_HEAD_BYTES)
    except FileNotFoundError:
        return True
    except OSError:
        return False


@dataclasses.dataclass(frozen=True)
class Section:
    """A section: its anchor and template, its heading, and the function that selects its content (None leaves it out).

    A `title` in the content replaces the heading.
    """

    name: str
    title: str
    view: Callable[[ReportContent], Mapping[str, Any] | None]


SECTIONS = (
    Section("bisect", "Bisection", validation_sections.bisect),
    Section("compared", "What was compared", validation_sections.compared),
    Section("steps", "The pipeline, step by step", bundle_sections.steps),
    Section("depth", "Error along the depth", validation_sections.depth),
    Section("answers", "Images", validation_sections.answers),
    Section("accuracy", "Accuracy", validation_sections.accuracy),
    Section("precision", "Precision, layer by layer", bundle_sections.precision),
    Section("ranges", "Ranges", bundle_sections.ranges),
    Section("graph", "Graph and engine", bundle_sections.graph),
    Section("again", "Do it again", bundle_sections.again),
)
"""The sections of a page in order, below the verdict."""


def render(content: ReportContent) -> str:
    """The whole page as text. Raises MissingPackageError without jinja2 or matplotlib."""
    shown = [(section, view) for section in SECTIONS if (view := section.view(content)) is not None]
    report = content.report
    return fill(
        "page.html.jinja",
        title=f"{report['model']} {str(report['precision']).upper()}: {validation_sections.heading_of(report)}",
        verdict=validation_sections.verdict(content),
        sections=[{"name": s.name, "title": view.get("title", s.title), "view": view} for s, view in shown],
        report=report,
        manifest=content.manifest,
    )


def fill(template: str, **values: Any) -> str:
    """Fill a template. `base.html.jinja` is the frame of every page and needs `title`."""
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    page = environment().get_template(template)
    return printable_lines(page.render(generator=f"{GENERATOR} {__version__}", style=style, **values))


@functools.cache
def environment() -> Environment:
    """The jinja2 environment: everything is escaped, and an unknown name is an error.

    Raises MissingPackageError without jinja2, OldPackageError where it is too old.
    """
    try:
        import jinja2
    except ImportError:
        raise MissingPackageError("jinja2", "The page report.html", INSTALL) from None
    refuse_old("jinja2")
    loader = jinja2.FileSystemLoader(TEMPLATES)
    made = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters.update(FILTERS)
    return made


# Files


def page_beside(report: Path) -> Path:
    """The page's file for a report: the same name, ending in .html. UsageError where that is the report itself."""
    page = report.with_suffix(_SUFFIX)
    if page == report:
        raise UsageError(f"--report {report} is where the page goes.", f"Give {report.with_suffix('.json').name}.")
    return page


def check_can_make_pages() -> None:
    """Raises MissingPackageError without jinja2 or matplotlib."""
    environment()
    check_matplotlib()


def why_no_pages() -> str:
    """In a sentence what is missing to make pages, or ""."""
    try:
        check_can_make_pages()
    except SpachError as error:
        return str(error)
    return ""


def content_of(validation: Validation, manifest: Manifest | None) -> ReportContent:
    """A validation and its bundle's manifest as a page's content, with the pictures that the page shows."""
    report = validation.to_dict()
    content = ReportContent(report, manifest)
    wanted = [answer["image"] for answer in content.first.get("answers", ())]
    pictures = {} if manifest is None else pictures_of(validation.eval_set.inputs, manifest.preprocessing, wanted)
    made = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return ReportContent(report, manifest, pictures, made)


def write_page(validation: Validation, manifest: Manifest | None, destination: Destination) -> None:
    """Make the page and write it in one step.

    Raises MissingPackageError without jinja2 or matplotlib, UsageError where it cannot be written or another's page is
    there, BundleError for a manifest with numbers that mean nothing.
    """
    check_own_page(destination.path)
    try:
        text = render(content_of(validation, manifest))
    except SpachError:
        raise
    except Exception as error:  # a manifest that somebody changed may hold any number, and the work is done
        reason = f"{type(error).__name__}: {error}"
        raise BundleError(
            f"The page {destination.path.name} was not made: an entry of the manifest or the report is not of its kind"
            f" ({reason}).",
            "The report itself is complete; export the bundle again for a page.",
        ) from error
    write_whole(destination, text)


def page_problem(validation: Validation, manifest: Manifest | None, destination: Destination) -> str:
    """Make the page; returns in a sentence why it was not made, or "". The report is written in either case."""
    try:
        write_page(validation, manifest, destination)
    except SpachError as error:
        return str(error)
    return ""


def check_own_page(page: Path) -> None:
    """UsageError where the file is somebody else's page, which is never overwritten."""
    if not is_own_page(page):
        raise UsageError(f"{page} is no page of spach-deploy and is left alone.", "Give another --report FILE.json.")


def write_page_of_two(compared: SideBySide, destination: Destination) -> None:
    """Make the page and write it in one step.

    Raises MissingPackageError without jinja2, UsageError where it cannot be written or another's page is there.
    """
    check_own_page(destination.path)
    write_whole(destination, page_of_two(compared))


def page_of_two(compared: SideBySide) -> str:
    """The page as text."""
    names = [side.bundle.path.name or str(side.bundle.path) for side in compared.sides]
    return fill(
        "two.html.jinja",
        title=f"{names[0]} and {names[1]}",
        names=names,
        paths=[str(side.bundle.path) for side in compared.sides],
        state=_state(compared),
        heading=_heading(compared),
        reason=_reason(compared),
        is_demo=any(side.validation.header.is_demo for side in compared.sides),
        findings=compared.findings,
        notes=compared.notes,
        facts=[{"name": f.name, "values": (f.first, f.second), "differs": f.differs} for f in compared.facts],
        figures=list(figures(compared)),
        levels=[side.validation.level_sentence() for side in compared.sides],
        layers=compared.layers,
        answers=_answers(compared),
        flips=bool(compared.answers and compared.answers[0].flipped),
        run=None if compared.run is None else compared.run.to_dict(),
    )


def _state(compared: SideBySide) -> str:
    if not compared.passed:
        return "bad"
    return "partial" if any(side.validation.missing_engine_run for side in compared.sides) else "good"


def _heading(compared: SideBySide) -> str:
    if compared.passed:
        return "Both agree with PyTorch in FP32"
    wrong = [side.bundle.path.name for side in compared.sides if not side.validation.passed]
    return f"{' and '.join(wrong)} does not agree with PyTorch" if wrong else "They disagree with each other"


def _reason(compared: SideBySide) -> str:
    direct = compared.direct
    if direct is None:
        return "They were not compared with each other."
    allowed = "" if compared.allowed is None else f", of {scientific(compared.allowed)} that both bounds together allow"
    flips = len(direct.scores.flips) if direct.scores is not None else 0
    verb = "differ" if direct.name == "logits" else "differs"
    differ = f"The second's {direct.name} {verb} from the first's by a relative L2 of"
    changed = "" if direct.scores is None else f"; {flips} of {direct.shape[0]} images change class between them"
    return f"{differ} {scientific(direct.rel_l2_worst)}{allowed}{changed}."


def _answers(compared: SideBySide) -> list[dict[str, Any]]:
    """Images on which the bundles differ, or nearly, with both sets of best classes."""
    pictures = _pictures(compared.first, [answer.image for answer in compared.answers])
    return [
        {
            "name": answer.name or f"image {answer.image}",
            "picture": pictures.get(answer.image),
            "flipped": answer.flipped,
            "margins": (general(answer.reference_margin), general(answer.candidate_margin)),
            "best": [
                [(ranked.index, f"{ranked.score:.3f}") for ranked in side]
                for side in (answer.reference, answer.candidate)
            ],
        }
        for answer in compared.answers
    ]


def _pictures(side: Side, wanted: list[int]) -> dict[int, str]:
    return pictures_of(side.validation.eval_set.inputs, side.bundle.manifest.preprocessing, wanted)
