"""Calibration on a real Ray cluster: the same bits as in one process, also when a node dies in the middle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from spach_deploy.cli.calibrate import main as calibrate_command
from spach_deploy.cluster.calibration import collect_on_cluster
from spach_deploy.data.readers import open_images
from spach_deploy.quantization.calibrate import Progress, Run, collect
from spach_deploy.quantization.statistics import BLOCK
from tests import small_bundles
from tests.cluster.small_cluster import add_node, cluster_of, needs_ray
from tests.commands import refusal
from tests.quantization.small_models import canonical
from tests.quantization.small_quantized import calibration_images
from tests.quantization.test_shards import PREPROCESSING, assert_same_bits, wanted

pytestmark = needs_ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with cluster_of(2) as running:
        yield running


def test_a_node_that_dies_in_the_middle_changes_no_bit(cluster: Any) -> None:
    images, model = calibration_images(12 * BLOCK + 5), canonical("conv")
    whole = collect(model, wanted(), open_images(images), PREPROCESSING, Run(threads=1))
    lost, told = add_node(cluster), list[Progress]()

    def lose(at: Progress) -> None:
        if not told:
            cluster.remove_node(lost, allow_graceful=False)
        told.append(at)

    run = Run(threads=1, on_progress=lose)
    parts = collect_on_cluster(cluster.address, model, wanted(), open_images(images), PREPROCESSING, run)
    assert len(told) == 13
    assert_same_bits(whole.statistics, parts.statistics)
    assert whole.survey == parts.survey


def calibrated(file: Path, *more: str) -> dict[str, Any]:
    words = ("--model", small_bundles.NAME, "--image-size", str(small_bundles.SIZE))
    classes = ("--num-classes", str(small_bundles.CLASSES), "--method", "entropy")
    with small_bundles.registered():
        images = str(calibration_images(2 * BLOCK))
        result = CliRunner().invoke(
            calibrate_command, [*words, *classes, "--calibration", images, "-o", str(file), *more]
        )
    assert result.exit_code == 0, result.output
    content: dict[str, Any] = json.loads(file.read_text())
    content.pop("seconds")
    return content


def test_the_command_writes_the_same_file(cluster: Any, tmp_path: Path) -> None:
    here = calibrated(tmp_path / "here.json")
    assert calibrated(tmp_path / "there.json", "--ray", cluster.address) == here


def test_a_cluster_without_room_is_refused(tmp_path: Path) -> None:
    with cluster_of(0) as empty, small_bundles.registered():
        words = ("--model", small_bundles.NAME, "--image-size", str(small_bundles.SIZE), "--ray", empty.address)
        images = ("--calibration", str(calibration_images(16)), "-o", str(tmp_path / "c.json"))
        result = CliRunner().invoke(calibrate_command, [*words, *images])
    assert "No node of the cluster has a core" in refusal(result, 3)
