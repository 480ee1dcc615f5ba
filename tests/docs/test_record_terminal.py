from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def recorder() -> Any:
    spec = importlib.util.spec_from_file_location("record_terminal", ROOT / "scripts" / "record_terminal.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_page_gets_what_its_commands_print_today(tmp_path: Path) -> None:
    page = "# T\n\n```console\n$ echo old > file\nwrong\n$ ls\n$ false\n$ echo $?\n0\n```\n\n```sh\nrm file\n```\n"
    wanted = "# T\n\n```console\n$ echo old > file\n$ ls\nfile\n$ false\n$ echo $?\n1\n```\n\n```sh\nrm file\n```\n"
    assert recorder().recorded(page, tmp_path) == wanted


def test_our_commands_are_those_of_this_python(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    page = f"```console\n$ {sys.executable} -c 'import spach_deploy'\n$ echo $?\n```\n"
    assert "\n$ echo $?\n0\n" in recorder().recorded(page, tmp_path)
