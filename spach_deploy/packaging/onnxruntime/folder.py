"""The folder that spach-package onnxruntime writes, in one step: a killed run leaves the old folder or none.

FOLDER/
  manifest.json    the bundle's, of the files here, with a kind: spach-validate FOLDER reads it
  README.md        what needs what, and how to use it
  model.onnx       the graph in ONNX Runtime's form, for the CPU and for CUDA
  model_ctx.onnx   where the bundle has a plan: the EPContext model that loads engine.plan, or holds it with --embed
  engine.plan      the plan
  run.py main.cpp CMakeLists.txt   run the golden images with the best execution provider, the same for every bundle
  golden.py golden.h               the comparison that they make
  model.txt golden.*.bin           what they read; labels.txt with --labels
  golden.npz       what spach-validate reads; quantization.json where the bundle has it

golden.NAME.bin holds the numbers of the input or an output for all golden images, little-endian, one image after the
other. model.txt has one entry a line, words with spaces between them:

    batch N                                        images to run at once
    input NAME ROLE DTYPE STORED EXTENTS...        of one image; STORED is the dtype in golden.NAME.bin
    output NAME ROLE DTYPE STORED EXTENTS...
    file FILE BYTES SHA256                         of every file that the programs read
    run FILE PROVIDER NEEDS...                     what to try, the best first, and what that takes
    bound FILE NAME REL_L2 MAX_ABS TIE             how far the output may be from PyTorch's in FP32; inf for no bound.
                                                   TIE, of logits and top_indices: classes whose scores PyTorch has so
                                                   close may change places
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.outputs import INPUT, expected_outputs, of_role
from spach_deploy.bundle.schema import Manifest, TensorInfo
from spach_deploy.bundle.store import (
    CONTEXT,
    GOLDEN,
    GRAPH,
    ONNXRUNTIME,
    PLAN,
    QUANTIZATION,
    Bundle,
    check_target,
    seal_as,
    writing,
)
from spach_deploy.common.errors import BundleError, UsageError
from spach_deploy.common.files import sha256_of
from spach_deploy.common.machine import VNNI_ONLY
from spach_deploy.common.versions import ROUNDS_FP16
from spach_deploy.data.labels import as_text, read_labels
from spach_deploy.graph.ep_context import RTX_PROVIDER, TENSORRT_PROVIDER, PlanContext, context_model
from spach_deploy.graph.external_data import check_is_one_file
from spach_deploy.graph.runtimes import INSTEAD_OF_BFLOAT16, NO_BFLOAT16, GraphNeeds, reading, runtimes
from spach_deploy.options.specs import Precision, Role, size_in_words
from spach_deploy.validation.bundle_facts import BundleFacts, check_interface
from spach_deploy.validation.verdict import Tolerance

if TYPE_CHECKING:
    from spach_deploy.pipeline.runtime_form import RuntimeGraph

TEMPLATES = Path(__file__).with_name("templates")
MODEL_TEXT, LABELS, README = "model.txt", "labels.txt", "README.md"
PROGRAMS = ("run.py", "golden.py", "main.cpp", "golden.h", "CMakeLists.txt")
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"

PLUGIN = "onnxruntime-ep-nv-tensorrt-rtx"
_PLUGINS = {"1.7": "0.5.0", "1.6": "0.4.0", "1.5": "0.3.0"}
"""Versions of NVIDIA's provider for TensorRT for RTX by the one that they carry, as their libraries' names say."""


@dataclasses.dataclass(frozen=True)
class GraphProviders:
    """The execution providers of ONNX Runtime's own that run a graph, the fastest first, and the oldest version that
    does, empty where every one that was tried does. `readers`: runtimes that read such graphs on a CPU; empty where
    nothing is known.
    """

    names: tuple[str, ...]
    oldest: str = ""
    readers: str = ""

    @classmethod
    def of(cls, graph: Path, *, cpu_only: bool, instead: str = "Leave --device out.") -> GraphProviders:
        """By the formats, opset and operators of the graph. UsageError, with the next step `instead`, where it is for a
        CPU and runs on none.
        """
        needs, known = GraphNeeds.of(graph), runtimes().onnxruntimes
        names = (CPU,) if cpu_only else (CUDA, CPU)
        if needs is None:
            return cls(names)
        if needs.bfloat16:
            if cpu_only:
                raise UsageError(NO_BFLOAT16, instead)
            names = (CUDA,)
        first = next((one.version for one in known if not one.misfit(needs, on_gpu=CPU not in names)), None)
        return cls(names, "" if first in (None, known[0].version) else first, reading(needs))

    @property
    def requirement(self) -> str:
        """What pip installs, as a shell's word."""
        package = "onnxruntime" if CPU in self.names else "onnxruntime-gpu"
        return f'"{package}>={self.oldest}"' if self.oldest else package


@dataclasses.dataclass(frozen=True)
class OnnxRuntimePackage:
    """A written folder. `provider`: the execution provider of its plan, empty without one. `graph`: where model.onnx
    runs. `notes`: sentences on where it runs and where not.
    """

    path: Path
    bundle: Bundle
    facts: BundleFacts
    provider: str
    graph: GraphProviders
    notes: tuple[str, ...]


def write_folder(
    bundle: Path,
    output: Path,
    *,
    labels: Path | None = None,
    embed: bool = False,
    cpu_only: bool = False,
    overwrite: bool = False,
) -> OnnxRuntimePackage:
    """Write the graph of `bundle` in ONNX Runtime's form to `output`, and its plan as an EPContext model.

    `embed`: the plan's bytes are in that model. `cpu_only`: model.onnx is for the CPU alone, INT8 in the form that it
    computes in integers; always so of a bundle of --target cpu. Raises BundleError where `bundle`
    is not a bundle or was changed, or the target cannot be written; UsageError for labels that do not fit, for a graph
    in bfloat16 that is for the CPU, and with `embed` for no plan or one that is too large.
    """
    destination = check_target(output, overwrite=overwrite, contents=ONNXRUNTIME)
    opened = Bundle.open(bundle)
    facts = BundleFacts.of(opened)
    check_is_one_file(opened.file(GRAPH))
    check_interface(opened)
    if embed and opened.plan is None:
        raise UsageError(
            f"--embed puts the plan into one file, and the bundle has none: {opened.manifest.engine.why_none}.",
            "Leave --embed out.",
        )
    names = None if labels is None else _labels(labels, opened)
    golden = Golden.load(opened.file(GOLDEN))
    golden.check(opened)
    from spach_deploy.pipeline.runtime_form import graph_for_runtime  # loads PyTorch, after what may be refused

    cpu_only = cpu_only or opened.is_for_cpu
    in_integers = cpu_only and facts.precision is Precision.INT8
    form = graph_for_runtime(opened, rest=Precision.FP32 if in_integers else None)
    instead = INSTEAD_OF_BFLOAT16 if opened.is_for_cpu else "Leave --device out."
    providers = GraphProviders.of(form.path, cpu_only=cpu_only, instead=instead)
    context = None if opened.plan is None else PlanContext.of(opened.manifest.engine, opened.plan)
    made = OnnxRuntimePackage(
        output,
        opened,
        facts,
        "" if context is None else context.provider,
        providers,
        tuple(_notes(opened, facts, form, providers)),
    )
    with writing(destination) as staging:
        shutil.copyfile(form.path, staging / GRAPH)
        if context is not None:
            _write_context(staging, context, embed=embed)
        for name in (GOLDEN, QUANTIZATION):
            if (opened.path / name).is_file():
                shutil.copyfile(opened.path / name, staging / name)
        _write_golden(staging, golden, facts)
        if names is not None:
            (staging / LABELS).write_text(as_text(names), encoding="utf-8", newline="\n")
        read = [staging / name for name in (GRAPH, CONTEXT, PLAN, LABELS) if (staging / name).is_file()]
        files = "".join(map(_file_line, [*read, *sorted(staging.glob("golden.*.bin"))]))
        text = files + model_text(opened.manifest, facts, len(golden.input), made.provider or None, providers.names)
        (staging / MODEL_TEXT).write_text(text, encoding="utf-8", newline="\n")
        seal_as(ONNXRUNTIME, staging, form.manifest)  # before the files that their user may edit
        for name in PROGRAMS:
            shutil.copyfile(TEMPLATES / name, staging / name)
        (staging / README).write_text(_readme(made), encoding="utf-8", newline="\n")
    return made


def _labels(labels: Path, bundle: Bundle) -> tuple[str, ...]:
    if of_role(bundle.manifest.outputs, Role.LOGITS) is None:
        raise UsageError("--labels names classes, and the bundle has no logits.", "Leave --labels out.")
    return tuple(read_labels(labels, bundle.manifest.model.num_classes))


def _write_context(folder: Path, plan: PlanContext, *, embed: bool) -> None:
    import onnx

    graph = onnx.load(folder / GRAPH, load_external_data=False)
    model = context_model(graph, plan, embedded=embed)
    if not embed:
        shutil.copyfile(plan.file, folder / PLAN)
    onnx.checker.check_model(model)
    onnx.save(model, folder / CONTEXT)


def _write_golden(folder: Path, golden: Golden, facts: BundleFacts) -> None:
    expected = expected_outputs(golden.outputs, facts.outputs)
    for name, array in ((INPUT, golden.input), *((tensor.name, expected[tensor.name]) for tensor in facts.outputs)):
        np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tofile(golden_file(folder, name))


def golden_file(folder: Path, name: str) -> Path:
    """The golden numbers of an input or output."""
    return folder / f"golden.{name}.bin"


def _file_line(file: Path) -> str:
    return f"file {file.name} {file.stat().st_size} {sha256_of(file)}\n"


def model_text(
    manifest: Manifest, facts: BundleFacts, images: int, provider: str | None, of_graph: tuple[str, ...]
) -> str:
    """The content of model.txt after its lines on files. `provider`: of the plan. `of_graph`: those of model.onnx.

    BundleError for an output without a tolerance.
    """
    return "".join(" ".join(words) + "\n" for words in _lines(manifest, facts, images, provider, of_graph))


def _lines(
    manifest: Manifest, facts: BundleFacts, images: int, provider: str | None, of_graph: tuple[str, ...]
) -> Iterator[tuple[str, ...]]:
    yield "batch", str(max(facts.batch.min, min(facts.batch.opt, images)))
    yield "input", *_tensor(manifest.inputs[0], "input", manifest.inputs[0].dtype)
    for tensor in facts.outputs:
        stored = "int64" if tensor.dtype == "int64" else "float32"
        yield "output", *_tensor(tensor, (tensor.role or Role.OTHER).value, stored)
    tolerances = facts.tolerances
    bounds = {GRAPH: tolerances.graph.outputs, **({} if provider is None else {CONTEXT: tolerances.engine.outputs})}
    if provider is not None:
        yield "run", CONTEXT, provider, *_needs(provider, manifest.engine.version)
    yield from (("run", GRAPH, name, *_needs(name)) for name in of_graph)
    logits = of_role(facts.outputs, Role.LOGITS)
    for file, outputs in bounds.items():
        for tensor in facts.outputs:
            of = logits if tensor.role is Role.TOP_INDICES and logits is not None else tensor
            if of.name not in outputs:
                raise BundleError(f"The manifest has no tolerance for the output {of.name}.", "Export it again.")
            yield "bound", file, tensor.name, *_figures(outputs[of.name], tensor.role)


def _tensor(tensor: TensorInfo, role: str, stored: str) -> tuple[str, ...]:
    return tensor.name, role, tensor.dtype, stored, *map(str, tensor.shape[1:])


def _figures(tolerance: Tolerance, role: Role | None) -> tuple[str, ...]:
    """Bounds of an output: numbers of classes have no error, and what ranks no classes has no ties."""
    is_index = role is Role.TOP_INDICES
    error = math.inf if is_index else tolerance.rel_l2
    largest = math.inf if is_index or tolerance.max_abs is None else tolerance.max_abs
    tie = tolerance.flip_margin if role in (Role.LOGITS, Role.TOP_INDICES) else math.inf
    return tuple(repr(float(figure)) for figure in (error, largest, tie))


def _needs(provider: str, version: str = "") -> list[str]:
    """What an execution provider takes, in words. `version`: of the TensorRT that built the plan."""
    needs = {
        RTX_PROVIDER: f"{plugin_command(version)}; an RTX GPU and its driver",
        TENSORRT_PROVIDER: f"pip install onnxruntime-gpu, TensorRT {version}, and the GPU of the plan",
        CUDA: "pip install onnxruntime-gpu; an NVIDIA GPU and its driver",
    }
    return needs.get(provider, "").split()


def _notes(bundle: Bundle, facts: BundleFacts, form: RuntimeGraph, providers: GraphProviders) -> Iterator[str]:
    """Where model.onnx runs, and where not."""
    if form.note:
        yield form.note
    served = Bundle(bundle.path, form.manifest)
    if CPU not in providers.names:
        cuda = f"has its kernels for CUDA from {providers.oldest} on" if providers.oldest else "may have them for CUDA"
        yield f"model.onnx runs on no CPU: ONNX Runtime computes nothing in bfloat16 there, and {cuda}."
    elif providers.oldest:
        yield f"model.onnx needs ONNX Runtime {providers.oldest} or newer."
    if providers.readers and not served.needs_vnni:
        yield f"Read on a CPU, as small graphs of the same formats, opset and operators tell: {providers.readers}."
    if facts.quantization is not None and CUDA in providers.names:
        name = facts.precision.value.upper()
        device = " For the CPU's integer kernels write the folder with --device cpu." if name == "INT8" else ""
        yield (
            f"On a GPU {name} gains no time in ONNX Runtime: its CUDA provider has no integer kernels for Q/DQ, so it"
            f" rounds to {name} and multiplies in floats. A bundle in fp16 is faster there.{device}"
        )
    if served.quantizes_fp16:
        yield f"On a CPU it needs ONNX Runtime {ROUNDS_FP16} or newer: older ones truncate FP16 instead of rounding."
    if served.needs_vnni:
        yield VNNI_ONLY


def _readme(made: OnnxRuntimePackage) -> str:
    text = (TEMPLATES / README).read_text(encoding="utf-8")
    for name, value in _template_context(made).items():
        text = text.replace(f"@{name}@", value)
    return text


def _template_context(made: OnnxRuntimePackage) -> dict[str, str]:
    manifest, facts = made.bundle.manifest, made.facts
    shape = ", ".join(str(extent) for extent in manifest.inputs[0].shape[1:])
    return {
        "MODEL": f"{manifest.model.name}, {facts.precision.value}",
        "SIZE": size_in_words(facts.preprocessing.image_size),
        "INPUT": f"{manifest.inputs[0].dtype} (N, {shape})",
        "OUTPUTS": ", ".join(f"`{tensor.name}`" for tensor in facts.outputs),
        "PLAN": _plan_in_words(made),
        "INSTALL": f"pip install {made.graph.requirement} numpy"
        + ("       # onnxruntime-gpu for CUDA" if {CUDA, CPU} <= {*made.graph.names} else ""),
        "NAMED": made.graph.names[-1],
        "PROVIDERS": ", ".join(f'"{name}"' for name in made.graph.names),
        "NOTES": "".join(f"- {note}\n" for note in made.notes),
    }


_RTX_PLAN = """\
`model_ctx.onnx` loads the bundle's engine plan, for {gpus} and batches of {batch}. It needs NVIDIA's provider for
TensorRT for RTX {version}, ONNX Runtime 1.24 or newer, and an RTX GPU with its driver (the provider takes sm86, sm89,
and sm120 and newer):

    {command}

In C++ the provider is a library to register, `SPACH_PROVIDER_LIBRARY=PATH build/main .`, with headers of ONNX Runtime
1.23 or newer. Each process compiles kernels for its GPU when it loads the plan; the provider's option
`nv_runtime_cache_path` names a folder that keeps them.
"""
_TENSORRT_PLAN = """\
`model_ctx.onnx` loads the bundle's engine plan, for {gpus} and batches of {batch}. It needs onnxruntime-gpu, the
TensorRT that built the plan ({version}; others refuse it), and such a GPU.
"""


def _plan_in_words(made: OnnxRuntimePackage) -> str:
    engine, batch = made.bundle.manifest.engine, made.facts.batch
    if not made.provider:
        alone = {CUDA: "CUDA", CPU: "the CPU"}
        runs = " and ".join(alone[name] for name in made.graph.names)
        verb = "run" if len(made.graph.names) > 1 else "runs"
        return f"There is no engine plan here ({engine.why_none}), so that {runs} alone {verb} the model.\n"
    return (_RTX_PLAN if made.provider == RTX_PROVIDER else _TENSORRT_PLAN).format(
        gpus=", ".join(engine.gpus) or "the GPU that it was built on",
        batch=f"{batch.min} to {batch.max}",
        version=engine.version,
        command=plugin_command(engine.version),
    )


def plugin_command(version: str) -> str:
    """The pip command for NVIDIA's provider that carries this version of TensorRT for RTX."""
    carried = _PLUGINS.get(".".join(version.split(".")[:2]))
    return f"pip install {PLUGIN}" + (f"=={carried}" if carried else "")
