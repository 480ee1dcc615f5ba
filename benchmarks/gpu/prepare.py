"""Graphs, images, right answers and what each precision may lose, once, on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import ModelProto

from benchmarks.kernels import formed, plain_export
from benchmarks.photographs import calibration_photographs, held_out_photographs
from benchmarks.quantization import prepared
from spach_deploy.blocks import rewrite
from spach_deploy.bundle.outputs import INPUT
from spach_deploy.graph.editing import as_proto
from spach_deploy.graph.export import export_canonical
from spach_deploy.graph.passes import TENSORRT_PASSES, apply_passes
from spach_deploy.models.checkpoint import load_model
from spach_deploy.models.spach import Spach
from spach_deploy.options.specs import ModelSpec, Precision, Preprocessing
from spach_deploy.quantization.fake_quantization import fake_quantized
from spach_deploy.quantization.formats import INT8
from spach_deploy.quantization.plan import QuantizationPlan, Scaling
from spach_deploy.quantization.scales import Method
from spach_deploy.quantization.sites import Selection
from spach_deploy.validation.tolerance import derive_tolerances
from tests.protos import (
    Collector,
    candidates,
    correct_biases,
    equalize_graph,
    in_place,
    insert_qdq,
    mark_sites,
    measure_ranges,
    plan_from_statistics,
    type_graph,
)

IMAGES, CALIBRATION = 8, 16
ALLOWED, GOLDEN = "allowed.json", "images.npz"


def prepare(name: str, folder: Path, image_size: int | None = None) -> None:
    """Write everything into `folder`; what is there already is kept."""
    if (folder / ALLOWED).is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    loaded = load_model(ModelSpec(name, image_size=image_size))
    assert isinstance(loaded.model, Spach)
    preprocessing = Preprocessing.for_size(loaded.image_size)
    images = prepared(held_out_photographs(IMAGES), preprocessing)
    with torch.inference_mode():
        logits = loaded.model(torch.from_numpy(images)).numpy()
    np.savez(folder / GOLDEN, images=images, logits=logits)
    static = rewrite(loaded.model, (), ()).model
    canonical = as_proto(export_canonical(static, loaded.image_size))
    calibration = prepared(calibration_photographs(CALIBRATION), preprocessing)
    for graph, model in (
        ("plain", plain_export(loaded.model)),
        ("convolutions", formed(loaded.model, ["shift_depthwise"])),
        ("ours", formed(loaded.model)),
    ):
        onnx.save(model, folder / f"{graph}-fp32.onnx")
        onnx.save(type_graph(model, Precision.FP16, None).model, folder / f"{graph}-fp16.onnx")
    plan = _plan(canonical, calibration)
    onnx.save(_eight_bits(canonical, plan, calibration), folder / "ours-int8.onnx")
    allowed = {
        precision: derive_tolerances(
            loaded.model, images, {"logits": logits}, half, loaded.model.outputs, fake_quantized=twin
        )
        .engine.outputs["logits"]
        .rel_l2
        for precision, half, twin in (
            ("fp32", Precision.FP32, None),
            ("fp16", Precision.FP16, None),
            ("int8", Precision.FP16, fake_quantized(static, plan)),
        )
    }
    (folder / ALLOWED).write_text(json.dumps(allowed), encoding="utf-8")


def _plan(canonical: ModelProto, calibration: np.ndarray) -> QuantizationPlan:
    scaling = Scaling(INT8, Method.MAX)
    chosen = candidates(canonical, Selection(), scaling)
    collector = Collector(canonical, chosen.wanted, histograms=False)
    for image in calibration:
        collector.run({INPUT: image[None]})
    return plan_from_statistics(canonical, chosen, collector.statistics, scaling)


def _eight_bits(canonical: ModelProto, plan: QuantizationPlan, calibration: np.ndarray) -> ModelProto:
    changed = ModelProto()
    changed.CopyFrom(canonical)
    equalize_graph(changed, plan)
    ranges = measure_ranges(changed, ({INPUT: image[None]} for image in calibration[:4]))
    mark_sites(changed, plan)
    in_place(apply_passes, changed, TENSORRT_PASSES)
    correct_biases(changed, plan)
    return insert_qdq(type_graph(changed, Precision.FP16, ranges).model, plan)
