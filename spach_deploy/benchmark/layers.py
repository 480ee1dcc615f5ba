"""Multiplications and bytes of each convolution and linear layer of a graph, and the least time that they take."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto


@dataclasses.dataclass(frozen=True)
class Layer:
    """A node that multiplies. `bytes`: what it reads and writes once, weights included. Both at one batch."""

    module: str
    op: str
    macs: int
    bytes: int

    def least_seconds(self, flops: float, bandwidth: float) -> float:
        """At these peaks (FLOP/s, bytes/s): the longer of computing and moving."""
        return max(2 * self.macs / flops, self.bytes / bandwidth)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    itemsize: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


def layers(graph: Path, batch: int) -> tuple[Layer, ...]:
    """Convolutions and matrix products of an ONNX file at this batch, in order.

    Depthwise convolutions that were spelt out as sums of products are not among them.
    """
    import onnx

    model = onnx.load(graph)
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = batch
    for value in (*model.graph.output, *model.graph.value_info):
        value.Clear()
    inferred = onnx.shape_inference.infer_shapes(_without_stale_shapes(model), data_prop=True)
    tensors = dict(_tensors(inferred))
    return tuple(_layers(inferred.graph.node, tensors))


def _without_stale_shapes(model: ModelProto) -> ModelProto:
    """Shapes that were inferred for a free batch would be kept."""
    outputs = [node_output for node in model.graph.node for node_output in node.output]
    wanted = [name for name in ("logits",) if name in outputs]
    del model.graph.value_info[:]
    del model.graph.output[:]
    for name in wanted:
        model.graph.output.add().name = name
    return model


def _tensors(model: ModelProto) -> Iterator[tuple[str, _Tensor]]:
    import onnx

    for weight in model.graph.initializer:
        yield weight.name, _Tensor(tuple(weight.dims), _itemsize(weight.data_type))
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        of = value.type.tensor_type
        if all(dim.HasField("dim_value") for dim in of.shape.dim) and of.elem_type != onnx.TensorProto.UNDEFINED:
            yield value.name, _Tensor(tuple(dim.dim_value for dim in of.shape.dim), _itemsize(of.elem_type))


def _itemsize(element_type: int) -> int:
    import onnx

    return int(onnx.helper.tensor_dtype_to_np_dtype(element_type).itemsize)


def _layers(nodes: Iterable[NodeProto], tensors: Mapping[str, _Tensor]) -> Iterator[Layer]:
    for node in nodes:
        if node.op_type not in ("Conv", "MatMul", "Gemm"):
            continue
        known = [tensors[name] for name in (*node.input, *node.output) if name in tensors]
        output, weight, left = tensors.get(node.output[0]), tensors.get(node.input[1]), tensors.get(node.input[0])
        if output is None or weight is None or left is None:
            continue
        inner = math.prod(weight.shape[1:]) if node.op_type == "Conv" else _contracted(node, left)
        macs = math.prod(output.shape) * inner
        yield Layer(node.name.partition("/")[0], node.op_type, macs, sum(tensor.bytes for tensor in known))


def _contracted(node: NodeProto, left: _Tensor) -> int:
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return left.shape[0] if transposed else left.shape[-1]
