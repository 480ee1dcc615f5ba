"""Commands whose outputs are closed, full, watched, or of few characters; and commands run by `python -m`."""

from __future__ import annotations

import json
import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from spach_deploy.cli.console import say, show
from spach_deploy.common.text import escaped, json_text, rendered
from tests.commands import ROOT, console_script
from tests.doctor import bundles

UNWRITTEN = "Warning: standard output cannot be written"


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line of bash, in this repository."""
    env = {**os.environ, **environment}
    return subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, env=env, timeout=120)


@pytest.fixture(scope="module")
def doctors_code(doctor: str) -> int:
    """How it ends where its outputs are all right."""
    return shell(doctor).returncode


@pytest.fixture(scope="module")
def doctor(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A command that prints and, on most machines, ends with 3."""
    folder = tmp_path_factory.mktemp("doctor")
    return f"{console_script('spach-doctor', folder)} {bundles.write_bundle(folder / 'bundle')}"


@pytest.mark.parametrize("into", [">&-", "> /dev/full", "| (exec <&-; sleep 0.5)"])
def test_a_stdout_that_cannot_be_written_changes_no_exit_code(doctor: str, doctors_code: int, into: str) -> None:
    done = shell(f"{doctor} {into}; exit ${{PIPESTATUS[0]}}")
    assert done.returncode == doctors_code
    assert done.stderr.startswith(UNWRITTEN)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("words", ["spach-package --help", "spach-package triton --help", "spach-export --version"])
def test_help_too(tmp_path: Path, words: str) -> None:
    name, _, options = words.partition(" ")
    done = shell(f"{console_script(name, tmp_path)} {options} > /dev/full")
    assert (done.returncode, done.stderr.startswith(UNWRITTEN)) == (0, True)


@pytest.mark.parametrize("into", ["2>&-", "2> /dev/full", "<&- >&- 2>&-"])
def test_an_error_that_nobody_can_read_keeps_its_exit_code(tmp_path: Path, into: str) -> None:
    done = shell(f"{console_script('spach-doctor', tmp_path)} /nowhere {into}")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


LEAKS = """
import os, tempfile
from spach_deploy.cli.console import outputs_that_may_fail
with outputs_that_may_fail(), tempfile.TemporaryFile() as file:
    try:
        os.write(1, b"of a library")
    except OSError:
        pass
    assert file.fileno() > 2 and file.seek(0, 2) == 0
"""


def test_a_file_that_is_opened_after_a_closed_stdout_does_not_become_stdout() -> None:
    done = shell(f"{sys.executable} -c {shlex.quote(LEAKS)} <&- >&-")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_no_encoding_of_stdout_makes_a_command_fail(tmp_path: Path, encoding: str) -> None:
    done = shell(f"{console_script('spach-package', tmp_path)} triton --help | cat", PYTHONIOENCODING=encoding)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "class 1, " in done.stdout


def on_a_terminal(command: str, **environment: str) -> str:
    """What a command shows there."""
    leader, follower = pty.openpty()
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    env = {**clean, "TERM": "xterm", **environment}
    with subprocess.Popen(["bash", "-c", command], stdout=follower, env=env, cwd=ROOT) as process:
        os.close(follower)
        shown = b""
        while chunk := _read(leader):
            shown += chunk
        process.wait(timeout=120)
    os.close(leader)
    return shown.decode().replace("\r\n", "\n")


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # the other end was closed
        return b""


def test_colours_are_for_terminals_that_want_them(doctor: str) -> None:
    assert "\x1b[" in on_a_terminal(doctor)
    for environment in ({"NO_COLOR": "1"}, {"TERM": "dumb"}, {"NO_COLOR": "1", "FORCE_COLOR": "1"}):
        assert "\x1b[" not in on_a_terminal(doctor, **environment)
    assert "\x1b[" in shell(doctor, FORCE_COLOR="1", NO_COLOR="").stdout
    assert "\x1b[" not in shell(doctor, FORCE_COLOR="0", NO_COLOR="").stdout


def test_columns_are_obeyed_on_a_terminal(doctor: str) -> None:
    lines = [line for line in on_a_terminal(doctor, COLUMNS="62", NO_COLOR="1").splitlines() if " $ " not in line]
    assert 50 < max(map(len, lines[1:])) <= 62


@pytest.mark.parametrize("name", ["export", "validate", "calibrate", "package", "benchmark", "doctor"])
def test_a_module_is_the_command(name: str) -> None:
    module = [sys.executable, "-m", f"spach_deploy.cli.{name}"]
    shown = subprocess.run([*module, "--version"], cwd=ROOT, capture_output=True, text=True)
    assert shown.stdout.startswith("spach-deploy, version ")
    refused = subprocess.run([*module, "--nonsense"], cwd=ROOT, capture_output=True, text=True)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("Error: No such option")


# What is printed

EVIL = "\x1b[2Jred\x9b31m\x7f[bold]\udce9:smile:"
SHOWN = r"\x1b[2Jred\x9b31m\x7f[bold]\xe9:smile:"


def printed(text: str) -> str:
    @click.command()
    def run() -> None:
        show(text)

    return CliRunner().invoke(run).stdout.removesuffix("\n")


def test_text_from_elsewhere_is_escaped() -> None:
    assert printed(f"a {EVIL}\nb") == f"a {SHOWN}\nb"


def test_a_newline_of_a_name_ends_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Else a folder's name says AGREED on a line of its own."""
    name = "b\nAGREED with PyTorch in FP32."
    assert printed(escaped(["one", f"Bundle: {name}"])) == "one\nBundle: b\\nAGREED with PyTorch in FP32."
    say(f"Page: {name}")
    assert capsys.readouterr().err == "Page: b\\nAGREED with PyTorch in FP32.\n"


@pytest.mark.parametrize("color", [False, True])
def test_tables_are_escaped_and_their_names_are_no_markup(color: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("name")
    table.add_row(EVIL)
    text = printed(rendered([Text(EVIL, style="bold"), table, ""], color=color))
    assert text.count(SHOWN) == 2
    assert ("\x1b[1m" in text) == color
    assert "\x1b[2J" not in text
    assert text.isascii() or "\x9b" not in text


def test_json_is_valid_for_every_parser_and_shows_nothing_to_a_terminal() -> None:
    text = json_text({EVIL: [EVIL, 1.5, None, ("é",)]})
    assert text.isascii()
    assert "\\ud" not in text
    assert printed(text) == text
    name = EVIL.replace("\udce9", r"\xe9")
    assert json.loads(text) == {name: [name, 1.5, None, ["é"]]}
