"""Olive's passes on one graph, in its own environment.

    python olive_tools.py MODEL.onnx OUTPUT.onnx [--transformers] [--half | --calibration FILE.npz]

OnnxPeepholeOptimizer, which is what `olive optimize` runs on an ONNX graph; `--transformers` adds
OrtTransformersOptimization (model type vit), `--half` OnnxFloatToFloat16, `--calibration` OnnxStaticQuantization with
the images of that file (symmetric, weights per channel, only what computes products).
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import olive
from olive.data.registry import Registry


@Registry.register_dataset("photographs")  # type: ignore[untyped-decorator]
def photographs(file: str, **_: Any) -> list[tuple[dict[str, Any], int]]:
    """The images of an npz file's only array, float32 (n, 3, S, S), each with a label that nobody reads."""
    with np.load(file) as content:
        return [({"input": image}, 0) for image in next(iter(content.values()))]


def passes(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """By name, in order."""
    chosen: dict[str, dict[str, Any]] = {"peephole": {"type": "OnnxPeepholeOptimizer"}}
    if arguments.transformers:
        chosen["transformers"] = {"type": "OrtTransformersOptimization", "model_type": "vit"}
    if arguments.half:
        chosen["half"] = {"type": "OnnxFloatToFloat16", "keep_io_types": True}
    if arguments.calibration:
        chosen["quantization"] = {
            "type": "OnnxStaticQuantization",
            "data_config": "photographs",
            "activation_type": "int8",
            "precision": "int8",
            "per_channel": True,
            "activation_symmetric": True,
            "weight_symmetric": True,
            "op_types_to_quantize": ["Conv", "MatMul", "Gemm"],
            "extra_options": {"QuantizeBias": False},
        }
    return chosen


def workflow(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What `olive run` reads."""
    accelerator = {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}
    dataset = {"type": "photographs", "params": {"file": str(arguments.calibration)}}
    return {
        "input_model": {"type": "OnnxModel", "model_path": str(arguments.model)},
        "systems": {"here": {"type": "LocalSystem", "accelerators": [accelerator]}},
        "target": "here",
        "data_configs": [{"name": "photographs", "type": "DataContainer", "load_dataset_config": dataset}]
        if arguments.calibration
        else [],
        "passes": passes(arguments),
        "cache_dir": str(folder / "cache"),
        "output_dir": str(folder / "output"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--transformers", action="store_true")
    parser.add_argument("--half", action="store_true")
    parser.add_argument("--calibration", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        olive.run(workflow(arguments, Path(folder)))
        shutil.copyfile(next((Path(folder) / "output").rglob("model.onnx")), arguments.output)


if __name__ == "__main__":
    main()
