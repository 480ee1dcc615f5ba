"""The part of a model whose graph has to be traced: one block of each kind.

The exporter's time grows with the number of blocks, and blocks of one shape differ in nothing but their weights. Which
kinds there are follows from the architecture, so the prototype can be had, and traced, before the model is rewritten.

Repeat a block's graph with other weights.

The nodes of a block are those whose names begin with its module path. They have one input from outside, the stream, and
one output that others read. A copy takes the same nodes under the other block's path, and that block's tensors.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping

import numpy as np
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper
from torch import Tensor, nn

from spach_deploy.common.errors import CertificateError
from spach_deploy.graph.edit import consumers, initializers, producers
from spach_deploy.models.spach import MixingBlock, Spach
from spach_deploy.rewrites import restructure
from spach_deploy.rewrites.base import own
from spach_deploy.rewrites.static_modules import StaticBlock, StaticSpach

_PLAIN = (bool, int, float, str, tuple, list, type(None))


@dataclasses.dataclass(frozen=True)
class Prototype:
    """A model with one block of each kind, and for each the blocks it stands for (itself first)."""

    model: StaticSpach
    repeats: dict[str, tuple[str, ...]]


def make_prototype(model: StaticSpach) -> Prototype:
    """Keep the first of every run of blocks that differ in weights alone; it shares the model's tensors."""
    result = StaticSpach(model.stem, model.norm1, model.norm2, model.head)
    repeats: dict[str, tuple[str, ...]] = {}
    for stage in model.stage_names:
        runs = _runs(getattr(model, stage), block_kind)
        layers = getattr(model, stage)._modules
        result.add_stage(stage, nn.Sequential(OrderedDict((indices[0], layers[indices[0]]) for indices in runs)))
        for first, *others in runs:
            if isinstance(layers[first], StaticBlock):
                repeats[f"{stage}.{first}"] = tuple(f"{stage}.{index}" for index in (first, *others))
    return Prototype(result.eval(), repeats)


def prototype_of(model: Spach, disabled: Collection[str] = (), quantized: Collection[str] | None = None) -> Prototype:
    """The prototype that rewriting the whole model leads to (`rewrites.rewrite`), from the first of its blocks alone.

    It stands for no others. Where patterns in `quantized` tell blocks of one kind apart, it is another one, as
    `structure` shows.
    """
    few = own(model)
    for stage in model.stage_names:
        layers = getattr(model, stage)._modules
        firsts = [indices[0] for indices in _runs(getattr(model, stage), _reference_kind)]
        setattr(few, stage, nn.Sequential(OrderedDict((index, layers[index]) for index in firsts)))
    return make_prototype(restructure(few, disabled, quantized))


def without_weights(prototype: Prototype) -> Prototype:
    """The prototype, its blocks' tensors without values: they are most of it, and its graph does not depend on them."""
    return _with_tensors(prototype, lambda tensor: tensor.to("meta"))


def with_ordinary_weights(prototype: Prototype) -> Prototype:
    """The prototype, its blocks' tensors with values of which nothing special is true.

    Real weights may be zeros, ones or equal to each other, and optimizers act on that: what is true of one block's
    weights would be stamped on all.
    """
    generator = torch.Generator().manual_seed(0)
    return _with_tensors(prototype, lambda tensor: torch.rand(tensor.shape, generator=generator) + 0.5)


def _with_tensors(prototype: Prototype, change: Callable[[Tensor], Tensor]) -> Prototype:
    model = own(prototype.model)
    for path in prototype.repeats:
        for module in model.get_submodule(path).modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(change(parameter.detach()), requires_grad=False)
    return dataclasses.replace(prototype, model=model)


def structure(prototype: Prototype) -> str:
    """What the prototype's graph depends on: modules, their settings, names and shapes of their tensors."""
    return "\n".join(
        f"{path} {type(module).__qualname__} {_settings(module)} {_shapes(module)}"
        for path, module in prototype.model.named_modules(remove_duplicate=False)
    )


def block_kind(layer: nn.Module) -> str:
    """What a static block's graph depends on beside its weights; "" for a layer that is no block."""
    if not isinstance(layer, StaticBlock):
        return ""
    mixer = "conv" if layer.spatial_func is None else type(layer.spatial_func).__name__
    scale = getattr(layer.spatial_func, "scale", 1.0)
    parts = (mixer, layer.gamma_1 is None, scale, layer.cpe_net.includes_residual, layer.cpe_net.grid_stream)
    return "/".join(str(part) for part in parts)


def _reference_kind(layer: nn.Module) -> str:
    """The same for a layer of the reference model."""
    return type(getattr(layer, "spatial_func", None)).__name__ if isinstance(layer, MixingBlock) else ""


def _runs(stage: nn.Sequential, kind_of: Callable[[nn.Module], str]) -> list[list[str]]:
    """Indices of layers in a row that are blocks of one kind; a layer that is no block stands alone."""
    runs: list[list[str]] = []
    previous = ""
    for index, layer in stage._modules.items():
        assert layer is not None
        kind = kind_of(layer)
        if kind and kind == previous:
            runs[-1].append(index)
        else:
            runs.append([index])
        previous = kind
    return runs


def _settings(module: nn.Module) -> dict[str, object]:
    return {
        name: value
        for name, value in sorted(vars(module).items())
        if not name.startswith("_") and isinstance(value, _PLAIN)
    }


def _shapes(module: nn.Module) -> dict[str, object]:
    tensors = {**module._parameters, **module._buffers}
    return {name: None if tensor is None else (tensor.dtype, *tensor.shape) for name, tensor in tensors.items()}


def stamp_blocks(model: ModelProto, repeats: Mapping[str, tuple[str, ...]], weights: StaticSpach) -> ModelProto:
    """Give `model` every block of `repeats`, with the parameters of `weights`; nodes stay in execution order."""
    graph = model.graph
    stamped: list[NodeProto] = []
    stream: dict[str, str] = {}
    blocks = _nodes_by_block(graph, repeats)
    for node in graph.node:
        block = block_of(node.name, repeats)
        if block is None:
            stamped.append(_connected(node, stream))
        elif node is blocks[block][0] or node.name == blocks[block][0].name:
            stamped.extend(_stamp_run(graph, blocks[block], block, repeats[block], stream))
    result = ModelProto(
        ir_version=model.ir_version,
        opset_import=model.opset_import,
        producer_name=model.producer_name,
        producer_version=model.producer_version,
        functions=model.functions,
        metadata_props=model.metadata_props,
        graph=GraphProto(name=graph.name, input=graph.input, output=graph.output),
    )
    _fill(result.graph, stamped, Parameters(weights), graph, {copy for copies in repeats.values() for copy in copies})
    return result


class Parameters:
    """The model's tensors by name; a tensor that several names share is stored once, under the first."""

    def __init__(self, model: StaticSpach) -> None:
        self._tensors = model.state_dict()
        first: dict[int, str] = {}
        self._canonical: dict[str, str] = {}
        for name, tensor in self._tensors.items():
            self._canonical[name] = first.setdefault(tensor.data_ptr() if tensor.numel() else id(tensor), name)

    def canonical(self, name: str) -> str:
        """The name under which `name` is stored; names that are no parameters stay."""
        return self._canonical.get(name, name)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def put(self, name: str, place: TensorProto) -> None:
        """Make the new initializer `place` that of a parameter: its data is copied there and nowhere else."""
        values = np.ascontiguousarray(self._tensors[name].detach().numpy())
        place.name = name
        place.data_type = helper.np_dtype_to_tensor_dtype(values.dtype)
        place.dims.extend(values.shape)
        place.raw_data = values.tobytes()


def _nodes_by_block(graph: GraphProto, repeats: Mapping[str, tuple[str, ...]]) -> dict[str, list[NodeProto]]:
    blocks: dict[str, list[NodeProto]] = {block: [] for block in repeats}
    for node in graph.node:
        block = block_of(node.name, repeats)
        if block is not None:
            blocks[block].append(node)
    return blocks


def block_of(name: str, blocks: Collection[str]) -> str | None:
    """The one of `blocks` to which the node or tensor called `name` belongs."""
    path = name.split("/", 1)[0]
    head = ".".join(path.split(".")[:2])
    return head if head in blocks else None


def _connected(node: NodeProto, stream: Mapping[str, str]) -> NodeProto:
    twin = NodeProto()
    twin.CopyFrom(node)
    twin.input[:] = [stream.get(name, name) for name in node.input]
    return twin


def _stamp_run(
    graph: GraphProto, nodes: list[NodeProto], block: str, copies: tuple[str, ...], stream: dict[str, str]
) -> list[NodeProto]:
    """All copies of one block, each fed by the one before; `stream` learns what now carries the block's output."""
    inside = {output for node in nodes for output in node.output}
    _check_constants(graph, nodes, block)
    incoming = _incoming(graph, nodes, inside, block)
    outgoing = _outgoing(graph, nodes, inside, block)
    source = stream.get(incoming, incoming)
    result: list[NodeProto] = []
    for copy in copies:
        for node in nodes:
            twin = NodeProto()
            twin.CopyFrom(node)
            twin.name = _moved(node.name, block, copy)
            twin.input[:] = [source if name == incoming else _moved(name, block, copy) for name in node.input]
            twin.output[:] = [_moved(name, block, copy) for name in node.output]
            result.append(twin)
        source = _moved(outgoing, block, copy)
    stream[outgoing] = source
    return result


def _check_constants(graph: GraphProto, nodes: list[NodeProto], block: str) -> None:
    """Float tensors in a block are its own parameters, under their own names; anything else could not be exchanged."""
    known = initializers(graph)
    read = {name: known[name] for node in nodes for name in node.input if name in known}
    foreign = [
        name
        for name, tensor in read.items()
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) and not name.startswith(f"{block}.")
    ]
    if foreign:
        raise CertificateError(f"Block {block} reads {sorted(foreign)}, which are not parameters of its own.")


def _incoming(graph: GraphProto, nodes: list[NodeProto], inside: set[str], block: str) -> str:
    made = set(producers(graph)) | {value.name for value in graph.input}
    names: set[str] = {name for node in nodes for name in node.input if name in made and name not in inside}
    if len(names) != 1:
        raise CertificateError(f"Block {block} reads {sorted(names)}; a block reads one tensor, the stream.")
    return names.pop()


def _outgoing(graph: GraphProto, nodes: list[NodeProto], inside: set[str], block: str) -> str:
    own = {node.name for node in nodes}
    read = consumers(graph)
    names = {name for name in inside if any(reader.name not in own for reader in read.get(name, ()))}
    if len(names) != 1:
        raise CertificateError(f"Block {block} hands out {sorted(names)}; a block makes one tensor, the stream.")
    return names.pop()


def _moved(name: str, block: str, copy: str) -> str:
    """`layer3.3/Add` -> `layer3.4/Add`; shared constants keep their names."""
    return copy + name[len(block) :] if name.startswith((f"{block}.", f"{block}/")) else name


def _fill(
    graph: GraphProto, nodes: list[NodeProto], parameters: Parameters, original: GraphProto, blocks: set[str]
) -> None:
    """Blocks get the model's parameters; all else keeps its tensors, into which the simplifier may have put others."""
    for node in nodes:
        node.input[:] = [parameters.canonical(name) for name in node.input]
    constants = initializers(original)
    graph.node.extend(nodes)
    made = {output for node in nodes for output in node.output} | {value.name for value in graph.input}
    for name in dict.fromkeys(name for node in nodes for name in node.input if name and name not in made):
        is_kept = name in constants and block_of(name, blocks) is None
        if name in parameters and not is_kept:
            parameters.put(name, graph.initializer.add())
        elif name in constants:
            graph.initializer.append(constants[name])
        else:
            raise CertificateError(f"No tensor is known for {name}, which the simplifier made of a block's weights.")
