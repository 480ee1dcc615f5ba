"""A result as text for the terminal and as a plot.

The plot is an SVG: latency against batch size, and speed against error.
"""

from __future__ import annotations

import importlib.util
import os
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spach_deploy.benchmark.layers import Layer, totals
from spach_deploy.benchmark.result import Benchmark, OutputError, Ratio, RunnerResult, Timing, ratio
from spach_deploy.benchmark.runners import CPU, ONNX_RUNTIME, TITLES
from spach_deploy.common.errors import MissingPackageError, UsageError
from spach_deploy.common.files import Destination
from spach_deploy.common.text import escaped

if TYPE_CHECKING:
    from spach_deploy.benchmark.result import Benchmark, RunnerResult


_WIDTH, _MODULES = 100, 10
_SLOW_START_S = 2.0
_NOISY = "too noisy to tell"


def as_text(result: Benchmark) -> str:
    """A table for each batch size, runners that did not run and why, the slowest modules, and the fastest runner."""
    return escaped(_lines(result))


def _lines(result: Benchmark) -> Iterator[str]:
    yield from _head(result)
    for batch in result.batches:
        yield ""
        yield from _batch(result, batch)
    yield ""
    yield from _remarks(result)
    for runner in result.runners:
        if runner.modules:
            yield ""
            yield from _modules(runner, result)
    yield ""
    yield from _conclusion(result)


def _load(machine: Mapping[str, Any], when: str) -> str:
    load = machine.get(when)
    return "unknown" if load is None else f"{load:.2f}"


def _head(result: Benchmark) -> Iterator[str]:
    machine = result.machine
    yield f"bundle     {result.bundle} ({result.model}, {result.precision})"
    flags = "".join(f", {flag}" for flag in machine["flags"])
    yield from _named("machine", f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores{flags}")
    peaks = f"{result.peaks['flops'] / 1e9:,.0f} GFLOP/s in FP32, {result.peaks['bytes'] / 1e9:,.1f} GB/s, measured now"
    yield from _named("", f"{peaks}; load {_load(machine, 'load_before')} before it began")
    macs, moved = sum(layer.macs for layer in result.layers), sum(layer.bytes for layer in result.layers)
    batch = result.batches[-1]
    products = f"{macs / batch / 1e9:.2f} G multiplications an image in convolutions and matrix products"
    yield from _named("model", f"{products}, {moved / batch / 1e6:,.0f} MB")
    for gpu in machine.get("gpus_after") or machine["gpus"]:
        yield from _named("GPU", ", ".join(f"{key} {value}" for key, value in gpu.items()))


def _named(name: str, text: str) -> list[str]:
    """`text` after its name, wrapped and indented."""
    indent = f"{name:<11}"
    return textwrap.wrap(
        text, _WIDTH, initial_indent=indent, subsequent_indent=" " * len(indent), break_on_hyphens=False
    )


def _batch(result: Benchmark, batch: int) -> Iterator[str]:
    yield (
        f"{f'batch {batch}':<22}{'median':>8}{'p90':>8}{'p99':>8}{'images/s':>10}{'peak MB':>8}"
        f"{'roofline':>9}  {'x eager':<17} error"
    )
    yield "─" * _WIDTH
    for runner in result.runners:
        timing = runner.at(batch)
        if timing is not None:
            yield _row(runner, timing, result)


def _row(runner: RunnerResult, timing: Timing, result: Benchmark) -> str:
    latency = timing.latency
    times = "".join(
        f"{'–' if value is None else _ms(value):>8}" for value in (latency.median, latency.p90, latency.p99)
    )
    share = f"{timing.roofline:.0%}" if timing.roofline is not None else ""
    return (
        f"{runner.title:<22}{times}{timing.images_per_second:>10,.1f}{timing.peak_bytes / 1e6:>8,.0f}{share:>9}"
        f"  {_ratio(runner, timing):<17} {_error(runner.accuracy, timing.rel_l2)}"
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}" if seconds >= 0.01 else f"{seconds * 1e3:.2f}"


def _ratio(runner: RunnerResult, timing: Timing) -> str:
    if not runner.accuracy.is_right:
        return "WRONG"
    if timing.ratio is None:
        return "1" if runner.name == "eager" else "–"
    if not timing.ratio.is_conclusive:
        return _NOISY
    interval = f"({timing.ratio.low:.2f}–{timing.ratio.high:.2f})"
    return f"same {interval}" if _is_same(timing.ratio) else f"{timing.ratio.value:.2f} {interval}"


def _is_same(ratio: Ratio) -> bool:
    return ratio.is_conclusive and ratio.includes_one


def _allowed(result: Benchmark) -> str:
    bounds = {runner.accuracy.allowed for runner in result.runners}
    return f", {bounds.pop():.1e} is allowed" if len(bounds) == 1 else ""


def _error(accuracy: OutputError, at_batch: float | None = None) -> str:
    """The error at one batch size where it is given, else the worst; with the bound where it is exceeded."""
    error = accuracy.rel_l2 if at_batch is None else at_batch
    return f"{error:.1e}" + ("" if error <= accuracy.allowed else f" > {accuracy.allowed:.1e}")


def _remarks(result: Benchmark) -> Iterator[str]:
    yield from _filled(
        f"Milliseconds of a batch, {result.rounds} rounds in turn; '–' where there are too few runs to tell; peak MB:"
        " of the runner's own process, loading included; roofline: the least time that this machine needs for the"
        " products alone, over the median; x eager: times as fast, with the 95 % interval over the rounds; error: worst"
        f" relative L2 of an image's {result.output} against the bundle's golden answers{_allowed(result)}."
    )
    if any(timing.roofline and timing.roofline > 1 for runner in result.runners for timing in runner.timings):
        yield from _filled(
            "A roofline above 100 %: what lies in the processor's caches is not moved, or INT8 and BF16 multiply faster"
            " than FP32, or this machine was busier while its peaks were measured."
        )
    if any(timing.ratio and not timing.ratio.is_conclusive for runner in result.runners for timing in runner.timings):
        yield from _filled(
            "Where it says 'too noisy to tell' the rounds disagree too much: the ends of the interval are more than"
            " 30 % apart, or 10 % with 1 between them. The load was"
            f" {_load(result.machine, 'load_before')} before and {_load(result.machine, 'load_after')} after on"
            f" {result.machine['cores']} cores. Stop what else uses this machine, or give more --rounds and --seconds."
        )
    if any(timing.ratio and _is_same(timing.ratio) for runner in result.runners for timing in runner.timings):
        yield from _filled("'same' is a ratio whose interval has 1 in it: the rounds do not tell which is faster.")
    if result.precision != "fp32" and any(runner.name == ONNX_RUNTIME for runner in result.runners):
        yield from _filled(
            f"ONNX Runtime on a CPU computes much of a {result.precision} graph in FP32: its error is not the engine's."
        )
    starts = ", ".join(f"{runner.title} {runner.start_s:,.1f} s" for runner in result.runners)
    cold = " TensorRT for RTX started cold, without its runtime cache." if result.is_cold else ""
    yield from _filled(f"From opening to the first answer at batch {result.batches[0]}: {starts}.{cold}")
    for runner in result.runners:
        slow = [t for t in runner.timings if t.first_s > max(_SLOW_START_S, 20 * t.latency.median)]
        for timing in slow:
            yield from _filled(f"{runner.title}: the first run of batch {timing.batch} took {timing.first_s:,.0f} s.")
        if runner.problem:
            yield from _filled(f"{runner.title}: {runner.problem}.")
    for name, reason in result.skipped.items():
        yield from _filled(f"Not run: {TITLES[name]}, {reason}.")


def _modules(runner: RunnerResult, result: Benchmark) -> Iterator[str]:
    """The slowest modules: time, products, and the share of the roofline that each reaches."""
    total, of_module = sum(runner.modules.values()), totals(result.layers)
    peaks = result.peaks if runner.device == CPU else result.gpu_peaks
    yield f"{runner.title}: where the time goes at batch {result.batches[-1]}, {_ms(total)} ms under its profiler"
    yield f"{'share':>7}{'ms':>9}{'M mult.':>10}{'MB':>8}{'roofline':>10}  module"
    for module, seconds in list(runner.modules.items())[:_MODULES]:
        yield f"{seconds / total:7.1%}{_ms(seconds):>9}{_products(of_module.get(module), seconds, peaks)}  {module}"


def _products(layer: Layer | None, seconds: float, peaks: Mapping[str, float]) -> str:
    if layer is None:
        return " " * 28
    share = f"{layer.least_seconds(peaks['flops'], peaks['bytes']) / seconds:.0%}" if peaks and seconds else ""
    return f"{layer.macs / 1e6:>10,.0f}{layer.bytes / 1e6:>8,.1f}{share:>10}"


def _conclusion(result: Benchmark) -> Iterator[str]:
    for runner in result.wrong:
        yield from _filled(
            f"{runner.title} is WRONG: its {result.output} are off by {_error(runner.accuracy)} that the bundle allows."
            " Do not serve it; spach-validate says more."
        )
    for batch in result.batches:
        yield from _fastest(result, batch)


def _fastest(result: Benchmark, batch: int) -> Iterator[str]:
    """The fastest right runner, where its ratio to the next one is conclusive."""
    ranked = result.ranked(batch)
    if not ranked:
        return
    best, timing = ranked[0]
    speed = f"{best.title}, {timing.images_per_second:,.1f} images/s"
    lead = ratio(timing.medians, ranked[1][1].medians) if len(ranked) > 1 else None
    if lead is not None and lead.low <= 1:
        yield from _filled(
            f"At batch {batch} the rounds do not tell {best.title} from {ranked[1][0].title}; best: {speed}."
        )
    else:
        yield f"Fastest of the right ones at batch {batch}: {speed}."


def _filled(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, break_on_hyphens=False)


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
    points = {r.name: (timing.images_per_second, _plot_error(r)) for r in benchmark.runners if (timing := r.at(batch))}
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


def _plot_error(runner: RunnerResult) -> float:
    """The error to draw; a value that is not finite is drawn as 1, where everything is wrong."""
    return min(max(runner.accuracy.rel_l2, _SMALLEST_ERROR), 10.0) if runner.accuracy.rel_l2 >= 0 else 10.0


def _label(runner: RunnerResult) -> str:
    return runner.title if runner.accuracy.is_right else f"{runner.title} (WRONG)"
