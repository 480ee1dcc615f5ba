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
    import onnx_ir as ir


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


def layers(graph: Path, batch: int) -> tuple[Layer, ...]:
    """Convolutions and matrix products of an ONNX file at this batch, in order.

    A depthwise convolution that was spelt out as a sum of products for TensorRT counts as the one that it was. What is
    dequantized on its way in counts with its eight bits.
    """
    return tuple(_layers(_with_shapes(graph, batch)))


def _with_shapes(graph: Path, batch: int) -> ir.Graph:
    """The graph at this batch, with the shapes of all tensors."""
    import onnx
    import onnx_ir as ir

    from spach_deploy.graph.editing import without_weights

    model = ir.from_proto(onnx.load(graph))
    light = without_weights(model)
    for value in light.graph.input[: len(model.graph.inputs)]:
        value.type.tensor_type.shape.dim[0].dim_value = batch
    for value in light.graph.output:
        value.type.tensor_type.ClearField("shape")
    return ir.from_proto(onnx.shape_inference.infer_shapes(light, data_prop=True)).graph


def _layers(graph: ir.Graph) -> Iterator[Layer]:
    spelt_out: dict[str, list[ir.Node]] = {}
    for node in graph:
        if match := _SPELT_OUT.fullmatch(node.name or ""):
            spelt_out.setdefault(match[1], []).append(node)
    for node in graph:
        name = node.name or ""
        if node.op_type in ("Conv", "MatMul", "Gemm"):
            found = _product(node)
        elif node.op_type == "Pad" and (parts := spelt_out.get(name.removesuffix("/pad"))):
            found = _depthwise(name.removesuffix("/pad"), parts)
        else:
            continue
        if found is not None:
            yield found


def _shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """None where it is not known."""
    known = value is not None and value.dtype is not None and value.shape is not None and value.shape.is_static()
    return value.shape.numpy() if value is not None and value.shape is not None and known else None


def _bytes(value: ir.Value | None) -> int:
    """0 where it is not known; as they are stored, of what is dequantized."""
    made = None if value is None else value.producer()
    source = made.inputs[0] if made is not None and made.op_type == "DequantizeLinear" else value
    shape = _shape(source)
    return (
        0 if source is None or source.dtype is None or shape is None else math.prod(shape) * int(source.dtype.itemsize)
    )


def _product(node: ir.Node) -> Layer | None:
    output, weight, left = (_shape(value) for value in (node.outputs[0], node.inputs[1], node.inputs[0]))
    if output is None or weight is None or left is None:
        return None
    inner = math.prod(weight[1:]) if node.op_type == "Conv" else _contracted(node, left)
    moved = sum(map(_bytes, (*node.inputs, *node.outputs)))
    return Layer(owner(node.name or ""), node.op_type, math.prod(output) * inner, moved)


def _depthwise(name: str, parts: Sequence[ir.Node]) -> Layer | None:
    """Nine shifted products: as in a convolution, what lies between its input and its output is not moved."""
    products = [node for node in parts if node.op_type == "Mul"]
    moved = [parts[0].inputs[0], parts[-1].outputs[0], *(node.inputs[1] for node in products)]
    if not products or any(_shape(value) is None for value in moved):
        return None
    macs = sum(math.prod(_shape(node.outputs[0]) or (0,)) for node in products)
    return Layer(owner(name), "Conv", macs, sum(map(_bytes, moved)))


def _contracted(node: ir.Node, left: tuple[int, ...]) -> int:
    return left[0] if node.attributes.get_int("transA", 0) else left[-1]


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
