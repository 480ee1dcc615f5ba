"""The page: its sections in order, and the environment in which templates are filled.

text = render(Content(report, manifest, pictures))
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spach_deploy._version import __version__
from spach_deploy.common.errors import MissingPackageError, printable_lines
from spach_deploy.common.versions import refuse_old
from spach_deploy.report import sections
from spach_deploy.report.content import FILTERS, ReportContent
from spach_deploy.report.plots import INSTALL

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).with_name("templates")
GENERATOR = "spach-deploy"
"""What a page of ours says made it."""

_OURS = f'<meta name="generator" content="{GENERATOR}'
_HEAD_BYTES = 2048


def is_ours(page: Path) -> bool:
    """Whether a page of spach-deploy lies there, or nothing: another's is left alone."""
    try:
        with page.open("rb") as stream:
            return _OURS.encode() in stream.read(_HEAD_BYTES)
    except FileNotFoundError:
        return True
    except OSError:
        return False


@dataclasses.dataclass(frozen=True)
class Section:
    """A section: its anchor and template, its heading, and what picks its contents (None leaves it out).

    A `title` among the contents is a heading that says more.
    """

    name: str
    title: str
    view: Callable[[ReportContent], Mapping[str, Any] | None]


SECTIONS = (
    Section("bisect", "Bisection", sections.bisect),
    Section("compared", "What was compared", sections.compared),
    Section("steps", "The pipeline, step by step", sections.steps),
    Section("depth", "Error along the depth", sections.depth),
    Section("answers", "Images", sections.answers),
    Section("accuracy", "Accuracy", sections.accuracy),
    Section("precision", "Precision, layer by layer", sections.precision),
    Section("ranges", "Ranges", sections.ranges),
    Section("graph", "Graph and engine", sections.graph),
    Section("again", "Do it again", sections.again),
)
"""What a page shows, in order, below its verdict."""


def render(content: ReportContent) -> str:
    """The whole page as text. Raises MissingPackageError without jinja2 or matplotlib."""
    shown = [(section, view) for section in SECTIONS if (view := section.view(content)) is not None]
    report = content.report
    return fill(
        "page.html.jinja",
        title=f"{report['model']} {str(report['precision']).upper()}: {sections.heading_of(report)}",
        verdict=sections.verdict(content),
        sections=[{"name": s.name, "title": view.get("title", s.title), "view": view} for s, view in shown],
        report=report,
        manifest=content.manifest,
    )


def fill(template: str, **values: Any) -> str:
    """A template filled: `base.html.jinja` is the frame of every page, and needs `title`."""
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    page = environment().get_template(template)
    return printable_lines(page.render(generator=f"{GENERATOR} {__version__}", style=style, **values))


def load_templates() -> None:
    """Those that most pages are made of, compiled before they are needed. MissingPackageError without jinja2."""
    made = environment()
    for name in ("base.html.jinja", "page.html.jinja", "parts.jinja", *(f"sections/{s.name}.jinja" for s in SECTIONS)):
        made.get_template(name)


@functools.cache
def environment() -> Environment:
    """Everything is escaped, and a name that is not there is an error.

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
