"""Text for people and programs: what comes from files and servers is escaped, in tables as in JSON."""

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
    """Text that is escaped already: a control character in it is a colour of ours. It is printed as it is."""

    __slots__ = ()


def rendered(parts: Iterable[RenderableType], *, width: int | None = None, color: bool = False) -> Escaped:
    """What rich makes of `parts`, escaped, with or without a terminal's colours, without a newline at its end.

    No line is broken where `width` is None. Text is taken literally: a bracket in a name is no markup.
    """
    from rich.console import Console

    console = Console(
        file=io.StringIO(), width=width or _UNLIMITED, color_system=None, markup=False, emoji=False, highlight=False
    )
    lines = (line for part in parts for line in console.render_lines(part, pad=False))
    return Escaped("\n".join("".join(_shown(piece, color=color) for piece in line).rstrip() for line in lines).rstrip())


def escaped(lines: Iterable[str]) -> Escaped:
    """Lines as text, a newline in one being that of a name; those that are `Escaped` stay as they are."""
    return Escaped("\n".join(line if isinstance(line, Escaped) else printable(line) for line in lines))


def _shown(piece: Segment, *, color: bool) -> str:
    from rich.color import ColorSystem

    text = printable(piece.text)
    return piece.style.render(text, color_system=ColorSystem.STANDARD) if color and piece.style else text


def json_text(content: Any, *, indent: int | None = 2, separators: tuple[str, str] | None = None) -> str:
    """JSON that any parser and any terminal takes. ValueError for what is not finite.

    A byte of a name that is no UTF-8 stands there as tables show it: what `json` writes for it, half of a surrogate
    pair, makes other parsers refuse the whole file.
    """
    text = json.dumps(without_surrogates(content), indent=indent, separators=separators, allow_nan=False)
    return text.replace("\x7f", "\\u007f")


def without_surrogates(value: Any) -> Any:
    """JSON's content with such bytes escaped: text that can be written."""
    if isinstance(value, str):
        return _SURROGATE.sub(lambda found: printable(found[0]), value)
    if isinstance(value, Mapping):
        return {without_surrogates(key): without_surrogates(entry) for key, entry in value.items()}
    return [without_surrogates(entry) for entry in value] if isinstance(value, list | tuple) else value
