"""Rules for config.pbtxt by itself (platform, tensors, instances, versions), as the server has them, and for labels.

A label file must exist and have a name for each class.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from spach_deploy.bundle.outputs import LOGITS
from spach_deploy.common.files import read_bytes
from spach_deploy.data.labels import has_empty_end
from spach_deploy.packaging.triton.check.findings import RepositoryFinding
from spach_deploy.packaging.triton.check.model_folder import PLATFORMS, ModelFolder, Repository
from spach_deploy.packaging.triton.config import data_type_name, shown
from spach_deploy.packaging.triton.options import KIND_CPU, KIND_MODEL


def check_fields(model: ModelFolder, repository: Repository) -> Iterator[RepositoryFinding]:
    """Check name, platform and backend, tensors, instance groups with their rate limiters, version policy, cache."""
    yield from _name(model)
    yield from _platform(model)
    yield from _tensors(model)
    yield from _instances(model)
    yield from _rate_limiters(model, repository)
    yield from _versions(model)
    if model.config.response_cache.enable and model.config.model_transaction_policy.decoupled:
        yield model.finding(
            "response_cache.enable", "true for a decoupled model", "false", "Leave the response cache out."
        )


def _name(model: ModelFolder) -> Iterator[RepositoryFinding]:
    name = model.config.name
    if name not in ("", model.name):
        yield model.finding("name", f'"{name}"', f'"{model.name}", as the folder', "Rename one of them.")


def _platform(model: ModelFolder) -> Iterator[RepositoryFinding]:
    platform, backend = model.config.platform, model.config.backend
    if model.is_ensemble:
        yield from _ensemble_platform(model)
    elif not platform and not model.backend:
        yield model.finding("backend", "none", "a backend or a platform", 'Add backend: "onnxruntime" or the like.')
    elif platform and not backend and platform not in PLATFORMS:
        known = ", ".join([*PLATFORMS, "ensemble"])
        yield model.finding("platform", f'"{platform}"', f"one of {known}", "Correct it, or name a backend.")
    elif backend and PLATFORMS.get(platform, backend) != backend:
        yield model.finding(
            "backend",
            f'"{backend}"',
            f'"{PLATFORMS[platform]}", as platform "{platform}" needs',
            "Correct one of them.",
        )
    if model.config.max_batch_size < 0:
        yield model.finding("max_batch_size", str(model.config.max_batch_size), "0 or more", "Correct it.")


def _ensemble_platform(model: ModelFolder) -> Iterator[RepositoryFinding]:
    config = model.config
    if config.platform != "ensemble":
        yield model.finding("platform", f'"{config.platform}"', '"ensemble"', "A model with steps is an ensemble.")
    if config.backend:
        yield model.finding("backend", f'"{config.backend}"', "none, as nothing runs an ensemble", "Remove it.")
    if config.instance_group:
        yield model.finding("instance_group", "one", "none, as nothing runs an ensemble", "Remove it.")


# Tensors


def _tensors(model: ModelFolder) -> Iterator[RepositoryFinding]:
    for side in ("input", "output"):
        tensors = getattr(model.config, side)
        if not tensors:
            yield model.finding(side, "none", f"every {side} of the model", f"Add an {side} block.")
        for name, count in Counter(tensor.name for tensor in tensors).items():
            if name and count > 1:
                yield model.finding(side, f'"{name}" {count} times', "each name once", "Remove or rename one.")
    for where, tensor in model.tensors():
        yield from _tensor(model, where, tensor)


def _tensor(model: ModelFolder, where: str, tensor: Any) -> Iterator[RepositoryFinding]:
    if not tensor.name:
        yield model.finding(f"{where}.name", "none", "the tensor's name", "Add it.")
    if data_type_name(tensor.data_type) == "TYPE_INVALID":
        yield model.finding(f"{where}.data_type", "none", "a type such as TYPE_FP32", "Add it.")
    if not tensor.dims:
        yield model.finding(f"{where}.dims", "none", "the extents without the batch", "Add them.")
    elif wrong := [size for size in tensor.dims if size < 1 and size != -1]:
        yield model.finding(f"{where}.dims", str(wrong[0]), "extents of 1 or more, or -1 for a free one", "Correct it.")
    yield from _reshape(model, where, tensor)
    if where.startswith("input") and tensor.format and len(tensor.dims) != 3:
        yield model.finding(f"{where}.format", f"one for dims {shown(tensor.dims)}", "three dims", "Remove the format.")


def _reshape(model: ModelFolder, where: str, tensor: Any) -> Iterator[RepositoryFinding]:
    if not tensor.HasField("reshape") or -1 in (*tensor.dims, *tensor.reshape.shape):
        return
    have, want = math.prod(tensor.reshape.shape), math.prod(tensor.dims)
    if have != want:
        yield model.finding(
            f"{where}.reshape.shape",
            f"{shown(tensor.reshape.shape)}, {have} elements",
            f"{want} elements, as dims {shown(tensor.dims)} have",
            "Correct one of them.",
        )


# Instances


def _instances(model: ModelFolder) -> Iterator[RepositoryFinding]:
    for index, group in enumerate(model.config.instance_group):
        where = f"instance_group[{index}]"
        if group.count < 0:
            yield model.finding(f"{where}.count", str(group.count), "1 or more", "Correct it.")
        if group.gpus and group.kind in (KIND_CPU, KIND_MODEL):
            kind = "KIND_CPU" if group.kind == KIND_CPU else "KIND_MODEL"
            yield model.finding(
                f"{where}.gpus", f"{shown(group.gpus)} with {kind}", "none", "Remove gpus, or the kind."
            )
        if len(set(group.gpus)) != len(group.gpus) or any(gpu < 0 for gpu in group.gpus):
            yield model.finding(f"{where}.gpus", shown(group.gpus), "each GPU once, from 0", "Correct it.")
        if group.kind == KIND_CPU and model.is_tensorrt:
            yield model.finding(f"{where}.kind", "KIND_CPU", "KIND_GPU, as TensorRT runs on no CPU", "Correct it.")
        if group.profile and not model.is_tensorrt:
            yield model.finding(f"{where}.profile", "one", "none, as only TensorRT has profiles", "Remove it.")


def _rate_limiters(model: ModelFolder, repository: Repository) -> Iterator[RepositoryFinding]:
    """Resources need a name and a count, each once; in the whole repository they are global, or of a device."""
    of_devices = {r.name for group in _groups(repository) for r in group.rate_limiter.resources if not _is_global(r)}
    for index, group in enumerate(model.config.instance_group):
        where = f"instance_group[{index}].rate_limiter.resources"
        resources = list(group.rate_limiter.resources)
        for number, resource in enumerate(resources):
            if not resource.name:
                yield model.finding(f"{where}[{number}].name", "none", "the resource's name", "Add it.")
            if resource.count < 1:
                yield model.finding(f"{where}[{number}].count", str(resource.count), "1 or more", "Correct it.")
            if _is_global(resource) and resource.name in of_devices:
                yield model.finding(
                    f"{where}[{number}].global",
                    f'true for "{resource.name}", which another instance group has for each device',
                    "the same in all of them: with --rate-limit the server refuses both",
                    "Correct one of them.",
                )
        for name, count in Counter(resource.name for resource in resources).items():
            if name and count > 1:
                yield model.finding(where, f'"{name}" {count} times', "each resource once", "Remove one.")


def _groups(repository: Repository) -> Iterator[Any]:
    return (group for model in repository.models for group in model.config.instance_group)


def _is_global(resource: Any) -> bool:
    return bool(getattr(resource, "global"))  # a keyword of Python


# Versions


def _versions(model: ModelFolder) -> Iterator[RepositoryFinding]:
    policy = model.config.version_policy
    choice = policy.WhichOneof("policy_choice")
    if choice == "latest" and not policy.latest.num_versions:
        yield model.finding("version_policy.latest.num_versions", "0", "1 or more", "Correct it.")
    if choice != "specific":
        return
    if not policy.specific.versions:
        yield model.finding("version_policy.specific.versions", "none", "one or more", "Add them.")
    for version in policy.specific.versions:
        if version not in model.versions:
            have = ", ".join(map(str, model.versions)) or "no version"
            yield model.finding(
                "version_policy.specific.versions",
                str(version),
                f"what is there: {have}",
                "Correct it, or add the folder.",
            )


BYTE_ORDER_MARK = "\ufeff"

_FIX = "Write one name a line, in the order of the classes."


def check_labels(model: ModelFolder, repository: Repository) -> Iterator[RepositoryFinding]:
    """Check label_filename of every output. For logits without one, clients get numbers instead of class names."""
    for index, output in enumerate(model.config.output):
        where = f"output[{index}].label_filename"
        if output.label_filename:
            yield from label_file(model, where, output.label_filename, _classes(output))
        elif output.name == LOGITS and any(facts.profile is not None for facts in model.facts.values()):
            yield model.finding(
                where, "none", "the file with the names of the classes", 'Write "labels.txt" and add it.'
            )


def label_file(model: ModelFolder, where: str, name: str, classes: int | None) -> Iterator[RepositoryFinding]:
    """Check a label file against the number of classes, None where the dims leave it free."""
    file = model.path / name
    if not file.is_file():
        yield model.finding(where, f"no file {name}", "a text file beside config.pbtxt", _FIX, file=name)
        return
    try:
        labels = read_bytes(file).decode("utf-8").splitlines()
    except OSError as error:
        yield model.finding("", f"a file that cannot be read ({error.strerror})", "text", _FIX, file=name)
        return
    except UnicodeDecodeError:
        yield model.finding("", "bytes that are not UTF-8", "text", _FIX, file=name)
        return
    if labels and labels[0].startswith(BYTE_ORDER_MARK):
        fix = "Save it as UTF-8 without one: the server takes it for part of the name."
        yield model.finding("line 1", "a byte order mark before the name", "the name alone", fix, file=name)
    if classes is not None and has_empty_end(labels, classes):
        yield model.finding(
            f"line {classes + 1}", "an empty last line", "a class in each line", "Remove it.", file=name
        )
    elif classes is not None and len(labels) != classes:
        yield model.finding("", f"{len(labels)} lines", f"{classes}, one per class", _FIX, file=name)
    elif empty := [number for number, label in enumerate(labels, start=1) if not label.strip()]:
        yield model.finding(f"line {empty[0]}", "no name", "the name of a class", _FIX, file=name)


def _classes(output: Any) -> int | None:
    """The number of classes: the last extent, None where it is free."""
    return int(output.dims[-1]) if output.dims and output.dims[-1] > 0 else None
