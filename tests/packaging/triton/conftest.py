from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.packaging.triton.clients import client_packages


@pytest.fixture(scope="session")
def triton_packages() -> Iterator[None]:
    """An environment with tritonserver, and its client importable. Skips where there is none."""
    with client_packages():
        yield
