"""Trace one block of each kind (the prototype), then repeat its nodes with the other blocks' weights. It saves time.

torch.onnx's time grows with the number of blocks, and the blocks of one network stage differ only in their weights.
The nodes of a block read one tensor from outside and make one tensor that nodes outside read. A copy has the same
nodes, named by the other block's path, and that block's tensors.

- Of a SPACH, whose forward is ours, `make_prototype` makes a smaller model, and `stamp_blocks` the whole model's graph
  of its graph. The nodes of a block are those whose names begin with its module path.
- Of a model with a forward of its own, which may look for every block where it expects it, `with_stand_ins` makes a
  copy in which one operator stands for each block like an earlier one, and `replace_stand_ins` puts that one's nodes in
  its place. Two more operators mark where an earlier one begins and ends.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from spach_deploy.blocks.backbone import StaticSpach
from spach_deploy.blocks.base import own
from spach_deploy.blocks.mixing_block import StaticBlock
from spach_deploy.blocks.shift import StaticShiftBlock
from spach_deploy.blocks.token_mlp import StaticAxisMixing, StaticChannelMixing
from spach_deploy.common.errors import CertificateError
from spach_deploy.graph.editing import array_of, constant, name_of, new_node, operand

_DOMAIN = "spach_deploy"
_BEGIN, _END, _LIKE = "Begin", "End", "Like"
_PATH, _FIRST = "path", "first"
"""Operators of ours that a graph has until `replace_stand_ins`, and their attributes."""


@dataclasses.dataclass(frozen=True)
class Prototype:
    """A model with one block of each kind. `repeats`: by that block's path, the paths of all blocks like it, its own
    first.
    """

    model: nn.Module
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
    stamped = _StampedGraph(source, source.inputs[:1], repeats, Parameters(weights))
    blocks = _nodes_by_block(source, repeats)
    for node in source:
        block = block_of(name_of(node), repeats)
        if block is None:
            stamped.copy(node)
        elif node is blocks[block][0]:
            _stamp_run(stamped, source, blocks[block], block, repeats[block])
    return _with_graph(model, stamped.finished())


def _with_graph(model: ir.Model, graph: ir.Graph) -> ir.Model:
    """`model` with another graph."""
    return ir.Model(
        graph,
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
        if maker is not None and (maker.domain == _DOMAIN or block_of(name_of(maker), blocks) is not None):
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

    def __init__(
        self,
        source: ir.Graph,
        inputs: Sequence[ir.Value],
        repeats: Mapping[str, tuple[str, ...]],
        parameters: Parameters,
    ) -> None:
        self._source = source
        self._blocks = {copy for copies in repeats.values() for copy in copies}
        self._parameters = parameters
        self._constants: dict[str, ir.Value] = {}
        self._nodes: list[ir.Node] = []
        self._inputs = [ir.Value(name=given.name, type=given.type, shape=given.shape) for given in inputs]
        self.values: dict[ir.Value, ir.Value] = dict(zip(inputs, self._inputs, strict=True))
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
            opset_imports={name: opset for name, opset in self._source.opset_imports.items() if name != _DOMAIN},
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
    heads = itertools.accumulate(name.split("/", 1)[0].split("."), lambda path, step: f"{path}.{step}")
    return next((head for head in heads if head in blocks), None)


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
    other block's parameter could take its place. Zeros and ones are nobody's: of ordinary weights nothing makes them.
    """
    read = {value for node in nodes for value in node.inputs if value is not None and not _is_made(source, value)}
    floats = {name_of(value) for value in read if value.dtype == ir.DataType.FLOAT and value.shape}
    foreign = sorted(name for name in floats if not name.startswith(f"{block}.") and not _is_plain(source, name))
    if foreign:
        raise CertificateError(f"Block {block} reads {foreign}, which are not parameters of its own.")


def _is_plain(source: ir.Graph, name: str) -> bool:
    """Whether an initializer holds zeros and ones alone."""
    array = array_of(source.initializers.get(name))
    return array is not None and bool(np.isin(array, (0, 1)).all())


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


# Models with a forward of their own

_ALIKE = (StaticAxisMixing, StaticChannelMixing, StaticShiftBlock)
"""Static forms that take one image and give one of the same shape, and compute what their parts say."""


def with_stand_ins(model: nn.Module) -> Prototype:
    """A copy of `model`, whose tensors it shares, with a stand-in for every block that differs from an earlier one in
    its weights alone. Only torch.onnx can run it.
    """
    found: dict[object, list[str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, _ALIKE):
            shapes = [(name, tensor.shape) for name, tensor in module.state_dict().items()]
            found.setdefault((repr(module), module.paths, *shapes), []).append(path)
    repeats = {paths[0]: tuple(paths) for paths in found.values() if len(paths) > 1}
    copied = own(model)
    for first, *others in repeats.values():
        block = copied.get_submodule(first)
        block.register_forward_pre_hook(_begin(first))
        block.register_forward_hook(_end(first))
        for path in others:
            owner, _, name = path.rpartition(".")
            copied.get_submodule(owner)._modules[name] = _StandIn(path, first)
    return Prototype(copied, repeats)


class _StandIn(nn.Module):
    """Stands for the block at `path`, which is like the one at `first`: one operator, (B, ...) -> (B, ...)."""

    def __init__(self, path: str, first: str) -> None:
        super().__init__()
        self.attributes = {_PATH: path, _FIRST: first}

    def forward(self, x: Tensor) -> Tensor:
        """Gives what only torch.onnx understands."""
        return _operator(_LIKE, x, self.attributes)


def _operator(kind: str, x: Tensor, attributes: Mapping[str, str]) -> Tensor:
    """An ONNX operator of ours, of the shape of `x`."""
    name = f"{_DOMAIN}::{kind}"
    return torch.onnx.ops.symbolic(name, (x,), dict(attributes), dtype=x.dtype, shape=x.shape, version=1)


def _begin(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], Tensor]:
    return lambda _, given: _operator(_BEGIN, given[0], {_PATH: path})


def _end(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    return lambda _, __, made: _operator(_END, made, {_PATH: path})


def replace_stand_ins(model: ir.Model, prototype: Prototype, weights: nn.Module) -> ir.Model:
    """The whole model's graph from that of `prototype`, `model`: instead of each stand-in the nodes of the block that
    it is like, named by its own path. Parameters are those of `weights`, whose memory they share.

    Raises CertificateError for a block that runs twice, on images of another size, or as `stamp_blocks` does.
    """
    part_outputs(model, ())
    source = model.graph
    marks = {kind: {_text(node, _PATH): node for node in _marks(source, kind)} for kind in (_BEGIN, _END, _LIKE)}
    if sum(map(len, marks.values())) != len(list(_marks(source))):
        raise CertificateError("A block runs twice.")
    insides = {}
    for path, begin in marks[_BEGIN].items():
        _unfold(source, begin, marks[_END][path], prototype.model.get_submodule(path), path)
        insides[path] = _inside(source, begin, marks[_END][path], path)
    stamped = _StampedGraph(source, source.inputs, prototype.repeats, Parameters(weights))
    for node in source:
        if node.domain != _DOMAIN:
            stamped.copy(node)
        elif node.op_type == _LIKE:
            first = _text(node, _FIRST)
            begin, end = marks[_BEGIN][first], marks[_END][first]
            if operand(node, 0).shape != operand(begin, 0).shape:
                raise CertificateError(f"{_text(node, _PATH)} and {first} run on images of different sizes.")
            stamped.values[begin.outputs[0]] = stamped.values[operand(node, 0)]
            for inner in insides[first]:
                stamped.copy(inner, first, _text(node, _PATH))
            stamped.values[node.outputs[0]] = stamped.values[operand(end, 0)]
        else:
            stamped.values[node.outputs[0]] = stamped.values[operand(node, 0)]
    return _with_graph(model, stamped.finished())


def _marks(graph: ir.Graph, kind: str = "") -> Iterator[ir.Node]:
    return (node for node in graph if node.domain == _DOMAIN and node.op_type.startswith(kind))


def _text(node: ir.Node, attribute: str) -> str:
    return node.attributes.get_string(attribute, "")


def _between(source: ir.Graph, begin: ir.Node, end: ir.Node) -> list[ir.Node]:
    """The nodes between two marks, in order."""
    found, todo = set[ir.Node](), [operand(end, 0).producer()]
    while todo:
        node = todo.pop()
        if node is not None and node is not begin and node not in found:
            found.add(node)
            todo.extend(value.producer() for value in node.inputs if value is not None)
    return [node for node in source if node in found]


def _unfold(source: ir.Graph, begin: ir.Node, end: ir.Node, block: nn.Module, path: str) -> None:
    """Where the exporter has folded a Reshape of a parameter of `block`, put it back, in place: its result is a
    constant, of which no other block's could be told.
    """
    flat = {name: tensor.detach().numpy().reshape(-1) for name, tensor in block.state_dict().items()}
    for node in _between(source, begin, end):
        for index, value in enumerate(node.inputs):
            array = array_of(value)
            if value is None or array is None or array.dtype != np.float32 or name_of(value).startswith(f"{path}."):
                continue
            folded = (name for name, parameter in flat.items() if np.array_equal(parameter, array.reshape(-1)))
            if name := next(folded, ""):
                parameter = constant(source, f"{path}.{name}", flat[name])
                shape = constant(source, f"shape.{'x'.join(map(str, array.shape))}", array.shape)
                where = f"{path}.{name.rpartition('.')[0]}/{name.rpartition('.')[2]}"
                reshape = new_node("Reshape", [parameter, shape], where)
                node.prepend(reshape)
                node.replace_input_with(index, reshape.outputs[0])


def _inside(source: ir.Graph, begin: ir.Node, end: ir.Node, path: str) -> list[ir.Node]:
    """The nodes between two marks, in order. Those that the exporter has named after what is around the block get
    names of the block's.
    """
    nodes = _between(source, begin, end)
    _check_constants(source, nodes, path)
    if _incoming(source, nodes, path) is not begin.outputs[0] or _outgoing(nodes, path) is not operand(end, 0):
        raise CertificateError(f"Block {path} reads or makes more than one tensor.")
    taken = {name_of(node) for node in nodes}
    for node in nodes:
        if block_of(name_of(node), (path,)) is None:
            names = (f"{path}/{node.op_type}_{number}" for number in itertools.count(1))
            node.name = next(name for name in names if name not in taken)
            taken.add(node.name)
            for index, output in enumerate(node.outputs):
                output.name = node.name if len(node.outputs) == 1 else f"{node.name}.{index}"
    return nodes
