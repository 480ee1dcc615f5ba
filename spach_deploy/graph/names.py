"""Node and tensor names that begin with the PyTorch module path, such as `layer3.5.spatial_func.qkv/Gemm`.

torch.onnx writes the stack of modules into each node's metadata, from which the node and its output get their name.
TensorRT makes layer names of node names, so profiles and errors of an engine name modules.
"""

from __future__ import annotations

import ast
import itertools
from collections import Counter
from collections.abc import Collection

import onnx_ir as ir

_SCOPES = "pkg.torch.onnx.name_scopes"


def module_path(node: ir.Node) -> str | None:
    """Path of the module that `node` came from, read from torch.onnx's metadata: "" for the model, None if unknown."""
    entry = node.metadata_props.get(_SCOPES)
    if entry is None:
        return None
    scopes: list[str] = ast.literal_eval(entry)
    return scopes[-2] if len(scopes) > 1 else ""


def name_by_module(model: ir.Model) -> None:
    """Rename nodes to `path/OpType` (numbered where one module has several) and tensors after their node, in place."""
    kept = {*model.graph.inputs, *model.graph.outputs}
    seen: Counter[str] = Counter()
    path_of: dict[ir.Value | None, str] = {}
    for node in model.graph:
        path = module_path(node)
        if path is None:  # made by a decomposition: it gets the module of the node that makes its input
            path = next((path_of[value] for value in node.inputs if value in path_of), "")
        path_of.update(dict.fromkeys(node.outputs, path))
        node.name = _unique(f"{path or 'model'}/{node.op_type}", seen)
        node.metadata_props.clear()
        for index, output in enumerate(node.outputs):
            if output.name and output not in kept:
                output.name = node.name if len(node.outputs) == 1 else f"{node.name}.{index}"


def _unique(name: str, seen: Counter[str]) -> str:
    seen[name] += 1
    return name if seen[name] == 1 else f"{name}_{seen[name]}"


def owner(node_name: str) -> str:
    """Module path in a name that `name_by_module` gave: everything before the first slash."""
    return node_name.split("/", 1)[0]


def name_unowned(model: ir.Model, modules: Collection[str]) -> None:
    """Rename nodes that the simplifier made, in place, after the module of their weights, else of the node that reads
    them, else of the one that they read. `modules`: paths of all modules.
    """
    known = {*modules, "model"}
    nodes = list(model.graph)
    paths = {node: path for node in nodes if (path := owner(node.name or "")) in known}
    taken = {node.name for node in paths}
    unowned = [node for node in nodes if node not in paths]
    for node in unowned:
        weights = (value.name.rpartition(".")[0] for value in node.inputs if value is not None and value.name)
        if path := next((path for path in weights if path in known), ""):
            paths[node] = path
    for node in reversed(unowned):
        readers = [reader for reader in node.outputs[0].consumers() if reader in paths]
        if node not in paths and readers:
            paths[node] = paths[readers[0]]
    for node in unowned:
        made = (value.producer() for value in node.inputs if value is not None)
        path = paths.setdefault(node, next((paths[other] for other in made if other in paths), "model"))
        name, numbers = f"{path}/{node.op_type}", itertools.count(2)
        while name in taken:
            name = f"{path}/{node.op_type}_{next(numbers)}"
        node.name = name
        taken.add(name)
