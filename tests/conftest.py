from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.not_run import (
    pytest_deselected,
    pytest_runtest_makereport,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)

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
