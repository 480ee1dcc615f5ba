"""INT8 made of FP32 against INT8 made of FP16: what the compiler and what old ONNX Runtimes make of both.

    pip install --target build/ort-1.28.0 --no-deps onnxruntime==1.28.0
    python -m benchmarks.truncation [MODEL ...] [--gpu sm89] [--onnxruntime build/ort-1.28.0 ...]

ONNX Runtime before 1.30 truncates FP16 where QuantizeLinear makes INT8 of it on a CPU (`runtime.truncation`). Each
model is quantized by the default rules and as `--quantize '*'` does, in both forms, and compiled: kernels, fused
attentions, bytes. Each ONNX Runtime quantizes the nine numbers, and runs the graphs of the default rules: relative L2
of the logits against the FP32 graph's, on photographs that were not calibrated on, demo weights. (Wheels before 1.19
need `numpy<2` in the same folder.)
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto

from benchmarks.quantization import Subject, Variant, built, deployed, planned
from benchmarks.results import record, table
from spach_deploy.common.metrics import relative_l2
from spach_deploy.quantization.formats import INT8
from spach_deploy.quantization.plan import Scaling
from spach_deploy.quantization.scales import Method
from spach_deploy.quantization.sites import Selection
from tests.protos import equalize_graph, initializers, mark_sites, producers

MODELS = ("trans_xxs", "ms_conv_xxs", "ms_mlp_xxs", "ms_hybrid_s")
EVERYTHING = Selection(quantize=("*",))
_CALIBRATION, _HELD_OUT = 16, 4
_CHILD = """
import sys
import numpy as np
import onnxruntime
from spach_deploy.runtime.onnxruntime_runner import truncating_runtime
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
images = np.load(sys.argv[1])
print(onnxruntime.__version__, truncating_runtime() is not None)
for path in sys.argv[2:]:
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        logits = np.concatenate([session.run(["logits"], {"input": image[None]})[0] for image in images])
        np.save(path + ".npy", logits)
    except Exception as error:
        print(str(error).splitlines()[0], file=sys.stderr)
"""


def quantized(subject: Subject, selection: Selection) -> ModelProto:
    """What spach-export would build from."""
    model, _, plan = planned(subject, Variant("", Scaling(INT8, Method.MAX), selection))
    changed = ModelProto()
    changed.CopyFrom(model)
    equalize_graph(changed, plan)
    ranges = subject.ranges(changed)
    mark_sites(changed, plan)
    return deployed(changed, plan, ranges)


def of_fp16(model: ModelProto) -> ModelProto:
    """The same with INT8 made of FP16, in place of FP32 that FP16 was cast to."""
    other = ModelProto()
    other.CopyFrom(model)
    made, constants = producers(other.graph), initializers(other.graph)
    for forth in [node for node in other.graph.node if node.op_type == "QuantizeLinear"]:
        stem = forth.name.removesuffix("/quantize")
        back = made[f"{stem}/dequantize"]
        cast = made.get(forth.input[0])
        if cast is None or cast.op_type != "Cast" or constants[f"{stem}/scale"].data_type != TensorProto.FLOAT16:
            continue  # FP32 in either form, as a softmax is
        forth.input[:] = [cast.input[0], f"{stem}/scale", f"{stem}/zero"]
        back.input[1:] = forth.input[1:]
        other.graph.node.remove(cast)
    return other


def compiled(name: str, subject: Subject, gpu: str) -> list[list[object]]:
    """Rows of one model: rules, then for each form kernels, fused attentions, MB and the plan's MB."""
    rows = []
    for rules, selection in (("default", Selection()), ("everything", EVERYTHING)):
        model = quantized(subject, selection)
        for form, graph in (("FP16", of_fp16(model)), ("FP32", model)):
            kernels, attentions, _, moved, size = built(graph, gpu)
            rows.append([f"{name}, {rules}", form, kernels, attentions, moved, size])
            print(*rows[-1], sep=" | ", flush=True)
    return rows


def answered(folder: Path | None, graphs: Sequence[Path], images: Path) -> tuple[str, bool, list[str]]:
    """Version of the ONNX Runtime in `folder` (None: the usual one), whether it truncates, and each graph's error."""
    path = os.pathsep.join(filter(None, (None if folder is None else str(folder), os.environ.get("PYTHONPATH", ""))))
    command = [sys.executable, "-c", _CHILD, str(images), *map(str, graphs)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{folder}: {done.stderr.strip().splitlines()[-1]}")
    version, truncates = done.stdout.split()
    return version, truncates == "True", [_error(graph) for graph in graphs]


def _error(graph: Path) -> str:
    file, exact = graph.with_name(f"{graph.name}.npy"), np.load(graph.parent / "exact.npy")
    if not file.exists():
        return "does not load"
    error = relative_l2(np.load(file), exact)
    file.unlink()
    return f"{error:.1e}"


def ran(name: str, subject: Subject, folders: Sequence[Path]) -> list[list[object]]:
    """Rows of one model: version, whether it truncates the nine numbers, relative L2 of both forms."""
    model = quantized(subject, Selection())
    with tempfile.TemporaryDirectory() as place:
        np.save(Path(place) / "images.npy", subject.images)
        np.save(Path(place) / "exact.npy", subject.logits)
        graphs = [Path(place) / f"{form}.onnx" for form in ("FP16", "FP32")]
        for path, graph in zip(graphs, (of_fp16(model), model), strict=True):
            onnx.save(graph, path)
        rows: list[list[object]] = []
        for folder in (*folders, None):
            version, truncates, errors = answered(folder, graphs, Path(place) / "images.npy")
            rows.append([name, version, "yes" if truncates else "no", *errors])
            print(*rows[-1], sep=" | ", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--onnxruntime", nargs="*", type=Path, default=[], metavar="FOLDER")
    parser.add_argument("--gpu", default="sm89")
    arguments = parser.parse_args()
    plans, runs = [], []
    for name in arguments.models:
        subject = Subject(name, _CALIBRATION, _HELD_OUT)
        plans += compiled(name, subject, arguments.gpu)
        runs += ran(name, subject, arguments.onnxruntime)
    of_plans = table(("graph", "INT8 is made of", "kernels", "fused attentions", "MB at batch 8", "plan MB"), plans)
    of_runs = table(("model", "ONNX Runtime", "truncates", "rel. L2, INT8 of FP16", "rel. L2, INT8 of FP32"), runs)
    body = f"{of_plans}\n\nOn the CPU, {_HELD_OUT} photographs:\n\n{of_runs}"
    folders = " ".join(map(str, arguments.onnxruntime))
    asked = f"{' '.join(arguments.models)} --gpu {arguments.gpu}{f' --onnxruntime {folders}' if folders else ''}"
    command = f"python -m benchmarks.truncation {asked}"
    record("INT8 of FP32, INT8 of FP16", command, body, ("torch", "onnxruntime", "tensorrt-rtx"))


if __name__ == "__main__":
    main()
