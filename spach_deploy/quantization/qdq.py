"""QuantizeLinear and DequantizeLinear in a typed graph: activations with one scale, weights with one a channel or one.

Weights stay floating-point numbers in front of their own pair, because TensorRT falls back to half where a packed qkv
comes as integers already. Scales have the type of what they scale, but INT8 is made of FP32, also where that is FP16
cast to it: ONNX Runtime before 1.30 truncates FP16 on a CPU (`runtime.truncation`), and TensorRT folds the cast
(`benchmarks/truncation.py`). Names begin with the tensor's, `layer3.0.channel_func/Reshape/quantize`, or the layer's,
`layer3.0.channel_func.fc1/weight/quantize`.

A graph held against its record: every pair, every scale, every bias, every layer.

A scale that is off by two, two channels' scales exchanged or a pair that is missing on one tensor of an attention may
hide in the noise of eight bits when only logits are compared. Here they cannot: what the graph holds is compared with
what the record says it should, number by number. The formats' own numbers and where a layer's channels lie are stated
here once more on purpose: what writes the graph (`insert.py`, `correct.py`) and this share none of them.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from spach_deploy.common.errors import PrecisionError
from spach_deploy.graph.edit import attributes, consumers, initializers, producers
from spach_deploy.graph.opset import raise_opset_of_proto
from spach_deploy.graph.precision.elements import element_types
from spach_deploy.graph.precision.formats import FLOAT, FP16, HALF_FORMATS, decode
from spach_deploy.options.specs import Precision
from spach_deploy.quantization.formats import INT8, EightBitFormat, Float32
from spach_deploy.quantization.plan import QuantizationPlan, QuantizedSite
from spach_deploy.quantization.scales import Method
from spach_deploy.quantization.sites import LayerKind

QUANTIZE, DEQUANTIZE, SCALE, ZERO = "/quantize", "/dequantize", "/scale", "/zero"
MIDDLE = 128
"""Zero point of unsigned numbers."""


class Operand(enum.Enum):
    """What a linear layer multiplies."""

    INPUT = "input"
    WEIGHTS = "weights"


_OPSET = 21
"""QuantizeLinear takes bfloat16 from this opset on, and most runtimes have FP8 from it on."""


def quantized_from(rest: Precision, form: EightBitFormat) -> Precision:
    """Precision of the numbers that become eight bits, where those that are not quantized have precision `rest`."""
    return Precision.FP32 if rest is Precision.FP16 and form == INT8 else rest


def insert_qdq(typed: ModelProto, plan: QuantizationPlan) -> ModelProto:
    """`typed` with the pairs of `plan`; `typed` itself is not changed.

    Raises PrecisionError for a site whose node is not there or reads other tensors.
    """
    return _Inserter(typed, plan).run()


class _Inserter:
    def __init__(self, typed: ModelProto, plan: QuantizationPlan) -> None:
        self._source, self._plan = typed, plan
        self._types = element_types(typed)
        self._constants = initializers(typed.graph)
        self._sites = {site.node: site for site in plan.sites}
        self._attention = self._attention_inputs(plan.sites)
        self._inputs = {value.name for value in typed.graph.input}
        casts = (node for node in typed.graph.node if node.op_type == "Cast")
        self._wide = {node.output[0]: node.input[0] for node in casts if self._types[node.input[0]] == FLOAT}
        self._pairs: dict[tuple[str, tuple[float, ...], bool], str] = {}
        self._nodes: list[NodeProto] = []
        self._added: list[TensorProto] = []

    def run(self) -> ModelProto:
        left = set(self._sites)
        for node in self._source.graph.node:
            twin = NodeProto()
            twin.CopyFrom(node)
            site = self._sites.get(node.name)
            if site is not None:
                left.discard(node.name)
                self._quantize_inputs(twin, site)
            for index, name in enumerate(node.input):
                scale = self._attention.get((node.name, index))
                if scale is not None:
                    twin.input[index] = self._pair(name, (scale,), None)
            self._nodes.append(twin)
        if left:
            raise PrecisionError(f"The graph has no node {sorted(left)[0]}, which was to be quantized.")
        return self._assembled()

    def _quantize_inputs(self, node: NodeProto, site: QuantizedSite) -> None:
        if site.kind is LayerKind.ATTENTION:
            return  # its products read the pairs, see _attention_inputs
        slot = 1 if site.kind is LayerKind.TOKEN_LINEAR else 0
        weight = 1 - slot
        axis, stem = weight_axis(site, node) if site.per_channel else None, f"{site.module}/weight"
        unsigned = unsigned_operand(site, node, self._plan)
        scale = (site.tensors[0].scale,)
        node.input[slot] = self._pair(node.input[slot], scale, None, unsigned=unsigned is Operand.INPUT)
        unsigned_weights = unsigned is Operand.WEIGHTS
        node.input[weight] = self._pair(node.input[weight], site.weight_scales, axis, stem, unsigned=unsigned_weights)

    def _attention_inputs(self, sites: Iterable[QuantizedSite]) -> dict[tuple[str, int], float]:
        """(product, input) -> scale, for both products of every attention that is quantized."""
        made = {name: node for node in self._source.graph.node for name in node.output}
        readers: dict[str, list[NodeProto]] = {}
        for node in self._source.graph.node:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        found: dict[tuple[str, int], float] = {}
        for site in sites:
            if site.kind is LayerKind.ATTENTION:
                scores, mixed = _products(site, made, readers)
                q, k, weights, v = (tensor.scale for tensor in site.tensors)
                found.update({(scores, 0): q, (scores, 1): k, (mixed, 0): weights, (mixed, 1): v})
        return found

    def _pair(
        self, name: str, scales: tuple[float, ...], axis: int | None, stem: str = "", *, unsigned: bool = False
    ) -> str:
        """Name of the tensor that has been through eight bits; one pair for all that read it with the same scales.

        `stem` begins the new names; without it, they begin with the tensor's.
        """
        if (name, scales, unsigned) in self._pairs:
            return self._pairs[name, scales, unsigned]
        stem = stem or (f"io/{name}" if name in self._inputs else name)
        kind = self._types[name]
        scale = _scale_tensor(stem + SCALE, scales, kind, axis)
        zero = _middle_tensor if unsigned else _zero_tensor
        self._added += [scale, zero(stem + ZERO, len(scales), self._plan.form, axis)]
        stored, back = stem + QUANTIZE, stem + DEQUANTIZE
        forth_inputs, back_inputs = [name, scale.name, stem + ZERO], [stored, scale.name, stem + ZERO]
        if kind == FP16.onnx_type and self._plan.form == INT8:
            forth_inputs[:2] = self._in_fp32(name, scale, stored)
            del back_inputs[
                2
            ]  # 0 goes without saying; with it ONNX Runtime to 1.20 reads both scales as FP32, and ends
        nodes = (("QuantizeLinear", forth_inputs, stored), ("DequantizeLinear", back_inputs, back))
        for operator, inputs, target in nodes:
            node = helper.make_node(operator, inputs, [target], name=target)
            if axis is not None:
                node.attribute.append(helper.make_attribute("axis", axis))
            self._nodes.append(node)
        self._pairs[name, scales, unsigned] = back
        return back

    def _in_fp32(self, name: str, scale: TensorProto, stem: str) -> tuple[str, str]:
        """Names of a tensor and its scale in FP32: what FP16 was cast from, where it was, else the same numbers.

        (A softmax that is cast to FP16 and back costs TensorRT for RTX 1.7 the fused attention.)
        """
        wide = numpy_helper.from_array(decode(scale), f"{scale.name}/fp32")
        self._added.append(wide)
        if name in self._wide:
            return self._wide[name], wide.name
        cast = f"{stem}/to_fp32"
        self._nodes.append(helper.make_node("Cast", [name], [cast], name=cast, to=FLOAT))
        return cast, wide.name

    def _assembled(self) -> ModelProto:
        model = ModelProto(ir_version=self._source.ir_version, opset_import=self._source.opset_import)
        graph = model.graph
        graph.name = self._source.graph.name
        read = {name for node in self._nodes for name in node.input} | {
            value.name for value in self._source.graph.output
        }
        graph.node.extend(node for node in self._nodes if node.op_type != "Cast" or node.output[0] in read)
        graph.initializer.extend(self._source.graph.initializer)
        graph.initializer.extend(self._added)
        graph.input.extend(self._source.graph.input)
        graph.output.extend(self._source.graph.output)
        if any(tensor.data_type in (TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN) for tensor in self._added):
            raise_opset_of_proto(model, _OPSET)
        return model


def weight_axis(site: QuantizedSite, node: NodeProto) -> int:
    """Axis of the output channels in a site's weights: linear layers may stand there transposed, as a MatMul."""
    return 1 if is_for_cpu(site, node) else 0


def is_for_cpu(site: QuantizedSite, node: NodeProto) -> bool:
    """Whether a linear layer has the form that ONNX Runtime computes in eight bits on CPUs."""
    return site.kind is LayerKind.LINEAR and node.op_type == "MatMul"


def unsigned_operand(site: QuantizedSite, node: NodeProto, plan: QuantizationPlan) -> Operand | None:
    """Which operand of a layer is stored as uint8 around 128, which are the same numbers: one of those for CPUs.

    Processors with VNNI multiply unsigned inputs by signed weights, and OpenVINO computes nothing else in integers.
    Without VNNI those products are added in pairs in 16 bits, which overflow (on ms_hybrid_s relative L2 0.053 instead
    of 0.015), so weights are the unsigned ones unless the plan says that there is VNNI.
    """
    if not is_for_cpu(site, node):
        return None
    return Operand.INPUT if plan.vnni else Operand.WEIGHTS


def _products(site: QuantizedSite, made: dict[str, NodeProto], readers: dict[str, list[NodeProto]]) -> tuple[str, str]:
    """Names of q k^T and of the product with v; casts to and from FP32 may stand around the softmax."""
    softmax = next((node for node in made.values() if node.name == site.node), None)
    if softmax is None:
        raise PrecisionError(f"The graph has no node {site.node}, which was to be quantized.")
    before, after = made[softmax.input[0]], readers[softmax.output[0]][0]
    if before.op_type == "Cast":
        before = made[before.input[0]]
    if after.op_type == "Cast":
        after = readers[after.output[0]][0]
    if before.op_type != "MatMul" or after.op_type != "MatMul":
        raise PrecisionError(f"{site.module} is no attention any more, so it cannot be quantized.")
    return before.name, after.name


def _scale_tensor(name: str, scales: tuple[float, ...], kind: int, axis: int | None) -> TensorProto:
    values: Float32 = np.array(scales if axis is not None else scales[0], np.float32)
    if kind == FLOAT:
        return helper.make_tensor(name, FLOAT, values.shape, values.tobytes(), raw=True)
    form = HALF_FORMATS[kind]
    return form.tensor(name, form.encode(np.atleast_1d(values)).reshape(values.shape))


def _zero_tensor(name: str, count: int, form: EightBitFormat, axis: int | None) -> TensorProto:
    dims = [] if axis is None else [count]
    raw = bytes(count) if axis is not None else bytes(1)
    return helper.make_tensor(name, form.onnx_type, dims, raw, raw=True)


def _middle_tensor(name: str, count: int, form: EightBitFormat, axis: int | None) -> TensorProto:
    dims = [] if axis is None else [count]
    raw = bytes([MIDDLE]) * (count if axis is not None else 1)
    return helper.make_tensor(name, TensorProto.UINT8, dims, raw, raw=True)


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
        elif site.kind is LayerKind.ATTENTION:
            yield from self._attention(site, node)
        else:
            slot = 1 if site.kind is LayerKind.TOKEN_LINEAR else 0
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
        if site.kind is not LayerKind.LINEAR or self._nodes[site.node].op_type != "MatMul":
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
    return 1 if node.op_type == "MatMul" and site.kind is not LayerKind.TOKEN_LINEAR else 0


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
