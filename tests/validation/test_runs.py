"""Planted faults are rejected, harmless changes pass: by the bounds that an export derives."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import ModelProto

from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.store import GOLDEN, GRAPH, Bundle
from spach_deploy.common import machine as resources
from spach_deploy.common.errors import UnavailableError, UsageError
from spach_deploy.graph.editing import live_elements, shapes_at_batch_one
from spach_deploy.options.specs import BatchProfile, Flavour, Precision
from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner
from spach_deploy.validation import runs as evidence_module
from spach_deploy.validation.bundle_facts import BundleFacts
from spach_deploy.validation.result import golden_set
from spach_deploy.validation.runs import (
    EvaluationSet,
    Level,
    RunResult,
    examine_engine,
    examine_graph,
    examine_typed,
    plan_batches,
    profile_batches,
    repeated_images,
)
from spach_deploy.validation.tolerance import Bounds
from spach_deploy.validation.verdict import Tolerance
from tests import small_bundles
from tests.protos import type_graph
from tests.validation import faults

HEADS = "layer3.1.spatial_func/Transpose_3"
HEAD = "head.weight"
SCALE = "norm2.weight"
GELU = "layer2.2.channel_func.act/Gelu"


@functools.cache
def case(precision: Precision) -> tuple[bytes, EvaluationSet, Bounds]:
    """A bundle's graph, its golden pack as a trial, and its bounds."""
    bundle = Bundle.open(small_bundles.bundle(precision))
    facts = BundleFacts.of(bundle)
    eval_set = golden_set(Golden.load(bundle.file(GOLDEN)), "photographs", facts.outputs, facts.batch)
    return bundle.file(GRAPH).read_bytes(), eval_set, facts.tolerances.graph


def examine(precision: Precision, change: Callable[[ModelProto], None] = lambda model: None) -> RunResult:
    graph, eval_set, bounds = case(precision)
    model = onnx.load_from_string(graph)
    change(model)
    return examine_graph(model.SerializeToString(), eval_set, bounds)


def test_a_graph_that_this_onnx_runtime_is_too_old_for_is_not_called_wrong() -> None:
    def of_some_later_day(model: ModelProto) -> None:
        model.opset_import[0].version = 99

    with pytest.raises(UnavailableError, match=r"loads opset \d+, and the graph has opset 99"):
        examine(Precision.FP16, of_some_later_day)


def findings(evidence: RunResult) -> str:
    assert not evidence.passed
    return " ".join(evidence.verdict.findings)


def test_the_exported_graph_agrees_at_every_batch_of_its_profile() -> None:
    found = examine(Precision.FP16)
    assert found.passed
    assert found.level is Level.GRAPH
    assert found.batches == (1, 3, 3, 1, 8, 32)


@pytest.mark.parametrize(("precision", "every"), [(Precision.FP32, 5), (Precision.FP16, 1)])
def test_any_perturbed_weight_is_rejected(precision: Precision, every: int) -> None:
    names = faults.big_tensors(onnx.load_from_string(case(precision)[0]))[::every]
    assert len(names) > 30 // every
    missed = [name for name in names if examine(precision, lambda m, n=name: faults.perturb(m, n)).passed]  # type: ignore[misc]
    assert missed == []


@pytest.mark.parametrize(
    "plant",
    [
        lambda m: faults.permute_channel(m, HEAD),
        lambda m: faults.permute_channel(m, "layer3.3.channel_func.fc2.weight"),
        lambda m: faults.permute_channel(m, "layer1.0.cpe_net.net.1.weight"),
        lambda m: faults.transpose_heads(m, HEADS),
        lambda m: faults.forget_scale(m, SCALE),
        lambda m: faults.set_epsilon(m, 0.1),
        lambda m: faults.drop_gelu(m, GELU),
    ],
)
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_a_wrong_graph_is_rejected(precision: Precision, plant: Callable[[ModelProto], None]) -> None:
    assert "relative L2" in findings(examine(precision, plant))


@pytest.mark.parametrize("plant", [lambda m: faults.set_epsilon(m, 1e-3), faults.approximate_gelu])
def test_fp32_leaves_no_room_for_small_faults(plant: Callable[[ModelProto], None]) -> None:
    assert "relative L2" in findings(examine(Precision.FP32, plant))


@pytest.mark.parametrize(
    "change",
    [
        faults.reorder,
        faults.rename_tensors,
        lambda m: faults.unfold_constant(m, HEAD),
        lambda m: faults.fix_batch(m, 7),
        lambda m: faults.fix_batch(m, 1),
    ],
)
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_a_harmless_change_passes(precision: Precision, change: Callable[[ModelProto], None]) -> None:
    found = examine(precision, change)
    assert found.verdict.findings == ()


def test_a_nan_is_a_finding() -> None:
    assert "NaN" in findings(examine(Precision.FP16, lambda m: faults.plant_nan(m, HEAD)))


def test_a_renamed_output_is_missing_and_the_likely_one_is_named() -> None:
    found = findings(examine(Precision.FP16, lambda m: faults.rename_output(m, "logits", "scores")))
    assert "'logits' is missing" in found
    assert "'scores'" in found


def test_a_renamed_input_is_a_finding_not_a_crash() -> None:
    found = findings(examine(Precision.FP16, lambda m: faults.rename_input(m, "pixels")))
    assert "Its inputs are not the bundle's: it has pixels" in found


def test_a_graph_that_does_not_load_is_a_finding() -> None:
    def break_it(model: ModelProto) -> None:
        model.graph.node[5].op_type = "NoSuchOperator"

    assert "does not load" in findings(examine(Precision.FP16, break_it))


def test_a_graph_that_fails_at_one_batch_size_is_a_finding() -> None:
    def break_it(model: ModelProto) -> None:
        """A reshape that only a batch of 1 survives: its rows are counted, not left open."""
        name = faults.node(model, "layer1.0.channel_func/Reshape").input[1]
        faults.set_value(model, name, np.array([64, faults.value(model, name)[1]]))

    assert "failed while it ran" in findings(examine(Precision.FP16, break_it))


@pytest.mark.parametrize("right_up_to", [3, 8, 16])
def test_a_graph_that_is_wrong_only_in_larger_batches_is_rejected(right_up_to: int) -> None:
    found = findings(examine(Precision.FP32, lambda m: faults.mix_up_images(m, right_up_to)))
    assert "Wrong in some of the batches of 1, 3, 8 and 32 only: Output 'logits': relative L2" in found


def exported(change: Callable[[ModelProto], None] = lambda model: None) -> RunResult:
    """What an export sees: the images go through the batches of the profile alone."""
    graph, eval_set, bounds = case(Precision.FP32)
    model = onnx.load_from_string(graph)
    change(model)
    (found,) = examine_typed(model.SerializeToString(), Precision.FP32, eval_set, bounds, most_macs=math.inf)
    return found


@pytest.mark.parametrize("right_up_to", [3, 8, 16])
def test_an_export_says_what_is_wrong_only_in_larger_batches(right_up_to: int) -> None:
    assert exported().batches == (1, 8, 32)
    found = findings(exported(lambda m: faults.mix_up_images(m, right_up_to)))
    assert re.search(r"Wrong in some of the batches of 1,( 3,)? 8 and 32 only: Output 'logits': relative L2", found)


def test_a_graph_that_is_wrong_at_every_batch_is_not_called_wrong_at_some() -> None:
    def shift(model: ModelProto) -> None:
        faults.set_value(model, "head.bias", faults.value(model, "head.bias") + 1)

    assert findings(exported(shift)).startswith("Output 'logits': relative L2")


def test_a_graph_that_drops_images_of_larger_batches_is_rejected() -> None:
    found = findings(examine(Precision.FP32, lambda m: faults.drop_images(m, 8)))
    assert "Output 'logits' has shape (8, 11) for a batch of 32." in found


def test_an_engine_that_is_wrong_only_in_larger_batches_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, eval_set, bounds = case(Precision.FP32)
    model = onnx.load_from_string(graph)
    faults.mix_up_images(model, 8)
    monkeypatch.setattr(evidence_module, "TensorRTRunner", FakeEngine)
    assert "Wrong in some" in findings(examine_engine(model.SerializeToString(), Flavour.TENSORRT, eval_set, bounds))


def test_a_batch_for_which_there_is_no_memory_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ir.from_proto(onnx.load_from_string(case(Precision.FP32)[0]))
    few = live_elements(model, shapes_at_batch_one(model)) * 4 * 4 * 10
    monkeypatch.setattr(resources, "find_memory", lambda: resources.Memory(few, 1 << 34))
    found = examine(Precision.FP32)
    assert found.passed
    assert found.batches == (1, 3, 3, 1, 8, 10)
    assert found.left_out == "A batch of 32 did not run: there was memory for 10."
    assert found.to_dict()["left_out"] == found.left_out


@pytest.mark.parametrize(
    ("profile", "sizes"), [(BatchProfile(1, 8, 100_000), (8, 512)), (BatchProfile(99_999, 99_999, 100_000), (512,))]
)
def test_a_batch_that_would_take_a_cpu_hours_is_left_out_and_said(
    profile: BatchProfile, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, eval_set, _ = case(Precision.FP32)
    monkeypatch.setattr(resources, "find_memory", lambda: resources.Memory(1 << 50, 1 << 50))
    others = evidence_module.ExtraBatches.of(graph, dataclasses.replace(eval_set, batch=profile))
    assert others.sizes == sizes
    assert others.left_out == "A batch of 100000 did not run: on a CPU 512 is the most."


def test_an_export_leaves_a_batch_that_takes_long_to_a_validation_and_says_so() -> None:
    graph, eval_set, _ = case(Precision.FP32)
    macs = evidence_module._room_for(graph, BatchProfile())[1]
    assert evidence_module.ExtraBatches.of(graph, eval_set, 32 * macs).sizes == (8, 32)
    few = evidence_module.ExtraBatches.of(graph, eval_set, 32 * macs - 1)
    assert few.sizes == (8,)
    assert re.fullmatch(
        r"A batch of 32 did not run: it takes \d+ G multiply-adds; spach-validate runs it.", few.left_out
    )


def test_a_fixed_batch_runs_whole_where_there_are_fewer_images() -> None:
    graph, eval_set, bounds = case(Precision.FP32)
    eval_set = dataclasses.replace(
        eval_set,
        expected={"logits": eval_set.expected["logits"][:5]},
        names=eval_set.names[:5],
        batch=BatchProfile(7, 7, 7),
    )
    assert 7 in examine_graph(graph, eval_set, bounds).batches


@pytest.mark.parametrize(
    ("count", "profile", "sizes"),
    [
        (8, BatchProfile(1, 8, 32), (1, 8, 32)),
        (100, BatchProfile(1, 8, 32), (1, 8, 32, 32, 32)),
        (3, BatchProfile(8, 8, 8), (8,)),
        (2, BatchProfile(1, 1, 1), (1, 1)),
    ],
)
def test_an_engine_gets_the_smallest_the_usual_and_the_largest_batch(
    count: int, profile: BatchProfile, sizes: tuple[int, ...]
) -> None:
    assert profile_batches(count, profile) == sizes


def test_images_that_come_again_come_in_another_order() -> None:
    assert repeated_images(3, 9) == (0, 1, 2, 1, 2, 0, 2, 0, 1)


def test_rounding_every_half_tensor_shows_overflow_that_the_cpu_hides() -> None:
    """A stream of 1e6 in FP16: ONNX Runtime's inserted casts may keep it alive, the rounded run does not."""
    graph, eval_set, bounds = case(Precision.FP16)
    model = onnx.load_from_string(graph)
    for name in ("stem.proj.weight", "stem.proj.bias"):
        faults.set_value(model, name, np.clip(faults.value(model, name).astype(np.float64) * 1e6, -6e4, 6e4))
    found = examine_typed(model.SerializeToString(), Precision.FP16, eval_set, bounds)[-1]
    assert not found.passed


def test_bfloat16_runs_with_its_tensors_rounded() -> None:
    graph, eval_set, bounds = case(Precision.FP32)
    bounds = Bounds({"logits": Tolerance(rel_l2=5e-2)}, bounds.derivation)
    typed = type_graph(onnx.load_from_string(graph), Precision.BF16).model.SerializeToString()
    (found,) = examine_typed(typed, Precision.BF16, eval_set, bounds)
    assert found.passed
    assert "rounded" in found.ran


def test_fp16_runs_as_it_is_and_with_its_tensors_rounded() -> None:
    graph, eval_set, bounds = case(Precision.FP16)
    plain, rounded = examine_typed(graph, Precision.FP16, eval_set, bounds)
    assert plain.passed
    assert rounded.passed
    assert (plain.batches, rounded.batches) == ((1, 3, 3, 1, 8, 32), (1, 3, 3, 1))


@pytest.mark.parametrize(
    ("count", "profile", "sizes"),
    [
        (8, BatchProfile(1, 8, 32), (1, 7)),
        (1, BatchProfile(1, 8, 32), (1,)),
        (70, BatchProfile(1, 8, 32), (1, 32, 32, 5)),
        (8, BatchProfile(8, 8, 8), (8,)),
        (5, BatchProfile(8, 8, 8), (5,)),
        (20, BatchProfile(16, 16, 16), (16, 4)),
        (8, BatchProfile(1, 1, 1), (1,) * 8),
    ],
)
def test_batches_lie_within_the_profile(count: int, profile: BatchProfile, sizes: tuple[int, ...]) -> None:
    assert plan_batches(count, profile) == sizes


def test_a_cpu_gets_smaller_batches_where_the_profile_has_them() -> None:
    assert plan_batches(8, BatchProfile(1, 8, 32), 3) == (1, 3, 3, 1)
    assert plan_batches(8, BatchProfile(4, 8, 32), 3) == (4, 4)


class FakeEngine(OnnxRuntimeRunner):
    """Stands where a TensorRT engine would: computes with the graph, has the engine's name."""

    def __init__(self, plan: bytes, flavour: Flavour) -> None:
        super().__init__(plan)
        self.flavour = flavour

    @property
    def name(self) -> str:
        return f"TensorRT engine ({self.flavour.value})"


def test_an_engine_that_runs_is_evidence_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, eval_set, bounds = case(Precision.FP16)
    monkeypatch.setattr(evidence_module, "TensorRTRunner", FakeEngine)
    found = examine_engine(graph, Flavour.TENSORRT, eval_set, bounds)
    assert found.passed
    assert found.level is Level.ENGINE
    assert found.batches == (1, 8, 32)


def test_a_wrong_engine_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, eval_set, bounds = case(Precision.FP16)
    model = onnx.load_from_string(graph)
    faults.perturb(model, HEAD)
    monkeypatch.setattr(evidence_module, "TensorRTRunner", FakeEngine)
    found = examine_engine(model.SerializeToString(), Flavour.TENSORRT, eval_set, bounds)
    assert "relative L2" in findings(found)


def test_an_engine_without_a_gpu_says_why() -> None:
    _, eval_set, bounds = case(Precision.FP16)
    with pytest.raises(UnavailableError, match="cannot run here"):
        examine_engine(small_bundles.plan_bytes(), Flavour.TENSORRT_RTX, eval_set, bounds)
    with pytest.raises(UsageError, match="not a whole TensorRT plan"):
        examine_engine(b"hello", Flavour.TENSORRT_RTX, eval_set, bounds)


def test_outputs_beside_logits_are_compared_too() -> None:
    comparison = examine(Precision.FP16).comparison
    assert [output.name for output in comparison.outputs] == ["logits", "probabilities", "top_values"]
    assert [index.name for index in comparison.indices] == ["top_indices"]


def test_swapped_outputs_are_recognised() -> None:
    found = examine(Precision.FP16, lambda m: faults.swap_outputs(m, "logits", "probabilities"))
    assert "were they swapped?" in findings(found)


def test_a_missing_output_is_a_finding() -> None:
    found = examine(Precision.FP16, lambda m: faults.remove_output(m, "top_indices"))
    assert "'top_indices' is missing" in findings(found)
