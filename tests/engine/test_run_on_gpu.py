"""What only a machine with an RTX GPU shows: the plan runs, and computes what ONNX Runtime computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spach_deploy.engine.build import build_engine
from spach_deploy.engine.flavours import FLAVOURS, EngineFlavour
from spach_deploy.options.specs import BatchProfile, EngineTarget, Flavour, Precision
from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner
from spach_deploy.runtime.tensorrt_runner import TensorRTRunner, why_engine_cannot_run_here
from tests.engine import tiny_graphs


def first_that_runs() -> EngineFlavour | None:
    """One flavour per process, so the first."""
    return next((FLAVOURS[flavour] for flavour in FLAVOURS if why_engine_cannot_run_here(flavour) is None), None)


@pytest.mark.gpu
@pytest.mark.skipif(first_that_runs() is None, reason=str(why_engine_cannot_run_here(Flavour.TENSORRT_RTX)))
def test_the_engine_computes_what_onnxruntime_computes(tmp_path: Path) -> None:
    flavour = first_that_runs()
    assert flavour is not None
    path = tiny_graphs.mlp(tmp_path / "mlp.onnx", "fp32")
    target = EngineTarget(batch=BatchProfile(2, 2, 4), tf32=False)
    plan = build_engine(path, target, flavour, precision=Precision.FP32).plan
    x = np.random.default_rng(0).standard_normal((7, tiny_graphs.WIDTH)).astype(np.float32)
    with OnnxRuntimeRunner(path) as graph, TensorRTRunner(plan, flavour.flavour) as engine:
        assert engine.input_specs == graph.input_specs
        assert engine.output_specs == graph.output_specs
        np.testing.assert_allclose(engine.run({"x": x})["y"], graph.run({"x": x})["y"], rtol=1e-4, atol=1e-5)
