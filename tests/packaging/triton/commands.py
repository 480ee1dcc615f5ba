"""The commands of a README, as a person pastes them."""

from __future__ import annotations

import re
import subprocess
import textwrap
from pathlib import Path


def blocks(readme: str) -> list[str]:
    """The README's commands: its indented blocks, without the indentation."""
    found = re.findall(r"(?:^    .*\n|^\n(?=    ))+", readme, re.MULTILINE)
    return [textwrap.dedent(block).strip("\n") for block in found]


def commands(readme: str, first_word: str) -> list[str]:
    """All commands that begin with a word, with the lines that continue them."""
    lines = "\n".join(blocks(readme)).replace("\\\n", " ").splitlines()
    return [re.sub(r" {2,}", " ", line) for line in lines if line.startswith(f"{first_word} ")]


def run(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it with bash in `folder`."""
    call = ["bash", "-euo", "pipefail", "-c", command]
    env = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **environment}
    return subprocess.run(call, cwd=folder, env=env, capture_output=True, text=True, errors="replace", check=False)
