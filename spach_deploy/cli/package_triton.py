"""spach-package triton: a model repository from bundles, and the check of any repository."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from spach_deploy.cli.console import Command, command, say, show
from spach_deploy.common.errors import UsageError
from spach_deploy.options.click_options import click_options
from spach_deploy.options.table import TRITON
from spach_deploy.packaging.triton.options import (
    Backend,
    Batching,
    Device,
    Ensemble,
    EnsembleInput,
    Instances,
    RateLimiter,
    TritonOptions,
    VersionPolicy,
)

if TYPE_CHECKING:
    from spach_deploy.packaging.triton.repository import TritonRepository


@click.command("triton", cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundles", nargs=-1, metavar="[NAME=]BUNDLE...")
@click_options(TRITON)
@command
def main(**given: Any) -> int:
    """Write a Triton model repository of one or several bundles, or check one.

    \b
    spach-package triton build/ms_hybrid_s-fp16 -o models
    spach-package triton build/ms_hybrid_s-fp16 -o models \\
        --ensemble --labels imagenet.txt
    spach-package triton exact=build/a fast=build/b -o models
    spach-package triton --check models

    Bundles of one name become versions 1, 2, ... of it; the name is the model's own unless NAME= gives another.

    Exit codes: 0 written, or nothing found; 1 the check found something, or a file is not the one that was
    exported; 2 bad usage or input.
    """
    if given["check"] is not None:
        return _check(given)
    return _write(given)


def _write(given: dict[str, Any]) -> int:
    if not given["bundles"] or given["output"] is None:
        raise UsageError("Nothing to do.", "Give a BUNDLE and --output REPO, or --check REPO.")
    options = _options(given)
    from spach_deploy.packaging.triton.repository import repository_json, repository_text, write_repository
    from spach_deploy.packaging.triton.served_model import BundleArgument

    bundles = [BundleArgument.parse(text) for text in given["bundles"]]
    written: TritonRepository = write_repository(bundles, given["output"], options, overwrite=given["overwrite"])
    for warning in written.warnings:
        say(f"Warning: {warning}")
    show(repository_json(written) if given["as_json"] else repository_text(written))
    return 0


def _options(given: dict[str, Any]) -> TritonOptions:
    """The options as objects. UsageError for options that contradict each other."""
    policy = given["version_policy"]
    device = given["device"]
    return TritonOptions(
        backend=Backend(given["backend"]),
        force=given["force"],
        instances=Instances.parse(given["instances"], Device(device) if device else None, _gpus(given["gpus"])),
        rate_limiter=RateLimiter.parse(given["rate_limit_resource"], given["rate_limit_priority"]),
        batching=Batching(not given["no_dynamic_batching"], given["queue_delay_us"]),
        version_policy=VersionPolicy.parse(policy) if policy else None,
        response_cache=given["response_cache"],
        warm_up=not given["no_warm_up"],
        labels=given["labels"],
        ensemble=_ensemble(given),
    )


def _gpus(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() for part in parts) or len(set(parts)) != len(parts):
        raise UsageError(f"--gpus {text!r} is no list of GPUs.", "Give their numbers, such as 0,1.")
    return tuple(int(part) for part in parts)


def _ensemble(given: dict[str, Any]) -> Ensemble | None:
    if given["ensemble"]:
        return Ensemble(EnsembleInput(given["ensemble_input"] or "bytes"), given["top_k"])
    for option in ("ensemble_input", "top_k"):
        if given[option] is not None:
            raise UsageError(f"--{option.replace('_', '-')} needs --ensemble.", "Give --ensemble too.")
    return None


def _check(given: dict[str, Any]) -> int:
    if given["bundles"] or given["output"] is not None:
        raise UsageError("--check takes neither bundles nor --output.", "Give --check REPO alone.")
    from spach_deploy.packaging.triton.check import check_repository
    from spach_deploy.packaging.triton.check.findings import as_json, as_text

    result = check_repository(given["check"])
    show(as_json(result) if given["as_json"] else as_text(result))
    return result.exit_code
