"""Colours that can be read, in light, in dark and on paper: WCAG 2's contrast, from the style sheet's own variables."""

from __future__ import annotations

import re

import pytest

from spach_deploy.report.page import TEMPLATES
from spach_deploy.report.plots import VARIABLES

STYLE = (TEMPLATES / "style.css").read_text(encoding="utf-8")
GROUNDS = ("paper", "ground")
TEXT = [
    *((ink, ground) for ink in ("ink", "muted", "link", "bad", "good", "partial") for ground in GROUNDS),
    *(("ink", ground) for ground in ("code", "partial-ground", "bad-ground")),
    *((state, f"{state}-ground") for state in ("good", "partial", "bad")),
    ("muted", "bad-ground"),
    ("bound", "paper"),
]
GRAPHICS = [(name, "paper") for name in ("ours", "bound", "noise", "other", "fp32", "fp16", "bf16", "int8", "fp8")]


def variables(block: str) -> dict[str, str]:
    return dict(re.findall(r"--([\w-]+):\s*(#[0-9a-f]{6})\b", block))


def schemes() -> dict[str, dict[str, str]]:
    light, dark, printed = (variables(block) for block in re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL))
    return {"light": light, "dark": {**light, **dark}, "print": {**light, **printed}}


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_text_and_graphics_stand_out(scheme: str) -> None:
    colours = schemes()[scheme]
    for pairs, least in ((TEXT, 4.5), (GRAPHICS, 3.0)):
        found = {pair: contrast(colours[pair[0]], colours[pair[1]]) for pair in pairs}
        assert {pair: round(value, 2) for pair, value in found.items() if value < least} == {}


def test_every_scheme_has_a_colour_for_what_plots_use() -> None:
    assert all(set(VARIABLES) <= set(colours) for colours in schemes().values())


def test_every_variable_that_is_used_is_there() -> None:
    used = set(re.findall(r"var\(--([\w-]+)\)", STYLE))
    assert used - {"sans", "mono"} <= set(schemes()["light"])
