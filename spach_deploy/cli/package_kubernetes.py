"""spach-package kubernetes: a container image and the manifests that run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from spach_deploy.cli.console import Command, command, show
from spach_deploy.common.errors import UsageError
from spach_deploy.options.click_options import FILE, click_options
from spach_deploy.options.table import KUBERNETES
from spach_deploy.packaging.kubernetes.deployment import ImageDigest, KubernetesOptions, Replicas
from spach_deploy.packaging.triton.options import Backend, Instances


@click.command("kubernetes", cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=FILE, required=False)
@click_options(KUBERNETES)
@command
def main(**given: Any) -> int:
    """Write a container image with Triton and BUNDLE's model, and the Kubernetes manifests that run it.

    \b
    spach-package kubernetes build/ms_hybrid_s-fp16 -o k8s \\
        --triton-version 25.08 --image registry.example.com/team/vit
    spach-package kubernetes build/ms_hybrid_s-fp16 -o k8s --kserve
    spach-package kubernetes build/ms_hybrid_s-fp16 -o k8s --helm

    Pods check the model with the bundle's golden pack, where they run, before they take traffic. README.md in DIR
    explains every file and the commands to use them.

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
        instances=Instances.parse(given["instances"]),
        helm=given["helm"],
        pull_secrets=tuple(given["image_pull_secret"]),
        image_digest=_digest(given, "image_digest"),
        triton_digest=_digest(given, "triton_digest"),
    )
    from spach_deploy.packaging.kubernetes.folder import as_json, as_text, write_folder

    written = write_folder(bundle, output, options, overwrite=given["overwrite"])
    show(as_json(written) if given["as_json"] else as_text(written))
    return 0


def _digest(given: dict[str, Any], key: str) -> ImageDigest | None:
    return None if given[key] is None else ImageDigest.parse(f"--{key.replace('_', '-')}", given[key])


def _list_versions() -> int:
    from spach_deploy.graph.runtimes import runtimes
    from spach_deploy.packaging.kubernetes.folder import versions_table

    show(versions_table(runtimes()))
    return 0
