from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

from spach_deploy.pipeline import scheduler
from tests.not_run import (
    pytest_deselected,
    pytest_runtest_makereport,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)
from tests.shared import VARIABLE

__all__ = [
    "pytest_deselected",
    "pytest_runtest_makereport",
    "pytest_sessionfinish",
    "pytest_terminal_summary",
    "pytest_testnodedown",
]

# Two test processes share two cores: one thread each is fastest, and results repeat.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing is taken from or left in the cache of whoever runs the tests; tests of it name a place of their own.
os.environ["SPACH_CACHE"] = "none"
# What terminals say of themselves is no part of a test that does not set it.
for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR"):
    os.environ.pop(name, None)


def pytest_configure(config: pytest.Config) -> None:
    """The first process makes the folder that all share; a worker loads what each of its many exports would load."""
    if hasattr(config, "workerinput"):
        for name in ("torch.onnx._internal.exporter._core", "onnxscript.function_libs.torch_lib.ops", "onnxsim"):
            importlib.import_module(name)
    else:
        os.environ[VARIABLE] = tempfile.mkdtemp(prefix="spach-tests-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ[VARIABLE], ignore_errors=True))
        # xdist would begin with the files that have the most tests; those that take longest have few.
        config.option.loadscopereorder = False


@pytest.fixture(autouse=True, scope="session")
def _steps_one_after_another() -> Iterator[None]:
    """Commands that run in the tests' own process start no worker, which would load PyTorch each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "scheduler_here", lambda: contextlib.nullcontext(scheduler.Sequential()))
        yield


@pytest.fixture
def small_model_registered() -> Iterator[None]:
    """The registry knows the model of `tests.small_bundles`."""
    from tests.small_bundles import registered

    with registered():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests where there is no GPU."""
    from spach_deploy.runtime.devices import local_gpus

    if not local_gpus():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))
