"""The photographs that ship with the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

import spach_deploy.data
from spach_deploy.data.images import probe_source
from spach_deploy.data.readers import batches, content_hash
from spach_deploy.options.specs import Preprocessing, channel_statistics

FOLDER = Path(spach_deploy.data.__file__).parent / "probes"


def test_eight_distinct_photographs_in_a_fixed_order() -> None:
    source = probe_source()
    (batch,) = batches(source, Preprocessing(), 8)
    assert source.count == len(batch) == 8
    assert list(batch.names) == sorted(batch.names)
    assert source.skipped == ()
    flat = batch.pixels.reshape(8, -1).astype(float)
    correlation = np.abs(np.corrcoef(flat) - np.eye(8))
    assert correlation.max() < 0.7  # scenes, not crops of one another
    assert flat.std(axis=1).min() > 2  # none of them blank


def test_same_pixels_every_time_and_by_any_batch_size() -> None:
    hashes = {content_hash(b.pixels for b in batches(probe_source(), Preprocessing(), n)) for n in (1, 3, 8)}
    assert len(hashes) == 1


def test_other_channels_are_moved_copies_in_grey() -> None:
    five = Preprocessing.for_size(224, *channel_statistics(5), crop=1)
    source = probe_source(5)
    (batch,) = batches(source, five, 8)
    assert batch.pixels.shape == (8, 224, 224, 5)
    pairs = [(a, b) for a in range(5) for b in range(a)]
    assert all((batch.pixels[..., a] != batch.pixels[..., b]).any(axis=(1, 2)).all() for a, b in pairs)
    assert source.description == "the 8 built-in photographs, in grey, 5 times, each 8 pixels right of the one before"
    photo, channels = next(iter(probe_source())).image, next(iter(source)).image
    assert isinstance(photo, Image.Image)
    assert isinstance(channels, np.ndarray)
    assert (channels[:, 8:, 1] == np.asarray(photo.convert("L"))[:, :-8]).all()


def test_limit_takes_the_first() -> None:
    assert [item.name for item in probe_source().limit(2)] == ["astronaut.jpg", "camera.jpg"]


def test_package_stays_small_and_names_every_licence() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 500_000
    text = (FOLDER / "README.md").read_text()
    for item in probe_source():
        row = next(line for line in text.splitlines() if item.name in line)
        assert "CC0" in row or "public domain" in row
