from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from spach_deploy.benchmark.runners import TITLES
from spach_deploy.cli.benchmark import main
from spach_deploy.options.table import BENCHMARK, options_of
from tests import small_bundles
from tests.commands import console_script, refusal

PATIENCE_S = 60.0
QUICK = ("--batch", "2", "--rounds", "2", "--seconds", "0.01")


def benchmark(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_json_has_figures_facts_and_what_did_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundle is measured as it is, and by PyTorch, which rebuilds its model from the manifest's architecture."""
    monkeypatch.setattr("spach_deploy.benchmark.runners.has_bf16", lambda: False)  # half of the runners
    result = benchmark(small_bundles.bundle(), *QUICK, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["batches"] == [2]
    assert {"onnxruntime", "eager", "compile"} <= {runner["runner"] for runner in found["runners"]}
    assert "tensorrt" in found["skipped"]
    assert "no bfloat16" in found["skipped"]["compile-bf16"]
    assert found["machine"]["threads"] == found["machine"]["cores"]
    assert found["machine"]["versions"]["onnxruntime"]
    assert found["macs"] > 0


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (("--batch", "1,x"), 2, "--batch 1,x is no list of whole numbers. Give it like 1,8."),
        (("--batch", "1000"), 2, "not 1000"),
        (("--plot", "nowhere/speed.svg"), 2, "nowhere is no directory"),
        (("--plot", "."), 2, "--plot . cannot be written"),
        (("--runner", "fastest"), 2, "fastest"),
        (("--rounds", "1"), 2, "--rounds"),
        (("--runner", "tensorrt"), 3, "TensorRT cannot run here"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(arguments: tuple[str, ...], code: int, reason: str) -> None:
    assert reason in refusal(benchmark(small_bundles.bundle(), *arguments), code)


def test_a_plot_without_matplotlib_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = small_bundles.bundle()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused = refusal(benchmark(bundle, "--plot", "speed.svg"), 3)
    assert "pip install 'spach-deploy[report]'" in refused


def test_ctrl_c_ends_it_and_its_workers(tmp_path: Path) -> None:
    """In the middle of a turn that would take a minute."""
    arguments = ("--batch", "1", "--seconds", "60", "--runner", "onnxruntime")
    script = console_script("spach-benchmark", tmp_path)
    with subprocess.Popen([script, small_bundles.bundle(), *arguments], stderr=subprocess.PIPE, text=True) as process:
        worker = _first_worker(process.pid)
        os.kill(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert said.splitlines()[-1].startswith("Interrupted.")
    assert "Traceback" not in said
    _wait_until(lambda: not Path(f"/proc/{worker}").exists())


def _first_worker(pid: int) -> int:
    """The worker's process, once it has used its processor for a while: it is at work then."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found: list[int] = []

    def is_at_work() -> bool:
        for child in map(int, children.read_text().split()):
            command = Path(f"/proc/{child}/cmdline").read_text()
            ticks = sum(map(int, Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[11:13]))
            if "worker" in command and ticks > 1.5 * os.sysconf("SC_CLK_TCK"):
                found.append(child)
        return bool(found)

    _wait_until(is_at_work)
    return found[0]


def _wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    refusal(benchmark(tmp_path))


def test_the_options_name_every_runner() -> None:
    runner = next(option for option in options_of(BENCHMARK) if option.flag == "--runner")
    assert set(runner.choices) == set(TITLES)
