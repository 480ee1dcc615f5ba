"""What a calibration set is refused for, what it is warned about, and what passes.

The pictures are those that come in the wheels of scikit-image and scikit-learn, and the package's own.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import statistics
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from spach_deploy.common.errors import ImageError, UsageError
from spach_deploy.data.calibration_set_checks import CalibrationSetCollector, CalibrationSetSummary, check_overlap
from spach_deploy.data.images import (
    ImageBatch,
    ImageEntry,
    ImageSource,
    batches,
    content_hash,
    grey_channels,
    probe_source,
)
from spach_deploy.data.readers import open_images
from spach_deploy.options.specs import Preprocessing, channel_statistics

Pictures = list[Image.Image]
SIZES = (32, 96, 224)


def source_of(pictures: Sequence[Image.Image]) -> ImageSource:
    entries = [ImageEntry(f"p{i}", partial(lambda picture: picture, picture)) for i, picture in enumerate(pictures)]
    return ImageSource("the set", lambda _: iter(entries), count=len(entries))


def survey_of(
    source: ImageSource | Sequence[Image.Image], size: int = 96, batch_size: int = 8
) -> CalibrationSetSummary:
    source = source if isinstance(source, ImageSource) else source_of(source)
    preprocessing = Preprocessing.for_size(size)
    taker = CalibrationSetCollector(source, preprocessing)
    for batch in batches(source, preprocessing, batch_size):
        taker.see(batch)
    return taker.summary()


def picture_of(values: npt.ArrayLike) -> Image.Image:
    array = np.clip(np.round(np.asarray(values, np.float64)), 0, 255).astype(np.uint8)
    return Image.fromarray(array).convert("RGB")


# Pictures


@functools.cache
def wheel_pictures() -> dict[str, Image.Image]:
    """Every 8-bit picture in the wheels."""
    skimage, sklearn = pytest.importorskip("skimage"), pytest.importorskip("sklearn")
    folders = Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets" / "images"
    files = sorted(f for folder in folders for f in folder.iterdir() if f.suffix in (".png", ".jpg"))
    opened = {file.stem: Image.open(file) for file in files}
    return {name: i.convert("RGB") for name, i in opened.items() if not i.mode.startswith(("I", "F"))}


def probes() -> Pictures:
    return [item.image for item in probe_source() if isinstance(item.image, Image.Image)]


def digits() -> Pictures:
    images = pytest.importorskip("sklearn.datasets").load_digits().images[:100]
    return [picture_of(image * 255 / 16) for image in images]


def faces() -> Pictures:
    skimage = pytest.importorskip("skimage")
    images = np.load(Path(skimage.__file__).parent / "data" / "lfw_subset.npy")[:100]
    return [picture_of(image * 255) for image in images]


def textures() -> Pictures:
    """Crops of grass, gravel and bricks in changing light, the finest textures there are."""
    rng = np.random.default_rng(0)
    return [picture_of(np.asarray(crop) * rng.uniform(0.6, 1.3)) for crop in texture_crops(rng)]


def texture_crops(rng: np.random.Generator) -> Iterator[Image.Image]:
    for name in ("grass", "gravel", "brick"):
        picture = wheel_pictures()[name]
        for side in (300, 400, 500) * 3:
            left, top = rng.integers(0, 513 - side, 2)
            yield picture.crop((left, top, left + side, top + side))


def night_sky() -> Pictures:
    """Stars on dark sky, small beside the pixels: apart from their skewness they are noise."""
    return [picture_of(stars(np.random.default_rng(seed))) for seed in range(8)]


def stars(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    sky = rng.normal(12, 3, (512, 512))
    rows, columns = rng.integers(0, 511, (2, 600))
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        sky[rows + down, columns + right] += 60 * rng.pareto(1.5, 600)
    return sky


def noisy_photographs() -> Pictures:
    """Photographs under sensor noise of a standard deviation of 80."""
    rng = np.random.default_rng(0)
    small = [picture.resize((256, 256)) for picture in probes()]
    return [picture_of(np.asarray(picture) + rng.normal(0, 80, (256, 256, 3))) for picture in small]


def compressed_photographs() -> Pictures:
    return [jpeg(picture, 5) for picture in probes()]


def drawings() -> Pictures:
    """Stripes, circles, boards and ramps, thin and thick."""
    y, x = np.mgrid[:256, :256]
    return [
        picture_of(values)
        for period in (3, 8, 40)
        for values in (
            255.0 * (x // period % 2),
            255.0 * ((x // period + y // period) % 2),
            127 + 127 * np.sin((x + 2 * y) / period),
            255.0 * (abs(np.hypot(x - 128, y - 128) - 90) < period),
            255.0 * ((x % 64 < period) | (y % 64 < period)),
        )
    ]


def jpeg(picture: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


# Noise

Noise = Callable[[np.random.Generator, int], npt.NDArray[Any]]


def salt_and_pepper(rng: np.random.Generator, n: int, share: float = 0.1, channels: int = 1) -> npt.NDArray[Any]:
    chance = rng.random((n, n, channels))
    values = np.where(chance < share / 2, 0, np.where(chance > 1 - share / 2, 255, 120))
    return np.broadcast_to(values, (n, n, 3))


NOISES: dict[str, Noise] = {
    "uniform": lambda rng, n: rng.integers(0, 256, (n, n, 3)),
    "uniform grey": lambda rng, n: rng.integers(0, 256, (n, n)),
    "normal": lambda rng, n: rng.normal(127, 60, (n, n, 3)),
    "faint": lambda rng, n: rng.normal(127, 4, (n, n, 3)),
    "clipped": lambda rng, n: 255 * rng.normal(0, 1, (n, n, 3)),
    "with an offset": lambda rng, n: rng.normal((220, 160, 60), 20, (n, n, 3)),
    "salt and pepper": salt_and_pepper,
    "coloured salt and pepper": partial(salt_and_pepper, channels=3),
    "black or white": lambda rng, n: 255 * rng.integers(0, 2, (n, n, 3)),
}


def noise(kind: str, side: int, count: int = 8, seed: int = 0) -> Pictures:
    rng = np.random.default_rng(seed)
    return [picture_of(NOISES[kind](rng, side)) for _ in range(count)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("factor", [0.5, 1, 2])
@pytest.mark.parametrize("kind", NOISES)
def test_noise_is_refused_at_once_twice_and_half_the_size(kind: str, factor: float, size: int) -> None:
    survey = survey_of(noise(kind, round(size * factor)), size)
    assert survey.noise >= 7
    with pytest.raises(ImageError, match="8 images in the set are noise, not pictures") as caught:
        survey.check()
    assert "photographs" in caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("quality", [50, 75, 95])
@pytest.mark.parametrize("factor", [0.5, 1, 2])
def test_noise_saved_as_jpeg_is_refused(factor: float, quality: int) -> None:
    side = round(224 * factor)
    pictures = [jpeg(picture, quality) for picture in noise("uniform", side) + noise("normal", side)]
    with pytest.raises(ImageError, match="All 16 images in the set are noise"):
        survey_of(pictures, 224).check()


def test_noise_in_an_npz_is_refused(tmp_path: Path) -> None:
    random = np.random.default_rng(0).random((10, 224, 224, 3))
    np.savez(tmp_path / "random.npz", images=(255 * random).astype(np.uint8))
    with pytest.raises(ImageError, match=r"All 10 images in npz .* are noise, not pictures"):
        survey_of(open_images(tmp_path / "random.npz"), 224).check()


def test_one_picture_of_noise_is_refused() -> None:
    with pytest.raises(ImageError, match="The only image in the set is noise, not a picture"):
        survey_of(noise("normal", 224, 1), 224).check()


@pytest.mark.parametrize("size", [96, 224])
def test_noise_of_several_kinds_is_refused(size: int) -> None:
    kinds = [picture for kind in NOISES for picture in noise(kind, size, 2)]
    with pytest.raises(ImageError, match=f"All {len(kinds)} images"):
        survey_of(kinds, size).check()


# What must pass


@pytest.mark.parametrize("size", [16, 32, 64, 96, 224, 384])
@pytest.mark.parametrize(
    "pictures",
    [probes, digits, faces, textures, noisy_photographs, compressed_photographs, drawings],
    ids=lambda make: make.__name__,
)
def test_pictures_pass(pictures: Callable[[], Pictures], size: int) -> None:
    survey_of(pictures()[:30], size).check()


@pytest.mark.parametrize("size", [16, 32, 64, 96, 224, 384])
def test_every_picture_of_the_wheels_passes(size: int) -> None:
    survey = survey_of(list(wheel_pictures().values()), size)
    survey.check()
    assert survey.images > 20
    assert survey.noise <= 3  # gravel, grass and stars, on few pixels


@pytest.mark.parametrize("size", [64, 96, 224])
def test_night_sky_passes(size: int) -> None:
    survey_of(night_sky(), size).check()


@pytest.mark.parametrize("size", [224, 384])
@pytest.mark.parametrize("name", ["grass", "gravel", "brick", "hubble_deep_field"])
def test_one_fine_texture_passes_and_is_not_called_noise(name: str, size: int) -> None:
    survey = survey_of([wheel_pictures()[name]], size)
    survey.check()
    assert survey.noise == 0


@pytest.mark.parametrize("size", SIZES)
def test_photographs_with_some_noise_pass_with_a_warning(size: int) -> None:
    survey = survey_of(probes() + noise("uniform", size, 4), size)
    survey.check()
    assert "4 of 12 images are much like noise (p8, p9, p10 and 1 more)" in " ".join(survey.warnings())


def test_small_textures_in_changing_light_are_told_by_their_brightness() -> None:
    survey = survey_of(textures(), 32)
    assert survey.noise > 0.85 * survey.images  # on 32 pixels they are noise, one by one
    survey.check()
    same_light = dataclasses.replace(survey, noise_spread=1.0)
    with pytest.raises(ImageError, match="noise"):
        same_light.check()


# Constant images


@pytest.mark.parametrize("size", [16, 224])
def test_constant_images_are_refused(size: int) -> None:
    colours = [jpeg(Image.new("RGB", (50, 60), (20 * i, 200, 5)), 90) for i in range(10)]
    with pytest.raises(ImageError, match="All 10 images in the set are each of one colour") as caught:
        survey_of(colours, size).check()
    assert "photographs" in caught.value.hint


def test_nearly_only_constant_and_noise_are_refused_together() -> None:
    pictures = [Image.new("RGB", (50, 50), "red")] * 5 + noise("uniform", 96, 5) + probes()[:1]
    with pytest.raises(ImageError, match=r"10 of 11 images .* no pictures \(5 of one colour, 5 of noise\)"):
        survey_of(pictures).check()


def test_one_constant_image_is_named_in_the_singular() -> None:
    with pytest.raises(ImageError, match="The only image in the set is of one colour"):
        survey_of([Image.new("RGB", (50, 50))]).check()


def test_some_constant_images_are_only_warned_about() -> None:
    survey = survey_of([*probes(), Image.new("RGB", (50, 50)), Image.new("RGB", (50, 50), "white")])
    survey.check()
    assert survey.constant == 2
    assert "2 of 10 images are of one colour (p8, p9)." in " ".join(survey.warnings())


def test_pictures_scaled_to_one_before_saving_are_told_so() -> None:
    scaled = [picture_of(np.asarray(picture) / 255) for picture in probes()]
    with pytest.raises(ImageError, match=r"one colour.*scaled to 0\.\.1 or normalized"):
        survey_of(scaled, 224).check()
    normalized = [picture_of((np.asarray(p) / 255 - 0.45) / 0.225) for p in probes()]
    assert "almost black" in " ".join(survey_of(normalized, 224).warnings())


# Warnings


def photographs(count: int) -> Pictures:
    """Different crops of the built-in photographs."""
    rng = np.random.default_rng(0)
    crops = []
    for i in range(count):
        picture = probes_once()[i % 8]
        side = min(picture.size) * 3 // 4
        left, top = (int(rng.integers(0, extent - side + 1)) for extent in picture.size)
        crops.append(picture.crop((left, top, left + side, top + side)))
    return crops


@functools.cache
def probes_once() -> Pictures:
    return probes()


def test_good_set_has_no_warning() -> None:
    survey = survey_of(photographs(64))
    survey.check()
    assert survey.warnings() == ()


@pytest.mark.parametrize(("count", "words"), [(1, "Only 1 image to"), (63, "Only 63 images to")])
def test_few_images_are_warned_about(count: int, words: str) -> None:
    (warning,) = (w for w in survey_of(photographs(count), 32).warnings() if "Only" in w)
    assert words in warning
    assert "64 or more" in warning


def test_repeated_images_are_counted_and_named() -> None:
    pictures = photographs(64)
    survey = survey_of([*pictures, pictures[3], pictures[3], pictures[5]])
    assert survey.duplicates == 3
    assert survey.images == 67
    assert len(survey.digests) == 64
    assert survey.warnings() == (
        "3 of 67 images are repetitions of others (p64, p65, p66). Leave them out: they add nothing.",
    )


def test_grey_images_are_warned_about_where_the_model_knows_colour() -> None:
    grey = [picture.convert("L") for picture in photographs(64)]
    survey = survey_of([picture.convert("RGB") for picture in grey])
    assert survey.grey == 64
    assert "All images are grey." in " ".join(survey.warnings())
    same_for_all = Preprocessing(96, 109, mean=(0.4, 0.4, 0.4), std=(0.25, 0.25, 0.25))
    assert dataclasses.replace(survey, preprocessing=same_for_all).warnings() == ()


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_a_good_set_of_other_channels_and_shapes_has_no_warning(channels: int) -> None:
    transform = Preprocessing.for_size((96, 128), *channel_statistics(channels))
    images = [grey_channels(photo, channels) for photo in photographs(64)]
    entries = [ImageEntry(f"{i}", partial(np.asarray, image)) for i, image in enumerate(images)]
    source = ImageSource("arrays", lambda _: iter(entries), count=64)
    collector = CalibrationSetCollector(source, transform)
    for batch in batches(source, transform, 7):
        collector.see(batch)
    survey = collector.summary()
    survey.check()
    assert (survey.warnings(), len(survey.channel_mean)) == ((), channels)


def test_exchanged_channels_are_warned_about() -> None:
    swapped = [picture_of(np.asarray(picture)[..., ::-1]) for picture in photographs(64)]
    (warning,) = survey_of(swapped).warnings()
    assert "Red and blue look exchanged" in warning
    assert "not BGR" in warning


@pytest.mark.parametrize(("gain", "offset"), [(0.3, 0), (0.25, 95), (0.5, 127)])
def test_pixels_far_from_the_normalization_are_warned_about(gain: float, offset: float) -> None:
    pictures = [picture_of(np.asarray(picture) * gain + offset) for picture in photographs(64)]
    (warning,) = survey_of(pictures).warnings()
    assert "far from the normalization's 124/116/104 and 58/57/57" in warning


def write_folders(root: Path, counts: dict[str, int]) -> ImageSource:
    pictures = iter(photographs(sum(counts.values())))
    for name, count in counts.items():
        (root / name).mkdir()
        for i in range(count):
            next(pictures).resize((64, 64)).save(root / name / f"{i}.png")
    return open_images(root)


def test_classes_are_counted_by_folder(tmp_path: Path) -> None:
    survey = survey_of(write_folders(tmp_path, {"cat": 22, "dog": 20, "eel": 22}), 32)
    assert survey.class_counts == {"cat": 22, "dog": 20, "eel": 22}
    assert survey.classes_covered == 3
    assert not any("class" in warning for warning in survey.warnings())


def test_classes_without_an_image_are_named(tmp_path: Path) -> None:
    survey = survey_of(write_folders(tmp_path, {"cat": 30, "dog": 0, "eel": 34}), 32)
    assert survey.class_counts["dog"] == 0
    assert survey.classes_covered == 2
    assert any("2 of 3 classes have images (without: dog)." in warning for warning in survey.warnings())


def test_far_more_classes_than_images_is_no_fault() -> None:
    counts = {str(i): int(i < 64) for i in range(1000)}
    many = dataclasses.replace(survey_of(photographs(64), 32), class_counts=counts)
    assert not any("class" in warning for warning in many.warnings())
    one = dataclasses.replace(many, class_counts={str(i): 64 * (i == 0) for i in range(1000)})
    assert any("1 of 1000 classes have images" in warning for warning in one.warnings())


def test_very_uneven_classes_are_warned_about(tmp_path: Path) -> None:
    survey = survey_of(write_folders(tmp_path, {"cat": 60, "dog": 2, "eel": 2}), 32)
    assert any("60 of 64 images are of 'cat'" in warning for warning in survey.warnings())


def test_pictures_beside_folders_name_no_class(tmp_path: Path) -> None:
    write_folders(tmp_path, {"cat": 1, "dog": 1})
    probes()[0].save(tmp_path / "other.png")
    survey = survey_of(open_images(tmp_path), 32)
    assert survey.class_counts == {}
    assert survey.classes_covered == 0


# What is reported


def test_statistics_are_exact() -> None:
    pictures = photographs(20)
    survey = survey_of(pictures)
    (batch,) = batches(source_of(pictures), Preprocessing.for_size(96), 20)
    for channel in range(3):
        values = [int(v) for v in batch.pixels[..., channel].ravel()]
        assert survey.channel_mean[channel] == sum(values) / len(values)
        assert survey.channel_std[channel] == pytest.approx(statistics.pstdev(values), rel=1e-14)


def test_hash_is_the_content_hash_with_repetitions() -> None:
    pictures = [*photographs(5), photographs(5)[0]]
    prepared = batches(source_of(pictures), Preprocessing.for_size(96), 4)
    assert survey_of(pictures).content_sha256 == content_hash(batch.pixels for batch in prepared)


def test_batching_does_not_matter() -> None:
    pictures = photographs(13) + noise("uniform", 96, 4) + [Image.new("RGB", (9, 9))] * 2
    surveys = [survey_of(pictures, batch_size=n) for n in (1, 3, 8)]
    assert surveys[0].noise == 4
    assert surveys[0] == surveys[1] == surveys[2]


def test_unreadable_pictures_are_carried_along(tmp_path: Path) -> None:
    probes()[0].save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    survey = survey_of(open_images(tmp_path), 32)
    assert [skipped.name for skipped in survey.skipped] == ["b.png"]
    assert survey.images == 1


def test_report_is_plain_json(tmp_path: Path) -> None:
    survey = survey_of(write_folders(tmp_path, {"cat": 2, "dog": 0}), 32)
    report = survey.to_dict()
    assert json.loads(json.dumps(report)) == report
    assert report["images"] == 2
    assert (report["classes"], report["classes_covered"], report["class_counts"]) == (2, 1, {"cat": 2})
    assert "digests" not in report


def test_memory_does_not_grow_with_the_set() -> None:
    preprocessing = Preprocessing.for_size(96)
    taker = CalibrationSetCollector(source_of([]), preprocessing)
    rng = np.random.default_rng(0)
    tracemalloc.start()
    try:
        taker.see(random_batch(rng))
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(20):
            taker.see(random_batch(rng))
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 200 * 512  # bytes for each image: a digest and its place in a dictionary, no 27,648 of pixels


def random_batch(rng: np.random.Generator) -> ImageBatch:
    return ImageBatch(tuple("0123456789"), rng.integers(0, 256, (10, 96, 96, 3), np.uint8), None)


def test_misuse_is_an_error_of_the_caller() -> None:
    taker = CalibrationSetCollector(source_of([]), Preprocessing.for_size(32))
    with pytest.raises(ValueError, match="no image"):
        taker.summary()
    with pytest.raises(ValueError, match=r"\(n, 32, 32, 3\)"):
        taker.see(random_batch(np.random.default_rng(0)))


# Overlap


def prepared(pictures: Pictures, batch_size: int = 3) -> list[npt.NDArray[np.uint8]]:
    return [batch.pixels for batch in batches(source_of(pictures), Preprocessing.for_size(96), batch_size)]


def reloaded(picture: Image.Image) -> Image.Image:
    """The same content from another file."""
    file = io.BytesIO()
    picture.save(file, "BMP")
    return Image.open(file).convert("RGB")


def test_images_in_both_sets_are_refused_by_content() -> None:
    calibration, others = photographs(12)[:8], photographs(12)[8:]
    pictures = [others[0], reloaded(calibration[2]), *others[1:], reloaded(calibration[0])]
    names = [f"v{i}" for i in range(len(pictures))]
    with pytest.raises(UsageError, match=r"^2 of 6 validation images are calibration images too \(v1, v5\)") as caught:
        check_overlap(survey_of(calibration).digests, prepared(pictures), names, allow=False, what="validation images")
    assert "--allow-overlap" in caught.value.hint
    assert caught.value.exit_code == 2


def test_three_shared_images_are_named_and_the_rest_counted() -> None:
    names = iter("abcdefgh")
    with pytest.raises(UsageError, match=r"8 of 8 held-out images .*\(a, b, c and 5 more\)"):
        check_overlap(survey_of(probes()).digests, prepared(probes()), names, allow=False, what="held-out images")


def test_allowed_overlap_is_a_warning() -> None:
    pixels = prepared(probes()[:1])
    (warning,) = check_overlap(survey_of(probes()).digests, pixels, ["a"], allow=True, what="validation images")
    assert warning.startswith("1 of 1 validation images is a calibration image too (a)")


@pytest.mark.parametrize("allow", [False, True])
def test_sets_apart_are_silent(allow: bool) -> None:
    survey = survey_of(photographs(12)[:8])
    assert check_overlap(survey.digests, prepared(photographs(12)[8:]), "abcd", allow=allow, what="images") == ()


def test_every_image_needs_its_name() -> None:
    with pytest.raises(ValueError, match="fewer names"):
        check_overlap(survey_of(probes()).digests, prepared(probes()), "abc", allow=True, what="images")
