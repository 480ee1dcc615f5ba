"""Faults to plant in a quantized graph, in place, and in the record of it. `module` names the layer concerned."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from spach_deploy.quantization.plan import QuantizationPlan, QuantizedSite, QuantizedTensor
from tests.protos import initializers, producers, remove_unused_initializers

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


def scales_of(model: ModelProto, stem: str) -> list[str]:
    """The constants that hold a pair's scale: one, or two where it quantizes from FP32 and gives FP16 back."""
    names = (f"{stem}/scale", f"{stem}/scale/fp32")
    return [name for name in names if name in initializers(model.graph)]


def source_of(model: ModelProto, stem: str) -> str:
    """What a pair reads, in front of its cast where it has one. `stem`: the tensor's name, or `module/weight`."""
    made = producers(model.graph)
    source = made[f"{stem}/quantize"].input[0]
    name: str = made[source].input[0] if source.startswith(f"{stem}/") else source
    return name


def half_source_of(model: ModelProto, stem: str) -> str:
    """`source_of`, cast to FP16 where the pair reads in FP32 what FP16 would be cast from."""
    source = source_of(model, stem)
    if not stem.endswith("/to_fp16") or source == stem:
        return source
    where = next(index for index, node in enumerate(model.graph.node) if source in node.output)
    cast = helper.make_node("Cast", [source], [stem], name=stem, to=TensorProto.FLOAT16)
    model.graph.node.insert(where + 1, cast)
    return stem


def scale_input(model: ModelProto, tensor: str, factor: float) -> None:
    """Another scale for an activation."""
    for name in scales_of(model, tensor):
        set_values(model, name, factor * values(model, name))


def scale_weights(model: ModelProto, module: str, change: Callable[[Float64], Float64]) -> None:
    """Other scales for a layer's weights, as many as there were."""
    for name in scales_of(model, f"{module}/weight"):
        set_values(model, name, change(values(model, name)))


def one_scale(model: ModelProto, module: str) -> None:
    """Weight scales per tensor in place of per channel."""
    name = f"{module}/weight"
    for scale in scales_of(model, name):
        set_values(model, scale, values(model, scale).max())
    set_values(model, f"{name}/zero", np.array(0))
    for node in model.graph.node:
        if {*scales_of(model, name)} & {*node.input}:
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
    source, back = half_source_of(model, stem), f"{stem}/dequantize"
    for node in model.graph.node:
        node.input[:] = [source if name == back else name for name in node.input]
    kept = [NodeProto.FromString(n.SerializeToString()) for n in model.graph.node if not n.name.startswith(f"{stem}/")]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    remove_unused_initializers(model.graph)


def shift_weights(model: ModelProto, module: str, steps: float) -> None:
    """Every stored integer of a layer moved by `steps`."""
    scales = values(model, f"{module}/weight/scale")
    name = source_of(model, f"{module}/weight")
    weight = values(model, name)
    moved = weight + steps * scales.reshape((-1,) + (1,) * (weight.ndim - 1))
    limit = np.abs(weight).max(axis=tuple(range(1, weight.ndim)), keepdims=True)
    set_values(model, name, np.clip(moved, -limit, limit))


def scale_largest(model: ModelProto, module: str, factor: float) -> None:
    """The largest weight of the first output channel a little larger, so that it is clipped."""
    name = source_of(model, f"{module}/weight")
    weight = values(model, name)
    row = weight[0].reshape(-1)
    row[np.abs(row).argmax()] *= factor
    set_values(model, name, weight)


def set_axis(model: ModelProto, stem: str, axis: int) -> None:
    """Scales along another axis."""
    for node in model.graph.node:
        if {*scales_of(model, stem)} & {*node.input}:
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


def from_fp16(model: ModelProto) -> None:
    """Pairs as earlier versions wrote them: of FP16, with one scale, and the zero point at both ends."""
    stems = [node.name.removesuffix("/quantize") for node in model.graph.node if node.op_type == "QuantizeLinear"]
    for stem in stems:
        source, made = half_source_of(model, stem), producers(model.graph)
        forth, back = made[f"{stem}/quantize"], made[f"{stem}/dequantize"]
        forth.input[:] = [source, f"{stem}/scale", f"{stem}/zero"]
        back.input[1:] = forth.input[1:]
    kept = [node for node in model.graph.node if not node.name.endswith("/quantize/to_fp32")]
    kept = [NodeProto.FromString(node.SerializeToString()) for node in kept]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    remove_unused_initializers(model.graph)


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
