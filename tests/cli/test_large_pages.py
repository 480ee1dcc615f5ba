"""A computing command takes large pages by starting itself once more, where that is of use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from spach_deploy.cli import large_pages
from spach_deploy.cli.console import ComputingCommand, command
from spach_deploy.runtime import pages

SCRIPT = """
import json, os, sys
from pathlib import Path
import click
from spach_deploy.cli import large_pages
from spach_deploy.runtime import pages
from spach_deploy.cli.console import ComputingCommand, command

large_pages._KERNEL = Path(os.environ["KERNEL"])
with open(os.environ["STARTS"], "a") as starts:
    starts.write(f"{os.getpid()}\\n")
if "WORDS" in os.environ:
    sys.argv = ["spach-export", *os.environ["WORDS"].split()]
@click.command(cls=ComputingCommand)
@click.argument("words", nargs=-1)
@command
def main(words):
    print(json.dumps([os.environ.get("GLIBC_TUNABLES"), words]))
main()
"""


def started(tmp_path: Path, kernel: str, **environment: str) -> tuple[list[object], list[str]]:
    """What a process of its own printed, and the process numbers that it began with."""
    setting, starts = tmp_path / "enabled", tmp_path / "starts"
    setting.write_text(kernel)
    clean = {name: value for name, value in os.environ.items() if name != pages.VARIABLE}
    words = [sys.executable, "-c", SCRIPT, "--", "a word", "-ü"]
    where = {"KERNEL": str(setting), "STARTS": str(starts)}
    done = subprocess.run(words, env={**clean, **where, **environment}, capture_output=True, text=True, check=True)
    return json.loads(done.stdout), starts.read_text().split()


@pytest.mark.skipif(not large_pages.glibc_knows(), reason="this C library cannot ask for large pages")
def test_the_same_process_starts_once_more_with_its_words(tmp_path: Path) -> None:
    printed, starts = started(tmp_path, "always [madvise] never\n")
    assert printed == [pages.LARGE, ["a word", "-ü"]]
    assert len(starts) == 2
    assert len(set(starts)) == 1


@pytest.mark.parametrize("kernel", ["[always] madvise never\n", "always madvise [never]\n", ""])
def test_nothing_is_started_where_the_kernel_does_not_wait_to_be_asked(tmp_path: Path, kernel: str) -> None:
    printed, starts = started(tmp_path, kernel)
    assert printed == [None, ["a word", "-ü"]]
    assert len(starts) == 1


@pytest.mark.parametrize("own", ["", "glibc.malloc.tcache_count=7"])
def test_what_the_user_set_stays(tmp_path: Path, own: str) -> None:
    printed, starts = started(tmp_path, "always [madvise] never\n", GLIBC_TUNABLES=own)
    assert printed == [own, ["a word", "-ü"]]
    assert len(starts) == 1


@pytest.mark.parametrize("words", ["", "another", "-- another word"])
def test_a_command_inside_another_program_does_not_start_that_program_again(tmp_path: Path, words: str) -> None:
    printed, starts = started(tmp_path, "always [madvise] never\n", WORDS=words)
    assert printed == [None, words.removeprefix("-- ").split()]
    assert len(starts) == 1


def test_a_script_is_the_whole_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "bin/spach-export", "--model", "trans_xxs"])
    monkeypatch.setattr(sys, "argv", ["bin/spach-export", "--model", "trans_xxs"])
    assert large_pages.is_the_whole_process()
    monkeypatch.setattr(sys, "argv", ["bin/spach-export"])
    assert not large_pages.is_the_whole_process()


@pytest.mark.parametrize(("library", "knows"), [("glibc 2.36", True), ("glibc 2.34", False), ("musl 1", False)])
def test_which_c_library_can_ask(monkeypatch: pytest.MonkeyPatch, library: str, knows: bool) -> None:
    monkeypatch.setattr(os, "confstr", lambda _: library)
    assert large_pages.glibc_knows() is knows


def test_a_command_that_is_called_stays_in_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(os, "execve", never)
    monkeypatch.delenv(pages.VARIABLE, raising=False)
    body = ComputingCommand("called", callback=command(lambda: None))
    assert CliRunner().invoke(body, []).exit_code == 0


def test_where_the_process_cannot_be_replaced_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(*words: object) -> None:
        asked.append(words)
        raise OSError

    monkeypatch.setattr(os, "execve", refuse)
    monkeypatch.delenv(pages.VARIABLE, raising=False)
    for name in ("is_the_whole_process", "glibc_knows", "kernel_waits_to_be_asked"):
        monkeypatch.setattr(large_pages, name, lambda: True)
    large_pages.start_again_with_large_pages()
    assert len(asked) == 1
