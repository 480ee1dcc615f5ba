"""Comparison and verdict: what harmless differences do, and that every planted fault is seen and named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from spach_deploy.common.errors import UsageError
from spach_deploy.validation.compare import Comparison, compare_outputs
from spach_deploy.validation.verdict import Tolerance, Verdict, judge

Array = npt.NDArray[Any]
IMAGES, CLASSES = 6, 50
STRICT = Tolerance(rel_l2=1e-3, max_abs=0.05, cosine_min=0.9999, flip_margin=0.01, origin="planted")


def scores(seed: int = 0, images: int = IMAGES, classes: int = CLASSES) -> Array:
    return np.random.default_rng(seed).normal(0, 3, (images, classes)).astype(np.float32)


def outputs() -> dict[str, Array]:
    """What a graph with two heads and top-5 returns."""
    logits = scores()
    indices = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    return {
        "logits": logits,
        "auxiliary": scores(seed=1),
        "features": np.random.default_rng(2).normal(size=(IMAGES, 8, 4)).astype(np.float32),
        "top_values": np.take_along_axis(logits, indices, axis=1),
        "top_indices": indices.astype(np.int64),
    }


def verdict_of(reference: Mapping[str, Array], candidate: Mapping[str, Array]) -> Verdict:
    comparison = compare_outputs(reference, candidate)
    return judge(comparison, dict.fromkeys(reference, STRICT))


def noisy(array: Array, relative: float = 1e-5) -> Array:
    noise = np.random.default_rng(9).normal(0, relative, array.shape)
    return (array * (1 + noise)).astype(array.dtype) if array.dtype.kind == "f" else array


# What must pass


def test_equal_outputs_pass_with_perfect_figures() -> None:
    comparison = compare_outputs(outputs(), outputs())
    assert judge(comparison, dict.fromkeys(outputs(), STRICT)) == Verdict(True, ())
    logits = comparison.outputs[0]
    assert (logits.max_abs, logits.rel_l2, logits.rel_l2_worst, logits.snr_db) == (0, 0, 0, math.inf)
    assert logits.cosine == pytest.approx(1, abs=1e-15)
    assert logits.scores is not None
    assert (logits.scores.top1_agreement, logits.scores.top5_agreement, logits.scores.kl_mean) == (1, 1, 0)
    assert [index.agreement for index in comparison.indices] == [1]


def test_tiny_differences_pass() -> None:
    verdict = verdict_of(outputs(), {name: noisy(array) for name, array in outputs().items()})
    assert verdict.passed, verdict.findings


def test_order_of_outputs_does_not_matter() -> None:
    assert verdict_of(outputs(), dict(reversed(outputs().items()))).passed


# Planted faults: each must fail, and its finding must name what is wrong

Plant = Callable[[dict[str, Array]], dict[str, Array]]


def with_nan(o: dict[str, Array]) -> dict[str, Array]:
    o["logits"][3, 7] = np.nan
    return o


def with_infinity(o: dict[str, Array]) -> dict[str, Array]:
    o["features"][2, 0, 0] = -np.inf
    return o


def swapped(o: dict[str, Array]) -> dict[str, Array]:
    return o | {"logits": o["auxiliary"], "auxiliary": o["logits"]}


def permuted_classes(o: dict[str, Array]) -> dict[str, Array]:
    return o | {"logits": np.roll(o["logits"], 1, axis=1)}


def permuted_channels(o: dict[str, Array]) -> dict[str, Array]:
    return o | {"features": o["features"][:, :, [1, 0, 2, 3]]}


def permuted_images(o: dict[str, Array]) -> dict[str, Array]:
    return {name: np.roll(array, 1, axis=0) for name, array in o.items()}


def one_bad_image(o: dict[str, Array]) -> dict[str, Array]:
    o["features"][4] *= 1.01
    return o


def missing(o: dict[str, Array]) -> dict[str, Array]:
    return {name: array for name, array in o.items() if name != "auxiliary"}


def renamed(o: dict[str, Array]) -> dict[str, Array]:
    return {{"logits": "output_0"}.get(name, name): array for name, array in o.items()}


def extra(o: dict[str, Array]) -> dict[str, Array]:
    return o | {"debug": np.ones((IMAGES, 2), np.float32)}


def wrong_dtype(o: dict[str, Array]) -> dict[str, Array]:
    return o | {"logits": o["logits"].astype(np.float64)}


def wrong_integer_dtype(o: dict[str, Array]) -> dict[str, Array]:
    return o | {"top_indices": o["top_indices"].astype(np.int32)}


def fewer_images(o: dict[str, Array]) -> dict[str, Array]:
    return {name: array[:-1] for name, array in o.items()}


def transposed(o: dict[str, Array]) -> dict[str, Array]:
    return o | {"features": o["features"].transpose(0, 2, 1)}


def wrong_index(o: dict[str, Array]) -> dict[str, Array]:
    o["top_indices"][5, 2] = int(np.argmin(o["logits"][5]))
    return o


def index_out_of_range(o: dict[str, Array]) -> dict[str, Array]:
    o["top_indices"][0, 0] = -1
    return o


def all_zero(o: dict[str, Array]) -> dict[str, Array]:
    return o | {"logits": np.zeros_like(o["logits"])}


def nothing(o: dict[str, Array]) -> dict[str, Array]:
    return {}


def text_output(o: dict[str, Array]) -> dict[str, Array]:
    return o | {"logits": np.full(o["logits"].shape, "a")}


PLANTED: list[tuple[Plant, list[str]]] = [
    (with_nan, ["'logits' of the candidate", "NaN", "image 3"]),
    (with_infinity, ["'features' of the candidate", "infinite", "image 2"]),
    (swapped, ["'logits' looks like the reference's 'auxiliary'"]),
    (permuted_classes, ["'logits': relative L2", "change class"]),
    (permuted_channels, ["'features': relative L2"]),
    (permuted_images, ["'logits': relative L2"]),
    (one_bad_image, ["'features': relative L2 is 0.01 in image 4", "(planted)"]),
    (missing, ["'auxiliary' is missing."]),
    (renamed, ["'logits' is missing; 'output_0' has its shape (relative L2 0", "'output_0' is unexpected"]),
    (extra, ["'debug' is unexpected"]),
    (wrong_dtype, ["'logits' has dtype float64, expected float32"]),
    (wrong_integer_dtype, ["'top_indices' has dtype int32, expected int64"]),
    (fewer_images, ["'logits' has shape (5, 50), the reference (6, 50)"]),
    (transposed, ["'features' has shape (6, 4, 8)"]),
    (wrong_index, ["'top_indices': 1 indices differ", "image 5 rank 2"]),
    (index_out_of_range, ["'top_indices': 1 indices differ", "-1 for"]),
    (all_zero, ["'logits': relative L2 is 1 in"]),
    (nothing, ["'logits' is missing", "'top_indices' is missing"]),
    (text_output, ["'logits' has dtype <U1", "not numbers"]),
]


@pytest.mark.parametrize(("plant", "words"), PLANTED, ids=[plant.__name__ for plant, _ in PLANTED])
def test_planted_fault_is_found_and_named(plant: Plant, words: list[str]) -> None:
    verdict = verdict_of(outputs(), plant(outputs()))
    assert not verdict.passed
    text = "\n".join(verdict.findings)
    for word in words:
        assert word in text, text


# References that could not have shown a fault


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ({}, "nothing was compared"),
        ({"logits": np.zeros((0, CLASSES), np.float32)}, "nothing was compared"),
        ({"logits": np.float32(3) * np.ones(())}, "nothing was compared"),
        ({"logits": np.zeros((4, CLASSES), np.float32)}, "zero everywhere"),
        ({"logits": np.repeat(scores()[:1], 4, axis=0)}, "the same for all 4 images"),
        ({"logits": np.full((4, CLASSES), np.nan, np.float32)}, "'logits' of the reference has NaN"),
        ({"logits": scores(), "other": scores(images=3)}, "'other' has 3 images, another output 6"),
    ],
    ids=["empty", "no image", "scalar", "zeros", "ignores its image", "NaN", "image counts"],
)
def test_reference_that_proves_nothing_fails_against_itself(reference: dict[str, Array], words: str) -> None:
    verdict = verdict_of(reference, reference)
    assert not verdict.passed
    assert words in " ".join(verdict.findings)


def test_comparison_without_outputs_never_passes() -> None:
    assert judge(Comparison(0, (), (), ()), {}).findings == ("No output was compared.",)


def test_every_output_needs_a_tolerance_and_every_tolerance_its_output() -> None:
    comparison = compare_outputs({"logits": scores()}, {"logits": scores()})
    findings = judge(comparison, {"probabilities": STRICT}).findings
    assert "Output 'logits' has no tolerance" in findings[0]
    assert findings[1] == "Output 'probabilities' has a tolerance and was not compared."


def test_one_image_among_zero_rows_is_infinitely_far() -> None:
    reference = scores()
    reference[2] = 0
    candidate = reference.copy()
    candidate[2, 0] = 1e-6
    output = compare_outputs({"logits": reference}, {"logits": candidate}).outputs[0]
    assert (output.worst_image, output.rel_l2_worst) == (2, math.inf)


# Figures


def test_figures_against_their_definitions() -> None:
    reference, candidate = scores(), noisy(scores(), 0.1)
    output = compare_outputs({"logits": reference}, {"logits": candidate}).outputs[0]
    ours, theirs = reference.astype(np.float64), candidate.astype(np.float64)
    error = theirs - ours
    per_image = np.linalg.norm(error, axis=1) / np.linalg.norm(ours, axis=1)
    cosines = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    exact = pytest.approx
    assert output.max_abs == np.abs(error).max()
    assert output.mean_abs == exact(np.abs(error).mean(), rel=1e-12)
    assert output.rel_l2 == exact(np.linalg.norm(error) / np.linalg.norm(ours), rel=1e-12)
    assert output.worst_image == per_image.argmax()
    assert output.rel_l2_worst == exact(per_image.max(), rel=1e-12)
    assert output.cosine_worst == exact(cosines.min(), rel=1e-12)
    assert output.snr_db == exact(-20 * np.log10(output.rel_l2), rel=1e-12)


def test_kl_divergence_against_its_definition() -> None:
    reference, candidate = scores(), noisy(scores(), 0.1)
    result = compare_outputs({"logits": reference}, {"logits": candidate}).outputs[0].scores
    assert result is not None
    p, q = (
        np.exp(s.astype(np.float64)) / np.exp(s.astype(np.float64)).sum(1, keepdims=True)
        for s in (reference, candidate)
    )
    divergence = (p * np.log(p / q)).sum(1)
    assert result.kl_mean == pytest.approx(divergence.mean(), rel=1e-9)
    assert result.kl_worst == pytest.approx(divergence.max(), rel=1e-9)
    # The same numbers when the outputs are probabilities already, up to float32's rounding of them.
    direct = compare_outputs({"p": p.astype(np.float32)}, {"p": q.astype(np.float32)}).outputs[0].scores
    assert direct is not None
    assert direct.kl_mean == pytest.approx(result.kl_mean, rel=1e-2)


def test_top5_agreement_is_overlap_of_sets() -> None:
    reference = np.arange(20, dtype=np.float32).reshape(2, 10) % 10
    reference[1] += np.linspace(0, 0.5, 10, dtype=np.float32)
    candidate = reference.copy()
    candidate[0, [9, 8]] = candidate[0, [8, 9]]  # inside the five
    candidate[1, [5, 4]] = candidate[1, [4, 5]]  # one leaves
    result = compare_outputs({"logits": reference}, {"logits": candidate}).outputs[0].scores
    assert result is not None
    assert (result.top1_agreement, result.top5_agreement) == (0.5, 0.9)


@pytest.mark.parametrize("classes", [2, 5])
def test_five_classes_or_fewer_have_no_top5(classes: int) -> None:
    result = compare_outputs({"logits": scores(classes=classes)}, {"logits": scores(classes=classes)}).outputs[0].scores
    assert result is not None
    assert result.top5_agreement is None


def test_features_and_top_values_are_not_class_scores() -> None:
    comparison = compare_outputs(outputs(), outputs())
    assert [o.name for o in comparison.outputs if o.scores] == ["logits", "auxiliary"]


def test_large_outputs_are_summed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, candidate = {"logits": scores()}, {"logits": noisy(scores(), 1.0)}
    whole = compare_outputs(reference, candidate)
    monkeypatch.setattr("spach_deploy.validation.compare._CHUNK_VALUES", 2 * CLASSES)
    pieces = compare_outputs(reference, candidate)
    assert whole.outputs[0].scores is not None
    assert pieces.outputs[0].scores is not None
    assert pieces.outputs[0].scores.flips == whole.outputs[0].scores.flips
    assert pieces.outputs[0].rel_l2 == pytest.approx(whole.outputs[0].rel_l2, rel=1e-14)


# Flips and ties


def near_tie(margin: float) -> tuple[Array, Array]:
    """Image 1 prefers class 4 to class 9 by `margin`; the candidate, a little off, class 9."""
    reference = scores()
    reference[1, 4], reference[1, 9] = 20.0, 20.0 - margin
    candidate = reference.copy()
    candidate[1, 9] += margin + 0.001
    return reference, candidate


def test_flip_below_its_margin_is_reported_and_passes() -> None:
    reference, candidate = near_tie(0.004)
    comparison = compare_outputs({"logits": reference}, {"logits": candidate}, image_names=list("abcdef"))
    result = comparison.outputs[0].scores
    assert result is not None
    (flip,) = result.flips
    assert (flip.image, flip.name, flip.reference_class, flip.candidate_class) == (1, "b", 4, 9)
    assert flip.reference_margin == pytest.approx(0.004, abs=1e-5)
    assert flip.candidate_margin == pytest.approx(0.001, abs=1e-5)
    assert result.top1_agreement == pytest.approx(5 / 6)
    assert judge(comparison, {"logits": STRICT}).passed


def test_flip_above_its_margin_fails_however_small_the_error() -> None:
    reference, candidate = near_tie(0.02)
    comparison = compare_outputs({"logits": reference}, {"logits": candidate}, image_names=list("abcdef"))
    (finding,) = judge(comparison, {"logits": STRICT}).findings
    assert "1 of 6 images change class" in finding
    assert "image 1 (b) from 4 to 9, margin 0.02" in finding


def test_margin_is_taken_to_the_class_flipped_to_not_to_the_runner_up() -> None:
    reference = np.array([[5.0, 4.999, 0.0], [1, 2, 3]], np.float32)
    candidate = np.array([[5.0, 4.999, 5.1], [1, 2, 3]], np.float32)
    comparison = compare_outputs({"logits": reference}, {"logits": candidate})
    loose = Tolerance(rel_l2=10, flip_margin=0.01)
    assert "from 0 to 2, margin 5" in judge(comparison, {"logits": loose}).findings[0]


def test_exact_tie_in_the_reference_is_no_flip() -> None:
    reference = np.array([[5.0, 5.0, 0.0], [1, 2, 3]], np.float32)
    candidate = np.array([[5.0, 5.0001, 0.0], [1, 2, 3]], np.float32)
    result = compare_outputs({"logits": reference}, {"logits": candidate}).outputs[0].scores
    assert result is not None
    assert result.flips == ()


@pytest.mark.parametrize(("gap", "passes"), [(0.0, True), (0.005, True), (0.5, False)])
def test_indices_may_swap_only_on_a_tie(gap: float, passes: bool) -> None:
    reference = outputs()
    first, second = reference["top_indices"][3, 1:3]
    reference["logits"][3, second] = reference["logits"][3, first] - np.float32(gap)
    order = np.argsort(-reference["logits"], axis=1, kind="stable")[:, :5]
    reference |= {"top_indices": order, "top_values": np.take_along_axis(reference["logits"], order, 1)}
    candidate = dict(reference, top_indices=order.copy())
    candidate["top_indices"][3, [1, 2]] = order[3, [2, 1]]
    comparison = compare_outputs(reference, candidate)
    assert comparison.indices[0].ranks == "logits"
    assert comparison.indices[0].differences[0].gap == pytest.approx(gap, abs=1e-6)
    assert judge(comparison, {name: STRICT for name in reference if name != "top_indices"}).passed is passes


def test_repeated_index_is_no_tie() -> None:
    reference = {"logits": scores()}
    reference["logits"][0, 1] = reference["logits"][0, 0] = 30
    reference["top"] = np.argsort(-reference["logits"], axis=1, kind="stable")[:, :2]
    candidate = dict(reference, top=reference["top"].copy())
    candidate["top"][0] = 0  # both ranks the same class, whose score equals the other's
    verdict = judge(compare_outputs(reference, candidate), {"logits": STRICT})
    assert "'top': 1 indices differ" in verdict.findings[0]


def test_integers_without_their_scores_must_be_equal() -> None:
    reference = {"mask": np.arange(12).reshape(3, 4)}
    candidate = {"mask": reference["mask"] + (reference["mask"] == 7)}
    comparison = compare_outputs(reference, candidate)
    assert comparison.indices[0].differences[0].gap is None
    assert not judge(comparison, {"mask": Tolerance(rel_l2=1, flip_margin=100)}).passed
    assert judge(compare_outputs(reference, reference), {"mask": STRICT}).passed


# Dtypes, tolerances, JSON


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_promised_half_precision_output_is_compared(dtype: npt.DTypeLike) -> None:
    reference, candidate = {"logits": scores()}, {"logits": scores().astype(dtype)}
    assert "expected float32" in compare_outputs(reference, candidate).problems[0]
    comparison = compare_outputs(reference, candidate, dtypes={"logits": dtype})
    assert judge(comparison, {"logits": Tolerance(rel_l2=1e-2, flip_margin=0.1)}).passed
    as_bad = {"logits": candidate["logits"].copy()}
    as_bad["logits"][0, 0] = np.nan
    assert "image 0" in compare_outputs(reference, as_bad, dtypes={"logits": dtype}).problems[0]


def test_promised_dtype_of_another_kind_is_refused() -> None:
    reference = {"logits": scores()}
    candidate = {"logits": scores().astype(np.int8)}
    comparison = compare_outputs(reference, candidate, dtypes={"logits": np.int8})
    assert "cannot be compared" in comparison.problems[0]


def test_wrong_number_of_image_names_is_a_problem() -> None:
    comparison = compare_outputs({"logits": scores()}, {"logits": scores()}, image_names=["only one"])
    assert "1 image names were given for 6 images" in comparison.problems[0]


@pytest.mark.parametrize(
    ("tolerance", "words"),
    [
        (Tolerance(rel_l2=1, flip_margin=100, max_abs=1e-9), "absolute error"),
        (Tolerance(rel_l2=1, flip_margin=100, cosine_min=1.0), "cosine"),
    ],
)
def test_each_figure_of_a_tolerance_can_fail_alone(tolerance: Tolerance, words: str) -> None:
    comparison = compare_outputs({"logits": scores()}, {"logits": noisy(scores(), 0.01)})
    (finding,) = judge(comparison, {"logits": tolerance}).findings
    assert words in finding


@pytest.mark.parametrize(
    "fields",
    [
        {"rel_l2": math.nan},
        {"rel_l2": math.inf},
        {"rel_l2": -1.0},
        {"rel_l2": 1.0, "max_abs": math.nan},
        {"rel_l2": 1.0, "flip_margin": math.inf},
        {"rel_l2": 1.0, "cosine_min": math.nan},
    ],
)
def test_tolerance_that_nothing_could_exceed_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Tolerance(**fields)  # type: ignore[arg-type]  # floats, all of them


def test_results_are_plain_json() -> None:
    reference, candidate = outputs(), outputs()
    candidate["logits"] = noisy(candidate["logits"], 1.0)
    candidate["top_indices"] = wrong_index(outputs())["top_indices"]
    comparison = compare_outputs(reference, candidate, image_names=list("abcdef"))
    verdict = judge(comparison, {"logits": STRICT})
    text = json.dumps([comparison.to_dict(), verdict.to_dict(), STRICT.to_dict()], allow_nan=False)
    read = json.loads(text)[0]
    assert read["outputs"][1]["snr_db"] == "inf"
    assert read["outputs"][0]["scores"]["flips"][0]["name"] in "abcdef"
    assert read["indices"][0]["differences"][0]["rank"] == 2
