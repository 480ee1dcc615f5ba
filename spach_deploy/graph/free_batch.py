"""Make the batch of a graph symbolic that was traced with a fixed one.

Tracing with a symbolic batch costs twice the time, all of it spent reasoning about one dimension. The static model has
that dimension first everywhere and names it in reshapes only, so it is traced at a fixed batch and set free here; that
the result is right at other batches is proven by running it at several.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, numpy_helper

from spach_deploy.common.errors import CertificateError
from spach_deploy.graph.edit import constant, initializers


def free_batch(model: ModelProto, traced: int, name: str) -> None:
    """In place: first input, outputs and reshapes whose first extent is `traced` or a multiple get the batch `name`
    instead.

    Raises CertificateError for a reshape that cannot be set free.
    """
    graph = model.graph
    for value in (*graph.input[:1], *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = name
    known = initializers(graph)
    for node in graph.node:
        if node.op_type == "Reshape" and node.input[1] in known:
            tensor = known[node.input[1]]
            shape = numpy_helper.to_array(tensor).tolist()
            if shape[0] > 0:
                tensor.CopyFrom(constant(tensor.name, np.array(_freed(shape, traced, node.name), np.int64)))
    del graph.value_info[:]


def _freed(shape: list[int], traced: int, node: str) -> list[int]:
    if shape[0] % traced or -1 in shape:
        raise CertificateError(f"{node} reshapes to {shape}, from which the batch cannot be told.")
    return [-1, *shape[1:]]
