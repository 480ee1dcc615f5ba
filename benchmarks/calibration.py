"""Calibration: time and peak memory as images grow, ours beside onnxruntime's calibrators and plain inference.

    python -m benchmarks.calibration [MODEL] [--images 8 32 64] [--calibrators inference max entropy ort-minmax ...]

Every figure comes from a process of its own. `inference` runs the FP32 graph over the same images in ONNX Runtime, one
at a time, as our calibration does. onnxruntime's Entropy and Percentile calibrators keep every activation of every
image; a run that would need more memory than the machine has is stopped by a limit, and said to be.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.photographs import calibration_photographs
from benchmarks.quantization import prepared
from benchmarks.results import record, table
from spach_deploy.blocks import rewrite
from spach_deploy.bundle.outputs import INPUT
from spach_deploy.graph.editing import as_proto
from spach_deploy.graph.export import export_canonical
from spach_deploy.models import load_model
from spach_deploy.options.specs import ModelSpec, Preprocessing
from spach_deploy.quantization.formats import INT8, Float32
from spach_deploy.quantization.plan import Scaling
from spach_deploy.quantization.scales import Method
from spach_deploy.quantization.sites import Selection
from tests.protos import Collector, candidates, open_session, plan_from_statistics

OURS = tuple(method.value for method in Method)
THEIRS = {"ort-minmax": "MinMax", "ort-entropy": "Entropy", "ort-percentile": "Percentile"}
CALIBRATORS = ("inference", *OURS, *THEIRS)
MEMORY_LIMIT_BYTES = 20 << 30


class Reader:
    """onnxruntime's CalibrationDataReader."""

    def __init__(self, images: Float32) -> None:
        self._images = iter(images)

    def get_next(self) -> dict[str, Any] | None:
        """The next image."""
        image = next(self._images, None)
        return None if image is None else {INPUT: image[None]}


def run(calibrator: str, graph: Path, images: Float32) -> None:
    """Calibrate once, in this process."""
    if calibrator in THEIRS:
        _onnxruntime(calibrator, graph, images)
        return
    model = onnx.load(graph)
    if calibrator == "inference":
        session = open_session(model)
        for image in images:
            session.run(None, {INPUT: image[None]})
        return
    scaling = Scaling(INT8, Method(calibrator))
    chosen = candidates(model, Selection(), scaling)
    collector = Collector(model, chosen.wanted, histograms=scaling.method.needs_histograms)
    for image in images:
        collector.run({INPUT: image[None]})
    plan_from_statistics(model, chosen, collector.statistics, scaling)


def _onnxruntime(calibrator: str, graph: Path, images: Float32) -> None:
    from onnxruntime.quantization import CalibrationMethod, create_calibrator

    method = getattr(CalibrationMethod, THEIRS[calibrator])
    with tempfile.TemporaryDirectory() as folder:
        augmented = str(Path(folder) / "augmented.onnx")
        made = create_calibrator(
            graph, ["Conv", "MatMul", "Gemm"], augmented_model_path=augmented, calibrate_method=method
        )
        made.collect_data(Reader(images))
        made.compute_data()


def measured(calibrator: str, graph: Path, images: Path, count: int) -> tuple[float, float] | str:
    """Seconds and peak GB of one run in a process of its own, or why there are none."""
    call = [sys.executable, "-m", "benchmarks.calibration", "--child", calibrator, str(graph), str(images), str(count)]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        return "out of memory" if "MemoryError" in done.stderr or done.returncode < 0 else "failed"
    figures = json.loads(done.stdout.splitlines()[-1])
    return figures["seconds"], figures["peak_gb"]


def child(calibrator: str, graph: Path, images: Path, count: int) -> None:
    """One run; prints its figures."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    with np.load(images) as arrays:
        chosen = arrays["images"][:count]
    start = time.perf_counter()
    run(calibrator, graph, chosen)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": time.perf_counter() - start, "peak_gb": peak / 1e9}))


def rows(model: str, counts: list[int], calibrators: list[str]) -> Iterator[list[object]]:
    """A row for each calibrator: seconds, ratio to inference and peak memory at each number of images."""
    loaded = load_model(ModelSpec(model))
    with tempfile.TemporaryDirectory() as folder:
        graph, images = Path(folder) / "graph.onnx", Path(folder) / "images.npz"
        static = rewrite(loaded.model, (), ()).model
        onnx.save(as_proto(export_canonical(static, loaded.image_size)), graph)
        pixels = calibration_photographs(max(counts))
        np.savez(images, images=prepared(pixels, Preprocessing.for_size(loaded.image_size)))
        plain: dict[int, float] = {}
        for calibrator in calibrators:
            cells: list[object] = [calibrator]
            for count in counts:
                found = measured(calibrator, graph, images, count)
                if isinstance(found, str):
                    cells.append(found)
                    continue
                if calibrator == "inference":
                    plain[count] = found[0]
                ratio = f", {found[0] / plain[count]:.2f}x" if count in plain else ""
                cells.append(f"{found[0]:.1f} s{ratio}, {found[1]:.2f} GB")
            yield cells


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="ms_hybrid_s")
    parser.add_argument("--images", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--calibrators", nargs="+", choices=CALIBRATORS, default=list(CALIBRATORS))
    arguments = parser.parse_args()
    lines = []
    for line in rows(arguments.model, arguments.images, arguments.calibrators):
        print(" | ".join(map(str, line)), flush=True)
        lines.append(line)
    command = f"python -m benchmarks.calibration {arguments.model} --images {' '.join(map(str, arguments.images))}"
    headings = ("calibrator", *(f"{count} images" for count in arguments.images))
    record(f"Calibration, {arguments.model}", command, table(headings, lines), ("torch", "onnxruntime"))


if __name__ == "__main__":
    main()
