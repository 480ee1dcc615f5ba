"""Parts of a calibration set, merged: the same bits as from one process, and what differs between nodes is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from spach_deploy.common.errors import ImageError, UsageError
from spach_deploy.data.readers import open_images
from spach_deploy.options.specs import Preprocessing
from spach_deploy.quantization import calibration as calibrate
from spach_deploy.quantization import shards
from spach_deploy.quantization.calibration import (
    CalibrationKey,
    CalibrationProgress,
    CalibrationSettings,
    CollectedStatistics,
)
from spach_deploy.quantization.shards import blocks_a_part, merge_all
from spach_deploy.quantization.statistics import BLOCK, TensorRequest, TensorStatistics, wanted_tensors
from tests import static_models
from tests.distributed.fakes import Elsewhere
from tests.protos import collect, collect_in_parts, find_sites
from tests.quantization.small_models import canonical
from tests.quantization.small_quantized import calibration_images, pictures
from tests.quantization.test_statistics import heavy_tailed

PREPROCESSING = Preprocessing.for_size(static_models.IMAGE_SIZE)
IMAGES = 2 * BLOCK + 7


def wanted() -> tuple[TensorRequest, ...]:
    sites = find_sites(canonical("conv"))
    return wanted_tensors(sites, [site.node for site in sites])


def assert_same_bits(one: dict[str, TensorStatistics], other: dict[str, TensorStatistics]) -> None:
    assert list(one) == list(other)
    for name, entry in one.items():
        for field in ("max_abs", "sums", "squares", "count", "batches", "rows", "histogram"):
            mine, theirs = np.asarray(getattr(entry, field)), np.asarray(getattr(other[name], field))
            assert mine.dtype == theirs.dtype
            assert mine.tobytes() == theirs.tobytes(), f"{name} {field}"


def both(images: Path, *, histograms: bool = True) -> tuple[CollectedStatistics, CollectedStatistics]:
    """From one process, and in parts."""
    model = canonical("conv")
    run = CalibrationSettings(histograms, threads=1)
    whole = collect(model, wanted(), open_images(images), PREPROCESSING, run)
    return whole, collect_in_parts(model, wanted(), open_images(images), PREPROCESSING, run, Elsewhere())


# Statistics of one tensor


def seen_in_parts(batches: Sequence[Any], borders: Sequence[int]) -> TensorStatistics:
    whole = TensorStatistics.empty(batches[0].shape[1], histogram=True)
    for start, stop in zip(borders, [*borders[1:], len(batches)], strict=True):
        part = TensorStatistics.empty(batches[0].shape[1], histogram=True, after=start)
        for rows in batches[start:stop]:
            part.see(rows)
        whole.merge(part)
    return whole


@pytest.mark.parametrize("borders", [[0], [0, 64], [0, 64, 128, 192, 256], [0, 128, 448], [0, 320]])
def test_merged_parts_are_the_whole_bit_for_bit(borders: list[int]) -> None:
    """Sums of many sizes, where the order of additions changes the last bits; one batch is beyond FP32's squares."""
    rows = heavy_tailed(500 * 20, 5)
    rows[3000, 2] = 1e15
    batches = np.split(rows, 500)
    whole = TensorStatistics.empty(5, histogram=True)
    for batch in batches:
        whole.see(batch)
    assert_same_bits({"t": whole}, {"t": seen_in_parts(batches, borders)})
    added_up = np.sum([batch.sum(axis=0, dtype=np.float64) for batch in batches[::-1]], axis=0)
    assert (added_up != whole.sums).any()  # so that the order does matter


def test_a_part_of_another_place_is_refused() -> None:
    whole = TensorStatistics.empty(2, histogram=False)
    rows = np.ones((4, 2), np.float32)
    late = TensorStatistics.empty(2, histogram=False, after=BLOCK)
    late.see(rows)
    with pytest.raises(ValueError, match="comes next"):
        whole.merge(late)
    alone = TensorStatistics.empty(2, histogram=False)
    alone.see(rows)
    with pytest.raises(ValueError, match="comes next"):
        whole.merge(alone)
    short = TensorStatistics.empty(2, histogram=False, after=0)
    short.see(rows)
    whole.merge(short)
    with pytest.raises(ValueError, match="comes next"):  # the block is not whole
        whole.merge(short)


# A calibration


def test_a_calibration_in_parts_is_the_same_bit_for_bit() -> None:
    whole, parts = both(calibration_images(IMAGES))
    assert_same_bits(whole.statistics, parts.statistics)
    assert whole.summary == parts.summary


def folder(tmp_path: Path, count: int, broken: Sequence[int]) -> Path:
    """A folder of two classes in which some pictures cannot be read."""
    for number, picture in enumerate(pictures(count)):
        file = tmp_path / "photos" / ("cat" if number % 2 else "dog") / f"{number:04}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file, compress_level=0)
        if number in broken:
            file.write_bytes(file.read_bytes()[:100])
    return tmp_path / "photos"


def test_pictures_that_cannot_be_read_move_no_border(tmp_path: Path) -> None:
    whole, parts = both(folder(tmp_path, BLOCK + 30, (3, 50, 51)), histograms=False)
    assert len(whole.summary.skipped) == 3
    assert_same_bits(whole.statistics, parts.statistics)
    assert whole.summary == parts.summary


def test_an_unfit_set_is_refused_before_the_expensive_pass(tmp_path: Path) -> None:
    np.savez(tmp_path / "black.npz", images=np.zeros((4, 40, 40, 3), np.uint8))
    executor = Elsewhere()
    with pytest.raises(ImageError, match="All 4 images"):
        in_parts(tmp_path / "black.npz", executor)
    assert executor.called == ["observe_part"]


def in_parts(images: Path, executor: Any, told: list[CalibrationProgress] | None = None) -> CollectedStatistics:
    run = CalibrationSettings(False, threads=1, on_progress=([] if told is None else told).append)
    return collect_in_parts(canonical("conv"), wanted(), open_images(images), PREPROCESSING, run, executor)


def test_progress_is_told_part_by_part() -> None:
    told: list[CalibrationProgress] = []
    in_parts(calibration_images(IMAGES), Elsewhere(), told)
    assert [at.done for at in told] == [BLOCK, 2 * BLOCK, IMAGES]
    assert told[-1].seconds_left == 0.0


def test_pictures_that_a_node_alone_cannot_read_are_an_error(tmp_path: Path) -> None:
    """Left out in silence they would give other scales."""
    images = folder(tmp_path, 8, ())
    hidden = images.with_name("elsewhere")

    class Blind(Elsewhere):
        def map(self, function: Callable[[Any, Any], Any], common: Any, items: Iterable[Any]) -> Iterator[Any]:
            listed = list(items)
            images.rename(hidden)
            found = list(super().map(function, common, listed))
            hidden.rename(images)
            return iter(found)

    with pytest.raises(UsageError, match=r"A node cannot read cat/0001\.png, which this machine can"):
        in_parts(images, Blind())


def test_pictures_that_change_between_the_passes_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = folder(tmp_path, 8, ())
    original = shards.blocks_a_part

    def change(count: int, workers: int) -> int:
        Image.fromarray(pictures(1, 9)[0]).save(images / "cat" / "0003.png")
        return original(count, workers)

    monkeypatch.setattr(shards, "blocks_a_part", change)
    with pytest.raises(UsageError, match=r"cat/0003\.png was changed"):
        in_parts(images, Elsewhere())


KEY = CalibrationKey.of(
    ["a"], PREPROCESSING, weights_sha256="", model="", image_size=1, format="int8", method="max", half=False
)


def until(images: Path, state: Path, part: int) -> None:
    """A run in parts that is killed at the progress after this many parts."""
    told: list[CalibrationProgress] = []

    def stop(at: CalibrationProgress) -> None:
        told.append(at)
        if len(told) == part:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        with_state(images, state, Elsewhere(), stop)


def with_state(
    images: Path, state: Path, executor: Any, on_progress: Callable[[CalibrationProgress], None]
) -> CollectedStatistics:
    run = CalibrationSettings(True, state, KEY, threads=1, on_progress=on_progress)
    return collect_in_parts(canonical("conv"), wanted(), open_images(images), PREPROCESSING, run, executor)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(calibrate, "_STATE_EVERY_S", 0.0)
    return tmp_path / "unfinished"


def test_a_killed_run_goes_on_behind_the_last_part(state: Path) -> None:
    images, told = calibration_images(IMAGES), list[CalibrationProgress]()
    whole, _ = both(images)
    until(images, state, 2)
    parts = with_state(images, state, Elsewhere(workers=5), told.append)
    assert parts.resumed == 2 * BLOCK
    assert [at.done for at in told] == [IMAGES]
    assert_same_bits(whole.statistics, parts.statistics)
    assert not state.exists()


def test_one_process_goes_on_where_a_cluster_was(state: Path) -> None:
    images = calibration_images(IMAGES)
    whole, _ = both(images)
    until(images, state, 1)
    run = CalibrationSettings(True, state, KEY, threads=1)
    found = collect(canonical("conv"), wanted(), open_images(images), PREPROCESSING, run)
    assert found.resumed == BLOCK
    assert_same_bits(whole.statistics, found.statistics)


def test_what_one_process_kept_within_a_block_is_not_continued(state: Path) -> None:
    images, told = calibration_images(IMAGES), list[CalibrationProgress]()
    whole, _ = both(images)

    def stop(at: CalibrationProgress) -> None:
        if at.done == BLOCK + 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(
            canonical("conv"),
            wanted(),
            open_images(images),
            PREPROCESSING,
            CalibrationSettings(True, state, KEY, 1, on_progress=stop),
        )
    assert state.exists()
    parts = with_state(images, state, Elsewhere(), told.append)
    assert (parts.resumed, told[0].done) == (0, BLOCK)
    assert_same_bits(whole.statistics, parts.statistics)


@pytest.mark.parametrize("count", [BLOCK - 1, IMAGES - 1])
def test_a_killed_run_is_not_continued_on_other_images(state: Path, count: int) -> None:
    until(calibration_images(IMAGES), state, 1)
    with pytest.raises(UsageError, match="continues a calibration on other images"):
        with_state(calibration_images(count, first=4), state, Elsewhere(), lambda at: None)
    assert state.exists()


def test_parts_are_small_enough_for_all_workers_and_bounded() -> None:
    assert blocks_a_part(64, 8) == 1
    assert blocks_a_part(BLOCK * 64, 4) == 4
    assert blocks_a_part(10_000_000, 100) == 16


def test_merging_nothing_is_nothing() -> None:
    whole: dict[str, TensorStatistics] = {}
    merge_all(whole, {})
    assert whole == {}
