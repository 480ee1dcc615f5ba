"""ONNX Runtime's own tools on one graph, in their own environment.

    python onnxruntime_tools.py none|basic|vit|bert|quantize MODEL.onnx OUTPUT.onnx [--half] [options]

none: the graph as it is. basic: what a session at the basic level runs, standard operators only. vit, bert:
`transformers.optimizer` for that model type at `--level`; `--standard` turns off the fusions that make operators of
com.microsoft. quantize: `quantization.quantize_static` on the images of `--calibration`. `--half` converts the result
by the tool's own `convert_float_to_float16`. Inputs and outputs stay FP32.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto
from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.fusion_options import FusionOptions
from onnxruntime.transformers.optimizer import optimize_model

_CONTRIBUTED = (
    *("gelu", "bias_gelu", "gelu_approximation", "attention", "embed_layer_norm", "skip_layer_norm"),
    *("bias_skip_layer_norm", "qordered_matmul", "rotary_embeddings"),
)


class Images(CalibrationDataReader):  # type: ignore[misc]
    """One image at a time from an npz file's only array, float32 (n, 3, S, S)."""

    def __init__(self, file: Path, name: str) -> None:
        with np.load(file) as content:
            images = next(iter(content.values()))
        self._feeds: Iterator[dict[str, Any]] = iter([{name: image[None]} for image in images])

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


def basic(source: Path, output: Path) -> ModelProto:
    """What a session at the basic level runs."""
    options = SessionOptions()
    options.graph_optimization_level = GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(output)
    InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return onnx.load(output)


def quantized(source: Path, output: Path, calibration: Path) -> ModelProto:
    """Preprocessed and quantized as the tool's documentation has it for TensorRT: symmetric, weights per channel.

    Only what computes products is quantized; biases stay in float, which TensorRT asks for.
    """
    prepared = output.with_suffix(".prepared.onnx")
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        output,
        Images(calibration, onnx.load(prepared).graph.input[0].name),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv", "MatMul", "Gemm"],
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
    )
    return onnx.load(output)


def fused(source: Path, kind: str, level: int, standard: bool) -> ModelProto:
    """By `transformers.optimizer`."""
    options = FusionOptions(kind)
    if standard:
        for fusion in _CONTRIBUTED:
            setattr(options, f"enable_{fusion}", False)
    model: ModelProto = optimize_model(str(source), kind, optimization_options=options, opt_level=level).model
    return model


def half(model: ModelProto) -> ModelProto:
    """Without its shape inference where that trips over what other tools of the same package wrote."""
    copy = ModelProto()
    copy.CopyFrom(model)
    try:
        converted: ModelProto = convert_float_to_float16(copy, keep_io_types=True)
    except onnx.shape_inference.InferenceError:
        converted = convert_float_to_float16(model, keep_io_types=True, disable_shape_infer=True)
    return converted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=["none", "basic", "vit", "bert", "quantize"])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--half", action="store_true")
    parser.add_argument("--level", type=int, choices=[0, 1, 2, 99], default=1)
    parser.add_argument("--standard", action="store_true")
    parser.add_argument("--calibration", type=Path)
    arguments = parser.parse_args()
    match arguments.recipe:
        case "none":
            result = onnx.load(arguments.model)
        case "basic":
            result = basic(arguments.model, arguments.output)
        case "quantize":
            result = quantized(arguments.model, arguments.output, arguments.calibration)
        case kind:
            result = fused(arguments.model, kind, arguments.level, arguments.standard)
    onnx.save(half(result) if arguments.half else result, arguments.output)


if __name__ == "__main__":
    main()
