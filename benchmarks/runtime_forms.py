"""What serving a TensorRT bundle's graph by ONNX Runtime costs, and the same graph made anew in ONNX Runtime's form.

    python -m benchmarks.runtime_forms [MODEL ...] [--precision fp16] [--batch 1] [--rounds 15]

Each model is exported for TensorRT for RTX. Its graph, the one that packages make of it, and the one of an export with
`--engine none` run in turns, in one process on its one thread, whose processor time is measured, so that other load on
the machine counts little. The table has the medians of the rounds, and of the ratios of the same rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import onnx

from benchmarks.results import record, table
from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.outputs import INPUT
from spach_deploy.bundle.store import GOLDEN, GRAPH, Bundle
from spach_deploy.options.gpus import parse_gpus
from spach_deploy.options.specs import EngineTarget, ExportOptions, Flavour, ModelSpec, Precision
from spach_deploy.pipeline.export import export
from spach_deploy.pipeline.runtime_form import graph_for_runtime
from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner

MODELS = ("ms_hybrid_xs", "trans_xxs", "conv_xxs", "smlpnet_tiny")


def exported(model: str, precision: Precision, target: EngineTarget, folder: Path) -> Bundle:
    """A bundle with demo weights."""
    options = ExportOptions(
        ModelSpec(model), precision, engine=target, output=folder / f"{model}-{target.flavour.value}"
    )
    return export(options).bundle


def milliseconds(files: list[Path], images: np.ndarray, rounds: int) -> list[list[float]]:
    """Of each file, the time of each round after the first."""
    times: list[list[float]] = [[] for _ in files]
    with ExitStack() as stack:
        runners = [stack.enter_context(OnnxRuntimeRunner(file, threads=1)) for file in files]
        for _ in range(rounds + 1):
            for runner, found in zip(runners, times, strict=True):
                start = time.thread_time()
                runner.run({INPUT: images})
                found.append(1e3 * (time.thread_time() - start))
    return [found[1:] for found in times]


def rows(model: str, precision: Precision, batch: int, rounds: int) -> Iterator[list[object]]:
    """A row a graph."""
    with tempfile.TemporaryDirectory() as folder:
        rtx = EngineTarget(Flavour.TENSORRT_RTX, gpus=parse_gpus("sm89"))
        bundle = exported(model, precision, rtx, Path(folder))
        made = graph_for_runtime(bundle)
        if not made.is_made:
            sys.exit(made.note)
        direct = exported(model, precision, EngineTarget(Flavour.NONE), Path(folder))
        files = {"for TensorRT": bundle.file(GRAPH), "made anew": made.path, "--engine none": direct.file(GRAPH)}
        images = Golden.load(bundle.file(GOLDEN)).input
        images = images[np.arange(batch) % len(images)]
        times = milliseconds(list(files.values()), images, rounds)
        for (name, file), found in zip(files.items(), times, strict=True):
            ratio = statistics.median(one / other for one, other in zip(found, times[0], strict=True))
            graph = onnx.load(file)
            weights = sum(len(tensor.raw_data) for tensor in graph.graph.initializer)
            size = file.stat().st_size
            yield [
                *(model, name, len(graph.graph.node), f"{size / 1e6:.2f}", f"{(size - weights) / 1e3:.0f}"),
                *(f"{statistics.median(found):.1f}", f"{ratio:.2f}"),
            ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--precision", choices=["fp32", "fp16"], default="fp16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    lines = [
        line
        for model in arguments.models
        for line in rows(model, Precision(arguments.precision), arguments.batch, arguments.rounds)
    ]
    headings = ("model", "graph", "nodes", "file, MB", "without weights, kB", "ms", "time of the first")
    body = f"ONNX Runtime on one thread of the CPU, batch {arguments.batch}.\n\n{table(headings, lines)}"
    command = " ".join(["python -m benchmarks.runtime_forms", *sys.argv[1:]])
    is_whole = set(arguments.models) == set(MODELS)
    record(f"Forms in ONNX Runtime, {arguments.precision}", command, body, ("onnxruntime",), is_whole=is_whole)


if __name__ == "__main__":
    main()
