"""Step "choose the layers" (--max-rel-l2, --max-drop): as many layers in 8 bits as the bound allows."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from spach_deploy.bundle.inputs import Batch, arrays_of
from spach_deploy.common.batches import ranges
from spach_deploy.common.errors import MismatchError
from spach_deploy.common.executors import ClusterAddress, LocalExecutor, Pool
from spach_deploy.common.machine import torch_threads
from spach_deploy.common.metrics import relative_l2
from spach_deploy.common.progress import Phases
from spach_deploy.data.labels import ImageLabels, open_labels
from spach_deploy.data.preprocess import normalize
from spach_deploy.data.readers import batches, open_images
from spach_deploy.models.checkpoint import LoadedModel
from spach_deploy.options.specs import ExportOptions, Preprocessing, QuantizationSpec
from spach_deploy.pipeline.steps.calibration import CalibrationResult
from spach_deploy.quantization.fake_quantization import fake_quantized
from spach_deploy.quantization.plan import QuantizationPlan, without
from spach_deploy.quantization.sensitivity import LayerSelection, LayerWatch, Squares, largest_set, summed_costs
from spach_deploy.validation.accuracy import paired
from spach_deploy.validation.rounding_error import evaluate

Float32 = npt.NDArray[np.float32]

COST_IMAGES = 8
LABELLED_IMAGES = 512
"""At most this many labelled images decide on --max-drop, spread evenly over the set."""

_BATCH = 4
_WORKER_BYTES, _COPIES = 1.5e9, 4
"""Memory of a worker: constant for Python, PyTorch and a backward pass; plus this many copies of the weights."""

_EIGHT_BITS, _FLOAT = "#1f77b4", "#d62728"  # colours of the plot


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Images to judge layers on: float32 (N, 3, S, S), or inputs with these; the reference's first output for them
    (logits (N, classes), of a classifier), and labels if there are any. `output`: the output's name.
    """

    images: Batch
    reference: Float32
    labels: ImageLabels | None = None
    output: str = "logits"


@dataclasses.dataclass(frozen=True)
class SearchWork:
    """Common input of the search's workers: the static model in FP32, the plan, and the images to judge layers on."""

    static: nn.Module
    plan: QuantizationPlan
    images: Batch
    threads: int | None = None

    @property
    def memory_bytes(self) -> float:
        """Memory that a worker needs, estimated."""
        weights = sum(int(tensor.nbytes) for tensor in self.static.state_dict().values())
        return _WORKER_BYTES + _COPIES * weights + sum(array.nbytes for array in arrays_of(self.images))


class Searcher:
    """A worker of the search. It keeps its last model: with every layer watched, or with some layers in 8 bits."""

    def __init__(self, work: SearchWork) -> None:
        self._work = work
        self._watch: LayerWatch | None = None
        self._quantized: tuple[frozenset[str], Any] | None = None

    def cost(self, number: int) -> Squares:
        """Costs of all layers on the image with this number."""
        self._watch = self._watch or LayerWatch(self._work.static, self._work.plan)
        with self._threads():
            return self._watch.see(number, self._work.images[number : number + 1])

    def logits(self, task: EvaluationTask) -> Float32:
        """Logits (n, classes) of a batch, with the layers of `task.kept` in float and the others in 8 bits."""
        self._watch = None
        if self._quantized is None or self._quantized[0] != task.kept:
            self._quantized = None
            self._quantized = task.kept, fake_quantized(self._work.static, without(self._work.plan, task.kept, ""))
        with self._threads():
            return evaluate(self._quantized[1], self._work.images[task.start : task.start + _BATCH])

    def _threads(self) -> contextlib.AbstractContextManager[None]:
        return torch_threads(self._work.threads) if self._work.threads else contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class EvaluationTask:
    """One batch of an evaluation. `kept`: modules that stay in float; `start`: number of the batch's first image."""

    kept: frozenset[str]
    start: int


def choose_layers(
    quantized: CalibrationResult, static: nn.Module, held_out: HeldOut, options: ExportOptions, phases: Phases
) -> tuple[CalibrationResult, LayerSelection]:
    """Search the largest set of quantized layers that keeps the bound, by measurement.

    With `QuantizationSpec.cluster`, batches are evaluated by workers of a cluster. Raises MismatchError where no set of
    layers keeps the bound, and what `ClusterAddress.connected` raises.
    """
    spec, plan = options.quantization, quantized.plan
    with _pool(SearchWork(static, plan, held_out.images), spec.cluster) as pool:
        choice = search(pool, plan, held_out, spec)
    if not choice.holds:
        option = "--max-drop" if spec.max_drop is not None else "--max-rel-l2"
        raise MismatchError(
            f"Even with every layer in float the model changes by {choice.measured:.3g} {choice.measure} on these"
            f" images, more than {option} {choice.bound:g} allows.",
            "Export with --fp16, or allow more.",
        )
    reason = f"cost: {choice.measure} would pass {choice.bound:g}"
    chosen = without(plan, frozenset(choice.kept_float), reason)
    phases.note(_sentence(choice, len(plan.sites)))
    calibration = dataclasses.replace(quantized.calibration, plan=chosen)
    return dataclasses.replace(quantized, calibration=calibration), choice


@contextlib.contextmanager
def _pool(work: SearchWork, address: ClusterAddress | None) -> Iterator[Pool]:
    """The search's workers: this process, or workers of a cluster with one core each."""
    if address is None:
        yield LocalExecutor(Searcher(work))
        return
    work = dataclasses.replace(work, threads=1)
    with address.connected() as cluster, cluster.pool(Searcher, work, work.memory_bytes) as pool:
        yield pool


def search(pool: Pool, plan: QuantizationPlan, held_out: HeldOut, spec: QuantizationSpec) -> LayerSelection:
    """Measure each layer's cost, then find the largest set that keeps the bound. Workers' states are `Searcher`s."""
    images = range(len(held_out.images))
    costs = summed_costs(plan, pool.map(Searcher.cost, images[:COST_IMAGES]))

    def measure(kept: frozenset[str]) -> float:
        tasks = (EvaluationTask(kept, start) for start in images[::_BATCH])
        logits = np.concatenate(list(pool.map(Searcher.logits, tasks)))
        return relative_l2(logits, held_out.reference) if spec.max_drop is None else _drop(logits, held_out)

    bound = spec.max_drop if spec.max_drop is not None else spec.max_rel_l2
    assert bound is not None
    what = f"relative L2 of the {held_out.output}" if spec.max_drop is None else "points of top-1"
    return largest_set(costs, bound, measure, what)


def _sentence(choice: LayerSelection, layers: int) -> str:
    kept = len(choice.kept_float)
    dearest = f": {', '.join(choice.kept_float[:3])}{' and more' if kept > 3 else ''}" if kept else ""
    return (
        f"{layers - kept} of {layers} layers stay in eight bits; {kept} are left in float{dearest}."
        f" {choice.measure[0].upper()}{choice.measure[1:]}: {choice.measured:.3g}, at most {choice.bound:g};"
        f" all quantized: {choice.everything:.3g} ({choice.evaluations} evaluations)."
    )


def _logits(model: Any, images: Batch) -> Float32:
    return np.concatenate([evaluate(model, images[start:stop]) for start, stop in ranges(len(images), _BATCH)])


def _drop(logits: Float32, held_out: HeldOut) -> float:
    assert held_out.labels is not None
    return float(paired(held_out.reference, logits, held_out.labels.classes).drop_points)


def labelled_images(
    loaded: LoadedModel, preprocessing: Preprocessing, options: ExportOptions, note: Callable[[str], None]
) -> HeldOut:
    """The images of --images with the labels of --labels; `note` is called for each skipped image. UsageError where the
    labels do not fit.
    """
    images, labels = options.images, options.quantization.labels
    assert images is not None
    assert labels is not None
    source = open_images(images)
    labelling = open_labels(labels, images, source.classes, loaded.num_classes)
    chosen = source.limit(LABELLED_IMAGES)
    parts = list(batches(chosen, preprocessing, _BATCH))
    for skipped in chosen.skipped:
        note(f"Skipped {skipped}")
    own = [part.labels for part in parts if part.labels is not None]
    names = tuple(name for part in parts for name in part.names)
    known = np.concatenate(own) if len(own) == len(parts) else None
    pixels = np.concatenate([part.pixels for part in parts])
    normalized = loaded.takes.of(normalize(pixels, preprocessing))
    return HeldOut(normalized, _logits(loaded.model, normalized), labelling.of(names, known))


def draw_sensitivity(choice: LayerSelection, path: Path) -> bool:
    """Draw two plots as SVG: every layer's cost in network order, and cost against the share of multiplications.

    Returns False where matplotlib is not installed.
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


def _draw_layers(axes: Any, choice: LayerSelection) -> None:
    kept = set(choice.kept_float)
    names = [cost.module for cost in choice.costs]
    colours = [_FLOAT if name in kept else _EIGHT_BITS for name in names]
    axes.barh(range(len(names)), [cost.rel_l2 for cost in choice.costs], color=colours, height=0.7)
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set(title="What each layer costs by itself", xlabel="relative L2 of the logits")
    for label, colour in (
        (f"eight bits ({len(names) - len(kept)})", _EIGHT_BITS),
        (f"left in float ({len(kept)})", _FLOAT),
    ):
        axes.barh([0], [0], color=colour, label=label)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=2)


def _draw_share(axes: Any, choice: LayerSelection) -> None:
    """Cost against share, from no layer in 8 bits to all, adding layers by cost per multiplication."""
    order = sorted(choice.costs, key=lambda cost: cost.per_mac)
    total = sum(cost.macs for cost in order)
    shares = np.concatenate([[0.0], np.cumsum([cost.macs for cost in order]) / total * 100])
    errors = np.sqrt(np.concatenate([[0.0], np.cumsum([cost.rel_l2**2 for cost in order])]))
    axes.plot(shares, errors, color=_EIGHT_BITS)
    chosen = len(order) - len(choice.kept_float)
    axes.plot(shares[chosen], errors[chosen], "o", color=_FLOAT, label=f"chosen: {shares[chosen]:.0f} %")
    if choice.measure.startswith("relative"):
        axes.axhline(choice.bound, color="0.5", linestyle="--", label=f"bound, {choice.bound:g}")
    axes.set(title="Cost of quantizing more", xlabel="share of the multiplications in eight bits, %")
    axes.set(ylabel="relative L2 of the logits, squares added up", xlim=(0, 100))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="upper left")
