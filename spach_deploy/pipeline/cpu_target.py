"""`spach-export --target cpu`: measure which precision and runtime is fastest on this machine's CPU, and export that.

Candidates: FP32; BF16, where the CPU multiplies it and OpenVINO is installed; with a calibration set also INT8 with
everything else in FP32 (or, in OpenVINO, in BF16). Each runs in ONNX Runtime and, where installed, OpenVINO. Beside
them run the plain ways (`benchmark.plain`): the reference as each runtime's own tools convert it. The forms
of a precision are measured against PyTorch eager in rounds of one run, and those whose outputs are within the bundle's
tolerances are right. The fastest right form and the fastest right plain way of every precision then take turns in one
more run, which decides. The winner becomes the bundle: where that is a plain way, the bundle holds it. Its manifest has
all measurements in the section `cpu`, with the settings of the runner.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from spach_deploy.benchmark.result import ratio
from spach_deploy.benchmark.rounds import BenchmarkRequest, measure, paired_rounds
from spach_deploy.benchmark.runners import (
    COMPILE_BF16,
    EAGER,
    IN_OPENVINO,
    NNCF,
    ONNX_PLAIN,
    ONNX_RUNTIME,
    OPENVINO,
    OPENVINO_BF16,
    OPENVINO_HINTS,
    OPENVINO_PLAIN,
    OPENVINO_PLAIN_BF16,
    PLAIN,
    TITLES,
    RunnerSetup,
    why_no_openvino,
    why_not,
)
from spach_deploy.benchmark.worker import RunnerProcess
from spach_deploy.bundle import store as bundles
from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.schema import CpuFormEntry, CpuSection
from spach_deploy.bundle.store import GOLDEN, GRAPH, OPENVINO_MODEL, OPENVINO_WEIGHTS, Bundle
from spach_deploy.common.errors import MismatchError, UnavailableError, UsageError
from spach_deploy.common.files import Destination
from spach_deploy.common.machine import available_threads, has_vnni
from spach_deploy.common.progress import ExportObserver
from spach_deploy.common.text import escaped
from spach_deploy.graph.opset import check_opset
from spach_deploy.models.registry import known_name
from spach_deploy.options.command_line import cpu_command
from spach_deploy.options.quantization import CALIBRATION_SUFFIX
from spach_deploy.options.specs import EngineTarget, ExportOptions, Flavour, Precision, QuantizationSpec
from spach_deploy.options.table import EXPORT
from spach_deploy.pipeline.export import ExportResult, export
from spach_deploy.pipeline.scheduler import Scheduler
from spach_deploy.pipeline.steps.model import all_rewrites

if TYPE_CHECKING:
    from spach_deploy.benchmark.result import Benchmark, RunnerResult

RUNNERS: Mapping[Precision, tuple[str, ...]] = {
    Precision.INT8: (EAGER, ONNX_RUNTIME, OPENVINO, OPENVINO_BF16, NNCF),
    Precision.BF16: (EAGER, OPENVINO_BF16, OPENVINO_PLAIN_BF16, COMPILE_BF16),
    Precision.FP32: (EAGER, ONNX_RUNTIME, OPENVINO, ONNX_PLAIN, OPENVINO_PLAIN),
}
"""The runners of each candidate precision. ONNX Runtime has no bfloat16 on CPUs."""

FormKey = tuple[Precision, str]
"""A form's precision and runner."""

_FP32_ERROR = 1e-4
"""Relative L2 that no rounding in FP32 explains; the bundle of another precision allows more."""

_PRECISION_OF = {name: precision for precision, names in RUNNERS.items() for name in names if name in PLAIN}
"""The precision of each plain way."""

PYTORCH = (EAGER, *PLAIN)
"""What runs the reference itself, which is not to be had where a factory draws its weights anew each time."""

_ROUNDS, _SECONDS = 5, 1.0


@dataclasses.dataclass(frozen=True)
class CpuChoice:
    """The bundle that was written, and what its manifest says of the measurement.

    `is_requested`: the user named the precision, so that no other was tried. `not_run`: what of `PYTORCH` did not run,
    with the reason.
    """

    bundle: Bundle
    section: CpuSection
    is_requested: bool = False
    not_run: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def plain(self) -> CpuFormEntry | None:
        """The fastest plain way that is right; None without any."""
        plain = [form for form in self.section.forms if form.runner in PLAIN and form.is_right]
        decided = [form for form in plain if form.seconds_by_round] or plain
        return max(decided, key=lambda form: form.images_per_second, default=None)


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
    forms: dict[FormKey, CpuFormEntry] = {}
    setups: dict[FormKey, RunnerSetup] = {}
    not_run: dict[str, str] = {}
    machine: Mapping[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="spach-cpu-", ignore_cleanup_errors=True) as name:
        folder, converted = Path(name), Path(name) / "converted"
        converted.mkdir()

        def exported(chosen: ExportOptions, where: str) -> ExportResult:
            return export(chosen, observer, destination=Destination.of(folder / where), scheduler=scheduler)

        for precision in wanted(options, requested):
            bundle = exported(options_for(options, precision), precision.value).bundle
            setup = _setup(bundle, options, converted)
            names = RUNNERS[precision] if requested is None else (*RUNNERS[precision], *_other_plain(precision))
            reasons = {runner: reason for runner in names if (reason := why_not(runner, setup, bundle))}
            benchmark = measured(setup, options, [runner for runner in names if runner not in reasons], tell)
            not_run |= {runner: why for runner, why in {**reasons, **benchmark.skipped}.items() if runner in PYTORCH}
            machine = machine or benchmark.machine
            for form in _forms(precision, benchmark):
                forms[form.precision, form.runner] = form
                setups[form.precision, form.runner] = setup
        finalists = finalists_of(forms.values(), requested)
        if len(finalists) > 1:
            times = paired({key: setups[key] for key in finalists}, options.engine.batch.opt, tell)
            forms |= {key: _timed(forms[key], seconds) for key, seconds in times.items()}
        chosen = best_of([forms[key] for key in finalists], requested)
        source = folder / chosen.precision.value
        if chosen.runner == ONNX_PLAIN:
            source = exported(_without_rewrites(options_for(options, chosen.precision)), "plain").bundle.path
        files = {file.name: file for file in source.iterdir() if file.name != bundles.MANIFEST}
        if chosen.runner in IN_OPENVINO:
            model = converted / IN_OPENVINO[chosen.runner]
            files |= {OPENVINO_MODEL: model, OPENVINO_WEIGHTS: model.with_suffix(".bin")}
        section = CpuSection(chosen=chosen, forms=tuple(forms.values()), machine=dict(machine))
        bundle = _copied_to_target(source, files, options, targets, section, requested)
    return CpuChoice(bundle, section, requested is not None, not_run)


def finalists_of(forms: Collection[CpuFormEntry], requested: Precision | None = None) -> list[FormKey]:
    """The fastest right form and the fastest right plain way of each precision, and torch.compile where it is right.

    MismatchError where none of them is one that a bundle can hold, in the precision that was `requested`.
    """
    check_right(forms, requested)
    best: dict[tuple[Precision, bool, bool], CpuFormEntry] = {}
    for form in sorted((form for form in forms if form.is_right), key=lambda form: form.images_per_second):
        best[form.precision, form.runner in PLAIN, form.runner == COMPILE_BF16] = form
    return [(form.precision, form.runner) for form in best.values()]


def paired(
    setups: Mapping[FormKey, RunnerSetup], batch: int, tell: Callable[[str, float], None]
) -> dict[FormKey, tuple[float, ...]]:
    """Median seconds of a batch in each round, in which all of these forms take turns in random order."""
    bundle = Bundle.open(next(iter(setups.values())).bundle, verify=False)
    inputs = Golden.load(bundle.file(GOLDEN)).batch(bundle.manifest.inputs)
    with contextlib.ExitStack() as stack:
        workers = {key: stack.enter_context(RunnerProcess(key[1], setup)) for key, setup in setups.items()}
        return paired_rounds(workers, inputs[np.arange(batch) % len(inputs)], _ROUNDS, _SECONDS, tell)


def _timed(form: CpuFormEntry, seconds: tuple[float, ...]) -> CpuFormEntry:
    """The form with the figures of the rounds that decide."""
    speed = form.batch / statistics.median(seconds)
    return msgspec.structs.replace(form, images_per_second=speed, seconds_by_round=seconds)


def _other_plain(precision: Precision) -> tuple[str, ...]:
    """The plain ways of other precisions."""
    return tuple(name for name in PLAIN if _PRECISION_OF[name] is not precision)


def _without_rewrites(options: ExportOptions) -> ExportOptions:
    """Options of an export that leaves the graph as torch.onnx writes it."""
    return dataclasses.replace(options, disabled_rewrites=all_rewrites())


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


def _setup(bundle: Bundle, options: ExportOptions, converted: Path) -> RunnerSetup:
    """How a bundle's forms run. `converted`: the folder for the OpenVINO models of the plain ways."""
    checkpoint = options.model.checkpoint
    weights = None if checkpoint is None else options.model.weights
    threads, images = available_threads(), _images_of(options)
    return RunnerSetup(
        *(bundle.path, checkpoint, weights, threads),
        calibration=images,
        converted=converted,
        module=options.model.module,
    )


def measured(
    setup: RunnerSetup, options: ExportOptions, names: Sequence[str], tell: Callable[[str, float], None]
) -> Benchmark:
    """A benchmark of these runners at the profile's `opt` batch. PyTorch, or a plain way, that fails is left out."""
    if {*names} <= {EAGER}:
        raise UnavailableError("Nothing here runs a graph on the CPU.", "pip install onnxruntime")
    batches = (options.engine.batch.opt,)
    return measure(BenchmarkRequest(setup, batches, tuple(names), _ROUNDS, _SECONDS, optional=PYTORCH), tell)


def _images_of(options: ExportOptions) -> Path | None:
    """The calibration set, where that is images."""
    calibration = options.quantization.calibration
    return None if calibration is None or calibration.suffix == CALIBRATION_SUFFIX else calibration


def _forms(precision: Precision, benchmark: Benchmark) -> Iterator[CpuFormEntry]:
    eager = next((runner for runner in benchmark.runners if runner.name == EAGER), None)
    for runner in benchmark.runners:
        if runner is not eager and runner.timings and not runner.problem:
            yield _form(precision, runner, eager)


def _form(measured_for: Precision, runner: RunnerResult, eager: RunnerResult | None) -> CpuFormEntry:
    """From a benchmark of one batch size."""
    timing, precision = runner.timings[0], _PRECISION_OF.get(runner.name, measured_for)
    times = None
    if eager is not None:
        base = eager.timings[0].latency.median / timing.latency.median
        times = base if timing.ratio is None else timing.ratio.value
    hint, error = OPENVINO_HINTS.get(runner.name), runner.accuracy
    is_fp32_beside_others = precision is Precision.FP32 and measured_for is not Precision.FP32
    return CpuFormEntry(
        precision=precision,
        runner=runner.name,
        batch=timing.batch,
        images_per_second=timing.images_per_second,
        times_eager=times,
        ratio=timing.ratio.value if timing.ratio is not None and timing.ratio.is_conclusive else None,
        rel_l2=error.rel_l2,
        is_right=error.is_right and not (is_fp32_beside_others and error.rel_l2 > _FP32_ERROR),
        settings={"INFERENCE_PRECISION_HINT": hint} if hint else {},
    )


def check_right(forms: Collection[CpuFormEntry], requested: Precision | None = None) -> None:
    """MismatchError where no form that a bundle can hold, of the `requested` precision, is right."""
    asked = [form for form in forms if _can_be_chosen(form, requested)]
    if not any(form.is_right for form in asked):
        listed = ", ".join(f"{form.precision.value} in {TITLES[form.runner]} {form.rel_l2:.1e}" for form in asked)
        raise MismatchError(f"No form computes what PyTorch computes: {listed or 'none could be run'}.")


def _can_be_chosen(form: CpuFormEntry, requested: Precision | None) -> bool:
    return requested in (None, form.precision) and form.runner != COMPILE_BF16


def best_of(finalists: Sequence[CpuFormEntry], requested: Precision | None = None) -> CpuFormEntry:
    """The fastest of the finalists that a bundle can hold, of the `requested` precision."""
    return max((form for form in finalists if _can_be_chosen(form, requested)), key=lambda form: form.images_per_second)


def _copied_to_target(
    source: Path,
    files: Mapping[str, Path],
    options: ExportOptions,
    targets: Mapping[Path, Destination],
    section: CpuSection,
    requested: Precision | None,
) -> Bundle:
    """The bundle at `source` with these files, copied to its target. Its manifest gets the section `cpu`, and the
    command that measures again; of a module that was given in Python it keeps how that was called.
    """
    manifest = Bundle.open(source).manifest
    target = options.output or bundles.default_directory(manifest.model.name, manifest.precision.asked.value)
    destination = bundles.check_target(target, overwrite=options.overwrite)
    with bundles.writing(targets.get(target, destination)) as staging:
        for name, file in files.items():
            shutil.copy2(file, staging / name)
        is_command = manifest.command.startswith(EXPORT)
        command = cpu_command(options, requested) if is_command else manifest.command
        bundles.seal_again(staging, source, cpu=section, command=command)
    return Bundle.open(target, verify=False)


def as_table(choice: CpuChoice) -> str:
    """One line for each form, then the choice, what the plain ways are beside it, and how to run it."""
    head = f"{'precision':<11}{'runner':<23}{'images/s':>9}{'x eager':>13}  error"
    chosen, forms = choice.section.chosen, choice.section.forms
    lines = [head, "─" * 70, *map(_row, forms)]
    if chosen.seconds_by_round:
        lines.append("* in the rounds that decide, in which these took turns; the others in earlier ones")
    lines += [*(f"Not run: {TITLES[name]}, {reason}." for name, reason in choice.not_run.items()), ""]
    lines.append(
        f"Fastest of the right ones at batch {chosen.batch}: {chosen.precision.value} in {TITLES[chosen.runner]},"
        f" {chosen.images_per_second:,.1f} images/s."
    )
    lines.append(_beside_plain(choice))
    if chosen.settings:
        lines += _in_openvino(choice.bundle, chosen)
    if Precision.INT8 not in {form.precision for form in forms} and not choice.is_requested:
        lines.append("With --calibration DIR, INT8 is tried too.")
    return escaped([*lines, "", f"Bundle: {choice.bundle.path}"])


def _in_openvino(bundle: Bundle, chosen: CpuFormEntry) -> list[str]:
    """Lines of Python that run the chosen form as it was measured: its batch fixed, which is faster than a free one."""
    file = OPENVINO_MODEL if chosen.runner in IN_OPENVINO else GRAPH
    shape = [chosen.batch, *bundle.manifest.inputs[0].shape[1:]]
    return [
        "Run it as it was measured, with its batch fixed (spach_deploy.Session does so):",
        f'    model = openvino.Core().read_model("{file}")',
        f"    model.reshape({shape})",
        f'    openvino.Core().compile_model(model, "CPU", {json.dumps(chosen.settings)})',
    ]


def _beside_plain(choice: CpuChoice) -> str:
    """A sentence that compares the chosen form with the fastest plain way."""
    chosen, plain = choice.section.chosen, choice.plain
    if plain is None:
        return "No plain way (the model as a runtime's own tools convert it) was both able to run here and right."
    title = TITLES[plain.runner]
    if plain is chosen:
        holds = "its graph is without rewrites" if plain.runner == ONNX_PLAIN else f"it holds {OPENVINO_MODEL}"
        return f"That is a plain way: no form of ours is faster here. The bundle has it: {holds}."
    found = ratio(chosen.seconds_by_round, plain.seconds_by_round)
    times = chosen.images_per_second / plain.images_per_second
    if found is None or not found.is_conclusive:
        return (
            f"That is {times:.2f} times as fast as the best plain way, {title}, by medians that are too noisy to tell."
        )
    if times >= 1:
        between = f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"
        return f"That is {between} times as fast as the best plain way, {title}."
    why = "you asked for this precision"
    if plain.runner == COMPILE_BF16:
        why = "torch.compile leaves no file that a bundle could hold"
    return f"A plain way, {title}, is {1 / found.value:.2f} times as fast as that; {why}."


def _row(form: CpuFormEntry) -> str:
    times = "-"
    if form.times_eager is not None:
        times = f"{form.times_eager:.2f}" if form.ratio is not None else f"about {form.times_eager:.1f}"
    mark, wrong = "*" if form.seconds_by_round else "", "" if form.is_right else "  WRONG"
    return (
        f"{form.precision.value:<11}{TITLES[form.runner]:<23}{form.images_per_second:>9,.1f}{mark:<2}{times:>11}"
        f"  {form.rel_l2:.1e}{wrong}"
    )
