"""The options of an export as frozen objects, parsed and checked once and passed unchanged through the pipeline.

Nothing here imports torch, numpy or a compiler, so that `--help` and option errors are instant. The parsers of GPU
names are in `gpus`.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import re
from pathlib import Path
from typing import Any

from spach_deploy.common.errors import UsageError
from spach_deploy.common.executors import ClusterAddress
from spach_deploy.common.files import Destination
from spach_deploy.common.text import parse_bytes
from spach_deploy.options.architecture import ACTIVATIONS as ACTIVATIONS
from spach_deploy.options.architecture import INTERPOLATIONS as INTERPOLATIONS
from spach_deploy.options.architecture import LARGEST_SIDE as LARGEST_SIDE
from spach_deploy.options.architecture import MOST_CHANNELS as MOST_CHANNELS
from spach_deploy.options.architecture import MOST_CLASSES as MOST_CLASSES
from spach_deploy.options.architecture import Architecture
from spach_deploy.options.architecture import ImageSize as ImageSize
from spach_deploy.options.architecture import sides as sides
from spach_deploy.options.architecture import size_in_words as size_in_words
from spach_deploy.options.architecture import size_of_sides as size_of_sides

Channels = tuple[float, ...]
"""A number for each channel of an image."""


class Precision(str, enum.Enum):
    """Precision of the typed graph."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    FP8 = "fp8"

    @property
    def is_half(self) -> bool:
        """Whether tensors have 16 bits."""
        return self in (Precision.FP16, Precision.BF16)

    @property
    def is_quantized(self) -> bool:
        """Whether weighted layers compute in 8 bits. `ExportOptions.rest` is then the precision of all else."""
        return self in (Precision.INT8, Precision.FP8)


class IODtype(str, enum.Enum):
    """Data type of the graph's input, and with it of its outputs.

    fp32, fp16: normalized images (B, C, H, W). uint8: decoded pixels (B, H, W, C), normalized within the graph. C is 3
    for RGB pictures, 1 for grey ones.
    Logits are float32, or float16 with fp16.
    """

    FP32 = "fp32"
    FP16 = "fp16"
    UINT8 = "uint8"


class Flavour(str, enum.Enum):
    """Which TensorRT builds the engine."""

    AUTO = "auto"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"
    NONE = "none"


class WeightSource(str, enum.Enum):
    """Which weights of a training checkpoint to take."""

    MODEL = "model"
    EMA = "ema"


@dataclasses.dataclass(frozen=True)
class BatchProfile:
    """Smallest, usual and largest batch that an engine accepts; kernels are tuned for `opt`."""

    min: int = 1
    opt: int = 8
    max: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise UsageError(
                f"Batch profile {self} is not 1 <= MIN <= OPT <= MAX.", "Give --batch 1:8:32, or one number."
            )

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"

    @classmethod
    def parse(cls, text: str) -> BatchProfile:
        """`8` (exactly that batch) or `MIN:OPT:MAX`."""
        if not re.fullmatch(r"\d{1,6}(:\d{1,6}:\d{1,6})?", text):
            raise UsageError(f"--batch {text!r} is not a batch profile.", "Give --batch 1:8:32, or one number.")
        numbers = [int(part) for part in text.split(":")]
        return cls(*numbers) if len(numbers) == 3 else cls(numbers[0], numbers[0], numbers[0])


@dataclasses.dataclass(frozen=True, order=True)
class ComputeCapability:
    """CUDA compute capability of a GPU, such as 8.9; written sm89."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"sm{self.major}{self.minor}"


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """The evaluation transform: resize, centre crop, scale to 0..1, normalize by channel. The published one by default.

    A picture keeps its shape and is resized until it just covers `resize_size`; of that, `image_size` is cut from the
    middle. Sizes are ImageSize: a square's side, or (height, width). `mean`, `std`: a number for each channel.
    """

    image_size: ImageSize = 224
    resize_size: ImageSize = 256
    interpolation: str = "bicubic, antialiased"
    mean: Channels = (0.485, 0.456, 0.406)
    std: Channels = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for name in ("image_size", "resize_size"):
            object.__setattr__(self, name, size_of_sides(*sides(getattr(self, name))))

    @classmethod
    def for_size(
        cls,
        size: ImageSize,
        mean: Channels | None = None,
        std: Channels | None = None,
        *,
        crop: float | None = None,
        interpolation: str | None = None,
    ) -> Preprocessing:
        """The evaluation transform for images of `size`, which is the part `crop` of the resized picture's shorter
        side, or of its height and width, 0.875 by default. Default mean and standard deviation are ImageNet's.
        """
        height, width = (math.floor(side / (crop or PUBLISHED_CROP)) for side in sides(size))
        return cls(
            size,
            (height, width),
            cls.interpolation if interpolation is None else interpolation_text(interpolation),
            mean=mean or cls.mean,
            std=std or cls.std,
        )

    @property
    def channels(self) -> int:
        """Number of channels of an image."""
        return len(self.mean)

    @property
    def pixel_shape(self) -> tuple[int, int, int]:
        """Shape of one image's pixels: (height, width, channels)."""
        return (*sides(self.image_size), self.channels)

    @property
    def takes_normalized(self) -> bool:
        """Whether pixels are not normalized, for images that are already: mean 0 and standard deviation 1."""
        return not any(self.mean) and set(self.std) == {1}


PUBLISHED_CROP, SMALLEST_CROP = 224 / 256, 0.1
"""Part of the resized picture that the published evaluation keeps of each side, and the least that may be kept."""


def interpolation_text(name: str) -> str:
    """One of `INTERPOLATIONS` as manifests have it, such as `bicubic, antialiased`."""
    return name if name == "nearest" else f"{name}, antialiased"


def channel_statistics(channels: int) -> tuple[Channels, Channels]:
    """Default mean and standard deviation of pixels: ImageNet's, and for another number of channels than 3 the mean
    over its three, for each.
    """
    mean, std = Preprocessing.mean, Preprocessing.std
    if channels == len(mean):
        return mean, std
    return (round(sum(mean) / 3, 4),) * channels, (round(sum(std) / 3, 4),) * channels


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """Settings of a model that cannot be inferred from a checkpoint's tensors. None: not given.

    `heads`: of every attention; `qk_scale`: factor of q, by default head size ** -0.5; `activation`: one of
    `ACTIVATIONS`; `norm_eps`: epsilon of every norm over channels; `divisions`: equal parts of a ShiftViT's channels,
    of which four come from neighbours; `mean`, `std`: of the pixels by channel, in 0..1, one number for all channels or
    one for each; `crop`: part of the resized picture that is kept; `interpolation`: one of `INTERPOLATIONS`.
    """

    heads: int | None = None
    qk_scale: float | None = None
    activation: str | None = None
    norm_eps: float | None = None
    divisions: int | None = None
    mean: Channels | None = None
    std: Channels | None = None
    crop: float | None = None
    interpolation: str | None = None

    def given(self) -> dict[str, Any]:
        """The settings that are given, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Which model, with which weights. `checkpoint` None means demo weights.

    `architecture`: a file with one, or one that is at hand, which `name` then only labels.
    `ignore`: fnmatch patterns of tensors in the checkpoint that are not part of the model. `module`: the factory of a
    module of the user's own, package.module:name.
    """

    name: str | None = None
    checkpoint: Path | None = None
    weights: WeightSource = WeightSource.MODEL
    image_size: ImageSize | None = None
    num_classes: int | None = None
    ignore: tuple[str, ...] = ()
    hyperparameters: Hyperparameters = Hyperparameters()
    architecture: Path | Architecture | None = None
    module: str | None = None


class Role(str, enum.Enum):
    """What an output means. A model computes the first four; the others follow from its logits.

    logits: class scores (B, classes). embedding: a vector for each image (B, C). features: a map of a network stage.
    """

    LOGITS = "logits"
    EMBEDDING = "embedding"
    FEATURES = "features"
    OTHER = "other"
    PROBABILITIES = "probabilities"
    TOP_VALUES = "top_values"
    TOP_INDICES = "top_indices"


class FeatureLayout(str, enum.Enum):
    """Layout of feature maps: (B, C, H, W), or tokens (B, H W, C), row-major."""

    NCHW = "nchw"
    TOKENS = "tokens"


@dataclasses.dataclass(frozen=True)
class OutputSpec:
    """Outputs of the graph, and the data type of its inputs and outputs.

    `top_k`, `softmax`: outputs that follow from logits. `outputs`: what the model computes; empty for its logits, or
    the embedding of a model without a head. `names`: other names of outputs, as OLD=NEW.
    """

    io_dtype: IODtype = IODtype.FP32
    top_k: int | None = None
    softmax: bool = False
    outputs: tuple[Role, ...] = ()
    feature_layout: FeatureLayout = FeatureLayout.NCHW
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class EngineTarget:
    """The engine to build: flavour, GPUs, batch profile and builder options. Empty `gpus`: the flavour's default."""

    flavour: Flavour = Flavour.AUTO
    gpus: tuple[ComputeCapability, ...] = ()
    batch: BatchProfile = BatchProfile()
    opt_level: int | None = None
    workspace_bytes: int | None = None
    timing_cache: Path | None = None
    tf32: bool = True
    version_compatible: bool = False
    hardware_compatible: bool = False


LAYER_SETS = ("auto", "paying", "all")
"""Sets of layers of an int8 or fp8 export: `paying` is explained in `quantization.paying`."""


@dataclasses.dataclass(frozen=True)
class QuantizationSpec:
    """How an int8 or fp8 export is calibrated, and which layers it quantizes. Other precisions ignore it.

    `calibration`: images (folder, tar, npz), or a file that `spach-calibrate` made. `cache`: such a file, reused where
    it fits and written otherwise. `rest`: precision of everything that is not quantized. `keep_float`, `quantize`:
    fnmatch patterns of module names. `per_tensor`: patterns of layers whose weights get one scale instead of one for
    each channel. `layers`: one of `LAYER_SETS`. `max_rel_l2` (of the logits), `max_drop` (points of top-1 on labelled
    images): bounds; layers are left in float until they hold. `vnni`: the graph is for CPUs with VNNI and computes
    wrong results on others. `cluster`: the cluster to calibrate and to choose layers on; None for this process.
    """

    calibration: Path | None = None
    cache: Destination | None = None
    method: str = "max"
    rest: Precision = Precision.FP16
    keep_float: tuple[str, ...] = ()
    quantize: tuple[str, ...] = ()
    per_tensor: tuple[str, ...] = ()
    equalize: bool = True
    allow_overlap: bool = False
    max_rel_l2: float | None = None
    max_drop: float | None = None
    labels: Path | None = None
    vnni: bool = False
    layers: str = "auto"
    cluster: ClusterAddress | None = None

    @property
    def is_bounded(self) -> bool:
        """Whether a bound decides which layers are left in float."""
        return self.max_rel_l2 is not None or self.max_drop is not None


OPSET = 20
"""The opset of graphs in which no operator needs a later one."""

_OPSETS = {Precision.FP8: 21, Precision.BF16: 22}
"""ONNX Runtime before 1.32 has FP8 from opset 21 on; Conv takes bfloat16 from 22 on."""


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """All options of one export.

    `answers`: an npz with inputs and outputs of the user's own code. `opset` None: `graph_opset` chooses.
    """

    model: ModelSpec = ModelSpec()
    precision: Precision = Precision.FP32
    outputs: OutputSpec = OutputSpec()
    engine: EngineTarget = EngineTarget()
    images: Path | None = None
    answers: Path | None = None
    output: Path | None = None
    overwrite: bool = False
    disabled_rewrites: tuple[str, ...] = ()
    quantization: QuantizationSpec = QuantizationSpec()
    opset: int | None = None

    @property
    def rest(self) -> Precision:
        """The precision of everything that is not quantized."""
        return self.quantization.rest if self.precision.is_quantized else self.precision

    @property
    def is_for_rtx(self) -> bool:
        """Whether TensorRT for RTX builds the engine, in half precision but for what is quantized. A flavour that is
        still to be chosen does not count.
        """
        return self.engine.flavour is Flavour.TENSORRT_RTX and self.rest.is_half

    @property
    def quantizes_paying(self) -> bool:
        """Whether only the layers that pay on TensorRT for RTX are quantized."""
        layers = self.quantization.layers
        return layers == "paying" or (layers == "auto" and self.is_for_rtx)

    @property
    def graph_opset(self) -> int:
        """The requested opset, else the lowest in which runtimes have the operators of these precisions."""
        return self.opset or max(_OPSETS.get(self.precision, OPSET), _OPSETS.get(self.rest, OPSET))


SELECTABLE = (Role.LOGITS, Role.EMBEDDING, Role.FEATURES)
"""The outputs that --outputs chooses among."""


def parse_roles(text: str) -> tuple[Role, ...]:
    """Outputs from `logits,embedding`. UsageError for others, and for one that is named twice."""
    known = {role.value: role for role in SELECTABLE}
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"--outputs {text!r}: there is no output {unknown[0]!r}.", f"Give {', '.join(known)}.")
    if len({*names}) < len(names):
        raise UsageError(f"--outputs {text!r} names an output twice.", "Name each once.")
    return tuple(known[name] for name in names)


def check_folder(folder: Path) -> Path:
    """The bundle's folder. UsageError for names of outputs, which are taken for --outputs by mistake."""
    if all(name.strip() in {role.value for role in SELECTABLE} for name in str(folder).split(",")):
        raise UsageError(
            f"--output is the bundle's folder, and {folder} says what the graph gives.",
            f"Give --outputs {folder}; for a folder of that name, --output {folder.absolute()}.",
        )
    return folder


_LARGEST_WORKSPACE = 1 << 50


def parse_size(text: str) -> int:
    """A --workspace size in bytes, in the units of `spach_deploy.common.text`. UsageError for anything else."""
    try:
        size = parse_bytes(text)
    except ValueError:
        size = 0
    if not 0 < size <= _LARGEST_WORKSPACE:
        raise UsageError(f"--workspace {text!r} is not a size.", "Give 512M, 2G or a number of bytes.")
    return size


def parse_channels(flag: str, text: str) -> Channels:
    """Numbers such as `0.485,0.456,0.406`, one for each channel; one number is for all. UsageError names `flag`."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"{flag} {text!r} is not a number for each channel.", f"Give {flag} 0.485,0.456,0.406."
        ) from None
    if problem := channels_problem(flag.removeprefix("--"), values):
        raise UsageError(f"{flag} {problem}.", CHANNELS_HINT)
    return values


def parse_image_size(text: str) -> ImageSize:
    """`224`, or height and width as in `192x256`. UsageError for anything else."""
    numbers = [int(part) for part in text.split("x")] if re.fullmatch(r"\d{1,6}(x\d{1,6})?", text) else [0]
    if not all(1 <= number <= LARGEST_SIDE for number in numbers):
        raise UsageError(
            f"--image-size {text!r} is no size from 1 to {LARGEST_SIDE:,} pixels.",
            "Give --image-size 224, or height and width: --image-size 192x256.",
        )
    return size_of_sides(numbers[0], numbers[-1])


def parse_crop(crop: float) -> float:
    """A part of the resized picture to keep. UsageError for one that is out of range."""
    if problem := crop_problem(crop):
        raise UsageError(f"--crop {problem}.", "Give --crop 0.875, or 1 for all of it.")
    return crop


def crop_problem(crop: float) -> str:
    """What is wrong with a part of the resized picture to keep, as a clause; empty if nothing."""
    return "" if SMALLEST_CROP <= crop <= 1 else f"{crop:g} is not in {SMALLEST_CROP:g}..1"


CHANNELS_HINT = "Divide values of 0 to 255 by 255."


def channels_problem(name: str, values: Channels) -> str:
    """What is wrong with a `mean` (each in 0..1) or `std` (each over 0, at most 1), as a clause; empty if nothing."""
    for value in values:
        if not 0 <= value <= 1 or (name == "std" and not value):
            return f"{value:g} is not in {'(0, 1]' if name == 'std' else '0..1'}"
    return ""
