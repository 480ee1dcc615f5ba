"""Tables of a run, and whether the goals were met."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.cells import CELLS
from benchmarks.results import table
from spach_deploy.benchmark.layers import layers
from spach_deploy.common.versions import tool_versions

OURS_OVER_PLAIN, TENSORRT_OVER_COMPILE, ROOFLINE = 1.15, 1.5, 0.6

Cells = Mapping[str, Mapping[str, Any]]


def in_words(cell: Mapping[str, Any]) -> str:
    """A cell on one line."""
    times = ", ".join(f"{batch}: {1e3 * seconds:.2f} ms" for batch, seconds in cell.get("seconds", {}).items())
    error = f"error {cell['error']:.1e} of {cell['allowed']:.1e}" if "error" in cell else ""
    return "; ".join(part for part in (times, error, cell.get("problem", "")) if part)


def markdown(state: Mapping[str, Any], peaks: Mapping[str, float], graph: Path, batches: Sequence[int]) -> str:
    """The whole page. `graph`: whose products are counted for the roofline."""
    cells: Cells = state["cells"]
    versions = ", ".join(f"{name} {version}" for name, version in tool_versions().items())
    measured = ", ".join(
        f"{name} {peak / 1e12:,.2f} T{'B/s' if name == 'bytes' else 'FLOP/s'}" for name, peak in peaks.items()
    )
    today = datetime.datetime.now(datetime.timezone.utc).date()
    return (
        "\n\n".join(
            [
                f"# {state['about']['device']}",
                f"`python -m benchmarks.runtime_gpu {' '.join(state['about']['words'])}`, {today}, {versions}.",
                f"Measured peaks: {measured}.",
                "Milliseconds of a batch (median), and the worst relative L2 of eight photographs' logits.",
                table(("cell", *(f"batch {batch}" for batch in batches), "error"), _rows(cells, batches)),
                "\n".join(f"- {name}: {cell['problem']}" for name, cell in cells.items() if cell.get("problem")),
                "## Goals",
                "\n".join(f"- {line}" for line in goals(cells, peaks, graph, batches)),
            ]
        ).rstrip()
        + "\n"
    )


def _rows(cells: Cells, batches: Sequence[int]) -> Iterator[list[object]]:
    for cell in CELLS:
        found = cells.get(cell.name, {})
        seconds = found.get("seconds", {})
        if seconds:
            times = [f"{1e3 * seconds[str(batch)]:.2f}" if str(batch) in seconds else "" for batch in batches]
            yield [cell.name, *times, f"{found['error']:.1e}"]


def goals(cells: Cells, peaks: Mapping[str, float], graph: Path, batches: Sequence[int]) -> Iterator[str]:
    """A sentence for each: met, not met, or not measured."""
    for runner, precision in (("tensorrt", "fp16"), ("onnxruntime", "fp16"), ("onnxruntime", "fp32")):
        what = f"our graph over the plain one, {runner} {precision}"
        yield from _ratio(
            what, cells, f"{runner}/plain/{precision}", f"{runner}/ours/{precision}", OURS_OVER_PLAIN, batches
        )
    yield from _ratio(
        "TensorRT over torch.compile, fp16", cells, "compile/fp16", "tensorrt/ours/fp16", TENSORRT_OVER_COMPILE, batches
    )
    yield from _ratio(
        "shifted products over convolutions, TensorRT fp16",
        cells,
        "tensorrt/convolutions/fp16",
        "tensorrt/ours/fp16",
        1.0,
        batches,
    )
    yield _share(cells, peaks, graph, max(batches))


def _ratio(what: str, cells: Cells, slow: str, fast: str, goal: float, batches: Sequence[int]) -> Iterator[str]:
    base, ours = (cells.get(name, {}).get("seconds", {}) for name in (slow, fast))
    both = [str(batch) for batch in batches if str(batch) in base and str(batch) in ours]
    if not both:
        missing = next(name for name, of in ((slow, base), (fast, ours)) if not of)
        yield f"{what}: not measured ({missing}: {cells.get(missing, {}).get('problem', 'not run')})"
        return
    ratios = {batch: base[batch] / ours[batch] for batch in both}
    listed = ", ".join(f"{ratio:.2f} at batch {batch}" for batch, ratio in ratios.items())
    verdict = "met" if min(ratios.values()) >= goal else "NOT MET"
    yield f"{what}: {listed}; goal {goal:g} {verdict}"


def _share(cells: Cells, peaks: Mapping[str, float], graph: Path, batch: int) -> str:
    timed = {
        name: cell["seconds"][str(batch)]
        for name, cell in cells.items()
        if name.endswith("fp16") and str(batch) in cell.get("seconds", {})
    }
    if not timed:
        return f"share of the roofline at batch {batch}: not measured"
    least = sum(layer.least_seconds(peaks["fp16"], peaks["bytes"]) for layer in layers(graph, batch))
    best = min(timed, key=lambda name: timed[name])
    share = least / timed[best]
    verdict = "met" if share >= ROOFLINE else "NOT MET"
    return f"share of the roofline at batch {batch}: {share:.0%} by {best}; goal {ROOFLINE:.0%} {verdict}"
