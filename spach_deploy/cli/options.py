"""Every command-line option that more than one command has, defined once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from spach_deploy._version import __version__
from spach_deploy.options.specs import ACTIVATIONS, WeightSource

F = TypeVar("F", bound=Callable[..., Any])

FILE = click.Path(path_type=Path, readable=False)  # whoever reads it says why it cannot be read
METHODS = ("max", "percentile", "entropy", "mse")
RESTS = ("fp16", "bf16", "fp32")


def checkpoint(function: F) -> F:
    """--checkpoint."""
    text = "Checkpoint: .pth, .pt or .safetensors. Without it, demo weights."
    return click.option("--checkpoint", type=FILE, metavar="FILE", help=text)(function)


def weights(function: F) -> F:
    """--weights."""
    choice = click.Choice([source.value for source in WeightSource])
    text = "Which weights of a training checkpoint to take.  [model]"
    return click.option("--weights", type=choice, help=text)(function)


def ignore(function: F) -> F:
    """--ignore."""
    text = "Tensors of the checkpoint that are not the model's, such as 'head_dist.*'; may be repeated."
    return click.option("--ignore", multiple=True, metavar="PATTERN", help=text)(function)


_HYPERPARAMETERS: tuple[Callable[[Any], Any], ...] = (
    click.option("--heads", type=click.IntRange(min=1), metavar="N", help="Heads of every attention."),
    click.option("--qk-scale", type=float, metavar="X", help="Factor of q in attention.  [head size ** -0.5]"),
    click.option("--activation", type=click.Choice(ACTIVATIONS), help="Of channel and spatial MLPs."),
    click.option("--norm-eps", type=float, metavar="X", help="Epsilon of every LayerNorm."),
    click.option("--mean", metavar="R,G,B", help="Mean of the pixels, in 0..1, that training subtracted."),
    click.option("--std", metavar="R,G,B", help="Standard deviation of the pixels that training divided by."),
)


def hyperparameters(function: F) -> F:
    """What no tensor shows. Without them the checkpoint's args say it, else the published values are assumed."""
    for option in reversed(_HYPERPARAMETERS):
        function = option(function)
    return function


def answers(text: str) -> Callable[[F], F]:
    """--answers."""
    return click.option("--answers", type=FILE, metavar="FILE.npz", help=text)


def calibration(function: F) -> F:
    """--calibration."""
    text = "Images to calibrate on: a folder, a tar or an npz; or what spach-calibrate wrote (.json)."
    return click.option("--calibration", type=FILE, metavar="PATH", help=text)(function)


_SCALES: tuple[Callable[[Any], Any], ...] = (
    click.option("--method", type=click.Choice(METHODS), help="How activation scales are set.  [max]"),
    click.option("--rest", type=click.Choice(RESTS), help="Precision of what is not quantized.  [fp16]"),
    click.option("--keep-float", multiple=True, metavar="PATTERN", help="Layers to leave alone, such as 'layer4.*'."),
    click.option("--quantize", multiple=True, metavar="PATTERN", help="Layers to quantize against the rules."),
    click.option("--per-tensor", multiple=True, metavar="PATTERN", help="Layers whose weights share one scale."),
    click.option("--equalize/--no-equalize", default=None, help="Exchange ranges before scales are set."),
    click.option("--allow-overlap/--no-allow-overlap", default=None, help="Accept validation images in the set."),
)


def scales(function: F) -> F:
    """How scales are set, and for which layers."""
    for option in reversed(_SCALES):
        function = option(function)
    return function


def bounds(function: F) -> F:
    """--max-rel-l2, --max-drop, --labels: how much a quantized model may change."""
    options = (
        click.option("--max-rel-l2", type=float, metavar="X", help="Leave layers in float until logits change less."),
        click.option("--max-drop", type=float, metavar="POINTS", help="Leave layers in float until top-1 drops less."),
        click.option("--labels", type=FILE, metavar="PATH", help="Labels of --images, for --max-drop."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def ray_address(text: str, name: str = "ray") -> Callable[[F], F]:
    """--ray, with an address or without; its value's name."""
    return click.option("--ray", name, is_flag=False, flag_value="local", metavar="[ADDRESS]", help=text)


def many(function: F) -> F:
    """--zoo, --precision, --jobs, --ray: many bundles by one command."""
    options = (
        click.option("--zoo", metavar="PATTERNS", help="Export many models, such as 'ms_*'; a bundle for each GPU."),
        click.option("--precision", "precision_list", metavar="LIST", help="With --zoo: such as fp16,int8."),
        click.option("--jobs", type=click.IntRange(min=1), metavar="N", help="With --zoo: exports at once, at most."),
        ray_address("With --zoo: build on a Ray cluster. Else: calibrate and choose layers there.  [this machine]"),
    )
    for option in reversed(options):
        function = option(function)
    return function


def target(function: F) -> F:
    """--target, --vnni: for CPUs."""
    text = "For this machine's CPU: measure fp32, bf16 and, with --calibration, int8; keep the fastest that is right."
    vnni = "With --int8 --rest fp32 --engine none: for CPUs with VNNI, where OpenVINO needs it and ONNX Runtime gains."
    function = click.option("--vnni/--no-vnni", default=None, help=vnni)(function)
    return click.option("--target", type=click.Choice(["cpu"]), help=text)(function)


def calibration_cache(function: F) -> F:
    """--calibration-cache."""
    text = "Reuse this calibration where it fits, or write it here."
    return click.option("--calibration-cache", type=FILE, metavar="FILE", help=text)(function)


def images(function: F) -> F:
    """--images."""
    text = "Images: a folder, a tar or an npz file. Without it, the built-in photographs or the bundle's golden pack."
    return click.option("--images", type=FILE, metavar="PATH", help=text)(function)


def debug(function: F) -> F:
    """--debug."""
    return click.option("--debug", is_flag=True, help="Show the traceback of an error.")(function)


def version(function: F) -> F:
    """--version."""
    return click.version_option(__version__, prog_name="spach-deploy")(function)
