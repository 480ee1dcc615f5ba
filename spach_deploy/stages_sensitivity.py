"""The stage behind --max-rel-l2 and --max-drop: as many layers in eight bits as the bound allows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spach_deploy.data.preprocess import normalize
from spach_deploy.data.readers import batches, open_images
from spach_deploy.errors import MismatchError
from spach_deploy.models.checkpoint import LoadedModel
from spach_deploy.phases import Phases
from spach_deploy.quantization.sensitivity import Choice, largest_set, layer_costs
from spach_deploy.quantization.twin import quantized_twin
from spach_deploy.rewrites.static_modules import StaticSpach
from spach_deploy.specs import ExportOptions, Preprocessing
from spach_deploy.stages_quantization import QuantizationStage, without
from spach_deploy.validation.accuracy import paired
from spach_deploy.validation.labels import ImageLabels, open_labels
from spach_deploy.validation.precision_loss import evaluate

Float32 = npt.NDArray[np.float32]

COST_IMAGES = 8
LABELLED_IMAGES = 512
"""At most this many labelled images decide on --max-drop, spread evenly over the set."""

_BATCH = 4
_EIGHT, _FLOAT = "#1f77b4", "#d62728"


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Images on which layers are judged: float32 (N, 3, S, S), the reference's logits, labels where there are some."""

    images: Float32
    reference: Float32
    labels: ImageLabels | None = None


def choose_layers(
    quantized: QuantizationStage, static: StaticSpach, held_out: HeldOut, options: ExportOptions, phases: Phases
) -> tuple[QuantizationStage, Choice]:
    """The plan with the fewest layers left in float that keeps the bound, by measurement.

    Raises MismatchError where no set of layers keeps it.
    """
    spec, plan = options.quantization, quantized.plan
    costs = layer_costs(static, plan, held_out.images[:COST_IMAGES])
    bound = spec.max_drop if spec.max_drop is not None else spec.max_rel_l2
    assert bound is not None
    by_drop = spec.max_drop is not None
    what = "points of top-1" if by_drop else "relative L2 of the logits"

    def measure(kept: frozenset[str]) -> float:
        twin = quantized_twin(static, without(plan, kept, ""))
        logits = _logits(twin, held_out.images)
        return _drop(logits, held_out) if by_drop else _relative_l2(logits, held_out.reference)

    choice = largest_set(costs, bound, measure, what)
    if not choice.holds:
        option = "--max-drop" if by_drop else "--max-rel-l2"
        raise MismatchError(
            f"Even with every layer in float the model changes by {choice.measured:.3g} {what} on these images, more"
            f" than {option} {bound:g} allows.",
            "Export with --fp16, or allow more.",
        )
    reason = f"cost: {what} would pass {bound:g}"
    chosen = without(plan, frozenset(choice.kept_float), reason)
    phases.note(_sentence(choice, len(plan.sites)))
    calibration = dataclasses.replace(quantized.calibration, plan=chosen)
    return dataclasses.replace(quantized, calibration=calibration), choice


def _sentence(choice: Choice, layers: int) -> str:
    kept = len(choice.kept_float)
    dearest = f": {', '.join(choice.kept_float[:3])}{' and more' if kept > 3 else ''}" if kept else ""
    return (
        f"{layers - kept} of {layers} layers stay in eight bits; {kept} are left in float{dearest}."
        f" {choice.measure[0].upper()}{choice.measure[1:]}: {choice.measured:.3g}, at most {choice.bound:g};"
        f" all quantized: {choice.everything:.3g} ({choice.evaluations} evaluations)."
    )


def _logits(model: Any, images: Float32) -> Float32:
    return np.concatenate([evaluate(model, images[i : i + _BATCH]) for i in range(0, len(images), _BATCH)])


def _relative_l2(logits: Float32, reference: Float32) -> float:
    return float(np.linalg.norm(logits.astype(np.float64) - reference) / np.linalg.norm(reference.astype(np.float64)))


def _drop(logits: Float32, held_out: HeldOut) -> float:
    assert held_out.labels is not None
    return float(paired(held_out.reference, logits, held_out.labels.classes).drop_points)


def labelled_images(loaded: LoadedModel, preprocessing: Preprocessing, options: ExportOptions) -> HeldOut:
    """The images of --images with the labels of --labels. UsageError where these do not fit."""
    images, labels = options.images, options.quantization.labels
    assert images is not None
    assert labels is not None
    source = open_images(images)
    labelling = open_labels(labels, images, source.classes, loaded.num_classes)
    parts = list(batches(source.limit(LABELLED_IMAGES), preprocessing, _BATCH))
    own = [part.labels for part in parts if part.labels is not None]
    names = tuple(name for part in parts for name in part.names)
    known = np.concatenate(own) if len(own) == len(parts) else None
    pixels = np.concatenate([part.pixels for part in parts])
    normalized = normalize(pixels, preprocessing)
    return HeldOut(normalized, _logits(loaded.model, normalized), labelling.of(names, known))


def draw_sensitivity(choice: Choice, path: Path) -> bool:
    """Two plots as SVG: every layer's cost in the order of the network, and cost against share of multiplications.

    False where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("svg")
    from matplotlib import pyplot

    height = max(4.0, 1.2 + 0.16 * len(choice.costs))
    figure, (layers, share) = pyplot.subplots(1, 2, figsize=(12, height), layout="constrained", width_ratios=(3, 2))
    _draw_layers(layers, choice)
    _draw_share(share, choice)
    figure.savefig(path, format=path.suffix[1:])
    pyplot.close(figure)
    return True


def _draw_layers(axes: Any, choice: Choice) -> None:
    kept = set(choice.kept_float)
    names = [cost.module for cost in choice.costs]
    colours = [_FLOAT if name in kept else _EIGHT for name in names]
    axes.barh(range(len(names)), [cost.rel_l2 for cost in choice.costs], color=colours, height=0.7)
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set(title="What each layer costs by itself", xlabel="relative L2 of the logits")
    for label, colour in ((f"eight bits ({len(names) - len(kept)})", _EIGHT), (f"left in float ({len(kept)})", _FLOAT)):
        axes.barh([0], [0], color=colour, label=label)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=2)


def _draw_share(axes: Any, choice: Choice) -> None:
    """From nothing in eight bits to everything, the cheapest for their size first."""
    order = sorted(choice.costs, key=lambda cost: cost.per_mac)
    total = sum(cost.macs for cost in order)
    shares = np.concatenate([[0.0], np.cumsum([cost.macs for cost in order]) / total * 100])
    errors = np.sqrt(np.concatenate([[0.0], np.cumsum([cost.rel_l2**2 for cost in order])]))
    axes.plot(shares, errors, color=_EIGHT)
    chosen = len(order) - len(choice.kept_float)
    axes.plot(shares[chosen], errors[chosen], "o", color=_FLOAT, label=f"chosen: {shares[chosen]:.0f} %")
    if choice.measure.startswith("relative"):
        axes.axhline(choice.bound, color="0.5", linestyle="--", label=f"bound, {choice.bound:g}")
    axes.set(title="Cost of quantizing more", xlabel="share of the multiplications in eight bits, %")
    axes.set(ylabel="relative L2 of the logits, squares added up", xlim=(0, 100))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="upper left")
