"""spach-doctor as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from spach_deploy.bundle.store import GRAPH, PLAN
from spach_deploy.cli.doctor import main
from spach_deploy.doctor.machine_info import MachineInfo
from tests.commands import console_script, refusal
from tests.doctor import bundles
from tests.doctor.machines import L4, T4, cpu_machine, gpu_machine
from tests.doctor.plans import rtx_plan

Doctor = Callable[..., Result]


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Doctor:
    """spach-doctor on a machine that is not this one."""

    def run(here: MachineInfo, *arguments: object) -> Result:
        monkeypatch.setattr("spach_deploy.doctor.machine_info.gather", lambda: here)
        return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="spach-doctor")

    return run


# The machine


@pytest.mark.parametrize(("here", "code"), [(cpu_machine(), 0), (cpu_machine(tensorrt={}), 3), (gpu_machine(L4), 0)])
def test_exit_codes_of_a_machine(on: Doctor, here: MachineInfo, code: int) -> None:
    result = on(here)
    assert result.exit_code == code
    assert result.stderr == ""
    assert "This machine can" in result.stdout
    assert json.loads(on(here, "--json").stdout)["exit_code"] == code


def test_this_machine_in_a_process_of_its_own(tmp_path: Path) -> None:
    """It answers whatever this machine is, in ASCII, and leaves nothing behind."""
    script = console_script("spach-doctor", tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run([script, "--json"], cwd=work, capture_output=True, timeout=120)
    assert done.returncode in (0, 3)
    content = json.loads(done.stdout.decode("ascii"))
    assert content["exit_code"] == done.returncode
    assert set(content["can"]) == {"export", "build", "run", "verify"}
    assert list(work.iterdir()) == []


LOADED = """
import json, sys
from spach_deploy.cli.doctor import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})), file=sys.stderr)
"""
HEAVY = {"torch", "onnx", "numpy", "onnxruntime", "polygraphy", "onnxsim", "tensorrt", "tensorrt_rtx", "PIL"}


@pytest.mark.parametrize("what", ["machine", "bundle"])
def test_nothing_heavy_is_imported(what: str, tmp_path: Path) -> None:
    """Importing torch alone takes longer than the whole doctor. A bundle's graph is read, which takes onnx."""
    target = [] if what == "machine" else [str(bundles.write_bundle(tmp_path / "bundle"))]
    call = [sys.executable, "-c", LOADED, *target]
    done = subprocess.run(call, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert done.stdout
    heavy = HEAVY if what == "machine" else HEAVY - {"onnx", "numpy"}
    assert heavy.isdisjoint(json.loads(done.stderr.splitlines()[-1]))


# A target


@pytest.mark.parametrize(("here", "code"), [(gpu_machine(L4), 0), (gpu_machine(T4), 3), (cpu_machine(), 3)])
def test_exit_codes_of_a_bundle(
    on: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: MachineInfo, code: int
) -> None:
    monkeypatch.setattr("spach_deploy.doctor.target.about_header", lambda *asked: ())
    path = bundles.write_bundle(tmp_path / "bundle")
    assert on(here, path).exit_code == code
    assert on(here, path / PLAN).exit_code == code
    content = json.loads(on(here, path, "--json").stdout)
    assert (content["exit_code"], content["can_run"]) == (code, code == 0)


def test_a_spoiled_target_ends_with_2_and_tells_all_the_same(on: Doctor, tmp_path: Path) -> None:
    path = tmp_path / "engine.plan"
    path.write_bytes(b"prefix" + rtx_plan(L4.capability))
    result = on(cpu_machine(), path)
    assert result.exit_code == 2
    assert "NO, not as it is: form: 6 bytes of another tool's stand before the plan." in result.stdout
    assert f"tail -c +7 {path} > plain.plan" in result.stdout


def test_what_is_no_target_is_refused_in_one_sentence(on: Doctor, tmp_path: Path) -> None:
    assert "does not exist" in refusal(on(cpu_machine(), tmp_path / "nothing"))
    assert "is a directory without manifest.json" in refusal(on(cpu_machine(), tmp_path))
    path = bundles.write_bundle(tmp_path / "bundle")
    assert "is an ONNX graph" in refusal(on(cpu_machine(), path / GRAPH))


def test_an_unknown_option_is_one_sentence(on: Doctor) -> None:
    assert "--no-such-option" in on(cpu_machine(), "--no-such-option").stderr


def test_without_rich_the_error_says_what_to_install(on: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    result = on(cpu_machine())
    assert result.exit_code == 3
    assert "--json" in refusal(result, 3)
    assert on(cpu_machine(), "--json").exit_code == 0


def test_without_msgspec_this_machine_is_examined_and_a_bundle_is_refused(tmp_path: Path) -> None:
    path = bundles.write_bundle(tmp_path / "bundle")
    code = "import sys; sys.modules['msgspec'] = None; from spach_deploy.cli.doctor import main; main()"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)

    assert "can" in json.loads(run("--json").stdout)
    refused = run(str(path))
    assert refused.returncode == 3
    assert "Reading a manifest needs msgspec, which is not installed here. Install it: " in refused.stderr
