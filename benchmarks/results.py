"""RESULTS.md: one section a script, replaced each time the script runs, with the machine and the date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from spach_deploy.common.machine import cpu_flags, processor_name

RESULTS = Path(__file__).with_name("RESULTS.md")
_HEAD = "# Results\n\nWritten by the scripts beside it; each section names its command, the machine and the date.\n"


def record(
    title: str,
    command: str,
    body: str,
    packages: Iterable[str] = ("torch", "onnxsim", "tensorrt-rtx"),
    *,
    is_whole: bool = True,
) -> None:
    """Print `body` and put it into RESULTS.md under `title`, in place of an earlier section of that name.

    `is_whole` false: of fewer cases than the section is to tell of, so that it is only printed.
    """
    text = f"## {title}\n\n`{command}`, {_circumstances(packages)}\n\n{body.rstrip()}\n"
    print(text)
    if not is_whole:
        return
    content = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else _HEAD
    section = re.compile(rf"## {re.escape(title)}\n.*?(?=\n## |\Z)", re.DOTALL)
    replaced, count = section.subn(lambda _: text, content)
    RESULTS.write_text(replaced if count else f"{content.rstrip()}\n\n{text}", encoding="utf-8")


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; numbers to the right."""
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" + "--:|" * (len(headings) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows)])


def _circumstances(packages: Iterable[str]) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    today = datetime.datetime.now(datetime.timezone.utc).date()
    machine = f"{processor_name()}, {os.cpu_count()} cores{_features()}"
    return f"{today}, {machine}, Python {platform.python_version()}, {versions}."


def _features() -> str:
    """What tells processors of one name apart."""
    found = sorted(flag for flag in cpu_flags() if flag.endswith(("512f", "bf16", "vnni", "int8")))
    return f" ({', '.join(found)})" if found else ""
