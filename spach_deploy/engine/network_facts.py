"""Facts of the network that TensorRT parsed: layers with their data types, compared with the requested precision.

In a strongly typed network TensorRT must compute each layer in the types that the network states. So the precision of
the engine is known from the parsed network, before the plan is built.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from spach_deploy.common.errors import PrecisionError
from spach_deploy.options.specs import Precision

WEIGHTED_KINDS = frozenset(
    {"MATRIX_MULTIPLY", "CONVOLUTION", "DECONVOLUTION", "EINSUM", "ATTENTION_INPUT", "ATTENTION_OUTPUT"}
)
"""TensorRT's names of the layer types that multiply: matrix products, convolutions, attention."""

_DTYPE_NAMES = {"FLOAT": "fp32", "HALF": "fp16"}
_ONNX_NODE = re.compile(r"\[ONNX Layer: (.*?)\]")
_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class TensorFact:
    """An input or output of the network. `dtype`: fp32, fp16, bf16, int8, ...; `shape`: -1 for a dynamic extent."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class LayerFact:
    """One layer: TensorRT's name and type of it, its ONNX node, the data types of its inputs and outputs.

    `eight_bits`: int8 or fp8 where both operands are dequantized from it, so that it multiplies in eight bits; else "".
    """

    name: str
    kind: str
    node: str
    input_dtypes: tuple[str, ...]
    output_dtypes: tuple[str, ...]
    eight_bits: str = ""

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The data types of its inputs and outputs, each once."""
        return tuple(dict.fromkeys((*self.input_dtypes, *self.output_dtypes)))


@dataclasses.dataclass(frozen=True)
class NetworkFacts:
    """The parsed network."""

    inputs: tuple[TensorFact, ...]
    outputs: tuple[TensorFact, ...]
    layers: tuple[LayerFact, ...] = dataclasses.field(repr=False)

    @property
    def weighted_layers(self) -> tuple[LayerFact, ...]:
        """Matrix products, convolutions and attentions."""
        return tuple(layer for layer in self.layers if layer.kind in WEIGHTED_KINDS)


@dataclasses.dataclass(frozen=True)
class AchievedPrecision:
    """In which types the weighted layers compute.

    `asked`: the precision that was requested for all that is not quantized. `layers_by_dtype`: counts, such as
    {"int8": 73, "fp16": 30}. `kept`: layers in FP32 on purpose. `layers`: by ONNX node, the type of its layer.
    """

    asked: Precision
    layers_by_dtype: dict[str, int]
    kept: tuple[str, ...]
    layers: dict[str, str] = dataclasses.field(default_factory=dict, repr=False)


def read_network_facts(network: Any) -> NetworkFacts:
    """Read an INetworkDefinition of either flavour of TensorRT, in any version."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    kinds = [_name(layer.type) for layer in layers]
    stored = _dequantized(layers, kinds)
    return NetworkFacts(
        inputs=tuple(_tensor(network.get_input(index)) for index in range(network.num_inputs)),
        outputs=tuple(_tensor(network.get_output(index)) for index in range(network.num_outputs)),
        layers=tuple(_layer(layer, kind, stored) for layer, kind in zip(layers, kinds, strict=True)),
    )


def _dequantized(layers: list[Any], kinds: list[str]) -> dict[str, str]:
    """By tensor: the data type of the input of the DEQUANTIZE layer that makes it, directly or through a SHUFFLE, by
    which the parser gives a weight the axis of the batch.
    """
    found: dict[str, str] = {}
    for layer, kind in zip(layers, kinds, strict=True):
        if kind == "DEQUANTIZE":
            found[layer.get_output(0).name] = _dtype(layer.get_input(0))
        elif kind == "SHUFFLE" and (stored := found.get(layer.get_input(0).name)):
            found[layer.get_output(0).name] = stored
    return found


def _tensor(tensor: Any) -> TensorFact:
    return TensorFact(tensor.name, _dtype(tensor), tuple(tensor.shape))


def _layer(layer: Any, kind: str, stored: Mapping[str, str]) -> LayerFact:
    name, match = layer.name, _ONNX_NODE.search(layer.metadata or "")
    return LayerFact(
        name=name,
        kind=kind,
        node=match[1] if match else name,
        input_dtypes=tuple(_dtypes(layer.get_input, layer.num_inputs)),
        output_dtypes=tuple(_dtypes(layer.get_output, layer.num_outputs)),
        eight_bits=_eight_bits(layer, stored) if stored and kind in WEIGHTED_KINDS else "",
    )


def _eight_bits(layer: Any, stored: Mapping[str, str]) -> str:
    inputs = [layer.get_input(index) for index in range(min(2, layer.num_inputs))]
    types = {stored.get(tensor.name, "") for tensor in inputs if tensor is not None}
    return types.pop() if len(types) == 1 else ""


def _dtypes(get: Any, count: int) -> Iterator[str]:
    for index in range(count):
        if (tensor := get(index)) is not None:  # optional inputs are None
            yield _dtype(tensor)


def _dtype(tensor: Any) -> str:
    name = _name(tensor.dtype)
    return _DTYPE_NAMES.get(name, name.lower())


@functools.cache
def _name(value: Any) -> str:
    """Name of a value of a TensorRT enumeration, cached because `.name` takes microseconds."""
    name: str = value.name
    return name


def check_achieved_precision(
    facts: NetworkFacts, asked: Precision, kept_float: Collection[str] = (), quantized: Collection[str] = ()
) -> AchievedPrecision:
    """Compare the types of all weighted layers with the requested precision.

    `asked`: the precision of all that is not quantized. `kept_float`: names of ONNX nodes (or patterns, as fnmatch
    reads them) that must compute in FP32. `quantized`: names of ONNX nodes that must multiply in eight bits; no other
    may. Raises PrecisionError that names the layers with other types, or for a network without weighted layers.
    """
    layers = facts.weighted_layers
    if not layers:
        raise PrecisionError("The network has no matrix product or convolution, so no precision could be checked.")
    patterns = [name for name in kept_float if set(name) & set("*?[")]
    kept = {layer for layer in layers if _is_kept(layer, frozenset(kept_float), patterns)}
    wrong = [layer for layer in layers if set(layer.dtypes) != {"fp32" if layer in kept else asked.value}]
    if wrong:
        raise PrecisionError(_complaint(wrong, asked, kept), "Export the graph again in that precision.")
    stray = [layer for layer in layers if bool(layer.eight_bits) != (layer.node in quantized)]
    missing = set(quantized) - {layer.node for layer in layers}
    if stray or missing:
        names = [layer.node for layer in stray] + sorted(missing)
        raise PrecisionError(
            f"Eight bits were not achieved as planned in {len(names)} layers: {', '.join(names[:_SHOWN])}.",
            "Export the graph again in that precision.",
        )
    types = {layer.node: layer.eight_bits or layer.dtypes[0] for layer in layers}
    counts = Counter(layer.eight_bits or layer.dtypes[0] for layer in layers)
    return AchievedPrecision(asked, dict(counts), tuple(layer.node for layer in layers if layer in kept), types)


def _is_kept(layer: LayerFact, names: frozenset[str], patterns: list[str]) -> bool:
    return bool(names & {layer.node, layer.name}) or any(fnmatchcase(layer.node, pattern) for pattern in patterns)


def _complaint(wrong: list[LayerFact], asked: Precision, kept: set[LayerFact]) -> str:
    named = ", ".join(
        f"{layer.node} ({'/'.join(layer.dtypes)}{', to be kept in fp32' if layer in kept else ''})"
        for layer in wrong[:_SHOWN]
    )
    more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    return f"Asked for {asked.value}, but not achieved in {len(wrong)} layers: {named}{more}."
