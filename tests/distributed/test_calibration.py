"""Calibration on a real Ray cluster: the same bits as in one process, also when a node dies in the middle."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from spach_deploy.cli.calibrate import main as calibrate_command
from spach_deploy.data.readers import open_images
from spach_deploy.distributed.actors import RayAddress
from spach_deploy.quantization.calibration import CalibrationProgress, CalibrationSettings
from spach_deploy.quantization.statistics import BLOCK, wanted_tensors
from tests import small_bundles
from tests.commands import refusal
from tests.distributed.small_cluster import add_node, cluster_of, needs_ray
from tests.protos import collect, collect_on_cluster, find_sites
from tests.quantization.small_models import canonical
from tests.quantization.small_quantized import calibration_images
from tests.quantization.test_shards import KEY, PREPROCESSING, assert_same_bits, wanted

pytestmark = needs_ray

PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with cluster_of(2) as running:
        yield running


def test_a_node_that_dies_in_the_middle_changes_no_bit(cluster: Any) -> None:
    images, model = calibration_images(12 * BLOCK + 5), canonical("conv")
    whole = collect(model, wanted(), open_images(images), PREPROCESSING, CalibrationSettings(threads=1))
    lost, told = add_node(cluster), list[CalibrationProgress]()

    def lose(at: CalibrationProgress) -> None:
        if not told:
            cluster.remove_node(lost, allow_graceful=False)
        told.append(at)

    run = CalibrationSettings(threads=1, on_progress=lose)
    parts = collect_on_cluster(RayAddress(cluster.address), model, wanted(), open_images(images), PREPROCESSING, run)
    assert len(told) == 13
    assert_same_bits(whole.statistics, parts.statistics)
    assert whole.summary == parts.summary


def test_results_that_exceed_the_object_store_go_to_disk_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """All 14 parts of 11 MB are done before the second is taken, and the node's store holds 80 MB."""
    images, model = calibration_images(14 * BLOCK), canonical("hybrid")
    sites = find_sites(model)
    measured = wanted_tensors(sites, [site.node for site in sites])
    whole = collect(model, measured, open_images(images), PREPROCESSING, CalibrationSettings(threads=1))
    monkeypatch.setattr("spach_deploy.distributed.cluster._AHEAD", 20)
    monkeypatch.setattr("spach_deploy.quantization.shards.MOST_BLOCKS", 1)
    spilled = 0

    def wait(at: CalibrationProgress) -> None:
        nonlocal spilled
        end = time.monotonic() + PATIENCE_S
        while at.done == BLOCK and spilled <= 10_000_000 and time.monotonic() < end:
            time.sleep(0.5)
            spilled = spilled_bytes(small)

    with cluster_of(0) as small:
        add_node(small, 80 << 20)
        run = CalibrationSettings(threads=1, on_progress=wait)
        parts = collect_on_cluster(RayAddress(small.address), model, measured, open_images(images), PREPROCESSING, run)
    assert spilled > 10_000_000
    assert_same_bits(whole.statistics, parts.statistics)


def spilled_bytes(cluster: Any) -> int:
    """What the cluster's object stores moved to disk, and is there now."""
    session = Path(cluster.head_node.get_session_dir_path())
    return sum(file.stat().st_size for file in session.glob("ray_spilled_objects*/*"))


def test_an_unfinished_run_goes_on_behind_the_last_part(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spach_deploy.quantization.calibration._STATE_EVERY_S", 0.0)
    images, model, told = calibration_images(6 * BLOCK), canonical("conv"), list[CalibrationProgress]()
    whole = collect(model, wanted(), open_images(images), PREPROCESSING, CalibrationSettings(threads=1))

    def stop(at: CalibrationProgress) -> None:
        told.append(at)
        if len(told) == 3:
            raise KeyboardInterrupt

    run = CalibrationSettings(True, tmp_path / "unfinished", KEY, threads=1, on_progress=stop)
    with pytest.raises(KeyboardInterrupt):
        collect_on_cluster(RayAddress(cluster.address), model, wanted(), open_images(images), PREPROCESSING, run)
    parts = collect_on_cluster(RayAddress(cluster.address), model, wanted(), open_images(images), PREPROCESSING, run)
    assert parts.resumed == 3 * BLOCK
    assert [at.done for at in told] == [count * BLOCK for count in range(1, 7)]
    assert_same_bits(whole.statistics, parts.statistics)


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
