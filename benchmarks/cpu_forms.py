"""What --target cpu chooses from, side by side: FP32, BF16 and INT8 in ONNX Runtime and OpenVINO against PyTorch eager.

    python -m benchmarks.cpu_forms [MODEL ...] [--batch 8] [--rounds 9]

Every form runs in a process of its own, all of them in every round, in an order of chance. Ratios are those of the same
rounds, with Student's 95 % interval. Errors are the worst image's relative L2 against PyTorch, WRONG beyond what the
form's own bundle allows. INT8 is calibrated on other photographs than those it is judged on.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import random
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.photographs import write
from benchmarks.results import record, table
from spach_deploy.benchmark.result import OutputError, Ratio, ratio
from spach_deploy.benchmark.rounds import accuracy
from spach_deploy.benchmark.runners import EAGER, ONNX_RUNTIME, TITLES, RunnerSetup, why_not
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
BASE: Form = (Precision.FP32, EAGER)
FP32: Form = (Precision.FP32, ONNX_RUNTIME)
SECONDS = 1.0
MODELS = ["ms_hybrid_s", "ms_conv_s", "trans_s", "mlp_s"]
GOALS = {"best form, times PyTorch eager": 4.0, "best INT8, times ONNX Runtime in FP32": 2.5}


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


def workers(stack: contextlib.ExitStack, made: dict[Precision, Bundle]) -> dict[Form, RunnerProcess]:
    """All forms that can run here, PyTorch once."""
    found: dict[Form, RunnerProcess] = {}
    for precision, bundle in made.items():
        setup = RunnerSetup(bundle.path, threads=available_threads())
        for name in RUNNERS[precision]:
            if (name != EAGER or precision is Precision.FP32) and not why_not(name, setup, bundle):
                found[precision, name] = stack.enter_context(RunnerProcess(name, setup))
    return found


def measured(name: str, batch: int, rounds: int) -> tuple[dict[Form, list[float]], dict[Form, OutputError]]:
    """Median seconds of each form in each round, and its error."""
    times: dict[Form, list[float]] = {}
    errors: dict[Form, OutputError] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        made = dict(bundles(name, Path(folder)))
        running = workers(stack, made)
        golden = Golden.load(made[Precision.FP32].file(GOLDEN))
        images = golden.input[np.arange(batch) % len(golden.input)]
        for form, worker in running.items():
            allowed = BundleFacts.of(made[form[0]]).tolerances.graph.outputs["logits"].rel_l2
            errors[form] = accuracy(worker.first_outputs(golden.input, batch).values, golden.outputs["logits"], allowed)
        chance = random.Random(0)
        for number in range(rounds):
            print(f"{name}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
            for form in chance.sample(list(running), len(running)):
                times.setdefault(form, []).append(statistics.median(running[form].turn(images, SECONDS).seconds))
    return times, errors


def rows(name: str, batch: int, times: dict[Form, list[float]], errors: dict[Form, OutputError]) -> list[list[object]]:
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


def verdict(times: dict[Form, list[float]], errors: dict[Form, OutputError]) -> list[str]:
    """Whether the goals hold, by the right forms alone, and by ratios that the rounds can tell."""
    right = {form: seconds for form, seconds in times.items() if errors[form].is_right and form != BASE}
    eight = {form: seconds for form, seconds in right.items() if form[0] is Precision.INT8}
    reached = (
        _best(right.values(), times[BASE]),
        _best(eight.values(), times[FP32]),
    )
    return [_judged(found, goal) for found, goal in zip(reached, GOALS.values(), strict=True)]


def _best(forms: Iterable[list[float]], base: list[float]) -> float | None:
    """The largest ratio that the rounds can tell; None where they tell none."""
    found = [ratio(seconds, base) for seconds in forms]
    return max((one.value for one in found if one is not None and one.is_conclusive), default=None)


def _judged(found: float | None, goal: float) -> str:
    return "too noisy to tell" if found is None else f"{found:.2f} ({'held' if found >= goal else 'missed'})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    lines: list[list[object]] = []
    verdicts: list[list[object]] = []
    for name in arguments.models:
        times, errors = measured(name, arguments.batch, arguments.rounds)
        lines += rows(name, arguments.batch, times, errors)
        verdicts.append([name, *verdict(times, errors)])
        print(table(("",) * 7, lines[-len(times) :]), verdicts[-1], flush=True)
    headings = ("model", "precision", "runner", "images/s", "x PyTorch eager", "x ONNX Runtime FP32", "worst rel. L2")
    goals = ("model", *(f"{what} (goal {goal:g})" for what, goal in GOALS.items()))
    command = f"python -m benchmarks.cpu_forms {' '.join(arguments.models)} --batch {arguments.batch}"
    body = f"{table(headings, lines)}\n\n{table(goals, verdicts)}"
    title, is_whole = f"Forms on a CPU, batch {arguments.batch}", {*MODELS} <= {*arguments.models}
    packages = [name for name in ("torch", "onnxruntime", "openvino") if importlib.util.find_spec(name)]
    record(title, command, body, packages, is_whole=is_whole)


if __name__ == "__main__":
    main()
