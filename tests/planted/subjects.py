"""What faults are planted in: a model with its reference, its graphs in every form, and their noise floors."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto

from spach_deploy.blocks import rewrite
from spach_deploy.common.metrics import relative_l2
from spach_deploy.data.images import probe_source
from spach_deploy.data.preprocess import normalize
from spach_deploy.data.readers import batches
from spach_deploy.graph.editing import as_proto
from spach_deploy.graph.export import export_canonical
from spach_deploy.graph.passes import TENSORRT_PASSES, apply_passes
from spach_deploy.models.demo import load_demo_weights
from spach_deploy.models.outputs import SelectableOutputs
from spach_deploy.models.registry import create_model
from spach_deploy.options.specs import Precision, Preprocessing
from spach_deploy.validation.bisect import ProbedReference
from spach_deploy.validation.rounding_error import evaluate, evaluate_fp64
from tests import static_models
from tests.protos import in_place, measure_ranges, open_session, rounded_graph, type_graph

Logits = NDArray[np.float32]

FORMS = ("canonical", "target", "fp16")
"""The exported FP32 graph, the same in TensorRT's form, and that in half precision."""

_IMAGES = 2


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model, images (2, 3, S, S), its graphs serialized, and of each graph the logits and the noise floor.

    A floor is the relative L2 of a right graph's logits: against PyTorch in FP32, and at least FP32's own noise against
    FP64. `reference` is shared by all bisections.
    """

    name: str
    model: SelectableOutputs
    images: NDArray[np.float32]
    graphs: Mapping[str, bytes]
    logits: Mapping[str, Logits]
    floors: Mapping[str, float]
    reference: ProbedReference

    def graph(self, form: str) -> ModelProto:
        """A copy to spoil."""
        graph: ModelProto = onnx.load_from_string(self.graphs[form])
        return graph


def small(kind: str) -> Subject:
    """One of the small models of `tests.static_models`, which export in seconds."""
    return _subject(kind, static_models.small_model(kind), static_models.images(_IMAGES))


def registered(name: str) -> Subject:
    """A published model with demo weights, on built-in photographs."""
    model = create_model(name)
    load_demo_weights(model)
    preprocessing = Preprocessing.for_size(model.architecture.image_size[0])
    batch = next(iter(batches(probe_source().limit(_IMAGES), preprocessing, _IMAGES)))
    return _subject(name, model, normalize(batch.pixels, preprocessing))


@functools.cache
def shared(kind: str) -> Subject:
    """`small(kind)`, made once."""
    return small(kind)


def _subject(name: str, model: SelectableOutputs, images: NDArray[np.float32]) -> Subject:
    canonical = as_proto(export_canonical(rewrite(model).model, model.architecture.image_size[0]))
    target = ModelProto()
    target.CopyFrom(canonical)
    in_place(apply_passes, target, TENSORRT_PASSES)
    half = type_graph(target, Precision.FP16, measure_ranges(target, [{"input": images}])).model
    graphs = dict(zip(FORMS, (canonical, target, half), strict=True))
    exact = evaluate(model, images)
    noise = relative_l2(exact, evaluate_fp64(model, images))
    logits = {form: run(graph, images) for form, graph in graphs.items()}
    floors = {form: max(noise, relative_l2(value, exact)) for form, value in logits.items()}
    serialized = {form: bytes(graph.SerializeToString()) for form, graph in graphs.items()}
    reference = ProbedReference(model, images)
    reference.view(_IMAGES)
    return Subject(name, model, images, serialized, logits, floors, reference)


def run(graph: ModelProto, images: NDArray[np.float32]) -> Logits:
    """Logits of a graph, every half tensor of it rounded; NaN where they overflow."""
    if any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in graph.graph.initializer):
        graph = rounded_graph(graph)
    name = graph.graph.input[0].name
    session = open_session(graph, threads=torch.get_num_threads())
    batch = graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value or len(images)
    starts = range(0, len(images), batch)
    parts = [session.run(None, {name: images[start : start + batch]})[0] for start in starts]
    return np.concatenate(parts)


def effect(logits: Logits, clean: Logits) -> float:
    """Relative L2 that a change makes in the logits; infinite where they are not finite."""
    return relative_l2(logits, clean) if np.isfinite(logits).all() else float("inf")
