"""`spach-export --target cpu`: measure which precision and runtime is fastest on this machine's CPU, and export that.

Candidates: FP32; BF16, where the CPU multiplies it and OpenVINO is installed; with a calibration set also INT8 with
everything else in FP32 (or, in OpenVINO, in BF16). Each runs in ONNX Runtime and, where installed, OpenVINO. All are
measured against PyTorch eager in rounds of one run. The fastest candidate whose outputs are within its bundle's
tolerances becomes the bundle. Its manifest has all measurements in the section `cpu`, with the settings of the runner.
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
from spach_deploy.models.registry import known_name
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
"""The runners of each candidate precision. ONNX Runtime has no bfloat16 on CPUs."""

_ROUNDS, _SECONDS = 5, 1.0


@dataclasses.dataclass(frozen=True)
class CpuChoice:
    """The bundle that was written, the chosen candidate, and all measured candidates.

    `is_requested`: the user named the precision, so that no other was tried.
    """

    bundle: Bundle
    chosen: CpuFormEntry
    forms: tuple[CpuFormEntry, ...]
    machine: Mapping[str, Any]
    is_requested: bool = False


def check_cpu(options: ExportOptions, requested: Precision | None) -> None:
    """UsageError for options that contradict --target cpu, UnavailableError without OpenVINO for bf16."""
    if options.engine.flavour not in (Flavour.AUTO, Flavour.NONE) or options.engine.gpus:
        raise UsageError("--target cpu builds no engine.", "Leave --engine and --gpu out.")
    if requested is not None and requested not in RUNNERS:
        raise UsageError(
            f"--target cpu chooses between int8, bf16 and fp32, not {requested.value}.", "Leave the precision out."
        )
    if requested is Precision.BF16 and (why := why_no_openvino(OPENVINO_BF16)):
        raise UnavailableError(f"--target cpu runs bf16 in OpenVINO. {why[0].upper()}{why[1:]}.")
    if options.quantization.vnni:
        raise UsageError("--target cpu sees for itself whether there is VNNI.", "Leave --vnni out.")
    if requested is Precision.INT8 and options.quantization.calibration is None:
        raise UsageError("INT8 needs images to calibrate on.", "Give --calibration DIR.")
    if options.quantization.max_drop is not None:
        raise UsageError("--target cpu does not judge by labels.", "Give --max-rel-l2, or --int8 --max-drop alone.")
    for precision in wanted(options, requested):
        check_opset(options_for(options, precision))


def export_for_cpu(
    options: ExportOptions,
    requested: Precision | None = None,
    observer: ExportObserver | None = None,
    tell: Callable[[str, float], None] = lambda what, share: None,
    scheduler: Scheduler | None = None,
) -> CpuChoice:
    """Export the candidates, measure them in turn, and write the bundle of the fastest correct one.

    `requested`: the only precision to try. `tell` is called with what is measured and the share done. Raises what an
    export raises, UnavailableError without a runner, and MismatchError where no candidate is within its tolerances.
    """
    check_cpu(options, requested)
    targets = _possible_targets(options)
    benchmarks: dict[Precision, Benchmark] = {}
    with tempfile.TemporaryDirectory(prefix="spach-cpu-", ignore_cleanup_errors=True) as folder:
        for precision in wanted(options, requested):
            destination = Destination.of(Path(folder) / precision.value)
            made = export(options_for(options, precision), observer, destination=destination, scheduler=scheduler)
            benchmarks[precision] = measured(made, options, tell)
        forms = tuple(form for precision, benchmark in benchmarks.items() for form in _forms(precision, benchmark))
        chosen, machine = best_of(forms), next(iter(benchmarks.values())).machine
        section = CpuSection(chosen=chosen, forms=forms, machine=dict(machine))
        bundle = _copied_to_target(Path(folder) / chosen.precision.value, options, targets, section)
    return CpuChoice(bundle, chosen, forms, machine, requested is not None)


def _possible_targets(options: ExportOptions) -> Mapping[Path, Destination]:
    """The paths that the bundle may go to, with what is there now; BundleError for an --output that cannot be used.

    Empty where the checkpoint has yet to tell the model's name.
    """
    if options.output is not None:
        return {options.output: bundles.check_target(options.output, overwrite=options.overwrite)}
    name = known_name(options.model)
    if name is None:
        return {}
    names = (bundles.default_directory(name, precision.value) for precision in RUNNERS)
    return {path: Destination.of(path) for path in names}


def wanted(options: ExportOptions, requested: Precision | None) -> list[Precision]:
    """The precisions to try: the requested one, or all candidates."""
    return [requested] if requested else candidates(options)


def candidates(options: ExportOptions) -> list[Precision]:
    """The precisions that these options and this machine allow."""
    left_out = {Precision.INT8} if options.quantization.calibration is None else set()
    if why_no_openvino(OPENVINO_BF16):
        left_out.add(Precision.BF16)
    return [precision for precision in RUNNERS if precision not in left_out]


def options_for(options: ExportOptions, precision: Precision) -> ExportOptions:
    """Options of one candidate: no engine, and everything that is not quantized in FP32."""
    quantization = QuantizationSpec()
    if precision.is_quantized:
        quantization = dataclasses.replace(options.quantization, rest=Precision.FP32, vnni=has_vnni())
    engine = EngineTarget(Flavour.NONE, batch=options.engine.batch)
    return dataclasses.replace(options, precision=precision, quantization=quantization, engine=engine)


def measured(result: ExportResult, options: ExportOptions, tell: Callable[[str, float], None]) -> Benchmark:
    """A benchmark of PyTorch eager and every runner that can run the graph, at the profile's `opt` batch."""
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


def _forms(precision: Precision, benchmark: Benchmark) -> Iterator[CpuFormEntry]:
    eager = next(runner for runner in benchmark.runners if runner.name == EAGER)
    for runner in benchmark.runners:
        if runner is not eager and runner.timings:
            yield _form(precision, runner, eager)


def _form(precision: Precision, runner: RunnerResult, eager: RunnerResult) -> CpuFormEntry:
    """From a benchmark of one batch size."""
    timing, base = runner.timings[0], eager.timings[0]
    hint = OPENVINO_HINTS.get(runner.name)
    return CpuFormEntry(
        precision=precision,
        runner=runner.name,
        batch=timing.batch,
        images_per_second=timing.images_per_second,
        times_eager=base.latency.median / timing.latency.median if timing.ratio is None else timing.ratio.value,
        ratio=timing.ratio.value if timing.ratio is not None and timing.ratio.is_conclusive else None,
        rel_l2=runner.accuracy.rel_l2,
        is_right=runner.accuracy.is_right,
        settings={"INFERENCE_PRECISION_HINT": hint} if hint else {},
    )


def best_of(forms: tuple[CpuFormEntry, ...]) -> CpuFormEntry:
    """The fastest correct candidate, by its ratio to PyTorch eager, which ran in the same rounds."""
    right = [form for form in forms if form.is_right]
    if not right:
        listed = ", ".join(f"{form.precision.value} in {TITLES[form.runner]} {form.rel_l2:.1e}" for form in forms)
        raise MismatchError(f"No form computes what PyTorch computes: {listed or 'none could be run'}.")
    return max(right, key=lambda form: form.times_eager)


def _copied_to_target(
    source: Path, options: ExportOptions, targets: Mapping[Path, Destination], section: CpuSection
) -> Bundle:
    """The bundle at `source`, copied to its target with the section `cpu` added to its manifest."""
    manifest = Bundle.open(source).manifest
    target = options.output or bundles.default_directory(manifest.model.name, manifest.precision.asked.value)
    destination = bundles.check_target(target, overwrite=options.overwrite)
    with bundles.writing(targets.get(target, destination)) as staging:
        for file in source.iterdir():
            if file.name != bundles.MANIFEST:
                shutil.copy2(file, staging / file.name)
        bundles.seal_again(staging, source, cpu=section)
    return Bundle.open(target, verify=False)


def as_table(choice: CpuChoice) -> str:
    """One line for each candidate, then the choice and how to run it."""
    head = f"{'precision':<11}{'runner':<16}{'images/s':>9}{'x eager':>20}  error"
    lines = [head, "─" * 70, *map(_row, choice.forms), ""]
    chosen = choice.chosen
    lines.append(
        f"Fastest of the right ones at batch {chosen.batch}: {chosen.precision.value} in {TITLES[chosen.runner]},"
        f" {chosen.images_per_second:,.1f} images/s."
    )
    if hint := chosen.settings:
        lines.append(f'Run it so: openvino.Core().compile_model("model.onnx", "CPU", {json.dumps(hint)})')
    if Precision.INT8 not in {form.precision for form in choice.forms} and not choice.is_requested:
        lines.append("With --calibration DIR, INT8 is tried too.")
    return escaped([*lines, "", f"Bundle: {choice.bundle.path}"])


def _row(form: CpuFormEntry) -> str:
    ratio = "too noisy to tell" if form.ratio is None else f"{form.ratio:.2f}"
    wrong = "" if form.is_right else "  WRONG"
    return (
        f"{form.precision.value:<11}{TITLES[form.runner]:<16}{form.images_per_second:>9,.1f}{ratio:>20}"
        f"  {form.rel_l2:.1e}{wrong}"
    )
