from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from spach_deploy.cli.console import command
from spach_deploy.cli.export import main as export_command
from spach_deploy.common.errors import MismatchError, UnavailableError, UsageError
from spach_deploy.options.click_options import click_options
from spach_deploy.options.table import Kind, Option


def ending_with(error: BaseException) -> click.Command:
    @click.command()
    @click_options("this", [Option("--debug", Kind.FLAG, commands=("this",))])
    @command
    def run() -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (UsageError("No.", "Do this."), 2, "Error: No. Do this."),
        (MismatchError("Differs."), 1, "Error: Differs."),
        (UnavailableError("Not here."), 3, "Error: Not here."),
        (KeyboardInterrupt(), 130, "Interrupted. Nothing was written"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "Error: No space left"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "Error: Permission denied (/x)."),
        (MemoryError(), 3, "Error: Out of memory."),
        (ZeroDivisionError("by zero"), 3, "Error: This is a bug of spach-deploy (ZeroDivisionError: by zero)."),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_is_one_sentence_and_an_exit_code(error: BaseException, code: int, sentence: str) -> None:
    result = CliRunner().invoke(ending_with(error))
    assert result.exit_code == code
    assert result.stderr.startswith(sentence)
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.output


def test_an_error_does_not_speak_to_the_terminal() -> None:
    result = CliRunner().invoke(ending_with(UsageError("No tensor \x1b[2Ja\r\u202e.\nsecond line", "Do this.")))
    assert result.stderr == "Error: No tensor \\x1b[2Ja\\r\\u202e.\\nsecond line Do this.\n"


def test_debug_shows_the_traceback() -> None:
    result = CliRunner().invoke(ending_with(UsageError("No.")), ["--debug"])
    assert "Traceback" in result.stderr
    assert result.exit_code == 2


ENDING = """
import atexit, sys

class Last:
    def __del__(self):
        print("torn down", flush=True)

last = Last()
from spach_deploy.cli.console import exit_without_teardown
with exit_without_teardown():
    atexit.register(lambda: print("at exit"))
    sys.stdout.write("not flushed\\n")
    END
"""


@pytest.mark.parametrize(
    ("script", "end", "code", "is_quick"),
    [
        ("spach-test", "sys.exit(3)", 3, True),
        ("spach-test", "sys.exit()", 0, True),
        ("spach-test", "sys.exit('words')", 1, True),
        ("spach-test", "raise ValueError", 1, False),
        ("another", "sys.exit(3)", 3, False),
    ],
)
def test_a_command_exits_without_teardown_and_loses_no_output(
    script: str, end: str, code: int, is_quick: bool, tmp_path: Path
) -> None:
    (tmp_path / script).write_text(ENDING.replace("END", end))
    done = subprocess.run([sys.executable, tmp_path / script], capture_output=True, text=True)
    assert done.returncode == code
    assert done.stdout.splitlines() == ["not flushed", "at exit", *([] if is_quick else ["torn down"])]
    assert ("words" in done.stderr) == ("words" in end)


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["--model", "a", "--model", "b"], "--model"),
        (["--model=a", "--model", "b"], "--model"),
        (["-o", "x", "--output", "y"], "--output"),
    ],
)
def test_an_option_given_twice_is_refused_because_one_would_be_lost(words: list[str], flag: str) -> None:
    result = CliRunner().invoke(export_command, words)
    assert (result.exit_code, result.stderr) == (2, f"Error: {flag} was given twice. See spach-export --help.\n")


def test_values_that_look_like_options_and_repeatable_options_are_no_repetition() -> None:
    words = ["--no-rewrite", "x", "--no-rewrite", "y", "--output", "--output", "--model", "--model"]
    result = CliRunner().invoke(export_command, words)
    assert "twice" not in result.stderr
