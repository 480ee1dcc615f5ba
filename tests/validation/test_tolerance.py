"""Bounds come from measurements, hold for what is right, and round-trip through the manifest."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from msgspec import convert
from torch import nn

from spach_deploy.bundle.schema import TolerancesEntry
from spach_deploy.common.errors import PrecisionError, UsageError
from spach_deploy.options.specs import IODtype, OutputSpec, Precision
from spach_deploy.validation.compare import compare_outputs
from spach_deploy.validation.rounding_error import StorageFormat, evaluate, evaluate_fp64
from spach_deploy.validation.tolerance import ROUNDING_FACTOR, MeasuredError, ToleranceSet, derive_tolerances
from spach_deploy.validation.verdict import judge
from tests.outputs import classifier, of_logits
from tests.static_models import CLASSES, images, logits, relative_l2, small_model

KINDS = ("conv", "trans", "mlp", "hybrid", "hybrid_stem", "ms_mlp")


def derived(
    kind: str, precision: Precision, outputs: OutputSpec | None = None, *, tf32: bool = False
) -> tuple[nn.Module, Any, Any, ToleranceSet]:
    model, batch = small_model(kind), images(8)
    reference = logits(model, batch)
    return (
        model,
        batch,
        reference,
        derive_tolerances(model, batch, {"logits": reference}, precision, classifier(CLASSES, outputs), tf32=tf32),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_precisions_need_room_in_the_order_of_their_significands(kind: str) -> None:
    precisions = (Precision.FP32, Precision.FP16, Precision.BF16)
    bounds = [derived(kind, precision)[3].graph.outputs["logits"] for precision in precisions]
    fp32, fp16, bf16 = (bound.rel_l2 for bound in bounds)
    assert 1e-6 < fp32 < 5e-5
    assert 10 * fp32 < fp16 < 2e-2
    assert 3 * fp16 < bf16 < 0.2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
def test_the_loss_itself_passes_on_images_that_were_not_measured(kind: str, precision: Precision) -> None:
    model, _, _, tolerances = derived(kind, precision)
    others = images(16, seed=5)
    lossy = evaluate(model, others, StorageFormat.of(precision))
    comparison = compare_outputs({"logits": logits(model, others)}, {"logits": lossy})
    assert judge(comparison, tolerances.graph.outputs).findings == ()


def test_half_of_what_is_allowed_is_not_rejected_and_twice_is() -> None:
    _, _, reference, tolerances = derived("hybrid", Precision.FP16)
    allowed = tolerances.graph.outputs["logits"].rel_l2
    noise = np.random.default_rng(0).standard_normal(reference.shape)
    noise *= np.linalg.norm(reference, axis=1, keepdims=True) / np.linalg.norm(noise, axis=1, keepdims=True)
    for share, passes in ((0.5, True), (2.0, False)):
        candidate = (reference + share * allowed * noise).astype(np.float32)
        comparison = compare_outputs({"logits": reference}, {"logits": candidate})
        assert judge(comparison, tolerances.graph.outputs).passed is passes


def test_probabilities_and_top_values_pass_where_their_logits_pass() -> None:
    outputs = OutputSpec(top_k=4, softmax=True)
    _, _, reference, tolerances = derived("trans", Precision.BF16, outputs)
    expected = of_logits(reference, outputs)
    allowed = tolerances.graph.outputs["logits"]
    assert allowed.max_abs is not None
    rng = np.random.default_rng(3)
    for _ in range(50):
        moved = (reference + rng.uniform(-1, 1, reference.shape) * allowed.max_abs).astype(np.float32)
        others = {name: t for name, t in tolerances.graph.outputs.items() if name != "logits"}
        candidate = of_logits(moved, outputs)
        keep = ("probabilities", "top_values")
        comparison = compare_outputs({n: expected[n] for n in keep}, {n: candidate[n] for n in keep})
        flips = "change class"  # of probabilities, which the margin of the logits decides
        assert [f for f in judge(comparison, others).findings if flips not in f] == []


def test_tf32_widens_the_engine_alone() -> None:
    tolerances = derived("hybrid", Precision.FP32, tf32=True)[3]
    assert tolerances.engine.outputs["logits"].rel_l2 > 20 * tolerances.graph.outputs["logits"].rel_l2
    assert "tf32" in tolerances.engine.sentence
    assert derived("hybrid", Precision.FP16, tf32=True)[3].engine.outputs["logits"].rel_l2 < 2e-2


def test_fp16_at_the_boundary_of_an_fp32_graph_is_allowed_for() -> None:
    model, batch, reference, tolerances = derived("mlp", Precision.FP32, OutputSpec(IODtype.FP16))
    sent = logits(model, batch.astype(np.float16).astype(np.float32)).astype(np.float16)
    comparison = compare_outputs({"logits": reference}, {"logits": sent}, dtypes={"logits": np.float16})
    assert judge(comparison, tolerances.graph.outputs).findings == ()


def test_one_image_is_enough_to_derive_from() -> None:
    model, batch = small_model("conv"), images(1)
    tolerances = derive_tolerances(model, batch, {"logits": logits(model, batch)}, Precision.FP16, classifier(CLASSES))
    assert tolerances.graph.outputs["logits"].rel_l2 > 1e-4


def test_the_same_images_give_the_same_bounds() -> None:
    assert derived("hybrid", Precision.FP16)[3].to_dict() == derived("hybrid", Precision.FP16)[3].to_dict()


def test_the_derivation_says_its_figures() -> None:
    tolerances = derived("hybrid", Precision.FP16)[3]
    loss, noise = (tolerances.graph.derivation[part] for part in ("loss", "noise"))
    bound = ROUNDING_FACTOR * loss["rel_l2"] + 20 * noise["rel_l2"]
    assert math.isclose(tolerances.graph.outputs["logits"].rel_l2, bound)
    assert f"{ROUNDING_FACTOR:g} x {loss['rel_l2']:.1e}" in tolerances.graph.sentence
    assert "4 images" in tolerances.graph.sentence
    assert "against FP64, 1 image" in tolerances.graph.sentence


def test_bounds_survive_the_manifest() -> None:
    tolerances = derived("hybrid", Precision.FP16, OutputSpec(top_k=2, softmax=True))[3]
    stored = json.loads(json.dumps(tolerances.to_dict()))
    assert ToleranceSet.of(convert(stored, TolerancesEntry)) == tolerances


def test_bounds_with_which_nothing_could_fail_are_refused() -> None:
    stored = json.loads(json.dumps(derived("hybrid", Precision.FP16)[3].to_dict()))
    stored["engine"]["outputs"]["logits"]["rel_l2"] = float("inf")
    with pytest.raises(UsageError, match="rel_l2=inf means nothing"):
        ToleranceSet.of(convert(stored, TolerancesEntry))


def test_a_precision_that_loses_all_of_an_output_is_refused() -> None:
    """Two large numbers of which FP16 loses the difference: zeros would keep any bound derived from that."""

    class Far(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3)).repeat(1, 4)[:, :CLASSES] + 2048

    class Cancelling(nn.Module):
        outputs = classifier(CLASSES)

        def __init__(self) -> None:
            super().__init__()
            self.far = Far()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return cast("torch.Tensor", self.far(x) - 2048)

    model, batch = Cancelling().eval(), images(8)
    with torch.inference_mode():
        reference = model(torch.from_numpy(batch)).numpy()
    derive_tolerances(model, batch, {"logits": reference}, Precision.FP32, classifier(CLASSES))
    with pytest.raises(PrecisionError, match="loses as much of logits in fp16 as there is"):
        derive_tolerances(model, batch, {"logits": reference}, Precision.FP16, classifier(CLASSES))


def test_a_reference_of_zeros_gives_bounds_that_are_numbers() -> None:
    zeros = np.zeros((3, 5), np.float32)
    assert MeasuredError.of(zeros, zeros) == MeasuredError(3, 0.0, 0.0, 0.0)


def test_an_answer_that_is_not_finite_is_refused() -> None:
    model, batch = small_model("conv"), images(2)
    reference = np.full((2, 11), np.inf, np.float32)
    with pytest.raises(PrecisionError, match="not finite"):
        derive_tolerances(model, batch, {"logits": reference}, Precision.FP16, classifier(CLASSES))


# What PyTorch loses


def test_rounding_leaves_the_model_as_it_was() -> None:
    model, batch = small_model("hybrid"), images(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = logits(model, batch)
    evaluate(model, batch, StorageFormat.FP16)
    evaluate_fp64(model, batch)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert np.array_equal(logits(model, batch), first)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("run", [evaluate_fp64, functools.partial(evaluate, arithmetic=StorageFormat.BF16)])
def test_a_model_that_fails_on_the_way_is_left_as_it_was(run: Any) -> None:
    model, batch = small_model("hybrid"), images(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError):
        run(model, batch[:, :, :5, :5])
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert not any((*module._forward_hooks, *module._forward_pre_hooks) for module in model.modules())


def test_fp32_and_fp64_agree_to_rounding() -> None:
    model, batch = small_model("ms_mlp"), images(2)
    assert 0 < relative_l2(evaluate(model, batch), evaluate_fp64(model, batch)) < 2e-6


def test_tf32_and_fp16_lose_alike_where_fp16_has_range() -> None:
    """Both keep ten bits of the significand."""
    model, batch = small_model("hybrid"), images(4)
    tf32, fp16 = (
        relative_l2(evaluate(model, batch, arithmetic), logits(model, batch))
        for arithmetic in (StorageFormat.TF32, StorageFormat.FP16)
    )
    assert 0.5 < tf32 / fp16 < 2


def test_what_fp16_cannot_hold_stays_exact() -> None:
    """The precision policy keeps such tensors in FP32, so they are no loss, and no infinity."""

    class Large(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, :4] * 1e6 + 1.0

    batch = images(2)
    large = evaluate(Large(), batch, StorageFormat.FP16)
    assert np.isfinite(large).all()
    assert relative_l2(large, evaluate(Large(), batch)) < 1e-3


def test_shared_weights_are_rounded_once() -> None:
    model, batch = small_model("mlp_shared"), images(2)
    assert 0 < relative_l2(evaluate(model, batch, StorageFormat.BF16), logits(model, batch)) < 0.1


def test_measured_figures_grow_with_their_spread() -> None:
    exact = np.ones((4, 10))
    even = MeasuredError.of(exact * 1.01, exact)
    uneven = MeasuredError.of(exact * np.array([[1.0], [1.0], [1.0], [1.04]]), exact)
    assert math.isclose(even.rel_l2, 0.01, rel_tol=1e-6)
    assert math.isclose(uneven.rel_l2, 0.01 + 2 * 0.02, rel_tol=1e-6)
    assert dataclasses.asdict(even)["images"] == 4


def test_the_worst_of_many_images_has_more_room_than_the_worst_of_few() -> None:
    """As the largest of so many normal numbers has, which is what the mean and deviation of a few are for."""
    generator = np.random.default_rng(0)
    errors = generator.normal(1e-3, 1e-4, (10_000, 1))
    exact = np.ones((8, 10))
    few = MeasuredError.of(exact + errors[:8], exact)
    assert few == MeasuredError.of(exact + errors[:8], exact, 8)
    deviation = errors[:8].std(ddof=1)
    assert math.isclose(few.rel_l2, errors[:8].mean() + 2 * deviation, rel_tol=1e-6)
    many = MeasuredError.of(exact + errors[:8], exact, 10_000)
    expected = errors[:8].mean() + math.sqrt(4 + 2 * math.log(1250)) * deviation
    assert math.isclose(many.rel_l2, expected, rel_tol=1e-6)
    assert errors.max() < 2 * many.rel_l2
