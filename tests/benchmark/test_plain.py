"""The plain ways: runtimes' own conversions have a bundle's interface and give the reference's answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest

from spach_deploy.benchmark.plain import PlainModel, plain_onnx, plain_openvino, save_openvino
from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.schema import Manifest
from spach_deploy.bundle.store import GOLDEN, GRAPH, Bundle
from spach_deploy.common.metrics import worst_relative_l2
from spach_deploy.options.specs import EngineTarget, ExportOptions, Flavour, IODtype, ModelSpec, OutputSpec, Precision
from spach_deploy.pipeline.export import export
from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner
from spach_deploy.validation.live_reference import Weights, rebuild
from tests import small_bundles

Array = npt.NDArray[Any]

ROUNDING = 1e-5


@pytest.fixture(scope="module", params=[IODtype.FP32, IODtype.UINT8], ids=["floats", "pixels"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """A small FP32 bundle that gives logits, probabilities and the best classes."""
    outputs = OutputSpec(top_k=3, softmax=True, io_dtype=request.param)
    model = ModelSpec(small_bundles.NAME, image_size=small_bundles.SIZE, num_classes=small_bundles.CLASSES)
    target = tmp_path_factory.mktemp("plain") / "bundle"
    with small_bundles.registered():
        export(ExportOptions(model, Precision.FP32, outputs, EngineTarget(Flavour.NONE), output=target))
        yield Bundle.open(target)


def plain_model(manifest: Manifest) -> PlainModel:
    return PlainModel(rebuild(manifest.model, Weights(), manifest.outputs).model, manifest)


def check(made: Mapping[str, Array], bundle: Bundle) -> None:
    """The outputs of the golden images are those of the bundle's own graph, in its names, dtypes and order."""
    manifest, golden = bundle.manifest, Golden.load(bundle.file(GOLDEN))
    with OnnxRuntimeRunner(bundle.file(GRAPH)) as own:
        expected = own.run({manifest.inputs[0].name: golden.input})
    assert [*made] == [tensor.name for tensor in manifest.outputs]
    for tensor in manifest.outputs:
        values = made[tensor.name]
        assert str(values.dtype) == tensor.dtype
        if values.dtype.kind == "f":
            assert worst_relative_l2(values, expected[tensor.name]) < ROUNDING
        else:
            np.testing.assert_array_equal(values, expected[tensor.name])


def test_openvinos_own_conversion(bundle: Bundle, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    save_openvino(plain_openvino(plain_model(bundle.manifest), bundle.manifest), tmp_path / "plain.xml")
    compiled = openvino.Core().compile_model(tmp_path / "plain.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    made = compiled({bundle.manifest.inputs[0].name: Golden.load(bundle.file(GOLDEN)).input})
    check({port.get_any_name(): values for port, values in made.items()}, bundle)


def test_torchs_own_export(bundle: Bundle, tmp_path: Path) -> None:
    plain_onnx(plain_model(bundle.manifest), bundle.manifest, tmp_path / "plain.onnx")
    with OnnxRuntimeRunner(tmp_path / "plain.onnx") as runner:
        check(runner.run({bundle.manifest.inputs[0].name: Golden.load(bundle.file(GOLDEN)).input}), bundle)
    shape = onnxruntime.InferenceSession(tmp_path / "plain.onnx").get_inputs()[0].shape
    assert not isinstance(shape[0], int), "the batch is free"
