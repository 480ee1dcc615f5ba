"""What 8 bits and half cost in accuracy, on models trained on handwritten digits, ours beside onnxruntime's.

    python -m benchmarks.digits_accuracy [MIXING ...] [--precisions int8 fp8 fp16] [--quantizers naive ours] [--folds 5]

Five-fold cross-validation over all 1,797 pictures: each model is quantized with 64 pictures that it was trained on and
judged on those that it was not. The reference is the trained model in PyTorch and FP32. Cases: the model as trained;
outliers in LayerNorm channels, or in value channels, that leave its function as it was (tests/digits.py).

naive: onnxruntime.quantization.quantize_static with the settings TensorRT takes, weights per channel; for fp16, every
operator in half whatever its ranges. everything: quantize_static as it comes. Q and DQ run in floating point, half
tensors are rounded one by one, so nothing depends on this CPU's kernels. Training takes ten minutes on one core, once.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Iterator, Sequence

from onnx import ModelProto

from benchmarks.results import record, table
from spach_deploy.bundle.outputs import INPUT
from spach_deploy.graph.passes import TENSORRT_PASSES, apply_passes
from spach_deploy.graph.precision.decision import TypingOptions
from spach_deploy.graph.precision.formats import half_format
from spach_deploy.models.spach import Spach
from spach_deploy.options.specs import Precision
from spach_deploy.quantization.formats import eight_bits
from spach_deploy.quantization.plan import Scaling
from spach_deploy.quantization.scales import Method
from tests import digits
from tests.protos import in_place, measure_ranges, migrate_outliers, quantize_graph, type_graph


def ours(model: Spach, calibration: digits.Images, precision: Precision) -> ModelProto:
    """The typed graph of `model` in `precision`, calibrated on (n, 3, 16, 16) float32, as spach-export makes it."""
    form = eight_bits(precision)
    graph = digits.canonical(model, quantized=form is not None)
    batches = [calibration[start : start + 8] for start in range(0, len(calibration), 8)]
    if form is not None:
        return quantize_graph(graph, batches, Scaling(form, Method.MAX)).model
    half = half_format(precision)
    assert half is not None
    in_place(apply_passes, graph, TENSORRT_PASSES)
    feeds = [{INPUT: batch} for batch in batches]
    migrate_outliers(graph, measure_ranges(graph, feeds), half, TypingOptions().margin)
    return type_graph(graph, precision, measure_ranges(graph, feeds)).model


QUANTIZERS = ("naive", "everything", "ours")
_PEERS: dict[tuple[Precision, str], digits.Quantize] = {
    (Precision.INT8, "naive"): digits.naive_int8,
    (Precision.INT8, "everything"): digits.everything_int8,
    (Precision.FP16, "naive"): digits.naive_fp16,
}
_PRECISIONS = (Precision.INT8, Precision.FP8, Precision.FP16)


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What ours must hold, and `naive_loss`, what naive must lose at least or the case shows nothing. Points; `ratio`
    is of relative L2 to naive's.
    """

    loss: float | None = None
    flipped: int | None = None
    relative_l2: float | None = None
    ratio: float | None = None
    naive_loss: float | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """A precision, how the model is made hard, and what is asked of ours."""

    precision: Precision
    name: str
    spoil: digits.Spoil
    bounds: Bounds = Bounds()
    needs_attention: bool = False


_LAYER_NORM = functools.partial(digits.with_layer_norm_outliers, scale=300)
_LAYER_NORM_HALF = functools.partial(digits.with_layer_norm_outliers, scale=30000)
_VALUES = functools.partial(digits.with_value_outliers, scale=300)

CASES = (
    Case(Precision.INT8, "clean", digits.clean, Bounds(loss=0.3, flipped=3, relative_l2=0.015, ratio=0.75)),
    Case(Precision.INT8, "LayerNorm x300", _LAYER_NORM, Bounds(loss=0.5, relative_l2=0.015, naive_loss=10)),
    Case(Precision.INT8, "values x300", _VALUES, Bounds(relative_l2=0.02), needs_attention=True),
    Case(Precision.FP8, "clean", digits.clean),
    Case(Precision.FP8, "LayerNorm x300", _LAYER_NORM),
    Case(Precision.FP8, "values x300", _VALUES, needs_attention=True),
    Case(Precision.FP16, "clean", digits.clean, Bounds(loss=0.1)),
    Case(Precision.FP16, "LayerNorm x30000", _LAYER_NORM_HALF, Bounds(loss=0.1, naive_loss=10)),
)


def quantizer(name: str, precision: Precision) -> digits.Quantize | None:
    """By name; None where a peer has none for this precision."""
    if name == "ours":
        return lambda model, calibration: ours(model, calibration, precision)
    return _PEERS.get((precision, name))


def measure(mixing: str, case: Case, quantizers: Sequence[str], folds: int) -> dict[str, digits.CrossValidation | str]:
    """What each quantizer reached, or in words why it did not."""
    run = digits.rounded_logits if case.precision is Precision.FP16 else digits.logits
    results: dict[str, digits.CrossValidation | str] = {}
    for name in quantizers:
        quantize = quantizer(name, case.precision)
        if quantize is None:
            continue
        try:
            results[name] = digits.cross_validate(mixing, quantize, spoil=case.spoil, run=run, folds=folds)
        except NotImplementedError as error:
            results[name] = str(error)
    return results


def misses(case: Case, name: str, results: dict[str, digits.CrossValidation | str]) -> Iterator[str]:
    """The bounds of `case` that quantizer `name` does not hold; a NaN holds none."""
    result, naive, bounds = results[name], results.get("naive"), case.bounds
    if isinstance(result, str):
        return
    if name == "naive" and bounds.naive_loss is not None and not result.loss >= bounds.naive_loss:
        yield f"loses under {bounds.naive_loss:g} points: the case is void"
    if name != "ours":
        return
    if bounds.loss is not None and not result.loss <= bounds.loss:
        yield f"loss over {bounds.loss:g}"
    if bounds.flipped is not None and not result.flipped <= bounds.flipped:
        yield f"over {bounds.flipped} flipped"
    if bounds.relative_l2 is not None and not result.relative_l2 <= bounds.relative_l2:
        yield f"rel. L2 over {bounds.relative_l2:g}"
    beside = naive.relative_l2 if isinstance(naive, digits.CrossValidation) else float("inf")
    if bounds.ratio is not None and not result.relative_l2 <= bounds.ratio * beside:
        yield f"rel. L2 over {bounds.ratio:g} of naive's"


def rows(mixing: str, case: Case, quantizers: Sequence[str], folds: int) -> Iterator[list[str]]:
    """Lines of the table."""
    results = measure(mixing, case, quantizers, folds)
    for name, result in results.items():
        head = [f"{mixing}, {case.precision.value}, {case.name}", name]
        if isinstance(result, str):
            yield [*head, "", "", "", "", result]
            continue
        figures = [f"{result.accuracy:.2f}", f"{result.loss:.2f}", f"{result.flipped}", f"{result.relative_l2:.4f}"]
        yield [*head, *figures, "; ".join(misses(case, name, results))]


def wanted(mixings: Sequence[str], precisions: Sequence[Precision]) -> Iterator[tuple[str, Case]]:
    """Every pair that says something."""
    for mixing in mixings:
        attends = bool(digits.ARCHITECTURES[mixing].attention_dims)
        for case in CASES:
            if case.precision in precisions and (attends or not case.needs_attention):
                yield mixing, case


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mixings", nargs="*", metavar="MIXING", default=list(digits.MIXINGS))
    precisions = [precision.value for precision in _PRECISIONS]
    parser.add_argument("--precisions", nargs="+", choices=precisions, default=precisions)
    parser.add_argument("--quantizers", nargs="+", choices=QUANTIZERS, default=list(QUANTIZERS))
    parser.add_argument("--folds", type=int, choices=range(1, digits.FOLDS + 1), default=digits.FOLDS)
    arguments = parser.parse_args()
    for mixing in arguments.mixings:
        if mixing not in digits.MIXINGS:
            parser.error(f"there is no {mixing!r}; one of {', '.join(digits.MIXINGS)}")
    return arguments


def main() -> None:
    arguments = parse()
    precisions = [Precision(value) for value in arguments.precisions]
    lines = []
    for mixing, case in wanted(arguments.mixings, precisions):
        for line in rows(mixing, case, arguments.quantizers, arguments.folds):
            print(" | ".join(line), flush=True)
            lines.append(line)
    options = f"--precisions {' '.join(arguments.precisions)} --quantizers {' '.join(arguments.quantizers)}"
    command = f"python -m benchmarks.digits_accuracy {' '.join(arguments.mixings)} {options} --folds {arguments.folds}"
    headings = ("model, precision, case", "quantizer", "accuracy %", "loss", "flipped", "rel. L2", "misses")
    record("Accuracy on digits", command, table(headings, lines), ("torch", "onnxruntime"))


if __name__ == "__main__":
    main()
