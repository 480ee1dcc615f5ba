"""A graph held against its record: every pair, every scale, every bias, every layer.

A scale that is off by two, two channels' scales exchanged or a pair that is missing on one tensor of an attention may
hide in the noise of eight bits when only logits are compared. Here they cannot: what the graph holds is compared with
what the record says it should, number by number. The formats' own numbers and where a layer's channels lie are stated
here once more on purpose: what writes the graph (`insert.py`, `correct.py`) and this share none of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from spach_deploy.onnx_graph.graph import attributes, consumers, initializers, producers
from spach_deploy.precision.formats import HALF_FORMATS, decode
from spach_deploy.quantization.plan import QuantizationPlan, QuantizedSite
from spach_deploy.quantization.scales import Method
from spach_deploy.quantization.sites import Kind

Float = TypeVar("Float", float, NDArray[np.float64])

_SHOWN = 5
_LARGEST = {"int8": float(np.iinfo(np.int8).max), "fp8": 448.0}
_UNSIGNED_ZERO = -int(np.iinfo(np.int8).min)
"""uint8 x stands for the int8 x - 128."""

SMALLEST = 2.0**-24
"""FP16's smallest number."""

_INPUT, _WEIGHTS = "input", "weights"
_ROUNDOFF = 2.0**-10  # scales are rounded to the type of what they scale; bfloat16 to eight bits of mantissa
_BF16_ROUNDOFF = 2.0**-7
_HALF_STEP = SMALLEST / 2  # a scale below FP16's normal numbers is off by as much


def audit(model: ModelProto, plan: QuantizationPlan) -> tuple[str, ...]:
    """What differs between a graph and its record, one sentence each, most telling first; empty where nothing does."""
    auditor = _Auditor(model, plan)
    findings = [finding for site in plan.sites for finding in (*auditor.site(site), *auditor.record(site))]
    findings = list(dict.fromkeys((*findings, *auditor.strays())))  # both nodes of a pair read the same scale
    more = len(findings) - _SHOWN
    return (*findings[:_SHOWN], *([f"and {more} more differences"] if more > 0 else []))


class _Auditor:
    def __init__(self, model: ModelProto, plan: QuantizationPlan) -> None:
        self._plan = plan
        self._limit = _LARGEST[plan.form.name]
        self._nodes = {node.name: node for node in model.graph.node}
        self._pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
        self._made = producers(model.graph)
        self._readers = consumers(model.graph)
        self._constants = initializers(model.graph)
        self._accounted: set[str] = set()

    def site(self, site: QuantizedSite) -> Iterator[str]:
        node = self._nodes.get(site.node)
        if node is None:
            yield f"{site.module}: the graph has no node {site.node}"
        elif site.kind is Kind.ATTENTION:
            yield from self._attention(site, node)
        else:
            slot = 1 if site.kind is Kind.TOKEN_LINEAR else 0
            yield from self._scales(site, node, slot, (site.tensors[0].scale,), _INPUT)
            yield from self._scales(site, node, 1 - slot, site.weight_scales, _WEIGHTS)
            yield from self._weight_range(site, node, 1 - slot)
            yield from self._bias(site, node)

    def _attention(self, site: QuantizedSite, softmax: NodeProto) -> Iterator[str]:
        scores = self._through_casts_back(softmax.input[0])
        mixed = self._through_casts_on(softmax.output[0])
        if scores is None or mixed is None:
            yield f"{site.module}: its products are not where they were"
            return
        places = ((scores, 0, "q"), (scores, 1, "k"), (mixed, 0, "softmax"), (mixed, 1, "v"))
        for (node, slot, what), tensor in zip(places, site.tensors, strict=True):
            yield from self._scales(site, node, slot, (tensor.scale,), what)

    def _through_casts_back(self, name: str) -> NodeProto | None:
        node = self._made.get(name)
        return self._made.get(node.input[0]) if node is not None and node.op_type == "Cast" else node

    def _through_casts_on(self, name: str) -> NodeProto | None:
        """The product with v, behind casts and the pair of the softmax's result."""
        for _ in range(4):
            readers = self._readers.get(name, [])
            if len(readers) != 1:
                return None
            if readers[0].op_type == "MatMul":
                return readers[0]
            name = readers[0].output[0]
        return None

    def _bias(self, site: QuantizedSite, node: NodeProto) -> Iterator[str]:
        """Whether the layer adds its recorded bias and correction, to the rounding of the type that holds the sum."""
        if not site.correction or site.bias is None:
            return
        name = self._added(node)
        if name is None:
            yield f"{site.module}: it has no bias to hold its correction"
            return
        found = decode(self._constants[name]).astype(np.float64).reshape(-1)
        correction = np.array(site.correction)
        bias = np.array(site.bias) if site.bias else np.zeros_like(correction)
        if not found.shape == bias.shape == correction.shape:
            yield (
                f"{site.module}: {found.size} biases in the graph, {bias.size} in the record, and {correction.size}"
                " corrections"
            )
            return
        wrong = np.flatnonzero(
            ~(np.abs(found - (bias + correction)) <= _bias_room(self._constants[name], bias, correction))
        )
        if len(wrong):
            channel = int(wrong[0])
            yield (
                f"{site.module}: its bias is {found[channel]:.6g} in channel {channel}; the record has"
                f" {bias[channel]:.6g} and a correction of {correction[channel]:.6g}; {len(wrong)} channels in all"
            )

    def _added(self, node: NodeProto) -> str | None:
        """The constant that is added to a layer's products: the layer's own third input, or that of an Add behind."""
        if node.op_type != "MatMul":
            return next((name for name in node.input[2:] if name in self._constants), None)
        name = node.output[0]
        while len(readers := self._readers.get(name, [])) == 1 and readers[0].op_type == "Cast":
            name = readers[0].output[0]
        adds = (reader for reader in readers if reader.op_type == "Add")
        return next((name for add in adds for name in add.input if name in self._constants), None)

    def record(self, site: QuantizedSite) -> Iterator[str]:
        """Whether activations' scales hold what calibration saw, by the record's own figures."""
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
        """How far what a scale holds may be from what it was made for: scales are rounded, and so are weights."""
        return roundoff * largest + self._limit * _HALF_STEP

    def _scales(
        self, site: QuantizedSite, node: NodeProto, slot: int, expected: tuple[float, ...], what: str
    ) -> Iterator[str]:
        back = self._made.get(node.input[slot])
        forth = None if back is None else self._made.get(back.input[0])
        if back is None or forth is None or (forth.op_type, back.op_type) != ("QuantizeLinear", "DequantizeLinear"):
            yield f"{site.module}: no pair before its {what}"
            return
        self._accounted.update((forth.output[0], back.output[0]))
        for pair in (forth, back):
            yield from self._compare(site, pair, expected, what)

    def _compare(self, site: QuantizedSite, pair: NodeProto, expected: tuple[float, ...], what: str) -> Iterator[str]:
        tensor = self._constants.get(pair.input[1])
        zero = self._constants.get(pair.input[2]) if len(pair.input) > 2 else None
        if tensor is None:
            yield f"{site.module}: the scale of its {what} is no constant"
            return
        kind, middle = self._plan.form.onnx_type, 0
        if what == self._unsigned(site):
            kind, middle = TensorProto.UINT8, _UNSIGNED_ZERO
        is_implied = zero is None and middle == 0 and pair.op_type == "DequantizeLinear"  # of the type of what it reads
        if not is_implied and (zero is None or zero.data_type != kind):
            yield f"{site.module}: the pair of its {what} is not {self._plan.form.name}"
        elif zero is not None and (np.frombuffer(zero.raw_data, np.uint8) != middle).any():
            yield f"{site.module}: the zero point of its {what} is not {middle}"
        found = np.atleast_1d(decode(tensor)).astype(np.float64)
        limit = _roundoff(tensor.data_type)
        yield from _differences(f"{site.module}: {what}", found, np.array(expected), limit)
        if len(expected) > 1 and attributes(pair).get("axis", 1) != _output_axis(site, self._nodes[site.node]):
            yield f"{site.module}: the scales of its {what} belong to another axis"

    def _unsigned(self, site: QuantizedSite) -> str:
        """The operand that is uint8: for CPUs a linear layer's weights, or its input where there is VNNI."""
        if site.kind is not Kind.LINEAR or self._nodes[site.node].op_type != "MatMul":
            return ""
        return _INPUT if self._plan.vnni else _WEIGHTS

    def _weight_range(self, site: QuantizedSite, node: NodeProto, slot: int) -> Iterator[str]:
        """Scales follow from the weights themselves: the record's own scales are checked by them."""
        name = self._weight_name(node.input[slot])
        if name is None:
            return
        weight = decode(self._constants[name]) if self._constants[name].data_type in HALF_FORMATS else None
        values = numpy_helper.to_array(self._constants[name]) if weight is None else weight
        values = np.moveaxis(values, _output_axis(site, node), 0)
        rows = np.abs(values.reshape(len(values), -1)).max(axis=1).astype(np.float64)
        largest = rows if site.per_channel else rows.max(keepdims=True)
        if len(largest) != len(site.weight_scales):
            yield f"{site.module}: {len(largest)} output channels, {len(site.weight_scales)} scales in the record"
            return
        scales = np.array(site.weight_scales)
        room = self._room(largest, 2 * _roundoff(self._constants[name].data_type))
        fits = np.abs(largest - scales * self._limit) <= room
        tiny = (scales > 0) & (scales <= SMALLEST)
        wrong = np.flatnonzero(~fits & (largest > 0) & ~tiny)
        if len(wrong):
            yield (
                f"{site.module}: the scale of output channel {wrong[0]} fits weights up to "
                f"{scales[wrong[0]] * self._limit:.4g}; they reach {largest[wrong[0]]:.4g}"
            )

    def _weight_name(self, name: str) -> str | None:
        back = self._made.get(name)
        forth = None if back is None else self._made.get(back.input[0])
        if forth is None:
            return None
        cast = self._made.get(forth.input[0])
        source = forth.input[0] if cast is None else cast.input[0]
        return source if source in self._constants else None

    def strays(self) -> Iterator[str]:
        """Pairs that no layer of the record has."""
        for node in self._pairs:
            if node.output[0] not in self._accounted:
                yield f"{node.name or node.output[0]} belongs to no layer of the record"


def _output_axis(site: QuantizedSite, node: NodeProto) -> int:
    """Axis of a layer's output channels in its weights, by what ONNX does with them: x W has them last, W x and W of a
    convolution first, and a Gemm as its transB says.
    """
    if node.op_type == "Gemm":
        return 0 if attributes(node).get("transB", 0) == 1 else 1
    return 1 if node.op_type == "MatMul" and site.kind is not Kind.TOKEN_LINEAR else 0


def _bias_room(tensor: TensorProto, bias: NDArray[np.float64], correction: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far a sum may be from exact: it is made in FP32 and rounded to the tensor's type."""
    in_fp32 = 2.0**-23 * (np.abs(bias) + np.abs(correction))
    room: NDArray[np.float64] = in_fp32 + _roundoff(tensor.data_type) * np.abs(bias + correction) + _HALF_STEP
    return in_fp32 if tensor.data_type == TensorProto.FLOAT else room


def _roundoff(kind: int) -> float:
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
