"""Faults to plant in a quantized graph, in place, and in the record of it. `module` names the layer concerned."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from spach_deploy.onnx_graph.graph import initializers, producers, remove_unused_initializers
from spach_deploy.quantization.plan import QuantizationPlan, QuantizedSite, QuantizedTensor

Float64 = NDArray[np.float64]


def site(plan: QuantizationPlan, module: str) -> QuantizedSite:
    """The layer in the record."""
    return next(site for site in plan.sites if site.module == module)


def values(model: ModelProto, name: str) -> Float64:
    """A constant."""
    array: Float64 = numpy_helper.to_array(initializers(model.graph)[name]).astype(np.float64)
    return array


def set_values(model: ModelProto, name: str, array: NDArray[np.generic]) -> None:
    """Replace a constant by one of the same type."""
    tensor = initializers(model.graph)[name]
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array).astype(dtype), name))


def scale_input(model: ModelProto, tensor: str, factor: float) -> None:
    """Another scale for an activation."""
    set_values(model, f"{tensor}/scale", factor * values(model, f"{tensor}/scale"))


def scale_weights(model: ModelProto, module: str, change: Callable[[Float64], Float64]) -> None:
    """Other scales for a layer's weights, as many as there were."""
    name = f"{module}/weight/scale"
    set_values(model, name, change(values(model, name)))


def one_scale(model: ModelProto, module: str) -> None:
    """Weight scales per tensor in place of per channel."""
    name = f"{module}/weight"
    set_values(model, f"{name}/scale", values(model, f"{name}/scale").max())
    set_values(model, f"{name}/zero", np.array(0))
    for node in model.graph.node:
        if f"{name}/scale" in node.input:
            del node.attribute[:]


def swapped(first: int, second: int) -> Callable[[Float64], Float64]:
    """Two channels' scales exchanged."""

    def change(scales: Float64) -> Float64:
        scales = scales.copy()
        scales[[first, second]] = scales[[second, first]]
        return scales

    return change


def remove_pair(model: ModelProto, stem: str) -> None:
    """What read the pair reads what the pair read. `stem`: the tensor's name, or `module/weight`."""
    stored = producers(model.graph)[f"{stem}/quantize"]
    source, back = stored.input[0], f"{stem}/dequantize"
    for node in model.graph.node:
        node.input[:] = [source if name == back else name for name in node.input]
    kept = [NodeProto.FromString(n.SerializeToString()) for n in model.graph.node if not n.name.startswith(f"{stem}/")]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    remove_unused_initializers(model.graph)


def shift_weights(model: ModelProto, module: str, steps: float) -> None:
    """Every stored integer of a layer moved by `steps`."""
    scales = values(model, f"{module}/weight/scale")
    name = producers(model.graph)[f"{module}/weight/quantize"].input[0]
    weight = values(model, name)
    moved = weight + steps * scales.reshape((-1,) + (1,) * (weight.ndim - 1))
    limit = np.abs(weight).max(axis=tuple(range(1, weight.ndim)), keepdims=True)
    set_values(model, name, np.clip(moved, -limit, limit))


def scale_largest(model: ModelProto, module: str, factor: float) -> None:
    """The largest weight of the first output channel a little larger, so that it is clipped."""
    name = producers(model.graph)[f"{module}/weight/quantize"].input[0]
    weight = values(model, name)
    row = weight[0].reshape(-1)
    row[np.abs(row).argmax()] *= factor
    set_values(model, name, weight)


def set_axis(model: ModelProto, stem: str, axis: int) -> None:
    """Scales along another axis."""
    for node in model.graph.node:
        if f"{stem}/scale" in node.input:
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("axis", axis))


def compute_scale(model: ModelProto, tensor: str) -> None:
    """A scale that comes out of a node."""
    made = helper.make_node("Identity", [f"{tensor}/scale"], [f"{tensor}/computed"], name=f"{tensor}/computed")
    for node in model.graph.node:
        node.input[:] = [made.output[0] if name == f"{tensor}/scale" else name for name in node.input]
    model.graph.node.insert(0, made)


def rename_node(model: ModelProto, old: str, new: str) -> None:
    """Another name for a node."""
    next(node for node in model.graph.node if node.name == old).name = new


def set_zero_point(model: ModelProto, stem: str, value: int) -> None:
    """A zero point that is not 0."""
    set_values(model, f"{stem}/zero", np.full(values(model, f"{stem}/zero").shape, value))


def add_pair(model: ModelProto, tensor: str, kind: int = TensorProto.FLOAT16) -> None:
    """A pair in front of everything that reads `tensor`."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.05, dtype), "stray/scale"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(0, np.int8), "stray/zero"))
    for node in model.graph.node:
        node.input[:] = ["stray/dequantize" if name == tensor else name for name in node.input]
    where = next(i for i, node in enumerate(model.graph.node) if tensor in node.output) + 1
    inputs = ["stray/scale", "stray/zero"]
    back = helper.make_node(
        "DequantizeLinear", ["stray/quantize", *inputs], ["stray/dequantize"], name="stray/dequantize"
    )
    forth = helper.make_node("QuantizeLinear", [tensor, *inputs], ["stray/quantize"], name="stray/quantize")
    model.graph.node.insert(where, back)
    model.graph.node.insert(where, forth)


# The record, changed along


def with_site(plan: QuantizationPlan, module: str, **changes: object) -> QuantizationPlan:
    """Other entries for a layer."""
    sites = tuple(
        dataclasses.replace(entry, **changes) if entry.module == module else entry  # type: ignore[arg-type]
        for entry in plan.sites
    )
    return dataclasses.replace(plan, sites=sites)


def with_scale(plan: QuantizationPlan, module: str, factor: float, *, largest: bool = False) -> QuantizationPlan:
    """Another scale for a layer's input, and with `largest` another largest number that was seen."""
    (tensor,) = site(plan, module).tensors
    changed = QuantizedTensor(
        tensor.tensor, tensor.scale * factor, tensor.clip * factor, tensor.largest * (factor if largest else 1)
    )
    return with_site(plan, module, tensors=(changed,))


def without_site(plan: QuantizationPlan, module: str) -> QuantizationPlan:
    """A layer less."""
    return dataclasses.replace(plan, sites=tuple(entry for entry in plan.sites if entry.module != module))
