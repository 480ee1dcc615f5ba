"""What spach-export shows: progress on stderr while it works, a summary on stdout when it is done."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from spach_deploy.cli.console import say
from spach_deploy.cli.outputs import is_colored, width
from spach_deploy.errors import printable
from spach_deploy.phases import Phase
from spach_deploy.text import escaped, json_text

if TYPE_CHECKING:
    from typing_extensions import Self

    from spach_deploy.pipeline import ExportResult


_LINE_EVERY_S = 10.0
_PHASES_HEADING = "phase                        seconds  peak GB"


class Progress:
    """An observer that draws bars on a terminal, and plain lines with `verbose` or where there is no terminal."""

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
        self._task: Any = None
        self._build: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def started(self, phase: str) -> None:
        """Show the phase as under way."""
        self._said = time.monotonic()
        self._task = self._bars.add_task(phase, total=None)

    def finished(self, phase: Phase) -> None:
        """Take the bar away; with `verbose`, a line of the table of phases."""
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
        if self._verbose:
            if not self._has_heading:
                say(_PHASES_HEADING)
            self._has_heading = True
            say(f"{phase.name:<28} {phase.seconds:7.2f}  {phase.peak_bytes / 1e9:7.2f}")

    def note(self, text: str) -> None:
        """A line of its own."""
        say(text)

    def building(self, event: Any) -> None:
        """One bar for each of the builder's outermost phases."""
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
        """The phase's bar, and what is left of it."""
        if not self._console.is_terminal:
            self._calibrating_line(progress)
        if self._task is None:
            return
        left = "" if progress.seconds_left is None else f", {progress.seconds_left:.0f} s left"
        text = f"calibrate: image {progress.done}{left}"
        self._bars.update(self._task, description=text, total=progress.total, completed=progress.done)

    def _calibrating_line(self, progress: Any) -> None:
        """A line now and then, where there are no bars."""
        now = time.monotonic()
        if now - self._said < _LINE_EVERY_S or progress.seconds_left is None:
            return
        self._said = now
        say(f"Calibrating: image {progress.done} of {progress.total}, {progress.seconds_left:.0f} s left.")


def summary(result: ExportResult, *, as_json: bool) -> str:
    """The end of an export: what was made, what was proven and where it lies."""
    content = dict(result.bundle.manifest.content)
    if as_json:
        return json_text(content)
    return escaped(_lines(result, content))


def _lines(result: ExportResult, content: dict[str, Any]) -> Iterator[str]:
    from spach_deploy.validation.table import WIDTH, as_text

    yield from _facts(content)
    yield ""
    yield as_text(result.validation, width=width(WIDTH), color=is_colored())
    yield ""
    yield f"Bundle: {_shown(result.bundle.path)}"


def _facts(content: dict[str, Any]) -> Iterator[str]:
    model, precision, engine, graph = content["model"], content["precision"], content["engine"], content["graph"]
    yield f"model      {model['name']}, {model['image_size']} px, {model['num_classes']} classes"
    certificate = graph["certificate"]
    yield f"graph      {certificate['nodes']} nodes, opset {certificate['opset']}, {precision['summary']}"
    if engine["flavour"] == "none":
        yield f"engine     none: {engine['reason']}"
        return
    yield f"engine     {engine['flavour']} {engine['version']} for {', '.join(engine['gpus'])}, batch {engine['batch']}"
    yield f"           {_plan_facts(engine)}"


def _plan_facts(engine: dict[str, Any]) -> str:
    size = f"{engine['bytes'] / 1e6:.1f} MB"
    kernels = engine["kernels"]
    if kernels is None:
        return f"{size}; kernels not known"
    known = f"{size}, {kernels['total']} kernels, {kernels['fused_attentions']} fused attentions"
    if kernels["bytes_moved"] is None:
        return known
    return f"{known}, {kernels['bytes_moved'] / 1e6:,.0f} MB moved at batch {kernels['batch']}"


def _shown(path: Path) -> str:
    with contextlib.suppress(ValueError):
        return str(path.resolve().relative_to(Path.cwd()))
    return str(path)
