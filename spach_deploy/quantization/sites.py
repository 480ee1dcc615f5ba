"""Sites: the layers of an FP32 graph that can be quantized, and the rules which of them are quantized by default.

A site is a product of an activation with constant weights, or an attention's two products. The rules by kind:

- *linear* (qkv, proj, fc1, fc2) and *token linear* (of spatial MLPs): quantized. They are nearly all arithmetic.
- *head*, a linear layer on one vector for each image whose result no other layer reads: in float. It is 0.01 % of the
  multiplications, and its error is not averaged out (ms_hybrid_s has a relative L2 of 0.018 with the head quantized
  and 0.015 without).
- *convolution* (stem, downsampling): in float. They are 1.6 % of the multiplications. A downsampling reads the residual
  stream itself (with it, ms_hybrid_s's relative L2 rises from 0.018 to 0.021); the stem in eight bits costs one kernel
  and 16 MB more at batch 8. TensorRT runs FP8 convolutions in half anyway.
- *depthwise*: in float. It has nine multiplications for each number and is bound by memory, its shifted form fuses with
  its neighbours, and a residual folded into its kernel would be rounded to eight bits.
- *attention* (q, k, v and the softmax's result): in float. With these four tensors in eight bits TensorRT for RTX 1.7
  has no fused kernel (ms_hybrid_s: 239 kernels instead of 177), and the logits' error grows. Either all four tensors
  are quantized or none.

Inputs of residual additions and of LayerNorm are no sites: quantizing them costs accuracy and saves nothing.
"""

from __future__ import annotations

import dataclasses
import enum
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from spach_deploy.common.errors import UsageError
from spach_deploy.graph.editing import name_of, operand, owner, shapes_at_batch_one
from spach_deploy.quantization.formats import FP8, EightBitFormat

UNCERTAIN = "rule: which axis of its weight is summed over is not certain"

FOLDED = "rule: its weights are not those of one layer, as where a BatchNorm is folded into a convolution"

REPEATED = "rule: it runs several times, on inputs of other ranges"


class LayerKind(str, enum.Enum):
    """What a site is in the model; see the module's docstring."""

    LINEAR = "linear"
    TOKEN_LINEAR = "token linear"
    CONVOLUTION = "convolution"
    DEPTHWISE = "depthwise"
    ATTENTION = "attention"


@dataclasses.dataclass(frozen=True)
class Site:
    """A layer that can be quantized.

    `activation`: the tensor that input `slot` of `node` reads. `weight`: (outputs, inputs, ...). `channel_axis`: the
    axis of the activation that is summed over, with axis 1 of the weight; None for an attention. `macs`:
    multiplications for one image. `bias`: the constant that is added to the products, "" without one. An attention has
    no weights: `tensors` are its activations, `products` the nodes that multiply, and `node` is the softmax. `unfit`:
    why it must stay in float, whatever is asked for. `is_head`: whether its result is the answer, or nearly.
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
    unfit: str = ""
    is_head: bool = False

    @property
    def measured(self) -> tuple[str, ...]:
        """The tensors that calibration has to measure."""
        return self.tensors or (self.activation,)


def find_sites(model: ir.Model) -> tuple[Site, ...]:
    """All sites of an FP32 graph, in the order of its nodes."""
    shapes = shapes_at_batch_one(model)
    finder = _Finder(shapes)
    found = {node: site for node in model.graph if (site := finder.site(node)) is not None}
    read = _read_by_products(model)
    return tuple(
        dataclasses.replace(site, is_head=True) if _is_head(node, site, shapes) and not read & {*node.outputs} else site
        for node, site in found.items()
    )


def _read_by_products(model: ir.Model) -> set[ir.Value | None]:
    """The tensors that any product or convolution is computed from."""
    read: set[ir.Value | None] = set()
    for node in reversed(list(model.graph)):
        if node.op_type in ("Gemm", "MatMul", "Conv") or read & {*node.outputs}:
            read.update(node.inputs)
    return read


def _is_head(node: ir.Node, site: Site, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a site is a linear layer on one vector for each image."""
    return site.kind is LayerKind.LINEAR and node.op_type == "Gemm" and shapes[site.activation][0] == 1


class _Finder:
    """Makes sites of nodes. `shapes`: of every tensor at batch 1, by name."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def site(self, node: ir.Node) -> Site | None:
        if node.op_type == "Gemm" and is_weight(node.inputs[1]):
            return self._weighted(node, LayerKind.LINEAR, 0, 1, -1, "" if _is_linear(node) else UNCERTAIN)
        if node.op_type == "Split" and is_weight(node.inputs[0]):
            return self._parted(node)
        if node.op_type == "Conv" and is_weight(node.inputs[1]):
            kind = LayerKind.DEPTHWISE if node.attributes.get_int("group", 1) > 1 else LayerKind.CONVOLUTION
            return self._weighted(node, kind, 0, 1, 1)
        if node.op_type == "MatMul" and is_weight(node.inputs[0]):
            shapes = [self._shape(value) for value in node.inputs if value is not None]
            certain = [len(shape) for shape in shapes] == [2, 3]
            return self._weighted(node, LayerKind.TOKEN_LINEAR, 1, 0, 1, "" if certain else UNCERTAIN)
        if node.op_type == "MatMul" and is_weight(node.inputs[1]):
            return self._weighted(node, LayerKind.LINEAR, 0, 1, -1, UNCERTAIN)
        if node.op_type == "Softmax":
            return self._attention(node)
        return None

    def _shape(self, value: ir.Value) -> tuple[int, ...]:
        return self._shapes[name_of(value)]

    def _weighted(
        self, node: ir.Node, kind: LayerKind, slot: int, weight: int, channel_axis: int, unfit: str = ""
    ) -> Site:
        name, weights = name_of(node), operand(node, weight)
        outputs, per_output = math.prod(self._shape(node.outputs[0])), math.prod(self._shape(weights)[1:])
        return Site(
            *(owner(name), name, kind, name_of(node.inputs[slot]), slot, name_of(weights), channel_axis),
            macs=outputs * per_output,
            bias=_bias(node),
            unfit=unfit,
        )

    def _parted(self, split: ir.Node) -> Site | None:
        """The linear layer whose weight `split` splits by rows, for several products of one input (`tokens_first`).

        The site's node is the first of the products.
        """
        first = split.outputs[0].consumers()[0]
        if first.op_type != "Gemm":
            return None
        weight, source = operand(split, 0), operand(first, 0)
        return Site(
            *(owner(name_of(split)), name_of(first), LayerKind.LINEAR, name_of(source), 0, name_of(weight), -1),
            macs=self._shape(source)[0] * math.prod(self._shape(weight)),
        )

    def _attention(self, softmax: ir.Node) -> Site | None:
        """The attention softmax(q k^T) v around a Softmax; None where its nodes are others."""
        before, after = operand(softmax, 0).producer(), softmax.outputs[0].consumers()
        if before is None or before.op_type != "MatMul" or [node.op_type for node in after] != ["MatMul"]:
            return None
        scores, values = self._shape(before.outputs[0]), self._shape(operand(after[0], 1))
        tensors = tuple(map(name_of, (*before.inputs, *after[0].inputs)))
        return Site(
            *(owner(name_of(softmax)), name_of(softmax), LayerKind.ATTENTION, name_of(softmax.outputs[0]), 0, "", None),
            macs=2 * math.prod(scores) * values[-1],
            tensors=tensors,
            products=(name_of(before), name_of(after[0])),
        )


def _is_linear(gemm: ir.Node) -> bool:
    """Whether a Gemm multiplies rows by the transpose of its weight, (outputs, inputs), as linear layers do."""
    options = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
    options |= {name: attribute.value for name, attribute in gemm.attributes.items()}
    return options == {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}


def is_weight(value: ir.Value | None) -> bool:
    """Whether a tensor is an FP32 initializer."""
    return value is not None and value.is_initializer() and value.dtype == ir.DataType.FLOAT


def _bias(node: ir.Node) -> str:
    """Name of the third input of `node`, or of the constant that the Add after it adds; "" without either."""
    behind = node.inputs[2:]
    if node.op_type == "MatMul":
        adds = (reader for reader in node.outputs[0].consumers() if reader.op_type == "Add")
        behind = [value for add in adds for value in add.inputs]
    return next((name_of(value) for value in behind if is_weight(value)), "")


@dataclasses.dataclass(frozen=True)
class Selection:
    """The user's choice of layers: patterns of module paths (`layer3.*.spatial_func.proj`), as fnmatch reads them."""

    keep_float: tuple[str, ...] = ()
    quantize: tuple[str, ...] = ()

    def chosen(self, sites: Sequence[Site], form: EightBitFormat) -> dict[str, str]:
        """By node name of a site: "" where it will be quantized, else the reason why not.

        `keep_float` has priority over `quantize`, and both over the rules. UsageError for a pattern that matches no
        site, and for one that asks for FP8 in a layer that TensorRT would run in half.
        """
        self._check(sites)
        return {site.node: self._reason(site, form) for site in sites}

    def names(self, module: str) -> bool:
        """Whether `quantize` names this module."""
        return _matches(module, self.quantize)

    def _reason(self, site: Site, form: EightBitFormat) -> str:
        if site.unfit:
            return site.unfit
        if _matches(site.module, self.keep_float):
            return "asked: --keep-float"
        if self.names(site.module):
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
    if site.is_head:
        return "rule: the head's error is the answer's"
    if site.kind is LayerKind.ATTENTION:
        return "rule: the fused attention kernel stays in half"
    if site.kind is LayerKind.CONVOLUTION and form == FP8:
        return "rule: TensorRT runs FP8 convolutions in half"
    if site.kind is LayerKind.CONVOLUTION:
        return "rule: a convolution costs accuracy and saves no kernel"
    return ""
