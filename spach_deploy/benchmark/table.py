"""A result as text for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping

from spach_deploy.benchmark.layers import Layer, totals
from spach_deploy.benchmark.result import Benchmark, OutputError, Ratio, RunnerResult, Timing, ratio
from spach_deploy.benchmark.runners import CPU, ONNX_RUNTIME, TITLES
from spach_deploy.common.text import escaped

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


def _head(result: Benchmark) -> Iterator[str]:
    machine = result.machine
    yield f"bundle     {result.bundle} ({result.model}, {result.precision})"
    flags = "".join(f", {flag}" for flag in machine["flags"])
    yield from _named("machine", f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores{flags}")
    peaks = f"{result.peaks['flops'] / 1e9:,.0f} GFLOP/s in FP32, {result.peaks['bytes'] / 1e9:,.1f} GB/s, measured now"
    yield from _named("", f"{peaks}; load {machine['load_before']:.2f} before it began")
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
            f" {result.machine['load_before']:.2f} before and {result.machine.get('load_after', 0):.2f} after on"
            f" {result.machine['cores']} cores. Stop what else uses this machine, or give more --rounds and --seconds."
        )
    if any(timing.ratio and _is_same(timing.ratio) for runner in result.runners for timing in runner.timings):
        yield from _filled("'same' is a ratio whose interval has 1 in it: the rounds do not tell which is faster.")
    if result.precision != "fp32" and any(runner.name == ONNX_RUNTIME for runner in result.runners):
        yield from _filled(
            f"ONNX Runtime on a CPU computes much of a {result.precision} graph in FP32: its error is not the engine's."
        )
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
