"""Calibration files and unfinished calibrations: reused or continued where they fit, refused by name where not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spach_deploy.common.errors import ImageError, UsageError
from spach_deploy.common.files import Destination
from spach_deploy.data.readers import open_images
from spach_deploy.options.specs import Preprocessing
from spach_deploy.quantization import calibration as calibrate
from spach_deploy.quantization.calibration import (
    Calibration,
    CalibrationKey,
    CalibrationProgress,
    CalibrationSettings,
    CollectedStatistics,
    check_activations,
    read_calibration,
    write_calibration,
)
from spach_deploy.quantization.formats import INT8
from spach_deploy.quantization.plan import Scaling
from spach_deploy.quantization.scales import Method
from spach_deploy.quantization.sites import Selection
from spach_deploy.quantization.statistics import TensorRequest, TensorStatistics
from tests import static_models
from tests.commands import contents
from tests.protos import candidates, collect
from tests.quantization.small_models import canonical, plan
from tests.quantization.small_quantized import calibration_images, pictures

PREPROCESSING = Preprocessing.for_size(static_models.IMAGE_SIZE)


def key(**changes: Any) -> CalibrationKey:
    entries = {
        "weights_sha256": "a" * 64,
        "model": "small",
        "image_size": 32,
        "format": "int8",
        "method": "max",
        "half": True,
    }
    layers = changes.pop("sites", ["fc1/Gemm"])
    return CalibrationKey.of(layers, changes.pop("preprocessing", PREPROCESSING), **{**entries, **changes})


def calibration(**changes: Any) -> Calibration:
    made = Calibration(
        key=key(),
        source="npz photos.npz",
        images=16,
        images_sha256="b" * 64,
        survey={"images": 16, "channel_mean": [1.0, 2.0, 3.0]},
        plan=plan("conv", INT8),
        seconds=1.25,
        digests=frozenset({b"12345678", b"abcdefgh"}),
    )
    return dataclasses.replace(made, **changes)


# The file


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    write_calibration(calibration(), Destination.of(path))
    assert read_calibration(path, key()) == calibration()
    assert list(tmp_path.iterdir()) == [path]


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "weights": ({"weights_sha256": "c" * 64}, "other weights: aaaa.* there, cccc.* now"),
    "model": ({"model": "ms_hybrid_s"}, "another model: small there, ms_hybrid_s now"),
    "image size": ({"image_size": 64}, "another image size: 32 there, 64 now"),
    "format": ({"format": "fp8"}, "another format: int8 there, fp8 now"),
    "method": ({"method": "mse"}, "another method: max there, mse now"),
    "rest": ({"half": False}, "other types around the layers: True there, False now"),
    "layers": ({"sites": ["fc1/Gemm", "fc2/Gemm"]}, "other quantized layers"),
    "preprocessing": ({"preprocessing": Preprocessing.for_size(64)}, "preprocessing"),
    "version": ({"graph_form": 999}, "another version of spach-deploy's graphs"),
}


@pytest.mark.parametrize(("changes", "sentence"), OTHERS.values(), ids=OTHERS)
def test_a_stale_file_is_refused_and_what_differs_is_named(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "c.json"
    write_calibration(calibration(), Destination.of(path))
    with pytest.raises(UsageError, match=f"does not fit this export .*{sentence}") as caught:
        read_calibration(path, key(**changes))
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_every_entry_of_the_key_makes_a_file_stale() -> None:
    changed = {name for changes, _ in OTHERS.values() for name in changes}
    assert changed == {field.name for field in dataclasses.fields(CalibrationKey)}


def _drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.pop(name)


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no schema": _drop("schema"),
    "another schema": lambda content: content.update(schema=99),
    "no key": _drop("key"),
    "a key that is none": lambda content: content.update(key=3),
    "no plan": _drop("plan"),
    "a plan that is none": lambda content: content.update(plan=[]),
    "a damaged plan": lambda content: content["plan"]["sites"][0].pop("tensors"),
    "no images": _drop("images"),
    "images that are no number": lambda content: content.update(images="many"),
    "no digests": _drop("digests"),
    "digests that are none": lambda content: content.update(digests=["xyz"]),
    "no survey": _drop("survey"),
    "no seconds": _drop("seconds"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_refused_by_name(damage: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    write_calibration(calibration(), Destination.of(path))
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=str(path)) as caught:
        read_calibration(path, key())
    assert caught.value.hint


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe\x00", b"[" * 100_000])
def test_what_is_no_calibration_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=f"{path} is no calibration file"):
        read_calibration(path, key())


def test_a_file_that_is_missing_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "c.json", tmp_path):
        with pytest.raises(UsageError, match=f"{path} cannot be read"):
            read_calibration(path, key())


def test_a_place_where_nothing_can_be_written_is_refused_and_nothing_is_left_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        write_calibration(calibration(), Destination.of(tmp_path / "no" / "c.json"))
    (tmp_path / "c.json").mkdir()
    with pytest.raises(UsageError, match="cannot be written"):
        write_calibration(calibration(), Destination.of(tmp_path / "c.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


# Unfinished calibrations


class KilledError(Exception):
    pass


@pytest.fixture(autouse=True)
def _state_after_every_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "_STATE_EVERY_S", -1.0)


def wanted() -> tuple[TensorRequest, ...]:
    return candidates(canonical("conv"), Selection(), Scaling(INT8, Method.MSE)).wanted


def run(
    images: Path, state: Path | None, *, kill_after: int | None = None, histograms: bool = True
) -> CollectedStatistics:
    """A calibration that raises once `kill_after` images are done."""

    def progress(at: CalibrationProgress) -> None:
        if at.done == kill_after:
            raise KilledError

    how = CalibrationSettings(histograms, state, key(), threads=1, on_progress=progress)
    return collect(canonical("conv"), wanted(), open_images(images), PREPROCESSING, how)


def assert_same(found: dict[str, TensorStatistics], expected: dict[str, TensorStatistics]) -> None:
    assert found.keys() == expected.keys()
    for name, entry in expected.items():
        for field in dataclasses.fields(entry):
            value = getattr(entry, field.name)
            other = getattr(found[name], field.name)
            assert np.array_equal(np.asarray(other), np.asarray(value)), (name, field.name)
            assert np.asarray(other).dtype == np.asarray(value).dtype


@pytest.mark.parametrize("histograms", [True, False])
def test_a_killed_calibration_goes_on_and_ends_as_if_it_had_not_been_killed(tmp_path: Path, histograms: bool) -> None:
    images, state = calibration_images(16), tmp_path / "c.json.unfinished"
    whole = run(images, None, histograms=histograms)
    for kill_after in (5, 11):
        with pytest.raises(KilledError):
            run(images, state, kill_after=kill_after, histograms=histograms)
        assert state.is_file()
    seen = run(images, state, histograms=histograms)
    assert seen.resumed == 11
    assert_same(seen.statistics, whole.statistics)
    assert seen.summary.to_dict() == whole.summary.to_dict()
    assert seen.summary.digests == whole.summary.digests
    assert list(tmp_path.iterdir()) == []  # nothing is unfinished any more


def test_a_state_that_others_could_have_written_is_not_continued(tmp_path: Path) -> None:
    images, state = calibration_images(16), tmp_path / "state"
    with pytest.raises(KilledError):
        run(images, state, kill_after=5)
    assert state.stat().st_mode & 0o777 == 0o600
    state.chmod(0o666)
    assert run(images, state).resumed == 0


def test_a_state_and_a_calibration_that_came_since_are_left_alone(tmp_path: Path) -> None:
    images, state, file = calibration_images(16), tmp_path / "state", tmp_path / "c.json"
    place = Destination.of(file)

    def other(_: CalibrationProgress) -> None:
        state.unlink()
        state.write_text("another's")

    how = CalibrationSettings(True, state, key(), threads=1, on_progress=other)
    with pytest.raises(UsageError, match=r"state cannot be written \(something was written there since"):
        collect(canonical("conv"), wanted(), open_images(images), PREPROCESSING, how)
    write_calibration(calibration(), Destination.of(file))
    with pytest.raises(UsageError, match=r"c\.json cannot be written \(something was written there since"):
        write_calibration(calibration(), place)
    assert state.read_text() == "another's"


def test_progress_counts_what_was_done_before(tmp_path: Path) -> None:
    images, state = calibration_images(16), tmp_path / "state"
    with pytest.raises(KilledError):
        run(images, state, kill_after=9)
    told: list[CalibrationProgress] = []
    how = CalibrationSettings(True, state, key(), threads=1, on_progress=told.append)
    collect(canonical("conv"), wanted(), open_images(images), PREPROCESSING, how)
    assert [at.done for at in told] == list(range(10, 17))
    assert {at.total for at in told} == {16}
    assert told[-1].seconds_left == 0.0
    assert all(at.seconds_left is not None and at.seconds_left >= 0 for at in told)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: bytes(len(content)),
        lambda content: content[:40] + b"\x00\xff" + content[42:],
    ],
    ids=["empty", "cut off", "zeros", "a flipped byte"],
)
def test_a_damaged_state_is_begun_anew(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    images, state = calibration_images(16), tmp_path / "state"
    with pytest.raises(KilledError):
        run(images, state, kill_after=5)
    state.write_bytes(damage(state.read_bytes()))
    seen = run(images, state)
    assert_same(seen.statistics, run(images, None).statistics)


@pytest.mark.parametrize("changes", [{"method": "mse"}, {"sites": ["other"]}, {"weights_sha256": "d" * 64}])
def test_a_state_of_another_calibration_is_begun_anew(changes: dict[str, Any], tmp_path: Path) -> None:
    images, state = calibration_images(16), tmp_path / "state"
    with pytest.raises(KilledError):
        run(images, state, kill_after=5)
    how = CalibrationSettings(True, state, key(**changes), threads=1)
    seen = collect(canonical("conv"), wanted(), open_images(images), PREPROCESSING, how)
    assert seen.resumed == 0
    assert_same(seen.statistics, run(images, None).statistics)


def saved(path: Path, images: np.ndarray[Any, np.dtype[np.uint8]]) -> Path:
    np.savez(path, images=images)
    return path


def test_a_state_of_other_images_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with pytest.raises(KilledError):
        run(calibration_images(16), state, kill_after=5)
    before = contents(tmp_path)
    others = saved(tmp_path / "others.npz", pictures(16, first=7))
    with pytest.raises(UsageError, match="continues a calibration on other images than npz") as caught:
        run(others, state)
    assert str(state) in caught.value.hint
    assert {name: entry for name, entry in contents(tmp_path).items() if name == "state"} == before


def test_a_state_of_more_images_than_there_are_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with pytest.raises(KilledError):
        run(calibration_images(16), state, kill_after=12)
    fewer = saved(tmp_path / "fewer.npz", pictures(16, first=1)[:8])
    with pytest.raises(UsageError, match="continues a calibration on other images"):
        run(fewer, state)


def test_images_in_another_order_are_other_images_for_a_state(tmp_path: Path) -> None:
    """The state says how many of the first images are done."""
    state = tmp_path / "state"
    with pytest.raises(KilledError):
        run(calibration_images(16), state, kill_after=5)
    with pytest.raises(UsageError, match="other images"):
        run(saved(tmp_path / "turned.npz", pictures(16, first=1)[::-1]), state)


# Images that drive the model elsewhere


def statistics_times(factor: float, tensors: int = 3) -> dict[str, TensorStatistics]:
    made = {}
    for index in range(tensors):
        made[f"t{index}"] = TensorStatistics.empty(2, histogram=False)
        made[f"t{index}"].see(np.full((4, 2), factor * (index + 1), np.float32))
    return made


@pytest.mark.parametrize("factor", [5.0, 0.2, 1e6, 1e-6, 0.0])
def test_activations_far_from_those_on_photographs_are_refused(factor: float) -> None:
    with pytest.raises(ImageError, match="On my images the model's activations are typically") as caught:
        check_activations(statistics_times(factor), statistics_times(1.0), "my images")
    assert caught.value.hint


@pytest.mark.parametrize("factor", [0.3, 1.0, 3.5])
def test_activations_of_other_pictures_are_not(factor: float) -> None:
    check_activations(statistics_times(factor), statistics_times(1.0), "my images")


def test_single_tensors_may_differ() -> None:
    seen = statistics_times(1.0)
    seen["t0"] = statistics_times(1e6)["t0"]
    check_activations(seen, statistics_times(1.0), "my images")
    check_activations(seen, {}, "my images")


def test_a_survey_without_pictures_is_refused_after_the_run(tmp_path: Path) -> None:
    black = saved(tmp_path / "black.npz", np.zeros((4, 40, 40, 3), np.uint8))
    with pytest.raises(ImageError, match="All 4 images"):
        run(black, tmp_path / "state")
