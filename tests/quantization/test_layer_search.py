"""The search for layers that stay in eight bits, by this process and by the workers of a cluster: the same choice."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spach_deploy.common.errors import MismatchError
from spach_deploy.options.specs import Precision, QuantizationSpec
from spach_deploy.pipeline.cache import export_key
from spach_deploy.pipeline.export import export
from spach_deploy.pipeline.steps.sensitivity import Searcher
from tests import small_bundles
from tests.commands import export as export_command
from tests.commands import refusal
from tests.distributed.fakes import FakeCluster
from tests.quantization import small_quantized
from tests.quantization.small_quantized import calibration_images, pictures

BOUND = 0.02


@pytest.fixture
def cluster() -> FakeCluster:
    """It searches; the calibration, of which other tests are, is made before."""
    return FakeCluster()


def bounded(tmp_path: Path, spec: QuantizationSpec, images: Path | None = None) -> dict[str, Any]:
    """What an export says of its layers."""
    options = small_quantized.options(Precision.INT8, tmp_path / f"bundle-{spec.cluster is not None}", spec)
    with small_bundles.registered():
        bundle = export(dataclasses.replace(options, images=images)).bundle
    return {
        "layers": json.loads(bundle.file("quantization.json").read_text()),
        "search": bundle.manifest.content()["quantization"],
    }


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("calibration") / "small.json"
    from spach_deploy.pipeline.export import calibrate_to_file

    with small_bundles.registered():
        calibrate_to_file(small_quantized.options(Precision.INT8, Path("unused")), file)
    return file


def both(cluster: FakeCluster, tmp_path: Path, spec: QuantizationSpec, images: Path | None = None) -> dict[str, Any]:
    here = bounded(tmp_path, spec, images)
    there = bounded(tmp_path, dataclasses.replace(spec, cluster=cluster), images)
    assert here == there
    return there


def test_a_bound_on_the_logits_leaves_the_same_layers_in_float(
    cluster: FakeCluster, calibration: Path, tmp_path: Path
) -> None:
    found = both(cluster, tmp_path, QuantizationSpec(calibration, max_rel_l2=BOUND))["search"]["sensitivity"]
    kept = [layer for layer in found["layers"] if layer["kept_float"]]
    assert 0 < len(kept) < len(found["layers"])
    assert found["measured"] <= BOUND < found["all_quantized"]
    assert len(cluster.pools) == 1
    assert cluster.pools[0] > 1.5e9


@pytest.mark.slow
def test_a_bound_on_the_accuracy_takes_labelled_images(cluster: FakeCluster, calibration: Path, tmp_path: Path) -> None:
    images = tmp_path / "images.npz"
    np.savez(images, images=pictures(22, first=7), labels=np.arange(22) % small_bundles.CLASSES)
    spec = QuantizationSpec(calibration, max_drop=100, labels=images)
    found = both(cluster, tmp_path, spec, images)["search"]["sensitivity"]
    assert (found["measure"], found["evaluations"]) == ("points of top-1", 1)


def test_a_bound_that_nothing_keeps_is_told(cluster: FakeCluster, calibration: Path, tmp_path: Path) -> None:
    spec = QuantizationSpec(calibration, max_rel_l2=0.0, cluster=cluster)
    with pytest.raises(MismatchError, match=r"Even with every layer in float .* more than --max-rel-l2 0 allows"):
        bounded(tmp_path, spec)


def test_a_worker_keeps_one_model_for_all_batches_of_an_evaluation(
    cluster: FakeCluster, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = list[object]()
    original = Searcher.logits

    def counting(self: Searcher, trial: Any) -> Any:
        logits = original(self, trial)
        assert self._quantized is not None
        if not any(model is self._quantized[1] for model in made):
            made.append(self._quantized[1])
        return logits

    monkeypatch.setattr(Searcher, "logits", counting)
    images = tmp_path / "images.npz"
    np.savez(images, images=pictures(22, first=7), labels=np.arange(22) % small_bundles.CLASSES)
    bounded(tmp_path, QuantizationSpec(calibration, max_drop=100, labels=images), images)
    assert len(made) == 1


# Options


SMALL = ("--model", "ms_conv_xxs", "--engine", "none")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--fp16",), "--ray is for quantized exports. Add --int8 or --fp8"),
        (("--int8", "--calibration", "CALIBRATION"), "--ray has nothing to spread"),
        (("--auto", "--calibration", "IMAGES"), "--ray is not for --auto"),
        (("--target", "cpu", "--calibration", "IMAGES"), "--ray is not for --target cpu"),
    ],
)
def test_what_ray_does_nothing_for_is_refused(calibration: Path, arguments: tuple[str, ...], reason: str) -> None:
    known = {"CALIBRATION": str(calibration), "IMAGES": str(calibration_images())}
    assert reason in refusal(export_command(*SMALL, *(known.get(word, word) for word in arguments), "--ray"))


def test_where_it_is_searched_does_not_change_what_an_export_is_known_by(calibration: Path, tmp_path: Path) -> None:
    options = small_quantized.options(Precision.INT8, tmp_path, QuantizationSpec(calibration, max_rel_l2=BOUND))
    spread = dataclasses.replace(options, quantization=dataclasses.replace(options.quantization, cluster=FakeCluster()))
    assert export_key(options) == export_key(spread) is not None
