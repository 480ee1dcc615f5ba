"""Exports of embeddings and feature maps, alone and beside logits: graph, evidence, golden pack, and their readers."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import spach_deploy
from spach_deploy import Bundle
from spach_deploy.blocks import rewrite
from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.outputs import INPUT, chosen_outputs
from spach_deploy.bundle.store import GOLDEN
from spach_deploy.cli.predict import main as predict
from spach_deploy.cli.validate import main as validate
from spach_deploy.common.metrics import worst_relative_l2
from spach_deploy.graph.editing import as_proto
from spach_deploy.graph.export import export_canonical
from spach_deploy.graph.passes import CPU_PASSES, TENSORRT_PASSES, Pass, apply_passes
from spach_deploy.options.specs import (
    EngineTarget,
    ExportOptions,
    FeatureLayout,
    Flavour,
    ModelSpec,
    OutputSpec,
    Precision,
    QuantizationSpec,
    Role,
)
from spach_deploy.pipeline.export import export
from spach_deploy.pipeline.steps.images import GOLDEN_IMAGES, golden_images
from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner
from spach_deploy.validation.rounding_error import evaluate_outputs
from tests import small_bundles
from tests.outputs import classifier
from tests.shared import once
from tests.static_models import images, small_model
from tests.validation import faults

PROBES = Path(spach_deploy.__file__).with_name("data") / "probes"
EVERY = (Role.LOGITS, Role.EMBEDDING, Role.FEATURES)
NCHW, TOKENS = FeatureLayout.NCHW, FeatureLayout.TOKENS


def exported(
    target: Path, outputs: OutputSpec, precision: Precision = Precision.FP16, classes: int = small_bundles.CLASSES
) -> Bundle:
    model = ModelSpec(small_bundles.NAME, image_size=small_bundles.SIZE, num_classes=classes)
    quantization = QuantizationSpec()
    if precision.is_quantized:
        quantization = QuantizationSpec(calibration=PROBES, allow_overlap=True)
    options = ExportOptions(
        model, precision, outputs, EngineTarget(Flavour.NONE), output=target, quantization=quantization
    )
    with small_bundles.registered():
        export(options)
    return Bundle.open(target)


def everything() -> Path:
    """A bundle with every output there is, some under other names; tests share it and do not change it."""
    names = ("embedding=vector", "features2=deep", "top_indices=best")
    spec = OutputSpec(top_k=3, softmax=True, outputs=EVERY, feature_layout=TOKENS, names=names)
    return once("outputs/everything", lambda target: exported(target, spec) and None)


def embedding() -> Path:
    """A bundle of a model without a head."""
    return once("outputs/embedding", lambda target: exported(target, OutputSpec(), classes=0) and None)


@pytest.mark.parametrize("passes", [TENSORRT_PASSES, CPU_PASSES], ids=["tensorrt", "cpu"])
@pytest.mark.parametrize(
    ("kind", "layout"), [("trans", TOKENS), ("hybrid", NCHW), ("hybrid_stem", TOKENS), ("ms_mlp", TOKENS)]
)
def test_a_graph_gives_what_pytorch_gives(kind: str, layout: FeatureLayout, passes: tuple[Pass, ...]) -> None:
    model = copy.copy(small_model(kind))
    spec = OutputSpec(outputs=EVERY, feature_layout=layout)
    model.outputs = chosen_outputs(spec, model.architecture.classes, model.stage_shapes)
    graph = export_canonical(rewrite(model).model, small_bundles.SIZE)
    apply_passes(graph, passes)
    batch = images(3)
    expected = evaluate_outputs(model, batch)
    with OnnxRuntimeRunner(as_proto(graph).SerializeToString(), threads=1) as runner:
        found = runner.run({INPUT: batch})
    assert list(found) == list(expected) == [tensor.name for tensor in model.outputs]
    for tensor in model.outputs:
        assert found[tensor.name].shape == (3, *tensor.shape[1:])
        assert worst_relative_l2(found[tensor.name], expected[tensor.name]) < 3e-6, tensor.name


def test_every_output_has_a_role_a_tolerance_and_golden_values() -> None:
    bundle = Bundle.open(everything())
    roles = {tensor.name: tensor.role for tensor in bundle.manifest.outputs}
    derived = {"probabilities": Role.PROBABILITIES, "top_values": Role.TOP_VALUES, "best": Role.TOP_INDICES}
    features = {"features1": Role.FEATURES, "deep": Role.FEATURES, "features3": Role.FEATURES}
    assert roles == {"logits": Role.LOGITS, "vector": Role.EMBEDDING, **features, **derived}
    bounds = bundle.manifest.validation.tolerances.graph
    assert {*bounds.outputs} == {*roles} - {"best"}
    assert list(bounds.others) == ["vector", *features]
    assert bounds.others["deep"].loss.rel_l2 != bounds.others["features3"].loss.rel_l2
    assert [bounds.outputs[name].flip_margin > 0 for name in ("logits", "vector", "deep")] == [True, False, False]
    assert [bounds.outputs[name].max_abs is None for name in ("logits", "vector", "deep")] == [False, False, True]
    assert list(Golden.load(bundle.path / GOLDEN).outputs) == ["logits", "vector", *features]


def validated(bundle: Path, *options: str) -> tuple[int, dict[str, object]]:
    result = CliRunner().invoke(validate, [str(bundle), "--json", *options])
    assert result.stdout, result.output
    return result.exit_code, json.loads(result.stdout)


@pytest.mark.parametrize("made", [everything, embedding])
def test_it_validates_from_its_golden_pack_and_on_other_images(made: object) -> None:
    bundle = made()  # type: ignore[operator]
    with small_bundles.registered():
        assert validated(bundle)[0] == 0
        code, report = validated(bundle, "--images", str(PROBES), "--max-images", "2")
    assert code == 0
    compared = report["evidence"][0]["comparison"]["outputs"]  # type: ignore[index]
    assert [output["scores"] is not None for output in compared if output["role"] == "embedding"] == [False]


def test_a_wrong_embedding_is_found_in_its_module(tmp_path: Path) -> None:
    bundle = small_bundles.copy(embedding(), tmp_path / "bundle")
    graph = small_bundles.load_graph(bundle)
    faults.perturb(graph, "layer2.2.channel_func.fc1.weight")
    small_bundles.save_graph(graph, bundle)
    with small_bundles.registered():
        code, report = validated(bundle, "--bisect")
    assert code == 1
    assert "Output 'embedding': relative L2 is" in report["findings"][1]  # type: ignore[index]
    suspects = report["bisect"]["suspects"]  # type: ignore[index]
    assert [suspect["module"] for suspect in suspects] == ["layer2.2.channel_func.fc1"]


def test_bundles_and_graphs_without_logits_are_compared_without_classes(tmp_path: Path) -> None:
    bundle = str(embedding())
    (tmp_path / "theirs.onnx").write_bytes((embedding() / "model.onnx").read_bytes())
    with small_bundles.registered():
        both = CliRunner().invoke(validate, [bundle, bundle])
        theirs = CliRunner().invoke(validate, [str(tmp_path / "theirs.onnx"), "--against", bundle])
    assert (both.exit_code, theirs.exit_code) == (0, 0), both.output + theirs.output
    assert "cosine 1.00000000." in both.output
    assert "change class" not in both.output + theirs.output
    page = (embedding() / "report.html").read_text()
    assert "In the worst image embedding differs by a relative L2 of" in page
    assert "Images that change class" not in page


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.BF16])
def test_every_precision_gives_every_output(precision: Precision, tmp_path: Path) -> None:
    bundle = exported(tmp_path / "bundle", OutputSpec(outputs=(Role.EMBEDDING, Role.FEATURES)), precision)
    assert bundle.manifest.validation.passed
    assert [tensor.name for tensor in bundle.manifest.outputs][:2] == ["embedding", "features1"]


def test_a_golden_pack_of_large_maps_has_fewer_images() -> None:
    assert golden_images(classifier(1000)) == GOLDEN_IMAGES
    published = chosen_outputs(OutputSpec(outputs=(Role.FEATURES,)), 7, [(96 << i, 56 >> i, 56 >> i) for i in range(4)])
    assert golden_images(published) == GOLDEN_IMAGES
    large = chosen_outputs(OutputSpec(outputs=(Role.FEATURES,)), 7, [(96 << i, 256 >> i, 256 >> i) for i in range(4)])
    assert golden_images(large) == 2


def test_a_session_gives_what_there_is() -> None:
    photograph = PROBES / "camera.jpg"
    with Bundle.open(everything()).session(runtime="onnxruntime") as session:
        (found,) = session.predict(photograph, top_k=2)
    assert len(found.classes) == 2
    assert {name: values.ndim for name, values in found.outputs.items()} == dict.fromkeys(
        ("vector", "features1", "deep", "features3"), 2
    ) | {"vector": 1}
    with Bundle.open(embedding()).session(runtime="onnxruntime") as session:
        (alone,) = session.predict(photograph)
    assert alone.classes == ()
    np.testing.assert_allclose(alone.outputs["embedding"], found.outputs["vector"], rtol=0.05, atol=0.05)


def test_predict_prints_vectors_and_shapes() -> None:
    pictures = [str(PROBES / name) for name in ("camera.jpg", "chelsea.jpg")]
    shown = CliRunner().invoke(predict, [str(everything()), *pictures, "--top-k", "1", "--runtime", "onnxruntime"])
    assert shown.exit_code == 0, shown.output
    assert "vector  64 numbers, norm " in shown.stdout
    assert shown.stdout.count("cosine with the first") == 1
    assert "features1  64 x 16" in shown.stdout
    lines = CliRunner().invoke(predict, [str(embedding()), *pictures, "--json", "--runtime", "onnxruntime"])
    found = [json.loads(line) for line in lines.stdout.splitlines()]
    assert [list(line) for line in found] == [["image", "embedding"]] * 2
    assert len(found[0]["embedding"]) == 64


@pytest.mark.parametrize(
    ("command", "options"),
    [(predict, ["--top-k", "3"]), (predict, ["--labels", "names.txt"]), (validate, ["--max-drop", "1"])],
)
def test_what_is_about_classes_is_refused_where_there_are_none(command: object, options: list[str]) -> None:
    given = ["--images", str(PROBES), "--labels", str(PROBES)] if command is validate else [str(PROBES)]
    result = CliRunner().invoke(command, [str(embedding()), *given, *options])  # type: ignore[arg-type]
    assert result.exit_code == 2
    assert "is about classes, and" in result.output
    assert "embedding" in result.output
