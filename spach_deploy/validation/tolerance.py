"""How far an exported model may be from PyTorch in FP32: bounds derived from two measurements, not guessed.

    noise   FP32's own noise: the reference in FP32 against the same in FP64
    loss    what PyTorch loses in the engine's precision on the same images (`precision_loss`); none for FP32

    bound = FP32_FACTOR * noise + ROUNDING_FACTOR * loss

Both are taken per image, as the mean plus two standard deviations over the images measured, so that a set whose images
differ gets room for those that were not. What the factors stand for:

ROUNDING_FACTOR. Engines round at other places than PyTorch's modules do: folded weights are rounded after folding,
products of attention are rounded between, sums run in another order. The same models, rewritten for export and rounded
behind every operation, lose at most 1.5 times the loss measured here in the worst of their images (fourteen models of
all families, FP16 and BF16, demo weights); the typed graphs that are exported keep sums in FP32 and lose less. Fused
kernels round less often still. So 2.

FP32_FACTOR. Two correct FP32 evaluations, with other orders of summation and other kernels for exp and erf, are one to
three times as far apart as FP32 is from FP64. There is nothing between that and real faults, so 20.

Bounds of probabilities and of top-k values follow from the logits' bound e on the absolute error. With every logit
moved by at most e, a probability changes by a factor within exp(+-2e) and by at most tanh(e/2); sorted values move by
at most e.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from msgspec import structs, to_builtins

from spach_deploy.bundle.golden import LOGITS, PROBABILITIES, TOP_VALUES, expected_outputs
from spach_deploy.bundle.schema import BoundsEntry, TolerancesEntry
from spach_deploy.common.batches import spread
from spach_deploy.common.errors import PrecisionError
from spach_deploy.common.metrics import relative_l2_by_image
from spach_deploy.options.specs import IODtype, OutputSpec, Precision
from spach_deploy.validation.rounding_error import (
    ActivationTrace,
    Float32Array,
    Outputs,
    StorageFormat,
    evaluate,
    evaluate_fp64,
)
from spach_deploy.validation.verdict import Tolerance

if TYPE_CHECKING:
    from torch import nn

Float64 = npt.NDArray[np.float64]

ROUNDING_FACTOR = 2.0
FP32_FACTOR = 20.0
SPREAD = 2.0
"""Standard deviations over images that are added to the mean."""

PEAK = 5.0
"""Standard deviations within which all errors of some hundred images' logits lie, or the difference of two of them."""

ROUNDING_IMAGES = 4
QUANTIZED_ROUNDING_IMAGES = 8
"""Eight bits cost some images several times what they cost others, so more are looked at."""

_NOISE_IMAGES = {Precision.FP32: 2, Precision.FP16: 1, Precision.BF16: 1}  # beside a loss, noise hardly counts
_HALF_ROUNDOFF = 2.0**-11


class ImageArray(Protocol):
    """Images float32 (N, 3, S, S), of which some are taken by their numbers: an array, or those that are looked at."""

    def __len__(self) -> int: ...

    def __getitem__(self, chosen: list[int], /) -> Float32Array: ...


def evaluated_images(count: int, precision: Precision, loss_images: int) -> frozenset[int]:
    """Numbers of those of `count` images on which `derive_tolerances` runs the model."""
    return frozenset((*spread(count, _NOISE_IMAGES[precision]), *spread(count, loss_images)))


@dataclasses.dataclass(frozen=True)
class MeasuredError:
    """An error as bounds use it: mean plus two standard deviations over images.

    `rel_l2` is relative; `max_abs` (largest of an image's errors) and `margin` (by how much the difference of two
    scores moves) are in units of the logits.
    """

    images: int
    rel_l2: float
    max_abs: float
    margin: float

    @classmethod
    def of(cls, value: npt.NDArray[Any], exact: npt.NDArray[Any]) -> MeasuredError:
        """Error of logits `value` (N, classes) against `exact`, both of any float dtype."""
        error = value.astype(np.float64) - exact
        root_mean_square = np.sqrt(np.mean(np.square(error), axis=1))
        return cls(
            images=len(error),
            rel_l2=_with_spread(relative_l2_by_image(value, exact)[exact.any(axis=1)]),
            max_abs=_with_spread(np.maximum(np.abs(error).max(axis=1), PEAK * root_mean_square)),
            margin=_with_spread(PEAK * math.sqrt(2) * error.std(axis=1)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)


def _with_spread(figures: Float64) -> float:
    if not len(figures):
        return 0.0
    spread = float(figures.std(ddof=1)) if len(figures) > 1 else 0.0
    return float(figures.mean()) + SPREAD * spread


NOTHING = MeasuredError(0, 0.0, 0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class Derivation:
    """Where the bounds of one arithmetic come from."""

    arithmetic: str
    noise: MeasuredError
    loss: MeasuredError

    def bound(self, figure: str) -> float:
        """The bound on one of `Measured`'s figures."""
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
    """One tolerance per output, and their derivation."""

    outputs: Mapping[str, Tolerance]
    derivation: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "outputs": {name: tolerance.to_dict() for name, tolerance in self.outputs.items()},
            "derivation": dict(self.derivation),
        }

    @classmethod
    def of(cls, entry: BoundsEntry) -> Bounds:
        """What a manifest says. Raises UsageError for numbers with which nothing could fail."""
        outputs = {name: Tolerance(**structs.asdict(tolerance)) for name, tolerance in entry.outputs.items()}
        return cls(outputs, to_builtins(entry.derivation))

    @property
    def sentence(self) -> str:
        """Where they come from."""
        return str(self.derivation["sentence"])


@dataclasses.dataclass(frozen=True)
class ToleranceSet:
    """Bounds for the graph in ONNX Runtime and for the engine; these differ only where a GPU may use TF32."""

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
    reference: Float32Array,
    precision: Precision,
    outputs: OutputSpec | None = None,
    *,
    tf32: bool = False,
    loss_images: int = ROUNDING_IMAGES,
    twin: nn.Module | None = None,
    depth: ActivationTrace | None = None,
    noise: MeasuredError | None = None,
) -> ToleranceSet:
    """Bounds for an export of `model` in `precision`.

    `twin`: for quantized exports, the same model with its quantized layers rounded as planned; `precision` is then that
    of the rest, and the loss is what both lose together.

    `model` is the reference in FP32, `images` float32 (N, 3, S, S), `reference` its logits of them (N, classes), all of
    which bounds of probabilities and top-k look at; the model runs on at most `loss_images` of them, spread evenly, and
    on one or two in FP64. `tf32`: the engine may use TF32 in FP32 products. `depth` takes what the parts answered to
    the first image. `noise`: FP32's, where it was measured already. Raises PrecisionError for logits that are not
    finite, in FP32 or in that precision.
    """
    outputs = outputs or OutputSpec()
    if not np.isfinite(reference).all():
        raise PrecisionError("The reference's logits are not finite, so nothing can be compared with them.")
    double, rounded = (None, None) if depth is None else (depth.double, depth.rounded)
    noise = noise or measured_fp32_error(model, images, reference, precision, double)
    lossy = RoundedModel(model if twin is None else twin, StorageFormat.of(precision), is_quantized=twin is not None)
    graph = _bounds(lossy, images, reference, outputs, noise, loss_images, rounded)
    on_gpu = StorageFormat.of(precision, tf32=tf32)
    if on_gpu is lossy.arithmetic:
        return ToleranceSet(graph, graph)
    lossy = dataclasses.replace(lossy, arithmetic=on_gpu)
    return ToleranceSet(graph, _bounds(lossy, images, reference, outputs, noise, loss_images))


def measured_fp32_error(
    model: nn.Module, images: ImageArray, reference: Float32Array, precision: Precision, parts: Outputs | None = None
) -> MeasuredError:
    """FP32's own noise: logits `reference` (N, classes) of `model` in FP32 against FP64, on one or two of its `images`.

    `parts` takes what the parts answer to the first image in FP64.
    """
    chosen = spread(len(images), _NOISE_IMAGES[precision])
    return MeasuredError.of(reference[chosen], evaluate_fp64(model, images[chosen], parts))


@dataclasses.dataclass(frozen=True)
class RoundedModel:
    """What loses: a model, and the arithmetic in which it is evaluated."""

    model: nn.Module
    arithmetic: StorageFormat
    is_quantized: bool = False

    @property
    def words(self) -> str:
        """For reports."""
        return f"eight bits and {self.arithmetic.value}" if self.is_quantized else self.arithmetic.value

    def logits(self, images: Float32Array, io_dtype: IODtype, parts: Outputs | None = None) -> Float32Array | None:
        """As the arithmetic and the caller's dtype give them; None where nothing is rounded."""
        if io_dtype is IODtype.FP16:
            rounded = evaluate(self.model, images.astype(np.float16).astype(np.float32), self.arithmetic, parts)
            return rounded.astype(np.float16).astype(np.float32)
        if self.arithmetic is StorageFormat.FP32 and not self.is_quantized:
            return None
        return evaluate(self.model, images, self.arithmetic, parts)


def _bounds(
    lossy: RoundedModel,
    images: ImageArray,
    reference: Float32Array,
    outputs: OutputSpec,
    noise: MeasuredError,
    loss_images: int,
    parts: Outputs | None = None,
) -> Bounds:
    chosen = spread(len(images), loss_images)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused below
        logits = lossy.logits(images[chosen], outputs.io_dtype, parts)
        loss = NOTHING if logits is None else MeasuredError.of(logits, reference[chosen])
    if not all(map(math.isfinite, (loss.rel_l2, loss.max_abs, noise.rel_l2, noise.max_abs))):
        raise PrecisionError(f"The reference's logits are not finite when its tensors are rounded to {lossy.words}.")
    derivation = Derivation(lossy.words, noise, loss)
    return Bounds(_tolerances(derivation, reference, outputs), derivation.to_dict())


def _tolerances(derivation: Derivation, reference: Float32Array, outputs: OutputSpec) -> dict[str, Tolerance]:
    rel_l2, max_abs = derivation.bound("rel_l2"), derivation.bound("max_abs")
    margin = derivation.bound("margin")
    logits = Tolerance(rel_l2, max_abs, _cosine(rel_l2), margin, derivation.origin)
    tolerances = {LOGITS: logits}
    roundoff = _HALF_ROUNDOFF if outputs.io_dtype is IODtype.FP16 else 0.0
    origin = f"logits within {max_abs:.2g}"
    if outputs.softmax:
        # The rounding of exp and of the sums is FP32's; 1e-6 covers it.
        relative = math.expm1(min(2 * max_abs, 1.0)) + 2 * roundoff + 1e-6
        absolute = math.tanh(max_abs / 2) + roundoff + 1e-6
        ties = math.tanh(margin / 2) + 2 * roundoff + 1e-6
        tolerances[PROBABILITIES] = Tolerance(relative, absolute, _cosine(relative), ties, origin)
    if outputs.top_k is not None:
        values = expected_outputs(reference, outputs)[TOP_VALUES].astype(np.float64)
        norms = np.linalg.norm(values, axis=1)
        moved = max_abs + roundoff * float(np.abs(values).max(initial=0.0))
        relative = math.sqrt(values.shape[1]) * moved / max(float(norms.min(initial=math.inf)), 1e-12)
        tolerances[TOP_VALUES] = Tolerance(relative, moved, None, margin, origin)
    return tolerances


def _cosine(rel_l2: float) -> float:
    """The least cosine that an error of `rel_l2` allows."""
    return math.sqrt(max(0.0, 1.0 - rel_l2**2))
