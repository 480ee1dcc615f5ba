"""What --target cpu chooses from, side by side: FP32, BF16 and INT8 in ONNX Runtime and OpenVINO against PyTorch eager,
and against the plain ways: the model as runtimes' own tools convert it (NNCF's INT8 where `pip install nncf` was run).

    python -m benchmarks.cpu_forms [MODEL ...] [--batch 1 8] [--rounds 9]

Every form runs in a process of its own, all of them in every round, in an order of chance. Ratios are those of the same
rounds, with Student's 95 % interval. Errors are the worst image's relative L2 against PyTorch, WRONG beyond what the
form's own bundle allows. INT8 is calibrated on other photographs than those it is judged on.

The goals compare each precision's best form that is right with the best plain way that is right: FP32 with plain FP32,
BF16 and INT8 with plain ways of every precision.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.photographs import CALIBRATION, write
from benchmarks.results import record, table
from spach_deploy.benchmark.result import OutputError, Ratio, ratio
from spach_deploy.benchmark.rounds import accuracy, paired_rounds
from spach_deploy.benchmark.runners import EAGER, ONNX_RUNTIME, PLAIN, TITLES, RunnerSetup, why_not
from spach_deploy.benchmark.worker import RunnerProcess
from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.store import GOLDEN, Bundle
from spach_deploy.common.files import Destination
from spach_deploy.common.machine import available_threads
from spach_deploy.options.specs import ExportOptions, ModelSpec, Precision, QuantizationSpec
from spach_deploy.pipeline.cpu_target import RUNNERS, candidates, options_for
from spach_deploy.pipeline.export import export
from spach_deploy.validation.bundle_facts import BundleFacts

Form = tuple[Precision, str]
Times = dict[Form, tuple[float, ...]]
BASE: Form = (Precision.FP32, EAGER)
FP32: Form = (Precision.FP32, ONNX_RUNTIME)
SECONDS = 1.0
MODELS = ["ms_hybrid_s", "ms_conv_s", "trans_s", "ms_mlp_s"]
GOALS = {Precision.FP32: 1.1, Precision.BF16: 1.15, Precision.INT8: 1.4}
"""How many times as fast as the best plain way each precision's best form is to be."""


def bundles(name: str, folder: Path) -> Iterator[tuple[Precision, Bundle]]:
    """A bundle of each precision that something here runs."""
    calibration, held_out = write(folder)
    asked = ExportOptions(ModelSpec(name), images=held_out, quantization=QuantizationSpec(calibration))
    for precision in candidates(asked):
        print(f"{name}: export {precision.value}", file=sys.stderr, flush=True)
        yield (
            precision,
            export(options_for(asked, precision), destination=Destination.of(folder / precision.value)).bundle,
        )


def workers(stack: contextlib.ExitStack, made: dict[Precision, Bundle], folder: Path) -> dict[Form, RunnerProcess]:
    """All forms that can run here, PyTorch once. `folder`: for the calibration set and the plain models."""
    found: dict[Form, RunnerProcess] = {}
    for precision, bundle in made.items():
        calibration = folder / CALIBRATION
        setup = RunnerSetup(bundle.path, threads=available_threads(), calibration=calibration, converted=folder)
        for name in RUNNERS[precision]:
            if (name != EAGER or precision is Precision.FP32) and not why_not(name, setup, bundle):
                found[precision, name] = stack.enter_context(RunnerProcess(name, setup))
    return found


def measured(name: str, batches: Sequence[int], rounds: int) -> Iterator[tuple[int, Times, dict[Form, OutputError]]]:
    """For each batch size: median seconds of each form in each round, and its error."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        made = dict(bundles(name, Path(folder)))
        running = workers(stack, made, Path(folder))
        golden = Golden.load(made[Precision.FP32].file(GOLDEN))
        for batch in batches:
            images = golden.input[np.arange(batch) % len(golden.input)]
            errors: dict[Form, OutputError] = {}
            for form, worker in running.items():
                allowed = BundleFacts.of(made[form[0]]).tolerances.graph.outputs["logits"].rel_l2
                found = worker.first_outputs(golden.input, batch).values
                errors[form] = accuracy(found, golden.outputs["logits"], allowed)
            times = paired_rounds(running, images, rounds, SECONDS, lambda what, share: print(what, file=sys.stderr))
            yield batch, times, errors


def rows(name: str, batch: int, times: Times, errors: dict[Form, OutputError]) -> list[list[object]]:
    """A line a form."""
    lines: list[list[object]] = []
    for form in sorted(times, key=lambda form: -statistics.median(times[form])):
        precision, runner = form
        error = errors[form]
        told = f"{error.rel_l2:.1e}" + ("" if error.is_right else " WRONG")
        ratios = [_words(ratio(times[form], times[base])) if form != base else "1" for base in (BASE, FP32)]
        seconds = statistics.median(times[form])
        lines.append([name, precision.value, TITLES[runner], f"{batch / seconds:.1f}", *ratios, told])
    return lines


def _words(found: Ratio | None) -> str:
    if found is None or not found.is_conclusive:
        return "too noisy to tell"
    return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"


def verdict(times: Times, errors: dict[Form, OutputError]) -> list[str]:
    """Whether the goals hold, by the right forms alone, and by ratios that the rounds can tell."""
    right = {form: seconds for form, seconds in times.items() if errors[form].is_right and form != BASE}
    plain = {form: seconds for form, seconds in right.items() if form[1] in PLAIN}
    judged: list[str] = []
    for precision, goal in GOALS.items():
        peers = {
            form: seconds for form, seconds in plain.items() if precision is not Precision.FP32 or form[0] is precision
        }
        ours = {form: seconds for form, seconds in right.items() if form[1] not in PLAIN and form[0] is precision}
        judged.append(_judged(ours, peers, goal))
    return judged


def _judged(ours: Times, peers: Times, goal: float) -> str:
    if not ours or not peers:
        return "-"
    best, peer = (min(forms, key=lambda form: statistics.median(forms[form])) for forms in (ours, peers))
    found = ratio(ours[best], peers[peer])
    words = f"{TITLES[best[1]]} to {TITLES[peer[1]]} ({peer[0].value})"
    if found is None or not found.is_conclusive:
        return f"too noisy to tell: {words}"
    return f"{found.value:.2f} ({'held' if found.value >= goal else 'missed'}): {words}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    lines: dict[int, list[list[object]]] = {batch: [] for batch in arguments.batch}
    verdicts: dict[int, list[list[object]]] = {batch: [] for batch in arguments.batch}
    for name in arguments.models:
        for batch, times, errors in measured(name, arguments.batch, arguments.rounds):
            lines[batch] += rows(name, batch, times, errors)
            verdicts[batch].append([name, *verdict(times, errors)])
            print(table(("",) * 7, lines[batch][-len(times) :]), verdicts[batch][-1], flush=True)
    headings = ("model", "precision", "runner", "images/s", "x PyTorch eager", "x ONNX Runtime FP32", "worst rel. L2")
    goals = (
        "model",
        *(f"{precision.value} to the best plain way (goal {goal:g})" for precision, goal in GOALS.items()),
    )
    packages = [name for name in ("torch", "onnxruntime", "openvino", "nncf") if importlib.util.find_spec(name)]
    for batch in arguments.batch:
        record(
            f"Forms on a CPU, batch {batch}",
            f"python -m benchmarks.cpu_forms {' '.join(arguments.models)} --batch {batch} --rounds {arguments.rounds}",
            f"{table(headings, lines[batch])}\n\n{table(goals, verdicts[batch])}",
            packages,
            is_whole={*MODELS} <= {*arguments.models},
        )


if __name__ == "__main__":
    main()
