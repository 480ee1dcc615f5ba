"""Faults to plant: every weighted module of a graph, times the kinds of fault that it can have."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from spach_deploy.graph.editing import owner
from tests.planted.subjects import Subject, effect, run

Array = NDArray[np.float64]
Change = Callable[[Array, np.random.Generator, float], Array]

SIZES = (0.5, 1000.0)
"""Of faults that have a size, in noise floors: drawn between these, each order of magnitude alike."""

_WEIGHT = re.compile(r"^(?P<module>.+?)(\.net\.1)?\.(weight|gamma_1|scale|tap_\d\d)$")


@dataclasses.dataclass(frozen=True)
class Planned:
    """A fault that can be planted. `plant(graph, rng, amount)`; `is_sized`: it grows with the amount."""

    form: str
    module: str
    kind: str
    what: str
    plant: Callable[[ModelProto, np.random.Generator, float], None] = dataclasses.field(repr=False)
    is_sized: bool = False


@dataclasses.dataclass(frozen=True)
class Planted:
    """A fault in its graph. `size`: what it does to the logits, in noise floors."""

    model: str
    planned: Planned
    size: float
    graph: ModelProto = dataclasses.field(repr=False)


def planned(subject: Subject, form: str) -> list[Planned]:
    """Every fault for a subject's graph, in the order of the graph's weights and nodes."""
    graph = subject.graph(form)
    found = [*_in_weights(graph, form), *_in_nodes(graph, form), *_in_attention(subject, graph, form)]
    return [fault for fault in found if fault.module]


def plant(subject: Subject, fault: Planned, seed: int) -> Planted:
    """The fault in a copy of its graph; one that has a size gets one drawn from `SIZES`, within what the module allows.

    Raises ValueError where it changes nothing at all.
    """
    rng = np.random.default_rng(seed)
    floor, clean = subject.floors[fault.form], subject.logits[fault.form]
    aim = float(np.exp(rng.uniform(*np.log(SIZES))))

    def spoiled(amount: float) -> tuple[ModelProto, float]:
        graph = subject.graph(fault.form)
        fault.plant(graph, np.random.default_rng(seed + 1), amount)
        return graph, effect(run(graph, subject.images), clean) / floor

    graph, size = spoiled(_TRIAL)
    if fault.is_sized and 0 < size < float("inf"):
        graph, size = spoiled(min(_TRIAL * aim / size, _LARGEST))
    if size == 0:
        raise ValueError(f"{fault} changes nothing.")
    return Planted(subject.name, fault, size, graph)


_TRIAL, _LARGEST = 0.05, 4.0


# In weights


def _in_weights(graph: ModelProto, form: str) -> Iterator[Planned]:
    for tensor in graph.graph.initializer:
        if tensor.data_type not in (TensorProto.FLOAT, TensorProto.FLOAT16) or int(np.prod(tensor.dims)) < 8:
            continue
        module = module_of(tensor.name)
        if tensor.name.endswith((".bias", ".shift")):
            yield _fault(tensor, form, module, "missing bias", "no bias", lambda w, rng, amount: w * 0)
            yield _fault(tensor, form, module, "wrong weight", "noise in the bias", _noise, is_sized=True)
        elif _WEIGHT.match(tensor.name):
            yield from _of_weight(tensor, form, module, list(tensor.dims))


def _of_weight(tensor: TensorProto, form: str, module: str, dims: list[int]) -> Iterator[Planned]:
    yield _fault(tensor, form, module, "wrong weight", "noise", _noise, is_sized=True)
    yield _fault(tensor, form, module, "precision", "weight rounded to eight bits", _eight_bits)
    if tensor.name.endswith("scale") or "norm" in module or "gamma_1" in tensor.name:
        return
    if "tap_" not in tensor.name:
        yield _fault(tensor, form, module, "wrong weight", "noise in one row", _noise_in_a_row, is_sized=True)
        yield _fault(tensor, form, module, "wrong weight", "two rows exchanged", _exchange)
        yield _fault(tensor, form, module, "wrong weight", "a row's sign", _negate)
    if len(dims) == 4 and dims[-1] > 1:
        yield _fault(tensor, form, module, "wrong layout", "kernel turned", lambda w, *_: w[..., ::-1, ::-1])
        yield _fault(tensor, form, module, "wrong layout", "height and width", lambda w, *_: w.swapaxes(2, 3))
    if len(dims) == 2:
        columns = "columns reversed" if dims[0] != dims[1] else "transposed"
        turn: Change = (lambda w, *_: w[:, ::-1]) if dims[0] != dims[1] else (lambda w, *_: w.T)
        yield _fault(tensor, form, module, "wrong layout", columns, turn)


def _fault(
    tensor: TensorProto, form: str, module: str, kind: str, what: str, change: Change, *, is_sized: bool = False
) -> Planned:
    name = tensor.name

    def plant(graph: ModelProto, rng: np.random.Generator, amount: float) -> None:
        target = next(entry for entry in graph.graph.initializer if entry.name == name)
        old = numpy_helper.to_array(target)
        new = np.ascontiguousarray(change(old.astype(np.float64), rng, amount)).astype(old.dtype)
        target.CopyFrom(numpy_helper.from_array(new, name))

    return Planned(form, module, kind, f"{what} in {name}", plant, is_sized)


def module_of(weight: str) -> str:
    """The module whose weight it is: what stands before the attribute."""
    return weight.rpartition(".")[0]


def _noise(weight: Array, rng: np.random.Generator, amount: float) -> Array:
    noisy: Array = weight + amount * weight.std() * rng.standard_normal(weight.shape)
    return noisy


def _noise_in_a_row(weight: Array, rng: np.random.Generator, amount: float) -> Array:
    changed = weight.copy()
    row = rng.integers(len(weight))
    changed[row] += amount * weight.std() * rng.standard_normal(weight[row].shape)
    return changed


def _exchange(weight: Array, rng: np.random.Generator, _amount: float) -> Array:
    first, second = rng.choice(len(weight), 2, replace=False)
    changed = weight.copy()
    changed[[first, second]] = changed[[second, first]]
    return changed


def _negate(weight: Array, rng: np.random.Generator, _amount: float) -> Array:
    changed = weight.copy()
    changed[rng.integers(len(weight))] *= -1
    return changed


def _eight_bits(weight: Array, _rng: np.random.Generator, _amount: float) -> Array:
    step = np.abs(weight).max() / 127
    rounded: Array = np.round(weight / step) * step
    return rounded


# In nodes


def _in_nodes(graph: ModelProto, form: str) -> Iterator[Planned]:
    for node in graph.graph.node:
        module = owner(node.name)
        if node.op_type == "LayerNormalization":
            yield Planned(form, module, "wrong epsilon", f"epsilon of {node.name}", _epsilon(node.name), is_sized=True)
        if node.op_type in ("Gemm", "Conv", "LayerNormalization") and "cpe_net" not in module:
            yield Planned(form, module, "overflow", f"{node.name} cut off", _cut_off(node.output[0]))
            yield Planned(form, module, "precision", f"{node.name} through eight bits", _through_fp8(node.output[0]))


def _epsilon(name: str) -> Callable[[ModelProto, np.random.Generator, float], None]:
    def plant(graph: ModelProto, _rng: np.random.Generator, amount: float) -> None:
        node = next(node for node in graph.graph.node if node.name == name)
        next(entry for entry in node.attribute if entry.name == "epsilon").f = 1e-6 + 0.1 * amount

    return plant


def _behind(graph: ModelProto, tensor: str, make: Callable[[str, str], list[NodeProto]]) -> None:
    """Nodes between what makes a tensor and what reads it."""
    nodes = list(graph.graph.node)
    index = next(i for i, node in enumerate(nodes) if tensor in node.output)
    before = f"{tensor}/before"
    nodes[index].output[list(nodes[index].output).index(tensor)] = before
    nodes[index + 1 : index + 1] = make(before, tensor)
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.graph.node[:]
    graph.graph.node.extend(copies)


def _cut_off(tensor: str) -> Callable[[ModelProto, np.random.Generator, float], None]:
    """As a sum that saturates: at half a unit of what a normalized activation has."""

    def plant(graph: ModelProto, _rng: np.random.Generator, _amount: float) -> None:
        kind = np.float16 if _is_half(graph) else np.float32
        for label, limit in (("low", -0.5), ("high", 0.5)):
            graph.graph.initializer.append(numpy_helper.from_array(np.array(limit, kind), f"fault.{label}"))

        def clip(source: str, target: str) -> list[NodeProto]:
            module = owner(tensor)
            return [helper.make_node("Clip", [source, "fault.low", "fault.high"], [target], name=f"{module}/fault")]

        _behind(graph, tensor, clip)

    return plant


def _through_fp8(tensor: str) -> Callable[[ModelProto, np.random.Generator, float], None]:
    """To FP8 and back, as by an engine that was not asked to."""

    def plant(graph: ModelProto, _rng: np.random.Generator, _amount: float) -> None:
        kind = TensorProto.FLOAT16 if _is_half(graph) else TensorProto.FLOAT

        def casts(source: str, target: str) -> list[NodeProto]:
            module, small = owner(tensor), f"{tensor}/fp8"
            down = helper.make_node("Cast", [source], [small], name=f"{module}/fault", to=TensorProto.FLOAT8E4M3FN)
            return [down, helper.make_node("Cast", [small], [target], name=f"{module}/fault_back", to=kind)]

        _behind(graph, tensor, casts)

    return plant


def _is_half(graph: ModelProto) -> bool:
    return any(tensor.data_type == TensorProto.FLOAT16 for tensor in graph.graph.initializer)


# In attention


def _in_attention(subject: Subject, graph: ModelProto, form: str) -> Iterator[Planned]:
    heads = subject.model.architecture.heads
    if heads < 2:
        return
    for tensor in graph.graph.initializer:
        if tensor.name.endswith("qkv.weight"):
            qkv = module_of(tensor.name)
            yield _fault(tensor, form, qkv, "order of heads", "(h three d)", _packed_otherwise(heads))
            yield _fault(tensor, form, qkv, "order of heads", "heads turned by one", _turned(heads))
    for node in graph.graph.node:
        perm = next((list(entry.ints) for entry in node.attribute if entry.name == "perm"), [])
        if re.search(r"spatial_func/Transpose_3$", node.name) and perm == [0, 2, 1, 3]:
            yield Planned(form, owner(node.name), "order of heads", f"(d h) in {node.name}", _inner_heads(node.name))


def _packed_otherwise(heads: int) -> Change:
    def change(weight: Array, _rng: np.random.Generator, _amount: float) -> Array:
        rows, columns = weight.shape
        packed: Array = weight.reshape(3, heads, -1, columns).swapaxes(0, 1).reshape(rows, columns)
        return packed

    return change


def _turned(heads: int) -> Change:
    """Queries of each head with the keys of the next."""

    def change(weight: Array, _rng: np.random.Generator, _amount: float) -> Array:
        parts = weight.reshape(3, heads, -1, weight.shape[1]).copy()
        parts[0] = np.roll(parts[0], 1, axis=0)
        turned: Array = parts.reshape(weight.shape)
        return turned

    return change


def _inner_heads(name: str) -> Callable[[ModelProto, np.random.Generator, float], None]:
    def plant(graph: ModelProto, _rng: np.random.Generator, _amount: float) -> None:
        node = next(node for node in graph.graph.node if node.name == name)
        next(entry for entry in node.attribute if entry.name == "perm").ints[:] = [0, 2, 3, 1]

    return plant
