"""manifest.json as typed objects. docs/manifest.schema.json is generated from these classes.

    manifest = Manifest.read(path)          # BundleError names the file and the wrong field
    manifest.engine.kernels, manifest.batch.opt, manifest.files["model.onnx"].sha256
    manifest.text()                         # the file again, byte for byte

Fields that code depends on are required. Fields that are only shown have a default, which means "not recorded". Unknown
fields, of a later version, are ignored here; `store.seal_again` keeps them when it rewrites a manifest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from spach_deploy.common.errors import BundleError, UsageError
from spach_deploy.common.files import parse_json, read_json
from spach_deploy.common.text import json_text, without_surrogates
from spach_deploy.options.architecture import Architecture
from spach_deploy.options.specs import (
    INTERPOLATIONS,
    LARGEST_SIDE,
    MOST_CHANNELS,
    MOST_CLASSES,
    SMALLEST_CROP,
    BatchProfile,
    Channels,
    Flavour,
    ImageSize,
    IODtype,
    OutputSpec,
    Precision,
    Preprocessing,
    Role,
    WeightSource,
    interpolation_text,
    sides,
    size_in_words,
)

SCHEMA_VERSION = 1
LARGEST_BATCH = 999_999
"""The upper bound of a batch, as for --batch."""

_LARGEST_RESIZE = math.ceil(LARGEST_SIDE / SMALLEST_CROP)
_IO_DTYPES = {IODtype.FP32: "float32", IODtype.FP16: "float16", IODtype.UINT8: "uint8"}
_OUTPUT_DTYPES = ("float32", "float16", "int64")
_OTHER_DTYPES = ("int64", "int32", "bool")
"""Dtypes, but for floats, of inputs that are no images."""

IMAGE_LAYOUTS = ("NCHW", "NHWC")
"""Layouts of inputs that are images; that of others is empty."""


# The model and its interface


class SettingEntry(Struct, frozen=True, kw_only=True):
    """A setting that cannot be inferred from a checkpoint's tensors: its value, and where the value comes from."""

    value: int | float | str | Channels | None
    source: str


class ModelSection(Struct, frozen=True, kw_only=True):
    """Which model, with which weights. `image_size`: a square's side, or [height, width]. `checkpoint`: the file's name
    without folders; `origin`: checkpoint or demo.

    `architecture` null, in older bundles: that of the published model `name`, with the hyperparameters below.
    """

    name: str
    architecture: Architecture | None = None
    image_size: ImageSize
    num_classes: int
    origin: str
    checkpoint: str | None
    checkpoint_sha256: str | None
    weights: WeightSource
    ignored: tuple[str, ...] = ()
    weights_sha256: str
    hyperparameters: dict[str, SettingEntry] = {}
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The published name; of an architecture outside the table its description."""
        if self.architecture is None or self.name != self.architecture.family:
            return self.name
        return self.architecture.description


class TensorInfo(Struct, frozen=True, kw_only=True):
    """A graph input or output. `shape` has null where the batch is free; `layout` names the axes, such as NCHW.

    `role`: what an output means. Where it is null the name says it, as in manifests before there were roles.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    layout: str = ""
    role: Role | None = None

    def __post_init__(self) -> None:
        if self.role is None:
            msgspec.structs.force_setattr(self, "role", role_of_name(self.name))


_NAMED = (Role.LOGITS, Role.PROBABILITIES, Role.TOP_VALUES, Role.TOP_INDICES)


def role_of_name(name: str) -> Role:
    """The role that an output of this name has where nothing else is said."""
    return next((role for role in _NAMED if role.value == name), Role.OTHER)


# Precision


class RangesEntry(Struct, frozen=True, kw_only=True):
    """The images on which activation ranges were measured."""

    source: str | None = None
    images: int = 0


class KeptEntry(Struct, frozen=True, kw_only=True):
    """Nodes of a module that stay in FP32, the reason, and the tensor that causes it with its largest magnitude."""

    module: str
    reason: str
    tensor: str | None
    max_abs: float | None
    nodes: int


class WeightsEntry(Struct, frozen=True, kw_only=True):
    """How one weight tensor fits the half format. `error`: relative L2 of rounding it, null for an overflow."""

    tensor: str
    count: int
    overflow: int
    underflow: int
    subnormal: int
    max_abs: float
    error: float | None


class WeightCountsEntry(Struct, frozen=True, kw_only=True):
    """How many weights were examined and how many do not fit. `notable`: the tensors worth naming."""

    count: int = 0
    overflow: int = 0
    underflow: int = 0
    subnormal: int = 0
    notable: tuple[WeightsEntry, ...] = ()


class PeakEntry(Struct, frozen=True, kw_only=True):
    """A tensor and its largest magnitude."""

    tensor: str
    max_abs: float


class LayerEntry(Struct, frozen=True, kw_only=True):
    """A weighted layer. `asked`: the precision in which the graph computes it; empty where it cannot be told."""

    node: str
    module: str
    kind: str
    asked: str


class PrecisionSection(Struct, frozen=True, kw_only=True):
    """The precision policy. `asked`: precision of weighted layers; `rest`: of all else; `limit`: largest finite number
    of the half format."""

    asked: Precision
    rest: Precision | None = None
    summary: str = ""
    io_dtype: str = ""
    nodes: int = 0
    half_nodes: int = 0
    casts: int = 0
    margin: float | None = None
    limit: float | None = None
    ranges: RangesEntry = RangesEntry()
    kept: tuple[KeptEntry, ...] = ()
    weights: WeightCountsEntry = WeightCountsEntry()
    closest: tuple[PeakEntry, ...] = ()
    layers: tuple[LayerEntry, ...] = ()


# Quantization


class CalibrationEntry(Struct, frozen=True, kw_only=True):
    """Where the scales come from. `survey`: statistics of the calibration images, with no fixed set of names."""

    source: str = ""
    images: int = 0
    images_sha256: str = ""
    method: str = ""
    weights_sha256: str
    survey: dict[str, Any] = {}


class EqualizationEntry(Struct, frozen=True, kw_only=True):
    """Equalization of one pair of layers. `alpha` null: the pair was left as it is."""

    name: str
    site: str
    alpha: float | None
    error_before: float
    error_after: float
    range_before: float
    range_after: float


class KeptFloatEntry(Struct, frozen=True, kw_only=True):
    """A layer that could be quantized but stays in float, and why."""

    module: str
    node: str
    kind: str
    macs: int
    reason: str


class LayerCostEntry(Struct, frozen=True, kw_only=True):
    """Relative L2 of the logits with this layer alone quantized, and whether it stayed in float."""

    module: str
    rel_l2: float
    macs: int
    kept_float: bool


class SensitivityEntry(Struct, frozen=True, kw_only=True):
    """The requested bound, the measured error of the chosen set of layers, and the cost of each layer."""

    measure: str
    bound: float
    measured: float
    all_quantized: float
    evaluations: int
    layers: tuple[LayerCostEntry, ...]


class RewritesEntry(Struct, frozen=True, kw_only=True):
    """The options of the model's rewrites, from which the static model can be made again. `in_float`: layers that were
    rewritten after the calibration, because they stay in floating point.
    """

    disabled: tuple[str, ...]
    quantize: tuple[str, ...]
    in_float: tuple[str, ...] = ()


class QuantizationSection(Struct, frozen=True, kw_only=True):
    """How the model was calibrated, and which layers stay in float and why. `scales`: the file with the scales."""

    format: Precision
    rest: Precision
    quantized_from: Precision | None = None
    vnni: bool = False
    layers: int = 0
    macs_share: float = 0.0
    per_tensor_layers: int = 0
    calibration: CalibrationEntry
    equalization: tuple[EqualizationEntry, ...] = ()
    scales: str
    kept_float: tuple[KeptFloatEntry, ...] = ()
    sensitivity: SensitivityEntry | None = None
    rewrites: RewritesEntry


# The graph


class CertificateEntry(Struct, frozen=True, kw_only=True):
    """Facts of the typed graph that its certificate checks. `broken`: promises that the graph of a user's own module
    does not keep, such as operators that compute shapes.
    """

    opset: int | None = None
    ir_version: int | None = None
    nodes: int | None = None
    operators: dict[str, int] = {}
    symbolic: str | None = None
    modules_named: int | None = None
    broken: tuple[str, ...] = ()


class RewriteEntry(Struct, frozen=True, kw_only=True):
    """One rewrite: number of changed modules, the worst relative L2 in FP64, and the reasons where it was skipped."""

    modules: int
    worst_fp64: float
    skipped: tuple[str, ...]


class LevelEntry(Struct, frozen=True, kw_only=True):
    """Blocks of one level (known, plain or unknown) in a user's own module, and their part of the multiply-adds."""

    modules: tuple[str, ...]
    macs: float


class Form(str, enum.Enum):
    """Which runtime a graph is spelt for: TensorRT's compiler, or ONNX Runtime on a CPU, in floats or in eight bits.

    Every form runs in every runtime; only speed and size differ.
    """

    TENSORRT = "tensorrt"
    CPU = "cpu"
    CPU_INT8 = "cpu-int8"


class MadeEntry(Struct, frozen=True, kw_only=True):
    """How a package made its graph from a bundle's graph, which had another form.

    `graph_sha256`, `nodes`, `bytes`: of the bundle's graph. `runtime`: what ran both. `rewritten`: how many places each
    pass changed. `fp32_rel_l2`: relative L2 of the two graphs in FP32, by output, which is rounding alone. `rel_l2`: of
    the made graph against the reference on the golden images, by output; what is allowed is in the section on
    validation.
    """

    graph_sha256: str
    nodes: int
    bytes: int
    runtime: str
    rewritten: dict[str, int] = {}
    fp32_rel_l2: dict[str, float] = {}
    rel_l2: dict[str, float] = {}


class GraphSection(Struct, frozen=True, kw_only=True):
    """Rewrites, passes, relative L2 in FP32 by export step and batch, and the certificate. `levels`: how well the
    blocks of a user's own module are known. `form`: null in older bundles, see `Manifest.form`. `made`: of a graph that
    a package made.
    """

    form: Form | None = None
    made: MadeEntry | None = None

    certificate: CertificateEntry = CertificateEntry()
    rewrites: dict[str, RewriteEntry] = {}
    passes: dict[str, int] = {}
    relative_l2_limit: float | None = None
    relative_l2: dict[str, dict[str, float]] = {}
    levels: dict[str, LevelEntry] = {}


# The engine


class KernelsEntry(Struct, frozen=True, kw_only=True):
    """Kernels of the engine plan. `bytes_moved`: memory traffic of one inference of `batch` images. `predicted_ms`: by
    card, the time of one that was predicted (`engine.cost_model`), not measured.
    """

    total: int | None = None
    by_kind: dict[str, int] = {}
    fused_attentions: int | None = None
    products_by_dtype: dict[str, int] = {}
    batch: int | None = None
    bytes_moved: int | None = None
    predicted_ms: dict[str, float] = {}


class WarningEntry(Struct, frozen=True, kw_only=True):
    """A warning of the engine builder, and how often it came."""

    text: str
    count: int


class StartEntry(Struct, frozen=True, kw_only=True):
    """How an engine of TensorRT for RTX is best started, in the names of Session and of the C++ library.

    `runtime_cache`: without one, every process compiles the kernels for its GPU anew. `cuda_graphs`: capture the engine
    as a CUDA graph for each batch size; worth a trial where batches are small. `specialization`: lazy answers at once
    with general kernels, while those for the shape are compiled.
    """

    runtime_cache: bool = True
    cuda_graphs: bool = False
    specialization: str = "lazy"


class EngineSection(Struct, frozen=True, kw_only=True):
    """The engine plan: its builder, its targets and its layers; with flavour `none`, the reason why there is no plan.

    `gpus`: compute capabilities such as sm89. `kernels` null: the plan's text could not be read. `start`: advice to
    those who load it.
    """

    flavour: Flavour
    reason: str = ""
    version: str = ""
    gpus: tuple[str, ...] = ()
    batch: str = ""
    bytes: int | None = None
    graph_sha256: str | None = None
    tf32: bool = False
    opt_level: int | None = None
    workspace_bytes: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    layers_by_dtype: dict[str, int] = {}
    layers: dict[str, str] = {}
    kernels: KernelsEntry | None = None
    warnings: tuple[WarningEntry, ...] = ()
    parse_seconds: float | None = None
    build_seconds: float | None = None
    start: StartEntry | None = None

    @property
    def why_none(self) -> str:
        """Why there is no plan, as a clause."""
        return (self.reason or "none was built").rstrip(".")


# Validation


class ToleranceEntry(Struct, frozen=True, kw_only=True):
    """Tolerance of one output (`validation.verdict.Tolerance`)."""

    rel_l2: float
    max_abs: float | None = None
    cosine_min: float | None = None
    flip_margin: float = 0.0
    origin: str = ""


class MeasuredEntry(Struct, frozen=True, kw_only=True):
    """A measured error: mean plus two standard deviations over the images."""

    images: int
    rel_l2: float
    max_abs: float
    margin: float


class DerivationEntry(Struct, frozen=True, kw_only=True):
    """How tolerances were derived: `noise` is the FP32 error against FP64, `loss` PyTorch's rounding error in that
    arithmetic."""

    arithmetic: str
    noise: MeasuredEntry
    noise_factor: float
    loss: MeasuredEntry
    loss_factor: float
    sentence: str


class BoundsEntry(Struct, frozen=True, kw_only=True):
    """The tolerance of each output, and how they were derived.

    `derivation`: of the first output that the model computes, and of those that follow from it; `others`: of the other
    outputs that the model computes, by name.
    """

    outputs: dict[str, ToleranceEntry]
    derivation: DerivationEntry
    others: dict[str, DerivationEntry] = {}


class TolerancesEntry(Struct, frozen=True, kw_only=True):
    """Tolerances for the graph in ONNX Runtime, and for the engine."""

    graph: BoundsEntry
    engine: BoundsEntry


class TracePartEntry(Struct, frozen=True, kw_only=True):
    """One module. `error`, `noise` and `allowed` are relative L2 of its output against PyTorch in FP32; `peak` is its
    largest magnitude."""

    module: str
    kind: str
    error: float | None
    noise: float
    allowed: float
    peak: float


class TraceEntry(Struct, frozen=True, kw_only=True):
    """The error after each module of the network. `what`: the graph or engine that ran."""

    what: str
    images: tuple[str, ...]
    modules: tuple[TracePartEntry, ...]


class AgreementEntry(Struct, frozen=True, kw_only=True):
    """Comparison of the reference with the outputs of the user's own code (--answers)."""

    file: str
    sha256: str
    images: int
    rel_l2: float
    allowed: float
    noise: float
    agrees: bool = True


class ValidationSection(Struct, frozen=True, kw_only=True):
    """Result of the export's validation, and the tolerances that later validations of the bundle use."""

    passed: bool
    level: str
    level_sentence: str = ""
    images: str = "the bundle's golden pack"
    image_count: int | None = None
    batches: tuple[int, ...] = ()
    batch_left_out: str = ""
    reference: str = "the reference"
    tolerances: TolerancesEntry
    trace: TraceEntry | None = None
    answers: AgreementEntry | None = None


# The rest


class CpuFormEntry(Struct, frozen=True, kw_only=True):
    """A precision measured in a runner at `batch`.

    `times_eager`: speed relative to PyTorch eager, null where that does not run; `ratio`: the same, null where too
    noisy. `settings`: settings of the runner that this result needs. `seconds_by_round`: of the forms between which the
    choice was made, the median seconds in each round that they all took turns in.
    """

    precision: Precision
    runner: str
    batch: int
    images_per_second: float
    times_eager: float | None
    ratio: float | None
    rel_l2: float
    is_right: bool
    settings: dict[str, str]
    seconds_by_round: tuple[float, ...] = ()


class CpuSection(Struct, frozen=True, kw_only=True):
    """`--target cpu`: all measured candidates, the one in this bundle, and the machine."""

    chosen: CpuFormEntry
    forms: tuple[CpuFormEntry, ...]
    machine: dict[str, Any]


class PhaseEntry(Struct, frozen=True, kw_only=True):
    """A phase of the export. `peak_bytes`: the process's largest resident size up to its end."""

    name: str
    seconds: float
    peak_bytes: int | None = None


class FileEntry(Struct, frozen=True, kw_only=True):
    """SHA-256 and size of a file of the bundle."""

    sha256: str
    bytes: int


class Manifest(Struct, frozen=True, kw_only=True):
    """manifest.json of a bundle: options, sources, tools and results of the export, and the SHA-256 of its files."""

    schema_version: int = SCHEMA_VERSION
    created: str = ""
    tools: dict[str, str] = {}
    command: str = ""
    model: ModelSection
    preprocessing: Preprocessing
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    output_options: OutputSpec
    batch: BatchProfile
    precision: PrecisionSection
    quantization: QuantizationSection | None = None
    graph: GraphSection = GraphSection()
    engine: EngineSection
    validation: ValidationSection
    phases: tuple[PhaseEntry, ...] = ()
    notes: tuple[str, ...] = ()
    cpu: CpuSection | None = None
    files: dict[str, FileEntry] = {}

    @classmethod
    def parse(cls, text: str, where: str) -> Manifest:
        """Parse the manifest in `text`. BundleError says what is wrong in it; `where` names the file."""
        try:
            return _checked(without_surrogates(parse_json(text)), where)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{where} is not JSON ({error}).", "Export the bundle again.") from None

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read the manifest in a file. BundleError says what is wrong in it."""
        try:
            return _checked(without_surrogates(read_json(path)), str(path))
        except OSError as error:
            reason = error.strerror or error
            raise BundleError(f"{path} cannot be read ({reason}).", "Export the bundle again.") from None
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{path} is not JSON ({error}).", "Export the bundle again.") from None

    def content(self) -> dict[str, Any]:
        """The manifest as plain JSON. Absent sections, and what outputs need that are no logits, are left out; other
        absent values are null.
        """
        content: dict[str, Any] = without_surrogates(msgspec.to_builtins(self))
        _drop_usual(content)
        engine = content["engine"]
        has_plan = self.engine.flavour is not Flavour.NONE
        content["engine"] = {
            name: value for name, value in engine.items() if name == "flavour" or (name == "reason") is not has_plan
        }
        graph = content["graph"]
        certificate, engine = graph["certificate"], content["engine"]
        absences = [(graph, "form"), (graph, "made"), (graph, "levels"), (certificate, "broken"), (engine, "start")]
        rewrites = (content["quantization"] or {}).get("rewrites", {})
        cpu = content["cpu"] or {"forms": [], "chosen": {}}
        absences += [(rewrites, "in_float"), (engine.get("kernels") or {}, "predicted_ms")]
        for section, name in (*absences, *((form, "seconds_by_round") for form in (cpu["chosen"], *cpu["forms"]))):
            if not section.get(name):
                section.pop(name, None)
        if self.model.architecture is None:  # as older versions wrote it
            del content["model"]["architecture"]
        absent = {name for name in ("quantization", "cpu") if content[name] is None}
        return {name: value for name, value in content.items() if name not in absent}

    @property
    def form(self) -> Form:
        """The form of the graph: as recorded, and of an older bundle as its passes or else its engine say."""
        recorded, passes = self.graph.form, self.graph.passes
        if recorded is not None:
            return recorded
        is_for_tensorrt = "shift_depthwise" in passes if passes else self.engine.flavour is not Flavour.NONE
        if is_for_tensorrt:
            return Form.TENSORRT
        return Form.CPU_INT8 if "linear_as_matmul" in passes else Form.CPU

    def text(self) -> str:
        """The text of manifest.json."""
        return json_text(self.content()) + "\n"

    def sha256(self, name: str) -> str | None:
        """SHA-256 of a file of the bundle; None for a file that the manifest does not list."""
        return self.files[name].sha256 if name in self.files else None


_LATER = ("outputs", "feature_layout", "names")
"""Fields of the output options that manifests of graphs with logits alone do not have."""


def _drop_usual(content: dict[str, Any]) -> None:
    """Remove, in place, what says of a graph with logits no more than its outputs' names do."""
    for tensor in (*content["inputs"], *content["outputs"]):
        if tensor["role"] == role_of_name(tensor["name"]).value:
            del tensor["role"]
    options, usual = content["output_options"], msgspec.to_builtins(OutputSpec())
    for name in _LATER:
        if not options.get(name) or options[name] == usual[name]:
            options.pop(name, None)
    for bounds in content["validation"]["tolerances"].values():
        if not bounds["others"]:
            del bounds["others"]


# Reading


_WHOLE: Mapping[str, type] = {"preprocessing": Preprocessing, "output_options": OutputSpec, "batch": BatchProfile}
"""Sections whose classes have defaults for the command line; a manifest must have every field of them."""


def _checked(content: Any, where: str) -> Manifest:
    if not isinstance(content, dict) or "schema_version" not in content:
        raise BundleError(f"{where} is not a spach-deploy manifest.", "Give a bundle that spach-export wrote.")
    if content["schema_version"] != SCHEMA_VERSION:
        raise BundleError(
            f"{where} has schema version {content['schema_version']!r}; this is spach-deploy for version"
            f" {SCHEMA_VERSION}.",
            "Export the bundle again, or install the spach-deploy that wrote it.",
        )
    fields = msgspec.structs.fields(Manifest)
    required = [field.name for field in fields if field.required or field.name == "files"]
    if missing := [name for name in required if name not in content]:
        raise BundleError(f"{where} lacks {', '.join(missing)}.", "Export the bundle again.")
    _check_whole(content, where)
    manifest = _typed(content, where)
    for path, number in _not_finite(content):
        raise BundleError(f"{where} has an entry of the wrong kind ({path} is {number}).", "Export the bundle again.")
    for name, check in _CHECKS.items():
        with reading(where, name):
            check(manifest)
    return manifest


def _check_whole(content: Mapping[str, Any], where: str) -> None:
    for name, kind in _WHOLE.items():
        section, fields = content[name], _required(kind)
        with reading(where, name):
            if isinstance(section, dict) and (lacking := [field for field in fields if field not in section]):
                raise ValueError(f"it lacks {', '.join(lacking)}")
            if isinstance(section, dict) and name == "batch" and len(section) > len(fields):
                raise ValueError("it has not min, opt and max alone")


def _required(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind) if not (kind is OutputSpec and field.name in _LATER)]


def _typed(content: Any, where: str) -> Manifest:
    """`content` as a Manifest. BundleError names `where`, and the field of the wrong kind."""
    try:
        return msgspec.convert(content, Manifest)
    except msgspec.ValidationError as error:
        reason = _reason(str(error))
    except UsageError as error:  # raised by the constructors of option objects, whose messages name them
        reason = error.message.rstrip(".")
    raise BundleError(f"{where} has an entry of the wrong kind ({reason}).", "Export the bundle again.")


_PATH = re.compile(r"(?P<what>.*?)(?: - at `\$\.?(?P<path>.*)`)?$", re.DOTALL)
_LACKS = re.compile(r"Object missing required field `(\w+)`")


def _reason(message: str) -> str:
    """msgspec's message with the field first."""
    match = _PATH.match(message)
    assert match is not None
    what, path = match["what"], match["path"] or "it"
    if lacks := _LACKS.fullmatch(what):
        return f"{path} lacks {lacks[1]}"
    return f"{path}: {what[:1].lower()}{what[1:120]}".replace("`", "")


@contextlib.contextmanager
def reading(where: str, name: str) -> Iterator[None]:
    """Turn errors in the block into a BundleError that names the entry `name` of the manifest `where`."""
    try:
        yield
    except UsageError as error:
        reason = error.message.rstrip(".")
    except (ValueError, TypeError) as error:
        reason = str(error)
    else:
        return
    raise BundleError(f"{where} has an entry of the wrong kind ({name}: {reason}).", "Export the bundle again.")


def _not_finite(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """NaN and infinite numbers with their paths: Python reads them, but they are not JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        yield path, value
    elif isinstance(value, dict | list):
        for name, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _not_finite(entry, f"{path}.{name}".lstrip("."))


def _check_range(name: str, value: int, most: int) -> None:
    """ValueError for a number that is not from 1 to `most`."""
    if not 1 <= value <= most:
        raise ValueError(f"{name} is {str(value)[:40]}, not 1 to {most:,}")


def _check_model(manifest: Manifest) -> None:
    for side in sides(manifest.model.image_size):
        _check_range("image_size", side, LARGEST_SIDE)
    if manifest.model.num_classes:  # 0: a model without a head
        _check_range("num_classes", manifest.model.num_classes, MOST_CLASSES)
    architecture = manifest.model.architecture
    if architecture is not None and architecture.image_size != sides(manifest.model.image_size):
        raise ValueError(f"its architecture is for images of {size_in_words(architecture.image_size)}")
    if architecture is not None and architecture.classes != manifest.model.num_classes:
        raise ValueError(f"its architecture has {architecture.classes} classes")


def _check_preprocessing(manifest: Manifest) -> None:
    section, size = manifest.preprocessing, manifest.model.image_size
    for side in sides(section.resize_size):
        _check_range("resize_size", side, _LARGEST_RESIZE)
    known = [interpolation_text(name) for name in INTERPOLATIONS]
    if section.interpolation not in known:
        raise ValueError(f"interpolation is {section.interpolation[:40]!r}, not {' or '.join(map(repr, known))}")
    if sides(section.image_size) != sides(size):
        shown = size_in_words(section.image_size)[:40]
        raise ValueError(f"image_size is {shown}, and the model's is {size_in_words(size)}")
    _check_range("number of channels", section.channels, MOST_CHANNELS)
    if len(section.std) != section.channels:
        raise ValueError(f"mean is of {section.channels} channels, and std of {len(section.std)}")
    for name, values in (("mean", section.mean), ("std", section.std)):
        if not all(map(math.isfinite, values)) or (name == "std" and min(values) <= 0):
            shown = ", ".join(f"{value:g}" for value in values)
            raise ValueError(f"{name} is [{shown}], not {'positive ' * (name == 'std')}numbers")


def _check_batch(manifest: Manifest) -> None:
    for name in ("min", "opt", "max"):
        _check_range(name, getattr(manifest.batch, name), LARGEST_BATCH)


def _check_tensors(tensors: tuple[TensorInfo, ...], dtypes: Collection[str]) -> None:
    """ValueError for no tensor at all, a tensor without axes, or one of another dtype."""
    if not tensors:
        raise ValueError("there are none")
    for tensor in tensors:
        if not tensor.shape:
            raise ValueError(f"{tensor.name} has no axes")
        if tensor.dtype not in dtypes:
            raise ValueError(f"{tensor.name} has dtype {tensor.dtype[:40]!r}, not {' or '.join(dtypes)}")


def _check_inputs(manifest: Manifest) -> None:
    io_dtype = _IO_DTYPES[manifest.output_options.io_dtype]
    images = [tensor for tensor in manifest.inputs if tensor.layout in IMAGE_LAYOUTS or len(manifest.inputs) == 1]
    if manifest.inputs and not images:
        raise ValueError("none of them are images")
    others = tuple(tensor for tensor in manifest.inputs if tensor not in images)
    _check_tensors(tuple(images), [io_dtype])
    if others:
        _check_tensors(others, ["float16" if io_dtype == "float16" else "float32", *_OTHER_DTYPES])
    if len({tensor.name for tensor in manifest.inputs}) < len(manifest.inputs):
        raise ValueError("two have one name")
    size = manifest.model.image_size
    height, width, channels = manifest.preprocessing.pixel_shape
    for tensor in images:
        wanted = (height, width, channels) if tensor.layout == "NHWC" else (channels, height, width)
        if not all(have in (want, None) for have, want in zip(tensor.shape[1:], wanted, strict=False)):
            what = f"image_size is {size_in_words(size)}" + (f", of {channels} channels" if channels != 3 else "")
            raise ValueError(f"{tensor.name} has shape {tensor.shape}, and the model's {what}")


def _check_outputs(manifest: Manifest) -> None:
    _check_tensors(manifest.outputs, _OUTPUT_DTYPES)
    if len({tensor.name for tensor in manifest.outputs}) < len(manifest.outputs):
        raise ValueError("two have one name")
    classes = manifest.model.num_classes
    for tensor in manifest.outputs:
        is_by_class = tensor.role in (Role.LOGITS, Role.PROBABILITIES)
        if is_by_class and not {*tensor.shape[1:]} <= {classes, None}:
            raise ValueError(f"{tensor.name} has shape {tensor.shape}, and the model's num_classes is {classes}")


def _check_output_options(manifest: Manifest) -> None:
    if (top_k := manifest.output_options.top_k) is not None:
        _check_range("top_k", top_k, manifest.model.num_classes)


_CHECKS: Mapping[str, Callable[[Manifest], None]] = {
    "model": _check_model,
    "preprocessing": _check_preprocessing,
    "inputs": _check_inputs,
    "outputs": _check_outputs,
    "output_options": _check_output_options,
    "batch": _check_batch,
}
"""Checks beyond types: absurd sizes, and entries that contradict each other."""


def json_schema() -> dict[str, Any]:
    """JSON Schema of manifest.json, as scripts/manifest_schema.py publishes it (docs/manifest.schema.json)."""
    schema = msgspec.json.schema(Manifest)
    for kind in _WHOLE.values():
        entry = schema["$defs"][kind.__name__]
        entry["required"] = _required(kind)
    manifest = schema["$defs"]["Manifest"]
    manifest["required"] = ["schema_version", *manifest["required"], "files"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "spach-deploy manifest", **schema}
