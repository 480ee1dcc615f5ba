"""Multiplications and bytes of each convolution and linear layer of a graph, and the least time that they take.

Times of a runtime's own layers, told by the PyTorch modules that they compute.

Nodes of a bundle's graph are called after their modules, `layer3.5.spatial_func.qkv/Gemm`, and runtimes call what they
make of them after the nodes: `InsertedPrecisionFreeCast_stem.proj/Conv_nchwc`, `layer1.0.norm2/Mul+layer1.0.fc1/Gemm`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spach_deploy.graph.names import owner

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto


_SPELT_OUT = re.compile(r"(.+/Conv[^/]*)/(?:pad|slice_\d\d|product_\d\d|sum_\d\d|bias)")
"""Nodes of a convolution that `onnx_graph.passes.shift_depthwise` took apart."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """What multiplies. `bytes`: what it reads and writes once, weights included, as they are stored. At one batch."""

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
class _StoredTensor:
    shape: tuple[int, ...]
    itemsize: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


def layers(graph: Path, batch: int) -> tuple[Layer, ...]:
    """Convolutions and matrix products of an ONNX file at this batch, in order.

    A depthwise convolution that was spelt out as a sum of products for TensorRT counts as the one that it was. What is
    dequantized on its way in counts with its eight bits.
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


def _tensors(model: ModelProto) -> Iterator[tuple[str, _StoredTensor]]:
    import onnx

    for weight in model.graph.initializer:
        yield weight.name, _StoredTensor(tuple(weight.dims), _itemsize(weight.data_type))
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        of = value.type.tensor_type
        if all(dim.HasField("dim_value") for dim in of.shape.dim) and of.elem_type != onnx.TensorProto.UNDEFINED:
            yield value.name, _StoredTensor(tuple(dim.dim_value for dim in of.shape.dim), _itemsize(of.elem_type))


def _itemsize(element_type: int) -> int:
    import onnx

    return int(onnx.helper.tensor_dtype_to_np_dtype(element_type).itemsize)


def _layers(nodes: Sequence[NodeProto], tensors: Mapping[str, _StoredTensor]) -> Iterator[Layer]:
    stored = {node.output[0]: node.input[0] for node in nodes if node.op_type == "DequantizeLinear"}
    spelt_out: dict[str, list[NodeProto]] = {}
    for node in nodes:
        if match := _SPELT_OUT.fullmatch(node.name):
            spelt_out.setdefault(match[1], []).append(node)
    for node in nodes:
        if node.op_type in ("Conv", "MatMul", "Gemm"):
            found = _product(node, tensors, stored)
        elif node.op_type == "Pad" and (parts := spelt_out.get(node.name.removesuffix("/pad"))):
            found = _depthwise(node.name.removesuffix("/pad"), parts, tensors)
        else:
            continue
        if found is not None:
            yield found


def _product(node: NodeProto, tensors: Mapping[str, _StoredTensor], stored: Mapping[str, str]) -> Layer | None:
    output, weight, left = (tensors.get(name) for name in (node.output[0], node.input[1], node.input[0]))
    if output is None or weight is None or left is None:
        return None
    names = (*(stored.get(name, name) for name in node.input), *node.output)
    inner = math.prod(weight.shape[1:]) if node.op_type == "Conv" else _contracted(node, left)
    moved = sum(tensors[name].bytes for name in names if name in tensors)
    return Layer(owner(node.name), node.op_type, math.prod(output.shape) * inner, moved)


def _depthwise(name: str, parts: Sequence[NodeProto], tensors: Mapping[str, _StoredTensor]) -> Layer | None:
    """Nine shifted products: as in a convolution, what lies between its input and its output is not moved."""
    products = [node for node in parts if node.op_type == "Mul"]
    ends = [tensors.get(tensor) for tensor in (parts[0].input[0], parts[-1].output[0])]
    taps = [tensors.get(node.input[1]) for node in products]
    macs = sum(math.prod(tensors[node.output[0]].shape) for node in products if node.output[0] in tensors)
    if not products or None in ends or None in taps:
        return None
    return Layer(owner(name), "Conv", macs, sum(tensor.bytes for tensor in (*ends, *taps) if tensor))


def _contracted(node: NodeProto, left: _StoredTensor) -> int:
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return left.shape[0] if transposed else left.shape[-1]


def totals(found: Iterable[Layer]) -> dict[str, Layer]:
    """One entry a module: the sums of its layers."""
    sums: dict[str, Layer] = {}
    for layer in found:
        before = sums.get(layer.module, Layer(layer.module, layer.op, 0, 0))
        sums[layer.module] = dataclasses.replace(
            before, macs=before.macs + layer.macs, bytes=before.bytes + layer.bytes
        )
    return sums


ADDED = "(added by the runtime)"
_BEFORE_SLASH = re.compile(r"([\w.]+)/")


def owners_of(graph: Path) -> frozenset[str]:
    """Modules that an ONNX file's nodes are called after."""
    import onnx

    names = (node.name for node in onnx.load(graph, load_external_data=False).graph.node)
    return frozenset(owner(name) for name in names if "/" in name)


def module_of(layer: str, owners: Iterable[str]) -> str | None:
    """The module that a layer computes: of several, the one that they all are in. None where the name tells nothing."""
    told = {found for words in _BEFORE_SLASH.findall(layer) if (found := _longest(words, owners))}
    if not told:
        return None
    if len(told) == 1:
        return told.pop()
    paths = [name.split(".") for name in sorted(told)]
    shared = next((i for i, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), len(min(paths)))
    return ".".join(paths[0][:shared]) or "model"


def _longest(words: str, owners: Iterable[str]) -> str:
    """The owner that `words` end with; something may be put before a name, such as `fused_`."""
    fitting = (name for name in owners if words == name or re.search(rf"(?<![.a-z0-9]){re.escape(name)}$", words))
    return max(fitting, key=len, default="")


def by_module(layers: Mapping[str, float], owners: frozenset[str]) -> dict[str, float]:
    """Sums of seconds by module, the longest first; what no module is behind is one entry, `ADDED`."""
    sums: dict[str, float] = {}
    for layer, seconds in layers.items():
        module = module_of(layer, owners) or ADDED
        sums[module] = sums.get(module, 0.0) + seconds
    return dict(sorted(sums.items(), key=lambda entry: -entry[1]))
