"""Small bundles of the families beside SPACH, exported for real once per run of the tests, with every output."""

from __future__ import annotations

from pathlib import Path

from spach_deploy.options.specs import (
    EngineTarget,
    ExportOptions,
    Flavour,
    Hyperparameters,
    IODtype,
    ModelSpec,
    OutputSpec,
    Precision,
)
from spach_deploy.pipeline.export import export
from tests.blocks.test_families import FAMILIES
from tests.packaging.cpp import plans
from tests.shared import once

DIVISIONS = 6
"""Of the ShiftViT, others than its architecture's and than those that its tensors are assumed to mean."""


def bundle(family: str) -> Path:
    """FP16, uint8 pixels in, three best classes out, with a plan that the C++ double runs; not to be changed."""

    def make(target: Path) -> None:
        divisions = Hyperparameters(divisions=DIVISIONS if family == "shiftvit" else None)
        model = ModelSpec(f"small_{family}", architecture=FAMILIES[family], hyperparameters=divisions)
        outputs = OutputSpec(IODtype.UINT8, top_k=3, softmax=True)
        export(ExportOptions(model, Precision.FP16, outputs, EngineTarget(Flavour.NONE), output=target))
        plans.give_plan(target)

    return once(f"family-bundles/{family}", make)
