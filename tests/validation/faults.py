"""Faults to plant in a graph, and harmless changes. Each changes the model that it is given, in place."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

_RNG_SEED = 7


def node(model: ModelProto, name: str) -> NodeProto:
    """The node of that name."""
    found: NodeProto = next(node for node in model.graph.node if node.name == name)
    return found


def big_tensors(model: ModelProto) -> list[str]:
    """Every weight of two or more axes with at least 64 values."""
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16)
    weights = (t for t in model.graph.initializer if t.data_type in floats and len(t.dims) >= 2)
    return [tensor.name for tensor in weights if np.prod(tensor.dims) >= 64]


def value(model: ModelProto, name: str) -> NDArray[np.generic]:
    """A weight."""
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))


def set_value(model: ModelProto, name: str, array: NDArray[np.generic]) -> None:
    """Replace a weight by one of the same type."""
    tensor = next(t for t in model.graph.initializer if t.name == name)
    old = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array).astype(old.dtype), name))


def perturb(model: ModelProto, name: str) -> None:
    """Add noise of a fifth of the weight's standard deviation."""
    old = value(model, name).astype(np.float64)
    noise = np.random.default_rng(_RNG_SEED).standard_normal(old.shape)
    set_value(model, name, old + 0.2 * old.std() * noise)


def permute_channel(model: ModelProto, name: str) -> None:
    """Exchange two output channels."""
    array = value(model, name).copy()
    array[[1, array.shape[0] // 2]] = array[[array.shape[0] // 2, 1]]
    set_value(model, name, array)


def set_epsilon(model: ModelProto, epsilon: float) -> None:
    """Another epsilon in every LayerNorm."""
    for layer in (n for n in model.graph.node if n.op_type == "LayerNormalization"):
        next(a for a in layer.attribute if a.name == "epsilon").f = epsilon


def forget_scale(model: ModelProto, name: str) -> None:
    """A normalization without its learned scale."""
    set_value(model, name, np.ones_like(value(model, name)))


def approximate_gelu(model: ModelProto) -> None:
    """The tanh form of GELU everywhere."""
    for layer in (n for n in model.graph.node if n.op_type == "Gelu"):
        del layer.attribute[:]
        layer.attribute.append(helper.make_attribute("approximate", "tanh"))


def drop_gelu(model: ModelProto, name: str) -> None:
    """No activation in one MLP."""
    layer = node(model, name)
    layer.op_type = "Identity"
    del layer.attribute[:]


def transpose_heads(model: ModelProto, name: str) -> None:
    """Merge heads as (d h) where (h d) is right: `name` moves (B, h, N, d) to (B, N, h, d)."""
    perm = next(a for a in node(model, name).attribute if a.name == "perm")
    assert list(perm.ints) == [0, 2, 1, 3]
    perm.ints[:] = [0, 2, 3, 1]


def plant_nan(model: ModelProto, name: str) -> None:
    """One weight that is not a number."""
    array = value(model, name).copy()
    array.reshape(-1)[0] = np.nan
    set_value(model, name, array)


def rename_output(model: ModelProto, old: str, new: str) -> None:
    """Give an output another name."""
    _rename_tensor(model, old, new)
    next(output for output in model.graph.output if output.name == old).name = new


def remove_output(model: ModelProto, name: str) -> None:
    """One output less; what made it stays."""
    kept = [output for output in model.graph.output if output.name != name]
    del model.graph.output[:]
    model.graph.output.extend(kept)


def swap_outputs(model: ModelProto, first: str, second: str) -> None:
    """Two outputs of one shape under each other's names."""
    for old, new in ((first, "swap"), (second, first), ("swap", second)):
        _rename_tensor(model, old, new)


def _rename_tensor(model: ModelProto, old: str, new: str) -> None:
    for item in model.graph.node:
        item.input[:] = [new if name == old else name for name in item.input]
        item.output[:] = [new if name == old else name for name in item.output]


def rename_input(model: ModelProto, new: str) -> None:
    """Another name for the images."""
    _rename_tensor(model, "input", new)
    model.graph.input[0].name = new


def fix_batch(model: ModelProto, batch: int) -> None:
    """A graph that takes exactly `batch` images."""
    for tensor in (*model.graph.input, *model.graph.output):
        tensor.type.tensor_type.shape.dim[0].dim_value = batch
    del model.graph.value_info[:]


def mix_up_images(model: ModelProto, size: int) -> None:
    """A graph that is right for batches of up to `size` images, and begins anew with the first one after them."""
    name = model.graph.input[0].name
    for item in model.graph.node:
        item.input[:] = ["mixed/images" if source == name else source for source in item.input]
    for label, number in (("zero", 0), ("one", 1), ("size", size)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(number, np.int64), f"mixed/{label}"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "mixed/axis"))
    nodes = [
        helper.make_node("Shape", [name], ["mixed/batch"], start=0, end=1),
        helper.make_node("Squeeze", ["mixed/batch", "mixed/axis"], ["mixed/count"]),
        helper.make_node("Range", ["mixed/zero", "mixed/count", "mixed/one"], ["mixed/range"]),
        helper.make_node("Mod", ["mixed/range", "mixed/size"], ["mixed/order"]),
        helper.make_node("Gather", [name, "mixed/order"], ["mixed/images"], axis=0),
    ]
    for place, item in enumerate(nodes):
        model.graph.node.insert(place, item)


def drop_images(model: ModelProto, size: int) -> None:
    """Answers to the first `size` images of a batch alone."""
    _rename_tensor(model, "logits", "all logits")
    for label, number in (("start", 0), ("stop", size)):
        model.graph.initializer.append(numpy_helper.from_array(np.array([number], np.int64), f"dropped/{label}"))
    model.graph.node.append(helper.make_node("Slice", ["all logits", "dropped/start", "dropped/stop"], ["logits"]))


# Harmless


def reorder(model: ModelProto) -> None:
    """The nodes in another order of execution: each as early as its inputs allow, last ones first."""
    waiting = list(reversed(model.graph.node))
    made = {"", *(value.name for value in model.graph.input), *(tensor.name for tensor in model.graph.initializer)}
    ordered: list[NodeProto] = []
    while waiting:
        ready = next(item for item in waiting if made.issuperset(item.input))
        waiting.remove(ready)
        ordered.append(ready)
        made.update(ready.output)
    assert [item.name for item in ordered] != [item.name for item in model.graph.node]
    kept = [NodeProto.FromString(item.SerializeToString()) for item in ordered]
    del model.graph.node[:]
    model.graph.node.extend(kept)


def unfold_constant(model: ModelProto, name: str) -> None:
    """A weight as a product of two constants, which a compiler folds back: `w` becomes `2w * 0.5`."""
    old = value(model, name)
    set_value(model, name, 2 * old.astype(np.float64))
    half = numpy_helper.from_array(np.array(0.5, old.dtype), "half")
    model.graph.initializer.append(half)
    for item in model.graph.node:
        item.input[:] = ["folded" if source == name else source for source in item.input]
    model.graph.node.insert(0, helper.make_node("Mul", [name, "half"], ["folded"], name="model/folded"))


def rename_tensors(model: ModelProto) -> None:
    """Other names for all that is neither input nor output."""
    fixed = {"", *(v.name for v in (*model.graph.input, *model.graph.output))}
    for tensor in model.graph.initializer:
        tensor.name = f"w/{tensor.name}"
    constants = {tensor.name.removeprefix("w/") for tensor in model.graph.initializer}

    def renamed(name: str) -> str:
        return name if name in fixed else f"w/{name}" if name in constants else f"t/{name}"

    for item in model.graph.node:
        item.input[:] = [renamed(name) for name in item.input]
        item.output[:] = [renamed(name) for name in item.output]
    del model.graph.value_info[:]
