from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spach_deploy.common.errors import UnavailableError, UsageError
from spach_deploy.options.specs import ComputeCapability, Flavour
from spach_deploy.runtime.devices import LocalGpu, is_installed, local_gpus
from spach_deploy.runtime.tensorrt_runner import TensorRTRunner, why_engine_cannot_run_here

A10 = LocalGpu("NVIDIA A10", ComputeCapability(8, 6))
H100 = LocalGpu("NVIDIA H100", ComputeCapability(9, 0))
FAKES = Path(__file__).parents[1] / "engine/fakes/site-packages"
ROOT = Path(__file__).parents[2]


def plan(magic: bytes, version: tuple[int, int, int], size: int = 300) -> bytes:
    return magic + bytes(12) + size.to_bytes(8, "little") + bytes(version) + bytes(size - 27)


def test_says_why_no_engine_can_run() -> None:
    assert "no NVIDIA GPU" in (why_engine_cannot_run_here(Flavour.TENSORRT, ()) or "")
    reason = why_engine_cannot_run_here(Flavour.TENSORRT_RTX, (H100,))
    assert reason == "TensorRT for RTX does not run on this machine's GPU, NVIDIA H100 (sm90)"
    if not is_installed(Flavour.TENSORRT):
        assert "tensorrt is not installed" in (why_engine_cannot_run_here(Flavour.TENSORRT, (H100,)) or "")
    if is_installed(Flavour.TENSORRT_RTX):
        assert why_engine_cannot_run_here(Flavour.TENSORRT_RTX, (A10,)) is None


def test_asking_imports_neither_torch_nor_tensorrt() -> None:
    code = (
        "import sys; from spach_deploy.runtime.tensorrt_runner import why_engine_cannot_run_here as why; "
        "from spach_deploy.options.specs import Flavour; why(Flavour.TENSORRT_RTX); "
        "print({'torch', 'polygraphy', 'tensorrt_rtx'} & set(sys.modules))"
    )
    assert run_python(code, ROOT) == "set()"


def run_python(code: str, *path: Path) -> str:
    """What a process of its own prints: Polygraphy binds one TensorRT per process."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(bool(local_gpus()), reason="there is a GPU")
def test_without_a_gpu_the_reason_is_given() -> None:
    with (
        pytest.raises(UnavailableError, match="cannot run here: no NVIDIA GPU") as caught,
        TensorRTRunner(plan(b"vtrt", (1, 7, 1)), Flavour.TENSORRT_RTX),
    ):
        pass
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("content", [b"", b"a text file", plan(b"vtrt", (1, 7, 1))[:200]])
def test_what_is_no_whole_plan_is_refused(content: bytes) -> None:
    with pytest.raises(UsageError, match="not a whole TensorRT plan"), TensorRTRunner(content, Flavour.TENSORRT_RTX):
        pass


def test_a_plan_of_the_other_flavour_is_refused() -> None:
    with (
        pytest.raises(UnavailableError, match=r"built by tensorrt and tensorrt-rtx was to run it"),
        TensorRTRunner(plan(b"ftrt", (10, 16, 1)), Flavour.TENSORRT_RTX),
    ):
        pass


LOAD = """
import sys
from spach_deploy.common.errors import UnavailableError
from spach_deploy.runtime.devices import LocalGpu
from spach_deploy.runtime.tensorrt_runner import TensorRTRunner
from spach_deploy.options.specs import ComputeCapability, Flavour

plan = bytes.fromhex(sys.argv[1]) if len(sys.argv) > 1 else bytes.fromhex("{plan}")
try:
    with TensorRTRunner(plan, Flavour("{flavour}"), gpus=(LocalGpu("NVIDIA A10", ComputeCapability(8, 6)),)):
        pass
except UnavailableError as error:
    print(error)
"""


@pytest.mark.parametrize("package", ["tensorrt_10_16", "tensorrt_11_4"])
def test_a_plan_that_tensorrt_does_not_load_is_explained(package: str) -> None:
    code = LOAD.format(plan=plan(b"ftrt", (10, 9, 0)).hex(), flavour="tensorrt")
    words = run_python(code, ROOT, FAKES / package, FAKES / "common")
    assert words.startswith("TensorRT does not load this plan here: Version tag differs.")
    assert "Plans are bound to the version" in words


def test_libraries_that_do_not_load_are_explained() -> None:
    code = LOAD.format(plan=plan(b"ftrt", (10, 9, 0)).hex(), flavour="tensorrt")
    assert "libnvinfer.so.10" in run_python(code, ROOT, FAKES / "tensorrt_broken")


@pytest.mark.skipif(not is_installed(Flavour.TENSORRT_RTX), reason="tensorrt-rtx is not installed")
@pytest.mark.skipif(bool(local_gpus()), reason="there is a GPU")
def test_the_real_runtime_without_a_driver_gives_its_reason() -> None:
    code = LOAD.format(plan=plan(b"vtrt", (1, 7, 1)).hex(), flavour="tensorrt-rtx")
    words = run_python(code, ROOT)
    assert words.startswith("TensorRT does not load this plan here: ")
    assert "It was built by version 1.7.1" in words


def test_the_other_flavour_in_the_same_process_is_an_error() -> None:
    code = (
        "from spach_deploy.common.errors import UnavailableError\n"
        "from spach_deploy.runtime.polygraphy_session import use_tensorrt\n"
        "from spach_deploy.options.specs import Flavour\n"
        "use_tensorrt(Flavour.TENSORRT); use_tensorrt(Flavour.TENSORRT)\n"
        "try: use_tensorrt(Flavour.TENSORRT_RTX)\n"
        "except UnavailableError as error: print(error)\n"
    )
    words = run_python(code, ROOT, FAKES / "tensorrt_11_4", FAKES / "common")
    assert words == (
        "Polygraphy drives one TensorRT per process, here tensorrt already. Use tensorrt-rtx in a process of its own."
    )


PROFILE = """
import numpy as np
import types
from spach_deploy.runtime import TensorSpec
from spach_deploy.runtime.tensorrt_runner import TensorRTRunner
from spach_deploy.options.specs import Flavour


class Inner:
    context = types.SimpleNamespace(profiler=None)

    def infer(self, feeds, check_inputs):
        if self.context.profiler:
            self.context.profiler.report_layer_time("stem/Conv", 2.0)
            self.context.profiler.report_layer_time("head/Gemm + head/Add", 0.5)


runner = TensorRTRunner(b"", Flavour("{flavour}"))
runner.input_specs = {{"x": TensorSpec("float32", (None, 2))}}
runner._runner = Inner()
print(runner.layer_seconds({{"x": np.zeros((1, 2), np.float32)}}, runs=4), Inner.context.profiler)
"""
TIMES = "{'stem/Conv': 0.002, 'head/Gemm + head/Add': 0.0005} None"


@pytest.mark.parametrize("package", ["tensorrt_10_16", "tensorrt_11_4"])
def test_layers_are_timed_by_tensorrts_profiler(package: str) -> None:
    code = PROFILE.format(flavour="tensorrt")
    assert run_python(code, ROOT, FAKES / package, FAKES / "common") == TIMES


@pytest.mark.skipif(not is_installed(Flavour.TENSORRT_RTX), reason="tensorrt-rtx is not installed")
def test_the_real_profiler_class_is_the_one_that_is_filled() -> None:
    assert run_python(PROFILE.format(flavour="tensorrt-rtx"), ROOT) == TIMES
