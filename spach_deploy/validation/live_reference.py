"""Rebuild the reference (PyTorch in FP32 with the bundle's own weights) and run it on images."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from spach_deploy.bundle.inputs import Batch, ModelInputs, as_floats, changed
from spach_deploy.bundle.outputs import model_outputs
from spach_deploy.bundle.schema import ModelSection, TensorInfo
from spach_deploy.common.errors import CheckpointError, UsageError
from spach_deploy.common.executors import ClusterAddress
from spach_deploy.common.machine import find_memory
from spach_deploy.data import preprocess
from spach_deploy.data.labels import ImageLabels, Labels, OwnLabels, open_labels
from spach_deploy.data.preprocess import Pixels, normalize, to_input
from spach_deploy.data.readers import ImageSource, batches, open_images
from spach_deploy.models.hyperparameters import read_section, values_of
from spach_deploy.options.specs import IODtype, ModelSpec, Preprocessing, WeightSource
from spach_deploy.validation.bundle_facts import BundleFacts
from spach_deploy.validation.rounding_error import evaluate_outputs
from spach_deploy.validation.runs import LARGEST_BATCH, EvaluationSet, RunOutputs, executions_here
from spach_deploy.validation.shards import (
    DECODING_BYTES,
    FewImages,
    ReadableImages,
    ShardedRunRequest,
    ValidationWork,
    readable_images,
    run_in_shards,
)
from spach_deploy.validation.tolerance import ImageArray, ToleranceSet, derive_tolerances, evaluated_images

if TYPE_CHECKING:
    from torch import nn

    from spach_deploy.models.checkpoint import LoadedModel

Say = Callable[[str], None]
Float32Array = npt.NDArray[np.float32]
LabelsOf = Callable[[tuple[str, ...], Labels | None], tuple[ImageLabels | None, tuple[str, ...]]]

_COPIES = 3
"""Copies of the outputs in memory: the reference's, a run's, and another run's that it replaces."""

_LEAST_ROUNDING, _MOST_ROUNDING = 8, 64


def _rounding_images(count: int) -> int:
    """On how many of `count` images PyTorch's rounding error is measured: a quarter, more than in an export, which has
    less time. A few images would not tell how far the worst of many is out.
    """
    return min(max(_LEAST_ROUNDING, count // 4), _MOST_ROUNDING)


@dataclasses.dataclass(frozen=True)
class Weights:
    """Where the user's copy of the bundle's weights is: a checkpoint, which of its weights, and keys to ignore in it.

    None and () mean what the export used. `module`: the factory of the user's own module.
    """

    checkpoint: Path | None = None
    source: WeightSource | None = None
    ignore: tuple[str, ...] = ()
    module: str | None = None


@dataclasses.dataclass(frozen=True)
class ImagesSpec:
    """The user's images: where they are, how many to use at most, and where their labels are."""

    path: Path
    max_images: int
    labels: Path | None = None


@dataclasses.dataclass(frozen=True)
class ImagesReference:
    """Images with the reference's outputs, the tolerances that hold for them, their labels if any, and notes.

    `graph`: the graph's outputs in each CPU execution, where it ran together with the reference; else None.
    """

    eval_set: EvaluationSet
    tolerances: ToleranceSet
    labels: ImageLabels | None = None
    notes: tuple[str, ...] = ()
    graph: tuple[RunOutputs, ...] | None = None


def rebuild(
    section: ModelSection, weights: Weights, outputs: Sequence[TensorInfo], takes: ModelInputs | None = None
) -> LoadedModel:
    """The reference of the bundle whose manifest has this model section and these outputs. `takes`: its inputs.

    Raises UsageError where a checkpoint is needed and not given, CheckpointError where its weights are not the
    bundle's.
    """
    from spach_deploy.models import own_module

    if section.origin == "module" and weights.module is None:
        raise UsageError(
            f"The bundle is of your own module {section.name}, which is needed for that.",
            f"Give --module {own_module.FORM}"
            f"{'' if section.checkpoint is None else f' --checkpoint FILE ({section.checkpoint})'}.",
        )
    if section.origin != "module" and weights.module is not None:
        raise UsageError(f"The bundle is of {section.name}, not of a module of your own.", "Leave --module out.")
    if section.origin == "checkpoint" and weights.checkpoint is None:
        raise UsageError(
            "The bundle holds the reference's answers to its golden images only; for others the reference is needed.",
            f"Give --checkpoint FILE: {section.checkpoint}, SHA-256 {section.checkpoint_sha256}.",
        )
    source = weights.source or section.weights
    loaded = own_module.load(
        ModelSpec(
            name=None if section.origin == "module" else section.name,
            module=weights.module,
            architecture=section.architecture,
            checkpoint=weights.checkpoint,
            weights=source if weights.checkpoint is not None else WeightSource.MODEL,
            image_size=section.image_size,
            num_classes=section.num_classes,
            ignore=() if weights.checkpoint is None else weights.ignore or section.ignored,
            hyperparameters=values_of(read_section(section.hyperparameters)),
        ),
        takes,
    )
    if loaded.weights_sha256 != section.weights_sha256:
        raise _other_weights(loaded, section, source)
    if isinstance(loaded.model, own_module.OwnForward):
        own_module.give(loaded.model, model_outputs(outputs))
    else:
        loaded.model.outputs = model_outputs(outputs)
    return loaded


def _other_weights(loaded: LoadedModel, section: ModelSection, source: WeightSource) -> CheckpointError:
    ours, theirs = loaded.weights_sha256[:16], section.weights_sha256[:16]
    if section.origin == "module":
        return CheckpointError(
            f"The bundle was made of {section.name} with weights {theirs}; this module has others, weights {ours}.",
            "Give --checkpoint FILE, or a factory that does not draw weights at random.",
        )
    made_of = f"from {section.checkpoint}" if section.origin == "checkpoint" else "with demo weights"
    given = (
        "This version's demo weights"
        if loaded.checkpoint_path is None
        else f"{loaded.checkpoint_path} ({source.value})"
    )
    return CheckpointError(
        f"The bundle was made {made_of}, weights {theirs}; {given} has others, weights {ours}.",
        f"Give the checkpoint that the bundle was made from{_with_weights(section, source)}."
        if section.origin == "checkpoint"
        else "Leave --checkpoint out, or export the bundle again.",
    )


def _with_weights(section: ModelSection, source: WeightSource) -> str:
    """The --weights option of the export, where it is not the one used now."""
    return "" if section.weights is source else f", with --weights {section.weights.value}"


def rebuilt_on_golden(
    section: ModelSection, facts: BundleFacts, eval_set: EvaluationSet, weights: Weights, say: Say
) -> EvaluationSet:
    """The golden images with outputs of the rebuilt reference."""
    say("Rebuilding the reference.")
    loaded = rebuild(section, weights, facts.outputs, facts.takes)
    images = as_images(eval_set.inputs(0, len(eval_set)), facts.io_dtype, facts.preprocessing)
    return dataclasses.replace(eval_set, expected=_reference_outputs(loaded, images), reference=_described(loaded))


def rebuilt_on_images(
    section: ModelSection, facts: BundleFacts, spec: ImagesSpec, weights: Weights, say: Say
) -> ImagesReference:
    """The user's images with outputs of the rebuilt reference, tolerances derived on them, and labels.

    Uses at most `max_images`, spread evenly over the set. Raises ImageError without a readable image; UsageError,
    before the reference runs, for labels that do not fit the images or the model.
    """
    source = open_images(spec.path)
    labels_of = _label_finder(spec, source, section.num_classes)
    loaded = rebuild(section, weights, facts.outputs, facts.takes)
    limited = source.limit(spec.max_images)
    names, pixels, own = _read(limited, facts.preprocessing, say)
    _check_memory(facts, len(names))
    labels, notes = labels_of(names, own)
    say(f"Running the reference on {len(names)} images.")
    takes = loaded.takes
    images = _Normalized(pixels, facts.preprocessing, takes)
    expected = _reference_outputs(loaded, images)
    eval_set = EvaluationSet(
        inputs=lambda start, stop: takes.of(to_input(pixels[start:stop], facts.preprocessing, facts.io_dtype), start),
        expected=expected,
        names=names,
        images=_counted(limited, len(names)),
        reference=_described(loaded),
        outputs=facts.outputs,
        batch=facts.batch,
    )
    return ImagesReference(eval_set, _tolerances(loaded, facts, images, expected, say), labels, notes)


def _check_memory(facts: BundleFacts, images: int) -> None:
    """UsageError where outputs for so many images, of the reference and of a run, need more memory than there is."""
    memory = find_memory()
    each = _COPIES * 4 * sum(math.prod(size or 1 for size in tensor.shape[1:]) for tensor in facts.outputs)
    if memory is not None and images * each > memory.available_bytes:
        fitting = max(2, memory.available_bytes // each)
        raise UsageError(
            f"What the model gives for {images} images takes {images * each / 1e9:.1f} GB, and"
            f" {memory.available_bytes / 1e9:.1f} GB are free.",
            f"Give --max-images {fitting}.",
        )


def rebuilt_on_cluster(
    section: ModelSection,
    facts: BundleFacts,
    spec: ImagesSpec,
    weights: Weights,
    graph: Path,
    cluster_address: ClusterAddress,
    say: Say,
) -> ImagesReference:
    """What `rebuilt_on_images` returns, and the outputs of `graph` on the same images, all computed on a cluster.

    This process keeps no pixels. Raises what `rebuilt_on_images` raises, UsageError where a node cannot read an image
    that can be read here, UnavailableError where the cluster has no room.
    """
    source = open_images(spec.path)
    labels_of = _label_finder(spec, source, section.num_classes)
    if section.origin == "module":
        raise UsageError("--ray sends the reference to other processes, where your module is not.", "Leave it out.")
    loaded = rebuild(section, weights, facts.outputs)
    work = _cluster_work(loaded, facts, graph)
    limited = source.limit(spec.max_images)
    with cluster_address.connected() as cluster:
        readable = readable_images(limited, spec.max_images, facts.preprocessing, cluster.executor(DECODING_BYTES))
        for skipped in readable.skipped:
            say(f"Skipped {skipped}")
        labels, notes = labels_of(readable.names, readable.labels)
        kept = evaluated_images(len(readable), facts.rest, _rounding_images(len(readable)))
        outputs = run_in_shards(ShardedRunRequest(work, graph, limited, readable, facts.batch, kept), cluster, say)
    eval_set = EvaluationSet(
        inputs=lambda start, stop: _read_again(limited, readable, facts, start, stop),
        expected=outputs.reference,
        names=readable.names,
        images=_counted(limited, len(readable)),
        reference=_described(loaded),
        outputs=facts.outputs,
        batch=facts.batch,
    )
    few = {number: normalize(pixels[None], facts.preprocessing)[0] for number, pixels in outputs.pixels.items()}
    bounds = _tolerances(loaded, facts, FewImages(len(readable), few), outputs.reference, say)
    return ImagesReference(eval_set, bounds, labels, notes, outputs.graph)


def _cluster_work(loaded: LoadedModel, facts: BundleFacts, graph: Path) -> ValidationWork:
    return ValidationWork(
        graph=_graph_bytes(graph) if graph.is_file() else b"",
        executions=executions_here(graph, facts.rest) if graph.is_file() else (),
        model=loaded.model,
        preprocessing=facts.preprocessing,
        io_dtype=facts.io_dtype,
        threads=1,  # a worker has one core
    )


def _read_again(
    source: ImageSource, readable: ReadableImages, facts: BundleFacts, start: int, stop: int
) -> npt.NDArray[Any]:
    """Some of the images, in the engine's input dtype."""
    chosen = itertools.islice(readable.entries(source), start, stop)
    pixels = np.stack([preprocess.pixels(entry.load(), facts.preprocessing) for entry in chosen])
    return to_input(pixels, facts.preprocessing, facts.io_dtype)


def _graph_bytes(graph: Path) -> bytes:
    """A graph file's content, with weights from external files inside."""
    import onnx

    light = onnx.load(graph, load_external_data=False).graph
    if any(tensor.external_data for tensor in light.initializer):
        return bytes(onnx.load(graph).SerializeToString())
    return graph.read_bytes()


def _tolerances(
    loaded: LoadedModel, facts: BundleFacts, images: ImageArray, expected: Mapping[str, Float32Array], say: Say
) -> ToleranceSet:
    """Tolerances derived on `images` (N, C, H, W) with the reference's outputs for them."""
    say("Deriving tolerances on these images.")
    return derive_tolerances(
        loaded.model,
        images,
        expected,
        facts.rest,
        facts.outputs,
        tf32=facts.tf32,
        rounding_images=_rounding_images(len(images)),
        fake_quantized=_quantized(loaded, facts),
    )


def _quantized(loaded: LoadedModel, facts: BundleFacts) -> nn.Module | None:
    """The fake-quantized reference, by the bundle's quantization plan; None for bundles that are not quantized."""
    if facts.quantization is None:
        return None
    from spach_deploy.quantization.fake_quantization import fake_quantized
    from spach_deploy.quantization.plan import read_plan

    plan = read_plan(facts.quantization.record)
    return fake_quantized(facts.quantization.static_model(loaded.model), plan)


def _read(source: ImageSource, preprocessing: Preprocessing, say: Say) -> tuple[tuple[str, ...], Pixels, Labels | None]:
    """Names, pixels (N, H, W, C), and labels (N) where every image has one."""
    parts = list(batches(source, preprocessing, LARGEST_BATCH))
    for skipped in source.skipped:
        say(f"Skipped {skipped}")
    own = [part.labels for part in parts if part.labels is not None]
    names = tuple(name for part in parts for name in part.names)
    labels = np.concatenate(own) if len(own) == len(parts) else None
    return names, np.concatenate([part.pixels for part in parts]), labels


def _label_finder(spec: ImagesSpec, source: ImageSource, num_classes: int) -> LabelsOf:
    """A function that finds the labels once the images are read. Reads and checks a labels file at once."""
    if spec.labels is not None:
        labelling = open_labels(spec.labels, spec.path, source.classes, num_classes)
        return lambda names, own: (labelling.of(names, own), ())
    if source.classes:  # folders are the model's classes only where the user says so
        return lambda names, own: (None, ())
    return lambda names, own: _labels_of_npz(OwnLabels(spec.path, num_classes), names, own)


def _labels_of_npz(
    labelling: OwnLabels, names: tuple[str, ...], own: Labels | None
) -> tuple[ImageLabels | None, tuple[str, ...]]:
    """Labels in the npz, which need no option. Unusable ones are no error, but a note."""
    if own is None:
        return None, ()
    try:
        return labelling.of(names, own), ()
    except UsageError as error:
        return None, (f"The labels were not used: {error.message}",)


def _counted(source: ImageSource, used: int) -> str:
    return f"from {source.description}{source.of_all(used)}"


def as_images(inputs: Batch, io_dtype: IODtype, preprocessing: Preprocessing) -> Batch:
    """Engine inputs as float32 (N, C, H, W); of several inputs every image, and what is no image in float32."""
    if io_dtype is IODtype.UINT8:
        inputs = changed(inputs, lambda array: normalize(array, preprocessing) if array.dtype == np.uint8 else array)
    return as_floats(inputs, np.float32)


@dataclasses.dataclass(frozen=True)
class _Normalized:
    """Images float32 (N, C, H, W), or inputs with these, that are normalized when they are read: the pixels take a
    quarter of the memory.
    """

    pixels: Pixels
    preprocessing: Preprocessing
    takes: ModelInputs

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, chosen: list[int], /) -> Batch:
        return self.takes.at(normalize(self.pixels[chosen], self.preprocessing), chosen)


def _reference_outputs(loaded: LoadedModel, images: ImageArray) -> dict[str, Float32Array]:
    every = range(len(images))
    starts = every[::LARGEST_BATCH]
    parts = [evaluate_outputs(loaded.model, images[[*every[start : start + LARGEST_BATCH]]]) for start in starts]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _described(loaded: LoadedModel) -> str:
    made = "your own module" if loaded.origin == "module" else "demo weights"
    source = made if loaded.checkpoint_path is None else loaded.checkpoint_path.name
    return f"PyTorch in FP32, run here with {source}"
