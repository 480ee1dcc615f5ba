"""INT8 on this CPU against FP32, both in ONNX Runtime: same model, same images, rounds in turn.

    python -m benchmarks.cpu_int8 [MODEL ...] [--batch 8] [--rounds 12]

The INT8 graph is what `spach-export --int8 --rest fp32 --engine none` makes: integer products, all else FP32. The
ratio is the median over rounds, each of one run of either graph; its spread says whether the machine was quiet enough.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from benchmarks.photographs import calibration_photographs, held_out_photographs
from benchmarks.quantization import prepared
from benchmarks.results import record, table
from spach_deploy.models import load_model
from spach_deploy.onnx_graph.export import INPUT, export_canonical
from spach_deploy.onnx_graph.passes import CPU_PASSES, apply_passes
from spach_deploy.quantization.correct import correct_biases
from spach_deploy.quantization.formats import INT8
from spach_deploy.quantization.insert import insert_pairs
from spach_deploy.quantization.plan import Scaling
from spach_deploy.quantization.quantize import candidates, equalize_graph, plan_from_statistics
from spach_deploy.quantization.scales import Method
from spach_deploy.quantization.sites import Selection
from spach_deploy.quantization.statistics import Collector
from spach_deploy.rewrites import rewrite
from spach_deploy.specs import ModelSpec, Preprocessing
from spach_deploy.stages_quantization import mark_sites

CALIBRATION = 16


def graphs(name: str, folder: Path) -> tuple[Path, Path, int]:
    """Files of the FP32 and the INT8 graph, and the image size."""
    loaded = load_model(ModelSpec(name))
    model = export_canonical(rewrite(loaded.model, (), ()).model, loaded.image_size)
    single, eight = folder / "fp32.onnx", folder / "int8.onnx"
    onnx.save(model, single)
    scaling = Scaling(INT8, Method.MAX, half=False)
    chosen = candidates(model, Selection(), scaling)
    collector = Collector(model, chosen.wanted, histograms=False)
    for image in prepared(calibration_photographs(CALIBRATION), Preprocessing.for_size(loaded.image_size)):
        collector.run({INPUT: image[None]})
    plan = plan_from_statistics(model, chosen, collector.statistics, scaling)
    equalize_graph(model, plan)
    mark_sites(model, plan)
    apply_passes(model, CPU_PASSES)
    correct_biases(model, plan)
    onnx.save(insert_pairs(model, plan), eight)
    return single, eight, loaded.image_size


def session(path: Path) -> Any:
    """ONNX Runtime with its defaults."""
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def timed(runner: Any, images: Any) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    runner.run(None, {INPUT: images})
    return time.perf_counter() - start


def row(name: str, batch: int, rounds: int) -> list[object]:
    """Figures of one model."""
    with tempfile.TemporaryDirectory() as folder:
        single, eight, size = graphs(name, Path(folder))
        runners = session(single), session(eight)
    images = prepared(held_out_photographs(batch), Preprocessing.for_size(size))
    exact, rounded = (runner.run(None, {INPUT: images})[0].astype(np.float64) for runner in runners)
    times = [(timed(runners[0], images), timed(runners[1], images)) for _ in range(rounds)]
    ratios = sorted(one / other for one, other in times)
    seconds = [statistics.median(column) for column in zip(*times, strict=True)]
    spread = f"{ratios[rounds // 10]:.2f} to {ratios[-1 - rounds // 10]:.2f}"
    relative = float(np.linalg.norm(rounded - exact) / np.linalg.norm(exact))
    images_a_second = [f"{batch / value:.1f}" for value in seconds]
    return [name, *images_a_second, f"{statistics.median(ratios):.2f}", spread, f"{relative:.4f}"]


def rows(models: list[str], batch: int, rounds: int) -> Iterator[list[object]]:
    """One row a model."""
    for name in models:
        yield row(name, batch, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["ms_hybrid_s", "ms_conv_s", "trans_s", "mlp_s"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    lines = []
    for line in rows(arguments.models, arguments.batch, arguments.rounds):
        print(" | ".join(map(str, line)), flush=True)
        lines.append(line)
    headings = ("model", "FP32 images/s", "INT8 images/s", "ratio", "10 to 90 %", "rel. L2")
    command = f"python -m benchmarks.cpu_int8 {' '.join(arguments.models)} --batch {arguments.batch}"
    record(f"INT8 on a CPU, batch {arguments.batch}", command, table(headings, lines), ("onnxruntime",))


if __name__ == "__main__":
    main()
