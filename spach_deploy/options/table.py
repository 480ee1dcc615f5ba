"""The table of options: one entry for each option of each command. An option is added here and nowhere else.

An entry with a `field` fills that field of `ExportOptions`, which must exist in `specs`. Unless the entry says
otherwise, the option is then also a key of recipes, part of the command that a manifest records, inherited by the
exports of a zoo, and part of the key under which a finished export is cached. A flag with another meaning in another
command has a second entry. The order of entries is that of words in a recorded command; `--help` sorts by `GROUPS`.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable, Sequence
from typing import Any

from spach_deploy.common.files import Destination
from spach_deploy.common.machine import MOST_THREADS
from spach_deploy.options.gpus import parse_gpus
from spach_deploy.options.specs import (
    ACTIVATIONS,
    INTERPOLATIONS,
    LARGEST_SIDE,
    LAYER_SETS,
    MOST_CLASSES,
    SMALLEST_CROP,
    BatchProfile,
    FeatureLayout,
    Flavour,
    IODtype,
    Precision,
    WeightSource,
    check_folder,
    parse_channels,
    parse_crop,
    parse_image_size,
    parse_roles,
    parse_size,
)

EXPORT, CALIBRATE, VALIDATE = "spach-export", "spach-calibrate", "spach-validate"
PREDICT, BENCHMARK, DOCTOR = "spach-predict", "spach-benchmark", "spach-doctor"
TRITON, CPP = "spach-package triton", "spach-package cpp"
POLYGRAPHY, KUBERNETES = "spach-package polygraphy", "spach-package kubernetes"
ONNXRUNTIME = "spach-package onnxruntime"
COMMANDS = (EXPORT, CALIBRATE, VALIDATE, PREDICT, BENCHMARK, DOCTOR, TRITON, CPP, POLYGRAPHY, ONNXRUNTIME, KUBERNETES)

COMMON = "Common"
MODEL = "Model"
HYPERPARAMETERS = "What no tensor of a checkpoint shows"
PRECISION = "Precision"
QUANTIZATION = "Quantization"
IMAGES = "Images"
INTERFACE = "Inputs and outputs"
GRAPH = "Graph"
ENGINE = "Engine"
RUNNING = "Running"
MEASUREMENT = "Measurement"
SERVING = "Serving"
ENSEMBLE = "Ensemble"
MANY = "Many models, many machines"
OUTPUT = "Output"
INFORMATION = "Information"
GROUPS = (
    *(COMMON, MODEL, HYPERPARAMETERS, PRECISION, QUANTIZATION, IMAGES, INTERFACE, GRAPH, ENGINE, RUNNING, MEASUREMENT),
    *(SERVING, ENSEMBLE, MANY, OUTPUT, INFORMATION),
)
"""The groups of `--help`, in order."""


class Kind(enum.Enum):
    """The kind of value that an option takes, on the command line and in a recipe."""

    TEXT = enum.auto()
    LIST = enum.auto()
    """Text with commas; in a recipe also a list."""
    BATCHES = enum.auto()
    """Text with colons; in a recipe also a whole number, or a list of them."""
    NUMBERS = enum.auto()
    """Text with commas; in a recipe also a number, or a list of them."""
    SIZE = enum.auto()
    """A whole number, or two such as 192x256; in a recipe a list of two."""
    REPEATED = enum.auto()
    """Text, any number of times; in a recipe text or a list."""
    WHOLE = enum.auto()
    REAL = enum.auto()
    PATH = enum.auto()
    CHOICE = enum.auto()
    FLAGS = enum.auto()
    """A flag for each choice, of which one may be given; in a recipe, text."""
    SWITCH = enum.auto()
    """`--x` or `--no-x`."""
    FLAG = enum.auto()
    ADDRESS = enum.auto()
    """Text that may be left out, and is then `local`."""


class Caching(enum.Enum):
    """How an option's value enters the key of the cache of finished exports."""

    VALUE = enum.auto()
    """The value is part of the key."""
    CONTENT = enum.auto()
    """The content of the file or folder is part of the key too."""
    IGNORED = enum.auto()
    """It changes nothing that is written, and is not part of the key."""
    EXCLUDED = enum.auto()
    """An export with it is not cached, because it also writes outside the bundle."""


@dataclasses.dataclass(frozen=True)
class Option:
    """An option. `flags`: separated by a space, such as `-o --output`; for a switch, the positive flag.

    `field`: the field of ExportOptions that it fills, dotted; `parse` makes the field's value. `key`: name of its value
    and key in recipes, by default the long flag with `_` for `-`. `each`: help of each choice of a `Kind.FLAGS`.
    `least`, `most`: bounds of a number. `default`: the value where none is given, for options without a field. `shown`:
    the default in words, where the value does not say it. `off`: a switch's negative flag, by default `--no-` and its
    name. `is_common`: `--help` shows it in the first group.

    `needs_engine`: refused with --engine none. `is_inherited`: the exports of a zoo get it; else the zoo decides it for
    each. `zoo_refusal`: why a zoo refuses it, a sentence with {flag} and {value}. `is_recorded`: part of the command
    that a manifest or report records.
    """

    flags: str
    kind: Kind
    help: str = ""
    field: str = ""
    key: str = ""
    group: str = ""
    commands: tuple[str, ...] = ()
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    each: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    default: Any = None
    shown: str = ""
    off: str = ""
    parse: Callable[[Any], Any] | None = None
    is_common: bool = False
    is_required: bool = False
    needs_engine: bool = False
    in_recipes: bool = True
    is_inherited: bool = True
    zoo_refusal: str = ""
    caching: Caching = Caching.VALUE
    is_recorded: bool = True

    def __post_init__(self) -> None:
        if not self.key:
            object.__setattr__(self, "key", self.flag[2:].replace("-", "_"))

    @property
    def flag(self) -> str:
        """The long flag; for a switch, the positive one."""
        return self.flags.split()[-1]

    @property
    def shown_group(self) -> str:
        """The group of `--help` in which the option is shown."""
        return COMMON if self.is_common else self.group

    @property
    def off_flag(self) -> str:
        """The flag that says no; empty where there is none."""
        return self.off or (f"--no-{self.flag[2:]}" if self.kind is Kind.SWITCH else "")


def _of(group: str, commands: tuple[str, ...], *options: Option) -> tuple[Option, ...]:
    """The options with their group and the commands that take them."""
    return tuple(dataclasses.replace(option, group=group, commands=commands) for option in options)


def _choices(kind: type[enum.Enum]) -> tuple[str, ...]:
    return tuple(entry.value for entry in kind)


_RUNNERS = (
    *("eager", "compile", "bf16", "compile-bf16", "onnxruntime-plain", "openvino-plain", "openvino-plain-bf16"),
    *("nncf", "onnxruntime", "openvino", "openvino-bf16", "tensorrt"),
)


_ONE_WRITES = "{flag} is a file that one export writes, and --zoo makes many."
# fmt: off
TABLE: tuple[Option, ...] = (
    *_of(MODEL, (EXPORT,),
        Option("--recipe", Kind.PATH, "TOML recipe; the command line wins over it.", metavar="FILE", is_common=True),
    ),
    *_of(MODEL, (EXPORT, CALIBRATE),
        Option("--model", Kind.TEXT, "Model, such as ms_hybrid_s; inferred from the checkpoint if one fits.",
               "model.name", metavar="NAME", is_common=True, is_inherited=False),
    ),
    *_of(MODEL, (EXPORT, CALIBRATE),
        Option("--arch", Kind.PATH, "Architecture outside the table, TOML or JSON, where no checkpoint tells it.",
               "model.architecture", metavar="FILE",
               zoo_refusal="{flag} {value} is of one model, and --zoo is for many.", caching=Caching.CONTENT),
        Option("--module", Kind.TEXT, "Your own module, which your own code makes; that code is run.", "model.module",
               metavar="PACKAGE.MODULE:FACTORY", zoo_refusal="{flag} {value} is of one model, and --zoo is for many.",
               caching=Caching.EXCLUDED),
    ),
    *_of(MODEL, (EXPORT, CALIBRATE, BENCHMARK),
        Option("--checkpoint", Kind.PATH, "Checkpoint: .pth, .pt or .safetensors. Without it, demo weights.",
               "model.checkpoint", metavar="FILE", is_common=True, is_inherited=False, caching=Caching.CONTENT),
    ),
    *_of(MODEL, (EXPORT, CALIBRATE),
        Option("--weights", Kind.CHOICE, "Which weights of a training checkpoint to take.", "model.weights",
               choices=_choices(WeightSource), parse=WeightSource),
    ),
    *_of(MODEL, (EXPORT, CALIBRATE, BENCHMARK),
        Option("--ignore", Kind.REPEATED,
               "Tensors of the checkpoint that are not the model's, such as 'head_dist.*'; may be repeated.",
               "model.ignore", metavar="PATTERN"),
    ),
    *_of(MODEL, (EXPORT, CALIBRATE),
        Option("--image-size", Kind.SIZE, "Side of a square input, or its height and width, such as 192x256.",
               "model.image_size", metavar="PIXELS", least=1, most=LARGEST_SIDE, shown="224",
               parse=parse_image_size),
        Option("--num-classes", Kind.WHOLE, "Classes, 0 for a model without a head; inferred from a checkpoint.",
               "model.num_classes", metavar="N", least=0, most=MOST_CLASSES),
    ),
    *_of(HYPERPARAMETERS, (EXPORT, CALIBRATE),
        Option("--heads", Kind.WHOLE, "Heads of every attention.", "model.hyperparameters.heads", metavar="N", least=1),
        Option("--qk-scale", Kind.REAL, "Factor of q in attention.", "model.hyperparameters.qk_scale", metavar="X",
               shown="head size ** -0.5"),
        Option("--activation", Kind.CHOICE, "Of channel and spatial MLPs.", "model.hyperparameters.activation",
               choices=ACTIVATIONS),
        Option("--norm-eps", Kind.REAL, "Epsilon of every LayerNorm.", "model.hyperparameters.norm_eps", metavar="X"),
        Option("--divisions", Kind.WHOLE, "Parts of a ShiftViT's channels, of which four come from neighbours.",
               "model.hyperparameters.divisions", metavar="N", least=1),
        Option("--mean", Kind.NUMBERS,
               "Mean of the pixels, in 0..1, that training subtracted: for each channel, or one for all.",
               "model.hyperparameters.mean", metavar="R,G,B", parse=functools.partial(parse_channels, "--mean")),
        Option("--std", Kind.NUMBERS, "Standard deviation of the pixels that training divided by.",
               "model.hyperparameters.std", metavar="R,G,B", parse=functools.partial(parse_channels, "--std")),
        Option("--crop", Kind.REAL, "Part of the resized picture's shorter side that is kept; 1: all of it.",
               "model.hyperparameters.crop", metavar="X", least=SMALLEST_CROP, most=1, shown="0.875", parse=parse_crop),
        Option("--interpolation", Kind.CHOICE, "How pictures are resized.", "model.hyperparameters.interpolation",
               choices=INTERPOLATIONS, shown="bicubic"),
    ),
    *_of(PRECISION, (EXPORT,),
        Option("", Kind.FLAGS, "", "precision", key="precision", choices=_choices(Precision),
               each=("Single precision (the default).", "Half precision, islands in FP32.",
                     "bfloat16, islands in FP32.", "8-bit integers; needs --calibration.",
                     "8-bit floats (E4M3), from sm89 on."),
               parse=Precision, is_common=True, is_inherited=False),
        Option("--auto", Kind.FLAG, "Export fp16, int8 and fp8, compare them and recommend one."),
        Option("--target", Kind.CHOICE,
               "For this machine's CPU: measure fp32, bf16 and, with --calibration, int8;"
               " keep the fastest that is right.",
               choices=("cpu",)),
    ),
    *_of(PRECISION, (CALIBRATE,),
        Option("", Kind.FLAGS, "", "precision", key="precision", choices=("int8", "fp8"),
               each=("For 8-bit integers (the default).", "For 8-bit floats (E4M3)."), parse=Precision, is_common=True),
    ),
    *_of(IMAGES, (EXPORT,),
        Option("--images", Kind.PATH,
               "Images: a folder, a tar or an npz file."
               " Without it, the built-in photographs or the bundle's golden pack.",
               "images", metavar="PATH", is_common=True, caching=Caching.CONTENT),
    ),
    *_of(HYPERPARAMETERS, (EXPORT,),
        Option("--answers", Kind.PATH,
               "Inputs and logits that your own code computed: the model is held to them before anything else.",
               "answers", metavar="FILE.npz", zoo_refusal="{flag} {value} is of one model, and --zoo is for many.",
               caching=Caching.CONTENT),
    ),
    *_of(QUANTIZATION, (EXPORT, CALIBRATE),
        Option("--calibration", Kind.PATH,
               "Images to calibrate on: a folder, a tar or an npz; or what spach-calibrate wrote (.json).",
               "quantization.calibration", metavar="PATH", is_common=True, caching=Caching.CONTENT),
    ),
    *_of(QUANTIZATION, (EXPORT,),
        Option("--calibration-cache", Kind.PATH, "Reuse this calibration where it fits, or write it here.",
               "quantization.cache", metavar="FILE", parse=Destination.of, zoo_refusal=_ONE_WRITES,
               caching=Caching.EXCLUDED),
    ),
    *_of(QUANTIZATION, (EXPORT, CALIBRATE),
        Option("--method", Kind.CHOICE, "How activation scales are set.", "quantization.method",
               choices=("max", "percentile", "entropy", "mse")),
        Option("--rest", Kind.CHOICE, "Precision of what is not quantized.", "quantization.rest",
               choices=("fp16", "bf16", "fp32"), parse=Precision),
        Option("--keep-float", Kind.REPEATED, "Layers to leave alone, such as 'layer4.*'.", "quantization.keep_float",
               metavar="PATTERN"),
        Option("--quantize", Kind.REPEATED, "Layers to quantize against the rules.", "quantization.quantize",
               metavar="PATTERN"),
        Option("--per-tensor", Kind.REPEATED, "Layers whose weights share one scale.", "quantization.per_tensor",
               metavar="PATTERN"),
        Option("--equalize", Kind.SWITCH, "Exchange ranges before scales are set.", "quantization.equalize"),
    ),
    *_of(QUANTIZATION, (EXPORT,),
        Option("--eight-bit-layers", Kind.CHOICE,
               "Which of the layers that may be quantized: those that pay on TensorRT for RTX, or all."
               " auto: paying where it builds the engine.",
               "quantization.layers", choices=LAYER_SETS),
        Option("--vnni", Kind.SWITCH,
               "With --int8 --rest fp32 --engine none: for CPUs with VNNI,"
               " where OpenVINO needs it and ONNX Runtime gains.",
               "quantization.vnni"),
    ),
    *_of(QUANTIZATION, (EXPORT, CALIBRATE),
        Option("--allow-overlap", Kind.SWITCH, "Accept validation images in the set.", "quantization.allow_overlap"),
    ),
    *_of(QUANTIZATION, (EXPORT,),
        Option("--max-rel-l2", Kind.REAL, "Leave layers in float until logits change less.", "quantization.max_rel_l2",
               metavar="X"),
        Option("--max-drop", Kind.REAL, "Leave layers in float until top-1 drops less.", "quantization.max_drop",
               metavar="POINTS"),
        Option("--labels", Kind.PATH, "Labels of --images, for --max-drop.", "quantization.labels", metavar="PATH",
               caching=Caching.CONTENT),
    ),
    *_of(INTERFACE, (EXPORT,),
        Option("--io-dtype", Kind.CHOICE, "What the caller sends.", "outputs.io_dtype", choices=_choices(IODtype),
               parse=IODtype),
        Option("--top-k", Kind.WHOLE, "Add the K best values and their indices.", "outputs.top_k", metavar="K",
               least=1),
        Option("--softmax", Kind.SWITCH, "Add probabilities.", "outputs.softmax"),
        Option("--outputs", Kind.LIST,
               "What the graph gives: logits, embedding (what the head reads), features (each stage's map).",
               "outputs.outputs", metavar="LIST", parse=parse_roles, shown="logits; embedding without a head"),
        Option("--feature-layout", Kind.CHOICE, "Features as maps (B, C, H, W), or as tokens (B, H W, C).",
               "outputs.feature_layout", choices=_choices(FeatureLayout), parse=FeatureLayout),
        Option("--output-name", Kind.REPEATED, "Another name for an output, such as embedding=vector; may be repeated.",
               "outputs.names", metavar="OLD=NEW"),
    ),
    *_of(ENGINE, (EXPORT,),
        Option("--engine", Kind.CHOICE, "Which TensorRT builds.", "engine.flavour", choices=_choices(Flavour),
               parse=Flavour, is_common=True),
        Option("--gpu", Kind.LIST, "GPUs, such as sm86,sm89 or rtx4090,l4; default: all from Ampere on.", "engine.gpus",
               metavar="LIST", parse=parse_gpus, is_common=True, needs_engine=True, is_inherited=False),
        Option("--batch", Kind.BATCHES, "Batch sizes the engine accepts, or one number.", "engine.batch",
               metavar="MIN:OPT:MAX", parse=BatchProfile.parse, is_common=True),
        Option("--opt-level", Kind.WHOLE, "The builder's optimization level.", "engine.opt_level", metavar="N", least=0,
               most=5, needs_engine=True),
        Option("--workspace", Kind.TEXT, "The builder's scratch memory: 512M, 2G (of 1024), 2GB (of 1000).",
               "engine.workspace_bytes", metavar="SIZE", parse=parse_size, needs_engine=True),
        Option("--timing-cache", Kind.PATH, "Keep tactic timings here (TensorRT).", "engine.timing_cache",
               metavar="FILE", needs_engine=True, zoo_refusal=_ONE_WRITES, caching=Caching.EXCLUDED),
        Option("--tf32", Kind.SWITCH, "Allow TF32 in FP32 matrix products.", "engine.tf32"),
        Option("--version-compatible", Kind.SWITCH, "Plan for later TensorRT versions too.",
               "engine.version_compatible", needs_engine=True),
        Option("--hardware-compatible", Kind.SWITCH, "Plan for other Ampere+ GPUs too.", "engine.hardware_compatible",
               needs_engine=True),
    ),
    *_of(GRAPH, (EXPORT,),
        Option("--opset", Kind.WHOLE, "The graph's opset.", "opset", metavar="N", least=1, shown="20; fp8 21, bf16 22"),
        Option("--no-rewrite", Kind.REPEATED, "Leave a rewrite out; may be repeated.", "disabled_rewrites",
               metavar="NAME"),
    ),
    *_of(GRAPH, (CALIBRATE,),
        Option("--no-rewrite", Kind.REPEATED, "Leave a rewrite out, as the export will.", "disabled_rewrites",
               metavar="NAME"),
    ),
    *_of(MANY, (EXPORT,),
        Option("--zoo", Kind.TEXT, "Export many models, such as 'ms_*'; a bundle for each GPU.", metavar="PATTERNS"),
        Option("--precision", Kind.TEXT, "With --zoo: such as fp16,int8.", key="precision_list", metavar="LIST"),
        Option("--jobs", Kind.WHOLE, "With --zoo: exports at once, at most.", metavar="N", least=1),
        Option("--ray", Kind.ADDRESS, "With --zoo: build on a Ray cluster. Else: calibrate and choose layers there.",
               "quantization.cluster", metavar="[ADDRESS]", shown="this machine", in_recipes=False, is_inherited=False,
               caching=Caching.IGNORED, is_recorded=False),
    ),
    *_of(MANY, (CALIBRATE,),
        Option("--ray", Kind.ADDRESS, "Calibrate on a Ray cluster; without an address, on this machine as one.",
               "quantization.cluster", metavar="[ADDRESS]"),
    ),
    *_of(OUTPUT, (EXPORT,),
        Option("-o --output", Kind.PATH, "The bundle.", "output", metavar="DIR", shown="build/MODEL-PRECISION",
               parse=check_folder, is_common=True, is_inherited=False),
        Option("--overwrite", Kind.SWITCH, "Replace an earlier bundle in the same place.", "overwrite",
               is_inherited=False, caching=Caching.IGNORED),
        Option("--dry-run", Kind.FLAG, "Say what would be done, what it would take and what would be refused."),
        Option("--no-cache", Kind.FLAG, "Do it all again, though the same export was done before."),
    ),
    *_of(OUTPUT, (CALIBRATE,),
        Option("-o --output", Kind.PATH, "The calibration, FILE.json.", metavar="FILE", is_common=True,
               is_required=True),
        Option("--overwrite", Kind.SWITCH, "Replace a calibration that does not fit.", "overwrite"),
    ),
    *_of(INFORMATION, (EXPORT,),
        Option("--list", Kind.FLAG, "Show all models and end.", key="show_list"),
        Option("--list-rewrites", Kind.FLAG, "Show the names that --no-rewrite takes and end."),
    ),
    *_of(MODEL, (VALIDATE,),
        Option("--bundle", Kind.PATH, "The bundle that a model on a server was packaged from.", metavar="DIR"),
    ),
    *_of(IMAGES, (VALIDATE,),
        Option("--images", Kind.PATH,
               "Compare on these images: a folder, a tar or an npz file. Without it, on the bundle's golden pack.",
               metavar="PATH", is_common=True),
        Option("--max-images", Kind.WHOLE, "Take at most N of --images, spread evenly.", metavar="N", least=1,
               default=256),
        Option("--labels", Kind.PATH,
               "Classes of --images, to compare accuracy as well: the same folder of class folders, or a .txt, .csv or"
               " .json file of image names and class indices. An npz with labels needs none.",
               metavar="PATH", is_common=True),
        Option("--max-drop", Kind.REAL,
               "With labels: exit with 1 where top-1 accuracy falls by more than so many points.", metavar="POINTS",
               is_common=True),
    ),
    *_of(MODEL, (VALIDATE, BENCHMARK),
        Option("--module", Kind.TEXT, "Your own module, where the bundle is of one; its code is run.",
               metavar="PACKAGE.MODULE:FACTORY"),
    ),
    *_of(MODEL, (VALIDATE,),
        Option("--checkpoint", Kind.PATH,
               "Run the reference from the checkpoint that the bundle was made from. Without it, its stored answers.",
               metavar="FILE", is_common=True),
        Option("--weights", Kind.CHOICE, "Which weights of the checkpoint.", choices=_choices(WeightSource),
               shown="those that the bundle was made from"),
        Option("--answers", Kind.PATH,
               "Hold the reference to what your own code computed: an npz of `input` and `logits`.",
               metavar="FILE.npz"),
        Option("--against", Kind.PATH,
               "TARGET is a graph of your own: hold it to what this bundle was made from, module by module.",
               metavar="BUNDLE"),
        Option("--ignore", Kind.REPEATED,
               "Tensors of the checkpoint that are not the model's, such as 'head_dist.*'; may be repeated.",
               metavar="PATTERN"),
    ),
    *_of(OUTPUT, (VALIDATE,),
        Option("--bisect", Kind.FLAG,
               "Find the step, the module and the kind of a disagreement,"
               " in the names of the PyTorch model's modules.",
               is_common=True),
        Option("--accept", Kind.CHOICE, "Exit with 0 where the graph agreed and no GPU is here.", choices=("graph",),
               is_common=True),
        Option("--report", Kind.PATH, "Write the report here, its page beside it.", metavar="FILE",
               shown="report.json in the bundle, where the target is a part of it", is_recorded=False),
    ),
    *_of(MANY, (VALIDATE,),
        Option("--ray", Kind.ADDRESS,
               "Answer to --images on a Ray cluster; without an address, on this machine as one.", metavar="[ADDRESS]",
               is_recorded=False),
    ),
    *_of(INTERFACE, (PREDICT,),
        Option("--labels", Kind.PATH, "Names of the classes, one a line.", metavar="FILE", is_common=True),
        Option("--top-k", Kind.WHOLE, "How many classes of each picture.", metavar="K", least=1,
               shown="5, or all if fewer", is_common=True),
    ),
    *_of(RUNNING, (PREDICT,),
        Option("--runtime", Kind.CHOICE, "What runs the bundle.",
               choices=("auto", "engine", "onnxruntime", "openvino"), default="auto",
               shown="auto: the engine where it can run, else its graph", is_common=True),
        Option("--batch", Kind.WHOLE, "Pictures at once.", metavar="N", least=1, shown="the profile's usual batch"),
        Option("--threads", Kind.WHOLE, "CPU threads.", least=1, most=MOST_THREADS, shown="all cores"),
    ),
    *_of(MODEL, (BENCHMARK,),
        Option("--weights", Kind.CHOICE, "Which weights of it.", choices=_choices(WeightSource)),
    ),
    *_of(MEASUREMENT, (BENCHMARK,),
        Option("--batch", Kind.TEXT, "Batches, such as 1,8.", metavar="N,N",
               shown="the profile's smallest and usual one", is_common=True),
        Option("--runner", Kind.REPEATED, "Only these: " + ", ".join(_RUNNERS) + ".", metavar="NAME",
               choices=_RUNNERS,
               shown="all that can run here", is_common=True),
        Option("--rounds", Kind.WHOLE, "Rounds in which all take turns.", least=2, default=5),
        Option("--seconds", Kind.REAL, "Of each turn of each runner.", least=0.01, default=1.0),
        Option("--threads", Kind.WHOLE, "CPU threads of each runner.", least=1, most=MOST_THREADS, shown="all cores"),
        Option("--cold", Kind.SWITCH, "Start TensorRT for RTX without or with its runtime cache.", off="--warm",
               default=False, shown="--warm"),
    ),
    *_of(OUTPUT, (BENCHMARK,),
        Option("--plot", Kind.PATH, "Draw latency against batch and speed against error.", metavar="FILE.svg"),
    ),
    *_of(INFORMATION, (DOCTOR,),
        Option("--cache", Kind.FLAG, "Show what the cache of finished exports holds.", key="show_cache",
               is_common=True),
        Option("--clear-cache", Kind.FLAG, "Remove all of it.", is_common=True),
    ),
    *_of(OUTPUT, (TRITON,),
        Option("-o --output", Kind.PATH, "The model repository to write.", metavar="REPO", is_common=True),
        Option("--check", Kind.PATH, "Check a repository instead; exit code 1 on any finding.", metavar="REPO",
               is_common=True),
    ),
    *_of(OUTPUT, (CPP, POLYGRAPHY, ONNXRUNTIME),
        Option("-o --output", Kind.PATH, "The folder to write.", metavar="DIR", is_common=True, is_required=True),
    ),
    *_of(OUTPUT, (KUBERNETES,),
        Option("-o --output", Kind.PATH, "The folder to write.", metavar="DIR", is_common=True),
        Option("--triton-version", Kind.TEXT, "Release of Triton's image to build on, such as 25.08.", metavar="YY.MM",
               shown="the newest that loads the engine", is_common=True),
        Option("--image", Kind.TEXT, "Name of the image that you build, without a tag.", metavar="NAME",
               shown="registry.example.com/spach/NAME", is_common=True),
    ),
    *_of(SERVING, (TRITON, KUBERNETES),
        Option("--backend", Kind.CHOICE, "What runs the model.", choices=("auto", "tensorrt", "onnxruntime"),
               default="auto", shown="auto: the plan where ordinary TensorRT can load it, else the graph"),
        Option("--instances", Kind.REPEATED,
               "Instances of each model, or of the one that MODEL names; may be repeated.", metavar="[MODEL:]N",
               shown="1; 4 of a step that decodes pictures"),
    ),
    *_of(SERVING, (TRITON,),
        Option("--accelerator", Kind.CHOICE, "What ONNX Runtime runs the graph with, on a GPU.", choices=("tensorrt",),
               shown="its own kernels"),
        Option("--engine-cache", Kind.TEXT,
               "Folder that is on the server, in which the accelerator keeps each model's engines in one of its own.",
               metavar="DIR", shown="/tmp"),
        Option("--force", Kind.FLAG,
               "Take a plan or a graph that Triton cannot load, for a repository that is only to be read."),
        Option("--rate-limit-resource", Kind.REPEATED,
               "What each instance must get of a resource before it runs; may be repeated.",
               metavar="[MODEL:]NAME=COUNT[:global]"),
        Option("--rate-limit-priority", Kind.REPEATED,
               "Priority of a model where resources are short: 2 gets half as many turns as 1; may be repeated.",
               metavar="[MODEL:]N"),
        Option("--device", Kind.CHOICE, "Where instances run.", choices=("auto", "gpu", "cpu"),
               shown="gpu for tensorrt and bfloat16, cpu for a bundle of --target cpu, else auto"),
        Option("--gpus", Kind.TEXT, "GPUs that get instances.", metavar="0,1", shown="all"),
        Option("--no-dynamic-batching", Kind.FLAG, "Never join requests into a batch."),
        Option("--queue-delay-us", Kind.WHOLE, "How long a request may wait until it shares a batch.", least=0,
               most=10000000, default=500),
        Option("--version-policy", Kind.TEXT, "Which versions are served: latest, latest:N, all or specific:1,3.",
               metavar="POLICY", shown="latest"),
        Option("--response-cache", Kind.FLAG,
               "Answer repeated requests from the server's cache; start it with --cache-config local,size=…"),
        Option("--no-warm-up", Kind.FLAG, "No requests with golden images while the model is loaded."),
    ),
    *_of(SERVING, (KUBERNETES,),
        Option("--kserve", Kind.FLAG, "Write a ServingRuntime and an InferenceService instead of a Deployment."),
        Option("--helm", Kind.FLAG, "Write a Helm chart instead of kustomizations; also with --kserve."),
        Option("--name", Kind.TEXT, "What Kubernetes calls it.", metavar="NAME", shown="the model's name"),
        Option("--image-pull-secret", Kind.REPEATED, "Secret with which nodes pull the image; may be repeated.",
               metavar="NAME"),
        Option("--image-digest", Kind.TEXT,
               "Digest of the image that you pushed, of --image or of NAME: pods name it by that, not by a tag.",
               metavar="[NAME@]sha256:…"),
        Option("--triton-digest", Kind.TEXT,
               "Digest of Triton's image, on which yours is built: the Dockerfile then names it by that.",
               metavar="[NAME@]sha256:…"),
        Option("--replicas", Kind.TEXT, "How many pods there may be.", metavar="MIN:MAX", default="2:8"),
    ),
    *_of(ENSEMBLE, (TRITON, CPP, ONNXRUNTIME, KUBERNETES),
        Option("--labels", Kind.PATH, "Names of the classes, one a line.", metavar="FILE", shown="class 0, class 1, …",
               is_common=True),
    ),
    *_of(ENSEMBLE, (TRITON, KUBERNETES),
        Option("--ensemble", Kind.FLAG,
               "Add steps around the model: a client sends a picture's file and gets the best classes with labels.",
               is_common=True),
    ),
    *_of(ENSEMBLE, (TRITON,),
        Option("--ensemble-input", Kind.CHOICE,
               "What a client of the ensemble sends; pixels needs a model exported with --io-dtype uint8.",
               choices=("bytes", "pixels")),
        Option("--top-k", Kind.WHOLE, "How many classes the ensemble answers.", metavar="K",
               shown="5, or all if fewer"),
    ),
    *_of(OUTPUT, (TRITON,),
        Option("--overwrite", Kind.FLAG, "Replace a repository that spach-package wrote."),
    ),
    *_of(OUTPUT, (CPP,),
        Option("--overwrite", Kind.FLAG, "Replace a folder that spach-package cpp wrote."),
    ),
    *_of(OUTPUT, (POLYGRAPHY,),
        Option("--overwrite", Kind.FLAG, "Replace a folder that spach-package polygraphy wrote."),
    ),
    *_of(OUTPUT, (ONNXRUNTIME,),
        Option("--device", Kind.CHOICE,
               "Where model.onnx runs; cpu gives an INT8 bundle the form that a CPU computes in integers.",
               choices=("auto", "cpu"), default="auto",
               shown="auto: the CPU for a bundle of --target cpu, CUDA where it is, else the CPU"),
        Option("--embed", Kind.FLAG, "Put the plan into model_ctx.onnx instead of beside it; below 2 GB."),
        Option("--overwrite", Kind.FLAG, "Replace a folder that spach-package onnxruntime wrote."),
    ),
    *_of(OUTPUT, (KUBERNETES,),
        Option("--overwrite", Kind.FLAG, "Replace a folder that spach-package kubernetes wrote."),
    ),
    *_of(INFORMATION, (KUBERNETES,),
        Option("--list-versions", Kind.FLAG, "Show which Triton image carries which TensorRT, and end."),
    ),
    *_of(OUTPUT, (EXPORT, CALIBRATE),
        Option("-v --verbose", Kind.FLAG, "Show what each step did, its time and memory."),
    ),
    *_of(OUTPUT, (EXPORT, VALIDATE),
        Option("--open", Kind.FLAG, "Open the report's page in a browser when it is done.", key="is_opened",
               is_recorded=False),
    ),
    *_of(OUTPUT, (EXPORT,),
        Option("--json", Kind.FLAG, "Print the manifest as JSON instead of the summary.", key="as_json",
               is_recorded=False),
    ),
    *_of(OUTPUT, (CALIBRATE,),
        Option("--json", Kind.FLAG, "Print the survey as JSON instead of a summary.", key="as_json", is_recorded=False),
    ),
    *_of(OUTPUT, (VALIDATE,),
        Option("--json", Kind.FLAG, "Print the report as JSON instead of table and file.", key="as_json",
               is_recorded=False),
    ),
    *_of(OUTPUT, (PREDICT,),
        Option("--json", Kind.FLAG, "Print a line of JSON for each picture.", key="as_json", is_recorded=False,
               is_common=True),
    ),
    *_of(OUTPUT, (BENCHMARK,),
        Option("--json", Kind.FLAG, "Print JSON instead of tables.", key="as_json", is_recorded=False),
    ),
    *_of(OUTPUT, (DOCTOR,),
        Option("--json", Kind.FLAG, "Print the findings as JSON.", key="as_json", is_recorded=False),
    ),
    *_of(OUTPUT, (TRITON,),
        Option("--json", Kind.FLAG, "Print what was written or found as JSON.", key="as_json", is_recorded=False),
    ),
    *_of(OUTPUT, (CPP, POLYGRAPHY, ONNXRUNTIME, KUBERNETES),
        Option("--json", Kind.FLAG, "Print what was written as JSON.", key="as_json", is_recorded=False),
    ),
    *_of(INFORMATION, COMMANDS,
        Option("--debug", Kind.FLAG, "Show the traceback of an error.", is_recorded=False),
    ),
)
# fmt: on


def options_of(command: str, table: Sequence[Option] = TABLE) -> tuple[Option, ...]:
    """The options that a command takes."""
    return tuple(option for option in table if command in option.commands)


def filling(command: str = EXPORT, table: Sequence[Option] = TABLE) -> tuple[Option, ...]:
    """Those of a command's options that fill a field of `ExportOptions`."""
    return tuple(option for option in options_of(command, table) if option.field)
