"""Rewrites that cost on CPUs are left out of graphs for them, and of no other."""

from __future__ import annotations

import pytest

from spach_deploy.models import own_module
from spach_deploy.options.specs import EngineTarget, ExportOptions, Flavour, ModelSpec, Precision
from spach_deploy.pipeline.steps.graph import rewrite_model
from tests import small_bundles, static_models


@pytest.mark.parametrize(
    ("flavour", "precision", "left_out"),
    [
        (Flavour.NONE, Precision.FP32, {"grid_stream"}),
        (Flavour.NONE, Precision.BF16, {"grid_stream", "fold_residual"}),
        (Flavour.TENSORRT_RTX, Precision.BF16, set()),
    ],
    ids=["fp32 on a CPU", "bf16 on a CPU", "bf16 in TensorRT"],
)
def test_rewrites_that_cost_on_a_cpu(flavour: Flavour, precision: Precision, left_out: set[str]) -> None:
    spec = ModelSpec(small_bundles.NAME, image_size=static_models.IMAGE_SIZE, num_classes=static_models.CLASSES)
    with small_bundles.registered():
        result = rewrite_model(own_module.load(spec), ExportOptions(spec, precision, engine=EngineTarget(flavour)))
    off = {name for name, outcome in result.outcomes.items() if any("turned off" in why for why in outcome.skipped)}
    assert off == left_out
