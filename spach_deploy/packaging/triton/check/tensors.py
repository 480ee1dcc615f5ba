"""Rules that hold inputs and outputs of the configuration against those of the graph or engine."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

from spach_deploy.bundle.store import TensorInfo
from spach_deploy.packaging.triton.check.findings import RepositoryFinding
from spach_deploy.packaging.triton.check.model_folder import Facts, ModelFolder, Repository
from spach_deploy.packaging.triton.schema import data_type_name
from spach_deploy.packaging.triton.tensors import DATA_TYPES, shown


def check_tensors(model: ModelFolder, repository: Repository) -> Iterator[RepositoryFinding]:
    """Names, types and dims, for every version whose tensors are known."""
    for facts in model.facts.values():
        yield from _names(model, facts)
        for where, tensor in model.tensors():
            known = (facts.inputs if where.startswith("input") else facts.outputs).get(tensor.name)
            if known is not None:
                yield from _type(model, where, tensor, known, facts)
                yield from _dims(model, where, tensor, known, facts)


def _names(model: ModelFolder, facts: Facts) -> Iterator[RepositoryFinding]:
    """Every input must be there; of the outputs those that clients may ask for."""
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
    """Where the model leaves an extent free, the configuration may fix it; not the other way round."""
    return len(dims) == len(wanted) and all(want in (-1, have) for have, want in zip(dims, wanted, strict=True))
