"""What eight bits cost and save, by method, equalization, weight scales and layers: logits, kernels, bytes, plan.

    python -m benchmarks.quantization [MODEL] [--images 32] [--held-out 16] [--gpu sm89]

Relative L2 of the logits on photographs that were not calibrated on, demo weights. Weights per channel or per tensor:
one row for all layers, one with every kind of layer per tensor by itself, so that a choice can be made layer by layer.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto

from benchmarks.photographs import calibration_photographs, held_out_photographs
from benchmarks.results import record, table
from spach_deploy.blocks import rewrite
from spach_deploy.bundle.outputs import INPUT, LOGITS
from spach_deploy.common.metrics import relative_l2
from spach_deploy.data.preprocess import normalize
from spach_deploy.engine.build import build_engine
from spach_deploy.engine.flavours import TensorRTForRTX
from spach_deploy.engine.plan_facts import read_plan_facts
from spach_deploy.graph.editing import as_proto
from spach_deploy.graph.export import export_canonical
from spach_deploy.graph.passes import TENSORRT_PASSES, apply_passes
from spach_deploy.graph.precision.ranges import Ranges
from spach_deploy.models import load_model
from spach_deploy.options.gpus import parse_gpus
from spach_deploy.options.specs import EngineTarget, ModelSpec, Precision, Preprocessing
from spach_deploy.quantization.formats import FP8, INT8, Float32
from spach_deploy.quantization.plan import QuantizationPlan, Scaling
from spach_deploy.quantization.quantize import QuantizableSites
from spach_deploy.quantization.scales import Method
from spach_deploy.quantization.sites import LayerKind, Selection
from spach_deploy.quantization.statistics import TensorStatistics
from tests.protos import (
    Collector,
    candidates,
    correct_biases,
    equalize_graph,
    in_place,
    insert_qdq,
    mark_sites,
    measure_ranges,
    open_session,
    plan_from_statistics,
    type_graph,
)

BATCH = 8


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row: what is quantized and how. `per_tensor` takes module names."""

    name: str
    scaling: Scaling
    selection: Selection = dataclasses.field(default_factory=Selection)
    equalize: bool = True
    correct: bool = True
    per_tensor: Callable[[str], bool] | None = None


def variants() -> Iterator[Variant]:
    """All rows."""
    yield Variant("INT8", Scaling(INT8, Method.MAX))
    yield Variant("INT8, biases not corrected", Scaling(INT8, Method.MAX), correct=False)
    yield Variant("INT8, not equalized", Scaling(INT8, Method.MAX), equalize=False)
    yield Variant("INT8, neither", Scaling(INT8, Method.MAX), equalize=False, correct=False)
    for method in (Method.PERCENTILE, Method.ENTROPY, Method.MSE):
        yield Variant(f"INT8, {method.value}", Scaling(INT8, method))
    yield Variant("INT8, head too", Scaling(INT8, Method.MAX), Selection(quantize=("head",)))
    yield Variant("INT8, stem too", Scaling(INT8, Method.MAX), Selection(quantize=("stem.*",)))
    yield Variant("INT8, downsampling too", Scaling(INT8, Method.MAX), Selection(quantize=("layer?.0.net.*",)))
    yield Variant("INT8, depthwise too", Scaling(INT8, Method.MAX), Selection(quantize=("*.cpe_net.*",)))
    yield Variant("INT8, attention too", Scaling(INT8, Method.MAX), Selection(quantize=("*.spatial_func",)))
    yield Variant("INT8, proj in half", Scaling(INT8, Method.MAX), Selection(keep_float=("*.proj",)))
    yield Variant("INT8, weights per tensor", Scaling(INT8, Method.MAX), per_tensor=lambda module: True)
    for layer in ("qkv", "proj", "fc1", "fc2"):
        yield Variant(f"INT8, {layer} per tensor", Scaling(INT8, Method.MAX), per_tensor=_ends_with(layer))
    yield Variant("FP8", Scaling(FP8, Method.MAX))
    yield Variant("FP8, weights per tensor", Scaling(FP8, Method.MAX), per_tensor=lambda module: True)
    yield Variant("FP8, proj in half", Scaling(FP8, Method.MAX), Selection(keep_float=("*.proj",)))


def _ends_with(layer: str) -> Callable[[str], bool]:
    return lambda module: module.endswith(layer)


class Subject:
    """A model: its graph by form, statistics of everything, and the logits to be met."""

    def __init__(self, name: str, images: int, held_out: int) -> None:
        loaded = load_model(ModelSpec(name))
        preprocessing = Preprocessing.for_size(loaded.image_size)
        self._loaded = loaded
        self._calibration = prepared(calibration_photographs(images), preprocessing)
        self.images = prepared(held_out_photographs(held_out), preprocessing)
        self._graphs: dict[bool, ModelProto] = {}
        self._statistics: dict[bool, dict[str, TensorStatistics]] = {}
        self._ranges: Ranges | None = None
        self.logits = logits_of(self.graph(depthwise=False), self.images)

    def graph(self, *, depthwise: bool) -> ModelProto:
        """FP32, with the residuals beside the depthwise kernels where these are quantized."""
        if depthwise not in self._graphs:
            quantized = ("*.cpe_net.*",) if depthwise else ()
            static = rewrite(self._loaded.model, (), quantized).model
            self._graphs[depthwise] = as_proto(export_canonical(static, self._loaded.image_size))
        return self._graphs[depthwise]

    def statistics(self, *, depthwise: bool) -> dict[str, TensorStatistics]:
        """Of the inputs of all sites, over the calibration photographs."""
        if depthwise not in self._statistics:
            model = self.graph(depthwise=depthwise)
            everything = candidates(model, Selection(quantize=("*",)), Scaling(INT8, Method.MSE))
            collector = Collector(model, everything.wanted)
            for image in self._calibration:
                collector.run({INPUT: image[None]})
            self._statistics[depthwise] = collector.statistics
        return self._statistics[depthwise]

    def ranges(self, model: ModelProto) -> Ranges:
        """Of the equalized graph, on a few photographs."""
        return measure_ranges(model, ({INPUT: image[None]} for image in self._calibration[:4]))


def prepared(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], preprocessing: Preprocessing) -> Float32:
    """uint8 (n, H, W, 3) through the evaluation transform: float32 (n, 3, S, S)."""
    from PIL import Image

    from spach_deploy.data.preprocess import pixels as transformed

    return normalize(np.stack([transformed(Image.fromarray(image), preprocessing) for image in pixels]), preprocessing)


def logits_of(model: ModelProto, images: Float32) -> Float32:
    """In ONNX Runtime, two images at a time."""
    session = open_session(model)
    parts = [session.run([LOGITS], {INPUT: images[start : start + 2]})[0] for start in range(0, len(images), 2)]
    return np.concatenate(parts)


def planned(subject: Subject, variant: Variant) -> tuple[ModelProto, QuantizableSites, QuantizationPlan]:
    """The FP32 graph, the layers and the plan."""
    depthwise = any("cpe_net" in pattern for pattern in variant.selection.quantize)
    model = subject.graph(depthwise=depthwise)
    chosen = candidates(model, variant.selection, variant.scaling)
    modules = [site.module for site in chosen.quantized]
    per_tensor = frozenset(filter(variant.per_tensor, modules)) if variant.per_tensor else frozenset()
    scaling = dataclasses.replace(variant.scaling, per_tensor=per_tensor)
    statistics = subject.statistics(depthwise=depthwise)
    plan = plan_from_statistics(model, chosen, statistics, scaling, equalize=variant.equalize)
    if not variant.correct:
        plan = dataclasses.replace(plan, sites=tuple(dataclasses.replace(s, correction=()) for s in plan.sites))
    return model, chosen, plan


def deployed(model: ModelProto, plan: QuantizationPlan, ranges: Ranges) -> ModelProto:
    """What engines are built from; `model` is equalized and marked, and is changed."""
    in_place(apply_passes, model, TENSORRT_PASSES)
    correct_biases(model, plan)
    return insert_qdq(type_graph(model, Precision.FP16, ranges).model, plan)


def row(subject: Subject, variant: Variant, gpu: str) -> list[object]:
    """Figures of one variant."""
    model, _, plan = planned(subject, variant)
    changed = ModelProto()
    changed.CopyFrom(model)
    equalize_graph(changed, plan)
    ranges = subject.ranges(changed)
    mark_sites(changed, plan)
    exact = ModelProto()
    exact.CopyFrom(changed)
    correct_biases(exact, plan)
    logits = logits_of(insert_qdq(exact, plan), subject.images)
    relative = relative_l2(logits, subject.logits)
    typed = deployed(changed, plan, ranges)
    weighted = [site for site in plan.sites if site.kind is not LayerKind.ATTENTION]
    return [variant.name, len(weighted), f"{relative:.4f}", *built(typed, gpu)]


def built(model: ModelProto, gpu: str) -> list[object]:
    """Kernels, fused attentions, products by type, megabytes moved and plan size."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        plan = build_engine(path, EngineTarget(gpus=parse_gpus(gpu)), TensorRTForRTX(), precision=Precision.FP16).plan
    facts = read_plan_facts(plan)
    if facts is None:
        return ["not known", "", "", "", f"{len(plan) / 1e6:.0f}"]
    products = ", ".join(f"{count} {dtype}" for dtype, count in sorted(facts.products_by_dtype.items()))
    moved = facts.bytes_moved(BATCH)
    shown = "" if moved is None else f"{moved / 1e6:,.0f}"
    return [len(facts.kernels), facts.fused_attentions, products, shown, f"{len(plan) / 1e6:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="ms_hybrid_s")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--gpu", default="sm89")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these variants, printed and not recorded")
    arguments = parser.parse_args()
    subject = Subject(arguments.model, arguments.images, arguments.held_out)
    rows = []
    for variant in variants():
        if arguments.only and variant.name not in arguments.only:
            continue
        rows.append(row(subject, variant, arguments.gpu))
        print(" | ".join(map(str, rows[-1])), flush=True)
    if arguments.only:
        return
    headings = ("variant", "layers", "rel. L2", "kernels", "fused attentions", "products", "MB at batch 8", "plan MB")
    command = f"python -m benchmarks.quantization {arguments.model} --gpu {arguments.gpu}"
    record(f"Eight bits, {arguments.model}", command, table(headings, rows), ("torch", "onnxruntime", "tensorrt-rtx"))


if __name__ == "__main__":
    main()
