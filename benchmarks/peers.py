"""Kernels, bytes and errors of the graphs that other tools make from a plain export, against ours.

    python -m benchmarks.peers [MODEL ...] [--environments DIR] [--gpu sm89]

Each tool takes torch.onnx.export's FP32 graph, in a virtual environment of its own, which is made when it is not yet
in --environments (3 GB in all). Their graphs and ours are built by the same compiler and run in the same ONNX Runtime.
The error is the relative L2 of the logits against PyTorch in FP32, the worst of the built-in photographs; INT8 is
calibrated on other photographs, the same for all.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import ModelProto

from benchmarks.kernels import BATCH, forms
from benchmarks.peer_tools.environments import PEERS, Environment, Run, environment, reason, run
from benchmarks.photographs import calibration_photographs
from benchmarks.quantization import Subject, Variant, deployed, planned, prepared
from benchmarks.results import record, table
from spach_deploy.bundle.outputs import LOGITS
from spach_deploy.common.errors import SpachError
from spach_deploy.data.images import probe_source
from spach_deploy.data.preprocess import normalize, pixels
from spach_deploy.engine.build import build_engine
from spach_deploy.engine.flavours import TensorRTForRTX
from spach_deploy.engine.plan_facts import read_plan_facts
from spach_deploy.models import load_model
from spach_deploy.options.gpus import parse_gpus
from spach_deploy.options.specs import EngineTarget, ModelSpec, Precision, Preprocessing
from spach_deploy.quantization.formats import INT8, Float32
from spach_deploy.quantization.plan import Scaling
from spach_deploy.quantization.scales import Method
from spach_deploy.validation.compare import compare_outputs
from tests.protos import equalize_graph, mark_sites, open_session, type_graph

OURS = "ours"
RIGHT = {"FP32": 1e-4, "FP16": 1e-2, "INT8": 1e-1}
"""A graph with a larger relative L2 computes something else and is not compared."""

_CALIBRATION = 16
_ERROR = "relative L2"
_NOISE = 1.5
"""Errors within this factor are as good as each other: graphs that compute the same, rounded in another order."""
_REFUSED = "TensorRT refuses: "
_TOOL_SECONDS = 900.0
_TOOLS = Path(__file__).with_name("peer_tools")
_ORT, _OLIVE = str(_TOOLS / "onnxruntime_tools.py"), str(_TOOLS / "olive_tools.py")
_AUTOCAST = ("-m", "modelopt.onnx.autocast", "--keep_io_types", "--opset", "20", "--onnx_path", "{model}")
_QUANTIZE = (
    *("-m", "modelopt.onnx.quantization", "--quantize_mode", "int8", "--high_precision_dtype", "fp16", "--opset", "20"),
    *("--calibration_eps", "cpu", "--calibration_data_path", "{calibration}", "--onnx_path", "{model}"),
    *("--output_path", "{output}"),
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a tool is asked for: `arguments` of its Python, with {model}, {output} and {calibration} for files."""

    peer: str
    name: str
    precision: str
    arguments: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"{PEERS[self.peer].name}: {self.name}"


def _ort(name: str, precision: str, recipe: str, *options: str) -> Recipe:
    half = ("--half",) if precision == "FP16" else ()
    return Recipe("ort", name, precision, (_ORT, recipe, "{model}", "{output}", *half, *options))


def _olive(name: str, precision: str, *options: str) -> Recipe:
    return Recipe("olive", name, precision, (_OLIVE, "{model}", "{output}", *options))


def _modelopt(name: str, *options: str) -> Recipe:
    return Recipe("modelopt", name, "INT8", (*_QUANTIZE, *options))


RECIPES = (
    _ort("basic level", "FP32", "basic"),
    _ort("optimizer vit, level 1", "FP32", "vit", "--level", "1"),
    _ort("optimizer vit, standard operators", "FP32", "vit", "--standard"),
    _olive("peephole", "FP32"),
    _ort("float16", "FP16", "none"),
    _ort("basic level, float16", "FP16", "basic"),
    _ort("optimizer vit, level 0, float16", "FP16", "vit", "--level", "0"),
    _ort("optimizer vit, level 1, float16", "FP16", "vit", "--level", "1"),
    _ort("optimizer vit, level 99, float16", "FP16", "vit", "--level", "99"),
    _ort("optimizer bert, level 1, float16", "FP16", "bert", "--level", "1"),
    _ort("optimizer vit, standard operators, float16", "FP16", "vit", "--standard"),
    _olive("peephole, float16", "FP16", "--half"),
    _olive("peephole, transformers, float16", "FP16", "--transformers", "--half"),
    Recipe("modelopt", "autocast", "FP16", (*_AUTOCAST, "--output_path", "{output}")),
    _ort("quantize_static, rest FP32", "INT8", "quantize", "--calibration", "{calibration}"),
    _ort("quantize_static, float16", "INT8", "quantize", "--calibration", "{calibration}", "--half"),
    _olive("static quantization, rest FP32", "INT8", "--calibration", "{calibration}"),
    _modelopt("quantization, entropy", "--calibration_method", "entropy"),  # its default
    _modelopt("quantization, max, attention in half", "--calibration_method", "max", "--disable_mha_qdq"),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A graph's figures. `problem` is why there are no kernels; `error` None where the graph does not run."""

    label: str
    precision: str
    error: float | None = None
    kernels: int | None = None
    megabytes: float | None = None
    attentions: int = 0
    products: str = ""
    problem: str = ""

    @property
    def is_right(self) -> bool:
        return self.error is not None and self.error <= RIGHT[self.precision]

    def cells(self) -> list[str]:
        known = self.kernels is not None or self.problem.startswith(_REFUSED)
        error = ("does not run" if known else "") if self.error is None else f"{self.error:.1e}"
        if self.kernels is None:
            return [self.label, self.precision, self.problem, "", "", "", error]
        moved = "" if self.megabytes is None else f"{self.megabytes:,.0f}"
        return [self.label, self.precision, str(self.kernels), moved, str(self.attentions), self.products, error]


@dataclasses.dataclass(frozen=True)
class Judge:
    """What every graph is held against: images (n, 3, S, S), PyTorch's logits (n, classes), and the GPU."""

    images: Float32
    logits: Float32
    target: EngineTarget

    def row(self, label: str, precision: str, path: Path) -> Row:
        """The figures of the graph in `path`."""
        row = Row(label, precision, self._error(path))
        try:
            plan = build_engine(path, self.target, TensorRTForRTX(), precision=_typing(precision)).plan
        except SpachError as error:
            return dataclasses.replace(row, problem=f"{_REFUSED}{refusal(str(error))}")
        facts = read_plan_facts(plan)
        if facts is None:
            return dataclasses.replace(row, problem="kernels not known")
        moved = facts.bytes_moved(BATCH)
        products = ", ".join(f"{count} {dtype}" for dtype, count in sorted(facts.products_by_dtype.items()))
        return dataclasses.replace(
            row,
            kernels=len(facts.kernels),
            megabytes=None if moved is None else moved / 1e6,
            attentions=facts.fused_attentions,
            products=products,
        )

    def _error(self, path: Path) -> float | None:
        """Relative L2 of the worst image; None when ONNX Runtime does not take the graph."""
        try:
            session = open_session(onnx.load(path), plain=True)
            name = session.get_inputs()[0].name
            parts = [session.run(None, {name: image[None]})[0] for image in self.images]
        except Exception as error:  # ONNX Runtime's have no common base
            print(f"{path.name} does not run: {reason(str(error))}", flush=True)
            return None
        return worst_relative_l2(np.concatenate(parts), self.logits)


def _typing(precision: str) -> Precision:
    return Precision.FP32 if precision == "FP32" else Precision.FP16


def worst_relative_l2(logits: Float32, wanted: Float32) -> float:
    """Of each image's logits, the largest; infinite where they cannot be compared, such as with NaN."""
    compared = compare_outputs({LOGITS: wanted}, {LOGITS: logits.astype(wanted.dtype)})
    return compared.outputs[0].rel_l2_worst if compared.outputs and not compared.problems else float("inf")


def refusal(text: str) -> str:
    """Why the compiler refuses, in few words: the operator that it does not know, or its own."""
    for word in ("SkipLayerNormalization", "BiasGelu", "Attention", "FusedMatMul", "FusedConv", "NhwcConv"):
        if word in text:
            return f"no operator {word}"
    return reason(text)


def made(recipe: Recipe, where: Environment, source: Path, calibration: Path, output: Path, execute: Run = run) -> str:
    """Have the tool write `output`; what went wrong, or nothing."""
    if where.problem:
        return f"did not install: {where.problem}"
    files = {"{model}": str(source), "{output}": str(output), "{calibration}": str(calibration)}
    ended = execute([str(where.python), *(files.get(word, word) for word in recipe.arguments)], _TOOL_SECONDS)
    if ended.code or not output.exists():
        return f"the tool fails: {reason(ended.text)}"
    return ""


def ours(name: str, images: int) -> Iterator[tuple[str, str, ModelProto]]:
    """Label, precision and typed graph of the plain and the simplified export, typed by our rules, and of ours."""
    for label, graph in forms(name):
        if label != "convolutions":
            shown = label if label == OURS else f"torch.onnx.export, {label}"
            yield shown, "FP32", graph
            yield shown, "FP16", type_graph(graph, Precision.FP16).model
    yield OURS, "INT8", quantized(name, images)


def quantized(name: str, images: int) -> ModelProto:
    """As spach-export --int8 makes it."""
    subject = Subject(name, images, 1)
    model, _, plan = planned(subject, Variant("INT8", Scaling(INT8, Method.MAX)))
    equalize_graph(model, plan)
    ranges = subject.ranges(model)
    mark_sites(model, plan)
    return deployed(model, plan, ranges)


def verdicts(rows: Sequence[Row]) -> Iterator[str]:
    """For each precision, where another graph that computes the same has fewer kernels, moves less, or errs less."""
    for precision in RIGHT:
        mine = next((row for row in rows if row.label == OURS and row.precision == precision), None)
        others = [row for row in rows if row.precision == precision and row.label != OURS and row.is_right]
        built = [row for row in others if row.kernels is not None]
        if mine is None or mine.kernels is None or not built:
            continue
        yield f"{precision}: {_compared('kernels', mine, built, lambda row: row.kernels)}"
        yield f"{precision}: {_compared('MB', mine, built, lambda row: row.megabytes)}"
        yield f"{precision}: {_compared(_ERROR, mine, built, lambda row: row.error)}"


def _compared(unit: str, mine: Row, others: Sequence[Row], figure: Callable[[Row], float | None]) -> str:
    """Ours against the best of the others."""
    known = [(value, row.label) for row in others if (value := figure(row)) is not None]
    own = figure(mine)
    if own is None or not known:
        return f"{unit} not known."
    best, label = min(known)
    noise = _NOISE if unit == _ERROR else 1.0
    shown = (f"{own:.1e}", f"{best:.1e}") if unit == _ERROR else (f"{own:,.0f}", f"{best:,.0f}")
    who = "ours has least" if own * noise < best else "**another has less**" if best * noise < own else "as good"
    return f"{unit} {shown[0]} ours, {shown[1]} best of the others ({label}): {who}."


def judged(name: str, environments: Mapping[str, Environment], gpu: str) -> Iterator[Row]:
    """Every row of one model."""
    loaded = load_model(ModelSpec(name))
    preprocessing = Preprocessing.for_size(loaded.image_size)
    images = normalize(np.stack([pixels(item.image, preprocessing) for item in probe_source()]), preprocessing)
    with torch.inference_mode():
        logits = loaded.model(torch.from_numpy(images)).numpy()
    judge = Judge(images, logits, EngineTarget(gpus=parse_gpus(gpu)))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path, plain, calibration = folder / "ours.onnx", folder / "plain.onnx", folder / "calibration.npz"
        np.savez(calibration, input=prepared(calibration_photographs(_CALIBRATION), preprocessing))
        for label, precision, graph in ours(name, _CALIBRATION):
            onnx.save(graph, path)
            yield judge.row(label, precision, path)
            if label.endswith("plain") and precision == "FP32":
                path.rename(plain)
        for recipe in RECIPES:
            output = folder / f"{recipe.peer}.onnx"
            output.unlink(missing_ok=True)
            problem = made(recipe, environments[recipe.peer], plain, calibration, output)
            row = Row(recipe.label, recipe.precision, problem=problem)
            yield row if problem else judge.row(recipe.label, recipe.precision, output)


def section(name: str, rows: Iterable[Row]) -> str:
    """One model's part of RESULTS.md, by precision."""
    kept = []
    for row in rows:
        kept.append(row)
        print(f"{name} | " + " | ".join(row.cells()), flush=True)
    ordered = [row for precision in RIGHT for row in kept if row.precision == precision]
    headings = (
        "graph",
        "precision",
        "kernels",
        f"MB at batch {BATCH}",
        "attentions fused",
        "products",
        "rel. L2, worst",
    )
    lines = "\n".join(f"- {verdict}" for verdict in verdicts(ordered))
    return f"### {name}\n\n{table(headings, [row.cells() for row in ordered])}\n\n{lines}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["ms_hybrid_s"])
    parser.add_argument("--environments", type=Path, metavar="DIR", help="default: a temporary folder")
    parser.add_argument("--gpu", default="sm89")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        cache = arguments.environments or Path(temporary)
        environments = {key: environment(peer, cache) for key, peer in PEERS.items()}
        sections: dict[str, str] = {}
        for name in arguments.models:
            sections[name] = section(name, judged(name, environments, arguments.gpu))
            write(sections, arguments.gpu)  # after each: a model takes a quarter of an hour


def write(sections: Mapping[str, str], gpu: str) -> None:
    """Into RESULTS.md, by model."""
    limits = ", ".join(f"{limit:g} in {precision}" for precision, limit in RIGHT.items())
    head = (
        f"Tools: {', '.join(map(str, PEERS.values()))}. The exports and ours are typed by our rules, the others by each"
        f" tool's. Compared are graphs that build and whose worst relative L2 against PyTorch is at most {limits}. The"
        f" weights are demo weights, so errors rank the graphs and are not those of a trained model. In INT8 each tool"
        f" chooses its layers, see products; Model-Optimizer's default gives attention's probabilities a fixed scale of"
        f" 1/127."
    )
    command = f"python -m benchmarks.peers {' '.join(sections)} --gpu {gpu}"
    packages = ("torch", "onnxruntime", "tensorrt-rtx")
    record("Kernels against other tools", command, "\n\n".join([head, *sections.values()]), packages)


if __name__ == "__main__":
    main()
