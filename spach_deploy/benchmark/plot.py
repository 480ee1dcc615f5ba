"""A benchmark as a picture: latency against batch, and speed against error."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from spach_deploy.errors import MissingPackageError

if TYPE_CHECKING:
    from spach_deploy.benchmark.result import Benchmark

_SMALLEST_ERROR = 1e-8
"""Where a runner stands on a logarithmic axis that gives the golden answers exactly."""


def draw(found: Benchmark, file: Path) -> None:
    """Write an SVG; MissingPackageError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError("matplotlib", "A plot", "pip install 'spach-deploy[report]'") from None
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    latency, pareto = figure.subplots(1, 2)
    _draw_latency(latency, found)
    _draw_pareto(pareto, found)
    where = f"{found.machine['processor']}, {found.machine['threads']} threads"
    figure.suptitle(f"{found.model}, {found.precision}: {where}")
    figure.savefig(file, format="svg", metadata={"Date": None})


def _draw_latency(axes: Any, found: Benchmark) -> None:
    for number, runner in enumerate(found.runners):
        batches = [timing.batch for timing in runner.timings]
        medians = [timing.latency.median * 1e3 for timing in runner.timings]
        label = _label(runner.title, runner.accuracy.is_right)
        axes.plot(batches, medians, marker="o", color=f"C{number}", label=label)
    axes.set(xlabel="batch", ylabel="median latency, ms", title="Latency", ylim=(0, None))
    axes.set_xticks(found.batches, [str(batch) for batch in found.batches])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _draw_pareto(axes: Any, found: Benchmark) -> None:
    batch = found.batches[-1]
    for number, runner in enumerate(found.runners):
        if (timing := runner.at(batch)) is None:
            continue
        error = max(runner.accuracy.rel_l2, _SMALLEST_ERROR)
        marker = "o" if runner.accuracy.is_right else "x"
        axes.scatter(timing.images_per_second, error, color=f"C{number}", marker=marker, s=60)
        axes.annotate(
            _label(runner.title, runner.accuracy.is_right),
            (timing.images_per_second, error),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
        )
    allowed = min(runner.accuracy.allowed for runner in found.runners)
    axes.axhline(allowed, color="grey", linestyle="--", linewidth=1)
    axes.annotate("allowed", (0.99, allowed), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="grey")
    axes.set(yscale="log", xlabel=f"images/s at batch {batch}", ylabel="relative L2", title="Speed against error")
    axes.margins(x=0.4, y=0.2)
    axes.grid(alpha=0.3)


def _label(title: str, is_right: bool) -> str:
    return title if is_right else f"{title} (wrong)"
