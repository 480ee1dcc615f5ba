"""Rules for tensors, batches and warm-up requests in config.pbtxt.

Inputs and outputs are compared with those of the graph or engine; max_batch_size and dynamic batching with the engine's
batch profile; warm-up requests with the inputs. A wrong warm-up keeps the model from loading, and one above the largest
batch can crash the server.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from spach_deploy.bundle.schema import TensorInfo
from spach_deploy.options.specs import BatchProfile
from spach_deploy.packaging.triton.check.findings import RepositoryFinding, Severity
from spach_deploy.packaging.triton.check.model_folder import Facts, ModelFolder, Repository
from spach_deploy.packaging.triton.config import DATA_TYPES, FOLDER, byte_size, data_type_name, shown


def check_tensors(model: ModelFolder, repository: Repository) -> Iterator[RepositoryFinding]:
    """Check names, types and dims of inputs and outputs, for every version whose tensors are known."""
    for facts in model.facts.values():
        yield from _names(model, facts)
        for where, tensor in model.tensors():
            known = (facts.inputs if where.startswith("input") else facts.outputs).get(tensor.name)
            if known is not None:
                yield from _type(model, where, tensor, known, facts)
                yield from _dims(model, where, tensor, known, facts)


def _names(model: ModelFolder, facts: Facts) -> Iterator[RepositoryFinding]:
    """All inputs must be configured; of the outputs, only those that clients may request."""
    sides = (("input", facts.inputs), ("output", facts.outputs))
    for where, tensor in model.tensors():
        side, known = sides[0] if where.startswith("input") else sides[1]
        if tensor.name and tensor.name not in known:
            close = difflib.get_close_matches(tensor.name, known, n=1)
            fix = f"Did you mean {close[0]}?" if close else f"Name one of {', '.join(known)}."
            yield model.finding(f"{where}.name", f'"{tensor.name}"', f"an {side} of {facts.source}", fix)
    given = {tensor.name: tensor for tensor in model.config.input}
    for name in facts.inputs:
        if name not in given:
            yield model.finding("input", f'no "{name}"', f"every input of {facts.source}", f"Add an input {name}.")
        elif given[name].optional:
            yield model.finding("input.optional", f'"{name}" may be left out', "required", "Remove optional.")


def _type(model: ModelFolder, where: str, tensor: Any, known: TensorInfo, facts: Facts) -> Iterator[RepositoryFinding]:
    have, want = data_type_name(tensor.data_type), DATA_TYPES.get(known.dtype, known.dtype)
    if have not in (want, "TYPE_INVALID"):
        yield model.finding(
            f"{where}.data_type", have, f"{want}, as {tensor.name} has in {facts.source}", f"Write data_type: {want}."
        )


def _dims(model: ModelFolder, where: str, tensor: Any, known: TensorInfo, facts: Facts) -> Iterator[RepositoryFinding]:
    if not tensor.dims:
        return
    dims = list(tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims)
    batched = model.config.max_batch_size > 0
    shape = known.shape[1:] if batched else known.shape
    wanted = [-1 if size is None else size for size in shape]
    if batched and known.shape[:1] and known.shape[0] is not None:
        yield model.finding(
            "max_batch_size",
            f"{model.config.max_batch_size}, which leaves the batch to Triton",
            f"0: {tensor.name} has a fixed batch of {known.shape[0]} in {facts.source}",
            f"Write max_batch_size: 0 and dims: {shown(list(known.shape))}, or export it again.",  # type: ignore[arg-type]
        )
    elif not _agree(dims, wanted):
        note = " without the batch" if batched else ", the batch included"
        yield model.finding(
            f"{where}.{'reshape.shape' if tensor.HasField('reshape') else 'dims'}",
            shown(dims),
            f"{shown(wanted)}, as {tensor.name} has in {facts.source}{note}",
            f"Write dims: {shown(wanted)}.",
        )


def _agree(dims: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether dims fit: the configuration may fix an extent that the model leaves free, but not the other way round."""
    return len(dims) == len(wanted) and all(want in (-1, have) for have, want in zip(dims, wanted, strict=True))


def check_batching(model: ModelFolder, repository: Repository) -> Iterator[RepositoryFinding]:
    """Check that the engine accepts every batch that the server may send, and the fields of dynamic batching."""
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
            # a graph takes any batch, but the export did not validate it beyond the profile
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


def check_warm_up(model: ModelFolder, repository: Repository) -> Iterator[RepositoryFinding]:
    """Check batch size, tensors and files of every warm-up request."""
    for index, request in enumerate(model.config.model_warmup):
        where = f"model_warmup[{index}]"
        yield from _warm_up_batch(model, where, request)
        yield from _warm_up_names(model, where, request)
        known = {tensor.name: tensor for tensor in model.config.input}
        for name, sample in request.inputs.items():
            field = f'{where}.inputs["{name}"]'
            if name in known:
                yield from _warm_up_tensor(model, field, sample, known[name])
            yield from _warm_up_data(model, field, sample)


def _warm_up_batch(model: ModelFolder, where: str, request: Any) -> Iterator[RepositoryFinding]:
    largest = max(1, model.config.max_batch_size)
    if request.batch_size < 1:
        yield model.finding(
            f"{where}.batch_size", "0, which sends nothing", f"1 to {largest}", f"Write batch_size: {largest}."
        )
    elif request.batch_size > largest:
        maximum = f"max_batch_size {model.config.max_batch_size}"
        yield model.finding(
            f"{where}.batch_size",
            str(request.batch_size),
            f"at most {largest}, by {maximum}: a larger one fails the model or crashes the server",
            f"Write batch_size: {largest}.",
        )


def _warm_up_names(model: ModelFolder, where: str, request: Any) -> Iterator[RepositoryFinding]:
    known = {tensor.name: tensor.optional for tensor in model.config.input}
    for name in request.inputs:
        if name not in known:
            yield model.finding(
                f"{where}.inputs", f'"{name}"', f"inputs of the model: {', '.join(known)}", "Rename it."
            )
    for name, is_optional in known.items():
        if name not in request.inputs and not is_optional:
            yield model.finding(f"{where}.inputs", f'no "{name}"', "every input of the model", f"Add {name}.")


def _warm_up_tensor(model: ModelFolder, where: str, sample: Any, tensor: Any) -> Iterator[RepositoryFinding]:
    have, want = data_type_name(sample.data_type), data_type_name(tensor.data_type)
    if have != want:
        yield model.finding(f"{where}.data_type", have, f"{want}, as the input", f"Write data_type: {want}.")
    dims, wanted = list(sample.dims), list(tensor.dims)
    fits = len(dims) == len(wanted) and all(size in (have, -1) for have, size in zip(dims, wanted, strict=True))
    if not fits:
        yield model.finding(f"{where}.dims", shown(dims), f"{shown(wanted)}, as the input", "Correct them.")
    elif any(size < 1 for size in dims):
        yield model.finding(f"{where}.dims", shown(dims), "fixed extents", "Give every extent a number.")
    elif model.is_tensorrt and model.config.max_batch_size == 0:
        yield from _warm_up_profile(model, where, dims[0])


def _warm_up_profile(model: ModelFolder, where: str, batch: int) -> Iterator[RepositoryFinding]:
    for facts in model.facts.values():
        profile = facts.profile
        if profile is not None and not profile.min <= batch <= profile.max:
            yield model.finding(
                f"{where}.dims", f"a batch of {batch}", f"one that the profile {profile} accepts", "Correct it."
            )


def _warm_up_data(model: ModelFolder, where: str, sample: Any) -> Iterator[RepositoryFinding]:
    source = sample.WhichOneof("input_data_type")
    if source is None:
        yield model.finding(where, "no data", "zero_data, random_data or input_data_file", "Add one of them.")
    if source != "input_data_file":
        return
    name = sample.input_data_file
    file = model.path / FOLDER / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        yield model.finding(f"{where}.input_data_file", f'"{name}"', f"a file below {FOLDER}/", "Put it there.")
    elif not file.is_file():
        yield model.finding(
            f"{where}.input_data_file", f"no {FOLDER}/{name}", "the file", "Add it.", file=f"{FOLDER}/{name}"
        )
    elif (wanted := _bytes_of_sample(sample)) is not None and file.stat().st_size != wanted:
        yield model.finding(
            f"{where}.input_data_file",
            f"{file.stat().st_size} bytes",
            f"{wanted} bytes: one sample of {data_type_name(sample.data_type)} {shown(sample.dims)}",
            "Write the file again, with one sample.",
            file=f"{FOLDER}/{name}",
        )


def _bytes_of_sample(sample: Any) -> int | None:
    if any(size < 1 for size in sample.dims):
        return None
    return byte_size(data_type_name(sample.data_type), sample.dims)
