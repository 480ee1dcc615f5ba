"""QuantizeLinear and DequantizeLinear in a typed graph: activations with one scale, weights with one a channel or one.

Weights stay floating-point numbers in front of their own pair, because TensorRT falls back to half where a packed qkv
comes as integers already. Scales have the type of what they scale, but INT8 is made of FP32, also where that is FP16
cast to it: ONNX Runtime before 1.30 truncates FP16 on a CPU (`runtime.truncation`), and TensorRT folds the cast
(`benchmarks/truncation.py`). Names begin with the tensor's, `layer3.0.channel_func/Reshape/quantize`, or the layer's,
`layer3.0.channel_func.fc1/weight/quantize`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from spach_deploy.errors import PrecisionError
from spach_deploy.onnx_graph.graph import initializers
from spach_deploy.onnx_graph.opset import raise_opset
from spach_deploy.precision.elements import element_types
from spach_deploy.precision.formats import FLOAT, FP16, HALF_FORMATS, decode
from spach_deploy.quantization.formats import INT8, EightBits, Float32
from spach_deploy.quantization.plan import QuantizationPlan, QuantizedSite
from spach_deploy.quantization.sites import Kind
from spach_deploy.specs import Precision

QUANTIZE, DEQUANTIZE, SCALE, ZERO = "/quantize", "/dequantize", "/scale", "/zero"
MIDDLE = 128
"""Zero point of unsigned numbers."""


class Operand(enum.Enum):
    """What a linear layer multiplies."""

    INPUT = "input"
    WEIGHTS = "weights"


_OPSET = 21
"""QuantizeLinear takes bfloat16 from this opset on, and most runtimes have FP8 from it on."""


def quantized_from(rest: Precision, form: EightBits) -> Precision:
    """Precision of the numbers that become eight bits, where those that are not quantized have precision `rest`."""
    return Precision.FP32 if rest is Precision.FP16 and form == INT8 else rest


def insert_pairs(typed: ModelProto, plan: QuantizationPlan) -> ModelProto:
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
        if site.kind is Kind.ATTENTION:
            return  # its products read the pairs, see _attention_inputs
        slot = 1 if site.kind is Kind.TOKEN_LINEAR else 0
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
            if site.kind is Kind.ATTENTION:
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
            raise_opset(model, _OPSET)
        return model


def weight_axis(site: QuantizedSite, node: NodeProto) -> int:
    """Axis of the output channels in a site's weights: linear layers may stand there transposed, as a MatMul."""
    return 1 if is_for_cpu(site, node) else 0


def is_for_cpu(site: QuantizedSite, node: NodeProto) -> bool:
    """Whether a linear layer has the form that ONNX Runtime computes in eight bits on CPUs."""
    return site.kind is Kind.LINEAR and node.op_type == "MatMul"


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


def _zero_tensor(name: str, count: int, form: EightBits, axis: int | None) -> TensorProto:
    dims = [] if axis is None else [count]
    raw = bytes(count) if axis is not None else bytes(1)
    return helper.make_tensor(name, form.onnx_type, dims, raw, raw=True)


def _middle_tensor(name: str, count: int, form: EightBits, axis: int | None) -> TensorProto:
    dims = [] if axis is None else [count]
    raw = bytes([MIDDLE]) * (count if axis is not None else 1)
    return helper.make_tensor(name, TensorProto.UINT8, dims, raw, raw=True)
