"""Small models of every mixing type, calibrated on pictures, each made once per run of the tests."""

from __future__ import annotations

import fnmatch
import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto
from PIL import Image
from torch import nn

from spach_deploy.blocks import RewriteResult, rewrite
from spach_deploy.data.preprocess import normalize, pixels
from spach_deploy.graph.editing import as_proto
from spach_deploy.graph.export import export_canonical
from spach_deploy.options.specs import Precision, Preprocessing
from spach_deploy.quantization.formats import INT8, EightBitFormat
from spach_deploy.quantization.plan import QuantizationPlan, Scaling
from spach_deploy.quantization.scales import Method
from spach_deploy.quantization.sites import Selection
from spach_deploy.quantization.statistics import TensorStatistics
from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner
from tests import static_models
from tests.protos import (
    Collector,
    apply_to_graph,
    candidates,
    correct_biases,
    insert_qdq,
    measure_ranges,
    plan_from_statistics,
    type_graph,
)
from tests.quantization.small_quantized import pictures
from tests.shared import once

Float32 = NDArray[np.float32]

KINDS = tuple(static_models.ARCHITECTURES)
"""Every mixing type, a convolutional stem and shared spatial MLPs among them."""


def _depthwise(quantize: tuple[str, ...]) -> bool:
    """Whether depthwise convolutions are asked for, so that no residual may be folded into them."""
    return any(fnmatch.fnmatchcase("layer.cpe_net.net.1", pattern) for pattern in quantize)


def static(kind: str, quantize: tuple[str, ...] = ()) -> nn.Module:
    """The static model that the graph is exported from; not to be changed."""
    return _rewritten(kind, _depthwise(quantize)).model


@functools.cache
def _rewritten(kind: str, depthwise: bool) -> RewriteResult:
    return rewrite(static_models.small_model(kind), (), ("*.cpe_net.net.1",) if depthwise else ())


def canonical(kind: str, quantize: tuple[str, ...] = ()) -> ModelProto:
    """The FP32 graph of `static(kind, quantize)`; a copy."""
    return onnx.load_from_string(_bytes(kind, _depthwise(quantize)))


@functools.cache
def _bytes(kind: str, depthwise: bool) -> bytes:
    def make(target: Path) -> None:
        graph = as_proto(export_canonical(_rewritten(kind, depthwise).model, static_models.IMAGE_SIZE))
        target.write_bytes(graph.SerializeToString())

    return once(f"canonical-for-eight-bits/{kind}-{depthwise}.onnx", make).read_bytes()


@functools.cache
def inputs(count: int = 8, first: int = 1) -> Float32:
    """Normalized pictures (count, 3, S, S), through the evaluation transform."""
    preprocessing = Preprocessing.for_size(static_models.IMAGE_SIZE)
    found = [pixels(Image.fromarray(picture), preprocessing) for picture in pictures(count, first)]
    return normalize(np.stack(found), preprocessing)


def statistics(kind: str, quantize: tuple[str, ...] = (), *, histograms: bool = False) -> dict[str, TensorStatistics]:
    """Of the inputs of all sites, by channel."""
    return _statistics(kind, _depthwise(quantize), histograms)


@functools.cache
def _statistics(kind: str, depthwise: bool, histograms: bool) -> dict[str, TensorStatistics]:
    model = onnx.load_from_string(_bytes(kind, depthwise))
    everything = candidates(model, Selection(quantize=("*",)), Scaling(INT8, Method.MAX))
    collector = Collector(model, everything.wanted, histograms=histograms, threads=1)
    for image in inputs():
        collector.run({"input": image[None]})
    return collector.statistics


@functools.cache
def plan(
    kind: str,
    form: EightBitFormat,
    quantize: tuple[str, ...] = (),
    method: Method = Method.MAX,
    *,
    half: bool = True,
    equalize: bool = True,
    per_tensor: frozenset[str] = frozenset(),
) -> QuantizationPlan:
    """A plan from `statistics`."""
    model, scaling = canonical(kind, quantize), Scaling(form, method, half=half, per_tensor=per_tensor)
    seen = statistics(kind, quantize, histograms=method.needs_histograms)
    chosen = candidates(model, Selection(quantize=quantize), scaling)
    return plan_from_statistics(model, chosen, seen, scaling, equalize=equalize)


def quantized(
    kind: str, form: EightBitFormat, quantize: tuple[str, ...] = (), rest: Precision = Precision.FP32, **options: Any
) -> ModelProto:
    """The typed graph of `plan(kind, form, quantize)`, what is not quantized in `rest`; a copy."""
    made = plan(kind, form, quantize, half=rest.is_half, **options)
    return insert_qdq(typed(kind, made, quantize, rest), made)


def typed(kind: str, made: QuantizationPlan, quantize: tuple[str, ...], rest: Precision) -> ModelProto:
    """The typed graph into which the pairs of `made` go."""
    model = canonical(kind, quantize)
    apply_to_graph(model, made.equalized)
    ranges = measure_ranges(model, [{"input": inputs()}], threads=1) if rest.is_half else None
    correct_biases(model, made)
    return type_graph(model, rest, ranges).model


def run(model: ModelProto, images: Float32) -> Float32:
    """Logits of a graph in ONNX Runtime, as float32."""
    with OnnxRuntimeRunner(model.SerializeToString(), threads=1) as runner:
        logits: Float32 = runner.run({"input": images})["logits"].astype(np.float32)
    return logits
