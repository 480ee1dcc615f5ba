"""Numbers and words as a page shows them; templates have them as filters."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Callable
from typing import Any

ABSENT = "–"
"""What stands where there is no number."""

_LONGEST_LINE = 64
_WORD = re.compile(r"""(?:\$'(?:\\.|[^'\\])*'|'[^']*'|"(?:\\.|[^"\\])*"|\\.|\S)+""", re.DOTALL)
"""A word of a command line, quotes and all."""

_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def scientific(value: Any) -> str:
    """1.13e-03, as terminals show it; report.json writes what is not finite as text."""
    if value is None:
        return ABSENT
    number = float(value)
    return f"{number:.2e}" if math.isfinite(number) else str(number)


def general(value: Any) -> str:
    """Three digits, such as 0.0351 or 12.4."""
    return ABSENT if value is None else f"{float(value):.3g}"


def times(value: Any) -> str:
    """A factor: 1,322 or 12.4."""
    number = float(value)
    return f"{number:,.0f}" if 100 <= number < math.inf else f"{number:.3g}"


def percent(value: Any, digits: int = 2) -> str:
    """A share of one as 97.50 %."""
    return ABSENT if value is None else f"{100 * float(value):.{digits}f} %"


def count(value: Any) -> str:
    """12,345."""
    return ABSENT if value is None else f"{int(value):,}"


def size(value: Any) -> str:
    """Bytes as 142.3 MB, powers of 1000."""
    if value is None:
        return ABSENT
    number, unit = float(value), 0
    while number >= 1000 and unit < len(_UNITS) - 1:
        number, unit = number / 1000, unit + 1
    return f"{number:.1f} {_UNITS[unit]}" if unit else f"{int(number)} {_UNITS[unit]}"


def seconds(value: Any) -> str:
    """0.04 s, 12.3 s, 2 min 5 s."""
    if value is None:
        return ABSENT
    number = float(value)
    if number >= 60:
        minutes, rest = divmod(round(number), 60)
        return f"{minutes} min {rest} s"
    return f"{number:.1f} s" if number >= 1 else f"{number:.2f} s"


def moment(value: Any) -> str:
    """2026-11-25 07:48 UTC, of an ISO 8601 time."""
    try:
        when = datetime.datetime.fromisoformat(str(value))
    except ValueError:
        return str(value)
    return f"{when:%Y-%m-%d %H:%M} UTC"


def sentence(text: str) -> str:
    """With a capital at its start and a full stop at its end."""
    text = text.strip()
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith(('.', '?', '!')) else '.'}"


def command(text: str) -> str:
    """A command line; a long one in several lines, as a shell takes it, broken before options."""
    lines = [""]
    for piece in _pieces(_WORD.findall(text)):
        if lines[-1] and len(lines[-1]) + len(piece) > _LONGEST_LINE:
            lines.append("")
        lines[-1] = f"{lines[-1]} {piece}".lstrip()
    return " \\\n    ".join(lines)


def _pieces(words: list[str]) -> list[str]:
    """An option with its values is one piece."""
    pieces: list[str] = []
    for word in words:
        if pieces and not word.startswith("-"):
            pieces[-1] = f"{pieces[-1]} {word}"
        else:
            pieces.append(word)
    return pieces


def plural(number: int, word: str) -> str:
    """1 image, 2 images."""
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"


FILTERS: dict[str, Callable[..., str]] = {
    "scientific": scientific,
    "general": general,
    "times": times,
    "percent": percent,
    "count": count,
    "size": size,
    "seconds": seconds,
    "moment": moment,
    "sentence": sentence,
    "plural": plural,
    "command": command,
}
