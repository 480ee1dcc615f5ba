"""External data of an ONNX file: which other files hold its weights, and whether they exist in its folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, TensorProto

from spach_deploy.common.errors import UsageError, printable


def external_files(model: ModelProto) -> tuple[str, ...]:
    """Paths of the files that hold external data of `model`, relative to the ONNX file, as its tensors name them."""
    entries = (entry for tensor in _tensors(model.graph) for entry in tensor.external_data)
    return tuple(dict.fromkeys(entry.value for entry in entries if entry.key == "location"))


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """All tensors of a graph, and of the subgraphs in its nodes' attributes."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for inner in (attribute.g, *attribute.graphs):
            if inner.ByteSize():
                yield from _tensors(inner)


def missing_data(model: ModelProto, folder: Path) -> str:
    """The first file with external data that does not exist in `folder`, the ONNX file's; empty where all exist."""
    return next((name for name in external_files(model) if not (folder / name).is_file()), "")


def data_outside(model: ModelProto, folder: Path) -> str:
    """The first file with external data whose path leads out of `folder`, the ONNX file's; empty where none does.

    No runtime reads such a file.
    """
    return next((name for name in external_files(model) if _is_outside(name, folder)), "")


def _is_outside(name: str, folder: Path) -> bool:
    return "\0" in name or not (folder / name).resolve().is_relative_to(folder.resolve())


def lacking_data(file: Path) -> str:
    """Why external data of an ONNX file cannot be read, as a clause; empty where all can be, and for other files."""
    try:
        model = onnx.load(file, load_external_data=False)
    except Exception:  # protobuf's own
        return ""
    if outside := printable(data_outside(model, file.parent)):
        return f"its weights are in {outside}, which leads outside of its directory"
    missing = printable(missing_data(model, file.parent))
    return f"its weights are in {missing}, which is not beside it" if missing else ""


def check_is_one_file(file: Path) -> None:
    """UsageError for an ONNX file with external data, which a copy of the file would not find.

    A file that is no ONNX graph passes.
    """
    try:
        model = onnx.load(file, load_external_data=False)
    except Exception:  # of protobuf: no ONNX graph, which its reader refuses
        return
    if outside := printable(data_outside(model, file.parent)):
        what, fix = f"{outside}, which leads outside of its directory", "Give a graph with its weights."
    elif missing := printable(missing_data(model, file.parent)):
        fix = f"Put {missing} into {file.absolute().parent}, or give a graph with its weights."
        what = f"{missing}, which is not beside it"
    elif names := external_files(model):
        what, fix = f"{printable(names[0])}, which a copy of it would not find", "Give a graph with its weights."
    else:
        return
    raise UsageError(f"{file} keeps its weights in {what}.", fix)
