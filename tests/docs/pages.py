"""Commands that pages show, in order, with the output that the pages show of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

_BLOCK = re.compile(r"^```(sh|console)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_INDENTED = re.compile(r"^    (?:\$ )?(?P<line>(?:spach-[a-z]+ [a-z-]|cmake|engine-cpp/\S+).*)$")


@dataclasses.dataclass(frozen=True)
class Shown:
    """A command as it is typed, and the lines that the page shows after it (None: it shows none)."""

    command: str
    output: tuple[str, ...] | None

    @property
    def exit_code(self) -> int | None:
        """The code that the page says, or implies by showing an error at the end."""
        return 2 if self.output and self.output[-1].startswith("Error: ") else None


def commands(page: Path) -> Iterator[Shown]:
    """Of fenced blocks; `echo $?` among them."""
    for kind, text in _BLOCK.findall(page.read_text(encoding="utf-8")):
        if kind == "sh":
            yield from (Shown(line, None) for line in text.splitlines() if line and not line.startswith("#"))
            continue
        command, output = "", []
        for line in [*text.splitlines(), "$ "]:
            if not line.startswith("$ "):
                output.append(line)
                continue
            if command:
                yield Shown(command, tuple(output))
            command, output = line[2:], []


def python_blocks(page: Path) -> str:
    """What stands in fenced blocks of Python, as one program."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE))


def section_commands(page: Path, heading: str) -> list[str]:
    """Commands that stand indented below a heading of README.md."""
    section = re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    text = next(part for part in section if part.startswith(heading))
    return [match["line"] for line in text.splitlines() if (match := _INDENTED.match(line))]


def forms(lines: tuple[str, ...] | list[str]) -> list[str]:
    """The first word of each line, which says what kind of line it is; "…" and numbers left out."""
    words = (line.split()[0] if line.split() else "" for line in lines)
    return [word.rstrip(":,.") for word in words if re.match(r"[A-Za-z]", word)]


def is_within(wanted: list[str], found: list[str]) -> bool:
    """Whether `wanted` comes in this order among `found`."""
    rest = iter(found)
    return all(word in rest for word in wanted)
