"""Find the architecture that a checkpoint's tensors belong to, and compare it with what the user and its `args` say.

An architecture is read from names and shapes of tensors; whether blocks share a spatial function, from their values.
Tensors do not show the number of attention heads, the scale of q, activation and epsilon (`hyperparameters`), nor the
image size, except where an MLP over tokens fixes their number.

`args` is the command line that published training code stores: `model` (its registry name), `input_size` (pixels) and
`nb_classes`.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from spach_deploy.common.errors import CheckpointError, ModelError
from spach_deploy.common.text import noun
from spach_deploy.models.checkpoint_content import ignoring, shown
from spach_deploy.models.published import ARCHITECTURES, CHANNELS_PER_HEAD, CHANNELS_PER_SHIFT, TORCH_EPS
from spach_deploy.models.registry import Match, create_model, published_match, reference_name, resolve
from spach_deploy.options.architecture import (
    CONV,
    LARGEST_SIDE,
    MLP,
    SHIFT,
    SMLP,
    TRANS,
    Architecture,
    Sides,
    size_in_words,
)

if TYPE_CHECKING:
    from torch import Tensor

Tensors = Mapping[str, "Tensor"]
Shape = tuple[int, ...]

_OUTDATED_ARGS = "if its args are out of date, save the weights alone, with torch.save(model.state_dict(), ...)."
_WRONG_FILE = f"Is it the right file? Or, {_OUTDATED_ARGS}"


def compare_model(args: Mapping[str, Any], name: str, asked: bool) -> list[str]:
    """Compare the model in `args` with `name`, which was requested (`asked`) or inferred.

    Returns a note. CheckpointError when they conflict. Training code that changes a model's options keeps its name, so
    another name than that of an architecture outside the table is no conflict.
    """
    said = args.get("model")
    if not isinstance(said, str):
        return []
    if said == name or (name in ARCHITECTURES and said in (reference_name(name), f"spach_{name}")):
        return [f"args say model {said}, which agrees"]
    try:
        other = resolve(str(said))
    except ModelError:
        return [f"args say model {said!r}, a name that is not known here; not compared"]
    if name not in ARCHITECTURES:
        return [f"args say model {said}, whose published tensors are others"]
    meaning = "" if other == said else f" (here {other})"
    have = f"{name} was asked for" if asked else f"its tensors are those of {name}"
    raise CheckpointError(
        f"The checkpoint's args say model {said}{meaning}, but {have}.",
        f"Give --model {other}, or, {_OUTDATED_ARGS}" if asked else _WRONG_FILE,
    )


def compare_classes(args: Mapping[str, Any], num_classes: int) -> list[str]:
    """Compare the number of classes in `args` with the head's; returns notes. CheckpointError when they conflict."""
    notes: list[str] = []
    for field in ("nb_classes", "num_classes"):
        said = _number(args.get(field))
        if said is not None and said != num_classes:
            raise CheckpointError(
                f"The checkpoint's args say {said} {noun(said, 'class')} ({field}), but its head has {num_classes}.",
                _WRONG_FILE,
            )
        notes += [f"args say {said} {noun(said, 'class')}, which agrees"] if said is not None else []
    return notes[:1]


def image_size_of(
    architecture: Architecture, tensors: Tensors, args: Mapping[str, Any], asked: Sides | None
) -> tuple[Sides, list[str]]:
    """Image size in pixels, and a note on where it is from: `asked`, else that of `args`, else 224.

    An MLP over tokens fixes their number; then the size is one of those that give it. CheckpointError when `asked` or
    `args` give another.
    """
    said = _said_size(args)
    if architecture.family == "smlpnet":
        return _fixed_size(architecture.image_size, asked, said)
    fixed = _fixed_tokens(architecture, tensors)
    if fixed is not None:
        return _size_of_tokens(architecture, fixed, asked, said)
    size = next(size for size in (asked, said, (224, 224)) if size is not None)
    architecture.replace(image_size=size)
    words = size_in_words(size)
    if said is None:
        why = "as asked" if asked is not None else "the default, as the file does not say"
        return size, [f"image size {words}: {why}"]
    if size == said:
        return size, [f"image size {words}: args say so" + (", which agrees" if asked is not None else "")]
    return size, [f"image size {words} as asked, though args say that it was trained at {size_in_words(said)}"]


def _fixed_size(size: Sides, asked: Sides | None, said: Sides | None) -> tuple[Sides, list[str]]:
    """The image size that the weights fix. CheckpointError for another that was asked for or that args say."""
    words = size_in_words(size)
    for other, who in ((asked, "was asked for"), (said, "is what its args say")):
        if other is not None and other != size:
            raise CheckpointError(
                f"The checkpoint is of a model for {words} pixels, as its layers along rows and columns fix the grid,"
                f" but {size_in_words(other)} {who}.",
                f"Give --image-size {words}." if other == asked else _WRONG_FILE,
            )
    agree = " and args" if said is not None else ""
    asked_for = ", which agrees with what was asked for" if asked is not None else ""
    return size, [f"image size {words}: the weights along rows and columns{agree} say so{asked_for}"]


def _fixed_tokens(architecture: Architecture, tensors: Tensors) -> tuple[int, int] | None:
    """(stage, number of tokens) of the first MLP over tokens; None without one."""
    for stage, (name, mixers) in enumerate(zip(architecture.stage_names, architecture.mixers, strict=True)):
        if MLP in mixers:
            block = mixers.index(MLP) + (1 if stage else 0)  # later stages begin with a downsampling
            shape = _shape(tensors, f"{name}.{block}.spatial_func.fc1.weight")
            return (stage, shape[1]) if len(shape) == 2 else None
    return None


def _size_of_tokens(
    architecture: Architecture, fixed: tuple[int, int], asked: Sides | None, said: Sides | None
) -> tuple[Sides, list[str]]:
    """The image size that gives a stage this number of tokens: `asked`, `said`, or that of a square grid."""
    stage, tokens = fixed

    def fits(size: Sides) -> bool:
        step = architecture.patch_size << stage
        return (size[0] // step) * (size[1] // step) == tokens

    side = math.isqrt(tokens)
    square = (side << stage) * architecture.patch_size if side * side == tokens else None
    for size, who in ((asked, "was asked for"), (said, "is what its args say")):
        if size is not None and not fits(size):
            usual = f"for {square} pixels" if square is not None else f"of {tokens} tokens in stage {stage + 1}"
            raise CheckpointError(
                f"The checkpoint is of a model {usual}, as its spatial MLP's weights fix the number of tokens, but"
                f" {size_in_words(size)} {who}.",
                f"Give --image-size {square}." if size == asked and square is not None else _WRONG_FILE,
            )
    chosen = asked or said or (None if square is None else (square, square))
    if chosen is None:
        raise CheckpointError(
            f"The spatial MLPs of the checkpoint mix {tokens} tokens in stage {stage + 1}, which is no square grid.",
            "Give the size of the images: --image-size HEIGHTxWIDTH.",
        )
    why = "the spatial MLP's weights say so"
    if said is not None:
        why = "the spatial MLP's weights and args say so"
    if asked is not None:
        why = "as asked for, and the spatial MLP's weights fit"
    return chosen, [f"image size {size_in_words(chosen)}: {why}"]


def _said_size(args: Mapping[str, Any]) -> Sides | None:
    """`input_size` of args: one number, (height, width), or both after the channels."""
    value = args.get("input_size")
    sequence = list(value)[-2:] if isinstance(value, (list, tuple)) else [value]
    said = [number for entry in sequence if (number := _number(entry)) is not None]
    return (said[0], said[-1]) if said else None


def _number(value: Any) -> int | None:
    """`value` if it is an integer, or the last of a sequence such as (3, 224, 224); None otherwise."""
    if isinstance(value, (list, tuple)) and value:
        value = value[-1]
    if isinstance(value, bool):
        return None
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return None


# Names and shapes


@dataclasses.dataclass(frozen=True)
class Differences:
    """How a state dict differs from a model's. `misshaped`: (name, shape in the file, shape needed)."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshaped: tuple[tuple[str, Shape, Shape], ...]

    @property
    def count(self) -> int:
        """Number of tensors that do not fit; 0 if all do."""
        return len(self.missing) + len(self.unexpected) + len(self.misshaped)

    def __str__(self) -> str:
        shapes = [f"{name} is {_by(there)} instead of {_by(needed)}" for name, there, needed in self.misshaped]
        groups = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": shapes}
        return "; ".join(f"{len(names)} {what} ({shown(names)})" for what, names in groups.items() if names)


def differences(architecture: Architecture, tensors: Tensors) -> Differences:
    """Compare `tensors` with the model of `architecture`."""
    import torch

    with torch.device("meta"):
        state = create_model(architecture).state_dict()
    needed = {name: tuple(tensor.shape) for name, tensor in state.items()}
    there = {name: tuple(tensors[name].shape) for name in needed if name in tensors}
    return Differences(
        missing=tuple(name for name in needed if name not in tensors and not _is_counter(name)),
        unexpected=tuple(name for name in tensors if name not in needed),
        misshaped=tuple((name, shape, needed[name]) for name, shape in there.items() if shape != needed[name]),
    )


_HEADS = ("head.weight", "mlp_head.0.weight")


def num_classes_of(tensors: Tensors) -> int | None:
    """Number of classes: rows of the head's weight. None without a head."""
    head = next((tensors[name] for name in _HEADS if name in tensors), None)
    return int(head.shape[0]) if head is not None and head.ndim == 2 else None


def read_architecture(tensors: Tensors) -> Architecture:
    """The architecture that most tensors show, with assumed heads and some image size (`image_size_of` knows better).

    CheckpointError where they are not those of a SPACH model.
    """
    readers = {"token_mix.0.1.proj_h.weight": _smlpnet, "layers.0.blocks.0.mlp.fc1.weight": _shiftvit}
    read = next((reader for name, reader in readers.items() if name in tensors), None)
    if read is None and "stem.proj.weight" not in tensors and "stem.proj.0.weight" not in tensors:
        raise _not_a_model(tensors)
    try:
        if read is not None:
            return read({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        return _Reader({name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors).architecture()
    except (IndexError, KeyError, ZeroDivisionError):
        raise _not_a_model(tensors) from None
    except ModelError as error:
        raise CheckpointError(f"The checkpoint's tensors fit no model: {error.message}", error.hint) from None


def _not_a_model(tensors: Tensors) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint's tensors are not those of a SPACH model: it holds {shown(tensors)}.",
        "spach-export --list shows the published ones.",
    )


_MIXING = (r"channel_mix\.\d+\.2\.net\.0\.weight", r"channel_mix\.\d+\.2\.net\.3\.weight")
_SHIFTED = (r"layers\.\d\.blocks\.\d+\.mlp\.fc1\.weight", r"layers\.\d\.blocks\.\d+\.mlp\.fc2\.weight")
"""Names of the MLPs' weights in sMLPNet and ShiftViT."""


def _smlpnet(shapes: Mapping[str, Shape]) -> Architecture:
    """The architecture that the tensors of an sMLPNet show: all of it, but for activation and epsilon."""
    width, channels, patch, _ = shapes["to_patch_embedding.0.0.weight"]
    blocks = itertools.takewhile(
        lambda name: name in shapes, map("token_mix.{}.1.fuse.weight".format, itertools.count())
    )
    depths = [len(list(run)) for _, run in itertools.groupby(shapes[name][0] for name in blocks)]
    return Architecture(
        family="smlpnet",
        channels=channels,
        classes=shapes.get("mlp_head.0.weight", (Architecture.classes,))[0],
        patch_size=patch,
        width=width,
        stages=tuple(((SMLP, depth),) for depth in depths),
        channel_ratio=_ratio(_hidden(shapes, *_MIXING), 3.0, width),
        norm_eps=TORCH_EPS,
        image_size=_size_of_axes(shapes, patch),
    )


def _size_of_axes(shapes: Mapping[str, Shape], patch: int) -> Sides:
    """The image size that the layers along the axes of an sMLPNet's first stage fix."""
    return shapes["token_mix.0.1.proh_w.weight"][0] * patch, shapes["token_mix.0.1.proj_h.weight"][0] * patch


def _shiftvit(shapes: Mapping[str, Shape]) -> Architecture:
    """The architecture that the tensors of a ShiftViT show; shifts of as many channels as in all published models."""
    width, channels, patch, _ = shapes["patch_embed.proj.weight"]
    stages: dict[int, int] = collections.Counter()
    for name in shapes:
        if match := re.fullmatch(r"layers\.(\d)\.blocks\.\d{1,3}\.mlp\.fc1\.weight", name):
            stages[int(match[1])] += 1
    step = patch << (len(stages) - 1)
    return Architecture(
        family="shiftvit",
        channels=channels,
        classes=shapes.get("head.weight", (Architecture.classes,))[0],
        patch_size=patch,
        width=width,
        stages=tuple(((SHIFT, stages[stage]),) for stage in sorted(stages)),
        channel_ratio=_ratio(_hidden(shapes, *_SHIFTED), 4.0, width),
        norm_eps=TORCH_EPS,
        divisions=max(4, width // CHANNELS_PER_SHIFT),
        image_size=(2 * step, 2 * step) if 2 * step > 224 else (224, 224),
    )


class _Reader:
    """Reads an architecture from tensors. Where they contradict each other, what most of them say counts."""

    def __init__(self, shapes: Mapping[str, Shape], tensors: Tensors) -> None:
        self._shapes = shapes
        self._tensors = tensors
        self._stages = self._find_stages()
        self._blocks = [block for stage in self._stages for block in stage]

    def architecture(self) -> Architecture:
        """All that can be seen."""
        is_conv = "stem.proj.0.weight" in self._shapes
        stem = self._shapes["stem.proj.0.weight" if is_conv else "stem.proj.weight"]
        patch = self._shapes["stem.proj.9.weight"][3] * 2 if is_conv else stem[3]
        width = self._width()
        mixers = [[self._mixer(block) for block in stage] for stage in self._stages]
        spatial = [block for block in self._blocks if self._mixer(block) != CONV]
        attention = [block for block in self._blocks if self._mixer(block) == TRANS]
        step = patch << (len(mixers) - 1)
        side = step * max(2, min(64, LARGEST_SIDE // step))  # any that is large enough
        dims = [width << index for index, stage in enumerate(mixers) if TRANS in stage]
        architecture = Architecture(
            channels=stem[1],
            classes=num_classes_of(self._tensors) or Architecture.classes,
            stem="conv" if is_conv else "patch",
            patch_size=patch,
            width=width,
            stages=tuple(_runs(stage) for stage in mixers),
            heads=assumed_heads(width, dims),
            qkv_bias=self._most(f"{block}.spatial_func.qkv.bias" for block in attention),
            channel_ratio=_ratio(self._pairs("channel_func", self._blocks), 2.0, width),
            token_ratio=_ratio(self._pairs("spatial_func", spatial), 0.5, 4),
            position_encoding=self._most(f"{block}.cpe_net.net.1.weight" for block in self._blocks),
            layer_scale=self._most(f"{block}.gamma_1" for block in spatial),
            image_size=(side, side),
        )
        return architecture.replace(shared=self._is_shared(architecture))

    def _find_stages(self) -> list[list[str]]:
        """For each stage, the names of its blocks: up to the last that has any tensor."""
        found: dict[str, int] = {}
        for name in self._shapes:
            if match := re.match(r"(blocks|layer[1-9])\.(\d{1,3})\.", name):
                found[match[1]] = max(found.get(match[1], 0), int(match[2]))
        if "blocks" in found:
            return [[f"blocks.{index}" for index in range(found["blocks"] + 1)]]
        count = next((index for index in range(9) if f"layer{index + 1}" not in found), 9)
        return [
            [f"layer{stage + 1}.{index}" for index in range(1 if stage else 0, found[f"layer{stage + 1}"] + 1)]
            for stage in range(count)
        ]

    def _width(self) -> int:
        """Channels of the first stage."""
        of = {"stem.proj.weight": 0, "stem.proj.9.weight": 0, "norm1.weight": 0, "norm2.weight": len(self._stages) - 1}
        of |= {f"{block}.norm2.weight": stage for stage, blocks in enumerate(self._stages) for block in blocks}
        votes = [self._shapes[name][0] >> stage for name, stage in of.items() if self._shapes.get(name)]
        return collections.Counter(votes).most_common(1)[0][0]

    def _mixer(self, block: str) -> str:
        """How a block mixes tokens."""
        start = f"{block}.spatial_func."
        inside = {name.removeprefix(start) for name in self._shapes if name.startswith(start)}
        if inside & {"qkv.weight", "proj.weight"}:
            return TRANS
        return MLP if inside else CONV

    def _most(self, names: Iterable[str]) -> bool:
        """Whether at least half of the tensors are there; True where there is none to have."""
        there = [name in self._shapes for name in names]
        return 2 * sum(there) >= len(there)

    def _pairs(self, part: str, blocks: Iterable[str]) -> list[tuple[int, int]]:
        """(inputs, hidden) of the MLPs in these blocks."""
        start = rf"({'|'.join(map(re.escape, blocks))})\.{part}"
        return _hidden(self._shapes, rf"{start}\.fc1\.weight", rf"{start}\.fc2\.weight")

    def _is_shared(self, architecture: Architecture) -> bool:
        """Whether all stages whose blocks could share a spatial function have equal ones."""
        shared = architecture.replace(shared=True)
        groups = list(shared_groups(shared, self._shapes))
        return bool(groups) and not any(unequal(group, self._tensors) for group in groups)


def _runs(mixers: Iterable[str]) -> tuple[tuple[str, int], ...]:
    """Mixers of blocks as (mixer, number of blocks) in order."""
    return tuple((mixer, len(list(run))) for mixer, run in itertools.groupby(mixers))


def assumed_heads(width: int, dims: list[int]) -> int:
    """Number of heads where nothing says it: of those that divide the attentions' channels (`dims`), the nearest to one
    for each 32 channels of `width`, which all published models have. 0 without attention.
    """
    fitting = [heads for heads in range(1, min(dims, default=0) + 1) if not any(dim % heads for dim in dims)]
    usual = width / CHANNELS_PER_HEAD
    return min(fitting, key=lambda heads: (abs(math.log(heads / usual)), heads), default=0)


def _ratio(pairs: list[tuple[int, int]], otherwise: float, least: int) -> float:
    """A short decimal r with hidden = int(inputs * r) for all (inputs, hidden), or for as many as agree on one.

    `otherwise` without any, and where `least` inputs would have nothing hidden.
    """
    agreeing = ([(n, h) for n, h in pairs if h / n <= low < (h + 1) / n] for low in sorted({h / n for n, h in pairs}))
    chosen = max(agreeing, key=len, default=[])
    low, high = max((h / n for n, h in chosen), default=0.0), min(((h + 1) / n for n, h in chosen), default=0.0)
    if chosen and round(low, 3) == low and all(int(inputs * low) == hidden for inputs, hidden in chosen):
        return low if int(least * low) else otherwise
    for digits in range(1, 17) if chosen else ():
        for value in (float(f"{low:.{digits}g}"), float(f"{(low + high) / 2:.{digits}g}")):
            if all(int(inputs * value) == hidden for inputs, hidden in chosen):
                return value if int(least * value) else otherwise
    return otherwise


def _hidden(shapes: Mapping[str, Shape], first: str, second: str) -> list[tuple[int, int]]:
    """(inputs, hidden) of MLPs, as each weight of their two layers says it. `first`, `second`: patterns of names."""
    matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1}
    firsts = (shape for name, shape in matrices.items() if re.fullmatch(first, name))
    seconds = (shape for name, shape in matrices.items() if re.fullmatch(second, name))
    return [*((shape[1], shape[0]) for shape in firsts), *((shape[0], shape[1]) for shape in seconds)]


def shared_groups(architecture: Architecture, names: Iterable[str]) -> Iterator[list[str]]:
    """Groups of tensors that are one in the model, because the blocks of a stage have one spatial function."""
    for stage, name in enumerate(architecture.stage_names):
        if architecture.is_shared(stage):
            groups: dict[str, list[str]] = {}
            for tensor in names:
                if tensor.startswith(f"{name}.") and ".spatial_func." in tensor:
                    groups.setdefault(tensor.partition(".spatial_func.")[2], []).append(tensor)
            yield from (group for group in groups.values() if len(group) > 1)


def unequal(group: list[str], tensors: Tensors) -> list[str]:
    """Names of the tensors in a group that do not equal its first."""
    first, *copies = (name for name in group if name in tensors)
    return [name for name in copies if not tensors[first].equal(tensors[name])]


# Which model it is


def infer_model(
    tensors: Tensors, args: Mapping[str, Any], asked: Sides | None, *, is_headless: bool = False
) -> tuple[Match, list[str]]:
    """The architecture that `tensors` fit, and notes. CheckpointError that names the tensors that contradict it.

    `is_headless`: a model without a head is asked for; else a file without one is refused.
    """
    match, difference, notes = nearest(tensors, args, asked, is_headless=is_headless)
    if difference.count:
        raise CheckpointError(
            f"The checkpoint's tensors fit no model; nearest is {match}: {difference}.",
            _next_step(difference, tensors) or "Was the file saved whole, and of one model?",
        )
    return match, notes


def nearest(
    tensors: Tensors, args: Mapping[str, Any], asked: Sides | None, *, is_headless: bool = False
) -> tuple[Match, Differences, list[str]]:
    """The architecture that most of `tensors` show, how they differ from it, and notes on the image size."""
    read = read_architecture(tensors)
    match = published_match(read.replace(classes=0) if is_headless else read)
    size, notes = image_size_of(match.architecture, tensors, args, asked)
    match = dataclasses.replace(match, architecture=match.architecture.replace(image_size=size))
    return match, differences(match.architecture, tensors), notes


def check_fit(architecture: Architecture, name: str, tensors: Tensors) -> None:
    """CheckpointError that lists all differences, unless `tensors` fit `architecture`, which is called `name`."""
    difference = differences(architecture, tensors)
    if difference.count:
        step = _next_step(difference, tensors) or _other_model(tensors, difference.count)
        raise CheckpointError(f"The checkpoint does not fit {name}: {difference}.", step)
    groups = shared_groups(architecture, tensors)
    if differing := [copy for group in groups for copy in unequal(group, tensors)]:
        raise CheckpointError(
            f"{name} has one spatial function for the blocks of a stage, but {len(differing)} differ "
            f"between blocks: {shown(differing)}.",
            _other_model(tensors),
        )


def _next_step(difference: Differences, tensors: Tensors) -> str:
    """Hint if only the head is missing, or if there are only additional tensors; empty otherwise."""
    if difference.misshaped or set(difference.missing) - {"head.weight", "head.bias"}:
        return ""
    more = [name for name in difference.unexpected if name.rpartition(".")[0] != _other_head(difference, tensors)]
    drop = f"Drop what is not the model's with {ignoring(more, set(tensors) - set(more))}." if more else ""
    if not difference.missing:
        return drop
    if other := _other_head(difference, tensors):
        return f"Its head is called {other}: save it again as head.weight and head.bias. {drop}".rstrip()
    return f"Give the file with its head, or --num-classes 0 for a model whose output is the embedding. {drop}".rstrip()


def _other_head(difference: Differences, tensors: Tensors) -> str | None:
    """Name of a layer in the file that could be the head, if `head` is missing; None otherwise."""
    width = tensors["norm2.weight"].shape if "norm2.weight" in tensors else ()
    for name in difference.unexpected:
        weight, stem = tensors[name], name.removesuffix(".weight")
        if difference.missing and stem != name and weight.ndim == 2 and weight.shape[1:] == width:
            return stem if getattr(tensors.get(f"{stem}.bias"), "shape", ()) == weight.shape[:1] else None
    return None


def _other_model(tensors: Tensors, count: float = math.inf) -> str:
    """Hint: the model that fits better than one with `count` differences, if one does."""
    try:
        match, difference, _ = nearest(tensors, {}, None)
    except CheckpointError:
        return "It does not seem to be of a SPACH model; spach-export --list shows the published ones."
    if not difference.count:
        return f"It fits {match}: {f'give --model {match.name}' if match.is_published else 'leave --model out'}."
    if difference.count < count:
        return f"Nearest is {match}, with {difference.count} differences."
    return "No other model is nearer; was the file saved whole, and of this model?"


def _is_counter(name: str) -> bool:
    """Whether this is BatchNorm's counter of training steps, which evaluation does not read and old files lack."""
    return name.endswith("num_batches_tracked")


def _by(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def _shape(tensors: Tensors, name: str) -> Shape:
    return tuple(tensors[name].shape) if name in tensors else ()
