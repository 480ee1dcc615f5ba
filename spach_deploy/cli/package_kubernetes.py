"""spach-package kubernetes: a container image and the manifests that run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from spach_deploy.cli import options as opt
from spach_deploy.cli.console import Command, command, show
from spach_deploy.common.errors import UsageError
from spach_deploy.packaging.kubernetes.options import KubernetesOptions, Replicas
from spach_deploy.packaging.triton.options import Backend

_VERSION = "Release of Triton's image to build on, such as 25.08.  [the newest that loads the engine]"
_LIST = "Show which Triton image carries which TensorRT, and end."
_KSERVE = "Write a ServingRuntime and an InferenceService instead of a Deployment."
_BACKEND = "What runs the model.  [auto: the plan where ordinary TensorRT can load it, else the graph]"
_NAME = "What Kubernetes calls it.  [the model's name]"
_IMAGE = "Name of the image that you build, without a tag.  [registry.example.com/spach/NAME]"
_LABELS = "Names of the classes, one a line.  [class 0, class 1, …]"
_ENSEMBLE = "Add steps around the model: a client sends a picture's file and gets the best classes with labels."


@click.command("kubernetes", cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=opt.FILE, required=False)
@click.option("-o", "--output", type=opt.FILE, metavar="DIR", help="The folder to write.")
@click.option("--triton-version", metavar="YY.MM", help=_VERSION)
@click.option("--list-versions", is_flag=True, help=_LIST)
@click.option("--kserve", is_flag=True, help=_KSERVE)
@click.option("--backend", type=click.Choice([item.value for item in Backend]), default="auto", help=_BACKEND)
@click.option("--name", metavar="NAME", help=_NAME)
@click.option("--image", metavar="NAME", help=_IMAGE)
@click.option("--replicas", metavar="MIN:MAX", default="2:8", show_default=True, help="How many pods there may be.")
@click.option("--labels", type=opt.FILE, metavar="FILE", help=_LABELS)
@click.option("--ensemble", is_flag=True, help=_ENSEMBLE)
@click.option("--overwrite", is_flag=True, help="Replace a folder that spach-package kubernetes wrote.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
@opt.debug
@opt.version
@command
def main(**given: Any) -> int:
    """Write a container image with Triton and BUNDLE's model, and the Kubernetes manifests that run it.

    \b
    spach-package kubernetes build/ms_hybrid_s-fp16 -o k8s --triton-version 25.08 --image registry.example.com/team/vit
    spach-package kubernetes build/ms_hybrid_s-fp16 -o k8s --kserve

    Pods check the model with the bundle's golden pack on their own GPU before they take traffic. README.md in DIR
    explains every file and the three commands to use them.

    Exit codes: 0 written, 1 a file is not the one that was exported, 2 bad usage or input.
    """
    if given["list_versions"]:
        return _list_versions()
    if given["bundle"] is None or given["output"] is None:
        raise UsageError("Nothing to do.", "Give a BUNDLE and --output DIR, or --list-versions.")
    return _write(given["bundle"], given["output"], given)


def _write(bundle: Path, output: Path, given: dict[str, Any]) -> int:
    options = KubernetesOptions(
        triton_version=given["triton_version"],
        kserve=given["kserve"],
        backend=Backend(given["backend"]),
        name=given["name"],
        image=given["image"],
        replicas=Replicas.parse(given["replicas"]),
        labels=given["labels"],
        ensemble=given["ensemble"],
    )
    from spach_deploy.packaging.kubernetes.folder import as_json, as_text, write_folder

    written = write_folder(bundle, output, options, overwrite=given["overwrite"])
    show(as_json(written) if given["as_json"] else as_text(written))
    return 0


def _list_versions() -> int:
    from spach_deploy.graph.runtimes import runtimes
    from spach_deploy.packaging.kubernetes.folder import versions_table

    show(versions_table(runtimes()))
    return 0
