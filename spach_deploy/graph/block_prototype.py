"""Trace one block of each kind (the prototype), then repeat its nodes with the other blocks' weights. It saves time.

torch.onnx's time grows with the number of blocks, and the blocks of one network stage differ only in their weights.
`make_prototype` makes the small model that is traced, and `stamp_blocks` makes the whole model's graph of its graph.

The nodes of a block are those whose names begin with its module path. They read one tensor from outside, the residual
stream, and make one tensor that nodes outside read. A copy has the same nodes, named by the other block's path, and
that block's tensors.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from spach_deploy.blocks.backbone import StaticSpach
from spach_deploy.blocks.base import own
from spach_deploy.blocks.mixing_block import StaticBlock
from spach_deploy.common.errors import CertificateError
from spach_deploy.graph.editing import name_of


@dataclasses.dataclass(frozen=True)
class Prototype:
    """A model with one block of each kind. `repeats`: by that block's path, the paths of all blocks like it, its own
    first.
    """

    model: StaticSpach
    repeats: dict[str, tuple[str, ...]]


def make_prototype(model: nn.Module) -> Prototype:
    """The prototype of `model`, whose tensors it shares: the first of every run of blocks that differ only
    in weights.
    """
    assert isinstance(model, StaticSpach)
    result = StaticSpach(model.stem, model.norm1, model.norm2, model.head)
    result.stage_shapes, result.outputs = model.stage_shapes, model.outputs
    repeats: dict[str, tuple[str, ...]] = {}
    for stage in model.stage_names:
        runs = _runs(getattr(model, stage))
        layers = getattr(model, stage)._modules
        result.add_stage(stage, nn.Sequential(OrderedDict((indices[0], layers[indices[0]]) for indices in runs)))
        for first, *others in runs:
            if isinstance(layers[first], StaticBlock):
                repeats[f"{stage}.{first}"] = tuple(f"{stage}.{index}" for index in (first, *others))
    return Prototype(result.eval(), repeats)


def with_ordinary_weights(prototype: Prototype) -> Prototype:
    """A copy of the prototype with random weights between 0.5 and 1.5 in its blocks.

    Exporter and simplifier remove additions of zeros, products by ones and equal tensors. What is true of one block's
    real weights may be false of the others', so those optimizations must not happen.
    """
    generator = torch.Generator().manual_seed(0)
    model = own(prototype.model)
    for path in prototype.repeats:
        for module in model.get_submodule(path).modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    value = torch.rand(parameter.shape, generator=generator) + 0.5
                    module._parameters[name] = nn.Parameter(value, requires_grad=False)
    return dataclasses.replace(prototype, model=model)


def block_kind(layer: nn.Module) -> str:
    """A key of everything but the weights on which a static block's graph depends; "" for a layer that is no block."""
    if not isinstance(layer, StaticBlock):
        return ""
    mixer = "conv" if layer.spatial_func is None else type(layer.spatial_func).__name__
    scale = getattr(layer.spatial_func, "scale", 1.0)
    parts = (mixer, layer.gamma_1 is None, scale, layer.cpe_net is None, layer.includes_residual, layer.grid_stream)
    return "/".join(str(part) for part in parts)


def _runs(stage: nn.Sequential) -> list[list[str]]:
    """Names of the layers of a network stage, grouped: consecutive blocks of one kind together, any other
    layer alone.
    """
    runs: list[list[str]] = []
    previous = ""
    for index, layer in stage._modules.items():
        assert layer is not None
        kind = block_kind(layer)
        if kind and kind == previous:
            runs[-1].append(index)
        else:
            runs.append([index])
        previous = kind
    return runs


def stamp_blocks(model: ir.Model, repeats: Mapping[str, tuple[str, ...]], weights: nn.Module) -> ir.Model:
    """The whole model's graph from the prototype's graph `model`: every block of `repeats`, nodes in execution order.

    Parameters are those of `weights`, whose memory they share. Raises CertificateError for a block that reads or makes
    more than the stream, or that holds constants which are not its own parameters.
    """
    source = model.graph
    stamped = _StampedGraph(source, repeats, Parameters(weights))
    blocks = _nodes_by_block(source, repeats)
    for node in source:
        block = block_of(name_of(node), repeats)
        if block is None:
            stamped.copy(node)
        elif node is blocks[block][0]:
            _stamp_run(stamped, source, blocks[block], block, repeats[block])
    return ir.Model(
        stamped.finished(),
        ir_version=model.ir_version,
        producer_name=model.producer_name,
        producer_version=model.producer_version,
        functions=tuple(model.functions.values()),
    )


def part_outputs(model: ir.Model, blocks: Collection[str]) -> None:
    """Put an Identity, in place, before every graph output that a block makes: copies of a block need other names."""
    graph = model.graph
    for index, output in enumerate(graph.outputs):
        maker = output.producer()
        if maker is None or block_of(name_of(maker), blocks) is None:
            continue
        name = name_of(output)
        copied = ir.val(name, output.dtype, output.shape)
        output.name = name_of(maker)
        node = ir.Node("", "Identity", [output], outputs=[copied], name=f"model/Identity_{name}")
        graph.append(node)
        graph.outputs[index] = copied


class Parameters:
    """The model's tensors by name; a tensor that several names share is stored once, under the first."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors = model.state_dict()
        first: dict[int, str] = {}
        self._canonical: dict[str, str] = {}
        for name, tensor in self._tensors.items():
            self._canonical[name] = first.setdefault(tensor.data_ptr() if tensor.numel() else id(tensor), name)

    def canonical(self, name: str) -> str:
        """The name under which `name` is stored; names that are no parameters stay."""
        return self._canonical.get(name, name)

    def get(self, name: str) -> ir.TensorProtocol | None:
        """A parameter, in PyTorch's memory; None for a name that is none."""
        if name not in self._tensors:
            return None
        return ir.Tensor(np.ascontiguousarray(self._tensors[name].detach().numpy()), name=name)


class _StampedGraph:
    """The graph being made: copies of `source`'s nodes, and the constants that these read, in the order of
    first use.
    """

    def __init__(self, source: ir.Graph, repeats: Mapping[str, tuple[str, ...]], parameters: Parameters) -> None:
        self._source = source
        self._blocks = {copy for copies in repeats.values() for copy in copies}
        self._parameters = parameters
        self._constants: dict[str, ir.Value] = {}
        self._nodes: list[ir.Node] = []
        (given,) = source.inputs[:1]
        self._inputs = [ir.Value(name=given.name, type=given.type, shape=given.shape)]
        self.values: dict[ir.Value, ir.Value] = {given: self._inputs[0]}
        """By a value of `source`: the value that the next copied node reads in its place."""

    def copy(self, node: ir.Node, block: str = "", copy: str = "") -> None:
        """Append a copy of a node of `source`. A node of `block` gets the path and the parameters of the
        block `copy`.
        """
        inputs = [None if value is None else self._read(value, block, copy) for value in node.inputs]
        outputs = [ir.val(_moved(name_of(value), block, copy)) for value in node.outputs]
        name, attributes = _moved(name_of(node), block, copy), tuple(node.attributes.values())
        props = dict(node.metadata_props)
        self._nodes.append(
            ir.Node(node.domain, node.op_type, inputs, attributes, outputs=outputs, name=name, metadata_props=props)
        )
        self.values.update(zip(node.outputs, outputs, strict=True))

    def _read(self, value: ir.Value, block: str, copy: str) -> ir.Value:
        if value in self.values:
            return self.values[value]
        name = self._parameters.canonical(_moved(name_of(value), block, copy))
        if name not in self._constants:
            self._constants[name] = ir.val(name, const_value=self._tensor(name))
        return self._constants[name]

    def _tensor(self, name: str) -> ir.TensorProtocol:
        """The model's parameter for a name inside a block; elsewhere the tensor of `source`, which the simplifier may
        have changed.
        """
        kept, parameter = self._source.initializers.get(name), self._parameters.get(name)
        if parameter is not None and (kept is None or block_of(name, self._blocks) is not None):
            return parameter
        if kept is None or kept.const_value is None:
            raise CertificateError(f"No tensor is known for {name}, which the simplifier made of a block's weights.")
        return kept.const_value

    def finished(self) -> ir.Graph:
        """The finished graph; its outputs have the types and shapes of those of `source`."""
        outputs = [self.values[value] for value in self._source.outputs]
        for value, old in zip(outputs, self._source.outputs, strict=True):
            value.type, value.shape = old.type, old.shape
        return ir.Graph(
            self._inputs,
            outputs,
            nodes=self._nodes,
            initializers=list(self._constants.values()),
            opset_imports=dict(self._source.opset_imports),
            name=self._source.name,
        )


def _nodes_by_block(graph: ir.Graph, repeats: Mapping[str, tuple[str, ...]]) -> dict[str, list[ir.Node]]:
    blocks: dict[str, list[ir.Node]] = {block: [] for block in repeats}
    for node in graph:
        block = block_of(name_of(node), repeats)
        if block is not None:
            blocks[block].append(node)
    return blocks


def block_of(name: str, blocks: Collection[str]) -> str | None:
    """The one of `blocks` to which the node or tensor called `name` belongs."""
    path = name.split("/", 1)[0]
    head = ".".join(path.split(".")[:2])
    return head if head in blocks else None


def _stamp_run(
    stamped: _StampedGraph, source: ir.Graph, nodes: list[ir.Node], block: str, copies: tuple[str, ...]
) -> None:
    """Append all copies of one block; each reads the output of the copy before it."""
    _check_constants(source, nodes, block)
    incoming, outgoing = _incoming(source, nodes, block), _outgoing(nodes, block)
    stream = stamped.values[incoming]
    for copy in copies:
        for node in nodes:
            stamped.copy(node, block, copy)
        stamped.values[incoming] = stamped.values[outgoing]
    stamped.values[incoming] = stream


def _check_constants(source: ir.Graph, nodes: list[ir.Node], block: str) -> None:
    """CertificateError for a float tensor that a block reads and that is not its own parameter under its own name: no
    other block's parameter could take its place.
    """
    read = {value for node in nodes for value in node.inputs if value is not None and not _is_made(source, value)}
    floats = {name_of(value) for value in read if value.dtype == ir.DataType.FLOAT and value.shape}
    foreign = sorted(name for name in floats if not name.startswith(f"{block}."))
    if foreign:
        raise CertificateError(f"Block {block} reads {foreign}, which are not parameters of its own.")


def _is_made(source: ir.Graph, value: ir.Value) -> bool:
    """Whether a node makes `value`, or it is the graph's input; otherwise it is a weight or a constant."""
    return value.producer() is not None or value is source.inputs[0]


def _incoming(source: ir.Graph, nodes: list[ir.Node], block: str) -> ir.Value:
    inside = {value for node in nodes for value in node.outputs}
    read = {value for node in nodes for value in node.inputs if value is not None and value not in inside}
    found = {value for value in read if _is_made(source, value)}
    if len(found) != 1:
        names = sorted(name_of(value) for value in found)
        raise CertificateError(f"Block {block} reads {names}; a block reads one tensor, the stream.")
    return found.pop()


def _outgoing(nodes: list[ir.Node], block: str) -> ir.Value:
    inside = set(nodes)
    found = [value for node in nodes for value in node.outputs if not inside.issuperset(value.consumers())]
    if len(found) != 1:
        names = sorted(name_of(value) for value in found)
        raise CertificateError(f"Block {block} hands out {names}; a block makes one tensor, the stream.")
    return found[0]


def _moved(name: str, block: str, copy: str) -> str:
    """`layer3.3/Add` -> `layer3.4/Add`; shared constants keep their names."""
    return copy + name[len(block) :] if block and name.startswith((f"{block}.", f"{block}/")) else name
