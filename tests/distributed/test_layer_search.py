"""spach-export --int8 --max-rel-l2 --ray on a real cluster: calibration and search there, the bundle of one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spach_deploy.bundle.store import GRAPH, QUANTIZATION, Bundle
from spach_deploy.common.metrics import relative_l2
from spach_deploy.pipeline.steps import sensitivity as stages_sensitivity
from tests import small_bundles
from tests.commands import export
from tests.distributed.small_cluster import add_node, cluster_of, needs_ray
from tests.quantization.small_quantized import calibration_images
from tests.quantization.test_layer_search import BOUND

pytestmark = [*needs_ray, pytest.mark.usefixtures("small_model_registered")]

SMALL = ("--model", small_bundles.NAME, "--image-size", small_bundles.SIZE, "--num-classes", small_bundles.CLASSES)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with cluster_of(1) as running:
        yield running


def bundle(target: Path, *more: object) -> Bundle:
    bounds = ("--calibration", calibration_images(), "--max-rel-l2", BOUND)
    result = export(*SMALL, "--int8", *bounds, "--engine", "none", "-o", target, *more)
    assert result.exit_code == 0, result.output
    return Bundle.open(target)


def test_a_node_that_dies_in_the_middle_changes_no_layer(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = bundle(tmp_path / "here")
    lost, evaluations, measure = add_node(cluster), list[float](), relative_l2

    def lose(logits: Any, reference: Any) -> float:
        if not evaluations:
            cluster.remove_node(lost, allow_graceful=False)
        evaluations.append(measure(logits, reference))
        return evaluations[-1]

    monkeypatch.setattr(stages_sensitivity, "relative_l2", lose)
    there = bundle(tmp_path / "there", "--ray", cluster.address)
    assert len(evaluations) > 2
    assert there.file(QUANTIZATION).read_bytes() == here.file(QUANTIZATION).read_bytes()
    assert there.file(GRAPH).read_bytes() == here.file(GRAPH).read_bytes()
    assert there.manifest.content()["quantization"] == here.manifest.content()["quantization"]
