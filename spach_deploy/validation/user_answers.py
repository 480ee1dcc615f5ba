"""Compare the reference with outputs of the user's own code (`--answers`): the only evidence about what tensors do not
show.

    np.savez("answers.npz", input=images.numpy(), logits=model(images).numpy())

`input`: float32 or float64 (N, C, H, W), as the model's forward got it. `logits`: float32 or float64 (N, classes), of
the same images, computed in FP32 (no autocast, no TF32). In its place `embedding` (N, C) may stand, what the head
reads. Other arrays in the file are not read.

Both are compared with the reference in FP64: a correct FP32 evaluation is about FP32's own error away from it. Where
the user's logits are further away, `search` tries other hyperparameters (heads, qk scale, divisions, activation,
epsilon) until they agree.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from spach_deploy.bundle.schema import AgreementEntry
from spach_deploy.common.errors import MismatchError, UsageError
from spach_deploy.common.files import npz_names, read_npz, sha256_of
from spach_deploy.common.metrics import worst_relative_l2
from spach_deploy.models.hyperparameters import OF_PIXELS, Setting, Source, confirmed
from spach_deploy.models.outputs import giving
from spach_deploy.options.specs import ACTIVATIONS, Role, size_in_words
from spach_deploy.validation.rounding_error import evaluate, evaluate_fp64

if TYPE_CHECKING:
    from spach_deploy.models.checkpoint import LoadedModel

FP32_FACTOR = 4.0
"""Allowed multiple of our own FP32 error against FP64: other orders of summation make one to three."""

MOST_IMAGES = 32
"""Number of images that are compared at most, the first in the file."""

SEARCH_SECONDS = 300.0
"""Time limit of the search, whatever it has found."""

_SAY_EVERY_S = 10.0
_MOST_BYTES = 2 * 10**9
_LEAST_NOISE = 2.0**-24
_EPSILONS = (1e-6, 1e-5, 1e-3, 1e-8, 1e-12)
_SCALES = (None, 1.0)
_SCALE_GRID = tuple(2 * 3.5**-step for step in range(7))
_NEAREST = 4  # combinations of heads and activation for which qk scale and epsilon are solved
_LEAST_NUMBERS = 16  # that are compared in a search, where the file has as many
_DIGITS = (1, 2, 3, 4, 6, 9)
_STEPS, _DIFFERENCE, _SMALL_STEP, _LEAST_NUMBER = 20, 1e-2, 1e-7, 1e-30
_NO_ANSWERS = 'Write it with np.savez("answers.npz", input=images.numpy(), logits=model(images).numpy()).'

Array = npt.NDArray[Any]
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class GivenAnswers:
    """The user's inputs float32 (N, C, H, W), and logits float64 (N, classes) or an embedding (N, C), from a file."""

    path: Path
    sha256: str
    input: npt.NDArray[np.float32] = dataclasses.field(repr=False)
    values: npt.NDArray[np.float64] = dataclasses.field(repr=False)
    output: Role = Role.LOGITS

    def __len__(self) -> int:
        return len(self.values)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far the reference agrees with the user's answers.

    `rel_l2`: the worst image's, against the reference in FP64. `allowed`: the bound, from `noise`, FP32's error against
    FP64.
    """

    file: str
    sha256: str
    images: int
    rel_l2: float
    allowed: float
    noise: float

    @property
    def agrees(self) -> bool:
        """Whether the reference is the user's model."""
        return self.rel_l2 <= self.allowed

    @property
    def sentence(self) -> str:
        """For the report."""
        return (
            f"The reference {'agrees' if self.agrees else 'does not agree'} with your answers: {self.images} images of"
            f" {self.file}, relative L2 {self.rel_l2:.1e} of {self.allowed:.1e} allowed ({FP32_FACTOR:g} x FP32's"
            " noise)."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**dataclasses.asdict(self), "agrees": self.agrees}

    @classmethod
    def of(cls, entry: AgreementEntry) -> Agreement:
        """What a manifest says."""
        return cls(**{field.name: getattr(entry, field.name) for field in dataclasses.fields(cls)})


def read_answers(path: Path) -> GivenAnswers:
    """Read the npz. UsageError, which says what is wrong, for a file without usable arrays."""
    try:
        there = npz_names(path)
        output = Role.EMBEDDING if "embedding" in there and "logits" not in there else Role.LOGITS
        arrays = read_npz(path, {"input": _MOST_BYTES, output.value: _MOST_BYTES})
    except ValueError as error:
        raise UsageError(f"--answers {path} cannot be read ({_reason(path, error)}).", _NO_ANSWERS) from None
    inputs, values = arrays["input"], arrays[output.value]
    if problem := _problem(inputs, values, output):
        raise UsageError(f"--answers {path}: {problem}.", _NO_ANSWERS)
    chosen = np.ascontiguousarray(inputs[:MOST_IMAGES], np.float32)
    return GivenAnswers(path, sha256_of(path), chosen, values[:MOST_IMAGES].astype(np.float64), output)


def _reason(path: Path, error: ValueError) -> str:
    if not path.exists():
        return "it does not exist"
    return str(error) if path.is_file() and zipfile.is_zipfile(path) else "it is no npz"


def _problem(inputs: Array, values: Array, output: Role) -> str:
    wanted = "(N, classes)" if output is Role.LOGITS else "(N, C)"
    for name, array, shape, rank in (("input", inputs, "(N, C, H, W)", 4), (output.value, values, wanted, 2)):
        if array.dtype not in (np.float32, np.float64):
            coarse = "; 16 bits are too coarse to tell" if array.dtype == np.float16 else ""
            return f"{name} is {array.dtype}, not float32{coarse}"
        if array.ndim != rank:
            return f"{name} has shape {array.shape}, not {shape}"
        if not np.isfinite(array).all():
            return f"{name} has values that are not finite"
    if len(inputs) != len(values) or not len(inputs):
        return f"{len(inputs)} inputs and {len(values)} answers"
    if inputs.shape[1] != 3 == inputs.shape[-1]:
        return f"input has shape {inputs.shape}, channels last; the model takes (N, 3, H, W)"
    if not values.any():
        return "every answer is zero, as of a freshly initialised model"
    if output is Role.LOGITS and values.min() >= 0 and np.allclose(values.sum(axis=1), 1, atol=1e-3):
        return "the answers are probabilities; give the logits, before softmax"
    return ""


def check_is_ours(origin: str) -> None:
    """UsageError for a model that answers prove nothing about: a module of the user's own is the reference itself."""
    if origin == "module":
        raise UsageError(
            "--answers tell whether a checkpoint was read as your own code reads it, and here your own module runs.",
            "Leave --answers out.",
        )


def hold_to_answers(
    loaded: LoadedModel, given: GivenAnswers, say: Say, *, is_fixed: bool = False
) -> tuple[LoadedModel, Agreement]:
    """The model that agrees with the user's logits, and how far it does.

    Where assumed hyperparameters disagree and others agree, it is the model with these; not where `is_fixed`, as for a
    finished bundle. MismatchError where a hyperparameter would have to differ from what was given, or no searched value
    agrees. UsageError for logits of another kind of model.
    """
    _check_fits(loaded, given)
    agreement = compared(loaded, given)
    if agreement.agrees:
        return dataclasses.replace(loaded, settings=confirmed(loaded.settings)), agreement
    _check_order(loaded, given, agreement.allowed)
    say(f"{given.path.name} disagrees (relative L2 {agreement.rel_l2:.1e}): searching what the file does not show.")
    best = search(loaded, given, say)
    found = compared(best, given)
    pairs = [pair for pair in zip(loaded.settings, best.settings, strict=True) if pair[0].value != pair[1].value]
    said, changed = [old for old, _ in pairs], [new for _, new in pairs]
    if not changed or not found.agrees:
        raise _nothing_agrees(given, found, loaded.settings, changed)
    if is_fixed or not all(setting.is_assumed for setting in said):
        options = " ".join(map(_option, changed))
        raise MismatchError(
            f"The model does not agree with {given.path}: relative L2 {agreement.rel_l2:.1e} of"
            f" {agreement.allowed:.1e} allowed. With {_words(changed)} instead of {_words(said)}"
            f" ({said[0].source.sentence}) it does ({found.rel_l2:.1e}).",
            f"Export it again with {options}." if is_fixed else f"Give {options}, or correct what says otherwise.",
        )
    for old, new in pairs:
        say(f"{new} ({new.source.sentence}; {old} was assumed).")
    return dataclasses.replace(best, settings=confirmed(best.settings)), found


def compared(loaded: LoadedModel, given: GivenAnswers) -> Agreement:
    """How far the model agrees with the user's logits."""
    with giving(loaded.model, given.output):
        exact = evaluate_fp64(loaded.model, given.input)
        noise = max(worst_relative_l2(evaluate(loaded.model, given.input), exact), _LEAST_NOISE)
    error = worst_relative_l2(given.values, exact)
    return Agreement(given.path.name, given.sha256, len(given), error, FP32_FACTOR * noise, noise)


def search(loaded: LoadedModel, given: GivenAnswers, say: Say) -> LoadedModel:
    """The model with the hyperparameters that come nearest to the first images' answers, of those that tensors do not
    show.

    Tries each by itself; then heads, qk scale (divisions where channels are shifted) and activation in all
    combinations; after each of these, usual epsilons with the best so far. Then solves for qk scale and epsilon, which
    are real numbers, with the nearest of these. Ends where only FP32 error is left, and after `SEARCH_SECONDS`.
    """
    candidates = _Search(loaded, given, say)
    architecture = loaded.architecture
    heads, divisions = (
        ([], []) if architecture is None else (architecture.heads_that_fit, architecture.divisions_that_fit)
    )
    mixing: Choices = {"heads": heads, "qk_scale": _SCALES} if heads else {"divisions": divisions} if divisions else {}
    activation: Choices = {"activation": ACTIVATIONS}
    epsilon: Choices = {"norm_eps": _EPSILONS}
    for choices in (mixing, activation, {**mixing, **activation}):
        candidates.improve(choices)
        candidates.improve(epsilon, candidates.values)
    candidates.solve([candidates.values], ("norm_eps",))
    if heads:
        for others in ({}, activation):
            candidates.solve(candidates.nearest({"heads": heads, **others}), ("qk_scale", "norm_eps"))
    return candidates.model()


Choices = dict[str, Sequence[Any]]


class _Search:
    """The best hyperparameters so far, and their error on the first images."""

    def __init__(self, loaded: LoadedModel, given: GivenAnswers, say: Say) -> None:
        self._loaded = loaded
        self._say = say
        self._tried = 0
        self._end = time.monotonic() + SEARCH_SECONDS
        self._said = time.monotonic()
        images = math.ceil(_LEAST_NUMBERS / given.values.shape[1])
        self._given = dataclasses.replace(given, input=given.input[:images], values=given.values[:images])
        self._begun = {setting.name: setting.value for setting in loaded.settings}
        self.values = dict(self._begun)
        first = compared(loaded, self._given)
        self.error = first.rel_l2
        self._noise = 2 * first.noise  # of two evaluations in FP32

    def improve(self, choices: Choices, others: dict[str, Any] | None = None) -> None:
        """Try all combinations of `choices`, with `others` for the rest (by default the initial values), and keep the
        best.
        """
        before = dict(others or self._begun)
        for combination in itertools.product(*choices.values()):
            if self._is_over():
                return
            self._try({**before, **dict(zip(choices, combination, strict=True))})

    def nearest(self, choices: Choices) -> list[dict[str, Any]]:
        """The combinations of `choices` that come nearest with some qk scale of a grid, each with that scale."""
        found: list[tuple[float, dict[str, Any]]] = []
        for combination in itertools.product(*choices.values()):
            if self._is_over():
                break
            chosen = {**self._begun, **dict(zip(choices, combination, strict=True))}
            scaled = [{**chosen, "qk_scale": scale} for scale in _SCALE_GRID]
            found.append(min(((self._error(values), values) for values in scaled), key=lambda pair: pair[0]))
        return [values for _, values in sorted(found, key=lambda pair: pair[0])[:_NEAREST]]

    def solve(self, starts: Iterable[dict[str, Any]], names: Sequence[str]) -> None:
        """Solve for the real numbers `names`, from each of `starts`, and keep the best."""
        for start in starts:
            values = start
            for free in dict.fromkeys((names[:1], tuple(names))):
                if self._is_over():
                    return
                values = self._solved(self._with_usual_epsilon(values), free)
            for name in reversed(names):
                values = self._rounded(values, name)
            self._try(values)

    def _with_usual_epsilon(self, values: dict[str, Any]) -> dict[str, Any]:
        """`values` with the usual epsilon that comes nearest."""
        tried = [values, *({**values, "norm_eps": epsilon} for epsilon in _EPSILONS)]
        return min(tried, key=self._error)

    def _solved(self, values: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """`values` with the numbers `names` that come nearest, by least squares of their logarithms."""

        def with_logarithms(point: Array) -> dict[str, Any]:
            return {**values, **dict(zip(names, np.exp(point).tolist(), strict=True))}

        start = np.log([max(values[name], _LEAST_NUMBER) for name in names])
        return with_logarithms(least_squares(lambda point: self._off(with_logarithms(point)), start, self._is_late))

    def _rounded(self, values: dict[str, Any], name: str) -> dict[str, Any]:
        """`values` with the initial `name`, or as few of its digits, as do as well but for FP32's error."""
        limit = max(self._error(values), self._noise)
        fewer = (float(f"{values[name]:.{digits}g}") for digits in _DIGITS)
        tried = ({**values, name: value} for value in (self._begun[name], *fewer))
        return next((rounded for rounded in tried if self._error(rounded) <= limit), values)

    def _is_over(self) -> bool:
        return self.error <= self._noise or self._is_late()

    def _is_late(self) -> bool:
        return time.monotonic() > self._end

    def model(self) -> LoadedModel:
        """The model with the best values."""
        return self._with(self.values)

    def _try(self, values: dict[str, Any]) -> None:
        error = self._error(values)
        if error < self.error:
            self.values, self.error = values, error

    def _error(self, values: dict[str, Any]) -> float:
        """Relative L2, of the image that is furthest away."""
        return worst_relative_l2(self._answers(values), self._given.values)

    def _off(self, values: dict[str, Any]) -> Array:
        """How far each number is away, as a share of the image's answer."""
        size = np.maximum(np.linalg.norm(self._given.values, axis=1, keepdims=True), _LEAST_NUMBER)
        return np.ravel((self._answers(values) - self._given.values) / size)

    def _answers(self, values: dict[str, Any]) -> Array:
        self._tried += 1
        if time.monotonic() > self._said + _SAY_EVERY_S:
            self._said = time.monotonic()
            self._say(f"{self._tried} combinations tried, the nearest {self.error:.1e} off.")
        model = self._with(values).model
        with giving(model, self._given.output):
            return evaluate(model, self._given.input)

    def _with(self, values: dict[str, Any]) -> LoadedModel:
        from spach_deploy.models.checkpoint import with_settings

        settings = tuple(
            old if old.value == values[old.name] else Setting(old.name, values[old.name], Source.ANSWERS)
            for old in self._loaded.settings
        )
        return with_settings(self._loaded, settings)


def least_squares(off: Callable[[Array], Array], start: Array, is_late: Callable[[], bool]) -> Array:
    """The point near `start` with the smallest sum of squares of `off`, by the method of Levenberg and Marquardt.

    Derivatives are differences over `_DIFFERENCE`, as FP32 allows them. Ends where a step changes nothing that counts.
    """
    point, here, damping = start, off(start), 1e-3
    slopes = None
    for _ in range(_STEPS):
        if is_late():
            break
        if slopes is None:
            slopes = np.stack([(off(point + _DIFFERENCE * axis) - here) / _DIFFERENCE for axis in np.eye(len(start))])
        square = slopes @ slopes.T
        damped = square + np.diag(damping * np.diag(square) + _LEAST_NUMBER)
        step = np.clip(np.linalg.solve(damped, -slopes @ here), -1, 1)
        there = off(point + step)
        if np.linalg.norm(there) < np.linalg.norm(here):
            point, here, damping, slopes = point + step, there, damping / 10, None
        else:
            damping *= 10
        if np.abs(step).max() < _SMALL_STEP:
            break
    return point


def _check_fits(loaded: LoadedModel, given: GivenAnswers) -> None:
    """UsageError where the user's arrays have other shapes than the model's."""
    height, width, channels = loaded.preprocessing.pixel_shape
    wanted, theirs = (channels, height, width), given.input.shape[1:]
    if theirs != wanted:
        hint = f"Give answers to images of {size_in_words((height, width))} pixels and {channels} channels."
        if theirs[0] == channels:
            size = size_in_words((theirs[1], theirs[2]))
            hint = f"Give --image-size {size}, or answers to images of {size_in_words((height, width))} pixels."
        raise UsageError(f"The inputs in {given.path} are {given.input.shape[1:]}, and the model takes {wanted}.", hint)
    is_logits, theirs_wide = given.output is Role.LOGITS, given.values.shape[1]
    ours, unit = (loaded.num_classes, "classes") if is_logits else (loaded.model.stage_shapes[-1][0], "channels")
    if theirs_wide != ours:
        raise UsageError(
            f"The answers in {given.path} have {theirs_wide} {unit}, the model has {ours}.",
            "Give answers of the model in the checkpoint.",
        )


def _check_order(loaded: LoadedModel, given: GivenAnswers, allowed: float) -> None:
    """UsageError where the logits are right, but in another order than the inputs."""
    with giving(loaded.model, given.output):
        exact = evaluate_fp64(loaded.model, given.input)
    nearest = [int(np.linalg.norm(given.values - row, axis=1).argmin()) for row in exact]
    if len(given) > 1 and worst_relative_l2(given.values[nearest], exact) <= allowed:
        raise UsageError(
            f"The answers in {given.path} are the model's, but in another order than their inputs.",
            "Write both in one order.",
        )


def _nothing_agrees(
    given: GivenAnswers,
    found: Agreement,
    settings: Sequence[Setting],
    changed: Sequence[Setting],
) -> MismatchError:
    if changed:
        why = f"and no {_searched(settings)} make it agree: nearest is {_words(changed)}, with a"
    else:
        why = f"and no other {_searched(settings)} come nearer:"
    return MismatchError(
        f"The model does not agree with {given.path}, {why} relative L2 of {found.rel_l2:.1e} ({found.allowed:.1e} is"
        " allowed).",
        "Were they computed with these weights, in evaluation mode, in FP32 without autocast and TF32, on images as in"
        " `input`?",
    )


def _searched(settings: Iterable[Setting]) -> str:
    """`heads, qk scale, activation or epsilon`: the settings that `search` tries, of those that the model has."""
    names = [
        "epsilon" if s.name == "norm_eps" else s.name.replace("_", " ") for s in settings if s.name not in OF_PIXELS
    ]
    return " or ".join([", ".join(names[:-1]), *names[-1:]])


def _words(settings: Iterable[Setting]) -> str:
    return ", ".join(map(str, settings))


def _option(setting: Setting) -> str:
    return f"--{setting.name.replace('_', '-')} {setting.value if setting.value is not None else 0}"
