"""Real exports, small ones: the bundle holds what it should, and says of itself what is so."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import safetensors.torch
import torch
from click.testing import Result
from onnx import ModelProto, TensorProto, helper, numpy_helper
from PIL import Image

from spach_deploy.blocks import RewriteResult, rewrite
from spach_deploy.bundle.schema import FileEntry
from spach_deploy.bundle.store import Bundle
from spach_deploy.common.errors import BundleError, MismatchError
from spach_deploy.common.progress import ExportObserver, Phase
from spach_deploy.graph.editing import tensor_of
from spach_deploy.graph.export import export_canonical
from spach_deploy.graph.passes import apply_passes
from spach_deploy.models.demo import load_demo_weights
from spach_deploy.models.published import ARCHITECTURES
from spach_deploy.models.registry import create_model
from spach_deploy.options.specs import BatchProfile, EngineTarget, ExportOptions, Flavour, ModelSpec, Precision
from spach_deploy.pipeline.export import export as export_bundle
from spach_deploy.pipeline.steps import graph as stages
from spach_deploy.validation.live_reference import Weights, rebuild
from spach_deploy.validation.tolerance import FP32_FACTOR
from tests import small_bundles
from tests.commands import contents, export, refusal

SMALL = ("--model", small_bundles.NAME, "--image-size", small_bundles.SIZE, "--num-classes", small_bundles.CLASSES)
NO_ENGINE = ("--engine", "none")

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")


class Export(NamedTuple):
    """What the command said and what it wrote."""

    result: Result
    bundle: Bundle


def exported(target: Path, *arguments: object) -> Export:
    with small_bundles.registered():
        result = export(*arguments, "-o", target)
    assert result.exit_code == 0, result.stderr
    assert "Traceback" not in result.stderr
    return Export(result, Bundle.open(target))


def graph_of(bundle: Bundle) -> ModelProto:
    return onnx.load(bundle.file("model.onnx"))


def golden_of(bundle: Bundle) -> dict[str, np.ndarray[Any, Any]]:
    with np.load(bundle.file("golden.npz")) as arrays:
        return dict(arrays)


def run(bundle: Bundle, images: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """The bundle's graph in ONNX Runtime, without any code of ours."""
    session = onnxruntime.InferenceSession(bundle.file("model.onnx"), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {session.get_inputs()[0].name: images}), strict=True))


def relative_l2(value: np.ndarray[Any, Any], reference: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(value.astype(np.float64) - reference) / np.linalg.norm(reference.astype(np.float64)))


def test_every_picture_that_was_skipped_is_named_once(tmp_path: Path) -> None:
    """Of 19 pictures 8 are judged on and all are measured: what is unreadable may be among either."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(18):
        pixels = np.random.default_rng(number).integers(0, 256, (36, 40, 3), np.uint8)
        Image.fromarray(pixels).save(photos / f"{number:02}.png")
    for name in ("00.png", "03.png", "19.heic"):
        (photos / name).write_bytes(b"no picture")
    result, _ = exported(tmp_path / "bundle", *SMALL, "--fp16", *NO_ENGINE, "--images", photos)
    skipped = [line.partition(":")[0] for line in result.stderr.splitlines() if line.startswith("Skipped ")]
    assert sorted(skipped) == ["Skipped 00.png", "Skipped 03.png", "Skipped 19.heic"]
    assert "Ranges were measured on 16 images of 19 from folder" in result.stderr  # no limit chose


def test_a_bundle_that_came_during_the_export_is_left_alone(tmp_path: Path) -> None:
    class Other(ExportObserver):
        """Another export, which ends first."""

        def started(self, phase: str) -> None:
            if phase == "validate the engine":
                shutil.copytree(small_bundles.bundle(), tmp_path / "b")

    model = ModelSpec(small_bundles.NAME, image_size=small_bundles.SIZE, num_classes=small_bundles.CLASSES)
    options = ExportOptions(model, engine=EngineTarget(Flavour.NONE), output=tmp_path / "b")
    with small_bundles.registered(), pytest.raises(BundleError, match="written there since this command began"):
        export_bundle(options, Other())
    assert Bundle.open(tmp_path / "b").manifest.precision.asked == "fp16"
    assert os.listdir(tmp_path) == ["b"]


# One export as the README types it, of the smallest model, with a real plan

REAL = ("--model", "ms_trans_xxs", "--image-size", "64", "--fp16", "--engine", "tensorrt-rtx", "--gpu", "sm89,sm86")


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Export:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt-rtx is not installed")
    return exported(tmp_path_factory.mktemp("real") / "bundle", *REAL, "--batch", "1:2:4", "-v")


def test_the_bundle_holds_what_it_should_and_its_hashes_are_right(real: Export) -> None:
    folder = real.bundle.path
    files = {"build.log", "engine.plan", "golden.npz", "manifest.json", "model.onnx", "report.html", "report.json"}
    assert {path.name for path in folder.iterdir()} == files
    listed = real.bundle.manifest.files
    assert set(listed) == files - {"manifest.json", "report.html", "report.json"}
    for name, entry in listed.items():
        content = (folder / name).read_bytes()
        assert entry == FileEntry(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    assert os.listdir(folder.parent) == ["bundle"]


def test_the_plan_is_a_plan_of_tensorrt_for_rtx(real: Export) -> None:
    plan = real.bundle.file("engine.plan").read_bytes()
    engine = real.bundle.manifest.engine
    assert plan[:4] == b"vtrt"
    assert int.from_bytes(plan[16:24], "little") == len(plan) == engine.bytes
    assert engine.flavour == "tensorrt-rtx"
    assert engine.gpus == ("sm86", "sm89")
    assert engine.batch == "1:2:4"
    assert engine.layers_by_dtype["fp16"] > 20
    assert "fp32" not in engine.layers_by_dtype
    assert engine.kernels is not None
    assert (engine.kernels.total or 0) > 50


def test_the_manifest_agrees_with_graph_and_golden_pack(real: Export) -> None:
    manifest, graph = real.bundle.manifest, graph_of(real.bundle)
    golden = golden_of(real.bundle)
    (image,), (logits,) = manifest.inputs, manifest.outputs
    assert (image.name, image.dtype, image.shape, image.layout) == ("input", "float32", (None, 3, 64, 64), "NCHW")
    assert (logits.name, logits.dtype, logits.shape) == ("logits", "float32", (None, 1000))
    for tensor, value in ((image, graph.graph.input[0]), (logits, graph.graph.output[0])):
        dims = value.type.tensor_type.shape.dim
        assert value.name == tensor.name
        assert helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) == tensor.dtype
        assert tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims) == tensor.shape
    shapes = {name: array.shape for name, array in golden.items() if array.dtype == np.float32}
    assert sorted(shapes.values()) == [(8, 3, 64, 64), (8, 1000)]
    assert manifest.batch == BatchProfile(1, 2, 4)
    assert (manifest.preprocessing.image_size, manifest.preprocessing.resize_size) == (64, 73)


def test_the_graph_is_in_half_and_computes_what_pytorch_does(real: Export) -> None:
    assert real.bundle.manifest.precision.asked == "fp16"
    graph = graph_of(real.bundle)
    kinds = {tensor.data_type for tensor in graph.graph.initializer if len(tensor.dims) >= 2}
    assert TensorProto.FLOAT16 in kinds
    model = create_model("ms_trans_xxs", image_size=64)
    load_demo_weights(model)
    images = np.random.default_rng(5).standard_normal((5, 3, 64, 64)).astype(np.float32)
    with torch.inference_mode():
        expected = model(torch.from_numpy(images)).numpy()
    assert 1e-6 < relative_l2(run(real.bundle, images)["logits"], expected) < 3e-3


def test_the_report_passed_and_says_that_weights_are_demo_weights(real: Export) -> None:
    report = json.loads(real.bundle.file("report.json").read_text())
    assert report["passed"] is True
    assert report["is_demo"] is True
    assert report["level"] in ("graph", "engine")  # the second where there is a GPU
    model = real.bundle.manifest.model
    assert (model.name, model.origin, model.checkpoint) == ("ms_trans_xxs", "demo", None)
    assert real.bundle.manifest.validation.passed
    assert any("not trained" in note for note in real.bundle.manifest.notes)
    assert "DEMO WEIGHTS, not trained" in real.result.stdout


def test_stdout_is_the_summary_and_stderr_the_progress(real: Export) -> None:
    phases = [phase.name for phase in real.bundle.manifest.phases]
    assert len(phases) > 8
    shown = [line for line in real.result.stderr.splitlines() if line.split("  ")[0] in phases]
    assert len(shown) == len(phases)  # --verbose: a line each
    assert not any(f"{name}  " in real.result.stdout for name in phases)
    assert "AGREED with PyTorch in FP32." in real.result.stdout
    assert "Level of evidence: " in real.result.stdout
    assert real.result.stdout.splitlines()[-1].startswith("Bundle: ")
    assert "engine     tensorrt-rtx" in real.result.stdout


# A checkpoint


CLASS_OPTIONS = ("--top-k", 3, "--softmax", "--io-dtype", "uint8", *NO_ENGINE, "--fp16")


def trained() -> dict[str, torch.Tensor]:
    """Weights that are not those of the demo."""
    with small_bundles.registered():
        model = create_model(small_bundles.NAME, image_size=small_bundles.SIZE, num_classes=small_bundles.CLASSES)
    load_demo_weights(model, seed=3)
    return model.state_dict()


@pytest.fixture(scope="session")
def pickled(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """From a file as training code saves it; the model is inferred from the tensors."""
    folder = tmp_path_factory.mktemp("pickled")
    args = argparse.Namespace(model=small_bundles.NAME, input_size=small_bundles.SIZE, lr=0.1)
    tensors = trained() | {"head_dist.bias": torch.zeros(3)}
    content = {"model": {f"module.{name}": value for name, value in tensors.items()}, "epoch": 7, "args": args}
    torch.save(content, folder / "run7.pth")
    more = ("--image-size", small_bundles.SIZE, "--ignore", "head_dist.*")
    return exported(folder / "bundle", "--checkpoint", folder / "run7.pth", *more, *CLASS_OPTIONS, "--json")


def test_json_is_the_manifest_and_nothing_else(pickled: Export) -> None:
    assert json.loads(pickled.result.stdout) == pickled.bundle.manifest.content()


def test_a_checkpoint_is_named_by_its_hash_and_what_was_unwrapped(pickled: Export) -> None:
    model = pickled.bundle.manifest.model
    assert (model.name, model.num_classes) == (small_bundles.NAME, small_bundles.CLASSES)
    assert (model.origin, model.checkpoint) == ("checkpoint", "run7.pth")
    content = (pickled.bundle.path.parent / "run7.pth").read_bytes()
    assert model.checkpoint_sha256 == hashlib.sha256(content).hexdigest()
    notes = " ".join(model.notes)
    assert "unwrapped model" in notes
    assert "removed `module.`" in notes
    assert "inferred" in notes
    assert "DEMO" not in pickled.result.output


def test_what_was_ignored_is_recorded_and_ignored_again(pickled: Export, tmp_path: Path) -> None:
    """By every command that takes the checkpoint later; a file without these tensors is the same."""
    model = pickled.bundle.manifest.model
    assert model.ignored == ("head_dist.*",)
    assert "--ignore 'head_dist.*' dropped module.head_dist.bias" in model.notes
    assert "--ignore 'head_dist.*'" in pickled.bundle.manifest.command
    torch.save(trained() | {"aux.bias": torch.zeros(3)}, tmp_path / "other.pth")
    safetensors.torch.save_file(trained(), tmp_path / "clean.safetensors")
    with small_bundles.registered():
        for weights in (
            Weights(pickled.bundle.path.parent / "run7.pth"),
            Weights(tmp_path / "clean.safetensors"),
            Weights(tmp_path / "other.pth", ignore=("aux.*",)),
        ):
            assert rebuild(model, weights, pickled.bundle.manifest.outputs).weights_sha256 == model.weights_sha256


def test_pixels_go_in_and_classes_come_out(pickled: Export) -> None:
    manifest, golden = pickled.bundle.manifest, golden_of(pickled.bundle)
    (image,) = manifest.inputs
    size, classes = small_bundles.SIZE, small_bundles.CLASSES
    assert (image.dtype, image.shape, image.layout) == ("uint8", (None, size, size, 3), "NHWC")
    assert {output.name: (output.dtype, output.shape) for output in manifest.outputs} == {
        "logits": ("float32", (None, classes)),
        "probabilities": ("float32", (None, classes)),
        "top_values": ("float32", (None, 3)),
        "top_indices": ("int64", (None, 3)),
    }
    pixels = next(array for array in golden.values() if array.dtype == np.uint8)
    expected = next(array for array in golden.values() if array.shape == (len(pixels), classes))
    got = run(pickled.bundle, pixels)
    assert relative_l2(got["logits"], expected) < 6e-3
    assert np.allclose(got["probabilities"], torch.from_numpy(got["logits"]).softmax(-1), atol=1e-6)
    assert np.array_equal(got["top_indices"], np.argsort(-got["logits"], axis=-1, kind="stable")[:, :3])
    assert np.array_equal(got["top_values"], np.take_along_axis(got["logits"], got["top_indices"], -1))


# Rewrites


def depthwise(bundle: Bundle) -> int:
    """Convolutions with groups that the graph has."""
    convolutions = [node for node in graph_of(bundle).graph.node if node.op_type == "Conv"]
    return sum(any(a.name == "group" and a.i > 1 for a in node.attribute) for node in convolutions)


@needs_rtx
def test_a_rewrite_that_is_left_out_leaves_its_form(real: Export, tmp_path: Path) -> None:
    flags = ("--fp16", "--engine", "tensorrt-rtx", "--gpu", "sm89", "--no-rewrite", "shift_depthwise")
    kept = exported(tmp_path / "kept", *SMALL, *flags).bundle
    assert depthwise(real.bundle) == 0
    assert depthwise(kept) > 0
    assert real.bundle.manifest.graph.passes["shift_depthwise"] > 0
    assert "shift_depthwise" not in {k for k, v in kept.manifest.graph.passes.items() if v}


def test_without_an_engine_depthwise_convolutions_stay(pickled: Export) -> None:
    assert depthwise(pickled.bundle) > 0


# Other image sizes


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["conv_xxs", "trans_xxs", "mlp_xxs", "ms_conv_xxs", "ms_trans_xxs", "ms_mlp_xxs", "ms_hybrid_xs+"]
)
def test_the_smallest_image_size_is_exported(name: str, tmp_path: Path) -> None:
    size = ARCHITECTURES[name].smallest_image_size
    flags = ("--model", name, "--image-size", size, *NO_ENGINE, "--fp16")
    assert exported(tmp_path / "b", *flags).bundle.manifest.inputs[0].shape == (None, 3, size, size)


# The same place twice


def test_a_bundle_is_replaced_only_with_overwrite(pickled: Export, tmp_path: Path) -> None:
    """By one of the same weights from another container."""
    safetensors.torch.save_file(trained(), tmp_path / "run7.safetensors")
    flags = ("--checkpoint", tmp_path / "run7.safetensors", *SMALL, *NO_ENGINE)
    small_bundles.copy(small_bundles.bundle(), tmp_path / "b")
    before = contents(tmp_path)
    with small_bundles.registered():
        sentence = refusal(export(*flags, "-o", tmp_path / "b"))
    assert "holds a bundle already. Give --overwrite" in sentence
    assert contents(tmp_path) == before
    assert Bundle.open(tmp_path / "b").plan is not None
    second = exported(tmp_path / "b", *flags, "--overwrite").bundle
    assert second.manifest.precision.asked == "fp32"
    assert second.plan is None
    assert sorted(os.listdir(tmp_path / "b")) == [
        *("golden.npz", "manifest.json", "model.onnx", "report.html", "report.json")
    ]
    assert sorted(os.listdir(tmp_path)) == ["b", "run7.safetensors"]
    first, model = pickled.bundle.manifest.model, second.manifest.model
    assert model.weights_sha256 == first.weights_sha256
    assert model.checkpoint_sha256 != first.checkpoint_sha256


# What is wrong is never written

OPTIONS = ExportOptions(
    ModelSpec(small_bundles.NAME, image_size=small_bundles.SIZE, num_classes=small_bundles.CLASSES),
    Precision.FP16,
    engine=EngineTarget(Flavour.NONE, batch=BatchProfile(1, 2, 4)),
)


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Path]:
    """A bundle, which the test must leave as it is."""
    small_bundles.copy(small_bundles.bundle(), tmp_path / "old")
    before = contents(tmp_path)
    yield tmp_path / "old"
    after = contents(tmp_path)
    assert {name: after.get(name) for name in before} == before
    assert Bundle.open(tmp_path / "old")
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


class Vandal(ExportObserver):
    """Changes one weight of the graph that was just written, as a bad disk might."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.changed = ""

    def finished(self, phase: Phase) -> None:
        """Strike between writing and validating."""
        if phase.name != "write the graph":
            return
        (path,) = self.folder.glob(".*/model.onnx")
        model = onnx.load(path)
        tensor = max(model.graph.initializer, key=lambda tensor: int(np.prod(tensor.dims)))
        values = numpy_helper.to_array(tensor)
        noise = np.random.default_rng(0).standard_normal(values.shape) * values.std()
        tensor.CopyFrom(numpy_helper.from_array((values + noise).astype(values.dtype), tensor.name))
        onnx.save(model, path)
        self.changed = tensor.name


@pytest.mark.usefixtures("small_model_registered")
def test_a_graph_that_computes_something_else_is_exit_1_and_not_written(old: Path) -> None:
    vandal = Vandal(old.parent)
    with pytest.raises(MismatchError, match="Nothing was written") as caught:
        export_bundle(dataclasses.replace(OPTIONS, output=old, overwrite=True), vandal)
    assert vandal.changed
    assert caught.value.exit_code == 1


def spoilt(model: ir.Model) -> None:
    """The largest weight, 1 % larger."""
    weights = {name: tensor_of(value).numpy() for name, value in model.graph.initializers.items()}
    name, weight = max(weights.items(), key=lambda item: item[1].size)
    model.graph.initializers[name].const_value = ir.Tensor(weight * np.float32(1.01), name=name)


def wrong_rewrite(*arguments: Any) -> RewriteResult:
    result = rewrite(*arguments)
    with torch.no_grad():
        max(result.model.parameters(), key=lambda weight: weight.numel()).mul_(1.01)
    return result


def wrong_export(*arguments: Any) -> ir.Model:
    model = export_canonical(*arguments)
    spoilt(model)
    return model


def wrong_passes(model: ir.Model, *arguments: Any) -> dict[str, tuple[str, ...]]:
    changed = apply_passes(model, *arguments)
    spoilt(model)
    return changed


WRONG: dict[str, tuple[str, Any]] = {
    "static model": ("rewrite", wrong_rewrite),
    "exported graph": ("export_canonical", wrong_export),
    "graph in its target's form": ("apply_passes", wrong_passes),
}


@pytest.mark.usefixtures("small_model_registered")
@pytest.mark.parametrize("stage", WRONG)
def test_the_first_stage_that_computes_something_else_is_named(
    stage: str, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, *WRONG[stage])
    before = contents(old)
    with pytest.raises(MismatchError, match=f"The {stage} differs from the reference model at batch") as caught:
        export_bundle(dataclasses.replace(OPTIONS, output=old, overwrite=True))
    assert caught.value.exit_code == 1
    assert contents(old) == before


def test_logits_that_half_cannot_hold_are_exit_1_with_the_next_step(old: Path) -> None:
    weights = trained()
    torch.save(weights | {"head.weight": weights["head.weight"] * 1e6}, old.parent / "loud.pth")
    with small_bundles.registered():
        flags = ("--fp16", "--io-dtype", "fp16", *NO_ENGINE, "-o", old, "--overwrite")
        sentence = refusal(export("--checkpoint", old.parent / "loud.pth", *SMALL, *flags), 1)
    assert "logits reaches" in sentence
    assert "Use --io-dtype fp32." in sentence


def test_a_graph_that_no_tensorrt_builds_has_its_group_norms_in_levels_too_and_bounds_from_measured_noise() -> None:
    manifest = Bundle.open(small_bundles.bundle(Precision.FP32)).manifest
    noise = manifest.validation.tolerances.graph.derivation.noise.rel_l2
    assert manifest.graph.passes == {"channels_last": 0, "split_group_norm": 2}
    assert manifest.graph.relative_l2_limit == pytest.approx(FP32_FACTOR * noise)
    assert manifest.validation.batches == (1, 8, 32)
    assert manifest.validation.batch_left_out == ""
