"""The layers that pay in eight bits on TensorRT for RTX: those whose input is narrow already where it is written.

Arithmetic halves in any layer; what decides is kernels and memory. A product in eight bits takes no epilogue, and its
input must be quantized by a kernel that runs anyway. By the compiler's own schedule (`benchmarks/eight_bits.py`, for
RTX 1.7.1):

- A layer that reads attention's result pays: the attention kernel writes eight bits itself.
- A layer that reads a product through bias and activation alone (fc2) pays: the product before it writes eight bits
  from its epilogue, and the widest tensor of the network is halved.
- A layer that reads a LayerNorm (qkv, fc1) does not: the norm writes eight bits, but the product loses its epilogue or,
  as qkv, its place before attention: one kernel more each, and at 224 pixels more memory than in half precision.
- On Turing (sm75) all layers pay: half precision has no such epilogue there that eight bits could lose.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir

from spach_deploy.graph.editing import name_of, product_of
from spach_deploy.options.specs import ComputeCapability
from spach_deploy.quantization.sites import LayerKind, Site

REASON = "cost: in eight bits it takes TensorRT for RTX another kernel"

_EPILOGUES_FROM = ComputeCapability(8, 0)


def paying(model: ir.Model, sites: Sequence[Site], gpus: Collection[ComputeCapability]) -> frozenset[str]:
    """Modules of the `sites` of the FP32 graph `model` that pay on all `gpus` (none: those of the default)."""
    if any(gpu < _EPILOGUES_FROM for gpu in gpus):
        return frozenset(site.module for site in sites)
    nodes = {name_of(node): node for node in model.graph}
    return frozenset(site.module for site in sites if _pays(nodes[site.node], site))


def _pays(node: ir.Node, site: Site) -> bool:
    read = node.inputs[site.slot]
    if site.kind not in (LayerKind.LINEAR, LayerKind.TOKEN_LINEAR) or read is None:
        return False
    return _is_of_attention(read) or product_of(read) is not None


def _is_of_attention(value: ir.Value) -> bool:
    """Whether `value` is the result of a product of a Softmax, moved at most."""
    node = value.producer()
    while node is not None and node.op_type in ("Reshape", "Transpose"):
        source = node.inputs[0]
        node = None if source is None else source.producer()
    weights = None if node is None or node.op_type != "MatMul" else node.inputs[0]
    softmax = None if weights is None else weights.producer()
    return softmax is not None and softmax.op_type == "Softmax"
