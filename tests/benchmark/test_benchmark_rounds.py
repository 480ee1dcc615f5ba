"""The benchmark on a real bundle: workers in processes of their own, the right ones, wrong ones, and ones that die."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import spach_deploy
from spach_deploy.benchmark import rounds, worker
from spach_deploy.benchmark import runners as contestants
from spach_deploy.benchmark.result import Benchmark
from spach_deploy.benchmark.rounds import BenchmarkRequest, chosen_batches, measure
from spach_deploy.benchmark.runners import (
    BF16,
    EAGER,
    ONNX_PLAIN,
    ONNX_RUNTIME,
    OPENVINO,
    OPENVINO_BF16,
    OpenRunner,
    RunnerSetup,
    why_not,
)
from spach_deploy.benchmark.table import as_text, draw, pareto_front
from spach_deploy.benchmark.worker import FirstOutputs, RunnerProcess, TimedRuns
from spach_deploy.bundle.store import Bundle
from spach_deploy.cli.benchmark import main
from spach_deploy.common import machine as processor
from spach_deploy.common.errors import UnavailableError, UsageError
from spach_deploy.common.files import Destination
from spach_deploy.options.specs import BatchProfile, Precision
from spach_deploy.runtime.warm_start import StartOptions
from spach_deploy.validation.bundle_facts import BundleFacts
from tests import small_bundles
from tests.commands import export
from tests.own_models import TwoInputs
from tests.packaging.triton import tiny_bundles
from tests.packaging.triton.tiny_bundles import Tiny
from tests.processors import CPUINFO, pretend


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model that other processes know by its name."""
    target = tmp_path_factory.mktemp("bundles") / "b"
    result = export(
        "--model", "conv_xxs", "--image-size", "32", "--num-classes", "11", "--engine", "none", "-o", target
    )
    assert result.exit_code == 0, result.stderr
    return target


def question(bundle: Path, *names: str, **changes: Any) -> BenchmarkRequest:
    return BenchmarkRequest(RunnerSetup(bundle, threads=1), names=names, rounds=2, seconds=0.01, **changes)


@contextlib.contextmanager
def small_peaks() -> Iterator[None]:
    """The machine's peaks from a small piece of work, for time's sake."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"_GEMM": 128, "_COPY_BYTES": 1 << 20, "_PEAK_S": 0.0}.items():
            patch.setattr(rounds, name, value)
        yield


@pytest.fixture(scope="module")
def found(bundle: Path) -> Benchmark:
    with small_peaks():
        return measure(question(bundle, EAGER, ONNX_RUNTIME, batches=(1, 3)))


def test_runners_are_measured_in_turn_and_held_to_the_golden_answers(found: Benchmark) -> None:
    assert [runner.name for runner in found.runners] == [EAGER, ONNX_RUNTIME]
    assert found.exit_code == 0
    for runner in found.runners:
        assert runner.accuracy.rel_l2 < 1e-5
        assert [timing.batch for timing in runner.timings] == [1, 3]
        for timing in runner.timings:
            assert timing.latency.runs >= 2 * 2
            assert timing.peak_bytes > 50e6
            assert timing.roofline is not None
            assert timing.roofline > 0
    compared = found.runners[1].timings[0].ratio
    assert compared is not None
    assert compared.low <= compared.value <= compared.high


def test_each_runner_has_its_own_memory(found: Benchmark) -> None:
    eager, onnx_runtime = (runner.timings[-1].peak_bytes for runner in found.runners)
    assert onnx_runtime < eager  # it has no PyTorch in it


def test_time_is_told_by_module(found: Benchmark) -> None:
    modules = found.runners[1].modules
    assert {"stem.proj", "blocks.0.channel_func.fc1", "head"} <= set(modules)
    assert list(modules.values()) == sorted(modules.values(), reverse=True)


def test_the_table_tells_all_of_it(found: Benchmark) -> None:
    text = as_text(found)
    assert "batch 1 " in text
    assert "batch 3 " in text
    told = r"Fastest of the right ones at batch 3: |At batch 3 the rounds do not tell "
    assert re.search(told, text)  # which of both is the machine's affair
    assert next(iter(found.runners[1].modules)) in text


_GPU = {"name": "NVIDIA H200", "driver_version": "570.86.15", "clocks.sm": "1980 MHz", "clocks.max.sm": "1980 MHz"} | {
    **{"clocks.mem": "3201 MHz", "temperature.gpu": "34", "power.draw": "118.22 W", "memory.used": "1204 MiB"}
}


@pytest.mark.parametrize("name", CPUINFO)
def test_the_table_fits_its_width_on_every_machine(
    name: str, found: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(name, tmp_path, monkeypatch)
    facts = rounds.machine_facts(192) | {"gpus": [_GPU], "load_before": 192.5}
    text = as_text(dataclasses.replace(found, machine=facts))
    lines = [line for line in text.splitlines() if not line.startswith("bundle ")]
    assert [line for line in lines if len(line) > 100] == []
    described = " ".join(text.partition("machine ")[2].partition(" GFLOP")[0].split())
    assert described.startswith(f"{facts['processor']}, 192 of ")
    assert all(f", {flag}" in described for flag in facts["flags"])
    assert "memory.used 1204 MiB" in " ".join(text.split())


def test_openvino_computes_in_what_it_is_told_to(bundle: Path) -> None:
    pytest.importorskip("openvino")
    names = [name for name in (OPENVINO, OPENVINO_BF16) if not why_not(name, RunnerSetup(bundle), Bundle.open(bundle))]
    with small_peaks():
        found = measure(question(bundle, EAGER, *names, batches=(1, 3)))
    for runner in found.runners[1:]:
        assert runner.accuracy.is_right == (runner.name == OPENVINO)  # the bundle is in FP32
        assert runner.accuracy.rel_l2 < (1e-5 if runner.name == OPENVINO else 0.1)


def test_a_picture(found: Benchmark, tmp_path: Path) -> None:
    draw(found, Destination.of(tmp_path / "speed.svg"))
    text = (tmp_path / "speed.svg").read_text()
    assert text.count("<svg") == 1
    assert "conv_xxs" in text
    with pytest.raises(UsageError, match="since this command began"):
        draw(found, Destination(tmp_path / "speed.svg", None))


class FakeWorker:
    """Stands in for a process: PyTorch takes 20 ms, ONNX Runtime what the test says."""

    seconds: Callable[[], float] = staticmethod(lambda: 0.01)
    off = 0.0
    off_in_turns = 0.0
    dies_at: int | None = None
    device = "cpu"
    open_s = 0.5
    other = ONNX_RUNTIME

    def __init__(self, name: str, setup: RunnerSetup) -> None:
        self.name = name

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def first_outputs(self, inputs: np.ndarray[Any, Any], batch: int) -> FirstOutputs:
        if self.name == self.other and batch == self.dies_at:
            raise UnavailableError("its process ended with -9 (out of memory? Give a smaller --batch)")
        return FirstOutputs(self._logits(inputs, self.off), 0.1)

    def _logits(self, inputs: np.ndarray[Any, Any], off: float) -> np.ndarray[Any, Any]:
        with np.load(GOLDEN_OF[0] / "golden.npz") as golden:
            index = [int(np.flatnonzero((golden["input"] == one).all(axis=(1, 2, 3)))[0]) for one in inputs]
            answers: np.ndarray[Any, Any] = golden["logits"][index] * (1 + (off if self.name == self.other else 0))
        return answers

    def turn(self, inputs: np.ndarray[Any, Any], seconds: float) -> TimedRuns:
        took = 0.02 if self.name == EAGER else self.seconds()
        return TimedRuns((took,) * 12, self._logits(inputs, self.off_in_turns or self.off), 100_000_000)

    def profile(self, inputs: np.ndarray[Any, Any]) -> dict[str, float]:
        return {}


class FakePeaks:
    def __init__(self, threads: int, device: str) -> None:
        self.best: dict[str, float] = {}

    def measure(self) -> None:
        self.best = {"flops": 1e11, "bytes": 1e10}

    def release(self) -> None:
        return


GOLDEN_OF: list[Path] = []


@contextlib.contextmanager
def faked(bundle: Path, **changes: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "RunnerProcess", type("Worker", (FakeWorker,), changes))
        patch.setattr(rounds, "Peaks", FakePeaks)
        GOLDEN_OF[:] = [bundle]
        yield


def test_a_ratio_is_how_many_times_as_fast(bundle: Path) -> None:
    with faked(bundle):
        result = measure(question(bundle, EAGER, ONNX_RUNTIME, batches=(1,)))
    compared = result.runners[1].timings[0].ratio
    assert compared is not None
    assert compared.value == pytest.approx(2)
    assert "2.00 (2.00–2.00)" in as_text(result)


def test_a_fast_runner_that_is_wrong_is_marked_and_not_recommended(bundle: Path) -> None:
    with faked(bundle, off=0.1, seconds=staticmethod(lambda: 0.001)):
        result = measure(question(bundle, EAGER, ONNX_RUNTIME, batches=(1,)))
    assert result.exit_code == 1
    text = as_text(result)
    assert "ONNX Runtime is WRONG: its logits are off by 1.0e-01 > " in text
    assert "20.00" not in text
    assert "Fastest of the right ones at batch 1: PyTorch eager" in text


def test_a_runner_that_gives_no_numbers_is_wrong(bundle: Path) -> None:
    with faked(bundle, off=float("nan")):
        result = measure(question(bundle, EAGER, ONNX_RUNTIME, batches=(1,)))
    assert [runner.name for runner in result.wrong] == [ONNX_RUNTIME]
    assert result.to_dict()["runners"][1]["accuracy"]["rel_l2"] is None


def test_a_runner_that_dies_is_told_and_the_others_go_on(bundle: Path) -> None:
    with faked(bundle, dies_at=3):
        result = measure(question(bundle, EAGER, ONNX_RUNTIME, batches=(1, 3)))
    assert [timing.batch for timing in result.runners[1].timings] == [1]
    assert [timing.batch for timing in result.runners[0].timings] == [1, 3]
    assert "ONNX Runtime: stopped at batch 3: its process ended with -9" in as_text(result)


def test_a_runner_that_is_wrong_only_later_is_wrong(bundle: Path) -> None:
    with faked(bundle, off_in_turns=0.1):
        result = measure(question(bundle, EAGER, ONNX_RUNTIME, batches=(1,)))
    assert [runner.name for runner in result.wrong] == [ONNX_RUNTIME]


def test_a_runner_asked_for_that_never_ran_is_an_error(bundle: Path) -> None:
    with faked(bundle, dies_at=1), pytest.raises(UnavailableError, match="ONNX Runtime cannot run here: stopped at"):
        measure(question(bundle, EAGER, ONNX_RUNTIME, batches=(1,)))


def test_an_optional_runner_that_never_ran_is_told_with_the_reason(bundle: Path) -> None:
    with faked(bundle, dies_at=1):
        result = measure(question(bundle, EAGER, ONNX_RUNTIME, batches=(1,), optional=(ONNX_RUNTIME,)))
    assert [runner.name for runner in result.runners] == [EAGER]
    assert result.skipped[ONNX_RUNTIME].startswith("stopped at batch 1")


def test_an_experiment_that_is_wrong_is_no_fault_unless_asked_for(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contestants, "why_not", lambda name, *_: "" if name in (EAGER, BF16) else "not in this test")
    with faked(bundle, other=BF16, off=0.1):
        unasked = measure(question(bundle, batches=(1,)))
        asked = measure(question(bundle, EAGER, BF16, batches=(1,)))
    assert [runner.name for runner in unasked.wrong] == [BF16]
    assert (unasked.exit_code, asked.exit_code) == (0, 1)
    assert "WRONG" in as_text(unasked)


def test_rounds_that_disagree_print_no_ratio_and_no_winner(bundle: Path) -> None:
    times = itertools.cycle([0.005, 0.03, 0.012])
    with faked(bundle, seconds=staticmethod(lambda: next(times))):
        result = measure(dataclasses.replace(question(bundle, EAGER, ONNX_RUNTIME, batches=(1,)), rounds=3))
    text = " ".join(as_text(result).split())
    assert "too noisy to tell 0.0e+00" in text
    assert "the rounds do not tell ONNX Runtime from PyTorch eager" in text
    assert "Stop what else uses this machine, or give more --rounds and --seconds." in text
    assert "Fastest" not in text
    assert result.exit_code == 0


def test_the_faster_one_is_told_where_by_how_much_is_not(bundle: Path) -> None:
    times = itertools.cycle([0.005, 0.008, 0.0065])
    with faked(bundle, seconds=staticmethod(lambda: next(times))):
        result = measure(dataclasses.replace(question(bundle, EAGER, ONNX_RUNTIME, batches=(1,)), rounds=3))
    assert "too noisy to tell" in as_text(result)
    assert "Fastest of the right ones at batch 1: ONNX Runtime" in as_text(result)


def test_what_is_as_fast_is_called_the_same(bundle: Path) -> None:
    with faked(bundle, seconds=staticmethod(lambda: 0.02)):
        result = measure(question(bundle, EAGER, ONNX_RUNTIME, batches=(1,)))
    assert "same (1.00–1.00)" in as_text(result)


def test_a_gpu_is_held_to_the_engines_bounds_and_its_own_peaks(bundle: Path) -> None:
    with faked(bundle, device="cuda"):
        result = measure(question(bundle, EAGER, ONNX_RUNTIME, batches=(1,)))
    allowed = BundleFacts.of(Bundle.open(bundle)).tolerances.engine.outputs["logits"].rel_l2
    assert {runner.accuracy.allowed for runner in result.runners} == {allowed}
    assert result.gpu_peaks == {"flops": 1e11, "bytes": 1e10}
    assert "ONNX Runtime (GPU)" in as_text(result)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")]
)
def test_no_memory_is_told_with_the_remedy(error: Exception) -> None:
    assert worker._sentence(error) == "not enough memory: give a smaller --batch, or close other programs"


def test_the_best_peaks_count_and_a_gpu_that_is_not_there_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([2.0, 4.0, 1.0, 8.0])
    monkeypatch.setattr(rounds, "shortest", lambda work, device: next(seconds))
    peaks = rounds.Peaks(1)
    peaks.measure()
    first = dict(peaks.best)
    peaks.measure()
    peaks.release()
    assert peaks.best == {"flops": 2 * first["flops"], "bytes": first["bytes"]}
    gone = rounds.Peaks(1, "cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    gone.measure()
    assert gone.best == {}


def test_the_front_has_those_that_none_beats() -> None:
    points = [(1.0, 1e-7), (2.0, 1e-6), (1.5, 1e-5), (3.0, 1e-3), (3.0, 1e-2)]
    assert pareto_front(points) == [(1.0, 1e-7), (2.0, 1e-6), (3.0, 1e-3)]


def test_answers_come_in_whole_batches_of_all_images() -> None:
    seen: list[list[int]] = []

    def run(fed: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        seen.append(fed.tolist())
        return fed[:, None] * 10.0

    answers = worker._first_outputs(OpenRunner(run), np.arange(5), 3)
    assert seen == [[0, 1, 2], [3, 4, 0]]
    assert answers.values.ravel().tolist() == [0, 10, 20, 30, 40]


def test_a_process_that_dies_is_an_error_with_its_code(bundle: Path) -> None:
    with RunnerProcess(ONNX_RUNTIME, RunnerSetup(bundle)) as killed:
        os.kill(killed.pid, 9)
        with pytest.raises(UnavailableError, match="ended with -9"):
            killed.turn(np.zeros((1, 3, 32, 32), np.float32), 0.01)


def test_a_runner_that_does_not_open_says_why(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="so it is no bundle"), RunnerProcess(EAGER, RunnerSetup(tmp_path)):
        pass


def test_a_bfloat16_graph_is_skipped_on_a_cpu_with_the_reason(tmp_path: Path) -> None:
    opened = Bundle.open(tiny_bundles.write(tmp_path / "b", Tiny(engine="none", precision=Precision.BF16)))
    assert why_not(ONNX_RUNTIME, RunnerSetup(opened.path), opened).endswith("computes nothing in bfloat16 on a CPU")


def test_what_cannot_run_is_skipped_with_the_reason(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Bundle.open(bundle)
    assert why_not("tensorrt", RunnerSetup(bundle), opened) == "the bundle has no engine"
    monkeypatch.setattr(processor, "cpu_flags", lambda: {"avx2"})
    assert "no bfloat16" in why_not("bf16", RunnerSetup(bundle), opened)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    assert "no bfloat16" in why_not("openvino-bf16", RunnerSetup(bundle), opened)
    assert why_not("openvino", RunnerSetup(bundle), opened) == ""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert "C++ compiler" in why_not("compile", RunnerSetup(bundle), opened)
    manifest = small_bundles.read_manifest(bundle)
    manifest["model"] |= {"origin": "checkpoint", "checkpoint": "run7.pth"}
    bundle = small_bundles.copy(bundle, tmp_path / "trained")
    small_bundles.write_manifest(bundle, manifest)
    assert "--checkpoint run7.pth" in why_not(EAGER, RunnerSetup(bundle), Bundle.open(bundle))
    with pytest.raises(UsageError, match=r"give --checkpoint run7\.pth"):
        measure(question(bundle, EAGER))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert why_not("openvino", RunnerSetup(bundle), opened) == "not installed: pip install openvino"
    assert why_not(ONNX_RUNTIME, RunnerSetup(bundle), opened) == "not installed: pip install onnxruntime"


def test_what_was_asked_for_by_name_must_run(bundle: Path) -> None:
    with pytest.raises(UnavailableError, match="TensorRT cannot run here: the bundle has no engine"):
        measure(question(bundle, "tensorrt"))


def test_batches_are_those_of_the_profile() -> None:
    assert chosen_batches((), BatchProfile(1, 8, 32)) == (1, 8)
    assert chosen_batches((8, 2, 2), BatchProfile(1, 8, 32)) == (2, 8)
    with pytest.raises(UsageError, match="batches of 1 to 32, not 64"):
        chosen_batches((64,), BatchProfile(1, 8, 32))


def test_every_name_can_be_opened_and_has_a_title() -> None:
    assert set(contestants._OPENERS) == set(contestants.TITLES)


@pytest.mark.parametrize("is_cold", [True, False])
def test_an_engine_is_fed_by_name_and_starts_cold_or_warm(
    is_cold: bool, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Engine:
        def __init__(self, plan: bytes, flavour: Any, start: StartOptions) -> None:
            assert plan == small_bundles.plan_bytes()
            assert start.runtime_cache is not is_cold

        def __enter__(self) -> Engine:
            return self

        def __exit__(self, *_: object) -> None:
            return

        def run(self, feeds: dict[str, Any]) -> dict[str, Any]:
            return {"logits": feeds["input"] + 1}

        def layer_seconds(self, feeds: dict[str, Any]) -> dict[str, float]:
            return {"blocks.0.channel_func.fc1/Gemm+blocks.0/Add": 0.75, "head/Gemm": 0.25}

    bundle = small_bundles.copy(bundle, tmp_path / "planned")
    small_bundles.give_plan(bundle)
    opened = Bundle.open(bundle)
    monkeypatch.setattr("spach_deploy.runtime.tensorrt_runner.TensorRTRunner", Engine)
    with contestants._engine(opened, RunnerSetup(bundle, is_cold=is_cold)) as runner:
        assert isinstance(runner, OpenRunner)
        assert runner.device == "cuda"
        fed = runner.prepare(np.zeros(1))
        assert runner.run(fed) == 1
        assert runner.profile is not None
        assert runner.profile(fed) == {"blocks.0": 0.75, "head": 0.25}


def test_bounds_are_the_bundles(bundle: Path, found: Benchmark) -> None:
    allowed = BundleFacts.of(Bundle.open(bundle)).tolerances.graph.outputs["logits"].rel_l2
    assert {runner.accuracy.allowed for runner in found.runners} == {allowed}


def test_a_module_of_ones_own_is_measured_too_where_it_is_given(tmp_path: Path) -> None:
    module, bundle = "tests.own_models:Talking", tmp_path / "b"
    assert export("--module", module, "--image-size", 32, "--engine", "none", "-o", bundle).exit_code == 0
    assert "give --module package.module:factory" in why_not(EAGER, RunnerSetup(bundle), Bundle.open(bundle))
    names = [EAGER, ONNX_PLAIN, ONNX_RUNTIME, *([BF16] if processor.has_bf16() else [])]
    words = ["--module", module, "--batch", "1", "--rounds", "2", "--seconds", "0.01", "--json"]
    asked = itertools.chain.from_iterable(("--runner", name) for name in names)
    done = CliRunner().invoke(main, [str(bundle), *words, *asked])
    found = {runner["runner"]: runner["accuracy"]["rel_l2"] for runner in json.loads(done.stdout)["runners"]}
    assert {*found} == {*names}
    assert all(error < 1e-5 or name == BF16 for name, error in found.items())
    for other, why in (("tests.own_models:PlainNet", "has others"), ("tests.nowhere:make", "cannot be made")):
        with pytest.raises(UnavailableError, match=why), RunnerProcess(EAGER, RunnerSetup(bundle, module=other)):
            pass


def test_a_plain_way_of_several_inputs_is_not_measured(tmp_path: Path) -> None:
    inputs = (torch.rand(1, 3, 32, 32), torch.rand(1, 4))
    made = spach_deploy.export(TwoInputs(), inputs, precision="fp32", engine="none", output=tmp_path / "b")
    setup = RunnerSetup(tmp_path / "b", module="tests.own_models:TwoInputs")
    assert "several inputs" in why_not(ONNX_PLAIN, setup, made.bundle)
    assert why_not(EAGER, setup, made.bundle) == ""
