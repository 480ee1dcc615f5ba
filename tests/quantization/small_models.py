"""Small models of every mixing type, calibrated on pictures, each made once per run of the tests."""

from __future__ import annotations

import functools

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto
from PIL import Image

from spach_deploy.data.preprocess import normalize, pixels
from spach_deploy.quantization.formats import INT8, EightBits
from spach_deploy.quantization.plan import QuantizationPlan, Scaling
from spach_deploy.quantization.quantize import Candidates, candidates, plan_from_statistics
from spach_deploy.quantization.scales import Method
from spach_deploy.quantization.sites import Selection
from spach_deploy.quantization.statistics import Collector, TensorStatistics
from spach_deploy.rewrites import rewrite
from spach_deploy.rewrites.static_modules import StaticSpach
from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner
from spach_deploy.specs import Preprocessing
from tests import static_models
from tests.quantization.small_quantized import pictures

Float32 = NDArray[np.float32]

KINDS = tuple(static_models.CONFIGS)
"""Every mixing type, a convolutional stem and shared spatial MLPs among them."""


def canonical(kind: str) -> ModelProto:
    """The FP32 graph of `static_models.small_model(kind)`; a copy."""
    return onnx.load_from_string(static_models.canonical_bytes(kind))


@functools.cache
def static(kind: str) -> StaticSpach:
    """The static model that the graph was exported from; not to be changed."""
    return rewrite(static_models.small_model(kind)).model


@functools.cache
def inputs(count: int = 8, first: int = 1) -> Float32:
    """Normalized pictures (count, 3, S, S), through the evaluation transform."""
    preprocessing = Preprocessing.for_size(static_models.IMAGE_SIZE)
    found = [pixels(Image.fromarray(picture), preprocessing) for picture in pictures(count, first)]
    return normalize(np.stack(found), preprocessing)


@functools.cache
def statistics(kind: str, *, histograms: bool = False) -> dict[str, TensorStatistics]:
    """Of the inputs of all sites, by channel."""
    model = canonical(kind)
    chosen = candidates(model, Selection(quantize=("*",)), Scaling(INT8, Method.MAX))
    collector = Collector(model, chosen.wanted, histograms=histograms, threads=1)
    for image in inputs():
        collector.run({"input": image[None]})
    return collector.statistics


def chosen(kind: str, form: EightBits, quantize: tuple[str, ...] = ()) -> Candidates:
    """Sites of a small model, and why some stay in float."""
    return candidates(canonical(kind), Selection(quantize=quantize), Scaling(form, Method.MAX))


def plan(
    kind: str,
    form: EightBits,
    quantize: tuple[str, ...] = (),
    method: Method = Method.MAX,
    *,
    half: bool = True,
    equalize: bool = True,
    per_tensor: frozenset[str] = frozenset(),
) -> QuantizationPlan:
    """A plan from `statistics`."""
    seen = statistics(kind, histograms=method.needs_histograms)
    scaling = Scaling(form, method, half=half, per_tensor=per_tensor)
    return plan_from_statistics(canonical(kind), chosen(kind, form, quantize), seen, scaling, equalize=equalize)


def run(model: ModelProto, images: Float32) -> Float32:
    """Logits of a graph in ONNX Runtime, as float32."""
    with OnnxRuntimeRunner(model.SerializeToString(), threads=1) as runner:
        logits: Float32 = runner.run({"input": images})["logits"].astype(np.float32)
    return logits
