"""A benchmark as an SVG: latency against batch size, and speed against error."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spach_deploy.common.errors import MissingPackageError, UsageError
from spach_deploy.common.files import Destination

if TYPE_CHECKING:
    from spach_deploy.benchmark.result import Benchmark, RunnerResult

_SMALLEST_ERROR = 1e-8
"""Where a runner without any error stands on the logarithmic axis."""

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Told apart by the colour-blind too. Source: Wong, "Color blindness", Nature Methods 8 (2011)."""

_GREY = "#767676"
_STYLE: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}


def check_plot(file: Path) -> Destination:
    """The output file for the plot, checked before minutes of measuring. Raises UsageError where it cannot be written,
    MissingPackageError without matplotlib.
    """
    folder = file.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"--plot {file}: {file.parent} is no directory.", "Give a file in one that exists.")
    if (file.exists() and not file.is_file()) or not os.access(folder, os.W_OK):
        raise UsageError(f"--plot {file} cannot be written.", "Give another file.")
    if importlib.util.find_spec("matplotlib") is None:
        raise _without_matplotlib()
    return Destination.of(file)


def _without_matplotlib() -> MissingPackageError:
    return MissingPackageError("matplotlib", "A plot", "pip install 'spach-deploy[report]'")


def draw(benchmark: Benchmark, place: Destination) -> None:
    """Write the SVG. Raises MissingPackageError without matplotlib, UsageError where the file can no longer be
    written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise _without_matplotlib() from None
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10, 4.6), layout="constrained")
        latency, pareto = figure.subplots(1, 2)
        _draw_latency(latency, benchmark)
        _draw_pareto(pareto, benchmark)
        threads = f"{benchmark.machine['threads']} thread{'s' if benchmark.machine['threads'] > 1 else ''}"
        handles, labels = latency.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False)
        figure.suptitle(f"{benchmark.model}, {benchmark.precision}, on {benchmark.machine['processor']}, {threads}")
        try:
            place.write(lambda file: figure.savefig(file, format="svg", metadata={"Date": None}))
        except OSError as error:
            reason = error.strerror or error
            raise UsageError(f"--plot {place.path} cannot be written ({reason}).", "Give another file.") from None


def _draw_latency(axes: Any, benchmark: Benchmark) -> None:
    """Median latencies; an error bar reaches from the fastest round to the slowest."""
    for number, runner in enumerate(benchmark.runners):
        batches = [timing.batch for timing in runner.timings]
        medians = [timing.latency.median * 1e3 for timing in runner.timings]
        rounds = [timing.medians or (timing.latency.median,) for timing in runner.timings]
        below = [max(0.0, median - min(times) * 1e3) for median, times in zip(medians, rounds, strict=True)]
        above = [max(0.0, max(times) * 1e3 - median) for median, times in zip(medians, rounds, strict=True)]
        axes.errorbar(batches, medians, (below, above), capsize=3, label=_label(runner), **_line(runner, number))
    axes.set(xlabel="batch", ylabel="ms", ylim=(0, None))
    axes.set_title("Latency, median (bars: fastest and slowest round)")
    axes.set_xticks(benchmark.batches, [str(batch) for batch in benchmark.batches])
    axes.margins(x=0.08)
    axes.grid(alpha=0.25)


def _line(runner: RunnerResult, number: int) -> dict[str, Any]:
    is_right = runner.accuracy.is_right
    colour = _COLOURS[number % len(_COLOURS)]
    return {"color": colour, "marker": "o" if is_right else "X", "linestyle": "-" if is_right else ":"}


def _draw_pareto(axes: Any, benchmark: Benchmark) -> None:
    """Every runner by speed and error, and the Pareto front."""
    batch = benchmark.batches[-1]
    points = {r.name: (timing.images_per_second, _error(r)) for r in benchmark.runners if (timing := r.at(batch))}
    front = pareto_front([points[r.name] for r in benchmark.runners if r.accuracy.is_right and r.name in points])
    axes.plot([speed for speed, _ in front], [error for _, error in front], color=_GREY, linewidth=1, zorder=1)
    for number, runner in enumerate(benchmark.runners):
        if runner.name in points:
            style = _line(runner, number)
            axes.scatter(*points[runner.name], s=70, color=style["color"], marker=style["marker"])
    bounds = {runner.accuracy.allowed for runner in benchmark.runners}
    for allowed in bounds:
        axes.axhline(allowed, color=_GREY, linestyle="--", linewidth=1)
        axes.annotate("allowed", (0.01, allowed), xycoords=("axes fraction", "data"), va="bottom", color=_GREY)
    errors = [*bounds, *(error for _, error in points.values())]
    fastest = max((speed for speed, _ in points.values()), default=1.0)
    axes.set(yscale="log", xlim=(0, 1.1 * fastest), ylim=(min(errors) / 10, 6 * max(errors)))
    axes.set(xlabel="images/s", ylabel="relative L2")
    axes.set_title(f"Speed against error at batch {batch}")
    axes.grid(alpha=0.25)


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (speed, error) that no other point dominates (at least as fast, smaller error), the slowest first."""
    front: list[tuple[float, float]] = []
    for speed, error in sorted(points, key=lambda point: (-point[0], point[1])):
        if not front or error < front[-1][1]:
            front.append((speed, error))
    return front[::-1]


def _error(runner: RunnerResult) -> float:
    """The error to draw; a value that is not finite is drawn as 1, where everything is wrong."""
    return min(max(runner.accuracy.rel_l2, _SMALLEST_ERROR), 10.0) if runner.accuracy.rel_l2 >= 0 else 10.0


def _label(runner: RunnerResult) -> str:
    return runner.title if runner.accuracy.is_right else f"{runner.title} (WRONG)"
