"""Make the batch of a graph symbolic that was traced with a fixed one.

Tracing with a symbolic batch costs twice the time, all of it spent reasoning about one dimension. The static model has
that dimension first everywhere and names it in reshapes only, so it is traced at a fixed batch and set free here; that
the result is right at other batches is proven by running it at several.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from spach_deploy.common.errors import CertificateError
from spach_deploy.graph.editing import array_of


def free_batch(model: ir.Model, traced: int, name: str) -> None:
    """In place: first input, outputs and reshapes whose first extent is `traced` or a multiple get the batch `name`
    instead.

    Raises CertificateError for a reshape that cannot be set free.
    """
    graph = model.graph
    for value in (*graph.inputs[:1], *graph.outputs):
        assert value.shape is not None
        value.shape = ir.Shape([name, *value.shape[1:]])
    for node in graph:
        shape = node.inputs[1] if node.op_type == "Reshape" else None
        extents = array_of(shape)
        if shape is not None and extents is not None and extents[0] > 0:
            freed = np.array(_freed(extents.tolist(), traced, node.name or ""), np.int64)
            shape.const_value = ir.Tensor(freed, name=shape.name)


def _freed(shape: list[int], traced: int, node: str) -> list[int]:
    if shape[0] % traced or -1 in shape:
        raise CertificateError(f"{node} reshapes to {shape}, from which the batch cannot be told.")
    return [-1, *shape[1:]]
