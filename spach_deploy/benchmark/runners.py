"""The runners of a benchmark: their names, why one cannot run here, and how each is opened."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from spach_deploy.benchmark.layers import by_module, owners_of
from spach_deploy.bundle.inputs import arrays_of, feeds_of
from spach_deploy.bundle.outputs import model_outputs
from spach_deploy.bundle.store import GRAPH, OPENVINO_MODEL, Bundle
from spach_deploy.common.files import utf8_path
from spach_deploy.common.machine import has_bf16, has_vnni
from spach_deploy.common.versions import old_package
from spach_deploy.graph.runtimes import GraphNeeds, runtimes
from spach_deploy.options.specs import ComputeCapability, WeightSource
from spach_deploy.runtime.devices import local_gpus
from spach_deploy.runtime.onnxruntime_runner import new_session
from spach_deploy.runtime.openvino_runner import OpenVinoRunner
from spach_deploy.runtime.warm_start import COLD, StartOptions

if TYPE_CHECKING:
    from torch import nn

Array = npt.NDArray[Any]

EAGER, COMPILE, BF16, ONNX_RUNTIME, OPENVINO, OPENVINO_BF16, ENGINE = (
    "eager",
    "compile",
    "bf16",
    "onnxruntime",
    "openvino",
    "openvino-bf16",
    "tensorrt",
)
COMPILE_BF16, ONNX_PLAIN, OPENVINO_PLAIN, OPENVINO_PLAIN_BF16, NNCF = (
    "compile-bf16",
    "onnxruntime-plain",
    "openvino-plain",
    "openvino-plain-bf16",
    "nncf",
)
CPU, GPU = "cpu", "cuda"
TITLES: Mapping[str, str] = {
    EAGER: "PyTorch eager",
    COMPILE: "torch.compile",
    BF16: "PyTorch, bf16 autocast",
    COMPILE_BF16: "torch.compile, bf16",
    ONNX_PLAIN: "ONNX Runtime, plain",
    OPENVINO_PLAIN: "OpenVINO, plain",
    OPENVINO_PLAIN_BF16: "OpenVINO, plain, bf16",
    NNCF: "NNCF",
    ONNX_RUNTIME: "ONNX Runtime",
    OPENVINO: "OpenVINO",
    OPENVINO_BF16: "OpenVINO, bf16",
    ENGINE: "TensorRT",
}
IN_OPENVINO: Mapping[str, str] = {OPENVINO_PLAIN: "plain.xml", OPENVINO_PLAIN_BF16: "plain.xml", NNCF: "nncf.xml"}
"""Plain ways that end in an OpenVINO model, with the name of its file in `RunnerSetup.converted`."""

PLAIN = (COMPILE_BF16, ONNX_PLAIN, *IN_OPENVINO)
"""What a user does without spach-deploy: the reference in torch.compile, or converted by the runtime's own tools."""

TORCH = (EAGER, COMPILE, BF16, *PLAIN)
"""Runners of the reference model, which take the checkpoint's weights."""

IN_BF16 = (BF16, COMPILE_BF16, OPENVINO_BF16, OPENVINO_PLAIN_BF16)
"""Runners that compute in bfloat16 whatever the bundle's precision is."""

OPENVINO_HINTS: Mapping[str, str] = {
    OPENVINO: "f32",
    OPENVINO_BF16: "bf16",
    OPENVINO_PLAIN: "f32",
    OPENVINO_PLAIN_BF16: "bf16",
    NNCF: "f32",
}
"""OpenVINO's INFERENCE_PRECISION_HINT: without one it takes bfloat16 where the CPU has it."""

_CUDA = "CUDAExecutionProvider"
_COMPILERS = ("g++", "clang++", "c++")
_FIRST_BF16_GPU = ComputeCapability(8, 0)
_PROFILED_RUNS = 4
_NO_BF16 = "this CPU has no bfloat16 arithmetic (avx512_bf16, amx_bf16)"


@dataclasses.dataclass(frozen=True)
class RunnerSetup:
    """What to run: the bundle, where its weights are (as `spach-validate --checkpoint` takes them), CPU threads.

    `module`: the factory of the user's own module, where the bundle is of one. `is_cold`: engines of TensorRT for RTX
    start without their runtime cache, as on a new machine. `calibration`: images that NNCF calibrates on. `converted`:
    a folder that keeps the OpenVINO models of the plain ways; None keeps none.
    """

    bundle: Path
    checkpoint: Path | None = None
    weights: WeightSource | None = None
    threads: int = 1
    ignore: tuple[str, ...] = ()
    is_cold: bool = False
    calibration: Path | None = None
    converted: Path | None = None
    module: str | None = None


@dataclasses.dataclass(frozen=True)
class OpenRunner:
    """A runner that is ready to run.

    `prepare` converts engine inputs (N, ...) into what `run` takes; `run` returns the output that is
    compared (N, ...), of a classifier its logits. Both work with
    host memory, so copies to a GPU and back are part of `run`. `device` is cpu or cuda. `profile` returns seconds of
    one run by PyTorch module; None for a runner without a profiler.
    """

    run: Callable[[Any], Array]
    prepare: Callable[[Any], Any] = lambda inputs: inputs
    profile: Callable[[Any], dict[str, float]] | None = None
    device: str = CPU


def first_output(bundle: Bundle) -> str:
    """The name of the output that is compared: the first that the model computes, of a classifier its logits."""
    return model_outputs(bundle.manifest.outputs)[0].name


def why_not(name: str, setup: RunnerSetup, bundle: Bundle) -> str:
    """Why a runner cannot run here, in words with the remedy; empty where it can."""
    if name in TORCH:
        return _why_not_torch(name, setup, bundle)
    if name == ENGINE:
        return _why_no_engine(bundle)
    if bundle.needs_vnni and not has_vnni():
        return "its INT8 is for CPUs with VNNI, and this one has none"
    if name == ONNX_RUNTIME:
        return _why_not_onnxruntime(bundle)
    return why_no_openvino(name)


def _why_not_onnxruntime(bundle: Bundle) -> str:
    if importlib.util.find_spec("onnxruntime") is None:
        return "not installed: pip install onnxruntime"
    import onnxruntime

    known, needs = runtimes().onnxruntime(onnxruntime.__version__), GraphNeeds.of(bundle.path / GRAPH)
    on_gpu = _CUDA in onnxruntime.get_available_providers()
    return known.misfit(needs, on_gpu=on_gpu) if known is not None and needs is not None else ""


def why_no_openvino(name: str) -> str:
    """Why OpenVINO cannot run here in the precision that `name` stands for; empty where it can."""
    if importlib.util.find_spec("openvino") is None:
        return "not installed: pip install openvino"
    if old := old_package("openvino"):
        return str(old)
    return _NO_BF16 if OPENVINO_HINTS[name] == "bf16" and not has_bf16() else ""


def _why_not_torch(name: str, setup: RunnerSetup, bundle: Bundle) -> str:
    if lacks_weights(setup, bundle):
        return f"the weights are not in the bundle: give {_weights_option(bundle)}"
    if len(bundle.manifest.inputs) > 1 and name in (ONNX_PLAIN, *IN_OPENVINO):
        return "the plain way of a model of several inputs is not measured"
    if name in (COMPILE, COMPILE_BF16) and not (os.environ.get("CXX") or any(map(shutil.which, _COMPILERS))):
        return "it needs a C++ compiler: apt-get install g++"
    if name in (BF16, COMPILE_BF16) and not (has_bf16() or _has_bf16_gpu()):
        return _NO_BF16
    if name == ONNX_PLAIN and importlib.util.find_spec("onnxruntime") is None:
        return "not installed: pip install onnxruntime"
    if name == NNCF and importlib.util.find_spec("nncf") is None:
        return "not installed: pip install nncf"
    if name == NNCF and setup.calibration is None and not _holds(bundle, name):
        return "it calibrates on images: give --calibration DIR"
    return why_no_openvino(name) if name in IN_OPENVINO else ""


def _holds(bundle: Bundle, name: str) -> bool:
    """Whether the bundle holds the OpenVINO model of this plain way."""
    cpu = bundle.manifest.cpu
    return cpu is not None and cpu.chosen.runner == name and OPENVINO_MODEL in bundle.manifest.files


def lacks_weights(setup: RunnerSetup, bundle: Bundle) -> bool:
    """Whether PyTorch's runners need a checkpoint, or the user's own module, that was not given."""
    model = bundle.manifest.model
    lacks_module = model.origin == "module" and setup.module is None
    return lacks_module or (model.checkpoint is not None and setup.checkpoint is None)


def _weights_option(bundle: Bundle) -> str:
    """The options that give the weights."""
    from spach_deploy.models.own_module import FORM

    model = bundle.manifest.model
    module = f"--module {FORM}" if model.origin == "module" else ""
    return " ".join(filter(None, [module, model.checkpoint and f"--checkpoint {model.checkpoint}"]))


def _has_bf16_gpu() -> bool:
    return any(gpu.capability >= _FIRST_BF16_GPU for gpu in local_gpus()[:1])


def _why_no_engine(bundle: Bundle) -> str:
    from spach_deploy.runtime.tensorrt_runner import why_engine_cannot_run_here

    if bundle.plan is None:
        return "the bundle has no engine"
    return why_engine_cannot_run_here(bundle.manifest.engine.flavour) or ""


@contextlib.contextmanager
def opened(name: str, setup: RunnerSetup) -> Iterator[OpenRunner]:
    """The runner, open within the block. Raises what its library or the bundle raises."""
    bundle = Bundle.open(setup.bundle, verify=False)
    with _OPENERS[name](bundle, setup) as runner:
        yield runner


@contextlib.contextmanager
def _torch(
    bundle: Bundle, setup: RunnerSetup, change: Callable[[Any], Callable[[Any], Any]] = lambda model: model
) -> Iterator[OpenRunner]:
    """The reference model, or what `change` returns for it; on the GPU where PyTorch has one."""
    import torch

    from spach_deploy.validation.bundle_facts import BundleFacts
    from spach_deploy.validation.live_reference import as_images

    torch.set_num_threads(setup.threads)
    facts = BundleFacts.of(bundle)
    device = GPU if torch.cuda.is_available() else CPU
    model = change(_reference(bundle, setup).to(device))

    def run(images: Any) -> Array:
        made = model(*(image.to(device) for image in images))
        values: Array = (made[0] if isinstance(made, tuple) else made).float().cpu().numpy()
        return values

    with torch.inference_mode():
        yield OpenRunner(
            run,
            lambda inputs: tuple(
                map(torch.from_numpy, arrays_of(as_images(inputs, facts.io_dtype, facts.preprocessing)))
            ),
            device=device,
        )


def _reference(bundle: Bundle, setup: RunnerSetup) -> nn.Module:
    """The model that the bundle was made of, with its outputs, on the CPU."""
    from spach_deploy.validation.bundle_facts import BundleFacts
    from spach_deploy.validation.live_reference import Weights, rebuild

    weights, facts = Weights(setup.checkpoint, setup.weights, setup.ignore, setup.module), BundleFacts.of(bundle)
    return rebuild(bundle.manifest.model, weights, facts.outputs, facts.takes).model


def _compiled(bundle: Bundle, setup: RunnerSetup) -> AbstractContextManager[OpenRunner]:
    import torch

    return _torch(bundle, setup, lambda model: torch.compile(model, dynamic=False))


@contextlib.contextmanager
def _autocast(
    runner_of: Callable[[Bundle, RunnerSetup], AbstractContextManager[OpenRunner]], bundle: Bundle, setup: RunnerSetup
) -> Iterator[OpenRunner]:
    import torch

    device = GPU if torch.cuda.is_available() else CPU
    with runner_of(bundle, setup) as runner, torch.autocast(device, torch.bfloat16):
        yield runner


@contextlib.contextmanager
def _onnx_plain(bundle: Bundle, setup: RunnerSetup) -> Iterator[OpenRunner]:
    """The reference as torch.onnx exports it, in ONNX Runtime on the CPU."""
    from spach_deploy.benchmark.plain import PlainModel, plain_onnx

    wanted = first_output(bundle)
    with tempfile.TemporaryDirectory(prefix="spach-") as folder:
        graph = Path(folder) / GRAPH
        plain_onnx(PlainModel(_reference(bundle, setup), bundle.manifest), bundle.manifest, graph)
        session = _session(graph, setup.threads, on_gpu=False)
    yield OpenRunner(lambda feeds: session.run([wanted], feeds)[0], feeds_of)


@contextlib.contextmanager
def _openvino_plain(name: str, bundle: Bundle, setup: RunnerSetup) -> Iterator[OpenRunner]:
    """The reference as OpenVINO converts it: from the bundle, from `setup.converted`, or made now."""
    with contextlib.ExitStack() as stack:
        if _holds(bundle, name):
            model = bundle.file(OPENVINO_MODEL)
        else:
            folder = setup.converted or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="spach-")))
            model = folder / IN_OPENVINO[name]
            if not model.exists():
                _convert(name, bundle, setup, model)
        yield stack.enter_context(_in_openvino(model, name, bundle, setup))


def _convert(name: str, bundle: Bundle, setup: RunnerSetup, path: Path) -> None:
    from spach_deploy.benchmark import plain

    converted = plain.plain_openvino(plain.PlainModel(_reference(bundle, setup), bundle.manifest), bundle.manifest)
    if name == NNCF:
        assert setup.calibration is not None
        converted = plain.quantize_plain(converted, plain.calibration_inputs(setup.calibration, bundle.manifest))
    plain.save_openvino(converted, path)


@contextlib.contextmanager
def _onnx_runtime(bundle: Bundle, setup: RunnerSetup) -> Iterator[OpenRunner]:
    graph = bundle.file(GRAPH)
    session = _session(graph, setup.threads)
    wanted = first_output(bundle)
    device = GPU if session.get_providers()[0] == _CUDA else CPU

    def profile(feeds: dict[str, Array]) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            watched = _session(graph, setup.threads, f"{folder}/profile")
            for _ in range(_PROFILED_RUNS):
                watched.run([wanted], feeds)
            layers = seconds_by_layer(Path(watched.end_profiling()), _PROFILED_RUNS)
        return by_module(layers, owners_of(graph))

    yield OpenRunner(lambda feeds: session.run([wanted], feeds)[0], feeds_of, profile, device)


def _session(graph: Path, threads: int, profile: str = "", *, on_gpu: bool = True) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    known = (_CUDA, "CPUExecutionProvider") if on_gpu else ("CPUExecutionProvider",)
    wanted = [name for name in known if name in onnxruntime.get_available_providers()]
    with utf8_path(graph) as name:
        return new_session(name, options, wanted)


def seconds_by_layer(profile: Path, runs: int) -> dict[str, float]:
    """Seconds of one run by node, from ONNX Runtime's profile of `runs` runs without the first, which warms up."""
    times: dict[str, list[float]] = {}
    for event in json.loads(profile.read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and str(event["name"]).endswith("_kernel_time"):
            times.setdefault(str(event["name"]).removesuffix("_kernel_time"), []).append(event["dur"] / 1e6)
    return {layer: statistics.median(seconds[-runs + 1 :]) for layer, seconds in times.items()}


def _openvino(name: str, bundle: Bundle, setup: RunnerSetup) -> AbstractContextManager[OpenRunner]:
    return _in_openvino(bundle.file(GRAPH), name, bundle, setup)


@contextlib.contextmanager
def _in_openvino(model: Path, name: str, bundle: Bundle, setup: RunnerSetup) -> Iterator[OpenRunner]:
    wanted = first_output(bundle)
    with OpenVinoRunner(model, threads=setup.threads, precision_hint=OPENVINO_HINTS[name]) as runner:
        yield OpenRunner(lambda feeds: runner.run(feeds)[wanted], feeds_of)


@contextlib.contextmanager
def _engine(bundle: Bundle, setup: RunnerSetup) -> Iterator[OpenRunner]:
    from spach_deploy.runtime.tensorrt_runner import TensorRTRunner

    assert bundle.plan is not None
    start = COLD if setup.is_cold else StartOptions()
    with TensorRTRunner(bundle.plan.read_bytes(), bundle.manifest.engine.flavour, start=start) as runner:
        wanted = first_output(bundle)
        yield OpenRunner(
            lambda feeds: runner.run(feeds)[wanted],
            feeds_of,
            profile=lambda feeds: by_module(runner.layer_seconds(feeds), owners_of(bundle.file(GRAPH))),
            device=GPU,
        )


_OPENERS: Mapping[str, Callable[[Bundle, RunnerSetup], AbstractContextManager[OpenRunner]]] = {
    EAGER: _torch,
    COMPILE: _compiled,
    BF16: functools.partial(_autocast, _torch),
    COMPILE_BF16: functools.partial(_autocast, _compiled),
    ONNX_PLAIN: _onnx_plain,
    **{name: functools.partial(_openvino_plain, name) for name in IN_OPENVINO},
    ONNX_RUNTIME: _onnx_runtime,
    OPENVINO: functools.partial(_openvino, OPENVINO),
    OPENVINO_BF16: functools.partial(_openvino, OPENVINO_BF16),
    ENGINE: _engine,
}
