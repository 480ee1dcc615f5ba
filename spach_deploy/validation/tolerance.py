"""How far an exported model may be from PyTorch in FP32: tolerances derived from two measurements, not guessed.

    FP32 error      the reference in FP32 against the reference in FP64
    rounding error  what PyTorch itself loses in the engine's precision on the same images (`rounding_error`);
                    none for FP32

    tolerance = FP32_FACTOR * FP32 error + ROUNDING_FACTOR * rounding error

Both are measured for each output of the model and each image, in the same runs, and taken as the mean plus two standard
deviations over the images, so that images which were not measured have room. Where more than `SPREAD_IMAGES` images are
compared, the worst of them is further out, and more is added (`_spread`). The factors:

ROUNDING_FACTOR. Engines round at other places than PyTorch's modules do: folded weights are rounded after folding,
products of attention in between, and sums run in another order. The same models, rewritten for export and rounded after
every operation, have at most 1.5 times the rounding error measured here, in the worst of their images (fourteen models
of all families, FP16 and BF16, demo weights). The typed graphs that are exported keep sums in FP32 and lose less; fused
kernels round less often still. So 2.

FP32_FACTOR. Two correct FP32 evaluations, with other orders of summation and other kernels for exp and erf, differ by
one to three times FP32's error against FP64. There is nothing between that and real faults, so 20.

The tolerances of probabilities and of top-k values follow from the tolerance e on the logits' absolute error. If every
logit moves by at most e, a probability changes by a factor within exp(+-2e) and by at most tanh(e/2), and sorted values
move by at most e.

Of a map, (B, C, H, W) or tokens, each image's relative L2 and cosine have tolerances, and its largest error is reported
without one: which of its 100,000 numbers is hit hardest depends on where a graph rounds. (sMLPNet in FP16: 2.05 times
PyTorch's largest error at one number of the second stage's map.)

Steps from the reference to the FP32 graph change no precision, so `prove_equal` allows them FP32_FACTOR * FP32 error
alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from msgspec import structs, to_builtins

from spach_deploy.bundle.inputs import Batch, as_floats, changed
from spach_deploy.bundle.outputs import expected_outputs, model_outputs, of_role
from spach_deploy.bundle.schema import BoundsEntry, TensorInfo, TolerancesEntry
from spach_deploy.common.batches import spread_with_ends
from spach_deploy.common.errors import MismatchError, PrecisionError
from spach_deploy.common.metrics import FEW_NUMBERS, relative_l2, relative_l2_by_image, relative_norm
from spach_deploy.options.specs import Precision, Role
from spach_deploy.validation.rounding_error import (
    ActivationTrace,
    Float32Array,
    Outputs,
    StorageFormat,
    evaluate_outputs,
    evaluate_outputs_fp64,
)
from spach_deploy.validation.verdict import Tolerance

if TYPE_CHECKING:
    from torch import nn

Float64 = npt.NDArray[np.float64]

ROUNDING_FACTOR = 2.0
FP32_FACTOR = 20.0
SPREAD = 2.0
"""Standard deviations over images that are added to the mean, where at most `SPREAD_IMAGES` are compared."""

SPREAD_IMAGES = 8
"""Images of which the worst is expected at SPREAD: sqrt(2 ln 8) = 2.04."""

PEAK = 5.0
"""Standard deviations that include all errors of some hundred images' logits, or of differences of two logits."""

_PEAK_IMAGES = 268
"""Images of 1000 numbers whose largest normal error is expected at PEAK: sqrt(2 ln(268 * 1000)) = 5."""

ROUNDING_IMAGES = 4
QUANTIZED_ROUNDING_IMAGES = 8
"""More images than for 16 bits: in eight bits some images have several times the rounding error of others."""

_NOISE_IMAGES = {Precision.FP32: 2, Precision.FP16: 1, Precision.BF16: 1}
"""Images that run in FP64; fewer in 16 bits, where the rounding error outweighs the FP32 error."""

_HALF_ROUNDOFF = 2.0**-11


class ImageArray(Protocol):
    """Images float32 (N, 3, S, S), or inputs with these, that can be indexed by lists of numbers: an array, or one that
    has only the images in use.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, chosen: list[int], /) -> Batch: ...


def evaluated_images(count: int, precision: Precision, rounding_images: int) -> frozenset[int]:
    """Numbers of the images, of `count`, on which `derive_tolerances` runs the model."""
    return frozenset((*spread_with_ends(count, _NOISE_IMAGES[precision]), *spread_with_ends(count, rounding_images)))


@dataclasses.dataclass(frozen=True)
class MeasuredError:
    """An error of an output: the mean plus some standard deviations over images (`_spread`); of an output of a few
    numbers, `PEAK` times the root mean square, because a few images tell little of how these scatter.

    `rel_l2` is relative. `max_abs` (an image's largest error) and `margin` (by how much the difference of two scores
    moves) are in units of the output.
    """

    images: int
    rel_l2: float
    max_abs: float
    margin: float

    @classmethod
    def of(cls, value: npt.NDArray[Any], exact: npt.NDArray[Any], compared: int = SPREAD_IMAGES) -> MeasuredError:
        """The error of an output `value` (N, ...) against `exact`, both of any float dtype, with room for the worst of
        `compared` images.
        """
        exact = exact.reshape(len(exact), -1)
        error = value.reshape(exact.shape).astype(np.float64) - exact
        root_mean_square = np.sqrt(np.mean(np.square(error), axis=1))
        relative = relative_l2_by_image(value, exact)[exact.any(axis=1)]
        is_few = exact.shape[1] < FEW_NUMBERS and len(relative)
        return cls(
            images=len(error),
            rel_l2=PEAK * math.sqrt(np.square(relative).mean()) if is_few else _with_room(relative, compared),
            max_abs=_with_room(
                np.maximum(np.abs(error).max(axis=1), _peak(exact.shape[1]) * root_mean_square), compared
            ),
            margin=_with_room(PEAK * math.sqrt(2) * error.std(axis=1), compared),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)


def _peak(numbers: int) -> float:
    """`PEAK`, or more for an output of more than a thousand numbers, whose largest error is further out."""
    return max(PEAK, math.sqrt(2 * math.log(_PEAK_IMAGES * numbers)))


def _spread(compared: int) -> float:
    """Standard deviations that include the worst of `compared` images: the expected largest of n normal numbers is at
    sqrt(2 ln n).
    """
    return math.sqrt(SPREAD**2 + 2 * math.log(max(1, compared / SPREAD_IMAGES)))


def _with_room(figures: Float64, compared: int) -> float:
    if not len(figures):
        return 0.0
    deviation = float(figures.std(ddof=1)) if len(figures) > 1 else 0.0
    return float(figures.mean()) + _spread(compared) * deviation


NOTHING = MeasuredError(0, 0.0, 0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class Derivation:
    """What the tolerances of one storage format are derived from. `noise`: FP32 error; `loss`: rounding error."""

    arithmetic: str
    noise: MeasuredError
    loss: MeasuredError

    def bound(self, figure: str) -> float:
        """The tolerance of one of `MeasuredError`'s figures."""
        return FP32_FACTOR * float(getattr(self.noise, figure)) + ROUNDING_FACTOR * float(getattr(self.loss, figure))

    @property
    def origin(self) -> str:
        """In a few words, for a finding."""
        noise = f"{FP32_FACTOR:g} x FP32's noise"
        return f"{ROUNDING_FACTOR:g} x PyTorch's loss in {self.arithmetic} + {noise}" if self.loss.images else noise

    def sentence(self) -> str:
        """With its figures, for the report."""
        noise = (
            f"{FP32_FACTOR:g} x FP32's noise of {self.noise.rel_l2:.1e} (against FP64, {_images(self.noise.images)})"
        )
        if not self.loss.images:
            return noise
        return (
            f"{ROUNDING_FACTOR:g} x {self.loss.rel_l2:.1e}, what PyTorch itself loses in {self.arithmetic} on "
            f"{_images(self.loss.images)}, + {noise}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: the measurements, the factors and the sentence."""
        return {
            "arithmetic": self.arithmetic,
            "noise": self.noise.to_dict(),
            "noise_factor": FP32_FACTOR,
            "loss": self.loss.to_dict(),
            "loss_factor": ROUNDING_FACTOR,
            "sentence": self.sentence(),
        }


def _images(count: int) -> str:
    return f"{count} image" if count == 1 else f"{count} images"


@dataclasses.dataclass(frozen=True)
class Bounds:
    """A tolerance for each output, and its derivation.

    `derivation`: of the first output that the model computes and of those that follow from it; `others`: of the other
    outputs that the model computes, by name.
    """

    outputs: Mapping[str, Tolerance]
    derivation: Mapping[str, Any]
    others: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        others = {name: dict(derivation) for name, derivation in self.others.items()}
        return {
            "outputs": {name: tolerance.to_dict() for name, tolerance in self.outputs.items()},
            "derivation": dict(self.derivation),
            **({"others": others} if others else {}),
        }

    @classmethod
    def of(cls, entry: BoundsEntry) -> Bounds:
        """What a manifest says. Raises UsageError for numbers with which nothing could fail."""
        outputs = {name: Tolerance(**structs.asdict(tolerance)) for name, tolerance in entry.outputs.items()}
        return cls(outputs, to_builtins(entry.derivation), to_builtins(entry.others))

    @property
    def sentence(self) -> str:
        """What the tolerances are derived from."""
        return str(self.derivation["sentence"])


@dataclasses.dataclass(frozen=True)
class ToleranceSet:
    """Tolerances of the graph in ONNX Runtime and of the engine. They differ only where a GPU may use TF32."""

    graph: Bounds
    engine: Bounds

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, for the manifest."""
        return {"graph": self.graph.to_dict(), "engine": self.engine.to_dict()}

    @classmethod
    def of(cls, entry: TolerancesEntry) -> ToleranceSet:
        """What a manifest says. Raises UsageError for numbers with which nothing could fail."""
        return cls(Bounds.of(entry.graph), Bounds.of(entry.engine))


def derive_tolerances(
    model: nn.Module,
    images: ImageArray,
    reference: Mapping[str, Float32Array],
    precision: Precision,
    outputs: Sequence[TensorInfo],
    *,
    tf32: bool = False,
    rounding_images: int = ROUNDING_IMAGES,
    fake_quantized: nn.Module | None = None,
    activations: ActivationTrace | None = None,
    noise: Mapping[str, MeasuredError] | None = None,
) -> ToleranceSet:
    """Derive the tolerances of an export of `model` in `precision`, one for each of the graph's `outputs`.

    `model`: the reference in FP32. `images` float32 (N, 3, S, S). `reference`: its outputs for them (N, ...) by name;
    the tolerances of probabilities and top-k use all of them. The model runs on at most `rounding_images` images,
    spread evenly, and in FP64 on one or two. `tf32`: the engine may use TF32 in FP32 products. `fake_quantized`: for
    quantized exports; `precision` is then that of the layers that are not quantized, and the rounding error is that of
    both. `activations`: receives the outputs of the model's parts for the first image. `noise`: the FP32 errors, where
    they were measured already. Raises PrecisionError for outputs that are not finite, in FP32 or in `precision`, and
    for those of which `precision` leaves nothing to compare.
    """
    for name, array in reference.items():
        if not np.isfinite(array).all():
            problem = f"The reference's {name} are not finite, so nothing can be compared with them."
            raise PrecisionError(problem)
    double, rounded = (None, None) if activations is None else (activations.double, activations.rounded)
    noise = noise or measured_fp32_errors(model, images, reference, precision, double)
    storage, is_quantized = StorageFormat.of(precision), fake_quantized is not None
    rounded_model = RoundedModel(fake_quantized or model, storage, is_quantized)
    graph = _bounds(rounded_model, images, reference, outputs, noise, rounding_images, rounded)
    on_gpu = StorageFormat.of(precision, tf32=tf32)
    if on_gpu is rounded_model.arithmetic:
        return ToleranceSet(graph, graph)
    rounded_model = dataclasses.replace(rounded_model, arithmetic=on_gpu)
    return ToleranceSet(graph, _bounds(rounded_model, images, reference, outputs, noise, rounding_images))


def measured_fp32_errors(
    model: nn.Module,
    images: ImageArray,
    reference: Mapping[str, Float32Array],
    precision: Precision,
    parts: Outputs | None = None,
) -> dict[str, MeasuredError]:
    """FP32's error by output: `model`'s outputs `reference` (N, ...) in FP32 against FP64, on one or two of `images`.

    `parts`: receives the outputs of the model's parts for the first image in FP64.
    """
    chosen = spread_with_ends(len(images), _NOISE_IMAGES[precision])
    exact = evaluate_outputs_fp64(model, images[chosen], parts)
    return {name: MeasuredError.of(array[chosen], exact[name], len(images)) for name, array in reference.items()}


@dataclasses.dataclass(frozen=True)
class RoundedModel:
    """A model and the storage format that its tensors are rounded to."""

    model: nn.Module
    arithmetic: StorageFormat
    is_quantized: bool = False

    @property
    def words(self) -> str:
        """The format, for reports."""
        return f"eight bits and {self.arithmetic.value}" if self.is_quantized else self.arithmetic.value

    def outputs(self, images: Batch, parts: Outputs | None = None, *, is_half: bool) -> dict[str, Float32Array] | None:
        """Outputs by name with rounded tensors; None where nothing is rounded. `is_half`: FP16 at the boundary."""
        if is_half:
            halves = as_floats(as_floats(images, np.float16), np.float32)
            rounded = evaluate_outputs(self.model, halves, self.arithmetic, parts)
            return {name: array.astype(np.float16).astype(np.float32) for name, array in rounded.items()}
        if self.arithmetic is StorageFormat.FP32 and not self.is_quantized:
            return None
        return evaluate_outputs(self.model, images, self.arithmetic, parts)


def _bounds(
    rounded_model: RoundedModel,
    images: ImageArray,
    reference: Mapping[str, Float32Array],
    outputs: Sequence[TensorInfo],
    noise: Mapping[str, MeasuredError],
    rounding_images: int,
    parts: Outputs | None = None,
) -> Bounds:
    chosen = spread_with_ends(len(images), rounding_images)
    computed = model_outputs(outputs)
    is_half = any(tensor.dtype == "float16" for tensor in computed)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused below
        rounded = rounded_model.outputs(images[chosen], parts, is_half=is_half)
        losses = (
            {}
            if rounded is None
            else {n: MeasuredError.of(rounded[n], reference[n][chosen], len(images)) for n in reference}
        )
    derivations = {
        tensor.name: Derivation(rounded_model.words, noise[tensor.name], losses.get(tensor.name, NOTHING))
        for tensor in computed
    }
    for name, derivation in derivations.items():
        _check_usable(name, derivation)
    first, *others = (derivation.to_dict() for derivation in derivations.values())
    tolerances = _tolerances(derivations, reference, outputs)
    return Bounds(tolerances, first, dict(zip([*derivations][1:], others, strict=True)))


_USELESS = 1.0
"""A bound on relative L2 that an output of zeros alone would keep."""


def _check_usable(name: str, derivation: Derivation) -> None:
    loss, noise = derivation.loss, derivation.noise
    if not all(map(math.isfinite, (loss.rel_l2, loss.max_abs, noise.rel_l2, noise.max_abs))):
        words = derivation.arithmetic
        raise PrecisionError(f"The reference's {name} are not finite when its tensors are rounded to {words}.")
    if derivation.bound("rel_l2") >= _USELESS:
        raise PrecisionError(
            f"PyTorch itself loses as much of {name} in {derivation.arithmetic} as there is (a relative L2 of"
            f" {loss.rel_l2:.2g}), so no comparison could tell a wrong graph from a right one.",
            "Take a higher precision, or leave layers in float with --keep-float.",
        )


def _tolerances(
    derivations: Mapping[str, Derivation], reference: Mapping[str, Float32Array], outputs: Sequence[TensorInfo]
) -> dict[str, Tolerance]:
    """A tolerance for each output but the integer ones, which are held to those of the logits that they rank."""
    logits = of_role(outputs, Role.LOGITS)
    tolerances: dict[str, Tolerance] = {}
    for tensor in outputs:
        if tensor.name in derivations:
            tolerances[tensor.name] = _tolerance(tensor, derivations[tensor.name])
        elif logits is not None and tensor.role is Role.PROBABILITIES:
            tolerances[tensor.name] = _of_probabilities(tensor, derivations[logits.name])
        elif logits is not None and tensor.role is Role.TOP_VALUES:
            values = expected_outputs(reference, outputs)[tensor.name]
            tolerances[tensor.name] = _of_top_values(tensor, derivations[logits.name], values)
    return tolerances


def _tolerance(tensor: TensorInfo, derivation: Derivation) -> Tolerance:
    """Of an output that the model computes. Classes may change up to a margin where it has classes. The error of a
    single number of a map has no bound.
    """
    rel_l2 = derivation.bound("rel_l2")
    max_abs = derivation.bound("max_abs") if len(tensor.shape) == 2 else None
    margin = derivation.bound("margin") if tensor.role is Role.LOGITS else 0.0
    return Tolerance(rel_l2, max_abs, _cosine(rel_l2), margin, derivation.origin)


def _of_probabilities(tensor: TensorInfo, logits: Derivation) -> Tolerance:
    """The rounding of exp and of the sums is FP32's; 1e-6 covers it."""
    max_abs, roundoff = logits.bound("max_abs"), _roundoff(tensor)
    relative = math.expm1(min(2 * max_abs, 1.0)) + 2 * roundoff + 1e-6
    absolute = math.tanh(max_abs / 2) + roundoff + 1e-6
    ties = math.tanh(logits.bound("margin") / 2) + 2 * roundoff + 1e-6
    return Tolerance(relative, absolute, _cosine(relative), ties, _origin(logits))


def _of_top_values(tensor: TensorInfo, logits: Derivation, expected: Float32Array) -> Tolerance:
    values = expected.astype(np.float64)
    norms = np.linalg.norm(values, axis=1)
    moved = logits.bound("max_abs") + _roundoff(tensor) * float(np.abs(values).max(initial=0.0))
    relative = math.sqrt(values.shape[1]) * moved / max(float(norms.min(initial=math.inf)), 1e-12)
    return Tolerance(relative, moved, None, logits.bound("margin"), _origin(logits))


def _roundoff(tensor: TensorInfo) -> float:
    return _HALF_ROUNDOFF if tensor.dtype == "float16" else 0.0


def _origin(logits: Derivation) -> str:
    return f"logits within {logits.bound('max_abs'):.2g}"


def _cosine(rel_l2: float) -> float:
    """The least cosine similarity that a relative L2 of `rel_l2` allows."""
    return math.sqrt(max(0.0, 1.0 - rel_l2**2))


# FP32 against FP32


_LEAST_NOISE = 2.0**-23
"""Lower bound of FP32's error: one rounding."""

Named = Mapping[str, npt.NDArray[np.float32]]
"""Outputs (N, ...) by name."""


def rounding_limit(noise: float) -> float:
    """The relative L2 that FP32 rounding explains, for a measured FP32 error `noise` (relative L2 against FP64)."""
    return FP32_FACTOR * max(noise, _LEAST_NOISE)


@dataclasses.dataclass(frozen=True)
class Fp32Reference:
    """The reference's `outputs` (N, ...) in FP32 by name, and the relative L2 of each that rounding explains."""

    outputs: Named = dataclasses.field(repr=False)
    limits: Mapping[str, float]
    whole: Named | None = dataclasses.field(default=None, repr=False)

    def of(self, chosen: slice | list[int]) -> Fp32Reference:
        """The same for some of the images. `whole`: the outputs of all."""
        some = {name: array[chosen] for name, array in self.outputs.items()}
        return Fp32Reference(some, self.limits, self.whole or self.outputs)

    def error(self, name: str, found: npt.NDArray[np.float32]) -> float:
        """Relative L2 of an output. Of a few numbers, relative to what they are in all images (`common.metrics`)."""
        expected, whole = self.outputs[name], (self.whole or self.outputs)[name]
        if expected[:1].size >= FEW_NUMBERS:
            return relative_l2(found, expected)
        squares = np.square(whole.astype(np.float64)).sum() * len(expected) / len(whole)
        difference = np.square(found.astype(np.float64) - expected).sum()
        return float(relative_norm(np.array([difference]), np.array([squares]))[0])

    @property
    def limit(self) -> float:
        """Of the first output."""
        return next(iter(self.limits.values()))


def prove_equal(
    what: str,
    run: Callable[[Any], Named],
    images: Batch,
    reference: Fp32Reference,
    batches: Sequence[int],
) -> dict[int, float]:
    """Relative L2 of `run`'s first output at each batch size, each on other images. MismatchError where an output
    differs by more than FP32 rounding.

    `images` float32 (N, 3, S, S), or inputs with these; `reference` of them. `run` returns the outputs of a batch.
    """
    errors: dict[int, float] = {}
    start = 0
    for batch in batches:
        chosen = [index % len(images) for index in range(start, start + batch)]
        start += batch
        errors[batch] = check_equal(what, run(changed(images[chosen], np.ascontiguousarray)), reference.of(chosen))
    return errors


def check_equal(what: str, outputs: Named, reference: Fp32Reference) -> float:
    """Relative L2 of the first output. MismatchError where that of any is NaN, or more than FP32 rounding."""
    errors = {name: reference.error(name, outputs[name]) for name in reference.outputs}
    for name, error in errors.items():
        if not error <= reference.limits[name]:
            where = f" in {name}" if len(errors) > 1 else ""
            raise MismatchError(
                f"The {what} differs from the reference model{where} at batch {len(reference.outputs[name])}: relative"
                f" L2 {error:.1e}, at most {reference.limits[name]:.1e} is rounding ({FP32_FACTOR:g} x FP32's noise"
                " against FP64).",
                "Turn rewrites off one by one with --no-rewrite NAME to find the one to blame, and report it.",
            )
    return next(iter(errors.values()))
