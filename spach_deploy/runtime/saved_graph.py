"""Graphs handed to ONNX Runtime through files: from bytes in memory it would make two more copies of all weights."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from spach_deploy.files import naming_tmpdir
from spach_deploy.runtime.pages import small_pages

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

_WEIGHTS = "weights"
_LARGE = 1024
"""Elements of a tensor that is not stored in the graph itself."""

_ALIGNMENT = 4096
"""Of weights in their file: that of pages, as they are mapped."""


@contextlib.contextmanager
def saved_graph(*messages: ModelProto) -> Iterator[Path]:
    """A temporary file that holds `messages` behind each other, which protobuf reads as one merged message.

    Weights lie beside it, as they are in memory, and are read from there when they are needed. A session that was
    opened from it does not need the files any more.
    """
    with contextlib.ExitStack() as stack:
        with naming_tmpdir():
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="spach-"))) / "graph.onnx"
            _save(messages, path)
        yield path


def _save(messages: tuple[ModelProto, ...], path: Path) -> None:
    with path.open("wb") as light, (path.parent / _WEIGHTS).open("wb") as weights, small_pages():
        for message in messages:
            for part in _parts(message, weights):
                light.write(part.SerializeToString())


def save_model(model: ModelProto, path: Path) -> None:
    """`onnx.save` without a second copy of all weights in memory."""
    with path.open("wb") as file:
        write_graph(model, file)


def write_graph(model: ModelProto, file: IO[bytes]) -> None:
    """Write the message in parts, weights one by one."""
    with small_pages():
        for part in _parts(model):
            file.write(part.SerializeToString())


def _parts(model: ModelProto, weights: IO[bytes] | None = None) -> Iterator[ModelProto]:
    """Messages that merge into `model`: everything but the weights, then each weight; the data of large ones goes into
    the file `weights`, if there is one.
    """
    from onnx import GraphProto, ModelProto

    light = GraphProto(
        name=model.graph.name,
        node=model.graph.node,
        input=model.graph.input,
        output=model.graph.output,
        value_info=model.graph.value_info,
    )
    yield ModelProto(
        ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions, graph=light
    )
    for tensor in model.graph.initializer:
        yield ModelProto(graph=GraphProto(initializer=[tensor if weights is None else _outside(tensor, weights)]))


def _outside(tensor: TensorProto, weights: IO[bytes]) -> TensorProto:
    """`tensor` with its data written to `weights`; as it is where there is little."""
    from onnx import TensorProto

    if math.prod(tensor.dims) < _LARGE or not tensor.HasField("raw_data"):
        return tensor
    weights.write(b"\0" * (-weights.tell() % _ALIGNMENT))
    start = weights.tell()
    where = TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
    where.data_location = TensorProto.EXTERNAL
    length = weights.write(tensor.raw_data)
    for key, value in (("location", _WEIGHTS), ("offset", start), ("length", length)):
        where.external_data.add(key=key, value=str(value))
    return where
