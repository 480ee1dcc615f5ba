"""Recipes and the command line become one set of options; what a recipe gets wrong is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spach_deploy.cli.export import main as export_command
from spach_deploy.common.errors import UsageError
from spach_deploy.common.files import Destination
from spach_deploy.options.recipe import KEYS, export_options, read_recipe
from spach_deploy.options.specs import (
    BatchProfile,
    ComputeCapability,
    ExportOptions,
    FeatureLayout,
    Flavour,
    IODtype,
    ModelSpec,
    OutputSpec,
    Precision,
    QuantizationSpec,
    Role,
    WeightSource,
    parse_size,
)
from tests.commands import contents, export, refusal

EVERYTHING = """
model = "ms_hybrid_s"
checkpoint = "weights.pth"
weights = "ema"
ignore = ["head_dist.*"]
image_size = [192, 256]
num_classes = 10
heads = 3
divisions = 6
qk_scale = 0.25
activation = "gelu-tanh"
norm_eps = 1e-5
mean = [0.5, 0.5, 0.5]
std = [0.25, 0.25, 0.25]
crop = 0.95
interpolation = "bilinear"
answers = "answers.npz"
arch = "hybrid.toml"
module = "nets:build"
outputs = ["logits", "features"]
feature_layout = "tokens"
output_name = ["logits=scores"]
precision = "bf16"
io_dtype = "uint8"
top_k = 5
softmax = true
images = "photos"
engine = "tensorrt"
gpu = ["sm89", "rtx3090"]
batch = [1, 2, 4]
opt_level = 0
workspace = "2G"
timing_cache = "cache"
tf32 = false
version_compatible = true
hardware_compatible = true
no_rewrite = ["shift_depthwise", "fold_residual"]
opset = 22
output = "out"
overwrite = true
calibration = "set"
calibration_cache = "scales.json"
method = "mse"
rest = "bf16"
keep_float = ["layer4.*"]
quantize = "*.spatial_func"
per_tensor = ["*.fc1", "*.fc2"]
eight_bit_layers = "all"
equalize = false
allow_overlap = true
max_rel_l2 = 1
max_drop = 0.3
labels = "labels.txt"
vnni = true
"""


def options(recipe: Path | None, *arguments: str) -> ExportOptions:
    """What the command makes of its arguments."""
    context = export_command.make_context("spach-export", list(arguments))
    own = {"show_list", "list_rewrites", "recipe", "verbose", "as_json", "debug"}
    return export_options({name: value for name, value in context.params.items() if name not in own}, recipe)


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_recipe_can_say_everything(tmp_path: Path) -> None:
    path = recipe(tmp_path, EVERYTHING)
    assert sorted(read_recipe(path)) == KEYS
    made = options(path)
    values = made.model.hyperparameters
    assert (values.heads, values.qk_scale, values.activation, values.norm_eps) == (3, 0.25, "gelu-tanh", 1e-5)
    assert values.divisions == 6
    assert (values.mean, values.std) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert (values.crop, values.interpolation) == (0.95, "bilinear")
    path, ignore = tmp_path / "weights.pth", ("head_dist.*",)
    arch, module = tmp_path / "hybrid.toml", "nets:build"
    model = ModelSpec("ms_hybrid_s", path, WeightSource.EMA, (192, 256), 10, ignore, values, arch, module)
    assert made.model == model
    assert made.answers == tmp_path / "answers.npz"
    assert made.precision is Precision.BF16
    roles, names = (Role.LOGITS, Role.FEATURES), ("logits=scores",)
    assert made.outputs == OutputSpec(IODtype.UINT8, 5, True, roles, FeatureLayout.TOKENS, names)
    assert made.engine.gpus == (ComputeCapability(8, 6), ComputeCapability(8, 9))
    assert made.engine.batch == BatchProfile(1, 2, 4)
    assert (made.engine.opt_level, made.engine.workspace_bytes, made.engine.tf32) == (0, 2 << 30, False)
    assert (made.engine.flavour, made.engine.timing_cache) == (Flavour.TENSORRT, tmp_path / "cache")
    assert made.opset == 22
    assert made.engine.version_compatible
    assert made.engine.hardware_compatible
    assert made.disabled_rewrites == ("shift_depthwise", "fold_residual")
    assert (made.images, made.output, made.overwrite) == (tmp_path / "photos", tmp_path / "out", True)
    said = made.quantization
    assert (said.calibration, said.cache) == (tmp_path / "set", Destination.of(tmp_path / "scales.json"))
    assert (said.method, said.rest, said.equalize, said.allow_overlap) == ("mse", Precision.BF16, False, True)
    assert (said.keep_float, said.quantize) == (("layer4.*",), ("*.spatial_func",))
    assert (said.per_tensor, said.layers) == (("*.fc1", "*.fc2"), "all")
    assert (said.max_rel_l2, said.max_drop, said.labels) == (1.0, 0.3, tmp_path / "labels.txt")


def test_another_precision_on_the_command_line_drops_what_a_recipe_says_of_eight_bits(tmp_path: Path) -> None:
    assert options(recipe(tmp_path, EVERYTHING), "--fp16").quantization == QuantizationSpec()


def test_the_command_line_wins_over_a_recipe(tmp_path: Path) -> None:
    path = recipe(tmp_path, EVERYTHING)
    flags = "--fp16 --weights model --no-softmax --tf32 --no-overwrite --opt-level 3 --gpu sm80 --batch 7 -o here"
    made = options(path, *flags.split(), "--no-rewrite", "grid_stream")
    assert made.precision is Precision.FP16
    assert made.model.weights is WeightSource.MODEL
    assert not made.outputs.softmax
    assert made.engine.tf32
    assert not made.overwrite
    assert made.engine.opt_level == 3
    assert made.engine.gpus == (ComputeCapability(8, 0),)
    assert made.engine.batch == BatchProfile(7, 7, 7)
    assert made.output == Path("here")
    assert made.disabled_rewrites == ("grid_stream",)
    assert made.outputs.top_k == 5  # what the command line leaves open stays the recipe's


def test_without_a_recipe_and_flags_there_are_the_defaults() -> None:
    assert options(None) == ExportOptions()


def test_no_engine_on_the_command_line_drops_what_a_recipe_says_of_engines(tmp_path: Path) -> None:
    made = options(recipe(tmp_path, EVERYTHING), "--engine", "none")
    assert made.engine.flavour is Flavour.NONE
    assert (made.engine.gpus, made.engine.opt_level, made.engine.timing_cache) == ((), None, None)


def test_no_engine_beside_what_is_of_engines_is_a_contradiction(tmp_path: Path) -> None:
    path = recipe(tmp_path, 'model = "conv_xxs"\nengine = "none"\ngpu = "sm89"\nversion_compatible = true')
    with pytest.raises(UsageError, match="--gpu, --version-compatible can do nothing"):
        options(path)


@pytest.mark.parametrize(
    ("text", "bytes_"), [("1", 1), ("512M", 512 << 20), ("2G", 2 << 30), ("2 GiB", 2 << 30), ("3kb", 3000)]
)
def test_sizes(text: str, bytes_: int) -> None:
    assert parse_size(text) == bytes_


WRONG: list[tuple[str, str, str]] = [
    ('modell = "x"', "unknown key 'modell'", "Did you mean model?"),
    ("image-size = 224", "unknown key 'image-size'", "Did you mean image_size?"),
    ("zzz = 1", "unknown key 'zzz'", "Known keys: activation, allow_overlap, answers"),
    ('[model]\nname = "conv_xxs"', "model = {'name': 'conv_xxs'} is not a text", "See export/README.md"),
    ("model = 3", "model = 3 is not a text", "See export/README.md"),
    ('image_size = "224"', "image_size = '224' is not a whole number", "See export/README.md"),
    ("image_size = true", "image_size = True is not a whole number", "See export/README.md"),
    ("image_size = 0", "image_size = 0 is out of range", "Give 1 to 16384"),
    ("image_size = [192, 0]", "image_size = 0 is out of range", "Give 1 to 16384"),
    ("image_size = [192]", "image_size = [192] is no height and width", "Give a whole number, or a list of two"),
    ('interpolation = "lanczos"', "interpolation = 'lanczos' is unknown", "One of bicubic, bilinear, nearest"),
    ("crop = nan", "crop nan is not in 0.1..1", ""),
    ("num_classes = 1000001", "num_classes = 1000001 is out of range", "Give 0 to 1000000"),
    ('mean = "0.5,nan,0.5"', "--mean nan is not in 0..1", "Divide values of 0 to 255 by 255"),
    ("top_k = -1", "top_k = -1 is out of range", "Give 1 or more"),
    ("opt_level = 6", "opt_level = 6 is out of range", "Give 0 to 5"),
    ("opt_level = 2.0", "opt_level = 2.0 is not a whole number", "See export/README.md"),
    ('softmax = "yes"', "softmax = 'yes' is not a true or false", "See export/README.md"),
    ('precision = "int4"', "precision = 'int4' is unknown", "One of fp32, fp16, bf16"),
    ('engine = "onnx"', "engine = 'onnx' is unknown", "One of auto, tensorrt"),
    ("gpu = 89", "gpu = 89 is not a text", "See export/README.md"),
    ('gpu = ["sm89", 86]', "gpu = 86 is not a text", "See export/README.md"),
    ("batch = [1, 8]", "--batch '1:8' is not a batch profile", "Give --batch"),
    ("batch = [1, 8.0, 32]", "batch = [1, 8.0, 32] is not a list of numbers", "See export/README.md"),
    ("mean = []", "mean = [] is not a list of numbers", "See export/README.md"),
    ("mean = [true, 0, 0]", "mean = [True, 0, 0] is not a list of numbers", "See export/README.md"),
    ("batch = 0", "Batch profile 0:0:0", "Give --batch"),
    ("model conv_xxs", "is not TOML", "See export/README.md"),
    ('model = "a"\nmodel = "b"', "is not TOML", "See export/README.md"),
    ("a = " + "[" * 50_000, "is not TOML", "See export/README.md"),
]


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case[0][:30])
def test_what_is_wrong_with_a_recipe_is_named(case: tuple[str, str, str], tmp_path: Path) -> None:
    text, reason, step = case
    path = recipe(tmp_path, text)
    before = contents(tmp_path)
    sentence = refusal(export("--recipe", path, "-o", tmp_path / "bundle"))
    assert reason in sentence
    assert step in sentence
    assert contents(tmp_path) == before


def _binary(path: Path) -> None:
    path.write_bytes(b"\x80\xff\x00")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "cannot be read (No such file"),
        (Path.mkdir, "cannot be read (Is a directory)"),
        (_binary, "cannot be read (it is not UTF-8)"),
    ],
    ids=["missing", "directory", "binary"],
)
def test_a_recipe_that_is_no_text_file_is_refused(make: Any, reason: str, tmp_path: Path) -> None:
    make(tmp_path / "recipe.toml")
    assert reason in refusal(export("--recipe", tmp_path / "recipe.toml"))
