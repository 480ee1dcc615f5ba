"""Builds and model folders, made once for all tests of a process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.packaging.cpp import builds, models
from tests.packaging.cpp.builds import Build, Variant


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model with every output; shared, not to be changed."""
    return models.package(tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="session")
def model(package: Path) -> Path:
    """Its model folder; shared, not to be changed."""
    return package / "model"


@pytest.fixture(scope="session")
def plain(package: Path) -> Build:
    """As README.md says."""
    return builds.build(Variant.PLAIN, package)


@pytest.fixture(scope="session")
def asan(package: Path) -> Build:
    """With AddressSanitizer and UndefinedBehaviorSanitizer."""
    return builds.build(Variant.ASAN, package)


@pytest.fixture(scope="session")
def tsan(package: Path) -> Build:
    """With ThreadSanitizer, for ordinary TensorRT."""
    return builds.build(Variant.TSAN, package)
