"""spach-export --zoo: many bundles, one summary."""

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
from spach_deploy.options.specs import ExportOptions
from spach_deploy.options.table import filling
from spach_deploy.options.values import export_options, keys_of_quantization
from spach_deploy.pipeline.zoo.folder import PAGE, SUMMARY, ZooFolder
from spach_deploy.pipeline.zoo.make import Run, Zoo, ZooWork, on_this_machine, work_of
from spach_deploy.pipeline.zoo.outcome import BuildStatus, Row, Summary, as_table
from spach_deploy.pipeline.zoo.plan import Build, ZooEntry, build_matrix, checkpoint_of, choices
from spach_deploy.pipeline.zoo.schedule import Limits

if TYPE_CHECKING:
    from typing_extensions import Self

COMMAND = (sys.executable, "-c", "from spach_deploy.cli.export import main; main(prog_name='spach-export')")
"""spach-export as a process of its own, whatever the scripts of this environment are called."""

DEFAULT_FOLDER = Path("build/zoo")
_GRACE_S = 20.0
"""The exports that run have this long to end after Ctrl-C."""


@dataclasses.dataclass(frozen=True)
class ZooRequest:
    """Switches of spach-export that mean something here, or are refused."""

    auto: bool = False
    dry_run: bool = False
    no_cache: bool = False
    as_json: bool = False
    ray: str | None = None
    jobs: int | None = None


def zoo(given: Mapping[str, Any], recipe: Path | None, asked: ZooRequest) -> tuple[int, Path]:
    """Make the zoo that was asked for and print its summary; the exit code, and the summary's page.

    Raises SpachError for what can be refused before the first export begins.
    """
    _refuse_contradictions(given, asked)
    folder = ZooFolder(given.get("output") or DEFAULT_FOLDER)
    folder.check()
    builds = planned(given, recipe, folder, reads_checkpoints=asked.dry_run)
    overwrite = bool(given.get("overwrite"))
    limits = Limits.here(asked.jobs, len(builds))
    if asked.dry_run:
        work = work_of(builds, folder, is_kept=not asked.no_cache, overwrite=overwrite)
        show(_as_plan(work, limits, as_json=asked.as_json))
        return 0, folder.root / PAGE
    if asked.ray is not None:
        from spach_deploy.distributed.cluster import check_address

        check_address(asked.ray)
    with folder.locked():
        work = work_of(builds, folder, is_kept=not asked.no_cache, overwrite=overwrite)
        summary = _made(work, folder, limits, asked)
    show(_as_text(summary, folder, as_json=asked.as_json))
    return summary.exit_code, folder.root / PAGE


def _refuse_contradictions(given: Mapping[str, Any], asked: ZooRequest) -> None:
    if given.get("model") is not None:
        raise UsageError("--zoo names models, and --model does too.", "Give one of them.")
    if asked.auto:
        raise UsageError("--auto is for one model, and --zoo makes many.", "Give --zoo with --precision fp16,int8,fp8.")


def planned(
    given: Mapping[str, Any], recipe: Path | None, folder: ZooFolder, *, reads_checkpoints: bool = False
) -> tuple[Build, ...]:
    """All exports. Raises SpachError for what one of them would refuse."""
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
            "overwrite": False,  # whether a bundle may be replaced is told for each
            "checkpoint": checkpoint_of(choice.model, given.get("checkpoint"), is_alone=is_alone),
        }
        return export_options(values, recipe)

    return build_matrix(chosen, options_of, reads_checkpoints=reads_checkpoints)


def _precisions(given: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of --precision and of the flags; fp32 without any, as for one export."""
    listed = [part.strip() for part in (given.get("precision_list") or "").split(",") if part.strip()]
    return (*given.get("precision", ()), *listed) or ("fp32",)


def _made(work: ZooWork, folder: ZooFolder, limits: Limits, asked: ZooRequest) -> Summary:
    typed = click.get_current_context().meta[ARGUMENTS]
    more = ["--no-cache"] if asked.no_cache else []
    progress = Progress(len(work.all))
    making = Zoo(work, folder, progress, joined(["spach-export", *typed]))
    with (
        ending_on_interrupt(lambda: _kept_sentence(making.summary), grace_s=_GRACE_S),
        _runner(folder, more, limits, asked) as run,
        terminated_as_interrupted(),
        progress,
    ):
        making.make(run)
    return making.summary


@contextlib.contextmanager
def _runner(folder: ZooFolder, more: list[str], limits: Limits, asked: ZooRequest) -> Iterator[Run]:
    """What runs the builds: this machine, or a Ray cluster."""
    if asked.ray is None:
        yield on_this_machine(folder, COMMAND, more, limits)
        return
    from spach_deploy.distributed.builds import on_cluster
    from spach_deploy.distributed.cluster import connected

    with connected(asked.ray) as ray:
        yield on_cluster(ray, folder, COMMAND, more, asked.jobs)


def _kept_sentence(summary: Summary) -> str:
    done = summary.counts.get(BuildStatus.AGREED, 0)
    return f"{done} of {len(summary.rows)} bundles are there; the same command goes on with the others."


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does, for as long as the block lasts; nothing in another thread than the main one."""
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


class Progress:
    """Says how it goes: a line for each bundle, and on a terminal a bar with those that are being made."""

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
        """Show the bundle as being made."""
        self._running.append(build.name)
        self._show(len(self._running))

    def ended(self, row: Row, done: int, total: int) -> None:
        """A line of its own."""
        if row.name in self._running:
            self._running.remove(row.name)
        self._bar.update(self._task, completed=done)
        self._show(len(self._running))
        how = "kept" if row.is_kept else "" if row.seconds is None else f"{row.seconds:.0f} s"
        self.note(f"[{done}/{total}] {row.name}: {row.verdict.value}{f', {how}' if how else ''}")
        if row.problem:
            self.note(f"    {row.problem}")

    def note(self, text: str) -> None:
        """A line of its own."""
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
    """What would be done, for --dry-run."""
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
