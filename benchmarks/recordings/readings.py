"""What is read from what a command printed and wrote, without what differs from run to run or machine to machine.

Nothing here imports spach_deploy: any version is read in the same way.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
from onnx import AttributeProto, NodeProto, TensorProto, ValueInfoProto, numpy_helper

Value: TypeAlias = "str | int | bool | None"

FIGURE = "#"
_ALWAYS = (
    (re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d[\d.+:Z]*"), "TIME"),
    (re.compile(r"\b\d{4}-\d\d-\d\d\b"), "DATE"),
    (re.compile(r"\b\d+\.\d+\.\d+(\.\d+)*(\+\w+)?\b"), "VERSION"),
)
_FIGURES = (
    (re.compile(r"\b[0-9a-f]{12,64}\b"), "HASH"),
    (re.compile(r"\b\w+\.(jpg|png)\b|\bimage \d+\b"), "IMAGE"),
    (re.compile(r"(?<![\w.])[-+]?(\d[\d,]*\.\d+|\d+(?=e[-+]\d))(e[-+]?\d+)?(?![\w.]*\.\w)"), FIGURE),
    (re.compile(r"(?<![\w.])\d[\d,]*(?= (s|ms|kB|MB|GB|min)\b)"), FIGURE),
    (re.compile(r"(?<=\S) {2,}|(?<=\S) +(?=#)"), "  "),
)
_EXACT_FIGURES = ("model/hyperparameters", "preprocessing", "precision/margin", "precision/limit", "hyperparameters")
_MEASURED = re.compile(r"(^|_)bytes$|^worst_image$|^image$")
_PROGRESS = re.compile(r"^.* left\.\n", re.MULTILINE)
_LONGEST_TEXT = 8_000


def plain(text: str, places: Mapping[str, str], *, figures: bool) -> str:
    """Text without progress, times, versions and these folders; without measured figures where `figures` says so."""
    text = _PROGRESS.sub("", text)
    for place, name in places.items():
        text = text.replace(place, name)
    for pattern, name in (*_ALWAYS, *(_FIGURES if figures else ())):
        text = pattern.sub(name, text)
    return text


def flattened(content: object, path: str = "") -> Iterator[tuple[str, object]]:
    """`a/b/0/c` and its value, of everything in parsed JSON."""
    if isinstance(content, dict) and content:
        for key, value in content.items():
            yield from flattened(value, f"{path}/{key}" if path else str(key))
    elif isinstance(content, list) and content:
        for number, value in enumerate(content):
            yield from flattened(value, f"{path}/{number}")
    else:
        yield path, content


def read_json(text: str, places: Mapping[str, str]) -> dict[str, Value]:
    """Every key with its value: hashes, names and counts as they are, what was measured as `#`."""
    return {path: _value(path, value, places) for path, value in flattened(json.loads(text))}


def _value(path: str, value: object, places: Mapping[str, str]) -> Value:
    name = path.rpartition("/")[2]
    if isinstance(value, float) and (path.startswith(_EXACT_FIGURES) or name.endswith("_factor")):
        return repr(value)
    if isinstance(value, float) or _MEASURED.search(name):
        return value if name == "bytes_moved" and isinstance(value, int) else FIGURE
    if name == "sha256" and not path.endswith("model.onnx/sha256"):
        return FIGURE  # of a file with figures in it
    if isinstance(value, str):
        is_hash = re.fullmatch(r"[0-9a-f]{64}", value)
        return value if is_hash else plain(value, places, figures=True)
    return value if isinstance(value, (int, bool, type(None))) else json.dumps(value)


def read_folder(folder: Path, places: Mapping[str, str]) -> dict[str, str]:
    """Each file of a folder: its hash, or what it says where that is short, or that it is there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): _file(path, places) for path in files}


def _file(path: Path, places: Mapping[str, str]) -> str:
    if path.suffix == ".onnx":
        return sha256(path.read_bytes())
    if path.suffix in (".npz", ".bin", ".plan", ".json", ".html", ".log", ".svg") or "golden_" in path.name:
        return "file"  # with figures in it; JSON has a reading of its own
    try:
        text = plain(path.read_text(encoding="utf-8"), places, figures=True)
    except UnicodeDecodeError:
        return sha256(path.read_bytes())
    return text if len(text) <= _LONGEST_TEXT else sha256(text.encode())


def sha256(content: bytes) -> str:
    """In hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def read_graph(path: Path, places: Mapping[str, str]) -> dict[str, object]:
    """A graph as it computes: what its writer may order or describe differently is apart from its `digest`."""
    model = onnx.load(path)
    graph = model.graph
    nodes = [_node(node) for node in graph.node]
    initializers = {tensor.name: _tensor(tensor) for tensor in sorted(graph.initializer, key=lambda t: t.name)}
    interface = {"inputs": _infos(graph.input), "outputs": _infos(graph.output)}
    versions = {"ir": model.ir_version, **{entry.domain or "ai.onnx": entry.version for entry in model.opset_import}}
    parts = [sorted(nodes), {name: text.rpartition(" ")[0] for name, text in initializers.items()}, interface, versions]
    return {
        "sha256": sha256(path.read_bytes()),
        "digest": _digest(parts),
        "order of nodes": _digest(nodes),
        "value_info": _digest(sorted(_infos(graph.value_info))),
        "doc strings": _digest([model.doc_string, graph.doc_string, *(node.doc_string for node in graph.node)]),
        "metadata": {e.key: plain(e.value, places, figures=True) for e in sorted(model.metadata_props, key=str)},
        "versions": versions,
        **interface,
        "nodes": sorted(nodes),
        "initializers": initializers,
    }


def _digest(content: object) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode())


def _infos(infos: Iterable[ValueInfoProto]) -> list[str]:
    return [f"{info.name}: {_type(info)}" for info in infos]


def _type(info: ValueInfoProto) -> str:
    tensor = info.type.tensor_type
    return f"{TensorProto.DataType.Name(tensor.elem_type)}{[d.dim_param or d.dim_value for d in tensor.shape.dim]}"


def _node(node: NodeProto) -> str:
    """`layer1.0/Add: Add(a, b) -> (c) axis=1`."""
    attributes = " ".join(_attribute(a) for a in sorted(node.attribute, key=lambda a: a.name))
    kind = f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
    return f"{node.name}: {kind}({', '.join(node.input)}) -> ({', '.join(node.output)}) {attributes}".rstrip()


def _attribute(attribute: AttributeProto) -> str:
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, TensorProto):
        return f"{attribute.name}={_tensor(value)}"
    text = str(value)
    return f"{attribute.name}={text if len(text) < 100 else sha256(text.encode())}"


def _tensor(tensor: TensorProto) -> str:
    """`FLOAT [64, 3] SHA-256 MEAN`, the last of its absolute values, so that it can be said how much it changed."""
    values = numpy_helper.to_array(tensor)
    mean = float(np.abs(values.astype(np.float64)).mean()) if values.size else 0.0
    dtype = TensorProto.DataType.Name(tensor.data_type)
    return f"{dtype} {list(tensor.dims)} {sha256(values.tobytes())} {mean:.9g}"
