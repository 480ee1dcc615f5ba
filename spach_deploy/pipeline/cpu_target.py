"""`spach-export --target cpu`: the form of the model that is fastest on this machine's CPU, found by measuring.

Candidates are FP32, BF16 where the CPU multiplies it and OpenVINO is installed, and, with a calibration set, INT8 with
all else in FP32 (or, in OpenVINO, in BF16); in ONNX Runtime and, where it is installed, OpenVINO. All are measured
against PyTorch eager in rounds of one run, and the fastest whose numbers are within its bundle's tolerances becomes the
bundle. What was measured is the manifest's section `cpu`, with what its runner has to be told.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spach_deploy.benchmark.rounds import BenchmarkRequest, measure
from spach_deploy.benchmark.runners import (
    EAGER,
    ONNX_RUNTIME,
    OPENVINO,
    OPENVINO_BF16,
    OPENVINO_HINTS,
    TITLES,
    RunnerSetup,
    why_no_openvino,
    why_not,
)
from spach_deploy.bundle import store as bundles
from spach_deploy.bundle.schema import CpuFormEntry, CpuSection
from spach_deploy.bundle.store import Bundle
from spach_deploy.common.errors import MismatchError, UnavailableError, UsageError
from spach_deploy.common.files import Destination
from spach_deploy.common.machine import available_threads, has_vnni
from spach_deploy.common.progress import ExportObserver
from spach_deploy.common.text import escaped
from spach_deploy.graph.opset import check_opset
from spach_deploy.models.registry import resolve
from spach_deploy.options.specs import EngineTarget, ExportOptions, Flavour, Precision, QuantizationSpec
from spach_deploy.pipeline.export import ExportResult, export
from spach_deploy.pipeline.scheduler import Scheduler

if TYPE_CHECKING:
    from spach_deploy.benchmark.result import Benchmark, RunnerResult

RUNNERS: Mapping[Precision, tuple[str, ...]] = {
    Precision.INT8: (EAGER, ONNX_RUNTIME, OPENVINO, OPENVINO_BF16),
    Precision.BF16: (EAGER, OPENVINO_BF16),
    Precision.FP32: (EAGER, ONNX_RUNTIME, OPENVINO),
}
"""Candidates, and what may run each: ONNX Runtime has no bfloat16 on CPUs."""

_ROUNDS, _SECONDS = 5, 1.0


@dataclasses.dataclass(frozen=True)
class CpuCandidate:
    """A precision in a runner at `batch`. `ratio`: to PyTorch eager, None where the rounds cannot tell it."""

    precision: Precision
    runner: str
    batch: int
    images_per_second: float
    times_eager: float
    ratio: float | None
    rel_l2: float
    is_right: bool

    @classmethod
    def of(cls, precision: Precision, runner: RunnerResult, eager: RunnerResult) -> CpuCandidate:
        """From a benchmark of one batch."""
        timing, base = runner.timings[0], eager.timings[0]
        told = timing.ratio.value if timing.ratio is not None and timing.ratio.is_conclusive else None
        return cls(
            precision,
            runner.name,
            timing.batch,
            timing.images_per_second,
            timing.ratio.value if timing.ratio is not None else base.latency.median / timing.latency.median,
            told,
            runner.accuracy.rel_l2,
            runner.accuracy.is_right,
        )

    def section(self) -> CpuFormEntry:
        """For the manifest."""
        return CpuFormEntry(**vars(self), settings=self.settings)

    @property
    def settings(self) -> dict[str, str]:
        """What the runner has to be told to compute so."""
        return {"INFERENCE_PRECISION_HINT": hint} if (hint := OPENVINO_HINTS.get(self.runner)) else {}


@dataclasses.dataclass(frozen=True)
class CpuChoice:
    """The bundle that was written, the form that it is of, and all that were measured.

    `is_asked`: its precision was the only one that was to be tried.
    """

    bundle: Bundle
    chosen: CpuCandidate
    forms: tuple[CpuCandidate, ...]
    machine: Mapping[str, Any]
    is_asked: bool = False


def check_cpu(options: ExportOptions, asked: Precision | None) -> None:
    """Refuse contradictions before any work."""
    if options.engine.flavour not in (Flavour.AUTO, Flavour.NONE) or options.engine.gpus:
        raise UsageError("--target cpu builds no engine.", "Leave --engine and --gpu out.")
    if asked is not None and asked not in RUNNERS:
        raise UsageError(
            f"--target cpu chooses between int8, bf16 and fp32, not {asked.value}.", "Leave the precision out."
        )
    if asked is Precision.BF16 and (why := why_no_openvino(OPENVINO_BF16)):
        raise UnavailableError(f"--target cpu runs bf16 in OpenVINO. {why[0].upper()}{why[1:]}.")
    if options.quantization.vnni:
        raise UsageError("--target cpu sees for itself whether there is VNNI.", "Leave --vnni out.")
    if asked is Precision.INT8 and options.quantization.calibration is None:
        raise UsageError("INT8 needs images to calibrate on.", "Give --calibration DIR.")
    if options.quantization.max_drop is not None:
        raise UsageError("--target cpu does not judge by labels.", "Give --max-rel-l2, or --int8 --max-drop alone.")
    for precision in wanted(options, asked):
        check_opset(options_for(options, precision))


def export_for_cpu(
    options: ExportOptions,
    asked: Precision | None = None,
    observer: ExportObserver | None = None,
    tell: Callable[[str, float], None] = lambda what, share: None,
    scheduler: Scheduler | None = None,
) -> CpuChoice:
    """Export the candidates, measure them in turn, and write the bundle of the best.

    Raises what an export raises, UnavailableError without a runner, MismatchError when no form is right.
    """
    check_cpu(options, asked)
    seen = _seen(options)
    found: dict[Precision, Benchmark] = {}
    with tempfile.TemporaryDirectory(prefix="spach-cpu-") as folder:
        for precision in wanted(options, asked):
            place = Destination.of(Path(folder) / precision.value)
            made = export(options_for(options, precision), observer, place=place, scheduler=scheduler)
            found[precision] = measured(made, options, tell)
        forms = tuple(form for precision, benchmark in found.items() for form in _forms(precision, benchmark))
        chosen, machine = best_of(forms), next(iter(found.values())).machine
        bundle = _placed(Path(folder) / chosen.precision.value, options, seen, _section(chosen, forms, machine))
    return CpuChoice(bundle, chosen, forms, machine, asked is not None)


def _seen(options: ExportOptions) -> Mapping[Path, Destination]:
    """What lies where the bundle may go, as far as that is known. BundleError where the user's place is none."""
    if options.output is not None:
        return {options.output: bundles.check_target(options.output, overwrite=options.overwrite)}
    if options.model.name is None:
        return {}
    names = (bundles.default_directory(resolve(options.model.name), precision.value) for precision in RUNNERS)
    return {path: Destination.of(path) for path in names}


def wanted(options: ExportOptions, asked: Precision | None) -> list[Precision]:
    """Precisions to be tried: the one that was asked for, or all candidates."""
    return [asked] if asked else candidates(options)


def candidates(options: ExportOptions) -> list[Precision]:
    """Precisions that these options and this machine leave to be tried."""
    left_out = {Precision.INT8} if options.quantization.calibration is None else set()
    if why_no_openvino(OPENVINO_BF16):
        left_out.add(Precision.BF16)
    return [precision for precision in RUNNERS if precision not in left_out]


def options_for(options: ExportOptions, precision: Precision) -> ExportOptions:
    """Options of one candidate: no engine, all that is not quantized in FP32."""
    quantization = QuantizationSpec()
    if precision.is_quantized:
        quantization = dataclasses.replace(options.quantization, rest=Precision.FP32, vnni=has_vnni())
    engine = EngineTarget(Flavour.NONE, batch=options.engine.batch)
    return dataclasses.replace(options, precision=precision, quantization=quantization, engine=engine)


def measured(result: ExportResult, options: ExportOptions, tell: Callable[[str, float], None]) -> Benchmark:
    """PyTorch eager and all that can run the graph, at the profile's usual batch."""
    bundle = result.bundle
    setup = RunnerSetup(bundle.path, options.model.checkpoint, options.model.weights, available_threads())
    if options.model.checkpoint is None:
        setup = dataclasses.replace(setup, weights=None)
    runners = RUNNERS[bundle.manifest.precision.asked]
    names = tuple(name for name in runners if not why_not(name, setup, bundle))
    if set(names) <= {EAGER}:
        raise UnavailableError("Nothing here runs a graph on the CPU.", "pip install onnxruntime")
    batches = (options.engine.batch.opt,)
    return measure(BenchmarkRequest(setup, batches, names, _ROUNDS, _SECONDS), tell)


def _forms(precision: Precision, found: Benchmark) -> Iterator[CpuCandidate]:
    eager = next(runner for runner in found.runners if runner.name == EAGER)
    for runner in found.runners:
        if runner is not eager and runner.timings:
            yield CpuCandidate.of(precision, runner, eager)


def best_of(forms: tuple[CpuCandidate, ...]) -> CpuCandidate:
    """The fastest of the right ones, by their ratios to PyTorch eager, which ran beside each."""
    right = [form for form in forms if form.is_right]
    if not right:
        listed = ", ".join(f"{form.precision.value} in {TITLES[form.runner]} {form.rel_l2:.1e}" for form in forms)
        raise MismatchError(f"No form computes what PyTorch computes: {listed or 'none could be run'}.")
    return max(right, key=lambda form: form.times_eager)


def _section(chosen: CpuCandidate, forms: tuple[CpuCandidate, ...], machine: Mapping[str, Any]) -> CpuSection:
    return CpuSection(chosen=chosen.section(), forms=tuple(form.section() for form in forms), machine=dict(machine))


def _placed(source: Path, options: ExportOptions, seen: Mapping[Path, Destination], section: CpuSection) -> Bundle:
    """The bundle at its target, with a section `cpu` in its manifest."""
    manifest = Bundle.open(source).manifest
    target = options.output or bundles.default_directory(manifest.model.name, manifest.precision.asked.value)
    place = bundles.check_target(target, overwrite=options.overwrite)
    with bundles.writing(seen.get(target, place)) as staging:
        for file in source.iterdir():
            if file.name != bundles.MANIFEST:
                shutil.copy2(file, staging / file.name)
        bundles.seal_again(staging, source, cpu=section)
    return Bundle.open(target, verify=False)


def as_table(choice: CpuChoice) -> str:
    """A line a form, and the choice with what to run it in."""
    head = f"{'precision':<11}{'runner':<16}{'images/s':>9}{'x eager':>20}  error"
    lines = [head, "─" * 70, *map(_row, choice.forms), ""]
    chosen = choice.chosen
    lines.append(
        f"Fastest of the right ones at batch {chosen.batch}: {chosen.precision.value} in {TITLES[chosen.runner]},"
        f" {chosen.images_per_second:,.1f} images/s."
    )
    if hint := chosen.settings:
        lines.append(f'Run it so: openvino.Core().compile_model("model.onnx", "CPU", {json.dumps(hint)})')
    if Precision.INT8 not in {form.precision for form in choice.forms} and not choice.is_asked:
        lines.append("With --calibration DIR, INT8 is tried too.")
    return escaped([*lines, "", f"Bundle: {choice.bundle.path}"])


def _row(form: CpuCandidate) -> str:
    ratio = "too noisy to tell" if form.ratio is None else f"{form.ratio:.2f}"
    wrong = "" if form.is_right else "  WRONG"
    return (
        f"{form.precision.value:<11}{TITLES[form.runner]:<16}{form.images_per_second:>9,.1f}{ratio:>20}"
        f"  {form.rel_l2:.1e}{wrong}"
    )
