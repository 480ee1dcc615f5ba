"""Output as text and JSON, and sizes in bytes as users write them.

Control characters and undecodable bytes in names from files and servers are escaped.

Of sizes, `G` and `GiB` are 2^30 bytes, as in trtexec, Polygraphy and Docker. `GB` is 10^9 bytes, the unit in which this
package prints sizes. K, M and T follow the same rule.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from spach_deploy.common.errors import printable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.segment import Segment


_UNLIMITED = 1 << 16
_SURROGATE = re.compile("[\ud800-\udfff]")


class Escaped(str):
    """Text that is escaped already and is printed as it is. Control characters in it are our own terminal colours."""

    __slots__ = ()


def rendered(parts: Iterable[RenderableType], *, width: int | None = None, color: bool = False) -> Escaped:
    """`parts` rendered by rich and escaped, with or without terminal colours, without a newline at the end.

    Lines are not wrapped where `width` is None. Text is taken literally: a bracket in a name is not markup.
    """
    from rich.console import Console

    console = Console(
        file=io.StringIO(), width=width or _UNLIMITED, color_system=None, markup=False, emoji=False, highlight=False
    )
    lines = (line for part in parts for line in console.render_lines(part, pad=False))
    return Escaped("\n".join("".join(_shown(piece, color=color) for piece in line).rstrip() for line in lines).rstrip())


def escaped(lines: Iterable[str]) -> Escaped:
    """`lines` joined, each one escaped, newlines within it too; lines that are `Escaped` stay as they are."""
    return Escaped("\n".join(line if isinstance(line, Escaped) else printable(line) for line in lines))


def _shown(piece: Segment, *, color: bool) -> str:
    from rich.color import ColorSystem

    text = printable(piece.text)
    return piece.style.render(text, color_system=ColorSystem.STANDARD) if color and piece.style else text


def json_text(content: Any, *, indent: int | None = 2, separators: tuple[str, str] | None = None) -> str:
    """JSON that every parser accepts and every terminal can show. ValueError for numbers that are not finite.

    Bytes of names that are not UTF-8 are escaped. `json` would write them as lone surrogates, for which other parsers
    refuse the whole file.
    """
    text = json.dumps(without_surrogates(content), indent=indent, separators=separators, allow_nan=False)
    return text.replace("\x7f", "\\u007f")


def without_surrogates(value: Any) -> Any:
    """JSON content with lone surrogates in its texts escaped, so that it can be encoded as UTF-8."""
    if isinstance(value, str):
        return _SURROGATE.sub(lambda match: printable(match[0]), value)
    if isinstance(value, Mapping):
        return {without_surrogates(key): without_surrogates(entry) for key, entry in value.items()}
    return [without_surrogates(entry) for entry in value] if isinstance(value, list | tuple) else value


def noun(count: int, what: str) -> str:
    """`class` for one, else `classes`."""
    return what if count == 1 else f"{what}es" if what.endswith("s") else f"{what}s"


def counted(count: int, what: str) -> str:
    """`1 class`, `1,000 classes`."""
    return f"{count:,} {noun(count, what)}"


SIZES = "K, M, G, T or KiB, MiB, … of 1024; KB, MB, … of 1000"
"""The accepted units, for help texts and error hints."""

_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*(?:([KMGT])(B|iB?)?|B)?", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Bytes of `512M`, `2 GiB`, `1.5GB` or a plain number. ValueError for anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size")
    number, prefix, suffix = match.groups()
    base = 1000 if (suffix or "").upper() == "B" else 1024
    power = "KMGT".index(prefix.upper()) + 1 if prefix else 0
    return int(float(number) * base**power) if "." in number else int(number) * base**power
