"""Plots over the parts of a network with a logarithmic axis, drawn by matplotlib as SVG, once wide and once narrow.

    chart = Chart(("stem", "layer1.0"), (Line("this engine", (1e-4, 2e-4), "ours"),), "relative L2")
    drawn = draw(chart, "depth")     # drawn.wide, drawn.narrow: `<svg>` elements

The style sheet shows the form that fits. The page shows `drawn.legend` itself. A figure is drawn in stand-in colours
(`STAND_INS`), one for each CSS variable of the style sheet, which are replaced by these variables afterwards. So a plot
is dark where the page is dark, and prints as the page does.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import logging
import math
import re
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from spach_deploy.common.errors import MissingPackageError
from spach_deploy.common.versions import refuse_old
from spach_deploy.report.content import scientific

VARIABLES = ("ink", "muted", "line", "ours", "bound", "noise", "other", "bad")
"""CSS colour variables that a plot may use."""

STAND_INS = {name: f"#0{index}0{index}0{index}" for index, name in enumerate(VARIABLES, start=1)}
"""The colour that stands in for each variable."""

_HEAD = re.compile(r"^.*?<svg[^>]*>", re.DOTALL)
_LEFT_OUT = re.compile(r"\s*<(metadata|style)\b.*?</\1>|<defs>\s*</defs>", re.DOTALL)
_FONT = re.compile(r"font-family: [^;\"]*;?\s*")
_ID = re.compile(r'(\bid="|href="#|url\(#)([^")]+)')
_SPACES = re.compile(r"[ \t]*\n\s*")


def for_page(text: str, width: int, height: int, prefix: str) -> str:
    """An `<svg>` element for a page. `prefix` makes its ids unique in the page."""
    text = _LEFT_OUT.sub("", _HEAD.sub("", text, count=1))
    text = _ID.sub(lambda found: f"{found[1]}{prefix}-{found[2]}", _FONT.sub("", text))
    for name, colour in STAND_INS.items():
        text = text.replace(colour, f"var(--{name})")
    inner = _SPACES.sub("\n", text).replace("</svg>", "").strip()
    return f'<svg viewBox="0 0 {width} {height}" aria-hidden="true" focusable="false">{inner}</svg>'


def with_hints(svg: str, spots: Sequence[tuple[float, float, float, float]], texts: Sequence[str]) -> str:
    """The plot with an invisible area (x, y, width, height) for each text, which a browser shows as a tooltip."""
    hints = "".join(
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"><title>{escape(text)}</title></rect>'
        for (x, y, width, height), text in zip(spots, texts, strict=True)
    )
    return svg.replace("</svg>", f'<g class="hints">{hints}</g></svg>')


WIDE, NARROW = (840, 320), (360, 290)
"""Sizes in CSS pixels."""

_POINTS_PER_INCH = 72  # of an SVG by matplotlib, so that one unit is one pixel
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 14, 30
_FONT_SIZE = 12
_MOST_DOTS = 60  # more of them would be a band
_FEWEST_PIXELS = 34
"""A label of a group gets as many, or is left out."""

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
INSTALL = "pip install 'spach-deploy[report]'"


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve: a value for each part of the network, None where there is none.

    `colour`: one of `VARIABLES`. `dash`: solid, dashed or dotted. `dots`: mark every value where there is room.
    `marked`: indices of values beyond the limit.
    """

    label: str
    values: tuple[float | None, ...]
    colour: str
    dash: str = "solid"
    dots: bool = False
    marked: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Limit:
    """A horizontal limit, labelled in the plot."""

    label: str
    value: float


@dataclasses.dataclass(frozen=True)
class Chart:
    """A plot over the network. `parts`: names of the network's parts, in order."""

    parts: tuple[str, ...]
    lines: tuple[Line, ...]
    unit: str
    limits: tuple[Limit, ...] = ()


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A chart as two SVG elements, the label of its axis, and its legend."""

    wide: str
    narrow: str
    unit: str
    legend: tuple[Line, ...]
    has_marks: bool = False


@dataclasses.dataclass(frozen=True)
class Group:
    """Consecutive parts whose names begin with the same word: a network stage."""

    name: str
    start: int
    stop: int


def groups_of(parts: Sequence[str]) -> list[Group]:
    """layer1.0, layer1.1, layer2.0 -> layer1 (0 to 2), layer2 (2 to 3)."""
    found, start = [], 0
    for name, members in itertools.groupby(parts, key=lambda part: part.partition(".")[0]):
        stop = start + len(list(members))
        found.append(Group(name, start, stop))
        start = stop
    return found


def draw(chart: Chart, prefix: str) -> Drawn | None:
    """Both forms of a chart; None where it has no positive number. `prefix` makes ids in the page unique.

    Raises MissingPackageError without matplotlib.
    """
    if not list(_positive(chart)):
        return None
    wide, narrow = (_svg(chart, size, f"{prefix}-{size[0]}") for size in (WIDE, NARROW))
    lines = tuple(dataclasses.replace(line, dots=line.dots and len(chart.parts) <= _MOST_DOTS) for line in chart.lines)
    return Drawn(wide, narrow, chart.unit, lines, any(line.marked for line in lines))


def _positive(chart: Chart) -> Iterator[float]:
    for line in chart.lines:
        yield from (value for value in line.values if value is not None and 0 < value < math.inf)


def _svg(chart: Chart, size: tuple[int, int], prefix: str) -> str:
    matplotlib = _matplotlib()
    width, height = size
    file = io.StringIO()
    with matplotlib.rc_context(_style()):
        figure = matplotlib.figure.Figure(figsize=(width / _POINTS_PER_INCH, height / _POINTS_PER_INCH))
        box = (_LEFT / width, _BOTTOM / height, 1 - (_LEFT + _RIGHT) / width, 1 - (_TOP + _BOTTOM) / height)
        axes = figure.add_axes(box)
        _fill(axes, chart, width - _LEFT - _RIGHT)
        matplotlib.backends.backend_svg.FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    svg = for_page(file.getvalue(), width, height, prefix)
    return with_hints(svg, list(_spots(chart, size)), _hints(chart))


def check_matplotlib() -> None:
    """Raises MissingPackageError without matplotlib, OldPackageError where it is too old."""
    _matplotlib()


def _matplotlib() -> Any:
    """matplotlib, without its messages about fonts and folders."""
    try:
        logging.getLogger("matplotlib").setLevel(logging.ERROR)
        import matplotlib
        import matplotlib.backends.backend_svg
        import matplotlib.figure
    except ImportError:
        raise MissingPackageError("matplotlib", "The page report.html", INSTALL) from None
    refuse_old("matplotlib")
    return matplotlib


def _style() -> dict[str, Any]:
    """Style: text stays text, and the same numbers give the same bytes."""
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "spach-deploy",
        "font.size": _FONT_SIZE,
        "axes.linewidth": 1,
        "axes.edgecolor": STAND_INS["line"],
        "axes.labelcolor": STAND_INS["muted"],
        "text.color": STAND_INS["ink"],
        "xtick.color": STAND_INS["line"],
        "xtick.labelcolor": STAND_INS["muted"],
        "ytick.color": STAND_INS["line"],
        "ytick.labelcolor": STAND_INS["muted"],
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
    }


def _fill(axes: Any, chart: Chart, width: int) -> None:
    axes.set_yscale("log")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    for line in chart.lines:
        _plot(axes, line)
    for limit in chart.limits:
        axes.axhline(limit.value, color=STAND_INS["bound"], linewidth=1.5, dashes=(6, 3))
        at = (1.0, limit.value)
        axes.annotate(
            limit.label,
            at,
            xycoords=("axes fraction", "data"),
            xytext=(0, -5),
            textcoords="offset points",
            ha="right",
            va="top",
            color=STAND_INS["bound"],
        )
    axes.set_xlim(-0.5, len(chart.parts) - 0.5)
    _label_depth(axes, groups_of(chart.parts), width / len(chart.parts))
    _label_decades(axes, chart)


def _plot(axes: Any, line: Line) -> None:
    values = [math.nan if value is None or value <= 0 else value for value in line.values]
    style = {"solid": "-", "dashed": (0, (5, 3)), "dotted": (0, (1, 2))}[line.dash]
    marker = {"marker": "o", "markersize": 5} if line.dots and len(values) <= _MOST_DOTS else {}
    axes.plot(range(len(values)), values, color=STAND_INS[line.colour], linewidth=2, linestyle=style, **marker)
    beyond = [values[index] for index in line.marked]
    axes.plot(line.marked, beyond, "o", color=STAND_INS["bad"], markersize=7, zorder=3)


def _label_depth(axes: Any, groups: list[Group], pixels_per_part: float) -> None:
    """Network stages below the axis, with lines between them."""
    shown = [group for group in groups if (group.stop - group.start) * pixels_per_part >= _FEWEST_PIXELS]
    shown = shown or groups[:: max(1, len(groups) // 4)]
    axes.set_xticks([(group.start + group.stop - 1) / 2 for group in shown], [group.name for group in shown])
    for group in groups[1:]:
        axes.axvline(group.start - 0.5, color=STAND_INS["line"], linewidth=1)


def _label_decades(axes: Any, chart: Chart) -> None:
    """Decades that cover all values: a grid line for each, at most seven with a label."""
    values = [*_positive(chart), *(limit.value for limit in chart.limits)]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    step = max(1, math.ceil((high - low) / 7))
    powers = range(low, high + 1, step)
    axes.set_ylim(10.0**low, 10.0**high)
    axes.set_yticks([10.0**power for power in powers], [f"10{str(power).translate(_SUPERSCRIPT)}" for power in powers])
    axes.yaxis.minorticks_off()
    axes.grid(axis="y", color=STAND_INS["line"], linewidth=1)
    axes.set_axisbelow(True)


def _spots(chart: Chart, size: tuple[int, int]) -> Iterator[tuple[float, float, float, float]]:
    width, height = size
    step = (width - _LEFT - _RIGHT) / len(chart.parts)
    for index in range(len(chart.parts)):
        yield _LEFT + index * step, _TOP, step, height - _TOP - _BOTTOM


def _hints(chart: Chart) -> list[str]:
    return [
        "\n".join([part, *(f"{line.label}: {scientific(line.values[index])}" for line in chart.lines)])
        for index, part in enumerate(chart.parts)
    ]
