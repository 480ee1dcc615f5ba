"""Work and time of a graph's layers: FLOPs and bytes of convolutions and matrix products, and measured seconds by
module.

`layers` counts from an ONNX graph what a roofline needs. `by_module` sums a runtime's own profile by PyTorch module. It
works by names: nodes of a bundle's graph are named after their modules (`layer3.5.spatial_func.qkv/Gemm`), and runtimes
name their layers after the nodes (`InsertedPrecisionFreeCast_stem.proj/Conv_nchwc`,
`layer1.0.norm2/Mul+layer1.0.fc1/Gemm`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spach_deploy.graph.editing import owner

if TYPE_CHECKING:
    import onnx_ir as ir


_SPELT_OUT = re.compile(r"(.+/Conv[^/]*)/(?:pad|slice_\d\d|product_\d\d|sum_\d\d|bias)")
"""Names of the nodes that `graph.passes.shift_depthwise` makes of one convolution."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution or matrix product at one batch size.

    `bytes`: its inputs, weights and outputs, each counted once, in their stored types.
    """

    module: str
    op: str
    macs: int
    bytes: int

    def least_seconds(self, flops: float, bandwidth: float) -> float:
        """Roofline time at these peaks (FLOP/s, bytes/s): the longer of computing and moving."""
        return max(2 * self.macs / flops, self.bytes / bandwidth)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)


def layers(graph: Path, batch: int) -> tuple[Layer, ...]:
    """Convolutions and matrix products of an ONNX file at this batch, in the order of the graph.

    A depthwise convolution that the export rewrote as a sum of products for TensorRT counts as one convolution. Tensors
    that come from DequantizeLinear count with their eight bits.
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
    """Bytes of a tensor in its stored type (before DequantizeLinear where there is one); 0 where its shape is not
    known.
    """
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
    """A depthwise convolution from its shifted products; intermediate tensors do not count as moved."""
    products = [node for node in parts if node.op_type == "Mul"]
    moved = [parts[0].inputs[0], parts[-1].outputs[0], *(node.inputs[1] for node in products)]
    if not products or any(_shape(value) is None for value in moved):
        return None
    macs = sum(math.prod(_shape(node.outputs[0]) or (0,)) for node in products)
    return Layer(owner(name), "Conv", macs, sum(map(_bytes, moved)))


def _contracted(node: ir.Node, left: tuple[int, ...]) -> int:
    return left[0] if node.attributes.get_int("transA", 0) else left[-1]


def totals(found: Iterable[Layer]) -> dict[str, Layer]:
    """Sums of layers by module."""
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
    """Names of the modules that an ONNX file's nodes are named after."""
    import onnx

    names = (node.name for node in onnx.load(graph, load_external_data=False).graph.node)
    return frozenset(owner(name) for name in names if "/" in name)


def module_of(layer: str, owners: Iterable[str]) -> str | None:
    """The module that a runtime's layer computes, read from its name.

    For a layer that fuses several modules: the innermost module that contains them all. None where the name has no
    module.
    """
    modules = {found for words in _BEFORE_SLASH.findall(layer) if (found := _longest(words, owners))}
    if not modules:
        return None
    if len(modules) == 1:
        return modules.pop()
    paths = [name.split(".") for name in sorted(modules)]
    shared = next((i for i, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), len(min(paths)))
    return ".".join(paths[0][:shared]) or "model"


def _longest(words: str, owners: Iterable[str]) -> str:
    """The longest of `owners` that `words` end with; runtimes put prefixes such as `fused_` before a name."""
    fitting = (name for name in owners if words == name or re.search(rf"(?<![.a-z0-9]){re.escape(name)}$", words))
    return max(fitting, key=len, default="")


def by_module(layers: Mapping[str, float], owners: frozenset[str]) -> dict[str, float]:
    """Seconds by module, the longest first. Layers that belong to no module are summed under `ADDED`."""
    sums: dict[str, float] = {}
    for layer, seconds in layers.items():
        module = module_of(layer, owners) or ADDED
        sums[module] = sums.get(module, 0.0) + seconds
    return dict(sorted(sums.items(), key=lambda entry: -entry[1]))
