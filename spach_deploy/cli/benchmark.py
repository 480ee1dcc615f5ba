"""spach-benchmark: how fast a bundle's model is here, in everything that can run it, and how right."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from spach_deploy.cli.console import Command, command, say, show
from spach_deploy.common.errors import UsageError
from spach_deploy.common.text import json_text
from spach_deploy.options.click_options import FILE, click_options
from spach_deploy.options.specs import WeightSource
from spach_deploy.options.table import BENCHMARK


@click.command("spach-benchmark", cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=FILE)
@click_options(BENCHMARK)
@command
def main(
    bundle: Path,
    batch: str | None,
    runner: tuple[str, ...],
    rounds: int,
    seconds: float,
    threads: int | None,
    module: str | None,
    checkpoint: Path | None,
    weights: str | None,
    ignore: tuple[str, ...],
    cold: bool,
    plot: Path | None,
    as_json: bool,
) -> int:
    """Measure BUNDLE's model on this machine: latency, throughput, memory and error of every runner there is.

    \b
    spach-benchmark build/ms_hybrid_s-fp16
    spach-benchmark build/ms_hybrid_s-fp32 --batch 1,8 --plot speed.svg
    spach-benchmark build/ms_hybrid_s-int8 --runner eager --rounds 9

    Runners take turns in every round, each in a process of its own and warmed up before each turn. A ratio that the
    rounds cannot tell is not printed, and a runner whose numbers are outside the bundle's tolerances is marked wrong.

    Exit codes: 0 measured, also where it is too noisy to tell; 1 a runner computes wrong numbers (bf16 only where it
    was asked for), or a file is not the one that was exported; 2 bad usage or input; 3 nothing here can run it, or not
    the runner that was asked for.
    """

    from spach_deploy.benchmark.rounds import BenchmarkRequest, measure
    from spach_deploy.benchmark.runners import RunnerSetup
    from spach_deploy.benchmark.table import as_text, check_plot, draw
    from spach_deploy.common.machine import available_threads
    from spach_deploy.models.registry import check_ignore

    destination = None if plot is None else check_plot(plot)
    check_ignore(checkpoint, ignore)
    source = None if weights is None else WeightSource(weights)
    threads = threads or available_threads()
    setup = RunnerSetup(bundle, checkpoint, source, threads, ignore, cold, module=module)
    request = BenchmarkRequest(setup, _batches(batch), tuple(dict.fromkeys(runner)), rounds, seconds)
    with _progress() as tell:
        result = measure(request, tell)
    show(json_text(result.to_dict()) if as_json else as_text(result))
    if destination is not None:
        draw(result, destination)
        say(f"Plot: {plot}")
    return result.exit_code


def _batches(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise UsageError(f"--batch {text} is no list of whole numbers.", "Give it like 1,8.") from None


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """A progress bar on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda what, share: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda what, share: bar.update(task, description=what, completed=share)


if __name__ == "__main__":
    main()
