"""Every command-line option that more than one command has, defined once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from spach_deploy._version import __version__
from spach_deploy.specs import WeightSource

F = TypeVar("F", bound=Callable[..., Any])

FILE = click.Path(path_type=Path)


def checkpoint(function: F) -> F:
    """--checkpoint."""
    text = "Checkpoint: .pth, .pt or .safetensors. Without it, demo weights."
    return click.option("--checkpoint", type=FILE, metavar="FILE", help=text)(function)


def weights(function: F) -> F:
    """--weights."""
    choice = click.Choice([source.value for source in WeightSource])
    text = "Which weights of a training checkpoint to take.  [model]"
    return click.option("--weights", type=choice, help=text)(function)


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
