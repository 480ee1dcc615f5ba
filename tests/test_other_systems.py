"""What keeps the package running on Windows, checked on Linux: imports, text files, and types."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import ROOT

PACKAGE = ROOT / "spach_deploy"
OF_POSIX = "fcntl grp posix pty pwd resource syslog termios tty"
OTHER = ("polygraphy/scripts/", "onnxruntime/templates/")
"""Files that users run, and that are no modules of this package."""

IMPORT_ALL = """
import builtins, importlib, sys

real, refused = builtins.__import__, set(sys.argv[1].split())

def refuse(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "")
    if name in refused and importer.startswith("spach_deploy") and importer != "spach_deploy.common.operating_system":
        raise ModuleNotFoundError(f"{importer} imports {name}, which Windows does not have")
    return real(name, globals, locals, fromlist, level)

builtins.__import__ = refuse
for module in sys.argv[2:]:
    importlib.import_module(module)
print(len(sys.argv) - 2, "modules")
"""


def files() -> Iterator[Path]:
    """The files of this package's modules."""
    for file in sorted(PACKAGE.rglob("*.py")):
        if not any(part in file.as_posix() for part in OTHER):
            yield file


def modules() -> list[str]:
    """The names of this package's modules."""
    parts = (file.relative_to(ROOT).with_suffix("").parts for file in files())
    return [".".join(part).removesuffix(".__init__") for part in parts]


def test_every_module_imports_without_the_modules_of_posix() -> None:
    names = modules()
    command = [sys.executable, "-c", IMPORT_ALL, OF_POSIX, *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.stdout.strip(), done.returncode) == (f"{len(names)} modules", 0), done.stderr[-2000:]


def test_a_module_of_posix_is_refused_where_a_module_of_this_package_imports_it() -> None:
    script = IMPORT_ALL.split("for module")[0] + "exec('import fcntl', {'__name__': 'spach_deploy.planted'})"
    done = subprocess.run([sys.executable, "-c", script, OF_POSIX], capture_output=True, text=True, timeout=60)
    assert "spach_deploy.planted imports fcntl, which Windows does not have" in done.stderr


def faults_of(source: str) -> list[str]:
    """Calls that would read or write other bytes on Windows: texts without an encoding, or with its line ends."""
    return [
        f"line {call.lineno}: {fault}"
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call)
        for fault in _faults(call)
    ]


def _faults(call: ast.Call) -> Iterator[str]:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    given = {keyword.arg for keyword in call.keywords}
    if name == "read_text" and not given and not call.args:
        yield "read_text without an encoding"
    if name == "write_text" and call.args and not _is_destination(call):
        yield from (f"write_text without {option}" for option in ("encoding", "newline") if option not in given)
    if name == "open" and _is_text(call) and not {"encoding", "opener"} & given:
        yield "open without an encoding"


def _is_destination(call: ast.Call) -> bool:
    """Whether it is `Destination.write_text`, which writes UTF-8 as it is."""
    owner = ast.unparse(call.func)
    return bool(re.match(r"(Destination\.of\(.*\)|self\._(json|page)|destination)\.write_text$", owner, re.DOTALL))


def _is_text(call: ast.Call) -> bool:
    """Whether it opens a file as text: by `open(path)`, `open(path, "w")` or `path.open("w")`."""
    texts = [str(argument.value) for argument in call.args if isinstance(argument, ast.Constant)]
    modes = [text for text in texts if re.fullmatch(r"[rwxa+bt]{1,3}", text)]
    return (bool(modes) and "b" not in modes[0]) or (isinstance(call.func, ast.Name) and not modes)


@pytest.mark.parametrize("file", [*files()], ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_texts_have_the_same_bytes_on_every_system(file: Path) -> None:
    assert faults_of(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    ["p.read_text()", "p.write_text(t, encoding='utf-8')", "p.write_text(t, newline='')", "open(p)", "p.open('w')"],
)
def test_a_text_that_would_differ_is_found(source: str) -> None:
    assert len(faults_of(source)) == 1
