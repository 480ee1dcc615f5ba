"""Times of a runtime's own layers, told by the PyTorch modules that they compute.

Nodes of a bundle's graph are called after their modules, `layer3.5.spatial_func.qkv/Gemm`, and runtimes call what they
make of them after the nodes: `InsertedPrecisionFreeCast_stem.proj/Conv_nchwc`, `layer1.0.norm2/Mul+layer1.0.fc1/Gemm`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from spach_deploy.onnx_graph.names import owner

ADDED = "(added by the runtime)"
_BEFORE_SLASH = re.compile(r"([\w.]+)/")


def owners_of(graph: Path) -> frozenset[str]:
    """Modules that an ONNX file's nodes are called after."""
    import onnx

    names = (node.name for node in onnx.load(graph, load_external_data=False).graph.node)
    return frozenset(owner(name) for name in names if "/" in name)


def module_of(layer: str, owners: Iterable[str]) -> str | None:
    """The module that a layer computes: of several, the one that they all are in. None where the name tells nothing."""
    told = {found for words in _BEFORE_SLASH.findall(layer) if (found := _longest(words, owners))}
    if not told:
        return None
    if len(told) == 1:
        return told.pop()
    paths = [name.split(".") for name in sorted(told)]
    shared = next((i for i, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), len(min(paths)))
    return ".".join(paths[0][:shared]) or "model"


def _longest(words: str, owners: Iterable[str]) -> str:
    """The owner that `words` end with; something may be put before a name, such as `fused_`."""
    fitting = (name for name in owners if words == name or re.search(rf"(?<![.a-z0-9]){re.escape(name)}$", words))
    return max(fitting, key=len, default="")


def by_module(layers: Mapping[str, float], owners: frozenset[str]) -> dict[str, float]:
    """Sums of seconds by module, the longest first; what no module is behind is one entry, `ADDED`."""
    sums: dict[str, float] = {}
    for layer, seconds in layers.items():
        module = module_of(layer, owners) or ADDED
        sums[module] = sums.get(module, 0.0) + seconds
    return dict(sorted(sums.items(), key=lambda entry: -entry[1]))
