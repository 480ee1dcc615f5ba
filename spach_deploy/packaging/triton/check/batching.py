"""Rules for batches: max_batch_size and dynamic batching against the engine's profile, priorities and queues."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from spach_deploy.options.specs import BatchProfile
from spach_deploy.packaging.triton.check.findings import RepositoryFinding, Severity
from spach_deploy.packaging.triton.check.model_folder import ModelFolder, Repository


def check_batching(model: ModelFolder, repository: Repository) -> Iterator[RepositoryFinding]:
    """What the server may send, against what the engine accepts; and the batcher's own fields."""
    for facts in model.facts.values():
        if facts.profile is not None:
            yield from _profile(model, facts.profile)
    if model.config.HasField("dynamic_batching"):
        yield from _dynamic(model, model.config.dynamic_batching)
        yield from _priorities(model, model.config.dynamic_batching)


def _profile(model: ModelFolder, profile: BatchProfile) -> Iterator[RepositoryFinding]:
    largest = model.config.max_batch_size
    if largest > profile.max:
        where = "engine's" if model.is_tensorrt else "bundle's"
        yield model.finding(
            "max_batch_size",
            str(largest),
            f"at most {profile.max}: the {where} batch profile is {profile}",
            f"Write max_batch_size: {profile.max}, or export it with a larger --batch.",
            # a graph takes any batch, but beyond the profile nobody asked for it
            severity=Severity.ERROR if model.is_tensorrt else Severity.WARNING,
        )
    if not model.is_tensorrt:
        return
    if largest > 0 and profile.min > 1:
        yield model.finding(
            "max_batch_size",
            f"{largest}, which lets the server send single samples",
            f"0: the engine's batch profile is {profile}",
            "Write max_batch_size: 0 with the batch in front of dims, or export it with --batch 1:….",
        )
    if largest == 0:
        yield from _explicit_batch(model, profile)


def _explicit_batch(model: ModelFolder, profile: BatchProfile) -> Iterator[RepositoryFinding]:
    for where, tensor in model.tensors():
        batch = tensor.dims[0] if tensor.dims else -1
        if batch != -1 and not profile.min <= batch <= profile.max:
            yield model.finding(
                f"{where}.dims", f"a batch of {batch}", f"one that the profile {profile} accepts", "Correct it."
            )


def _dynamic(model: ModelFolder, batching: Any) -> Iterator[RepositoryFinding]:
    largest = model.config.max_batch_size
    if largest == 0:
        yield model.finding(
            "dynamic_batching",
            "it, with max_batch_size 0",
            "none: without a batch of its own nothing can be joined",
            "Remove dynamic_batching, or set max_batch_size.",
        )
        return
    sizes = list(batching.preferred_batch_size)
    for size in sizes:
        if not 1 <= size <= largest:
            yield model.finding(
                "dynamic_batching.preferred_batch_size", str(size), f"1 to max_batch_size {largest}", "Correct it."
            )
    if len(set(sizes)) != len(sizes):
        yield model.finding("dynamic_batching.preferred_batch_size", str(sizes), "each size once", "Remove one.")


def _priorities(model: ModelFolder, batching: Any) -> Iterator[RepositoryFinding]:
    levels, default = batching.priority_levels, batching.default_priority_level
    if levels and not 1 <= default <= levels:
        yield model.finding(
            "dynamic_batching.default_priority_level", str(default), f"1 to priority_levels {levels}", "Correct it."
        )
    if default and not levels:
        yield model.finding(
            "dynamic_batching.default_priority_level",
            str(default),
            "none without priority_levels",
            "Add priority_levels.",
        )
    for level in batching.priority_queue_policy:
        if not 1 <= level <= levels:
            yield model.finding(
                "dynamic_batching.priority_queue_policy",
                f"level {level}",
                f"1 to priority_levels {levels}",
                "Correct it.",
            )
