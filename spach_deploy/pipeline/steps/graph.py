"""The stages that `pipeline.export` lists, up to the typed graph: each a function with a small frozen result."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto

from spach_deploy.bundle.store import default_directory
from spach_deploy.common.errors import ImageError, MismatchError, MissingPackageError, SpachError, UsageError
from spach_deploy.common.progress import Phases
from spach_deploy.common.versions import refuse_unfit_packages
from spach_deploy.data.images import probe_source
from spach_deploy.data.preprocess import normalize, to_input
from spach_deploy.data.readers import ImageSource, Skipped, batches, open_images
from spach_deploy.graph.block_prototype import Prototype, prototype_of
from spach_deploy.graph.certificate import Certificate, certify
from spach_deploy.graph.editing import as_proto, without_weights
from spach_deploy.graph.export import INPUT, LOGITS, ExportedPrototype, export_canonical
from spach_deploy.graph.interface import add_interface, check_outputs
from spach_deploy.graph.opset import check_operators, check_opset, convert_opset
from spach_deploy.graph.passes import CPU_INT8_PASSES, CPU_PASSES, TENSORRT_PASSES, Pass, apply_passes
from spach_deploy.graph.precision.decision import PrecisionPolicy, TypingOptions
from spach_deploy.graph.precision.elements import LayerPrecision, element_types, weighted_layers
from spach_deploy.graph.precision.formats import half_format
from spach_deploy.graph.precision.ranges import RangeMeter, Ranges
from spach_deploy.graph.precision.typed_graph import TypedGraph, type_graph
from spach_deploy.models.checkpoint import LoadedModel, load_model
from spach_deploy.options.quantization import check_quantization
from spach_deploy.options.specs import ExportOptions, Flavour, IODtype, Precision, Preprocessing
from spach_deploy.pipeline.steps.quantization import mark_sites, quantize_typed
from spach_deploy.pipeline.steps.quantization import summary as quantized_summary
from spach_deploy.quantization.bias_correction import correct_biases
from spach_deploy.quantization.outlier_migration import migrate_outliers
from spach_deploy.quantization.plan import QuantizationPlan
from spach_deploy.quantization.quantize import equalize_graph
from spach_deploy.rewrites import REWRITES, RewriteResult, rewrite
from spach_deploy.rewrites.static_modules import StaticSpach
from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner, save_model, saved_graph
from spach_deploy.validation import user_answers as answers_file
from spach_deploy.validation.exact import ReferenceLogits, check_equal, prove_equal
from spach_deploy.validation.user_answers import Agreement, read_answers

GOLDEN_IMAGES = 8
"""Images in the golden pack, and those that every stage is proven on."""

RANGE_IMAGES = 256
"""At most this many of a user's images are looked at for ranges, spread evenly over the set."""

EXACT_BATCHES = (1, 2)
RANGE_BATCH = 1
"""One image at a time is as fast as several, and takes the least memory."""

Awaited = Callable[[], ReferenceLogits]
"""Gives the reference's logits, which may still be computed elsewhere until they are asked for."""


@dataclasses.dataclass(frozen=True)
class Photographs:
    """The images an export is judged on, as uint8 (N, S, S, 3) and normalized float32 (N, 3, S, S)."""

    source: ImageSource
    preprocessing: Preprocessing
    names: tuple[str, ...]
    pixels: NDArray[np.uint8]
    images: NDArray[np.float32]
    built_in: bool
    skipped: tuple[Skipped, ...] = ()

    def engine_input(self, io_dtype: IODtype) -> NDArray[np.generic]:
        """The images as the engine's caller sends them."""
        return to_input(self.pixels, self.preprocessing, io_dtype)


@dataclasses.dataclass
class GraphStep:
    """The FP32 graph in its target's form. `errors`: relative L2 of the exported graph at each batch size, where it was
    proven by itself and not in its target's form alone.

    `model` is None once it has been typed.
    """

    model: ir.Model | ModelProto | None
    changed: dict[str, tuple[str, ...]]
    errors: dict[int, float]


@dataclasses.dataclass
class TypedStep:
    """The typed graph. `errors`: relative L2 of the FP32 graph in its target's form, at each batch size.

    `model` is None once it has been saved: nothing after that needs its weights in memory. `interface` keeps the inputs
    and outputs.
    """

    model: ModelProto | None
    interface: GraphProto
    policy: PrecisionPolicy
    certificate: Certificate
    errors: dict[int, float]
    layers: tuple[LayerPrecision, ...] = ()


def check_options(options: ExportOptions) -> None:
    """Refuse what can be refused before any work."""
    refuse_unfit_packages()
    if importlib.util.find_spec("onnxruntime") is None:
        raise MissingPackageError("onnxruntime", "Validating a graph", "pip install 'spach-deploy[cpu]'")
    check_quantization(options)
    check_opset(options)
    known = [*(step.name for step in REWRITES), *(step.name for step in (*TENSORRT_PASSES, *CPU_INT8_PASSES))]
    for name in options.disabled_rewrites:
        if name not in known:
            raise UsageError(f"There is no rewrite {name!r} to turn off.", f"One of {', '.join(known)}.")


def load(options: ExportOptions, phases: Phases) -> LoadedModel:
    """The reference model with its weights; what was inferred or unwrapped is said."""
    loaded = load_model(options.model)
    check_outputs(options.outputs, loaded.num_classes)
    for note in loaded.notes:
        phases.note(f"{note[0].upper()}{note[1:]}.")
    return loaded


def hold_to_answers(
    loaded: LoadedModel, options: ExportOptions, phases: Phases
) -> tuple[LoadedModel, Agreement | None]:
    """The model that agrees with the user's answers, where some were given, and how well it does."""
    if options.answers is None:
        return loaded, None
    if loaded.origin == "demo":
        raise UsageError("--answers are of your model, and demo weights are nobody's.", "Give --checkpoint FILE too.")
    given = read_answers(options.answers)
    with phases.phase("compare with your answers"):
        return answers_file.hold_to_answers(loaded, given, phases.note)


def load_runtime() -> None:
    """ONNX Runtime, which is there (`check_options`), loaded before it is needed."""
    importlib.import_module("onnxruntime")


def target_directory(options: ExportOptions, loaded: LoadedModel) -> Path:
    """Where the bundle goes: --output, or build/MODEL-PRECISION."""
    return options.output or default_directory(loaded.name, options.precision.value)


def read_photographs(options: ExportOptions, preprocessing: Preprocessing, phases: Phases) -> Photographs:
    """The golden images: the user's, spread evenly over the set, or the built-in photographs."""
    built_in = options.images is None
    source = probe_source() if options.images is None else open_images(options.images)
    chosen = source.limit(GOLDEN_IMAGES)
    parts = list(batches(chosen, preprocessing, GOLDEN_IMAGES))
    if not parts:
        raise ImageError(f"No image could be read from {source.description}.", "Give other --images.")
    note_skipped(chosen.skipped, phases)
    pixels = np.concatenate([part.pixels for part in parts])
    names = tuple(name for part in parts for name in part.names)
    if len(pixels) < GOLDEN_IMAGES:
        phases.note(f"Only {len(pixels)} images to judge on; {GOLDEN_IMAGES} or more tell more.")
    return Photographs(source, preprocessing, names, pixels, normalize(pixels, preprocessing), built_in, chosen.skipped)


def note_skipped(skipped: Iterable[Skipped], phases: Phases) -> None:
    """Name each picture that was left out, and why."""
    for picture in skipped:
        phases.note(f"Skipped {picture}")


def rewrite_model(loaded: LoadedModel, options: ExportOptions) -> RewriteResult:
    """The static model."""
    return rewrite(loaded.model, _left_out(options), _quantized(options))


def prototype(loaded: LoadedModel, options: ExportOptions) -> Prototype:
    """What will have to be traced for the exported graph, which follows from the model's structure."""
    return prototype_of(loaded.model, _left_out(options), _quantized(options))


def export_graph(static: StaticSpach, image_size: int, traced: ExportedPrototype | None = None) -> GraphStep:
    """The exported graph."""
    return GraphStep(export_canonical(static, image_size, traced), {}, {})


def prove_graph(graph: GraphStep, photographs: Photographs, reference: ReferenceLogits) -> GraphStep:
    """The exported graph, equal to the reference."""
    assert graph.model is not None
    with saved_graph(graph.model) as path, OnnxRuntimeRunner(path) as runner:
        errors = prove_equal(
            "exported graph", lambda x: runner.run({INPUT: x})[LOGITS], photographs.images, reference, EXACT_BATCHES
        )
    return dataclasses.replace(graph, errors=errors)


@contextlib.contextmanager
def first_wrong_step(
    graph: GraphStep, static: StaticSpach, photographs: Photographs, reference: Awaited
) -> Iterator[None]:
    """Where the block finds that the graph in its target's form is wrong, and the exported graph was not proven by
    itself, that is asked too: the MismatchError names the first stage that is wrong.
    """
    try:
        yield
    except MismatchError:
        if not graph.errors:
            prove_graph(export_graph(static, photographs.images.shape[-1]), photographs, reference())
        raise


def give_form(
    graph: GraphStep, photographs: Photographs, options: ExportOptions, plan: QuantizationPlan | None = None
) -> GraphStep:
    """The graph in its target's form, with the caller's interface; equalized first where it will be quantized."""
    model = graph.model
    assert isinstance(model, ir.Model)
    if plan is not None:
        proto = as_proto(model)
        equalize_graph(proto, plan)
        model = ir.from_proto(proto)
        mark_sites(model, plan)
    passes = _passes(options)
    changed = apply_passes(model, passes, options.disabled_rewrites)
    add_interface(model, options.outputs, photographs.preprocessing)
    convert_opset(model, options.graph_opset, element_types(without_weights(model)))
    return dataclasses.replace(graph, model=as_proto(model), changed=changed)


def _passes(options: ExportOptions) -> tuple[Pass, ...]:
    """What gives the graph its target's form: TensorRT's, a CPU's, or that of eight bits on a CPU."""
    if options.engine.flavour is not Flavour.NONE:
        return TENSORRT_PASSES
    return CPU_INT8_PASSES if options.precision.is_quantized and options.rest is Precision.FP32 else CPU_PASSES


def _left_out(options: ExportOptions) -> tuple[str, ...]:
    """Rewrites and passes that this export does without: what is turned off, and TensorRT's forms where none builds."""
    applied = {step.name for step in _passes(options)}
    return (*options.disabled_rewrites, *(step.name for step in TENSORRT_PASSES if step.name not in applied))


def _quantized(options: ExportOptions) -> tuple[str, ...] | None:
    """Patterns of modules that will be quantized against the rules; None where nothing will be."""
    return options.quantization.quantize if options.precision.is_quantized else None


def module_paths(loaded: LoadedModel) -> list[str]:
    """Paths of all modules, shared ones under each of their names."""
    return [path for path, _ in loaded.model.named_modules(remove_duplicate=False)]


def guess_types(graph: GraphStep, options: ExportOptions) -> TypedGraph | None:
    """The graph, typed as it will be if every range fits; None where it cannot be typed, which measuring explains."""
    assert isinstance(graph.model, ModelProto)
    try:
        return type_graph(graph.model, options.rest, None, TypingOptions(io_dtype=options.outputs.io_dtype))
    except SpachError:
        return None


def type_precision(
    graph: GraphStep,
    loaded: LoadedModel,
    photographs: Photographs,
    reference: Awaited,
    options: ExportOptions,
    phases: Phases,
    *,
    plan: QuantizationPlan | None = None,
    guess: TypedGraph | None = None,
) -> TypedStep:
    """Ranges measured in FP32, by the same runs that prove the target's form; then the typed graph, certified.

    Where `guess` is right, the result has its very graph. MismatchError where that form computes something else.

    With a plan, biases are corrected after that proof, and the quantized layers' inputs go through eight bits.
    """
    model, graph.model = graph.model, None
    assert isinstance(model, ModelProto)
    rest = options.rest
    ranges, errors = _measured(model, photographs, reference, options, phases)
    tamed = _migrate_outliers(model, ranges, rest, phases)
    if tamed:
        guess = None
        ranges, errors = _measured(model, photographs, reference, options, phases)
    if plan is not None:
        correct_biases(model, plan)
    typed = type_graph(model, rest, ranges, TypingOptions(io_dtype=options.outputs.io_dtype), guess)
    result, policy = typed.model, typed.policy
    if plan is not None:
        result = quantize_typed(result, plan)
        policy = dataclasses.replace(policy, quantized=options.precision, quantized_summary=quantized_summary(plan))
    typed_model = ir.from_proto(result)
    check_operators(typed_model, element_types(result))
    certificate = certify(typed_model, module_paths(loaded))
    return TypedStep(result, interface_of(result), policy, certificate, errors, weighted_layers(result))


def _measured(
    model: ModelProto,
    photographs: Photographs,
    reference: Awaited,
    options: ExportOptions,
    phases: Phases,
) -> tuple[Ranges, dict[int, float]]:
    """Ranges of the FP32 graph, and its relative L2 by batch size; MismatchError where that is more than rounding."""
    is_half = options.rest.is_half
    meter = RangeMeter(model, tensors=None if is_half else ())
    io_dtype = IODtype.UINT8 if options.outputs.io_dtype is IODtype.UINT8 else IODtype.FP32
    feeds = photographs.engine_input(io_dtype)
    logits = {
        part: meter.run({INPUT: np.ascontiguousarray(feeds[slice(*part)])})[LOGITS] for part in _parts(len(feeds))
    }
    errors: dict[int, float] = {}
    for part, answer in logits.items():
        error = check_equal("graph in its target's form", answer, reference().of(slice(*part)))
        errors[len(answer)] = max(error, errors.get(len(answer), 0.0))
    described = f"the {len(feeds)} built-in photographs"
    if not photographs.built_in and is_half:
        described = _measure_users_images(meter, photographs, io_dtype, phases)
    return meter.ranges(described), errors


def _parts(count: int) -> list[tuple[int, int]]:
    """First and last of the images that are run together: two, then one at a time, so that both sizes are proven."""
    first = min(max(EXACT_BATCHES), count)
    return [(0, first), *((start, start + RANGE_BATCH) for start in range(first, count, RANGE_BATCH))]


def _migrate_outliers(model: ModelProto, ranges: Ranges, rest: Precision, phases: Phases) -> tuple[str, ...]:
    """Outlier channels that a half precision could not hold, exchanged with the weights behind them, in place."""
    form = half_format(rest)
    if form is None:
        return ()
    tamed = migrate_outliers(model, ranges, form, TypingOptions().margin)
    if tamed:
        names = f"{', '.join(tamed[:2])}{' and more' if len(tamed) > 2 else ''}"
        phases.note(f"Outlier channels that {rest.value} could not hold were equalized, exactly: {names}.")
    return tamed


def interface_of(model: ModelProto) -> GraphProto:
    """A graph of the model's inputs and outputs alone."""
    return GraphProto(input=model.graph.input, output=model.graph.output)


def save_graph(typed: TypedStep, path: Path, guess: TypedGraph | None) -> bool:
    """Let go of the typed graph, written to `path`; whether that was to be done, the guess being there already."""
    assert typed.model is not None
    is_new = guess is None or typed.model is not guess.model
    if is_new:
        save_model(typed.model, path)
    typed.model = None
    return is_new


def _measure_users_images(meter: RangeMeter, photographs: Photographs, io_dtype: IODtype, phases: Phases) -> str:
    """Look at more of the user's images, streamed; what was looked at, in words."""
    chosen = photographs.source.limit(RANGE_IMAGES)
    seen = 0
    named = frozenset(photographs.skipped)
    for batch in batches(chosen, photographs.preprocessing, RANGE_BATCH):
        meter.run({INPUT: to_input(batch.pixels, photographs.preprocessing, io_dtype)})
        seen += len(batch)
    note_skipped([skipped for skipped in chosen.skipped if skipped not in named], phases)
    described = f"{seen} images{chosen.of_all(seen)} from {photographs.source.description}"
    phases.note(f"Ranges were measured on {described}.")
    return described
