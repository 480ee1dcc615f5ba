"""spach-validate --bisect: which stage, and errors along the depth of the network."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from onnx import ModelProto

from spach_deploy.blocks.channel_mlp import StaticChannelMLP
from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.schema import TraceEntry
from spach_deploy.bundle.store import GOLDEN, GRAPH
from spach_deploy.cli.validate import main
from spach_deploy.graph.editing import as_proto
from spach_deploy.graph.passes import TENSORRT_PASSES
from spach_deploy.options.specs import BatchProfile, Precision
from spach_deploy.validation.bisect import export_steps as stages
from spach_deploy.validation.error_trace import ActivationTracer, ExpectedActivations
from spach_deploy.validation.result import golden_set
from spach_deploy.validation.rounding_error import ActivationTrace, evaluate
from spach_deploy.validation.runs import examine_typed
from spach_deploy.validation.tolerance import derive_tolerances
from tests import small_bundles
from tests.protos import rounded_graph
from tests.static_models import small_model
from tests.validation import faults

pytestmark = pytest.mark.usefixtures("small_model_registered")

FC1 = "layer2.2.channel_func.fc1"


def bisect(target: Path) -> tuple[int, dict[str, object]]:
    result = CliRunner().invoke(main, [str(target), "--bisect", "--accept", "graph", "--json"])
    assert result.stdout, result.output
    return result.exit_code, json.loads(result.stdout)["bisect"]


@pytest.fixture
def spoiled(tmp_path: Path) -> Path:
    return small_bundles.copy(small_bundles.bundle(), tmp_path / "bundle")


def test_a_right_bundle_is_right_at_every_stage() -> None:
    code, found = bisect(small_bundles.bundle())
    assert code == 0
    assert found["first_stage"] is None
    verdicts = {stage["stage"]: stage["verdict"] for stage in found["stages"]}  # type: ignore[attr-defined]
    agreed = dict.fromkeys(("reference", "static model", "FP32 graph", "typed graph"), "agrees")
    assert verdicts == agreed | {"engine": "not run"}


def test_a_wrong_typed_graph_is_told_from_the_stages_before_it(spoiled: Path) -> None:
    model = small_bundles.load_graph(spoiled)
    faults.perturb(model, f"{FC1}.weight")
    small_bundles.save_graph(model, spoiled)
    code, found = bisect(spoiled / GRAPH)
    assert code == 1
    assert found["first_stage"] == "typed graph"
    assert [suspect["module"] for suspect in found["suspects"]] == [FC1]  # type: ignore[attr-defined]
    lines = found["lines"]
    assert isinstance(lines, list)
    assert lines[0].startswith("Step: typed graph disagrees")
    assert "FP32 graph still agrees" in lines[0]


def test_wrong_stored_answers_are_the_references_stage(spoiled: Path) -> None:
    golden = Golden.load(spoiled / GOLDEN)
    Golden(golden.input, {"logits": golden.outputs["logits"] * np.float32(1.01)}, golden.names).save(spoiled / GOLDEN)
    manifest = small_bundles.read_manifest(spoiled)
    content = (spoiled / GOLDEN).read_bytes()
    manifest["files"][GOLDEN] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    small_bundles.write_manifest(spoiled, manifest)
    code, found = bisect(spoiled)
    assert code == 1
    assert found["first_stage"] == "reference"


def test_a_wrong_rewrite_is_the_static_models_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    right = stages.rewrite  # type: ignore[attr-defined]

    def wrong(*arguments: object, **options: object) -> object:
        result = right(*arguments, **options)  # type: ignore[arg-type]
        part = result.model.get_submodule("layer2.1.channel_func")
        assert isinstance(part, StaticChannelMLP)
        part.fc1 = type(part.fc1)(part.fc1.in_features, part.fc1.out_features)
        return result

    bundle = small_bundles.bundle()
    monkeypatch.setattr(stages, "rewrite", wrong)
    code, found = bisect(bundle)
    assert code == 1
    assert found["first_stage"] == "static model"
    suspects = found["suspects"]
    assert isinstance(suspects, list)
    (suspect,) = suspects
    assert suspect["module"] == "layer2.1"
    assert suspect["kind"] == "wrong rewrite"


def test_a_bisection_goes_without_what_the_export_went_without(spoiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes and rewrites that the manifest does not list, such as those of a later version."""
    manifest = small_bundles.read_manifest(spoiled)
    manifest["graph"]["passes"] = {"shift_depthwise": 5}
    del manifest["graph"]["rewrites"]["pad_heads"]
    small_bundles.write_manifest(spoiled, manifest)
    right, told = stages.rewrite, []  # type: ignore[attr-defined]

    def watched(*arguments: object, **options: object) -> object:
        told.append(arguments[1:])
        return right(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(stages, "rewrite", watched)
    assert bisect(spoiled)[1]["first_stage"] is None
    without: Any
    ((without, quantized),) = told
    on_cpus = {"grid_stream"}
    assert set(without) == {step.name for step in TENSORRT_PASSES} - {"shift_depthwise"} | {"pad_heads"} | on_cpus
    assert quantized is None


def test_a_wrong_export_is_the_graphs_stage_and_is_bisected_there(monkeypatch: pytest.MonkeyPatch) -> None:
    right = stages.export_canonical  # type: ignore[attr-defined]

    def wrong(*arguments: object) -> ir.Model:
        model = as_proto(right(*arguments))  # type: ignore[arg-type]
        faults.perturb(model, f"{FC1}.weight")
        return ir.from_proto(model)

    bundle = small_bundles.bundle()
    monkeypatch.setattr(stages, "export_canonical", wrong)
    code, found = bisect(bundle)
    assert code == 1
    assert found["first_stage"] == "FP32 graph"
    assert [suspect["module"] for suspect in found["suspects"]] == [FC1]  # type: ignore[attr-defined]


# Along the depth


def along(model: ModelProto) -> TraceEntry:
    golden = Golden.load(small_bundles.bundle() / GOLDEN)
    reference, depth = small_model("hybrid"), ActivationTrace()
    outputs = reference.outputs
    derive_tolerances(reference, golden.input, golden.outputs, Precision.FP16, outputs, activations=depth)
    evaluate(reference, golden.input[:1], parts=depth.exact)
    follower = ActivationTracer(reference, ExpectedActivations.of(depth))
    eval_set = golden_set(golden, "golden", outputs, BatchProfile())
    bounds = derive_tolerances(reference, golden.input, golden.outputs, Precision.FP16, outputs).graph
    rounded = examine_typed(model.SerializeToString(), Precision.FP16, eval_set, bounds, watch=follower.watch)[-1]
    found = follower.trace(rounded, "a.jpg")
    assert found is not None
    return found


def test_every_part_of_a_right_graph_is_within_its_bound() -> None:
    found = along(small_bundles.load_graph(small_bundles.bundle()))
    assert [part.module for part in found.modules][:3] == ["stem", "norm1", "layer1.0"]
    assert found.modules[-1].module == "head"
    assert {part.kind for part in found.modules} == {"stem", "norm", "block", "downsampling", "head"}
    for part in found.modules:
        assert part.error is not None, part
        assert part.noise < part.error < part.allowed, part
        assert part.peak > 0


def test_an_error_leaves_its_bound_where_it_begins() -> None:
    model = small_bundles.load_graph(small_bundles.bundle())
    faults.perturb(model, f"{FC1}.weight")
    over = [part.module for part in along(model).modules if part.error is not None and part.error > part.allowed]
    assert over[0] == "layer2.2"
    assert over[-1] == "head"


def test_an_exports_trace_stays_with_its_graph(spoiled: Path) -> None:
    def traced(target: Path) -> Any:
        result = CliRunner().invoke(main, [str(target), "--accept", "graph", "--json"])
        return json.loads(result.stdout)["trace"]

    exported = traced(spoiled)
    assert exported is not None
    assert exported["modules"]
    other = spoiled / "other.onnx"
    shutil.copy(spoiled / GRAPH, other)
    assert traced(other) == exported
    onnx.save(rounded_graph(onnx.load(other)), other)
    assert traced(other) is None
