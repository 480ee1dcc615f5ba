"""The commands as their users call them, for tests of several packages."""

from __future__ import annotations

import configparser
import os
import stat
import sys
from pathlib import Path

from click.testing import CliRunner, Result

from spach_deploy.cli.export import main as export_command

ROOT = Path(__file__).parents[1]

_SCRIPT = """#!{python}
import signal
import sys
sys.path.insert(0, {root!r})
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background would ignore it
{before}
from {module} import {function}
if __name__ == "__main__":  # processes that it spawns import it too
    sys.exit({function}())
"""


def export(*arguments: object) -> Result:
    """spach-export in this process, in the current directory."""
    return CliRunner().invoke(export_command, [str(argument) for argument in arguments], prog_name="spach-export")


def console_script(name: str, folder: Path, *, before: str = "") -> Path:
    """The script that pip makes from setup.cfg's entry point, run from this checkout; `before` runs first."""
    module, _, function = entry_points()[name].partition(":")
    path = folder / name
    text = _SCRIPT.format(python=sys.executable, root=str(ROOT), module=module, function=function, before=before)
    path.write_text(text, encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def entry_points() -> dict[str, str]:
    """`module:function` of each console script, as setup.cfg has them."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = config["options.entry_points"]["console_scripts"].split("\n")
    return {name.strip(): target.strip() for name, _, target in (line.partition("=") for line in lines if line)}


def refusal(result: Result, code: int = 2) -> str:
    """The one sentence of a command that refused: nothing on stdout, no traceback, one error, at the end."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert errors == result.stderr.splitlines()[-1:], result.stderr
    assert errors[0].endswith((".", "?", "'"))
    return errors[0]


def contents(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file below `folder`: its inode, when it was changed, what is in it."""
    files = [Path(where, name) for where, _, names in os.walk(folder) for name in names]
    return {str(f.relative_to(folder)): (f.stat().st_ino, f.stat().st_mtime_ns, f.read_bytes()) for f in files}
