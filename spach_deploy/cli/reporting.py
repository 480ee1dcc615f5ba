"""What commands show and write: progress, summaries, report.json and its HTML page.

Of spach-export: progress on stderr, and on stdout the summary, --list, --list-rewrites and --dry-run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from spach_deploy.bundle.store import CONTEXT, GRAPH, MANIFEST, PLAN, REPORT, find_bundle
from spach_deploy.cli.console import is_colored, say, width
from spach_deploy.common.errors import BundleError, UsageError, printable
from spach_deploy.common.files import Destination, try_to_write
from spach_deploy.common.progress import ExportObserver, Phase
from spach_deploy.common.text import escaped, json_text, noun, rendered
from spach_deploy.engine.cost_model import in_words
from spach_deploy.models.registry import ModelInfo, list_models
from spach_deploy.options.specs import Flavour, size_in_words
from spach_deploy.pipeline.estimate import MEASURED_CORES, DryRun

if TYPE_CHECKING:
    from typing_extensions import Self

    from spach_deploy.bundle.schema import EngineSection, Manifest
    from spach_deploy.pipeline.export import ExportResult
    from spach_deploy.validation.result import Validation


_PARTS = (GRAPH, PLAN, CONTEXT, MANIFEST)


@dataclasses.dataclass(frozen=True)
class ReportDestinations:
    """Destinations of a report and its page."""

    report: Destination
    page: Destination

    @classmethod
    def of(cls, report: Path) -> ReportDestinations:
        """The destinations for a report at `report`. UsageError where the page would overwrite the report."""
        from spach_deploy.report.page import page_beside

        return cls(Destination.of(report), Destination.of(page_beside(report)))


@dataclasses.dataclass(frozen=True)
class ReportRequest:
    """Where a report is to be written, and whether its page is to be opened.

    `bundle`: the bundle whose manifest the page shows. `target`: what is validated, if its report may go into its
    bundle; None for targets outside any bundle. `report`: the path that the user gave. `is_opened`: open the page.
    """

    bundle: Path
    target: Path | None
    report: Path | None
    as_json: bool
    is_opened: bool

    def check(self) -> ReportDestinations | None:
        """The report's destinations, None where none is to be written.

        UsageError or MissingPackageError, before the work begins, for what could not be written or opened at its end.
        """
        if self.report is not None:
            check_report(self.report)
        report = self.report or self._default_report()
        destinations = None if report is None else ReportDestinations.of(report)
        if self.is_opened:
            check_can_open()
            if destinations is None and (self.target is None or self.as_json or self.target.exists()):
                raise UsageError("--open needs a page, and none would be written.", "Give --report FILE.json too.")
        return destinations

    def _default_report(self) -> Path | None:
        """The report in the target's bundle, where the target is a bundle or one of its files; else None."""
        if self.as_json or self.target is None or not (self.target.is_dir() or self.target.name in _PARTS):
            return None
        try:
            return find_bundle(self.target) / REPORT
        except BundleError:
            return None


def check_report(file: Path) -> None:
    """UsageError where the report could not be written to `file`."""
    try:
        try_to_write(file)
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"The report {file} cannot be written ({reason}).", "Choose another --report FILE.") from None


def check_can_open() -> None:
    """MissingPackageError where pages cannot be made, and so not be opened."""
    from spach_deploy.report.page import check_can_make_pages

    check_can_make_pages()


def write_reports(validation: Validation, request: ReportRequest, destinations: ReportDestinations) -> None:
    """Write the report and its page. Where the user gave no path, failing to write into the bundle is no error."""
    from spach_deploy.validation.result import write_report

    try:
        write_report(validation, destinations.report)
    except UsageError as error:
        if request.report is not None:
            raise
        say(error.message)
        return
    if request.report is None:
        say(f"Report: {destinations.report.path}")
    _write_page(validation, request, destinations.page)


def _write_page(validation: Validation, request: ReportRequest, destination: Destination) -> None:
    """Write and open the page. Where that fails, a sentence says so: the report is there all the same."""
    from spach_deploy.bundle.store import Bundle
    from spach_deploy.report.page import page_problem

    problem = page_problem(validation, Bundle.open(request.bundle, verify=False).manifest, destination)
    say(problem or f"Page: {destination.path}")
    if request.is_opened and not problem:
        open_page(destination.path)


def open_page(page: Path) -> None:
    """Open a page in the user's browser; say so where there is no browser."""
    import webbrowser

    opened = False
    with contextlib.suppress(webbrowser.Error, OSError):
        opened = webbrowser.open(page.resolve().as_uri())
    if not opened:
        say(f"No browser could be opened here. The page is {page}")


_LINE_EVERY_S = 10.0
_PHASES_HEADING = "phase                        seconds  peak GB"


class ProgressDisplay(ExportObserver):
    """An observer that draws bars on a terminal; elsewhere, and with `verbose`, it prints lines."""

    def __init__(self, *, verbose: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._verbose = verbose
        self._said = time.monotonic()
        self._console = Console(stderr=True)
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._has_heading = False
        self._told: set[str] = set()
        self._task: Any = None
        self._measured: Any = None
        self._build: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def started(self, phase: str) -> None:
        """Show a bar for the phase."""
        self._said = time.monotonic()
        self._task = self._bars.add_task(phase, total=None)

    def finished(self, phase: Phase) -> None:
        """Remove the bar; with `verbose`, print a line of the table of phases."""
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
        if self._verbose:
            if not self._has_heading:
                say(_PHASES_HEADING)
            self._has_heading = True
            say(f"{phase.name:<28} {phase.seconds:7.2f}  {phase.peak_bytes / 1e9:7.2f}")

    def note(self, text: str) -> None:
        """Print a line, once, however many exports of one command say it."""
        if text not in self._told:
            self._told.add(text)
            say(text)

    def measuring(self, what: str, share: float) -> None:
        """Show what is being measured, in a bar, or in a line every ten seconds where there are no bars."""
        if self._console.is_terminal:
            self._measured = self._bars.add_task("", total=1) if self._measured is None else self._measured
            self._bars.update(self._measured, description=f"measure: {what}", completed=share)
        elif (now := time.monotonic()) - self._said >= _LINE_EVERY_S:
            self._said = now
            say(f"Measuring: {what} ({share:.0%}).")

    def building(self, event: Any) -> None:
        """Show a bar for each outermost phase of the engine builder."""
        if event.parent is not None:
            return
        if event.finished:
            task = self._build.pop(event.phase, None)
            if task is not None:
                self._bars.remove_task(task)
            return
        if event.phase not in self._build:
            self._build[event.phase] = self._bars.add_task(
                printable(f"engine: {event.phase}"), total=event.steps or None
            )
        self._bars.update(self._build[event.phase], completed=event.step)

    def calibrating(self, progress: Any) -> None:
        """Update the phase's bar with the image's number and the seconds left."""
        if not self._console.is_terminal:
            self._calibrating_line(progress)
        if self._task is None:
            return
        left = "" if progress.seconds_left is None else f", {progress.seconds_left:.0f} s left"
        text = f"calibrate: image {progress.done}{left}"
        self._bars.update(self._task, description=text, total=progress.total, completed=progress.done)

    def _calibrating_line(self, progress: Any) -> None:
        """Print a line every ten seconds, where there are no bars."""
        now = time.monotonic()
        if now - self._said < _LINE_EVERY_S or progress.seconds_left is None:
            return
        self._said = now
        say(f"Calibrating: image {progress.done} of {progress.total}, {progress.seconds_left:.0f} s left.")


def summary(result: ExportResult, *, as_json: bool) -> str:
    """The summary of an export: model, graph, engine, validation, and the bundle's path; or the manifest as JSON."""
    manifest = result.bundle.manifest
    return json_text(manifest.content()) if as_json else escaped(_lines(result, manifest))


def _lines(result: ExportResult, manifest: Manifest) -> Iterator[str]:
    from spach_deploy.validation.table import WIDTH, as_text

    yield from _facts(manifest)
    yield ""
    yield as_text(result.validation, width=width(WIDTH), color=is_colored())
    yield ""
    yield f"Bundle: {_shown(result.bundle.path)}"


def _facts(manifest: Manifest) -> Iterator[str]:
    model, engine, certificate = manifest.model, manifest.engine, manifest.graph.certificate
    gives = (
        f"{model.num_classes} {noun(model.num_classes, 'class')}"
        if model.num_classes
        else f"gives {_model_outputs(manifest)}"
    )
    yield f"model      {model.title}, {size_in_words(model.image_size)} px, {gives}"
    if manifest.graph.levels:
        from spach_deploy.graph.levels import described

        yield f"blocks     {described(manifest.graph.levels)}"
    yield f"graph      {certificate.nodes} nodes, opset {certificate.opset}, {manifest.precision.summary}"
    yield from (f"           not promised: {broken}" for broken in certificate.broken)
    if engine.flavour is Flavour.NONE:
        yield f"engine     none: {engine.reason}"
        return
    yield f"engine     {engine.flavour.value} {engine.version} for {', '.join(engine.gpus)}, batch {engine.batch}"
    yield f"           {_plan_facts(engine)}"
    kernels = engine.kernels
    if kernels is not None and (predicted := in_words(kernels.predicted_ms, kernels.batch)):
        yield f"           {predicted}"


def _model_outputs(manifest: Manifest) -> str:
    from spach_deploy.bundle.outputs import model_outputs

    return ", ".join(tensor.name for tensor in model_outputs(manifest.outputs))


def _plan_facts(engine: EngineSection) -> str:
    size = f"{(engine.bytes or 0) / 1e6:.1f} MB"
    kernels = engine.kernels
    if kernels is None:
        return f"{size}; kernels not known"
    known = f"{size}, {kernels.total} kernels, {kernels.fused_attentions} fused attentions"
    if kernels.bytes_moved is None:
        return known
    return f"{known}, {kernels.bytes_moved / 1e6:,.0f} MB moved at batch {kernels.batch}"


def _shown(path: Path) -> str:
    with contextlib.suppress(ValueError):
        return str(path.resolve().relative_to(Path.cwd()))
    return str(path)


_WIDTH = 110
_NUMBERS = ("params", "MACs", "top-1")


def models_as_table() -> str:
    """A line for each model: parameters, MACs at 224 pixels, blocks of each network stage, published accuracy."""
    rows = [
        (
            info.name,
            f"{info.parameters / 1e6:.1f} M",
            f"{info.macs / 1e9:.2f} G",
            _short(info.stages),
            "" if info.published_top1 is None else f"{info.published_top1:.1f}",
            info.reference_name,
        )
        for info in list_models()
    ]
    table = _table(("model", "params", "MACs", "stages", "top-1", "published name (alias)"), rows)
    letters = "c convolution, t attention, m spatial MLP, a linear along each axis, s shift"
    return f"{table}\n\nBlocks of each stage: {letters}. MACs at 224 pixels."


_LETTERS = {"conv": "c", "trans": "t", "mlp": "m", "smlp": "a", "shift": "s"}


def _short(stages: str) -> str:
    """`2 conv, 10 trans` -> `2c 10t`."""
    return re.sub(r" ([a-z]+)", lambda mixer: _LETTERS[mixer[1]], stages.replace(", ", "/")).replace("/", " ")


def models_as_json() -> str:
    """The table of models as JSON."""
    return json_text([_model_facts(info) for info in list_models()])


def _model_facts(info: ModelInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "parameters": info.parameters,
        "macs": info.macs,
        "stages": info.stages,
        "published_top1": info.published_top1,
        "reference_name": info.reference_name,
        "published_checkpoint": info.published_checkpoint,
    }


def rewrites_as_table() -> str:
    """The rewrites and passes that --no-rewrite can turn off."""
    return _table(("rewrite", "what it does"), _rewrites())


def _rewrites() -> list[tuple[str, str]]:
    from spach_deploy.blocks import REWRITES
    from spach_deploy.graph.passes import TENSORRT_PASSES

    passes = [(step.name, step.summary) for step in TENSORRT_PASSES]
    return [*((step.name, step.summary) for step in REWRITES), *passes]


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, no_wrap=True, justify="right" if heading in _NUMBERS else "left")
    for row in rows:
        table.add_row(*row)
    return rendered([table], width=_WIDTH)


def as_text(plan: DryRun, *, as_json: bool) -> str:
    """The result of --dry-run as text or JSON: steps, time, memory, disk, and refusals."""
    if as_json:
        return json_text(plan.to_dict())
    lines = [f"{name:<12}{value}" for name, value in plan.facts]
    if plan.notes:
        lines += ["", *(f"{note[0].upper()}{note[1:]}." for note in plan.notes)]
    if plan.is_reused:
        lines += ["", "The same export was done before: its bundle would come from the cache, in about a second."]
    elif not plan.refusals:
        lines += ["", *(f"  {step.name:<34}{_seconds(step.seconds)}" for step in plan.steps)]
    if plan.seconds is not None or not plan.refusals:
        lines += ["", *_costs(plan)]
    if plan.refusals:
        lines += ["", "Refused:"]
        lines += [f"- {error.message} {error.hint}".rstrip() for error in plan.refusals]
    return escaped(lines)


def _costs(plan: DryRun) -> list[str]:
    if plan.seconds is None or plan.memory_bytes is None or plan.disk_bytes is None:
        return ["Time, memory and disk follow from the model, which is not known."]
    return [
        f"time        about {_seconds(plan.seconds).strip()}, an estimate from exports on {MEASURED_CORES} cores",
        f"memory      about {plan.memory_bytes / 1e9:.1f} GB{_free(plan.free_memory_bytes)}"
        f"{_shortened(plan.memory_bytes, plan.free_memory_bytes)}",
        f"disk        about {plan.disk_bytes / 1e6:,.0f} MB of {plan.free_disk_bytes / 1e6:,.0f} MB free"
        f"{_shortened(plan.disk_bytes, plan.free_disk_bytes)}",
    ]


def _free(memory_bytes: int | None) -> str:
    return "" if memory_bytes is None else f" of {memory_bytes / 1e9:.1f} GB free"


def _shortened(needed: float, free: int | None) -> str:
    return ": NOT ENOUGH" if free is not None and needed > free else ""


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:>5.0f} s"
