"""Sources of images, which are decoded one by one, and the built-in photographs.

Images that cannot be decoded are skipped and recorded in `ImageSource.skipped`. A source without a readable image is an
error.

The built-in photographs (`probe_source`) are used when a user gives no images: eight public-domain or CC0 pictures,
with source and licence of each in `probes/README.md`. They are enough to compare two forms of one model, not to measure
accuracy; reports say when they were used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib import resources
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from spach_deploy.common.batches import chunked
from spach_deploy.common.errors import ImageError, UsageError, printable
from spach_deploy.data import preprocess
from spach_deploy.options.specs import Preprocessing

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
"""Pillow's decoders that are used. Of its others, EPS would start a program on the file's text."""

_NAMED = 3  # unreadable files that an error message spells out


@dataclasses.dataclass(frozen=True)
class ImageItem:
    """One decoded image: its name in the source, its pixels, and a class index where the source has labels."""

    name: str
    image: preprocess.Decoded
    label: int | None = None


@dataclasses.dataclass(frozen=True)
class Skipped:
    """An image that was skipped, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{printable(self.name)}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class ImageBatch:
    """`names` (n), `pixels` (n, H, W, C) after resize and crop, `labels` int64 (n) or None."""

    names: tuple[str, ...]
    pixels: preprocess.Pixels
    labels: npt.NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.names)


@dataclasses.dataclass(frozen=True)
class ImageEntry:
    """One image that is not decoded yet. `load` decodes it, and raises ImageError when it cannot.

    `name` is escaped, as a terminal may show it; `file` is the same as it is in the folder or tar.
    """

    name: str
    load: Callable[[], preprocess.Decoded]
    label: int | None = None
    file: str | None = None


Entries = Callable[[int | None], Iterator[ImageEntry]]
"""Function from a limit (or None) to a new iterator of entries.

Those chosen for the limit come first; more may follow, for images that turn out unreadable.
"""


class ImageSource:
    """A set of images. Iterating decodes them one by one, as `ImageItem`s, as often as wanted.

    `description`: the set in words. `count`: how many images there are at most, None where only reading all would show
    it. `classes`: names of the folders that labels index, empty without labels.
    """

    def __init__(
        self, description: str, entries: Entries, *, count: int | None = None, classes: tuple[str, ...] = ()
    ) -> None:
        self.description = description
        self.classes = classes
        self._entries = entries
        self._all = count
        self._limit: int | None = None
        self._skipped: list[Skipped] = []

    def __repr__(self) -> str:
        return f"ImageSource({self.description!r}, count={self.count})"

    @property
    def count(self) -> int | None:
        """Number of images at most; None where only reading all would show it."""
        return self._all if self._all is None or self._limit is None else min(self._all, self._limit)

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Images that the latest iteration has skipped so far."""
        return tuple(self._skipped)

    def entries(self) -> Iterator[ImageEntry]:
        """All entries in order, readable or not, whatever the limit."""
        return self._entries(None)

    def candidates(self) -> Iterator[ImageEntry]:
        """The entries that are tried for the limit, in order, readable or not; those after the limit are spares."""
        return self._entries(self._limit)

    def of_all(self, used: int) -> str:
        """Words after the number of `used` images: ` of 300, spread evenly`; empty where all were used."""
        if self._all is None or used >= self._all:
            return ""
        is_spread = self._limit is not None and self._limit < self._all
        return f" of {self._all}{', spread evenly' if is_spread else ''}"

    def limit(self, n: int) -> ImageSource:
        """At most `n` readable images.

        Folders and npz files spread the choice evenly over the whole, so that a folder sorted by class gives
        many classes; a tar, read in one pass, gives its first `n`. Raises UsageError when n < 1.
        """
        if n < 1:
            raise UsageError(f"A limit of {n} images leaves nothing.", "Give 1 or more.")
        limited = ImageSource(self.description, self._entries, count=self._all, classes=self.classes)
        limited._limit = n if self._limit is None else min(n, self._limit)
        return limited

    def __iter__(self) -> Iterator[ImageItem]:
        """Decode one image at a time. Raises ImageError at the end when none was readable."""
        self._skipped = []
        nothing = True
        for item in itertools.islice(self._readable(), self._limit):
            nothing = False
            yield item
        if nothing:
            raise ImageError(_nothing_readable(self.description, self._skipped), "Give JPEG or PNG photographs.")

    def _readable(self) -> Iterator[ImageItem]:
        for entry in self.candidates():
            try:
                image = entry.load()
            except ImageError as error:
                self._skipped.append(Skipped(entry.name, error.message))
                continue
            yield ImageItem(entry.name, image, entry.label)


def decode(file: IO[bytes]) -> Image.Image:
    """Decode the picture in `file` as RGB. Raises ImageError, whatever is wrong with it.

    The size is checked from the header, before memory is taken for the pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata and palettes; `check_size` checks the size
            with Image.open(file, formats=FORMATS) as image:
                return loaded(image)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"The picture has more pixels than the {preprocess.MAX_PIXELS:,} allowed.") from error
    except UnidentifiedImageError as error:
        raise ImageError("It is not a picture in a known format.") from error
    except Exception as error:  # decoders may raise any exception for damaged bytes
        raise _undecodable(error) from error


def loaded(image: Image.Image) -> Image.Image:
    """`image` as RGB with its pixels in memory. Raises ImageError, whatever is wrong with it, as where it is closed."""
    try:
        preprocess.check_size(*image.size)
        image.load()
        return preprocess.to_rgb(image)
    except ImageError:
        raise
    except Exception as error:  # decoders may raise any exception for damaged bytes
        raise _undecodable(error) from error


def _undecodable(error: Exception) -> ImageError:
    return ImageError(f"It cannot be decoded ({printable(str(error)) or type(error).__name__}).")


def batches(source: ImageSource, preprocessing: Preprocessing, batch_size: int) -> Iterator[ImageBatch]:
    """Resized and cropped images of `source` in batches of `batch_size`; the last may be smaller.

    Holds one batch in memory. Raises ImageError when nothing is readable, UsageError when batch_size < 1.
    """
    if batch_size < 1:
        raise UsageError(f"A batch of {batch_size} images is not possible.", "Give 1 or more.")
    prepared = (_prepare(item, preprocessing) for item in source)
    return map(_stack, chunked(prepared, batch_size))


def content_hash(pixels: Iterable[preprocess.Pixels]) -> str:
    """SHA-256 (hex) of a set of decoded images, given as arrays (n, H, W, C), such as batches.

    Each image is hashed with its shape, and the sorted digests are hashed again. So names, order and batch size do not
    matter; a repeated image does.
    """
    digests = sorted(image_digest(image) for array in pixels for image in array)
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _prepare(item: ImageItem, preprocessing: Preprocessing) -> tuple[str, preprocess.Pixels, int | None]:
    try:
        return item.name, preprocess.pixels(item.image, preprocessing), item.label
    except ImageError as error:  # it could be read, and is none for this model: so are all others
        raise ImageError(f"{item.name} does not fit. {error.message}", error.hint) from error


def _stack(chunk: Sequence[tuple[str, preprocess.Pixels, int | None]]) -> ImageBatch:
    names, arrays, labels = zip(*chunk, strict=True)
    known = None if None in labels else np.array(labels, np.int64)
    return ImageBatch(names, np.stack(arrays), known)


def image_digest(image: preprocess.Pixels) -> bytes:
    """SHA-256 of a decoded image (H, W, C), and its shape."""
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(np.ascontiguousarray(image).tobytes())
    return digest.digest()


def _nothing_readable(description: str, skipped: list[Skipped]) -> str:
    if not skipped:
        return f"There is no image in {description}."
    shown = "; ".join(str(s).rstrip(".") for s in skipped[:_NAMED])
    more = f"; and {len(skipped) - _NAMED} more" if len(skipped) > _NAMED else ""
    subject, cannot = ("The image", "cannot") if len(skipped) == 1 else (f"None of the {len(skipped)} images", "can")
    return f"{subject} in {description} {cannot} be used ({shown}{more})."


def probe_source(channels: int = 3) -> ImageSource:
    """The built-in photographs, sorted by name, without labels. Raises ImageError when they are missing.

    They are RGB pictures. For models that take neither these nor grey ones, each is `grey_channels` of its picture.
    """
    folder = resources.files("spach_deploy.data") / "probes"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".jpg")), key=lambda f: f.name)
    if not files:
        raise ImageError("The built-in photographs are missing from this installation.", "Reinstall spach-deploy.")
    entries = [ImageEntry(file.name, partial(_load, file.read_bytes, channels)) for file in files]

    def choose(_: int | None) -> Iterator[ImageEntry]:
        return iter(entries)

    made = "" if channels in (1, 3) else f", in grey, {channels} times, each {SHIFT} pixels right of the one before"
    return ImageSource(f"the {len(entries)} built-in photographs{made}", choose, count=len(entries))


SHIFT = 8
"""Pixels from one channel to the next of a photograph that is made into other channels than red, green and blue."""


def grey_channels(picture: Image.Image, channels: int) -> preprocess.UInt8Array:
    """A picture in grey -> uint8 (H, W, C): channel c is moved to the right by c * `SHIFT` pixels, around the edge.

    No two channels are equal, so that an exchange of channels shows.
    """
    grey = np.asarray(picture.convert("L"))
    return np.stack([np.roll(grey, channel * SHIFT, axis=1) for channel in range(channels)], axis=-1)


def _load(read: Callable[[], bytes], channels: int) -> preprocess.Decoded:
    picture = decode(io.BytesIO(read()))
    return picture if channels in (1, 3) else grey_channels(picture, channels)


def check_unreadable(entry: ImageEntry, problem: Skipped) -> None:
    """UsageError for an image that a worker could not read and this process can: the worker lacks the file."""
    try:
        entry.load()
    except ImageError:
        return
    raise UsageError(
        f"A node cannot read {entry.name}, which this machine can ({problem.reason.rstrip('.')}).",
        "Put the images where every node finds them under the same path, or into a tar or npz.",
    )
