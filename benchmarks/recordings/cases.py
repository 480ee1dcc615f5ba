"""Which commands are recorded, in their order: later ones read what earlier ones wrote.

One model of each kind of network: isotropic with attention, and multi-stage with convolutions, with spatial MLPs, and
with convolutions and attention. Two have their published 224 pixels, as the sizes of a spatial MLP depend on the image.
The others have 64, which leaves every stage at least two tokens a side: layers, rewrites and passes are those of 224
pixels, and an export takes seconds.
"""

from __future__ import annotations

import dataclasses
import enum
import fnmatch
import re
from collections.abc import Iterable, Iterator


class Text(enum.Enum):
    """How much of what a command prints is compared."""

    EXACT = "exact"  # all but folders, times and versions
    FIGURES = "figures"  # measured figures are left out, too
    NONE = "none"  # which of several wins is a matter of measured times


@dataclasses.dataclass(frozen=True)
class Case:
    """A command, the file or folder that it writes, and the cases whose output it reads."""

    name: str
    command: tuple[str, ...]
    output: str = ""
    needs: tuple[str, ...] = ()
    text: Text = Text.FIGURES


MODELS = {"trans_xxs": 224, "ms_conv_xxs": 64, "ms_mlp_xxs": 224, "ms_hybrid_xs": 64}
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
SMALLEST = ("--model", "ms_trans_xxs", "--image-size", "64")
PHOTOS, LABELLED, CHECKPOINT = "photos.npz", "labelled.npz", "weights.pth"
GRAPH, ENGINE, INT8 = "ms_conv_xxs-fp16-graph", "ms_conv_xxs-fp16-engine", "ms_conv_xxs-int8-graph"
QUICK = ("help-*", "wrong-*", "list*", "small")
"""Cases of which a test has a recording that is the same on every machine."""

COMMANDS = ("export", "calibrate", "validate", "predict", "package", "benchmark", "doctor")
PACKAGES = ("triton", "cpp", "kubernetes", "polygraphy", "onnxruntime")


def cases(patterns: Iterable[str] = ("*",)) -> list[Case]:
    """The cases whose names fit a pattern, with those that they need."""
    known = {case.name: case for case in (*help_pages(), *wrong_usages(), *exports(), *variants(), *_uses())}
    wanted = {name for pattern in patterns for name in fnmatch.filter(known, pattern)}
    while missing := {need for name in wanted for need in known[name].needs} - wanted:
        wanted |= missing
    return [case for name, case in known.items() if name in wanted]


def help_pages() -> Iterator[Case]:
    """What commands say of themselves."""
    for command in COMMANDS:
        yield Case(f"help-{command}", (f"spach-{command}", "--help"), text=Text.EXACT)
    for kind in PACKAGES:
        yield Case(f"help-package-{kind}", ("spach-package", kind, "--help"), text=Text.EXACT)
    yield Case("list", ("spach-export", "--list"), text=Text.EXACT)
    yield Case("list-rewrites", ("spach-export", "--list-rewrites"), text=Text.EXACT)


def exports() -> Iterator[Case]:
    """Every model in every precision, without and with an engine."""
    for model, size in MODELS.items():
        for precision in PRECISIONS:
            eight_bits = ("--calibration", PHOTOS) if precision in ("int8", "fp8") else ()
            common = ("--model", model, "--image-size", str(size), f"--{precision}", *eight_bits)
            yield _export(f"{model}-{precision}-graph", *common, "--engine", "none")
            yield _export(f"{model}-{precision}-engine", *common, "--engine", "tensorrt-rtx", "--gpu", "sm89")


def variants() -> Iterator[Case]:
    """Other exports, of small models and mostly without an engine."""
    none = ("--engine", "none")
    caller = ("--io-dtype", "uint8", "--top-k", "5", "--softmax")
    yield _export("small", *SMALLEST, *none)
    yield _export("uint8-top5", *SMALLEST, "--fp16", *caller, *none)
    yield _export("opset17", *SMALLEST, "--fp16", "--opset", "17", *none)
    yield _export("no-rewrite", *SMALLEST, "--no-rewrite", "shift_depthwise", *none)
    yield _export("vnni", *SMALLEST, "--int8", "--rest", "fp32", "--calibration", PHOTOS, "--vnni", *none)
    yield _export("entropy", *SMALLEST, "--int8", "--method", "entropy", "--calibration", PHOTOS, *none)
    yield _export("rest-bf16", *SMALLEST, "--int8", "--rest", "bf16", "--calibration", PHOTOS, *none)
    yield _export("max-rel-l2", *SMALLEST, "--int8", "--max-rel-l2", "0.03", "--calibration", PHOTOS, *none)
    yield _export("images", *SMALLEST, "--fp16", "--images", PHOTOS, "--batch", "1:2:4", *none)
    yield _export("checkpoint", "--checkpoint", CHECKPOINT, "--image-size", "64", "--heads", "4", *none)
    yield _export("recipe", "--recipe", "recipe.toml")
    yield _export("default-engine", *SMALLEST, "--fp16", "--verbose")
    yield _export("two-gpus", *SMALLEST, "--fp16", "--gpu", "sm80,rtx4090", "--opt-level", "1", "--no-tf32")
    yield dataclasses.replace(_export("json", *SMALLEST, *none, "--json"), text=Text.NONE)
    yield dataclasses.replace(_export("target-cpu", *SMALLEST, "--target", "cpu"), text=Text.NONE)
    yield _export("auto", *SMALLEST, "--auto", "--calibration", PHOTOS, "--gpu", "sm89")
    zoo = ("--zoo", "*trans_xxs", "--image-size", "64", "--precision", "fp32,fp16", "--jobs", "1")
    yield _export("zoo", *zoo, *none)
    yield Case("dry-run", ("spach-export", *SMALLEST, "--fp16", "--dry-run"))
    yield Case("dry-run-zoo", ("spach-export", *zoo, "-o", "build/dry", "--dry-run"))
    yield Case("calibrate", ("spach-calibrate", *SMALLEST, "--calibration", PHOTOS, "-o", "scales.json"), "scales.json")
    yield _export("calibrated", *SMALLEST, "--int8", "--calibration", "scales.json", *none, needs=("calibrate",))


def _uses() -> Iterator[Case]:
    """What is done with bundles."""
    graph, engine, int8 = (f"build/{name}" for name in (GRAPH, ENGINE, INT8))
    yield Case("validate", ("spach-validate", graph), needs=(GRAPH,))
    yield Case("validate-plan", ("spach-validate", f"{engine}/engine.plan"), needs=(ENGINE,))
    yield Case("validate-accept", ("spach-validate", engine, "--accept", "graph"), needs=(ENGINE,))
    yield Case("validate-graph", ("spach-validate", f"{graph}/model.onnx", "--images", PHOTOS), needs=(GRAPH,))
    yield Case("validate-two", ("spach-validate", graph, int8), needs=(GRAPH, INT8))
    yield Case("validate-bisect", ("spach-validate", graph, "--bisect"), needs=(GRAPH,))
    labelled = ("spach-validate", int8, "--images", LABELLED, "--max-drop", "50")
    yield Case("validate-labels", labelled, needs=(INT8,))
    against = ("spach-validate", f"{int8}/model.onnx", "--against", graph)
    yield Case("validate-against", against, needs=(GRAPH, INT8))
    yield Case("validate-changed", ("spach-validate", "changed"), needs=(GRAPH,))
    yield from _packages(graph, engine)
    runners = ("--runner", "eager", "--runner", "onnxruntime", "--batch", "1", "--rounds", "2", "--seconds", "0.1")
    yield Case("benchmark", ("spach-benchmark", graph, *runners), needs=(GRAPH,), text=Text.NONE)
    yield Case("doctor", ("spach-doctor",))
    yield Case("doctor-bundle", ("spach-doctor", engine), needs=(ENGINE,))
    yield Case("doctor-plan", ("spach-doctor", f"{engine}/engine.plan"), needs=(ENGINE,))


def _packages(graph: str, engine: str) -> Iterator[Case]:
    yield _package("triton", graph, needs=GRAPH)
    yield _package("triton-ensemble", "build/uint8-top5", "--ensemble", needs="uint8-top5")
    yield Case("triton-check", ("spach-package", "triton", "--check", "packages/triton"), needs=("triton",))
    yield _package("cpp", engine, needs=ENGINE)
    image = ("--triton-version", "25.08", "--image", "registry.example.com/team/vit")
    yield _package("kubernetes", engine, *image, needs=ENGINE)
    yield _package("polygraphy", engine, needs=ENGINE)
    yield _package("onnxruntime", engine, needs=ENGINE)


def _export(name: str, *options: str, needs: tuple[str, ...] = ()) -> Case:
    return Case(name, ("spach-export", *options, "-o", f"build/{name}"), f"build/{name}", needs)


def _package(name: str, bundle: str, *options: str, needs: str) -> Case:
    command = ("spach-package", name.partition("-")[0], bundle, "-o", f"packages/{name}", *options)
    return Case(name, command, f"packages/{name}", (needs,))


def wrong_usages() -> Iterator[Case]:
    """Mistakes, each of which is one sentence and an exit code."""
    for line in _WRONG.strip().splitlines():
        name = re.sub(r"[^\w.]+", "-", line.removeprefix("spach-"))
        yield Case(f"wrong-{name.strip('-')}", tuple(line.split()), text=Text.EXACT)


_WRONG = """
spach-export
spach-export --model ms_hybird_s
spach-export --model nothing
spach-export --model trans_xxs --int8
spach-export --model trans_xxs --fp16 --bf16
spach-export --model trans_xxs --fp16 --gpu sm12
spach-export --model trans_xxs --fp8 --gpu sm86 --calibration photos.npz
spach-export --model trans_xxs --batch 8:4:2
spach-export --model trans_xxs --image-size 31
spach-export --model trans_xxs --image-size -1
spach-export --model trans_xxs --workspace 2X
spach-export --model trans_xxs --no-rewrite nothing
spach-export --model trans_xxs --recipe missing.toml
spach-export --model trans_xxs --recipe notes.txt
spach-export --model trans_xxs --recipe unknown.toml
spach-export --model trans_xxs --checkpoint missing.pth
spach-export --model trans_xxs --checkpoint notes.txt
spach-export --model trans_xxs --checkpoint weights.pth
spach-export --model trans_xxs --images missing
spach-export --model trans_xxs --images notes.txt
spach-export --model trans_xxs --opset 5
spach-export --model trans_xxs --top-k 2000
spach-export --model trans_xxs --mean 1,2
spach-export --model trans_xxs --engine nothing
spach-export --model trans_xxs --precision fp16
spach-export --model trans_xxs --max-drop 1
spach-export --model trans_xxs -o mine
spach-export --model trans_xxs --flying
spach-export --zoo nothing*
spach-export --zoo *xxs --model trans_xxs
spach-calibrate --model trans_xxs -o scales.json
spach-calibrate --model trans_xxs --calibration missing -o scales.json
spach-validate
spach-validate missing
spach-validate notes.txt
spach-validate mine
spach-validate missing --max-drop 1
spach-validate grpc://nowhere:1/model
spach-package
spach-package nothing
spach-package triton missing -o models
spach-package kubernetes missing -o folder
spach-package cpp notes.txt -o folder
spach-package polygraphy missing -o folder
spach-package onnxruntime missing -o folder
spach-predict missing photo.jpg
spach-predict notes.txt
spach-benchmark missing
spach-benchmark notes.txt --runner nothing
spach-doctor missing
spach-doctor --flying
"""
