"""Starts of TensorRT for RTX, with doubles that implement the interfaces of its Python API."""

from __future__ import annotations

import enum
import os
import types
from pathlib import Path
from typing import Any

import pytest

from spach_deploy.options.specs import ComputeCapability, Flavour
from spach_deploy.runtime.devices import LocalGpu, is_installed
from spach_deploy.runtime.warm_start import (
    COLD,
    RuntimeCache,
    Specialization,
    StartOptions,
    cache_file,
    execution_context,
)

RTX_4090 = LocalGpu("NVIDIA GeForce RTX 4090", ComputeCapability(8, 9))
RTX_5090 = LocalGpu("NVIDIA GeForce RTX 5090", ComputeCapability(12, 0))
VERSION = b"RTX 1.7.1 sm89: "


class FakeCache:
    """Takes only what it wrote itself: IRuntimeCache."""

    def __init__(self) -> None:
        self.kernels: set[bytes] = set()

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(VERSION):
            return False
        self.kernels |= set(blob.removeprefix(VERSION).split())
        return True

    def serialize(self) -> memoryview:
        return memoryview(VERSION + b" ".join(sorted(self.kernels)))


class FakeConfig:
    """IRuntimeConfig."""

    cuda_graph_strategy: Any = None
    dynamic_shapes_kernel_specialization_strategy: Any = None
    cache: FakeCache | None = None

    def create_runtime_cache(self) -> FakeCache:
        return FakeCache()

    def set_runtime_cache(self, cache: FakeCache) -> bool:
        self.cache = cache
        return True


class FakeEngine:
    """ICudaEngine, whose contexts compile a kernel that the cache lacks."""

    compiled: int = 0

    def __init__(self, kernel: bytes = b"stem") -> None:
        self.kernel = kernel

    def create_runtime_config(self) -> FakeConfig:
        return FakeConfig()

    def create_execution_context(self, config: FakeConfig) -> Any:
        known = set() if config.cache is None else config.cache.kernels
        if self.kernel not in known:
            self.compiled += 1
            known.add(self.kernel)
        return types.SimpleNamespace(config=config)


class Graphs(enum.Enum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class Strategy(enum.Enum):
    LAZY = 0
    EAGER = 1
    NONE = 2


TENSORRT = types.SimpleNamespace(CudaGraphStrategy=Graphs, DynamicShapesKernelSpecializationStrategy=Strategy)


def start(engine: FakeEngine, file: Path | None, options: StartOptions = StartOptions()) -> tuple[Any, RuntimeCache]:  # noqa: B008
    context, cache = execution_context(TENSORRT, engine, file, options)
    assert cache is not None
    cache.save()
    return context, cache


def test_a_second_start_compiles_nothing(tmp_path: Path) -> None:
    engine, file = FakeEngine(), tmp_path / "cache" / "plan.cache"
    start(engine, file)
    assert engine.compiled == 1
    _, cache = start(engine, file)
    assert (engine.compiled, cache.problem) == (1, "")


def test_a_cold_start_reads_and_writes_nothing(tmp_path: Path) -> None:
    context, cache = execution_context(TENSORRT, FakeEngine(), None, COLD)
    assert cache is None
    assert context.config.cache is None


@pytest.mark.parametrize("content", [b"", b"torn", VERSION[:5], b"RTX 1.8.0 sm89: stem"])
def test_a_damaged_or_foreign_file_is_not_used_and_replaced(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "plan.cache"
    file.write_bytes(content)
    file.chmod(0o600)
    _, cache = execution_context(TENSORRT, FakeEngine(), file, StartOptions())
    assert cache is not None
    assert cache.problem == f"The runtime cache {file} is of another GPU or version, or damaged: not used."
    cache.save()
    assert file.read_bytes() == VERSION + b"stem"


def test_a_file_that_others_may_write_is_not_read(tmp_path: Path) -> None:
    """It holds code that runs on the GPU."""
    file = tmp_path / "plan.cache"
    file.write_bytes(VERSION + b"stem")
    file.chmod(0o666)
    engine = FakeEngine()
    _, cache = start(engine, file)
    assert engine.compiled == 1
    assert "others may write it: not read" in cache.problem


def test_two_processes_that_start_at_once_leave_a_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "plan.cache"
    contexts = [execution_context(TENSORRT, FakeEngine(kernel), file, StartOptions()) for kernel in (b"one", b"two")]
    for _, cache in contexts:
        assert cache is not None
        cache.save()
        assert cache.problem == ""
    assert file.read_bytes() in (VERSION + b"one", VERSION + b"two")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.cache"]


def test_a_place_that_cannot_be_written_costs_the_warm_start_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    context, cache = start(FakeEngine(), tmp_path / "file" / "plan.cache")
    assert context is not None
    assert cache.problem.startswith(f"The runtime cache {tmp_path}/file/plan.cache cannot be")


@pytest.mark.parametrize("specialization", list(Specialization))
def test_strategies_are_passed_on(tmp_path: Path, specialization: Specialization) -> None:
    options = StartOptions(cuda_graphs=True, specialization=specialization)
    context, _ = start(FakeEngine(), tmp_path / "plan.cache", options)
    assert context.config.cuda_graph_strategy is Graphs.WHOLE_GRAPH_CAPTURE
    assert context.config.dynamic_shapes_kernel_specialization_strategy.name == specialization.name


def test_the_file_is_one_for_each_plan_and_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACH_CACHE", str(tmp_path))
    files = {cache_file(plan, gpu, StartOptions()) for plan in (b"one", b"two") for gpu in (RTX_4090, RTX_5090)}
    assert len(files) == 4
    assert all(file is not None and tmp_path in file.parents for file in files)
    own = StartOptions(runtime_cache_file=tmp_path / "mine")
    assert cache_file(b"one", RTX_4090, own) == tmp_path / "mine"


def test_without_a_cache_folder_there_is_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACH_CACHE", "none")
    assert cache_file(b"one", RTX_4090, StartOptions()) is None
    assert cache_file(b"one", RTX_4090, COLD) is None


@pytest.mark.skipif(not is_installed(Flavour.TENSORRT_RTX), reason="tensorrt-rtx is not installed")
def test_the_real_interfaces_have_what_the_doubles_have() -> None:
    import subprocess
    import sys

    code = (
        "import tensorrt_rtx as t\n"
        "assert {'create_runtime_config', 'create_execution_context'} <= set(dir(t.ICudaEngine))\n"
        "assert {'create_runtime_cache', 'set_runtime_cache', 'cuda_graph_strategy',"
        " 'dynamic_shapes_kernel_specialization_strategy'} <= set(dir(t.IRuntimeConfig))\n"
        "assert {'serialize', 'deserialize'} <= set(dir(t.IRuntimeCache))\n"
        "print(t.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE.name,"
        " *sorted(t.DynamicShapesKernelSpecializationStrategy.__members__))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout.split() == ["WHOLE_GRAPH_CAPTURE", "EAGER", "LAZY", "NONE"]
