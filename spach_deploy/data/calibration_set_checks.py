"""Check a calibration set while its batches are read: what it contains, whether it is fit, whether it overlaps another.

    collector = CalibrationSetCollector(source, preprocessing)
    for batch in batches(source, preprocessing, 8):
        collector.see(batch)
        ...
    summary = collector.summary()
    summary.check()          # raises for a set that can only mislead
    summary.warnings()       # sentences for the user

Memory holds one digest for each image, and no pixels. The result does not depend on the batch size.

How noise is told from photographs. Independent pixels have a flat spectrum: neither neighbouring pixels nor
neighbouring blocks correlate. But the check sees only resized images, and interpolation correlates neighbours: noise of
half the model's size has a lag-1 autocorrelation of 0.75, while grass and gravel have 0.65 and 0.74. So several scales
are compared. Let r(k) be the lag-1 autocorrelation, the mean over both axes, of the image averaged over k x k blocks.
Correlation from interpolation ends after a few pixels, so for noise r(2k) is about 0.64 r(k)^2 at every scale (measured
for white noise through the evaluation transform, from 0.5 to 4 times the model's size), while photographs keep more as
blocks grow. The *excess* is the sum over k = 1, 2, 4 of (r(2k) - 0.64 r(k)^2) / k; the division by k gives each scale
the same sampling error. At 224 pixels, lowest to highest:

    kind                                              r(1)          r(2)          r(4)          excess
    noise of the model's size, 2x and 4x              -0.01..0.28   -0.01..0.08   -0.03..0.07   -0.03..0.06
    noise of 0.5x and 0.75x                           0.48..0.76    0.12..0.38    0.01..0.12    -0.05..0.05
    the limit for one image                           0.80                                      0.077
    gravel                                            0.74          0.49          0.24          0.20
    brick                                             0.82          0.60          0.38          0.24
    grass                                             0.65          0.45          0.31          0.30
    hubble deep field                                 0.78          0.63          0.45          0.35
    other photographs, drawings, text, digits         over 0.80, or excess over 0.48
    photographs as JPEG of quality 5                  0.66..1.00    0.45..0.99    0.23..0.98    0.19 and more
    photographs under noise of sigma 100              0.28..0.96    0.34..0.96    0.37..0.98    0.43 and more

Noise was uniform, normal (sigma 2 to 255), salt and pepper, grey or coloured. The channels are added up first, because
JPEG halves the resolution of colours. Noise of less than half the model's size is not recognized.

Two kinds of images can look like noise: a few bright dots on black, such as stars, which skewness shows; and fine
textures on few pixels. So single images are only reported, with a limit that narrows as their number grows. A set is
refused only if nearly all of it is noise and, below 96 pixels, if also the mean brightness of its images varies as
little as that of independent pixels.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from spach_deploy.common.errors import ImageError, UsageError
from spach_deploy.data.images import ImageBatch, ImageSource, Skipped, image_digest
from spach_deploy.data.preprocess import Pixels
from spach_deploy.options.specs import Preprocessing, sides

ENOUGH_IMAGES = 64
"""A set with fewer images gets a warning."""

UNUSABLE_SHARE = 0.85
"""A set is refused when at least this share of its images is of one colour or noise."""

MAX_LAG1 = 0.8
"""Largest lag-1 autocorrelation of noise of half the model's size or more."""

MAX_SKEWNESS = 3.0
"""Skewness above which an image is a few bright dots on dark; symmetric noise has 0, exponential noise 2."""

CERTAIN_SIZE = 96
"""Image size in pixels from which no set of photographed textures was taken for noise."""

MAX_SPREAD = 64.0
"""Largest variance of the noise images' mean brightness, over that of independent pixels.

Noise has 1, or about 8 after upscaling by 2.
"""

_SCALED = "If they were scaled to 0..1 or normalized before they were saved, save them as 0..255."
_NAMED = 3  # images that a sentence names at most
_BLOCKS = (1, 2, 4)  # k: r(2k) is compared with r(k)
_MIN_GRID = 8  # blocks along a side from which an autocorrelation is taken
_Array = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class CalibrationSetSummary:
    """Contents of a set of images, resized and cropped.

    `channel_mean`, `channel_std`: of the pixels (0..255) by channel, exact over the set. `class_counts`: number of
    images by folder, 0 for empty folders; empty where folders are no classes. `content_sha256`: `images.content_hash`
    of the pixels. `digests`: SHA-256 of each distinct image. `constant`, `noise`, `duplicates`, `grey`: numbers of
    images; `examples` names up to three of each kind. `noise_spread`: variance of the noise images' mean brightness,
    over that of independent pixels; 0 below two images.
    """

    description: str
    images: int
    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]
    class_counts: Mapping[str, int]
    content_sha256: str
    digests: frozenset[bytes]
    constant: int = 0
    noise: int = 0
    duplicates: int = 0
    skipped: tuple[Skipped, ...] = ()
    grey: int = 0
    noise_spread: float = 0.0
    examples: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    preprocessing: Preprocessing = dataclasses.field(default_factory=Preprocessing)

    @property
    def classes_covered(self) -> int:
        """How many of the classes in `class_counts` have an image."""
        return sum(count > 0 for count in self.class_counts.values())

    def check(self) -> None:
        """ImageError for a set on which no scales should be set: nearly all its images are constant or noise."""
        noise = self.noise if self._noise_is_certain() else 0
        unusable = self.constant + noise
        if unusable < UNUSABLE_SHARE * self.images:
            return
        how_many = f"All {self.images}" if unusable == self.images else f"{unusable} of {self.images}"
        if self.images == 1:
            how_many = "The only"
        raise ImageError(
            f"{how_many} image{_s(self.images)} in {self.description} {_kinds(self.constant, noise)}: "
            "ranges taken from them would fit no real picture.",
            _SCALED if self._is_black() else "Give photographs such as the model will see.",
        )

    def warnings(self) -> tuple[str, ...]:
        """Sentences on what may make a calibration worse, each with advice; none for a good set."""
        found = (
            self._few(),
            self._part("constant", "of one colour", "Leave them out."),
            self._part("noise", "much like noise", "Look at them; replace what is no picture."),
            self._part("duplicates", "repetitions of others", "Leave them out: they add nothing."),
            self._uncovered(),
            self._uneven(),
            self._colours(),
            self._grey(),
        )
        return tuple(sentence for sentence in found if sentence)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without digests; classes without an image are only counted."""
        return {
            "description": self.description,
            "images": self.images,
            "content_sha256": self.content_sha256,
            "channel_mean": list(self.channel_mean),
            "channel_std": list(self.channel_std),
            "classes": len(self.class_counts),
            "classes_covered": self.classes_covered,
            "class_counts": {name: count for name, count in self.class_counts.items() if count},
            "constant": self.constant,
            "noise": self.noise,
            "duplicates": self.duplicates,
            "grey": self.grey,
            "skipped": [dataclasses.asdict(skipped) for skipped in self.skipped],
        }

    def _noise_is_certain(self) -> bool:
        if min(sides(self.preprocessing.image_size)) >= CERTAIN_SIZE:
            return True
        return self.noise > 1 and self.noise_spread <= MAX_SPREAD

    def _is_black(self) -> bool:
        return max(self.channel_mean) < 5 and max(self.channel_std) < 5

    def _few(self) -> str:
        if self.images >= ENOUGH_IMAGES:
            return ""
        return f"Only {self.images} image{_s(self.images)} to calibrate with: give {ENOUGH_IMAGES} or more."

    def _part(self, kind: str, what: str, advice: str) -> str:
        count: int = getattr(self, kind)
        if not count:
            return ""
        named = _named(self.examples.get(kind, ()), count)
        return f"{count} of {self.images} images {'is' if count == 1 else 'are'} {what}{named}. {advice}"

    def _uncovered(self) -> str:
        """A warning if fewer classes have images than so many images would cover; else empty."""
        missing = [name for name, count in self.class_counts.items() if not count]
        possible = min(self.images, len(self.class_counts))
        expected = possible if self.images >= 2 * len(self.class_counts) else possible / 2
        if self.classes_covered >= expected:
            return ""
        return (
            f"{self.classes_covered} of {len(self.class_counts)} classes have images"
            f"{_named(missing[:_NAMED], len(missing), 'without: ')}. Take images of every class."
        )

    def _uneven(self) -> str:
        """A warning if few classes have most images; else empty.

        The measure is the inverse Simpson index: how many classes of equal size would be as diverse.
        """
        counts = [count for count in self.class_counts.values() if count]
        if not counts or sum(counts) ** 2 / sum(count**2 for count in counts) >= 0.6 * len(counts):
            return ""
        largest = max(self.class_counts, key=self.class_counts.__getitem__)
        return (
            f"The classes are very uneven: {self.class_counts[largest]} of {self.images} images are of {largest!r}. "
            "Take about as many of each."
        )

    def _colours(self) -> str:
        """A warning if the channels' mean and std are far from those of the model's normalization; else empty."""
        if self.preprocessing.takes_normalized:
            return ""
        mean, std = np.array(self.channel_mean), np.array(self.channel_std)
        expected_mean, expected_std = (255 * np.array(v) for v in (self.preprocessing.mean, self.preprocessing.std))
        if self._is_black():
            return f"The images are almost black (mean {_rgb(mean)} of 255). {_SCALED}"
        if self.images >= 16 and len(mean) == 3 and _is_swapped(mean, expected_mean):
            return (
                f"Red and blue look exchanged (mean {_rgb(mean)}; RGB pictures have about {_rgb(expected_mean)}). "
                "Save them as RGB, not BGR; nothing to do if they are this blue."
            )
        ratio = std / expected_std
        if (np.abs(mean - expected_mean) > 0.75 * expected_std).any() or ratio.min() < 0.5 or ratio.max() > 1.6:
            return (
                f"The pixels have mean {_rgb(mean)} and standard deviation {_rgb(std)}, far from the "
                f"normalization's {_rgb(expected_mean)} and {_rgb(expected_std)}. "
                "Take images such as the model was trained on."
            )
        return ""

    def _grey(self) -> str:
        if len(set(self.preprocessing.mean)) == 1 or self.grey < UNUSABLE_SHARE * self.images:
            return ""
        how_many = "All" if self.grey == self.images else f"{self.grey} of {self.images}"
        return f"{how_many} images are grey. If the model will see colours, calibrate with coloured images."


@dataclasses.dataclass(frozen=True)
class ImageSummary:
    """Facts of one image: exact sums over its pixels, and `noise` if it looks like noise, else None.

    Any process can make them (`observe`); `CalibrationSetCollector.take` needs them in the images' order.
    """

    name: str
    label: int | None
    digest: bytes
    pixels: int
    sums: tuple[int, ...]
    squares: tuple[int, ...]
    is_grey: bool
    is_constant: bool
    noise: NoiseSummary | None


def observe(name: str, image: Pixels, label: int | None = None) -> ImageSummary:
    """Facts of one image (H, W, C), resized and cropped. Floats are looked at as levels of 255."""
    moments = _moments(image if image.dtype == np.uint8 else np.rint(np.clip(image, 0, 1) * 255))
    correlations = None if moments.is_constant else _noise_correlations(moments.brightness)
    return ImageSummary(
        name=name,
        label=label,
        digest=image_digest(image),
        pixels=moments.pixels,
        sums=moments.sums,
        squares=moments.squares,
        is_grey=moments.is_grey,
        is_constant=moments.is_constant,
        noise=None if correlations is None else NoiseSummary.of(moments.brightness, correlations),
    )


class CalibrationSetCollector:
    """Collects a `CalibrationSetSummary` batch by batch.

    `source` gives the description, the class names and, at the end, the images that were skipped.
    """

    def __init__(self, source: ImageSource, preprocessing: Preprocessing) -> None:
        self._source = source
        self._preprocessing = preprocessing
        self._digests: collections.Counter[bytes] = collections.Counter()
        self._counts: collections.Counter[str] = collections.Counter()
        self._labels: collections.Counter[int] = collections.Counter()
        self._examples: dict[str, list[str]] = collections.defaultdict(list)
        self._pixels = 0  # of all images, per channel
        self._sums = [0] * preprocessing.channels  # Python integers: exact for any number of images
        self._squares = [0] * preprocessing.channels
        self._noise = _NoiseTally(math.sqrt(math.prod(sides(preprocessing.image_size))))

    def see(self, batch: ImageBatch) -> None:
        """Add a batch, whose pixels are (n, H, W, C). Raises ValueError for another dtype or shape."""
        _check_pixels(batch.pixels, self._preprocessing)
        labels = [None] * len(batch) if batch.labels is None else batch.labels.tolist()
        for name, image, label in zip(batch.names, batch.pixels, labels, strict=True):
            self.take(observe(name, image, label))

    def take(self, seen: ImageSummary) -> None:
        """Add the facts of the next image."""
        self._pixels += seen.pixels
        self._sums = [a + b for a, b in zip(self._sums, seen.sums, strict=True)]
        self._squares = [a + b for a, b in zip(self._squares, seen.squares, strict=True)]
        self._note("grey", seen.name, seen.is_grey)
        self._note("constant", seen.name, seen.is_constant)
        if seen.noise is not None:
            self._note("noise", seen.name)
            self._noise.add(seen.noise)
        self._note("duplicates", seen.name, seen.digest in self._digests)
        self._digests[seen.digest] += 1
        if seen.label is not None:
            self._labels[seen.label] += 1

    def summary(self, skipped: tuple[Skipped, ...] | None = None) -> CalibrationSetSummary:
        """The summary so far. `skipped` None: those of the source. Raises ValueError when no image was added."""
        if not self._pixels:
            raise ValueError("no image was seen")
        noise = self._counts["noise"] if self._noise.is_confirmed() else 0
        return CalibrationSetSummary(
            description=self._source.description,
            images=self._digests.total(),
            channel_mean=tuple(total / self._pixels for total in self._sums),
            channel_std=tuple(math.sqrt(v) / self._pixels for v in self._scatters()),
            class_counts={name: self._labels[i] for i, name in enumerate(self._source.classes)},
            content_sha256=hashlib.sha256(b"".join(sorted(self._digests.elements()))).hexdigest(),
            digests=frozenset(self._digests),
            constant=self._counts["constant"],
            noise=noise,
            duplicates=self._counts["duplicates"],
            skipped=self._source.skipped if skipped is None else skipped,
            grey=self._counts["grey"],
            noise_spread=self._noise.spread(),
            examples={kind: tuple(names) for kind, names in self._examples.items()},
            preprocessing=self._preprocessing,
        )

    def _scatters(self) -> list[int]:
        """Variance times squared number of pixels, per channel."""
        return [self._pixels * sq - total**2 for total, sq in zip(self._sums, self._squares, strict=True)]

    def _note(self, kind: str, name: str, applies: bool = True) -> None:
        if applies:
            self._counts[kind] += 1
            self._examples[kind] += [name] if len(self._examples[kind]) < _NAMED else []


def check_overlap(
    digests: frozenset[bytes], other_pixels: Iterable[Pixels], names: Iterable[str], *, allow: bool, what: str
) -> tuple[str, ...]:
    """Find images that are in a calibration set too, by their pixels after resize and crop.

    `digests`: those of the calibration images (`CalibrationSetSummary.digests`), or the first bytes of them, all of one
    length. `other_pixels`: (n, H, W, C) each, after the same transform. `names`: one for each image, read in step
    with the arrays. `what`: the images in words, such as "validation images". Raises UsageError if images are in both
    sets; with `allow` it returns one sentence instead, else nothing.
    """
    shared, total, remaining = [], 0, iter(names)
    length = len(next(iter(digests), b""))
    for pixels in other_pixels:
        for image in pixels:
            total, name = total + 1, next(remaining, None)
            if name is None:
                raise ValueError(f"fewer names than images: {total - 1}")
            if image_digest(image)[:length] in digests:
                shared.append(name)
    if not shared:
        return ()
    sentence = (
        f"{len(shared)} of {total} {what} {'is a' if len(shared) == 1 else 'are'} calibration "
        f"image{_s(len(shared))} too{_named(shared, len(shared))}: the result would look better than it is."
    )
    if not allow:
        raise UsageError(sentence, "Keep the two apart, or insist with --allow-overlap.")
    return (sentence,)


# One image


class _Moments(NamedTuple):
    """Exact sums over one image, per channel, and its brightness, the sum of its channels, float64 (H, W)."""

    pixels: int
    sums: tuple[int, ...]
    squares: tuple[int, ...]
    is_grey: bool
    brightness: _Array

    @property
    def is_constant(self) -> bool:
        """Whether no channel has a standard deviation of 1 or more (of 255): JPEG leaves less on one colour."""
        pairs = zip(self.sums, self.squares, strict=True)
        return all(self.pixels * square - total**2 < self.pixels**2 for total, square in pairs)


def _moments(image: npt.NDArray[Any]) -> _Moments:
    values = image.reshape(-1, image.shape[-1]).astype(np.float64)  # (H, W, C) -> (H * W, C); sums of squares are exact
    return _Moments(
        pixels=len(values),
        sums=tuple(int(v) for v in np.ones(len(values)) @ values),
        squares=tuple(int(v) for v in np.einsum("pc,pc->c", values, values)),
        is_grey=bool((image == image[..., :1]).all()),
        brightness=(values @ np.ones(values.shape[1])).reshape(image.shape[:2]),
    )


def _noise_correlations(brightness: _Array) -> list[float] | None:
    """The `_correlations` of an image's brightness (H, W) if it looks like noise, else None."""
    size = math.sqrt(brightness.size)  # the side of a square with as many pixels
    if min(brightness.shape) < 2 * _MIN_GRID or _lag1(brightness) > MAX_LAG1:  # true for most images
        return None
    correlations = _correlations(brightness)
    # Negative correlation is a pattern, not noise. The standard error of r(k) is about 0.7 k / size; take three.
    least = (-0.06 - 2.1 * k / size for k in (*_BLOCKS, 2 * _BLOCKS[-1]))
    if any(r < limit for r, limit in zip(correlations, least, strict=False)):
        return None
    if _excess(correlations) > _excess_limit(size, len(correlations)) or _skewness(brightness) > MAX_SKEWNESS:
        return None
    return correlations


def _excess_limit(size: float, scales: int, images: int = 1) -> float:
    """Largest excess of noise, averaged over `images` images: 0.045 and three standard errors."""
    return 0.045 + 4.2 * math.sqrt((scales - 1) / images) / size


def _excess(correlations: Sequence[float]) -> float:
    """The excess (see the module's docstring): by how much correlations at double scales exceed those of noise."""
    pairs = zip(_BLOCKS, correlations, correlations[1:], strict=False)
    return sum((wide - 0.64 * near * abs(near)) / k for k, near, wide in pairs)


def _correlations(brightness: _Array) -> list[float]:
    """r(1), r(2), r(4), r(8): lag-1 autocorrelations of block means, as far as there are 8 x 8 blocks."""
    found = []
    blocks = brightness
    for _ in (*_BLOCKS, 2 * _BLOCKS[-1]):
        if min(blocks.shape) < _MIN_GRID:
            break
        found.append(_lag1(blocks))
        blocks = _halved(blocks)
    return found


def _lag1(values: _Array) -> float:
    """Autocorrelation at distance 1, the mean over both axes; 1 for constant values."""
    centred = values - values.mean()
    variance = np.einsum("ij,ij", centred, centred) / values.size
    down = np.einsum("ij,ij", centred[1:], centred[:-1]) / centred[1:].size
    across = np.einsum("ij,ij", centred[:, 1:], centred[:, :-1]) / centred[:, 1:].size
    return float((down + across) / (2 * variance)) if variance > 0 else 1.0


def _halved(values: _Array) -> _Array:
    """Sums over 2 x 2 blocks; an odd last row or column is left out."""
    height, width = (extent // 2 * 2 for extent in values.shape)
    rows = values[0:height:2] + values[1:height:2]
    return np.asarray(rows[:, 0:width:2] + rows[:, 1:width:2])


def _skewness(values: _Array) -> float:
    centred = values - values.mean()
    square = centred * centred
    return float((square * centred).mean() / square.mean() ** 1.5)


class NoiseSummary(NamedTuple):
    """An image that looks like noise: its excess, over how many scales, and mean and variance of its brightness."""

    scales: int
    excess: float
    mean: float
    variance: float

    @classmethod
    def of(cls, brightness: _Array, correlations: list[float]) -> NoiseSummary:
        """The summary of an image's brightness, (H, W), and its `_correlations`."""
        return cls(len(correlations), _excess(correlations), float(brightness.mean()), float(brightness.var()))


class _NoiseTally:
    """Sums over all images that look like noise, to decide whether they are noise together."""

    def __init__(self, size: float) -> None:
        self._size = size
        self._count = self._scales = 0
        self._excess = 0.0
        self._mean = self._squares = self._variances = 0.0

    def add(self, noise: NoiseSummary) -> None:
        self._count += 1
        self._scales = noise.scales
        self._excess += noise.excess
        step = noise.mean - self._mean  # Welford's update of mean and sum of squares
        self._mean += step / self._count
        self._squares += step * (noise.mean - self._mean)
        self._variances += noise.variance

    def is_confirmed(self) -> bool:
        """Whether their mean excess is that of noise, which it is not for textures that passed one by one."""
        if not self._count:
            return False
        return self._excess / self._count <= _excess_limit(self._size, self._scales, self._count)

    def spread(self) -> float:
        """Variance of the images' mean brightness, over that of independent pixels (1); 0 below two images."""
        if self._count < 2:
            return 0.0
        return self._size**2 * (self._squares / (self._count - 1)) / (self._variances / self._count)


def _check_pixels(pixels: Pixels, preprocessing: Preprocessing) -> None:
    if pixels.shape[1:] != preprocessing.pixel_shape:
        wanted = ", ".join(map(str, preprocessing.pixel_shape))
        raise ValueError(f"pixels must be (n, {wanted}), not {pixels.dtype} {pixels.shape}")


def _is_swapped(mean: _Array, expected: _Array) -> bool:
    """Whether `mean` (RGB) fits `expected` read backwards, and clearly not forwards."""
    fits_backwards = np.abs(mean - expected[::-1]).max() < 25
    wanted, seen = expected[0] - expected[2], mean[0] - mean[2]
    return bool(fits_backwards and seen * np.sign(wanted) < -0.5 * abs(wanted))


# Wording of sentences


def _kinds(constant: int, noise: int) -> str:
    if not noise:
        return "are each of one colour" if constant > 1 else "is of one colour"
    if not constant:
        return "are noise, not pictures" if noise > 1 else "is noise, not a picture"
    return f"are no pictures ({constant} of one colour, {noise} of noise)"


def _named(names: Sequence[str], count: int, before: str = "") -> str:
    """` (a, b, c and 4 more)`, naming three at most."""
    shown = list(names[:_NAMED])
    if not shown:
        return ""
    more = f" and {count - len(shown)} more" if count > len(shown) else ""
    return f" ({before}{', '.join(shown)}{more})"


def _rgb(values: _Array) -> str:
    """`124/116/104`; of more than four channels, the least and the greatest."""
    return "/".join(f"{v:.0f}" for v in values) if len(values) <= 4 else f"{min(values):.0f} to {max(values):.0f}"


def _s(count: int) -> str:
    return "" if count == 1 else "s"
