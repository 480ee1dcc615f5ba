"""How cost grows with the image's side, the batch and the depth, and where it should be linear.

    python -m benchmarks.growth [MODEL ...] [--sizes 224 288 384 512] [--batches 1 2 4 8 16] [--depths 6 12 24]

Export and validation are `spach-export --fp16 --engine none`, by its own phases; latency is that graph's in ONNX
Runtime on one thread, the median of rounds in turn.
An exponent p is that of cost = c * n^p through all points, n being pixels,
images or blocks. What has a fixed part (an export) has a p below its true one; one above `LINEAR` is more than linear.
Attention's two products grow with the square of the tokens, so a model with attention may grow faster than its pixels:
its latency is held to its own multiply-adds instead. Depth is measured on a single-stage model of each kind of block.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.fitting import exponent
from benchmarks.results import record, table
from spach_deploy.bundle.outputs import INPUT
from spach_deploy.bundle.store import GRAPH
from spach_deploy.common.progress import ExportObserver, Phase
from spach_deploy.models import published as configs
from spach_deploy.models.registry import model_size
from spach_deploy.options.architecture import Architecture, sides
from spach_deploy.options.specs import EngineTarget, ExportOptions, Flavour, ModelSpec, Precision
from spach_deploy.pipeline.export import export
from spach_deploy.runtime.onnxruntime_runner import new_session

LINEAR = 1.15
EXPORT, VALIDATION = "export the graph", "validate the graph"
KINDS = ("conv", "trans", "mlp")
_UNITS = ("export s", "validation s", "nodes", "graph MB", "GMACs", "latency ms")


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one export: seconds of both phases, nodes and bytes of the graph, multiply-adds of an image, seconds a run."""

    export_s: float
    validation_s: float
    nodes: int
    graph_bytes: int
    macs: int
    latency_s: float

    def values(self) -> tuple[float, ...]:
        """In the order of `_UNITS`, unscaled."""
        return self.export_s, self.validation_s, self.nodes, self.graph_bytes, self.macs, self.latency_s

    def cells(self) -> list[str]:
        """In the order and the units of `_UNITS`."""
        seconds = [f"{self.export_s:.1f}", f"{self.validation_s:.1f}"]
        graph = [f"{self.nodes:,}", f"{self.graph_bytes / 1e6:.1f}", f"{self.macs / 1e9:.2f}"]
        return [*seconds, *graph, f"{self.latency_s * 1e3:.1f}"]


class Seconds(ExportObserver):
    """Keeps what each phase took."""

    def __init__(self) -> None:
        self.of: dict[str, float] = {}

    def finished(self, phase: Phase) -> None:
        """Keep it."""
        self.of[phase.name] = phase.seconds


def costs(name: str, size: int, batch: int, rounds: int) -> Costs:
    """Export once, run `rounds` times."""
    seconds = Seconds()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "bundle"
        model = ModelSpec(name, image_size=size)
        engine = EngineTarget(Flavour.NONE)
        export(ExportOptions(model, Precision.FP16, engine=engine, output=target), seconds)
        graph = target / GRAPH
        latency = latencies(graph, size, [batch], rounds)[batch]
        nodes, length = len(onnx.load(graph).graph.node), graph.stat().st_size
    macs = model_size(configs.ARCHITECTURES[name].replace(image_size=size)).macs
    return Costs(seconds.of[EXPORT], seconds.of[VALIDATION], nodes, length, macs, latency)


def latencies(graph: Path, size: int, batches: Sequence[int], rounds: int) -> dict[int, float]:
    """Median seconds of a run at each batch; all batches in each round, so that a drifting machine slows all alike."""
    session = _session(graph)
    inputs = {batch: np.random.default_rng(0).standard_normal((batch, 3, size, size), np.float32) for batch in batches}
    times: dict[int, list[float]] = {batch: [] for batch in batches}
    for turn in range(rounds + 1):
        for batch, images in inputs.items():
            start = time.perf_counter()
            session.run(None, {INPUT: images})
            if turn:  # the first run allocates
                times[batch].append(time.perf_counter() - start)
    return {batch: statistics.median(found) for batch, found in times.items()}


def _session(graph: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return new_session(str(graph), options, ["CPUExecutionProvider"])


@contextlib.contextmanager
def registered(name: str, architecture: Architecture) -> Iterator[None]:
    """A model of this name, for as long as the block lasts."""
    configs.ARCHITECTURES[name] = architecture
    try:
        yield
    finally:
        del configs.ARCHITECTURES[name]


def by_size(name: str, sizes: Sequence[int], rounds: int) -> str:
    """A table over the image's side."""
    points = [costs(name, size, 1, rounds) for size in sizes]
    return _section(f"{name} by the image's side, batch 1", ("side", "pixels"), sizes, [s * s for s in sizes], points)


def by_depth(kind: str, depths: Sequence[int], size: int, rounds: int) -> str:
    """A table over the number of blocks of one kind, in the shape of the xxs models."""
    shape = configs.ARCHITECTURES[f"{kind}_xxs"]
    points = []
    for depth in depths:
        name = f"{kind}_of_{depth}_blocks"
        with registered(name, shape.replace(stages=(((kind, depth),),))):
            points.append(costs(name, size, 1, rounds))
    return _section(f"{kind} by the number of blocks, {size} px, batch 1", ("blocks", "blocks"), depths, depths, points)


def _section(
    title: str, units: tuple[str, str], labels: Sequence[int], sizes: Sequence[int], points: Sequence[Costs]
) -> str:
    """`units`: what the labels and what the sizes count."""
    rows = [[label, *point.cells()] for label, point in zip(labels, points, strict=True)]
    columns = list(zip(*(point.values() for point in points), strict=True))
    rows.append([f"exponent of {units[1]}", *(f"{round(exponent(sizes, column), 2) + 0.0:.2f}" for column in columns)])
    macs, seconds = columns[_UNITS.index("GMACs")], columns[_UNITS.index("latency ms")]
    judged = {"export": exponent(sizes, columns[0]), "latency by multiply-adds": exponent(macs, seconds)}
    return f"{title}:\n\n{table((units[0], *_UNITS), rows)}\n\n{verdict(judged)}"


def by_batch(name: str, batches: Sequence[int], rounds: int) -> str:
    """A table over the batch; one graph serves all."""
    with tempfile.TemporaryDirectory() as folder:
        target, engine = Path(folder) / "bundle", EngineTarget(Flavour.NONE)
        model = export(ExportOptions(ModelSpec(name), Precision.FP16, engine=engine, output=target))
        size, _ = sides(model.bundle.manifest.model.image_size)
        found = latencies(target / GRAPH, size, batches, rounds)
    rows: list[list[object]] = [[n, f"{found[n] * 1e3:.1f}", f"{found[n] / n * 1e3:.1f}"] for n in batches]
    power = exponent(batches, [found[n] for n in batches])
    lines = table(("batch", "latency ms", "ms an image"), [*rows, ["exponent", f"{power:.2f}", ""]])
    return f"{name} by batch:\n\n{lines}\n\n{verdict({'latency': power})}"


def verdict(exponents: dict[str, float]) -> str:
    """Which of them are at most linear."""
    said = [f"{what} {'at most' if power <= LINEAR else 'more than'} linear" for what, power in exponents.items()]
    return f"{'; '.join(said)} (limit {LINEAR}).".capitalize()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("models", nargs="*", default=["ms_conv_xxs", "ms_trans_xxs"])
    made.add_argument("--sizes", type=int, nargs="*", default=[224, 288, 384, 512])
    made.add_argument("--batches", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    made.add_argument("--depths", type=int, nargs="*", default=[6, 12, 24])
    made.add_argument("--depth-size", type=int, default=224, help="image side of the models of growing depth")
    made.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    made.add_argument("--rounds", type=int, default=7)
    return made


def sections(arguments: argparse.Namespace) -> Iterator[str]:
    """Each table as it is ready. One export goes before: the first loads what all others find loaded."""
    costs("ms_conv_xxs", 64, 1, 1)
    for name in arguments.models:
        if arguments.sizes:
            yield by_size(name, arguments.sizes, arguments.rounds)
        if arguments.batches:
            yield by_batch(name, arguments.batches, arguments.rounds)
    for kind in arguments.kinds if arguments.depths else ():
        yield by_depth(kind, arguments.depths, arguments.depth_size, arguments.rounds)


def main() -> None:
    arguments = parser().parse_args()
    body = []
    for section in sections(arguments):
        print(section, flush=True)
        body.append(section)
    command = " ".join(["python -m benchmarks.growth", *sys.argv[1:]])
    record("How cost grows", command, "\n\n".join(body), ("torch", "onnxruntime"))


if __name__ == "__main__":
    main()
