"""The quantization plan: which layers are quantized, with which scales, and why the others are not.

A bundle keeps it as `quantization.json`. `qdq.py` writes it into a graph, and checks a graph against it.
`fake_quantization.py` computes it in PyTorch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spach_deploy.common.errors import BundleError
from spach_deploy.common.files import read_json
from spach_deploy.common.text import json_text
from spach_deploy.quantization.equalization import EqualizedPair
from spach_deploy.quantization.formats import FP8, INT8, EightBitFormat, Float32, Float64
from spach_deploy.quantization.scales import SMALLEST, Method, clipped_at, store, weight_scales
from spach_deploy.quantization.sites import LayerKind, Site
from spach_deploy.quantization.statistics import TensorStatistics, mixture

SCHEMA = 1
_FORMATS = {form.name: form for form in (INT8, FP8)}


@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """An activation's scale. `largest`: largest |x| in calibration. `clip`: largest |x| that is not clipped."""

    tensor: str
    scale: float
    clip: float
    largest: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class QuantizedSite:
    """A quantized layer.

    `tensors`: its activations. `weight_scales`: one for each output channel, or one for all; none for an attention.
    `correction`: what bias correction adds to the bias, one number for each output channel. `bias`: the bias before
    that, () where the layer has none, None in plans of versions that did not keep it. `products`: of an attention, the
    nodes that multiply; its `node` is the softmax. `macs`: multiplications for one image.
    """

    module: str
    node: str
    kind: LayerKind
    macs: int
    tensors: tuple[QuantizedTensor, ...]
    weight: str
    weight_scales: tuple[float, ...]
    correction: tuple[float, ...] = ()
    products: tuple[str, ...] = ()
    bias: tuple[float, ...] | None = None

    @property
    def per_channel(self) -> bool:
        """Whether every output channel has a scale of its own."""
        return len(self.weight_scales) > 1

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "module": self.module,
            "node": self.node,
            "kind": self.kind.value,
            "macs": self.macs,
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            "weight": self.weight,
            "weight_scales": list(self.weight_scales),
            "correction": list(self.correction),
            "products": list(self.products),
            "bias": None if self.bias is None else list(self.bias),
        }


@dataclasses.dataclass(frozen=True)
class KeptFloat:
    """A layer that could be quantized and stays in float, and why."""

    module: str
    node: str
    kind: LayerKind
    macs: int
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**dataclasses.asdict(self), "kind": self.kind.value}


@dataclasses.dataclass(frozen=True)
class QuantizationPlan:
    """Format, method of the scales, quantized layers (`sites`), layers in float (`kept`), and equalized pairs.

    `vnni`: linear layers for CPUs have unsigned inputs, for processors with VNNI (`qdq.unsigned_operand`).
    """

    form: EightBitFormat
    method: Method
    sites: tuple[QuantizedSite, ...]
    kept: tuple[KeptFloat, ...]
    equalized: tuple[EqualizedPair, ...]
    vnni: bool = False

    @property
    def macs_share(self) -> float:
        """Share of the multiplications of all sites that are done in eight bits, 0..1."""
        done = sum(site.macs for site in self.sites)
        return done / max(done + sum(kept.macs for kept in self.kept), 1)

    @property
    def product_nodes(self) -> tuple[str, ...]:
        """Nodes that multiply in eight bits: one for each layer, two for an attention."""
        return tuple(node for site in self.sites for node in site.products or (site.node,))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, for quantization.json."""
        return {
            "schema": SCHEMA,
            "format": self.form.name,
            "method": self.method.value,
            "sites": [site.to_dict() for site in self.sites],
            "kept_float": [kept.to_dict() for kept in self.kept],
            "equalization": [pair.to_dict() for pair in self.equalized],
            "vnni": self.vnni,
        }

    @classmethod
    def from_dict(cls, content: Any, where: str) -> QuantizationPlan:
        """Read what `to_dict` wrote. BundleError, which names the file `where`, for anything else."""
        try:
            if content["schema"] != SCHEMA:
                raise ValueError(f"schema {content['schema']}, this version reads {SCHEMA}")
            return cls(
                _FORMATS[content["format"]],
                Method(content["method"]),
                tuple(map(_site, content["sites"])),
                tuple(KeptFloat(**{**entry, "kind": LayerKind(entry["kind"])}) for entry in content["kept_float"]),
                tuple(map(EqualizedPair.from_dict, content["equalization"])),
                _truth(content.get("vnni", False)),
            )
        except Exception as error:  # a damaged file may hold anything
            raise BundleError(
                f"{where} is no record of a quantization ({error}).", "Export the bundle again."
            ) from None


def _site(entry: dict[str, Any]) -> QuantizedSite:
    site = QuantizedSite(
        **{
            **entry,
            **{key: _text(entry[key]) for key in ("module", "node", "weight")},
            **{key: tuple(map(float, entry[key])) for key in ("weight_scales", "correction")},
            "kind": LayerKind(entry["kind"]),
            "macs": int(entry["macs"]),
            "tensors": tuple(map(_tensor_entry, entry["tensors"])),
            "products": tuple(map(_text, entry.get("products", ()))),
            "bias": None if entry.get("bias") is None else tuple(map(float, entry["bias"])),
        }
    )
    is_attention = site.kind is LayerKind.ATTENTION
    if bool(site.products) != is_attention:
        raise ValueError(f"{site.module} has {len(site.products)} products of its own")
    if len(site.tensors) != (4 if is_attention else 1) or bool(site.weight_scales) == is_attention:
        raise ValueError(f"{site.module} has {len(site.tensors)} tensors and {len(site.weight_scales)} weight scales")
    if site.per_channel and len(site.correction) not in (0, len(site.weight_scales)):
        raise ValueError(f"{site.module} has {len(site.weight_scales)} channels and {len(site.correction)} corrections")
    return site


def _tensor_entry(entry: dict[str, Any]) -> QuantizedTensor:
    numbers = {key: float(entry[key]) for key in ("scale", "clip", "largest")}
    return QuantizedTensor(**{**entry, **numbers, "tensor": _text(entry["tensor"])})


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is neither true nor false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no name")
    return value


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How scales are set. `per_tensor`: modules whose weights get one scale. `half`: scales must be FP16 numbers."""

    form: EightBitFormat
    method: Method
    half: bool = True
    per_tensor: frozenset[str] = frozenset()


def make_plan(
    sites: Sequence[Site],
    reasons: Mapping[str, str],
    statistics: Mapping[str, TensorStatistics],
    weights: Mapping[str, Float32],
    equalized: Sequence[EqualizedPair],
    scaling: Scaling,
) -> QuantizationPlan:
    """Set the scales of every site that may be quantized.

    `reasons`: by node, why a site stays in float; "" or missing where it is quantized. `statistics`: by tensor, of the
    model before equalization. `weights`: by name, the sites' weights and biases after it, float32. A layer with a scale
    that FP16 cannot hold stays in float, with that as the reason.
    """
    factors = {entry.site: np.array(entry.factors) for entry in equalized if entry.alpha is not None}
    quantized: list[QuantizedSite] = []
    kept: list[KeptFloat] = []
    for site in sites:
        reason = reasons[site.node]
        entry = None
        if not reason:
            entry = _quantized(site, statistics, weights, factors.get(site.module), scaling)
            reason = "" if entry is not None else "scale: too small for FP16"
        if entry is not None:
            quantized.append(entry)
        else:
            kept.append(KeptFloat(site.module, site.node, site.kind, site.macs, reason))
    return QuantizationPlan(scaling.form, scaling.method, tuple(quantized), tuple(kept), tuple(equalized))


def _quantized(
    site: Site,
    statistics: Mapping[str, TensorStatistics],
    weights: Mapping[str, Float32],
    factors: Float64 | None,
    scaling: Scaling,
) -> QuantizedSite | None:
    weight = weights[site.weight] if site.weight else None
    tensors = tuple(
        _tensor(name, statistics[name], factors if name == site.activation else None, weight, scaling)
        for name in site.measured
    )
    scales: tuple[float, ...] = ()
    if weight is not None:
        found = weight_scales(weight, scaling.form, per_channel=site.module not in scaling.per_tensor)
        scales = tuple(_representable(float(scale), half=scaling.half) for scale in found)
    if scaling.half and min((*scales, *(tensor.scale for tensor in tensors))) < 2.0**-20:
        return None
    correction: tuple[float, ...] = ()
    bias: tuple[float, ...] = ()
    if weight is not None and site.kind is not LayerKind.DEPTHWISE:
        divisors = np.ones(weight.shape[1]) if factors is None else factors
        moved = mean_shift(statistics[site.activation], divisors, weight, tensors[0].scale, scales, scaling.form)
        correction = tuple(_short(-number) for number in moved)
        bias = tuple(map(_short, weights[site.bias].reshape(-1).tolist())) if site.bias else ()
    numbers = (tensors, site.weight, scales, correction, site.products, bias)
    return QuantizedSite(site.module, site.node, site.kind, site.macs, *numbers)


def mean_shift(
    seen: TensorStatistics,
    divisors: Float64,
    weight: Float32,
    scale: float,
    weight_scales: Sequence[float],
    form: EightBitFormat,
) -> Float64:
    """By how much quantization changes the mean of each output channel, float64 (outputs,).

    Errors of weights are multiplied by the inputs' exact mean; errors of activations are taken from a sample of rows.
    Nagel et al., arXiv 1906.04721, do the same with the statistics of BatchNorm, where this measures them.
    """
    scales = np.array(weight_scales, np.float32).reshape((-1,) + (1,) * (weight.ndim - 1))
    stored = store(weight, scales, form).astype(np.float64)
    axes = tuple(range(2, weight.ndim))
    rows = (seen.rows / divisors).astype(np.float32)
    rounding = (store(rows, scale, form).astype(np.float64) - rows).mean(axis=0)
    mean = seen.mean / divisors
    shift: Float64 = (stored - weight).sum(axis=axes) @ mean + stored.sum(axis=axes) @ rounding
    return shift


def _tensor(
    name: str, seen: TensorStatistics, factors: Float64 | None, weight: Float32 | None, scaling: Scaling
) -> QuantizedTensor:
    divisors = np.ones(len(seen.max_abs)) if factors is None else factors
    largest = float((seen.max_abs / divisors).max(initial=0.0))
    histogram = None
    if scaling.method.needs_histograms and seen.histogram is not None:
        histogram = mixture(seen, divisors, _energy(weight, len(divisors)) if scaling.method is Method.MSE else None)
    clip = clipped_at(scaling.method, histogram, largest, scaling.form)
    scale = _representable(max(scaling.form.scale_of(clip), SMALLEST) if clip else 1.0, half=scaling.half)
    return QuantizedTensor(name, scale, scale * scaling.form.limit, largest)


def _energy(weight: Float32 | None, channels: int) -> Float64 | None:
    """Sum of squares of the weights of each input channel; None where the tensor was measured as a whole."""
    if weight is None or channels == 1 or weight.shape[1] != channels:
        return None
    columns = weight.reshape(weight.shape[0], channels, -1)
    energy: Float64 = np.einsum("oir,oir->i", columns, columns).astype(np.float64)
    return energy


def _representable(scale: float, *, half: bool) -> float:
    """`scale` as the graph will store it, in FP16 with `half`."""
    return float(np.float16(scale)) if half else float(np.float32(scale))


def _short(number: float) -> float:
    """The FP32 number `number` in as few decimal digits as identify it."""
    return float(str(np.float32(number)))


def write_plan(plan: QuantizationPlan, path: Path) -> None:
    """Write quantization.json, one layer a line."""
    text = json_text(plan.to_dict(), indent=None).replace('{"module"', '\n{"module"').replace('{"name"', '\n{"name"')
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


def read_plan(path: Path) -> QuantizationPlan:
    """Read a bundle's quantization.json. BundleError for anything else."""
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read ({error}).", "Export the bundle again.") from None
    return QuantizationPlan.from_dict(content, str(path))


def summary(plan: QuantizationPlan) -> str:
    """One line of text: how many layers, and which share of the multiplications."""
    weighted = [site for site in plan.sites if site.kind is not LayerKind.ATTENTION]
    kept = [entry for entry in plan.kept if entry.kind not in (LayerKind.ATTENTION, LayerKind.DEPTHWISE)]
    total = len(weighted) + len(kept)
    return f"{len(weighted)} of {total} layers in {plan.form.name} ({plan.macs_share:.1%} of multiplications)"


def without(plan: QuantizationPlan, modules: frozenset[str], reason: str) -> QuantizationPlan:
    """`plan` with the layers in `modules` left in float, for `reason`.

    Their ranges are exchanged no longer, unless that changed the weights of a layer whose scales are set.
    """
    kept = [_kept(site, reason) for site in plan.sites if site.module in modules]
    sites = tuple(site for site in plan.sites if site.module not in modules)
    weights = {site.weight for site in sites}
    equalized = tuple(
        pair
        for pair in plan.equalized
        if pair.site not in modules or any(rows.parameter in weights for rows in pair.divided)
    )
    return dataclasses.replace(plan, sites=sites, kept=(*plan.kept, *kept), equalized=equalized)


def _kept(site: QuantizedSite, reason: str) -> KeptFloat:
    return KeptFloat(site.module, site.node, site.kind, site.macs, reason)
