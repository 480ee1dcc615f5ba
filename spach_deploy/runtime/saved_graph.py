"""Graphs handed to ONNX Runtime through a file: from bytes in memory it would make two more copies of all weights."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from spach_deploy.runtime.pages import small_pages

if TYPE_CHECKING:
    from onnx import ModelProto


@contextlib.contextmanager
def saved_graph(*messages: ModelProto) -> Iterator[Path]:
    """A temporary file that holds `messages` behind each other, which protobuf reads as one merged message.

    A session that was opened from it does not need it any more.
    """
    with tempfile.NamedTemporaryFile(prefix="spach-", suffix=".onnx") as file:
        for message in messages:
            write_graph(message, file)
        file.flush()
        yield Path(file.name)


def save_model(model: ModelProto, path: Path) -> None:
    """`onnx.save` without a second copy of all weights in memory."""
    with path.open("wb") as file:
        write_graph(model, file)


def write_graph(model: ModelProto, file: IO[bytes]) -> None:
    """Write the message in parts, weights one by one."""
    with small_pages():
        for part in _parts(model):
            file.write(part.SerializeToString())


def _parts(model: ModelProto) -> Iterator[ModelProto]:
    """Messages that merge into `model`: everything but the weights, then each weight."""
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
        yield ModelProto(graph=GraphProto(initializer=[tensor]))
