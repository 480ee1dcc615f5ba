"""How far the cost model is off, where a time can be measured without a GPU: ONNX Runtime on this machine's CPU.

    python -m benchmarks.cost_model [MODEL ...] [--batch 8] [--rounds 5]

The same formula as for plans (`engine.cost_model`): ONNX Runtime's profile is the schedule, one kernel a node with the
bytes of its inputs and outputs and the multiply-adds of its products in FP32; peaks are those that are measured here,
between the runs; a start takes as long as the shortest node does. Times are of runs without a profile, the median.
`cards.json` has the ratios of measured to predicted time, least, median and most.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from benchmarks.results import record, table
from spach_deploy.benchmark.rounds import Peaks
from spach_deploy.blocks import rewrite
from spach_deploy.bundle.outputs import INPUT
from spach_deploy.common.machine import available_threads
from spach_deploy.engine.cost_model import Card, predicted_seconds
from spach_deploy.engine.plan_facts import KernelWork
from spach_deploy.graph.export import export_canonical
from spach_deploy.graph.passes import CPU_PASSES, apply_passes
from spach_deploy.models.demo import load_demo_weights
from spach_deploy.models.registry import create_model
from spach_deploy.runtime.onnxruntime_runner import save_model

MODELS = ("ms_hybrid_s", "ms_conv_s", "trans_s", "ms_mlp_s", "ms_hybrid_xs", "trans_xxs")
_ITEMSIZE = {"float": 4, "int64": 8, "int32": 4, "bool": 1}


def session_of(path: Path, profile: Path | None = None) -> onnxruntime.InferenceSession:
    """A session on all cores; with `profile` it writes one there."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_threads()
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def schedule(path: Path, x: np.ndarray[Any, Any], folder: Path) -> tuple[list[KernelWork], float]:
    """The nodes that ONNX Runtime ran, and the microseconds of the shortest."""
    session = session_of(path, folder / "profile")
    for _ in range(2):
        session.run(None, {INPUT: x})
    events = json.loads(Path(session.end_profiling()).read_text())
    nodes = [event for event in events if event.get("name", "").endswith("_kernel_time")]
    last = nodes[len(nodes) // 2 :]  # of the second run
    return [work_of(event["args"]) for event in last], float(min(max(event["dur"], 1) for event in last))


def work_of(node: Mapping[str, Any]) -> KernelWork:
    """Bytes and multiply-adds of one node of a profile."""
    read, made = node["input_type_shape"], node["output_type_shape"]
    moved = sum(_ITEMSIZE.get(kind, 4) * math.prod(shape) for entry in (*read, *made) for kind, shape in entry.items())
    shapes = [next(iter(entry.values())) for entry in read]
    output = math.prod(next(iter(made[0].values()))) if made else 0
    operator = node["op_name"]
    if "Conv" in operator:
        weight = next(shape for shape in shapes[1:] if len(shape) == 4)
        return KernelWork(moved, output * math.prod(weight[1:]), "float")
    if any(name in operator for name in ("MatMul", "Gemm")):
        return KernelWork(moved, output * shapes[0][-1], "float")
    return KernelWork(moved)


def measured_seconds(path: Path, x: np.ndarray[Any, Any], rounds: int, peaks: Peaks) -> float:
    """The median time of a run; peaks are measured between the runs."""
    session = session_of(path)
    session.run(None, {INPUT: x})
    times = []
    for _ in range(rounds):
        peaks.measure()
        start = time.perf_counter()
        session.run(None, {INPUT: x})
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def row(name: str, batch: int, rounds: int) -> tuple[list[object], float]:
    """A line of the table, and measured over predicted time."""
    model = create_model(name)
    load_demo_weights(model)
    graph = export_canonical(
        rewrite(model, ["shift_depthwise", "tokens_first"]).model, model.architecture.image_size[0]
    )
    apply_passes(graph, CPU_PASSES)
    size = model.architecture.image_size
    x = np.random.default_rng(0).standard_normal((batch, model.architecture.channels, *size)).astype(np.float32)
    peaks = Peaks(available_threads())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save_model(graph, path)
        measured = measured_seconds(path, x, rounds, peaks)
        kernels, start_us = schedule(path, x, Path(folder))
    cpu = Card("CPU", "", peaks.best["bytes"] / 1e9, {"fp32": peaks.best["flops"] / 1e12})
    predicted = predicted_seconds(kernels, cpu, start_us)
    assert predicted is not None
    ratio = measured / predicted
    macs = sum(kernel.macs for kernel in kernels) / batch / 1e9
    figures = (len(kernels), f"{macs:.2f}", f"{1000 * predicted:.1f}", f"{1000 * measured:.1f}", f"{ratio:.2f}")
    return [name, *figures], ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    lines, ratios = [], []
    for name in arguments.models:
        line, ratio = row(name, arguments.batch, arguments.rounds)
        print(*line, sep=" | ", flush=True)
        lines.append(line)
        ratios.append(ratio)
    headings = ("model", "nodes", "G macs an image", "predicted ms", "measured ms", "measured / predicted")
    spread = f"{min(ratios):.2f} to {max(ratios):.2f} times, {statistics.median(ratios):.2f} in the median"
    body = (
        f"ONNX Runtime, FP32, batch {arguments.batch}. Measured over predicted: {spread}.\n\n{table(headings, lines)}"
    )
    is_whole = set(arguments.models) == set(MODELS)
    command = f"python -m benchmarks.cost_model --batch {arguments.batch} --rounds {arguments.rounds}"
    record("Predicted and measured time", command, body, ("torch", "onnxruntime"), is_whole=is_whole)


if __name__ == "__main__":
    main()
