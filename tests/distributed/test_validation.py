"""Validation on a real Ray cluster: the report of one process, also when a node dies in the middle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from spach_deploy.bundle.store import GRAPH
from spach_deploy.cli.validate import main
from spach_deploy.options.specs import Precision
from tests import small_bundles
from tests.commands import refusal
from tests.distributed.small_cluster import add_node, cluster_of, needs_ray
from tests.quantization.small_quantized import pictures

pytestmark = [*needs_ray, pytest.mark.usefixtures("small_model_registered")]

IMAGES = 120


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with cluster_of(2) as running:
        yield running


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "images.npz"
    np.savez(path, images=pictures(200), labels=np.arange(200) % small_bundles.CLASSES)
    return path


def validate(images: Path, *more: object) -> Result:
    graph = small_bundles.bundle(Precision.FP16) / GRAPH
    words = (graph, "--images", images, "--max-images", IMAGES, "--json", *more)
    return CliRunner().invoke(main, [str(word) for word in words])


def test_a_node_that_dies_in_the_middle_changes_no_figure(
    cluster: Any, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = validate(images, "--max-drop", 100)
    lost, told = add_node(cluster), list[str]()

    def say(text: str) -> None:
        if "are done" in text and not told:
            cluster.remove_node(lost, allow_graceful=False)
        told.extend([text] if "are done" in text else [])

    monkeypatch.setattr("spach_deploy.validation.shards._SAID_EVERY_S", 0.0)
    monkeypatch.setattr("spach_deploy.cli.validate.say", say)
    parts = validate(images, "--max-drop", 100, "--ray", cluster.address)
    assert (whole.exit_code, parts.exit_code) == (0, 0), parts.output
    assert parts.stdout == whole.stdout
    assert len(told) > 12
    assert told[-1] == f"{IMAGES} of {IMAGES} images are done."


def test_a_cluster_without_room_is_refused(images: Path) -> None:
    with cluster_of(0) as empty:
        assert "No node of the cluster has a core" in refusal(validate(images, "--ray", empty.address), 3)


def test_a_cluster_that_loses_every_node_is_told(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spach_deploy.validation.shards._SAID_EVERY_S", 0.0)
    with cluster_of(1) as small:
        node = next(iter(small.worker_nodes))

        def say(text: str) -> None:
            if "are done" in text and small.worker_nodes:
                small.remove_node(node, allow_graceful=False)

        monkeypatch.setattr("spach_deploy.cli.validate.say", say)
        result = validate(images, "--ray", small.address)
    assert "The cluster has no node left that could go on. Add nodes" in refusal(result, 3)
