"""Q/DQ: insert QuantizeLinear and DequantizeLinear into a typed graph (`InsertQdq`), and check a graph's (`audit`).

A *pair* is a QuantizeLinear and the DequantizeLinear after it. Activations have one scale, weights one for each output
channel or one for all.

Weights stay floating-point numbers before their own pair, because TensorRT falls back to half precision where a packed
qkv is stored as integers. Scales have the type of what they scale. INT8 is always quantized from FP32, also where FP16
must be cast to it first: ONNX Runtime before 1.30 truncates FP16 on a CPU (`runtime.truncation`), and TensorRT folds
the cast (`benchmarks/truncation.py`). Names begin with the tensor's, `layer3.0.channel_func/Reshape/quantize`, or the
layer's, `layer3.0.channel_func.fc1/weight/quantize`.

`audit` compares every pair, scale and bias of a graph with its quantization plan, number by number. When only logits
are compared, a scale that is wrong by a factor of two, two channels' scales exchanged, or a pair missing on one tensor
of an attention may be smaller than the rounding error of eight bits. The limits of the formats and the axes of channels
are written twice in this file on purpose: `audit` shares none of them with what it checks (`InsertQdq`,
`fake_quantization.py`).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spach_deploy.common.errors import PrecisionError
from spach_deploy.graph.editing import name_of, operand, remove_unused_initializers, tensor_of
from spach_deploy.graph.opset import raise_opset
from spach_deploy.graph.precision.formats import FLOAT, FP16, HALF_FORMATS, decode, infer_all_types
from spach_deploy.options.specs import Precision
from spach_deploy.quantization.formats import INT8, EightBitFormat, Float32
from spach_deploy.quantization.plan import QuantizationPlan, QuantizedSite
from spach_deploy.quantization.scales import Method
from spach_deploy.quantization.sites import LayerKind

QUANTIZE, DEQUANTIZE, SCALE, ZERO = "/quantize", "/dequantize", "/scale", "/zero"
MIDDLE = 128
"""Zero point of activations and weights that are stored as uint8."""


class Operand(enum.Enum):
    """The two operands of a linear layer's product."""

    INPUT = "input"
    WEIGHTS = "weights"


_OPSET = 21
"""Opset of quantized graphs at least: QuantizeLinear takes bfloat16 from it on, and most runtimes load FP8 at it."""

_NEWER_TYPES = (ir.DataType.BFLOAT16, ir.DataType.FLOAT8E4M3FN)


def quantized_from(rest: Precision, form: EightBitFormat) -> Precision:
    """Precision of the tensors that QuantizeLinear reads, in a graph whose other tensors have precision `rest`."""
    return Precision.FP32 if rest is Precision.FP16 and form == INT8 else rest


class InsertQdq(ir.passes.InPlacePass):
    """Inserts the pairs of `plan` into a typed graph.

    Raises PrecisionError for a site whose node is missing or reads other tensors.
    """

    def __init__(self, plan: QuantizationPlan) -> None:
        self._plan = plan

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Insert the pairs into `model`, in place."""
        infer_all_types(model)
        graph = model.graph
        nodes = {name_of(node): node for node in graph}
        missing = sorted({site.node for site in self._plan.sites} - nodes.keys())
        if missing:
            raise PrecisionError(f"The graph has no node {missing[0]}, which was to be quantized.")
        _Inserter(graph, self._plan).run(nodes)
        _remove_unread_casts(graph)
        if any(value.dtype in _NEWER_TYPES for value in graph.initializers.values()):
            raise_opset(model, _OPSET)
        return ir.passes.PassResult(model, bool(self._plan.sites))


def remove_qdq(model: ir.Model) -> int:
    """Remove every pair from `model`, in place: readers get the number that was quantized. Returns how many there were.

    Raises PrecisionError for a DequantizeLinear without a QuantizeLinear, whose numbers are not in the graph.
    """
    graph = model.graph
    pairs = [node for node in graph if node.op_type == "DequantizeLinear"]
    for node in pairs:
        quantize = operand(node, 0).producer()
        if quantize is None or quantize.op_type != "QuantizeLinear":
            raise PrecisionError(f"{node.name} reads integers that no node of the graph makes.")
        node.outputs[0].replace_all_uses_with(operand(quantize, 0))
        graph.remove(node, safe=True)
        if not quantize.outputs[0].uses():
            graph.remove(quantize, safe=True)
    remove_unused_initializers(graph)
    return len(pairs)


def widen_biases(model: ir.Model, plan: QuantizationPlan) -> None:
    """Give the quantized layers of an FP32 graph the biases of the plan, in place: those of the graph are rounded."""
    nodes = {name_of(node): node for node in model.graph}
    for site in plan.sites:
        added = _added(nodes[site.node]) if site.correction and site.bias is not None and site.node in nodes else None
        if added is not None:
            values = np.array(site.correction) + (np.array(site.bias) if site.bias else 0.0)
            shape = tensor_of(added).shape.numpy()
            added.const_value = ir.Tensor(values.astype(np.float32).reshape(shape), name=added.name)


def _remove_unread_casts(graph: ir.Graph) -> None:
    for node in tuple(graph):
        made = node.outputs[0]
        if node.op_type == "Cast" and not made.uses() and not made.is_graph_output():
            graph.remove(node, safe=True)


class _Inserter:
    def __init__(self, graph: ir.Graph, plan: QuantizationPlan) -> None:
        self._graph, self._plan = graph, plan
        self._pairs: dict[tuple[ir.Value, tuple[float, ...], bool], ir.Value] = {}

    def run(self, nodes: Mapping[str, ir.Node]) -> None:
        attention: dict[tuple[ir.Node, int], float] = {}
        sites: dict[ir.Node, QuantizedSite] = {}
        for site in self._plan.sites:
            if site.kind is LayerKind.ATTENTION:
                attention.update(_attention_inputs(site, nodes[site.node]))
            else:
                sites[nodes[site.node]] = site
        for node in nodes.values():
            if node in sites:
                self._quantize_inputs(node, sites[node])
            for index in range(len(node.inputs)):
                if (node, index) in attention:
                    self._quantize(node, index, (attention[node, index],))

    def _quantize_inputs(self, node: ir.Node, site: QuantizedSite) -> None:
        slot = 1 if site.kind is LayerKind.TOKEN_LINEAR else 0
        axis, stem = weight_axis(site, node) if site.per_channel else None, f"{site.module}/weight"
        unsigned = unsigned_operand(site, node, self._plan)
        self._quantize(node, slot, (site.tensors[0].scale,), unsigned=unsigned is Operand.INPUT)
        self._quantize(node, 1 - slot, site.weight_scales, axis, stem, unsigned=unsigned is Operand.WEIGHTS)

    def _quantize(
        self,
        node: ir.Node,
        index: int,
        scales: tuple[float, ...],
        axis: int | None = None,
        stem: str = "",
        *,
        unsigned: bool = False,
    ) -> None:
        """Put a pair before input `index` of `node`; all readers with the same scales share one pair.

        New names begin with `stem`, or with the tensor's name without it.
        """
        value = operand(node, index)
        key = (value, scales, unsigned)
        if key not in self._pairs:
            stem = stem or (f"io/{value.name}" if value.is_graph_input() else name_of(value))
            pair = self._pair(value, scales, axis, stem, unsigned=unsigned)
            self._graph.insert_before(node, pair)
            self._pairs[key] = pair[-1].outputs[0]
        node.replace_input_with(index, self._pairs[key])

    def _pair(
        self, value: ir.Value, scales: tuple[float, ...], axis: int | None, stem: str, *, unsigned: bool
    ) -> list[ir.Node]:
        """QuantizeLinear and DequantizeLinear of `value`, after a cast to FP32 where one is needed."""
        scale = self._constant(_scale_tensor(stem + SCALE, scales, value.dtype or FLOAT, axis))
        shape = () if axis is None else (len(scales),)
        zero = self._constant(
            _zero_tensor(stem + ZERO, shape, ir.DataType.UINT8 if unsigned else self._plan.form.dtype)
        )
        source, numbers, casts, zeros = value, scale, list[ir.Node](), [zero]
        if value.dtype == FP16.dtype and self._plan.form == INT8:
            source, casts = _in_fp32(value, f"{stem}{QUANTIZE}/to_fp32")
            numbers = self._constant(ir.Tensor(decode(tensor_of(scale)), name=f"{scale.name}/fp32"))
            zeros = []  # 0 is the default; with it given, ONNX Runtime up to 1.20 reads both scales as FP32 and crashes
        quantize = _node("QuantizeLinear", [source, numbers, zero], stem + QUANTIZE, axis)
        dequantize = _node("DequantizeLinear", [quantize.outputs[0], scale, *zeros], stem + DEQUANTIZE, axis)
        return [*casts, quantize, dequantize]

    def _constant(self, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.val(tensor.name, const_value=tensor)
        self._graph.register_initializer(value)
        return value


def _in_fp32(value: ir.Value, cast: str) -> tuple[ir.Value, list[ir.Node]]:
    """`value` in FP32, and the new nodes that make it: none where it was cast from FP32, else a Cast called `cast`.

    With a softmax that is cast to FP16 and back, TensorRT for RTX 1.7 does not fuse the attention.
    """
    made = value.producer()
    if made is not None and made.op_type == "Cast" and operand(made, 0).dtype == FLOAT:
        return operand(made, 0), []
    node = ir.node("Cast", [value], {"to": FLOAT}, outputs=[ir.val(cast, FLOAT)], name=cast)
    return node.outputs[0], [node]


def _node(operator: str, inputs: list[ir.Value], name: str, axis: int | None) -> ir.Node:
    options = None if axis is None else {"axis": axis}
    return ir.node(operator, inputs, options, outputs=[ir.val(name)], name=name)


def weight_axis(site: QuantizedSite, node: ir.Node) -> int:
    """Axis of the output channels in a site's weights: 0, or 1 for the transposed weight of a MatMul."""
    return 1 if is_for_cpu(site, node) else 0


def is_for_cpu(site: QuantizedSite, node: ir.Node) -> bool:
    """Whether a linear layer has the form that ONNX Runtime computes in eight bits on CPUs."""
    return site.kind is LayerKind.LINEAR and node.op_type == "MatMul"


def unsigned_operand(site: QuantizedSite, node: ir.Node, plan: QuantizationPlan) -> Operand | None:
    """The operand that is stored as uint8 with zero point 128; None for a layer that is not for CPUs.

    Processors with VNNI multiply unsigned inputs by signed weights, and OpenVINO computes only that in integers.
    Without VNNI those products are added in pairs in 16 bits and overflow (on ms_hybrid_s relative L2 0.053 instead of
    0.015), so weights are the unsigned operand unless `plan.vnni` is set.
    """
    if not is_for_cpu(site, node):
        return None
    return Operand.INPUT if plan.vnni else Operand.WEIGHTS


def _attention_inputs(site: QuantizedSite, softmax: ir.Node) -> dict[tuple[ir.Node, int], float]:
    """(node, input index) -> scale, for q k^T and the product with v; there may be casts around the softmax."""
    before, after = operand(softmax, 0).producer(), softmax.outputs[0].consumers()[0]
    if before is not None and before.op_type == "Cast":
        before = operand(before, 0).producer()
    if after.op_type == "Cast":
        after = after.outputs[0].consumers()[0]
    if before is None or (before.op_type, after.op_type) != ("MatMul", "MatMul"):
        raise PrecisionError(f"{site.module} is no attention any more, so it cannot be quantized.")
    q, k, weights, v = (tensor.scale for tensor in site.tensors)
    return {(before, 0): q, (before, 1): k, (after, 0): weights, (after, 1): v}


def _scale_tensor(name: str, scales: tuple[float, ...], kind: ir.DataType, axis: int | None) -> ir.TensorProtocol:
    values: Float32 = np.array(scales if axis is not None else scales[0], np.float32)
    if kind == FLOAT:
        return ir.Tensor(values, name=name)
    form = HALF_FORMATS[kind]
    return form.tensor(name, form.encode(np.atleast_1d(values)).reshape(values.shape))


def _zero_tensor(name: str, shape: tuple[int, ...], kind: ir.DataType) -> ir.TensorProtocol:
    if kind == ir.DataType.UINT8:
        return ir.Tensor(np.full(shape, MIDDLE, np.uint8), name=name)
    return ir.Tensor(np.zeros(shape, np.uint8).view(kind.numpy()), kind, name=name)


Float = TypeVar("Float", float, NDArray[np.float64])

_SHOWN = 5
_LARGEST = {"int8": float(np.iinfo(np.int8).max), "fp8": 448.0}
_UNSIGNED_ZERO = -int(np.iinfo(np.int8).min)
"""Zero point of uint8: x means what int8 x - 128 means."""

SMALLEST = 2.0**-24
"""FP16's smallest number."""

_INPUT, _WEIGHTS = "input", "weights"
_ROUNDOFF = 2.0**-10  # relative rounding of scales in FP32 and FP16; in bfloat16 the next
_BF16_ROUNDOFF = 2.0**-7
_HALF_STEP = SMALLEST / 2  # absolute rounding of scales below FP16's normal numbers


def audit(model: ir.Model, plan: QuantizationPlan) -> tuple[str, ...]:
    """Differences between a quantized graph and its plan, one sentence each; empty where there are none.

    At most `_SHOWN` sentences, and one that counts the others.
    """
    auditor = _Auditor(model, plan)
    findings = [finding for site in plan.sites for finding in (*auditor.site(site), *auditor.record(site))]
    findings = list(dict.fromkeys((*findings, *auditor.strays())))  # both nodes of a pair report the same scale
    more = len(findings) - _SHOWN
    return (*findings[:_SHOWN], *([f"and {more} more differences"] if more > 0 else []))


class _Auditor:
    def __init__(self, model: ir.Model, plan: QuantizationPlan) -> None:
        self._plan = plan
        self._limit = _LARGEST[plan.form.name]
        self._nodes = {name_of(node): node for node in model.graph}
        self._pairs = [node for node in model.graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
        self._accounted: set[ir.Value] = set()

    def site(self, site: QuantizedSite) -> Iterator[str]:
        node = self._nodes.get(site.node)
        if node is None:
            yield f"{site.module}: the graph has no node {site.node}"
        elif site.kind is LayerKind.ATTENTION:
            yield from self._attention(site, node)
        else:
            slot = 1 if site.kind is LayerKind.TOKEN_LINEAR else 0
            yield from self._scales(site, node, slot, (site.tensors[0].scale,), _INPUT)
            yield from self._scales(site, node, 1 - slot, site.weight_scales, _WEIGHTS)
            yield from self._weight_range(site, node, 1 - slot)
            yield from self._bias(site, node)

    def _attention(self, site: QuantizedSite, softmax: ir.Node) -> Iterator[str]:
        scores = _through_casts_back(operand(softmax, 0))
        mixed = _through_casts_on(softmax.outputs[0])
        if scores is None or mixed is None:
            yield f"{site.module}: its products are not where they were"
            return
        places = ((scores, 0, "q"), (scores, 1, "k"), (mixed, 0, "softmax"), (mixed, 1, "v"))
        for (node, slot, what), tensor in zip(places, site.tensors, strict=True):
            yield from self._scales(site, node, slot, (tensor.scale,), what)

    def _bias(self, site: QuantizedSite, node: ir.Node) -> Iterator[str]:
        """Compare the bias that the layer adds with bias plus correction of the plan, within rounding."""
        if not site.correction or site.bias is None:
            return
        added = _added(node)
        if added is None:
            yield f"{site.module}: it has no bias to hold its correction"
            return
        found = decode(tensor_of(added)).astype(np.float64).reshape(-1)
        correction = np.array(site.correction)
        bias = np.array(site.bias) if site.bias else np.zeros_like(correction)
        if not found.shape == bias.shape == correction.shape:
            yield (
                f"{site.module}: {found.size} biases in the graph, {bias.size} in the record, and {correction.size}"
                " corrections"
            )
            return
        wrong = np.flatnonzero(~(np.abs(found - (bias + correction)) <= _bias_room(tensor_of(added), bias, correction)))
        if len(wrong):
            channel = int(wrong[0])
            yield (
                f"{site.module}: its bias is {found[channel]:.6g} in channel {channel}; the record has"
                f" {bias[channel]:.6g} and a correction of {correction[channel]:.6g}; {len(wrong)} channels in all"
            )

    def record(self, site: QuantizedSite) -> Iterator[str]:
        """Check the plan by its own figures: scales of activations must fit `clip`, and `clip` must fit `largest`."""
        for tensor in site.tensors:
            held, seen = tensor.scale * self._limit, tensor.largest
            if seen == 0 or 0 < tensor.scale <= SMALLEST:
                continue
            room = self._room(seen, _ROUNDOFF)
            if not 0 < held <= seen + room:
                yield f"{site.module}: its record holds {held:.4g}, where the largest that was seen is {seen:.4g}"
            elif self._plan.method is Method.MAX and held < seen - room:
                yield f"{site.module}: its record clips at {held:.4g} what was seen up to {seen:.4g}"

    def _room(self, largest: Float, roundoff: float) -> Float:
        """How far `limit` times a scale may be from the number that it was made for: scales and weights are rounded."""
        return roundoff * largest + self._limit * _HALF_STEP

    def _scales(
        self, site: QuantizedSite, node: ir.Node, slot: int, expected: tuple[float, ...], what: str
    ) -> Iterator[str]:
        dequantize = operand(node, slot).producer()
        quantize = None if dequantize is None else operand(dequantize, 0).producer()
        operators = [None if part is None else part.op_type for part in (quantize, dequantize)]
        if dequantize is None or quantize is None or operators != ["QuantizeLinear", "DequantizeLinear"]:
            yield f"{site.module}: no pair before its {what}"
            return
        self._accounted.update((quantize.outputs[0], dequantize.outputs[0]))
        for pair in (quantize, dequantize):
            yield from self._compare(site, pair, expected, what)

    def _compare(self, site: QuantizedSite, pair: ir.Node, expected: tuple[float, ...], what: str) -> Iterator[str]:
        tensor = operand(pair, 1).const_value
        given = pair.inputs[2] if len(pair.inputs) > 2 else None
        zero = None if given is None else given.const_value
        if tensor is None:
            yield f"{site.module}: the scale of its {what} is no constant"
            return
        kind, middle = self._plan.form.dtype, 0
        if what == self._unsigned(site):
            kind, middle = ir.DataType.UINT8, _UNSIGNED_ZERO
        # DequantizeLinear without a zero point takes 0, of the type that it reads.
        is_implied = zero is None and middle == 0 and pair.op_type == "DequantizeLinear"
        if not is_implied and (zero is None or zero.dtype != kind):
            yield f"{site.module}: the pair of its {what} is not {self._plan.form.name}"
        elif zero is not None and (zero.numpy().view(np.uint8) != middle).any():
            yield f"{site.module}: the zero point of its {what} is not {middle}"
        found = np.atleast_1d(decode(tensor)).astype(np.float64)
        limit = _roundoff(tensor.dtype)
        yield from _differences(f"{site.module}: {what}", found, np.array(expected), limit)
        if len(expected) > 1 and pair.attributes.get_int("axis", 1) != _output_axis(site, self._nodes[site.node]):
            yield f"{site.module}: the scales of its {what} belong to another axis"

    def _unsigned(self, site: QuantizedSite) -> str:
        """Name of the operand that is uint8: weights of a linear layer for CPUs, or its input with
        VNNI; "" for none.
        """
        if site.kind is not LayerKind.LINEAR or self._nodes[site.node].op_type != "MatMul":
            return ""
        return _INPUT if self._plan.vnni else _WEIGHTS

    def _weight_range(self, site: QuantizedSite, node: ir.Node, slot: int) -> Iterator[str]:
        """Compare weights' scales with those that follow from the weights: also a wrong scale in the plan is found."""
        weights = _weights(operand(node, slot))
        if weights is None:
            return
        values = decode(tensor_of(weights))
        values = np.moveaxis(values, _output_axis(site, node), 0)
        rows = np.abs(values.reshape(len(values), -1)).max(axis=1).astype(np.float64)
        largest = rows if site.per_channel else rows.max(keepdims=True)
        if len(largest) != len(site.weight_scales):
            yield f"{site.module}: {len(largest)} output channels, {len(site.weight_scales)} scales in the record"
            return
        scales = np.array(site.weight_scales)
        room = self._room(largest, 2 * _roundoff(tensor_of(weights).dtype))
        fits = np.abs(largest - scales * self._limit) <= room
        tiny = (scales > 0) & (scales <= SMALLEST)
        wrong = np.flatnonzero(~fits & (largest > 0) & ~tiny)
        if len(wrong):
            yield (
                f"{site.module}: the scale of output channel {wrong[0]} fits weights up to "
                f"{scales[wrong[0]] * self._limit:.4g}; they reach {largest[wrong[0]]:.4g}"
            )

    def strays(self) -> Iterator[str]:
        """Pairs in the graph that belong to no layer of the plan."""
        for node in self._pairs:
            if node.outputs[0] not in self._accounted:
                yield f"{node.name or node.outputs[0].name} belongs to no layer of the record"


def _through_casts_back(value: ir.Value) -> ir.Node | None:
    node = value.producer()
    return operand(node, 0).producer() if node is not None and node.op_type == "Cast" else node


def _through_casts_on(value: ir.Value) -> ir.Node | None:
    """The node that reads `value` after casts and Q/DQ nodes: the product with v."""
    for _ in range(4):
        readers = value.consumers()
        if len(readers) != 1:
            return None
        if readers[0].op_type == "MatMul":
            return readers[0]
        value = readers[0].outputs[0]
    return None


def _added(node: ir.Node) -> ir.Value | None:
    """The constant that is added to a layer's products: the layer's third input, or the constant of an Add after it."""
    if node.op_type != "MatMul":
        return _first_constant(node.inputs[2:])
    readers = node.outputs[0].consumers()
    while len(readers) == 1 and readers[0].op_type == "Cast":
        readers = readers[0].outputs[0].consumers()
    return _first_constant([value for reader in readers if reader.op_type == "Add" for value in reader.inputs])


def _first_constant(values: Sequence[ir.Value | None]) -> ir.Value | None:
    return next((value for value in values if value is not None and value.is_initializer()), None)


def _weights(value: ir.Value) -> ir.Value | None:
    """The initializer that a pair, and a Cast before it, turn into `value`; None where there is none."""
    dequantize = value.producer()
    quantize = None if dequantize is None else operand(dequantize, 0).producer()
    if quantize is None:
        return None
    cast = operand(quantize, 0).producer()
    source = operand(quantize if cast is None else cast, 0)
    return source if source.is_initializer() else None


def _output_axis(site: QuantizedSite, node: ir.Node) -> int:
    """Axis of the output channels in a layer's weights, by ONNX's definition of the operator: last for x W, first for
    W x and for a convolution, by transB for a Gemm.
    """
    if node.op_type == "Gemm":
        return 0 if node.attributes.get_int("transB", 0) == 1 else 1
    return 1 if node.op_type == "MatMul" and site.kind is not LayerKind.TOKEN_LINEAR else 0


def _bias_room(
    tensor: ir.TensorProtocol, bias: NDArray[np.float64], correction: NDArray[np.float64]
) -> NDArray[np.float64]:
    """How far `tensor` may be from bias + correction: the sum is made in FP32 and rounded to the tensor's type."""
    in_fp32 = 2.0**-23 * (np.abs(bias) + np.abs(correction))
    room: NDArray[np.float64] = in_fp32 + _roundoff(tensor.dtype) * np.abs(bias + correction) + _HALF_STEP
    return in_fp32 if tensor.dtype == ir.DataType.FLOAT else room


def _roundoff(kind: ir.DataType) -> float:
    return _BF16_ROUNDOFF if kind in HALF_FORMATS and HALF_FORMATS[kind].name == "bf16" else _ROUNDOFF


def _differences(what: str, found: NDArray[np.float64], expected: NDArray[np.float64], limit: float) -> Iterator[str]:
    if found.shape != expected.shape:
        yield f"{what}: {_number(found)} in the graph, {_number(expected)} in the record"
        return
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = found / expected
    wrong = np.flatnonzero(~(np.abs(ratio - 1) <= limit))
    if len(wrong):
        index = int(wrong[0])
        where = f", channel {index}" if len(expected) > 1 else ""
        times = f" ({ratio[index]:.3g} times)" if math.isfinite(ratio[index]) else ""
        more = f"; {len(wrong)} channels in all" if len(wrong) > 1 else ""
        yield f"{what}: scale {found[index]:.4g}{where}, {expected[index]:.4g} in the record{times}{more}"


def _number(scales: NDArray[np.float64]) -> str:
    return "one scale" if scales.size == 1 else f"{scales.size} scales"
