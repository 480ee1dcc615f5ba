#!/usr/bin/env python3
"""Runs the commands of a page's console blocks in one shell in an empty folder; what they print becomes the page.

scripts/record_terminal.py [docs/terminal.md]
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(r"(?<=^```console\n).*?(?=^```)", re.DOTALL | re.MULTILINE)
_MARK = "--8<-- next command --8<--"


def recorded(page: str, folder: Path) -> str:
    """The page with its console blocks as they come out today."""
    return _BLOCK.sub(lambda block: _session(block[0], folder), page)


def _session(block: str, folder: Path) -> str:
    commands = [line[2:] for line in block.splitlines() if line.startswith("$ ")]
    script = "\n".join(f"{command}\ncode=$?; echo '{_MARK}'; (exit $code)" for command in commands)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "COLUMNS": "100", "SPACH_CACHE": str(folder / ".cache")}
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    printed = done.stdout.split(f"{_MARK}\n")
    texts = (text.strip() and f"{text.strip()}\n" for text in printed)
    return "".join(f"$ {command}\n{text}" for command, text in zip(commands, texts, strict=False))


def main() -> None:
    """The script."""
    page = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "terminal.md"
    with tempfile.TemporaryDirectory() as folder:
        text = recorded(page.read_text(encoding="utf-8"), Path(folder))
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
