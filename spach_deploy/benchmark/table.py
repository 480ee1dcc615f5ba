"""A benchmark for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from spach_deploy.benchmark.contestants import TITLES
from spach_deploy.benchmark.result import Accuracy, Benchmark, Runner, Timing
from spach_deploy.errors import printable

_WIDTH, _MODULES = 100, 10
_SLOW_START_S = 2.0
_NOISY = "too noisy to tell"


def as_text(found: Benchmark) -> str:
    """Tables of each batch, what was not run and why, modules that take the longest, and what is fastest."""
    return "\n".join(map(printable, _lines(found)))


def _lines(found: Benchmark) -> Iterator[str]:
    yield from _head(found)
    for batch in found.batches:
        yield ""
        yield from _batch(found, batch)
    yield ""
    yield from _remarks(found)
    for runner in found.runners:
        if runner.modules:
            yield ""
            yield from _modules(runner)
    yield ""
    yield from _conclusion(found)


def _head(found: Benchmark) -> Iterator[str]:
    machine = found.machine
    yield f"bundle     {found.bundle} ({found.model}, {found.precision})"
    flags = ", ".join(machine["flags"])
    yield f"machine    {machine['processor']}, {machine['threads']} of {machine['cores']} cores, {flags}"
    peaks = f"{found.peaks['flops'] / 1e9:,.0f} GFLOP/s in FP32, {found.peaks['bytes'] / 1e9:,.1f} GB/s, measured now"
    yield f"           {peaks}; load {machine['load_before']:.2f} before it began"
    macs = sum(layer.macs for layer in found.layers) / found.batches[-1] / 1e9
    yield f"model      {macs:.2f} G multiplications an image in convolutions and linear layers"
    for gpu in machine["gpus"]:
        yield f"GPU        {', '.join(f'{key} {value}' for key, value in gpu.items())}"


def _batch(found: Benchmark, batch: int) -> Iterator[str]:
    yield (
        f"{f'batch {batch}':<22}{'median':>8}{'p90':>8}{'p99':>8}{'images/s':>10}{'peak MB':>8}"
        f"{'roofline':>9}  {'x eager':<18}error"
    )
    yield "─" * _WIDTH
    for runner in found.runners:
        timing = runner.at(batch)
        if timing is not None:
            yield _row(runner, timing, found)


def _row(runner: Runner, timing: Timing, found: Benchmark) -> str:
    latency = timing.latency
    times = "".join(
        f"{'–' if value is None else _ms(value):>8}" for value in (latency.median, latency.p90, latency.p99)
    )
    share = f"{timing.roofline:.0%}" if timing.roofline is not None else ""
    return (
        f"{runner.title:<22}{times}{timing.images_per_second:>10,.1f}{timing.peak_bytes / 1e6:>8,.0f}{share:>9}"
        f"  {_ratio(runner, timing, found):<18}{_error(runner.accuracy)}"
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}" if seconds >= 0.01 else f"{seconds * 1e3:.2f}"


def _ratio(runner: Runner, timing: Timing, found: Benchmark) -> str:
    if not runner.accuracy.is_right:
        return "WRONG"
    if timing.ratio is None:
        return "1" if runner.name == "eager" else "–"
    if not timing.ratio.is_told:
        return _NOISY
    return f"{timing.ratio.value:.2f} ({timing.ratio.low:.2f}–{timing.ratio.high:.2f})"


def _error(accuracy: Accuracy) -> str:
    return f"{accuracy.rel_l2:.1e}" + ("" if accuracy.is_right else f" > {accuracy.allowed:.1e}")


def _remarks(found: Benchmark) -> Iterator[str]:
    yield from _filled(
        f"Milliseconds of a batch, {found.rounds} rounds in turn; ratios with their 95 % interval over the rounds;"
        " error: worst relative L2 of an image's logits against the bundle's golden answers; roofline: share of the"
        " least time that this machine needs for the products alone."
    )
    if any(timing.ratio and not timing.ratio.is_told for runner in found.runners for timing in runner.timings):
        yield from _filled(
            "Where it says 'too noisy to tell' the rounds disagree by more than 30 %: something else uses this machine."
            " Stop it, or give more --rounds and --seconds."
        )
    for runner in found.runners:
        slow = [t for t in runner.timings if t.first_s > max(_SLOW_START_S, 20 * t.latency.median)]
        for timing in slow:
            yield from _filled(f"{runner.title}: the first run of batch {timing.batch} took {timing.first_s:,.0f} s.")
        if runner.problem:
            yield from _filled(f"{runner.title}: {runner.problem}.")
    for name, reason in found.skipped.items():
        yield from _filled(f"Not run: {TITLES[name]}, {reason}.")


def _modules(runner: Runner) -> Iterator[str]:
    total = sum(runner.modules.values())
    yield f"{runner.title}: modules that take the longest, {_ms(total)} ms in all under its profiler"
    for module, seconds in list(runner.modules.items())[:_MODULES]:
        yield f"  {seconds / total:6.1%} {_ms(seconds):>8}  {module}"


def _conclusion(found: Benchmark) -> Iterator[str]:
    for runner in found.wrong:
        yield from _filled(
            f"{runner.title} is WRONG: its logits are off by {_error(runner.accuracy)} that the bundle allows."
            " Do not serve it; spach-validate says more."
        )
    for batch in found.batches:
        if best := found.best(batch):
            timing = best.at(batch)
            assert timing is not None
            yield f"Fastest of the right ones at batch {batch}: {best.title}, {timing.images_per_second:,.1f} images/s."


def _filled(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, break_on_hyphens=False)
