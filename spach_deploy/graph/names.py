"""Node and tensor names that begin with the PyTorch module path.

The exporter writes the module stack into each node's metadata; here it becomes the node's name,
`layer3.5.spatial_func.qkv/Gemm`, and the name of its output. TensorRT's layer names come from node names, so a profile
or an error of the engine speaks in module names.
"""

from __future__ import annotations

import ast
from collections import Counter

from onnx import ModelProto, NodeProto

_SCOPES = "pkg.torch.onnx.name_scopes"


def module_path(node: NodeProto) -> str | None:
    """Path of the module that `node` came from, from exporter metadata: "" for the model itself, None if unknown."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            scopes: list[str] = ast.literal_eval(entry.value)
            return scopes[-2] if len(scopes) > 1 else ""
    return None


def name_by_module(model: ModelProto) -> None:
    """Rename nodes to `path/OpType` (numbered where one module has several) and tensors after their node, in place."""
    graph = model.graph
    kept = {value.name for value in (*graph.input, *graph.output)}
    renamed: dict[str, str] = {}
    seen: Counter[str] = Counter()
    path_of: dict[str, str] = {}
    for node in graph.node:
        path = module_path(node)
        if path is None:  # made by a decomposition: it belongs where its input was made
            path = next((path_of[name] for name in node.input if name in path_of), "")
        path_of.update(dict.fromkeys(node.output, path))
        node.name = _unique(f"{path or 'model'}/{node.op_type}", seen)
        for index, output in enumerate(node.output):
            if output and output not in kept:
                renamed[output] = node.name if len(node.output) == 1 else f"{node.name}.{index}"
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
        del node.metadata_props[:]
    del graph.value_info[:]


def _unique(name: str, seen: Counter[str]) -> str:
    seen[name] += 1
    return name if seen[name] == 1 else f"{name}_{seen[name]}"


def owner(node_name: str) -> str:
    """Module path in a node or tensor name made here: everything before the first slash."""
    return node_name.split("/", 1)[0]
