"""matplotlib's SVG made fit for a page: colours that follow the page's, its font, ids that are nobody else's.

A figure is drawn in stand-in colours (`STAND_INS`), one for each CSS variable of the style sheet, and those are
exchanged here, so that a plot is dark where the page is and prints as the page does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

VARIABLES = ("ink", "muted", "line", "ours", "bound", "noise", "other", "bad")
"""Names of the style sheet's colours that a plot may use."""

STAND_INS = {name: f"#0{index}0{index}0{index}" for index, name in enumerate(VARIABLES, start=1)}
"""Colour to draw in, by variable."""

_HEAD = re.compile(r"^.*?<svg[^>]*>", re.DOTALL)
_LEFT_OUT = re.compile(r"\s*<(metadata|style)\b.*?</\1>|<defs>\s*</defs>", re.DOTALL)
_FONT = re.compile(r"font-family: [^;\"]*;?\s*")
_ID = re.compile(r'(\bid="|href="#|url\(#)([^")]+)')
_SPACES = re.compile(r"[ \t]*\n\s*")


def for_page(text: str, width: int, height: int, prefix: str) -> str:
    """An `<svg>` element to put into a page; `prefix` is this plot's own."""
    text = _LEFT_OUT.sub("", _HEAD.sub("", text, count=1))
    text = _ID.sub(lambda found: f"{found[1]}{prefix}-{found[2]}", _FONT.sub("", text))
    for name, colour in STAND_INS.items():
        text = text.replace(colour, f"var(--{name})")
    inner = _SPACES.sub("\n", text).replace("</svg>", "").strip()
    return f'<svg viewBox="0 0 {width} {height}" aria-hidden="true" focusable="false">{inner}</svg>'


def with_hints(svg: str, spots: Sequence[tuple[float, float, float, float]], texts: Sequence[str]) -> str:
    """With an invisible area (x, y, width, height) for each text, which a browser shows when pointed at."""
    hints = "".join(
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"><title>{escape(text)}</title></rect>'
        for (x, y, width, height), text in zip(spots, texts, strict=True)
    )
    return svg.replace("</svg>", f'<g class="hints">{hints}</g></svg>')
