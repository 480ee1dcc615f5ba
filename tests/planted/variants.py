"""Harmless variants: graphs that compute the same and look different. Each is run and held to that."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, version_converter

from spach_deploy.graph.export import simplify
from tests.planted.subjects import FORMS, Subject, effect, run
from tests.static_models import plain_export

HARMLESS = 5.0
"""Noise floors that a harmless variant may be away from its graph: other kernels, other orders of summation."""

Change = Callable[[ModelProto], ModelProto]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to change a graph without changing what it computes. `make(subject)` raises ValueError where it does."""

    name: str
    form: str
    build: Callable[[Subject], ModelProto] = dataclasses.field(repr=False)

    def make(self, subject: Subject) -> ModelProto:
        """The variant, shown to be harmless."""
        graph = self.build(subject)
        images, clean, floor = subject.images, subject.logits[self.form], subject.floors[self.form]
        moved = effect(run(graph, images), clean)
        if not moved <= HARMLESS * floor:
            raise ValueError(f"{self.name} is not harmless: {moved:.1e} against a floor of {floor:.1e}.")
        return graph


def variants() -> list[Variant]:
    """All of them; every change in every form that it can be made in."""
    everywhere: dict[str, Change] = {
        "nodes in another order": _reordered,
        "tensors and nodes renamed": _renamed,
        "weights as Constant nodes": _as_constants,
        "Identity in front of every linear layer": _identities,
        "batch fixed at 1": lambda graph: _fixed(graph, 1),
        "batch fixed at 2": lambda graph: _fixed(graph, 2),
        "Gemm as MatMul and Add": _gemm_apart,
        "weights of Gemm transposed": _gemm_turned,
        "Reshape there and back": _reshaped,
        "names of the documentation": _documented,
        "renamed and in another order": lambda graph: _renamed(_reordered(graph)),
    }
    in_fp32: dict[str, Change] = {
        "LayerNormalization spelt out": _layer_norm_apart,
        "GELU spelt with Erf": _gelu_apart,
        "simplified again": simplify,
        "opset 21": lambda graph: version_converter.convert_version(graph, 21),
        "optimized by ONNX Runtime": _optimized,
        "LayerNormalization, GELU and Gemm spelt out, renamed": lambda graph: _renamed(
            _gemm_apart(_gelu_apart(_layer_norm_apart(graph)))
        ),
    }
    found = [_changed(name, form, change) for name, change in everywhere.items() for form in FORMS]
    found += [_changed(name, form, change) for name, change in in_fp32.items() for form in FORMS[:2]]
    return [*found, *_other_exports()]


def _changed(name: str, form: str, change: Change) -> Variant:
    return Variant(f"{name} ({form})", form, lambda subject: change(subject.graph(form)))


def _other_exports() -> list[Variant]:
    """What torch.onnx.export makes of the model as it is published: nothing folded, other names."""

    def plain(subject: Subject) -> ModelProto:
        return plain_export(subject.model, subject.model.architecture.image_size[0])

    def simplified(subject: Subject) -> ModelProto:
        return simplify(plain(subject))

    return [
        Variant("plain export", "canonical", plain),
        Variant("plain export, simplified", "canonical", simplified),
        Variant("plain export, renamed", "canonical", lambda subject: _renamed(plain(subject))),
    ]


# The changes


def _reordered(graph: ModelProto) -> ModelProto:
    """Another topological order, by drawing among what is ready."""
    generator = random.Random(1)
    nodes = list(graph.graph.node)
    made = {name for node in nodes for name in node.output}
    waiting = {index: {name for name in node.input if name in made} for index, node in enumerate(nodes)}
    order: list[NodeProto] = []
    done: set[str] = set()
    while waiting:
        ready = [index for index, needs in waiting.items() if needs <= done]
        index = generator.choice(ready)
        del waiting[index]
        order.append(nodes[index])
        done.update(nodes[index].output)
    return _with_nodes(graph, order)


def _with_nodes(graph: ModelProto, nodes: list[NodeProto]) -> ModelProto:
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.graph.node[:]
    graph.graph.node.extend(copies)
    return graph


def _renamed(graph: ModelProto) -> ModelProto:
    kept = {value.name for value in (*graph.graph.input, *graph.graph.output)}
    tensors = [tensor.name for tensor in graph.graph.initializer]
    tensors += [name for node in graph.graph.node for name in node.output if name]
    names = {name: f"t{index}" for index, name in enumerate(tensors) if name not in kept}
    for index, node in enumerate(graph.graph.node):
        node.name = f"n{index}"
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for tensor in graph.graph.initializer:
        tensor.name = names[tensor.name]
    del graph.graph.value_info[:]
    return graph


def _as_constants(graph: ModelProto) -> ModelProto:
    nodes = [
        helper.make_node("Constant", [], [tensor.name], name=f"constant/{tensor.name}", value=tensor)
        for tensor in graph.graph.initializer
    ]
    nodes += list(graph.graph.node)
    del graph.graph.initializer[:]
    return _with_nodes(graph, nodes)


def _identities(graph: ModelProto) -> ModelProto:
    def before(node: NodeProto) -> list[NodeProto]:
        if node.op_type != "Gemm":
            return [node]
        moved = f"{node.input[0]}/same/{node.output[0]}"
        identity = helper.make_node("Identity", [node.input[0]], [moved], name=f"same/{node.name}")
        node.input[0] = moved
        return [identity, node]

    return _with_nodes(graph, [made for node in graph.graph.node for made in before(node)])


def _fixed(graph: ModelProto, batch: int) -> ModelProto:
    for value in (*graph.graph.input, *graph.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    return graph


def _weight(graph: ModelProto, name: str) -> TensorProto:
    found: TensorProto = next(tensor for tensor in graph.graph.initializer if tensor.name == name)
    return found


def _gemm_apart(graph: ModelProto) -> ModelProto:
    def apart(node: NodeProto) -> list[NodeProto]:
        if node.op_type != "Gemm":
            return [node]
        turned = _turned(graph, node)
        product = f"{node.output[0]}/product"
        matmul = helper.make_node("MatMul", [node.input[0], turned], [product], name=f"{node.name}/MatMul")
        return [matmul, helper.make_node("Add", [product, node.input[2]], list(node.output), name=f"{node.name}/Add")]

    return _with_nodes(graph, [made for node in list(graph.graph.node) for made in apart(node)])


def _turned(graph: ModelProto, node: NodeProto) -> str:
    """The weight of a Gemm as (in, out)."""
    is_turned = any(entry.name == "transB" and entry.i for entry in node.attribute)
    if not is_turned:
        return str(node.input[1])
    value = numpy_helper.to_array(_weight(graph, node.input[1]))
    name = f"{node.input[1]}/turned"
    graph.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value.T), name))
    return name


def _gemm_turned(graph: ModelProto) -> ModelProto:
    def turned(node: NodeProto) -> NodeProto:
        if node.op_type != "Gemm" or not any(entry.name == "transB" and entry.i for entry in node.attribute):
            return node
        inputs = [node.input[0], _turned(graph, node), node.input[2]]
        return helper.make_node("Gemm", inputs, list(node.output), name=node.name)

    return _with_nodes(graph, [turned(node) for node in list(graph.graph.node)])


def _reshaped(graph: ModelProto) -> ModelProto:
    """Every linear layer's output flattened and shaped again."""
    flat = numpy_helper.from_array(np.array([-1], np.int64), "flat")
    graph.graph.initializer.append(flat)

    def there_and_back(node: NodeProto) -> list[NodeProto]:
        if node.op_type != "Gemm":
            return [node]
        output = node.output[0]
        node.output[0] = f"{output}/whole"
        shape = helper.make_node("Shape", [f"{output}/whole"], [f"{output}/shape"], name=f"{node.name}/shape")
        there = helper.make_node("Reshape", [f"{output}/whole", "flat"], [f"{output}/flat"], name=f"{node.name}/flat")
        back = helper.make_node("Reshape", [f"{output}/flat", f"{output}/shape"], [output], name=f"{node.name}/back")
        return [node, shape, there, back]

    return _with_nodes(graph, [made for node in list(graph.graph.node) for made in there_and_back(node)])


def _documented(graph: ModelProto) -> ModelProto:
    graph.doc_string = "exported elsewhere"
    for node in graph.graph.node:
        node.doc_string = "a node"
    del graph.graph.value_info[:]
    return graph


def _layer_norm_apart(graph: ModelProto) -> ModelProto:
    def constant(name: str, value: float) -> str:
        if all(tensor.name != name for tensor in graph.graph.initializer):
            graph.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
        return name

    def apart(node: NodeProto) -> list[NodeProto]:
        if node.op_type != "LayerNormalization":
            return [node]
        epsilon = next(entry.f for entry in node.attribute if entry.name == "epsilon")
        x, made = node.input[0], node.output[0]
        axis = f"{made}/axis"
        graph.graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), axis))
        steps = [
            ("ReduceMean", [x, axis], "mean"),
            ("Sub", [x, f"{made}/mean"], "centred"),
            ("Mul", [f"{made}/centred", f"{made}/centred"], "squares"),
            ("ReduceMean", [f"{made}/squares", axis], "variance"),
            ("Add", [f"{made}/variance", constant("layer_norm.epsilon", epsilon)], "padded"),
            ("Sqrt", [f"{made}/padded"], "deviation"),
            ("Div", [f"{made}/centred", f"{made}/deviation"], "normalized"),
            ("Mul", [f"{made}/normalized", node.input[1]], "scaled"),
        ]
        nodes = [helper.make_node(kind, inputs, [f"{made}/{label}"]) for kind, inputs, label in steps]
        return [*nodes, helper.make_node("Add", [f"{made}/scaled", node.input[2]], [made])]

    return _with_nodes(graph, [made for node in list(graph.graph.node) for made in apart(node)])


def _gelu_apart(graph: ModelProto) -> ModelProto:
    for name, value in (("gelu.root", 2**0.5), ("gelu.one", 1.0), ("gelu.half", 0.5)):
        graph.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))

    def apart(node: NodeProto) -> list[NodeProto]:
        if node.op_type != "Gelu":
            return [node]
        x, made = node.input[0], node.output[0]
        steps = [
            ("Div", [x, "gelu.root"], "scaled"),
            ("Erf", [f"{made}/scaled"], "erf"),
            ("Add", [f"{made}/erf", "gelu.one"], "plus"),
            ("Mul", [x, f"{made}/plus"], "product"),
        ]
        nodes = [helper.make_node(kind, inputs, [f"{made}/{label}"]) for kind, inputs, label in steps]
        return [*nodes, helper.make_node("Mul", [f"{made}/product", "gelu.half"], [made])]

    return _with_nodes(graph, [made for node in list(graph.graph.node) for made in apart(node)])


def _optimized(graph: ModelProto) -> ModelProto:
    """ONNX Runtime's own optimizer, written to a file."""
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        source, target = Path(folder) / "source.onnx", Path(folder) / "target.onnx"
        onnx.save(graph, source)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(target)
        ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
        return onnx.load(target)
