"""Rules for warm-up requests. A wrong one keeps the model from loading; one above the maximum can end the server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spach_deploy.packaging.triton.check.findings import RepositoryFinding
from spach_deploy.packaging.triton.check.model_folder import ModelFolder, Repository
from spach_deploy.packaging.triton.schema import data_type_name
from spach_deploy.packaging.triton.tensors import byte_size, shown
from spach_deploy.packaging.triton.warmup import FOLDER


def check_warm_up(model: ModelFolder, repository: Repository) -> Iterator[RepositoryFinding]:
    """Batch sizes, tensors and files of every warm-up request."""
    for index, request in enumerate(model.config.model_warmup):
        where = f"model_warmup[{index}]"
        yield from _batch(model, where, request)
        yield from _names(model, where, request)
        known = {tensor.name: tensor for tensor in model.config.input}
        for name, sample in request.inputs.items():
            place = f'{where}.inputs["{name}"]'
            if name in known:
                yield from _tensor(model, place, sample, known[name])
            yield from _data(model, place, sample)


def _batch(model: ModelFolder, where: str, request: Any) -> Iterator[RepositoryFinding]:
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


def _names(model: ModelFolder, where: str, request: Any) -> Iterator[RepositoryFinding]:
    known = {tensor.name: tensor.optional for tensor in model.config.input}
    for name in request.inputs:
        if name not in known:
            yield model.finding(
                f"{where}.inputs", f'"{name}"', f"inputs of the model: {', '.join(known)}", "Rename it."
            )
    for name, is_optional in known.items():
        if name not in request.inputs and not is_optional:
            yield model.finding(f"{where}.inputs", f'no "{name}"', "every input of the model", f"Add {name}.")


def _tensor(model: ModelFolder, where: str, sample: Any, tensor: Any) -> Iterator[RepositoryFinding]:
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
        yield from _profile(model, where, dims[0])


def _profile(model: ModelFolder, where: str, batch: int) -> Iterator[RepositoryFinding]:
    for facts in model.facts.values():
        profile = facts.profile
        if profile is not None and not profile.min <= batch <= profile.max:
            yield model.finding(
                f"{where}.dims", f"a batch of {batch}", f"one that the profile {profile} accepts", "Correct it."
            )


def _data(model: ModelFolder, where: str, sample: Any) -> Iterator[RepositoryFinding]:
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
