"""Graphs: damaged bytes, and graphs that are well-formed files but wrong, or lead out of the bundle."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from random import Random
from typing import Any

from benchmarks.robustness.box import Box
from benchmarks.robustness.case import Case, Kind
from benchmarks.robustness.damage import damaged, hostile_texts
from benchmarks.robustness.kinds.commands import reading_bundle
from benchmarks.robustness.seeds import manifest_with, seeds


def _bundle(box: Box, chance: Random) -> str:
    name: str = chance.choice(("fp16", "fp32", "uint8", "int8", *(("rtx",) if seeds().has_engine else ())))
    box.bring(seeds().path(name), "bundle")
    return name


def _stale(box: Box, chance: Random) -> Case:
    """The graph is damaged, and the manifest says what it was: everybody must notice."""
    _bundle(box, chance)
    content, what = damaged((box.work / "bundle/model.onnx").read_bytes(), chance)
    box.put("bundle/model.onnx", content)
    return Case(f"model.onnx: {what}", reading_bundle(chance, "bundle"), must_refuse=True)


def _alone(box: Box, chance: Random) -> Case:
    """The graph itself is pointed at, so that the numbers decide; or its new hash stands in the manifest."""
    _bundle(box, chance)
    content, what = damaged((box.work / "bundle/model.onnx").read_bytes(), chance)
    return _given(box, chance, content, what)


def _given(box: Box, chance: Random, content: bytes, what: str, *, must_refuse: bool = False) -> Case:
    box.put("bundle/model.onnx", content)
    if chance.random() < 0.5:
        return Case(f"model.onnx: {what}", ("spach-validate", "bundle/model.onnx"), must_refuse)
    manifest_with(box.work / "bundle", model_onnx=hashlib.sha256(content).hexdigest())
    command = ("spach-validate", "bundle") if must_refuse else reading_bundle(chance, "bundle")
    return Case(
        f"model.onnx and its hash: {what}", (*command, "--accept", "graph") if must_refuse else command, must_refuse
    )


def _edited(box: Box, chance: Random) -> Case:
    """A graph that somebody's program changed."""
    import onnx

    _bundle(box, chance)
    model = onnx.load(box.work / "bundle/model.onnx")
    edits = chance.sample(_EDITS, chance.choice((1, 1, 2)))
    said = [edit(model, chance, box) for edit in edits]
    return _given(box, chance, model.SerializeToString(), ", ".join(said))


def _other_weights(box: Box, chance: Random) -> Case:
    """Weights that changed enough to matter must not be called equal."""
    import onnx

    _bundle(box, chance)
    model = onnx.load(box.work / "bundle/model.onnx")
    large = [tensor for tensor in model.graph.initializer if len(tensor.raw_data) > 1000]
    tensor = chance.choice(large)
    values = onnx.numpy_helper.to_array(tensor)
    what = chance.choice(("negated", "zeroed", "reversed"))
    changed = {"negated": lambda: -values, "zeroed": lambda: values * 0, "reversed": lambda: values[::-1].copy()}[
        what
    ]()
    tensor.CopyFrom(onnx.numpy_helper.from_array(changed.astype(values.dtype), tensor.name))
    what = f"{tensor.name} {what}"
    return _given(box, chance, model.SerializeToString(), what, must_refuse=True)


def _external(box: Box, chance: Random) -> Case:
    """Weights in files outside of the bundle, by paths that climb, are absolute, or pass through a link."""
    import onnx

    _bundle(box, chance)
    model = onnx.load(box.work / "bundle/model.onnx")
    tensor = max(model.graph.initializer, key=lambda entry: len(entry.raw_data))
    (box.outside / "weights.bin").write_bytes(tensor.raw_data)
    (box.work / "bundle/link.bin").symlink_to(box.outside / "weights.bin")
    places = ("../../outside/weights.bin", str(box.outside / "weights.bin"), "link.bin", "/dev/zero", "/etc/passwd")
    location = chance.choice(
        (*places, "..", "", "missing.bin", "\0", "model.onnx", f"file://{box.outside}/weights.bin")
    )
    size = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    sizes = (("length", str(size)),) if chance.random() < 0.7 else (("offset", str(chance.choice((-1, 10**18)))),)
    for key, value in (("location", location), *sizes):
        tensor.external_data.add(key=key, value=value)
    what = f"{tensor.name} lies in {location!r}"
    return _given(box, chance, model.SerializeToString(), what, must_refuse=True)


# Edits. Each changes the model and says what it did


def _node(model: Any, chance: Random) -> Any:
    return chance.choice(model.graph.node)


def _other_input(model: Any, chance: Random, box: Box) -> str:
    node, other = _node(model, chance), _node(model, chance)
    if node.input:
        node.input[chance.randrange(len(node.input))] = chance.choice((other.output[0], "nowhere", "", node.output[0]))
    return f"another input of {node.name}"


def _no_inputs(model: Any, chance: Random, box: Box) -> str:
    node = _node(model, chance)
    del node.input[:]
    return f"{node.name} without inputs"


def _other_operator(model: Any, chance: Random, box: Box) -> str:
    node = _node(model, chance)
    node.op_type = chance.choice(
        ("Add", "Reshape", "Conv", "Loop", "Scan", "NoSuchOperator", "", "If", "Resize", "RNN")
    )
    return f"{node.name} is {node.op_type!r}"


def _other_domain(model: Any, chance: Random, box: Box) -> str:
    node = _node(model, chance)
    node.domain = chance.choice(("com.microsoft", "ai.onnx.ml", "nobody", "../../outside"))
    return f"{node.name} in {node.domain}"


def _other_opset(model: Any, chance: Random, box: Box) -> str:
    model.opset_import[0].version = chance.choice((-1, 0, 1, 7, 99, 2**31))
    return f"opset {model.opset_import[0].version}"


def _other_ir(model: Any, chance: Random, box: Box) -> str:
    model.ir_version = chance.choice((-5, 0, 2, 99, 2**62))
    return f"IR {model.ir_version}"


def _other_attribute(model: Any, chance: Random, box: Box) -> str:
    nodes = [node for node in model.graph.node if node.attribute]
    attribute = chance.choice(chance.choice(nodes).attribute)
    attribute.i = chance.choice((-1, 0, 99, 2**62, -(2**62)))
    if attribute.ints:
        attribute.ints[0] = attribute.i
    if chance.random() < 0.3:
        attribute.type = chance.choice((0, 1, 2, 4, 5, 99)) % 15
    return f"attribute {attribute.name} = {attribute.i}"


def _cut_weight(model: Any, chance: Random, box: Box) -> str:
    tensor = chance.choice(model.graph.initializer)
    tensor.raw_data = tensor.raw_data[: chance.choice((0, 1, len(tensor.raw_data) // 2))]
    return f"{tensor.name} cut to {len(tensor.raw_data)} bytes"


def _other_dims(model: Any, chance: Random, box: Box) -> str:
    tensor = chance.choice(model.graph.initializer)
    tensor.dims.append(chance.choice((0, -1, 2, 2**40, 2**62)))
    return f"{tensor.name} of {list(tensor.dims)}"


def _other_type(model: Any, chance: Random, box: Box) -> str:
    tensor = chance.choice(model.graph.initializer)
    tensor.data_type = chance.choice((0, 1, 3, 7, 8, 10, 16, 17, 23, 99))
    return f"{tensor.name} of type {tensor.data_type}"


def _other_shape(model: Any, chance: Random, box: Box) -> str:
    which = chance.choice((model.graph.input, model.graph.output))
    shape = which[0].type.tensor_type.shape
    if not shape.dim or chance.random() < 0.3:
        which[0].type.tensor_type.elem_type = chance.choice((0, 7, 8, 99))
        return f"{which[0].name} of another type"
    shape.dim[chance.randrange(len(shape.dim))].dim_value = chance.choice((0, -1, 1, 5, 2**40, 2**62))
    return f"{which[0].name} of another shape"


def _renamed(model: Any, chance: Random, box: Box) -> str:
    name = chance.choice(hostile_texts(str(box.outside))).replace("\0", "")
    which = chance.choice((model.graph.input[0], model.graph.output[0], _node(model, chance)))
    which.name = name
    return f"named {name!r}"


def _no_outputs(model: Any, chance: Random, box: Box) -> str:
    del model.graph.output[:]
    return "no outputs"


def _many_inputs(model: Any, chance: Random, box: Box) -> str:
    for index in range(5):
        model.graph.input.add(name=f"extra{index}").CopyFrom(model.graph.input[0])
    return "inputs of one name"


def _fewer_nodes(model: Any, chance: Random, box: Box) -> str:
    place = chance.randrange(len(model.graph.node))
    name = model.graph.node[place].name
    del model.graph.node[place]
    return f"without {name}"


def _shuffled(model: Any, chance: Random, box: Box) -> str:
    nodes = list(model.graph.node)
    chance.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return "nodes in another order"


def _with_function(model: Any, chance: Random, box: Box) -> str:
    """A function that calls itself, which a careless inliner follows for ever."""
    function = model.functions.add(name="Loop", domain="nobody", input=["x"], output=["y"])
    function.node.add(op_type="Loop", domain="nobody", input=["x"], output=["y"])
    model.opset_import.add(domain="nobody", version=1)
    node = _node(model, chance)
    node.op_type, node.domain = "Loop", "nobody"
    return "a function that calls itself"


def _deep(model: Any, chance: Random, box: Box) -> str:
    """Graphs within graphs."""
    import onnx

    inner = onnx.helper.make_graph([], "g", [], [])
    for _ in range(chance.choice((5, 60))):
        node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
        inner = onnx.helper.make_graph([node], "g", [], [])
        if inner.ByteSize() > 1 << 20:
            break
    model.graph.node.add().CopyFrom(onnx.helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner))
    return "graphs within graphs"


def _metadata(model: Any, chance: Random, box: Box) -> str:
    text = chance.choice(hostile_texts(str(box.outside))).replace("\0", "")
    model.metadata_props.add(key=text, value=text)
    model.producer_name = model.doc_string = text
    return f"metadata {text[:20]!r}"


_EDITS: tuple[Callable[[Any, Random, Box], str], ...] = (
    *(_other_input, _no_inputs, _other_operator, _other_domain, _other_opset, _other_ir, _other_attribute),
    *(_cut_weight, _other_dims, _other_type, _other_shape, _renamed, _no_outputs, _many_inputs, _fewer_nodes),
    *(_shuffled, _with_function, _deep, _metadata),
)

KINDS = (
    Kind("graph, bytes", 40, _stale),
    Kind("graph, bytes believed", 50, _alone),
    Kind("graph, edited", 70, _edited),
    Kind("graph, other weights", 20, _other_weights),
    Kind("graph, weights elsewhere", 20, _external),
)
