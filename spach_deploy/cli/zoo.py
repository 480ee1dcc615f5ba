"""spach-export --zoo: many exports by one command, with one summary."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import click

from spach_deploy.cli.console import ARGUMENTS, say, show
from spach_deploy.cli.interrupts import ending_on_interrupt
from spach_deploy.common.errors import UsageError
from spach_deploy.common.text import escaped, json_text
from spach_deploy.options.command_line import joined
from spach_deploy.options.recipe import export_options, keys_of_quantization
from spach_deploy.options.specs import ExportOptions
from spach_deploy.options.table import filling
from spach_deploy.pipeline.zoo.folder import PAGE, SUMMARY, ZooFolder
from spach_deploy.pipeline.zoo.make import Run, Zoo, ZooWork, on_this_machine, work_of
from spach_deploy.pipeline.zoo.outcome import BuildStatus, Row, Summary, as_table
from spach_deploy.pipeline.zoo.plan import Build, ZooEntry, build_matrix, checkpoint_of, choices
from spach_deploy.pipeline.zoo.schedule import Limits

if TYPE_CHECKING:
    from typing_extensions import Self

COMMAND = (sys.executable, "-c", "from spach_deploy.cli.export import main; main(prog_name='spach-export')")
"""The command line of spach-export as a child process, independent of installed scripts."""

DEFAULT_FOLDER = Path("build/zoo")
_GRACE_S = 20.0
"""Seconds that running exports have to end after Ctrl-C."""


@dataclasses.dataclass(frozen=True)
class ZooRequest:
    """Options of spach-export that a zoo uses itself, or refuses."""

    auto: bool = False
    dry_run: bool = False
    no_cache: bool = False
    as_json: bool = False
    ray: str | None = None
    jobs: int | None = None


def zoo(given: Mapping[str, Any], recipe: Path | None, request: ZooRequest) -> tuple[int, Path]:
    """Make a zoo and print its summary. Returns the exit code and the path of the summary's page.

    Raises a SpachError, before the first export begins, for what any of them would refuse early.
    """
    _refuse_contradictions(given, request)
    folder = ZooFolder(given.get("output") or DEFAULT_FOLDER)
    folder.check()
    builds = planned(given, recipe, folder, reads_checkpoints=request.dry_run)
    overwrite = bool(given.get("overwrite"))
    limits = Limits.here(request.jobs, len(builds))
    if request.dry_run:
        work = work_of(builds, folder, is_kept=not request.no_cache, overwrite=overwrite)
        show(_as_plan(work, limits, as_json=request.as_json))
        return 0, folder.root / PAGE
    if request.ray is not None:
        from spach_deploy.distributed.cluster import check_address

        check_address(request.ray)
    with folder.locked():
        work = work_of(builds, folder, is_kept=not request.no_cache, overwrite=overwrite)
        summary = _made(work, folder, limits, request)
    show(_as_text(summary, folder, as_json=request.as_json))
    return summary.exit_code, folder.root / PAGE


def _refuse_contradictions(given: Mapping[str, Any], request: ZooRequest) -> None:
    if given.get("model") is not None:
        raise UsageError("--zoo names models, and --model does too.", "Give one of them.")
    if request.auto:
        raise UsageError("--auto is for one model, and --zoo makes many.", "Give --zoo with --precision fp16,int8,fp8.")


def planned(
    given: Mapping[str, Any], recipe: Path | None, folder: ZooFolder, *, reads_checkpoints: bool = False
) -> tuple[Build, ...]:
    """The exports of the zoo, checked as by --dry-run. Raises the SpachError of the first that is refused."""
    chosen = choices(given["zoo"], _precisions(given), given.get("gpu"))
    is_mixed = any(choice.precision.is_quantized for choice in chosen)
    is_alone = len({choice.model for choice in chosen}) == 1
    inherited = {option.key: given.get(option.key) for option in filling() if option.is_inherited}
    of_floats = {key: value for key, value in inherited.items() if key not in keys_of_quantization()}

    def options_of(choice: ZooEntry) -> ExportOptions:
        values = {
            **(of_floats if is_mixed and not choice.precision.is_quantized else inherited),
            "model": choice.model,
            "precision": choice.precision.value,
            "gpu": choice.gpus,
            "output": folder.root / choice.name,
            "overwrite": False,  # decided for each bundle once its target was looked at
            "checkpoint": checkpoint_of(choice.model, given.get("checkpoint"), is_alone=is_alone),
        }
        return export_options(values, recipe)

    return build_matrix(chosen, options_of, reads_checkpoints=reads_checkpoints)


def _precisions(given: Mapping[str, Any]) -> tuple[str, ...]:
    """The precisions of --precision and of the flags; without any fp32, as for one export."""
    listed = [part.strip() for part in (given.get("precision_list") or "").split(",") if part.strip()]
    return (*given.get("precision", ()), *listed) or ("fp32",)


def _made(work: ZooWork, folder: ZooFolder, limits: Limits, request: ZooRequest) -> Summary:
    typed = click.get_current_context().meta[ARGUMENTS]
    more = ["--no-cache"] if request.no_cache else []
    progress = ZooProgress(len(work.all))
    making = Zoo(work, folder, progress, joined(["spach-export", *typed]))
    with (
        ending_on_interrupt(lambda: _kept_sentence(making.summary), grace_s=_GRACE_S),
        _runner(folder, more, limits, request) as run,
        terminated_as_interrupted(),
        progress,
    ):
        making.make(run)
    return making.summary


@contextlib.contextmanager
def _runner(folder: ZooFolder, more: list[str], limits: Limits, request: ZooRequest) -> Iterator[Run]:
    """The function that runs the builds: on this machine, or on a Ray cluster."""
    if request.ray is None:
        yield on_this_machine(folder, COMMAND, more, limits)
        return
    from spach_deploy.distributed.builds import on_cluster
    from spach_deploy.distributed.cluster import connected

    with connected(request.ray) as ray:
        yield on_cluster(ray, folder, COMMAND, more, request.jobs)


def _kept_sentence(summary: Summary) -> str:
    done = summary.counts.get(BuildStatus.AGREED, 0)
    return f"{done} of {len(summary.rows)} bundles are there; the same command goes on with the others."


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Within the block, treat SIGTERM as Ctrl-C. Does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGINT)

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class ZooProgress:
    """Progress on stderr: a line for each bundle, and on a terminal a bar with the names of running exports."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
        )
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=total)
        self._running: list[str] = []

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def began(self, build: Build) -> None:
        """Show the name of a running export."""
        self._running.append(build.name)
        self._show(len(self._running))

    def ended(self, row: Row, done: int, total: int) -> None:
        """Print a line for a bundle."""
        if row.name in self._running:
            self._running.remove(row.name)
        self._bar.update(self._task, completed=done)
        self._show(len(self._running))
        how = "kept" if row.is_kept else "" if row.seconds is None else f"{row.seconds:.0f} s"
        self.note(f"[{done}/{total}] {row.name}: {row.verdict.value}{f', {how}' if how else ''}")
        if row.problem:
            self.note(f"    {row.problem}")

    def note(self, text: str) -> None:
        """Print a line."""
        say(text)

    def _show(self, running: int) -> None:
        named = ", ".join(self._running[:2])
        self._bar.update(self._task, description=f"{named}{f' and {running - 2} more' if running > 2 else ''}")


def _as_text(summary: Summary, folder: ZooFolder, *, as_json: bool) -> str:
    if as_json:
        return json_text(summary.to_dict())
    page = folder.root / PAGE
    return escaped(
        [
            as_table(summary.rows),
            "",
            summary.sentence(),
            f"Summary: {page if page.is_file() else folder.root / SUMMARY}",
        ]
    )


def _as_plan(work: ZooWork, limits: Limits, *, as_json: bool) -> str:
    """The output of --dry-run: the bundles with their estimates, as text or JSON."""
    kept = {build.name for build in work.kept}
    if as_json:
        rows = [{**_costs(build), "is_kept": build.name in kept} for build in work.all]
        return json_text({"jobs": limits.jobs, "memory_bytes": limits.memory_bytes, "bundles": rows})
    width = max(len(build.name) for build in work.all)
    lines = [f"{'bundle':<{width}}     time   memory      disk"]
    lines += [f"{build.name:<{width}}  {'kept' if build.name in kept else _shown(build)}" for build in work.all]
    seconds = sum(build.seconds for build in work.builds)
    return escaped(
        [
            *lines,
            "",
            f"{len(work.all)} bundles, {len(kept)} kept, {len(work.builds)} to make, {limits.jobs} at once at most:"
            f" {seconds / 60:,.0f} minutes of exports one after the other, an estimate.",
        ]
    )


def _costs(build: Build) -> dict[str, Any]:
    costs = {name: getattr(build, name) for name in ("seconds", "memory_bytes", "disk_bytes")}
    return {"name": build.name, **costs}


def _shown(build: Build) -> str:
    return f"{build.seconds:>5.0f} s {build.memory_bytes / 1e9:>5.1f} GB {build.disk_bytes / 1e6:>6,.0f} MB"
