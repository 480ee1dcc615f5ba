"""The layers that can be computed in eight bits, found in the FP32 graph by what they are in the model.

A site is a product of an activation with constant weights. Which of them are quantized without being asked for:

- *linear* (qkv, proj, fc1, fc2) and *token linear* (the spatial MLP's): they carry nearly all arithmetic;
- the *head* not: it is 0.01 % of the multiplications, and nothing averages its error (without it ms_hybrid_s has a
  relative L2 of 0.015 instead of 0.018);
- *convolution* (stem, downsampling): never by default. They are 1.6 % of the multiplications; a downsampling's input is
  the residual stream itself (on ms_hybrid_s relative L2 0.018 becomes 0.021), and the stem in eight bits costs a kernel
  and 16 MB at batch 8 instead of saving any. TensorRT runs FP8 convolutions in half anyway;
- *depthwise*: never by default. It has nine multiplications a number and is bound by memory, its shifted form fuses
  with its neighbours, and an identity folded into its kernel would be rounded to eight bits with it;
- *attention* (the two products of a block: q, k, v and the softmax's result): never by default. With all four tensors
  in eight bits TensorRT for RTX 1.7 finds no fused kernel (ms_hybrid_s: 239 kernels instead of 177), and the logits
  lose more. All four or none in any case.

Inputs of residual additions and of LayerNorm are no sites: quantizing them costs accuracy and buys nothing.
"""

from __future__ import annotations

import dataclasses
import enum
import fnmatch
import math
from collections.abc import Iterable, Sequence

from onnx import ModelProto, NodeProto, TensorProto

from spach_deploy.common.errors import UsageError
from spach_deploy.graph.edit import attributes, initializers, producers, shapes_at_batch_one
from spach_deploy.graph.names import owner
from spach_deploy.quantization.formats import FP8, EightBitFormat

HEAD = "head"


class LayerKind(str, enum.Enum):
    """What a site is in the model."""

    LINEAR = "linear"
    TOKEN_LINEAR = "token linear"
    CONVOLUTION = "convolution"
    DEPTHWISE = "depthwise"
    ATTENTION = "attention"


@dataclasses.dataclass(frozen=True)
class Site:
    """A weighted layer. `activation` is the tensor that input `slot` of `node` reads; weights are channel by axis 0.

    `channel_axis`: the activation's axis that meets the weights' inputs, axis 1 of the weight; None for an attention.
    `macs`: multiplications for one image. `bias`: the constant that is added to the products, "" where there is none.
    An attention has no weights: its tensors are in `tensors`, and in `products` the nodes that multiply, `node` being
    the softmax between them.
    """

    module: str
    node: str
    kind: LayerKind
    activation: str
    slot: int
    weight: str
    channel_axis: int | None
    macs: int
    tensors: tuple[str, ...] = ()
    products: tuple[str, ...] = ()
    bias: str = ""

    @property
    def measured(self) -> tuple[str, ...]:
        """The tensors whose ranges calibration has to learn."""
        return self.tensors or (self.activation,)


def find_sites(model: ModelProto) -> tuple[Site, ...]:
    """All sites of an FP32 graph, in its order."""
    finder = _Finder(model)
    return tuple(site for node in model.graph.node if (site := finder.site(node)) is not None)


class _Finder:
    def __init__(self, model: ModelProto) -> None:
        self._weights = {
            name: tensor for name, tensor in initializers(model.graph).items() if tensor.data_type == TensorProto.FLOAT
        }
        self._shapes = shapes_at_batch_one(model)
        self._made = producers(model.graph)
        self._readers: dict[str, list[NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def site(self, node: NodeProto) -> Site | None:
        if node.op_type == "Gemm" and node.input[1] in self._weights:
            return self._weighted(node, LayerKind.LINEAR, 0, 1, -1)
        if node.op_type == "Split" and node.input[0] in self._weights:
            return self._parted(node)
        if node.op_type == "Conv" and node.input[1] in self._weights:
            depthwise = int(str(attributes(node).get("group", 1))) > 1
            kind = LayerKind.DEPTHWISE if depthwise else LayerKind.CONVOLUTION
            return self._weighted(node, kind, 0, 1, 1)
        if node.op_type == "MatMul" and node.input[0] in self._weights:
            return self._weighted(node, LayerKind.TOKEN_LINEAR, 1, 0, 1)
        if node.op_type == "Softmax":
            return self._attention(node)
        return None

    def _weighted(self, node: NodeProto, kind: LayerKind, slot: int, weight: int, channel_axis: int) -> Site:
        outputs = math.prod(self._shapes[node.output[0]])
        per_output = math.prod(self._weights[node.input[weight]].dims[1:])
        return Site(
            *(owner(node.name), node.name, kind, node.input[slot], slot, node.input[weight], channel_axis),
            macs=outputs * per_output,
            bias=self._bias(node),
        )

    def _bias(self, node: NodeProto) -> str:
        """A layer's own third input, or what the Add behind a product adds."""
        adds = (reader for reader in self._readers.get(node.output[0], []) if reader.op_type == "Add")
        behind = [name for add in adds for name in add.input] if node.op_type == "MatMul" else node.input[2:]
        return next((name for name in behind if name in self._weights), "")

    def _parted(self, split: NodeProto) -> Site | None:
        """A linear layer in several products of one input, by rows of its weight; known by the first of them."""
        first = self._readers[split.output[0]][0]
        if first.op_type != "Gemm":
            return None
        weight = split.input[0]
        rows = self._shapes[first.input[0]][0]
        return Site(
            *(owner(split.name), first.name, LayerKind.LINEAR, first.input[0], 0, weight, -1),
            macs=rows * math.prod(self._weights[weight].dims),
        )

    def _attention(self, softmax: NodeProto) -> Site | None:
        """softmax(q k^T) v, seen from its middle."""
        before = self._made.get(softmax.input[0])
        after = self._readers.get(softmax.output[0], [])
        if before is None or before.op_type != "MatMul" or len(after) != 1 or after[0].op_type != "MatMul":
            return None
        scores, values = self._shapes[before.output[0]], self._shapes[after[0].input[1]]
        tensors = (before.input[0], before.input[1], after[0].input[0], after[0].input[1])
        return Site(
            *(owner(softmax.name), softmax.name, LayerKind.ATTENTION, softmax.output[0], 0, "", None),
            macs=2 * math.prod(scores) * values[-1],
            tensors=tensors,
            products=(before.name, after[0].name),
        )


@dataclasses.dataclass(frozen=True)
class Selection:
    """What the user asked for: patterns of module names (`layer3.*.spatial_func.proj`), as fnmatch reads them."""

    keep_float: tuple[str, ...] = ()
    quantize: tuple[str, ...] = ()

    def chosen(self, sites: Sequence[Site], form: EightBitFormat) -> dict[str, str]:
        """Site by node name -> "" where it is quantized, else the reason why not.

        `keep_float` wins over `quantize`, and both over the rules. UsageError for a pattern that matches no site, and
        for one that asks of FP8 what TensorRT would run in half.
        """
        self._check(sites)
        return {site.node: self._reason(site, form) for site in sites}

    def _reason(self, site: Site, form: EightBitFormat) -> str:
        if _matches(site.module, self.keep_float):
            return "asked: --keep-float"
        if _matches(site.module, self.quantize):
            if form == FP8 and site.kind in (LayerKind.CONVOLUTION, LayerKind.DEPTHWISE):
                raise UsageError(
                    f"{site.module} is a convolution, and TensorRT runs FP8 convolutions in half.",
                    "Leave it out of --quantize, or use --int8.",
                )
            return ""
        return _rule(site, form)

    def _check(self, sites: Sequence[Site]) -> None:
        modules = sorted({site.module for site in sites})
        for option, patterns in (("--keep-float", self.keep_float), ("--quantize", self.quantize)):
            for pattern in patterns:
                if not fnmatch.filter(modules, pattern):
                    raise UsageError(
                        f"{option} {pattern!r} matches no layer that could be quantized.",
                        f"Layers are named like {', '.join(modules[:3])}.",
                    )


def _matches(module: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(module, pattern) for pattern in patterns)


def _rule(site: Site, form: EightBitFormat) -> str:
    if site.kind is LayerKind.DEPTHWISE:
        return "rule: a depthwise convolution fuses with its neighbours in half"
    if site.module == HEAD:
        return "rule: the head's error is the answer's"
    if site.kind is LayerKind.ATTENTION:
        return "rule: the fused attention kernel stays in half"
    if site.kind is LayerKind.CONVOLUTION and form == FP8:
        return "rule: TensorRT runs FP8 convolutions in half"
    if site.kind is LayerKind.CONVOLUTION:
        return "rule: a convolution costs accuracy and saves no kernel"
    return ""
