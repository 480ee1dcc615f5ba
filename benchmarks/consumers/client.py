"""Runs graphs in one runtime, in the environment that has it: `python client.py onnxruntime < cases > answers`.

A line of JSON comes in for each graph ({"graph": file, "images": file of float32, "shape": [N, C, H, W]}), and one goes
out for each run ({"graph": file, "batch": B, "logits": [[...], ...]} or {..., "error": words}); first a line with the
runtime's version. Each graph runs one image at a time, then all at once. Needs numpy and the runtime alone.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

Run = Callable[[Any], Any]


def onnxruntime() -> tuple[str, Callable[[str], Run]]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4

    def load(path: str) -> Run:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda images: session.run(["logits"], {"input": images})[0]

    return ort.__version__, load


def openvino() -> tuple[str, Callable[[str], Run]]:
    import openvino as ov

    core = ov.Core()
    hints = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}

    def load(path: str) -> Run:
        compiled = core.compile_model(path, "CPU", hints)
        return lambda images: compiled({"input": images})["logits"]

    return ov.__version__.split("-")[0], load


def opencv() -> tuple[str, Callable[[str], Run]]:
    os.environ["OPENCV_LOG_LEVEL"] = "SILENT"
    import cv2

    cv2.setNumThreads(1)

    def load(path: str) -> Run:
        net = cv2.dnn.readNetFromONNX(path)

        def run(images: Any) -> Any:
            net.setInput(images, "input")
            return net.forward("logits")

        return run

    return cv2.__version__, load


RUNTIMES = {"onnxruntime": onnxruntime, "openvino": openvino, "opencv": opencv}


def runs(load: Callable[[str], Run], graph: str, images: Any) -> Iterator[dict[str, object]]:
    for batch in (1, len(images)):
        found: dict[str, object] = {"graph": graph, "batch": batch}
        try:
            run = load(graph)
            parts = [np.array(run(images[at : at + batch])) for at in range(0, len(images), batch)]
            yield {**found, "logits": np.concatenate(parts).reshape(len(images), -1).astype(float).tolist()}
        except Exception as error:  # whatever a runtime raises is its answer
            yield {**found, "error": str(error)}


def main() -> None:
    version, load = RUNTIMES[sys.argv[1]]()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a runtime prints is no answer
    for line in [{"version": version}, *map(json.loads, sys.stdin)]:
        if "version" in line:
            print(json.dumps(line), file=answers, flush=True)
            continue
        images = np.fromfile(line["images"], np.float32).reshape(line["shape"])
        for found in runs(load, line["graph"], images):
            print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
