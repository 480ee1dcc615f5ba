"""Templates: text files with words between @, as YAML that can be read as it is.

A word that stands alone in its line is a block: its lines take the line's indentation, and the line disappears where
there are none. Every other word is replaced where it stands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

TEMPLATES = Path(__file__).with_name("templates")

_WORD = re.compile(r"@([A-Z][A-Z0-9_]*)@")
_BLOCK = re.compile(r"( *)@([A-Z][A-Z0-9_]*)@")


def read_template(name: str) -> str:
    """A template's text."""
    return (TEMPLATES / name).read_text(encoding="utf-8")


def render(text: str, words: Mapping[str, str]) -> str:
    """`text` with every word replaced. KeyError for a word that there is not."""
    return "".join(f"{line}\n" for given in text.splitlines() for line in _lines(given, words))


def _lines(line: str, words: Mapping[str, str]) -> Iterator[str]:
    block = _BLOCK.fullmatch(line)
    if block is None:
        yield _WORD.sub(lambda match: words[match[1]], line)
        return
    for inner in words[block[2]].splitlines():
        yield f"{block[1]}{inner}".rstrip()
