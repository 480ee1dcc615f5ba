"""What each precision costs in accuracy on photographs: conv, trans, mlp and hybrid models trained on CIFAR-10.

    python -m benchmarks.cifar10_accuracy PICTURES [MIXING ...] [--models DIR] [--environments DIR] [--epochs 10]

PICTURES has train/CLASS/*.jpg and test/CLASS/*.jpg. Models are trained as examples/cifar10/train.py does (--models
keeps them; hybrid is the example's own), exported by spach-deploy, and judged on all test pictures against PyTorch in
FP32: both see the same pictures, so a paired test tells a loss from chance (`validation.accuracy`). 512 training
pictures calibrate every tool.

Forms: those for TensorRT, in ONNX Runtime with every tensor rounded to its type and no node fused; those for CPUs, in
ONNX Runtime and OpenVINO as they are deployed. Beside them NNCF, onnxruntime and Model-Optimizer from a plain export,
as they come; of those that are not installed it is said. Outliers are made as in the table of digits: some channels
made larger, and the weights behind them smaller, so that the function stays as it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from benchmarks.peer_tools.environments import PEERS, Environment, environment, run
from benchmarks.peers import RECIPES, Recipe, made
from benchmarks.results import record, table
from examples.cifar10 import train
from spach_deploy.benchmark.plain import PlainModel, plain_onnx, plain_openvino, quantize_plain, save_openvino
from spach_deploy.bundle.outputs import INPUT, LOGITS
from spach_deploy.bundle.schema import Manifest
from spach_deploy.bundle.store import GRAPH, Bundle
from spach_deploy.common.errors import SpachError
from spach_deploy.common.files import Destination
from spach_deploy.common.machine import available_threads, has_bf16, torch_threads
from spach_deploy.common.metrics import relative_l2
from spach_deploy.data.preprocess import normalize
from spach_deploy.models.spach import Spach
from spach_deploy.options.architecture import Architecture
from spach_deploy.options.specs import ExportOptions, ModelSpec, Precision, QuantizationSpec
from spach_deploy.pipeline.cpu_target import options_for
from spach_deploy.pipeline.export import export
from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner
from spach_deploy.runtime.openvino_runner import OpenVinoRunner
from spach_deploy.validation.accuracy import PairedAccuracy, paired
from tests import digits
from tests.protos import rounded_graph

Logits = npt.NDArray[np.float32]
Images = npt.NDArray[np.float32]
Run = Callable[[Images], Logits]
"""Logits (n, 10) of images (n, 3, 32, 32)."""

BATCH, CALIBRATION_PICTURES, VALIDATION_PICTURES = 250, 512, 64
GOALS = {Precision.FP16: 0.05, Precision.INT8: 0.3, Precision.FP8: 0.3}
"""Points of top-1 that ours may lose at most."""

_OURS = "spach-deploy"
_TOOLS = {"INT8": Precision.INT8, "FP16": Precision.FP16}


def architecture(mixing: str) -> Architecture:
    """The example's, or one way of mixing in all blocks, on 8x8 to 2x2 tokens: they train in a quarter of the time."""
    if mixing == "hybrid":
        return train.ARCHITECTURE
    stages = tuple(((mixing, count),) for count in (1, 2, 1))
    heads = train.ARCHITECTURE.heads if mixing == "trans" else Architecture.heads
    return dataclasses.replace(train.ARCHITECTURE, patch_size=4, width=72, stages=stages, heads=heads)


MIXINGS = ("conv", "trans", "mlp", "hybrid")


def trained(mixing: str, folder: Path, pictures: Path, test: train.Pictures, epochs: int) -> Spach:
    """The model of `mixing` in evaluation mode: from `folder`, or trained now and kept there."""
    path, wanted = folder / f"{mixing}.pth", architecture(mixing)
    if mixing == "hybrid":
        path = Path(train.__file__).with_name("model.pth")
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        training = train.Training(train.Recipe(epochs), train.Pictures.read(pictures / "train"), wanted)
        train.finish(training, test, path.with_suffix(".state"))
        train.write_checkpoint(training.model, path)
    return train.read_checkpoint(path, wanted).eval()


@dataclasses.dataclass(frozen=True)
class Case:
    """How a model is made hard, and the precisions in which that says something."""

    name: str
    spoil: digits.Spoil
    precisions: tuple[Precision, ...]
    needs_attention: bool = False


_HALVES, _EIGHT_BITS = (Precision.FP16, Precision.BF16), (Precision.INT8, Precision.FP8)
CLEAN = "as trained"
CASES = (
    Case(CLEAN, digits.clean, (*_HALVES, *_EIGHT_BITS)),
    Case("LayerNorm x300", functools.partial(digits.with_layer_norm_outliers, scale=300), _EIGHT_BITS),
    Case("values x300", functools.partial(digits.with_value_outliers, scale=300), _EIGHT_BITS, needs_attention=True),
    Case("LayerNorm x30000", functools.partial(digits.with_layer_norm_outliers, scale=30000), _HALVES),
)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model made hard: its file, the reference, and the pictures that tools calibrate and exports validate on."""

    checkpoint: Path
    model: Spach
    calibration: Path
    held_out: Path
    folder: Path

    @property
    def calibration_images(self) -> Images:
        """float32 (512, 3, 32, 32)."""
        with np.load(self.calibration) as content:
            return normalize(content["images"], train.PREPROCESSING)

    @functools.cache  # noqa: B019 - a subject lives as long as its folder
    def exported(self, precision: Precision, *, for_cpu: bool = False) -> Bundle:
        """The bundle of a precision, with an engine where one can be built, or as `--target cpu` measures it. Raises
        what an export raises.
        """
        quantization = QuantizationSpec(self.calibration if precision.is_quantized or for_cpu else None)
        asked = ExportOptions(
            ModelSpec(checkpoint=self.checkpoint), precision, images=self.held_out, quantization=quantization
        )
        where = self.folder / f"{precision.value}{'-cpu' if for_cpu else ''}"
        return export(options_for(asked, precision) if for_cpu else asked, destination=Destination.of(where)).bundle

    @functools.cached_property
    def manifest(self) -> Manifest:
        """Of the FP32 bundle: what a plain export takes and gives."""
        return self.exported(Precision.FP32, for_cpu=True).manifest

    @functools.cached_property
    def plain(self) -> Path:
        """The model as torch.onnx exports it."""
        path = self.folder / "plain.onnx"
        plain_onnx(PlainModel(self.model, self.manifest), self.manifest, path)
        return path


@dataclasses.dataclass(frozen=True)
class Row:
    """A form of a case: who made it, where it runs, and what it reached, or in words why it did not."""

    precision: Precision
    tool: str
    runtime: str
    found: PairedAccuracy | str
    flipped: int = 0
    error: float = 0.0

    @property
    def misses(self) -> bool:
        """Whether ours loses more points than its goal allows."""
        goal = GOALS.get(self.precision)
        ours = isinstance(self.found, PairedAccuracy) and self.tool == _OURS and goal is not None
        return ours and not self.found.drop_points <= goal  # type: ignore[union-attr, operator]

    def cells(self) -> list[object]:
        """What the table shows."""
        head = [self.precision.value, self.tool, self.runtime]
        if isinstance(self.found, str):
            return [*head, self.found, *[""] * 6]
        found = self.found
        low, high = found.interval
        drop = f"{found.drop_points + 0.0:.2f}{' **missed**' if self.misses else ''}"
        different = f"{found.only_reference_right} / {found.only_candidate_right}"
        figures = [f"{100 * found.top1_candidate:.2f}", drop, f"{low:.2f} to {high:.2f}", different]
        return [*head, *figures, f"{found.p_value:.2g}", self.flipped, f"{self.error:.1e}"]


@dataclasses.dataclass(frozen=True)
class Judge:
    """All test pictures, float32 (n, 3, 32, 32), their classes, and the trained model's logits in FP32."""

    images: Images
    labels: npt.NDArray[np.int64]
    logits: Logits

    def row(self, precision: Precision, tool: str, runtime: str, make: Callable[[], Run]) -> Row:
        """What the form that `make` makes reaches."""
        try:
            found = in_parts(make(), self.images)
        except SpachError as error:
            return Row(precision, tool, runtime, str(error).splitlines()[0])
        flipped = int((found.argmax(1) != self.logits.argmax(1)).sum())
        accuracy = paired(self.logits, found, self.labels)
        return Row(precision, tool, runtime, accuracy, flipped, relative_l2(found, self.logits))


def in_parts(run: Run, images: Images) -> Logits:
    """The logits of all images, some hundred at a time."""
    return np.concatenate([run(images[start : start + BATCH]) for start in range(0, len(images), BATCH)])


def in_torch(model: Spach, images: Images) -> Logits:
    """Logits of PyTorch in FP32."""
    with torch_threads(available_threads()), torch.inference_mode():
        return in_parts(lambda part: np.asarray(model(torch.from_numpy(part))), images)


def as_written(graph: Path, *, rounded: bool) -> Run:
    """The graph node by node: Q and DQ in floating point, half tensors rounded one by one where `rounded`, so that
    nothing depends on this CPU's kernels.
    """
    model = onnx.load(graph)
    content = (rounded_graph(model) if rounded else model).SerializeToString()
    return _onnxruntime(content, "none")


def _onnxruntime(graph: Path | bytes, optimization: Any) -> Run:
    runner = OnnxRuntimeRunner(graph, threads=available_threads(), optimization=optimization, max_batch=50)
    runner.__enter__()
    name = next(iter(runner.input_specs))
    return lambda images: np.asarray(next(iter(runner.run({name: images}).values())), np.float32)


def _openvino(graph: Path, hint: str) -> Run:
    runner = OpenVinoRunner(graph, threads=available_threads(), precision_hint=hint, max_batch=50)
    runner.__enter__()
    return lambda images: np.asarray(runner.run({INPUT: images})[LOGITS], np.float32)


def ours(subject: Subject, precision: Precision) -> Iterator[tuple[str, Callable[[], Run]]]:
    """Runtime and form of each way in which our exports run."""
    yield "TensorRT's form", lambda: as_written(subject.exported(precision).file(GRAPH), rounded=True)
    if precision is Precision.INT8:
        graph = functools.cache(lambda: subject.exported(precision, for_cpu=True).file(GRAPH))
        yield "ONNX Runtime, CPU", lambda: _onnxruntime(graph(), "all")
        yield "OpenVINO, f32", lambda: _openvino(graph(), "f32")
        if has_bf16():
            yield "OpenVINO, bf16", lambda: _openvino(graph(), "bf16")
    if precision is Precision.BF16 and has_bf16():
        yield (
            "OpenVINO, bf16",
            lambda: _openvino(subject.exported(precision, for_cpu=True).file(GRAPH), "bf16"),
        )


def tools(
    subject: Subject, precision: Precision, environments: Mapping[str, Environment]
) -> Iterator[tuple[str, str, Callable[[], Run]]]:
    """Tool, runtime and form of what others make of the plain export."""
    for recipe in RECIPES:
        if _TOOLS.get(recipe.precision) is precision and recipe.name in _WANTED and recipe.peer in environments:
            yield recipe.label, "as written", functools.partial(_of_tool, subject, recipe, environments[recipe.peer])
    if precision is Precision.INT8:
        yield "NNCF", "OpenVINO, f32", functools.partial(_of_nncf, subject)


_WANTED = ("float16", "quantize_static, rest FP32", "quantization, entropy")
"""Recipes of benchmarks.peers: each tool as it comes."""


def _of_tool(subject: Subject, recipe: Recipe, where: Environment) -> Run:
    output = subject.folder / f"{recipe.peer}-{recipe.precision}.onnx"
    images = subject.folder / "calibration.npz"
    np.savez(images, input=subject.calibration_images)
    if problem := made(recipe, where, subject.plain, images, output, run):
        raise SpachError(problem)
    return as_written(output, rounded=recipe.precision == "FP16")


def _of_nncf(subject: Subject) -> Run:
    if importlib.util.find_spec("nncf") is None:
        raise SpachError("not installed: pip install nncf")
    converted = plain_openvino(PlainModel(subject.model, subject.manifest), subject.manifest)
    path = subject.folder / "nncf.xml"
    save_openvino(quantize_plain(converted, subject.calibration_images[:128]), path)
    return _openvino(path, "f32")


def rows(
    case: Case, subject: Subject, judge: Judge, precisions: Sequence[Precision], environments: Mapping[str, Environment]
) -> Iterator[Row]:
    """All forms of one case."""
    for precision in (precision for precision in case.precisions if precision in precisions):
        for runtime, make in ours(subject, precision):
            yield judge.row(precision, _OURS, runtime, make)
        for tool, runtime, make in tools(subject, precision, environments):
            yield judge.row(precision, tool, runtime, make)


def write_pictures(pictures: Path, test: train.Pictures, folder: Path) -> tuple[Path, Path]:
    """Files of the pictures to calibrate on, from the training set, and of those that exports validate on."""
    files = folder / "calibrate_on.npz", folder / "validate_on.npz"
    known = train.Pictures.read(pictures / "train").pixels
    chosen = np.random.default_rng(0).choice(len(known), min(CALIBRATION_PICTURES, len(known)), replace=False)
    np.savez(files[0], images=known[torch.from_numpy(chosen)].numpy())
    np.savez(files[1], images=test.pixels[:: max(1, len(test.pixels) // VALIDATION_PICTURES)].numpy())
    return files


def measured(
    models: Mapping[str, Spach],
    asked: argparse.Namespace,
    test: train.Pictures,
    environments: Mapping[str, Environment],
) -> Iterator[tuple[str, Case, Row]]:
    """Every row of every case that says something of a model."""
    images = normalize(test.pixels.numpy(), train.PREPROCESSING)
    with tempfile.TemporaryDirectory() as name:
        files = write_pictures(asked.pictures, test, Path(name))
        for mixing, model in models.items():
            judge = Judge(images, test.labels.numpy(), in_torch(model, images))
            cases = [case for case in CASES if model.architecture.heads or not case.needs_attention]
            for case in (case for case in cases if case.name in (asked.cases or [case.name])):
                subject = subject_of(case.spoil(model), files, Path(tempfile.mkdtemp(dir=name)))
                for row in rows(case, subject, judge, asked.precisions, environments):
                    yield mixing, case, row


def subject_of(model: Spach, files: tuple[Path, Path], folder: Path) -> Subject:
    """The model with its checkpoint in `folder`, in FP32."""
    checkpoint = folder / "model.pth"
    torch.save({"model": model.state_dict(), "args": train.args_of(model.architecture)}, checkpoint)
    return Subject(checkpoint, model, *files, folder)


HEADINGS = (
    *("model, case", "precision", "made by", "runs in", "top-1 %", "points lost", "95 % interval"),
    *("only PyTorch / only the form right", "McNemar's p", "other class", "rel. L2"),
)


def told(models: Mapping[str, Spach], test: train.Pictures) -> str:
    """The accuracy of the trained models, in a sentence."""
    reached = ", ".join(f"{name} {train.accuracy(model, test):.2f} %" for name, model in models.items())
    goals = ", ".join(f"{precision.value} {goal:g}" for precision, goal in GOALS.items())
    return f"{len(test.labels):,} pictures. PyTorch in FP32: {reached}. Ours may lose, in points: {goals}."


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="folder with train/CLASS/*.jpg and test/CLASS/*.jpg")
    parser.add_argument("mixings", nargs="*", metavar="MIXING", default=list(MIXINGS))
    parser.add_argument("--models", type=Path, default=Path("build/cifar10_models"), help="keeps trained models")
    parser.add_argument("--environments", type=Path, help="where other tools are, or are installed (2 GB)")
    parser.add_argument("--epochs", type=int, default=10, help="of a model that is yet to be trained")
    parser.add_argument("--precisions", nargs="+", type=Precision, default=[*_HALVES, *_EIGHT_BITS])
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], metavar="CASE")
    parser.add_argument("--train-only", action="store_true", help="train what is missing, and end")
    arguments = parser.parse_args()
    for mixing in arguments.mixings:
        if mixing not in MIXINGS:
            parser.error(f"there is no {mixing!r}; one of {', '.join(MIXINGS)}")
    return arguments


def main() -> None:
    arguments = parse()
    torch.set_num_threads(available_threads())
    test = train.Pictures.read(arguments.pictures / "test")
    models = {
        mixing: trained(mixing, arguments.models, arguments.pictures, test, arguments.epochs)
        for mixing in arguments.mixings
    }
    if arguments.train_only:
        return
    where = arguments.environments
    others = {} if where is None else {name: environment(PEERS[name], where) for name in ("ort", "modelopt")}
    lines: list[list[object]] = []
    for name, case, row in measured(models, arguments, test, others):
        lines.append([f"{name}, {case.name}", *row.cells()])
        print(*lines[-1], sep=" | ", flush=True)
    record(
        "Accuracy on CIFAR-10",
        f"python -m benchmarks.cifar10_accuracy PICTURES {' '.join(models)} --epochs {arguments.epochs}",
        f"{told(models, test)}\n\n{table(HEADINGS, lines)}",
        [name for name in ("torch", "onnxruntime", "openvino", "nncf") if importlib.util.find_spec(name)],
        is_whole={*models} == {*MIXINGS} and not arguments.cases,
    )


if __name__ == "__main__":
    main()
