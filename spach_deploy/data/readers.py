"""Read images from a folder, a tar, an npz or one file, as an `ImageSource`.

    source = open_images(Path("photos"))
    for batch in batches(source, Preprocessing(), 8): ...
    source.skipped      # images that could not be read, and why

Nothing is unpacked to disk, no link in an archive is followed, no pickle is loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import os
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from spach_deploy.common.batches import spread
from spach_deploy.common.errors import ImageError, UsageError, printable
from spach_deploy.data import preprocess
from spach_deploy.data.images import (
    ImageBatch,
    ImageEntry,
    ImageItem,
    ImageSource,
    Skipped,
    batches,
    content_hash,
    decode,
    loaded,
)
from spach_deploy.options.specs import MOST_CHANNELS

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "ImageBatch",
    "ImageItem",
    "ImageSource",
    "Skipped",
    "batches",
    "content_hash",
    "open_images",
    "open_pictures",
]

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
"""Endings of file names that are read as pictures in folders and tars, in lower or upper case; others are ignored."""

UNREAD_SUFFIXES = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf")
"""Endings of file names of pictures in formats that are not supported; such files are reported as skipped."""

_UNREAD_REASON = "Pictures of this format are not read; convert it to JPEG or PNG."

MAX_FILE_BYTES = 256 * 1024**2
"""Largest picture file that is read from an archive, in bytes; headers of archives may state any size."""

_MOST_NAME_BYTES = 1 << 16
_NAME_RECORDS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
"""Types of tar members that hold name and attributes of the next member."""

_MOST_LABELS = 100_000_000
_LARGE_BYTES, _MOST_EXPANSION = 1 << 30, 100
"""A member of an npz of more bytes than the first, and more times its compressed size than the second, is refused.

Photographs hardly compress; files that are made to fill memory do, a thousand times.
"""

Picture = str | os.PathLike[str] | Image.Image | preprocess.Pixels
Pictures = Picture | Sequence[Picture]

_WANTED = "Give a folder of JPEG or PNG photographs, a tar of them, an npz or one picture."
_TAKEN = "a path, a Pillow image, pixels (H, W, C) or (N, H, W, C), or a list of these"
_DTYPES = (np.uint8, np.float32, np.float64, np.float16)
_NAMED = 2  # files of other kinds that a folder's description names at most
_ZIP = b"PK"  # how every zip, and so every npz, begins
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00")  # gzip, bzip2, xz


def open_images(path: Path) -> ImageSource:
    """The images at `path`.

    - A folder, read recursively and sorted; hidden files are left out and links followed. When all its
      pictures lie in subfolders, each item's label is the index of its first folder in `ImageSource.classes`,
      as torchvision's `ImageFolder` counts: a model's class only where the folders are that model's classes.
    - A tar, also compressed, read in one pass, in the archive's order, without labels.
    - An npz with `images` (N, H, W, C) and perhaps integer `labels` (N), or with one array alone: uint8, or floats in
      0..1. C is the model's number of channels: 3 for RGB; 1 is grey, and taken by models of RGB too.
    - One picture.

    Raises ImageError when `path` is missing, cannot be read, or holds no picture.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _folder(path)
        if not path.exists():
            raise ImageError(f"There is no {path}.", _WANTED)
        if not path.is_file():
            raise ImageError(f"{path} is neither a folder nor a file.", _WANTED)
        return _file(path)
    except OSError as error:
        raise ImageError(f"{path} cannot be read ({error.strerror or error}).", _WANTED) from error


def open_pictures(given: Pictures) -> ImageSource:
    """The pictures in one or many of: a path, as `open_images` takes it; a Pillow image; pixels (H, W, C) or
    (N, H, W, C), uint8 or floats in 0..1.

    Pictures from a path are named by it, such as `photos/a.jpg`, those in memory by their place, such as `image 0`;
    names are not escaped. A file that is named as a picture is decoded when its turn comes, and skipped where it cannot
    be. Raises ImageError as `open_images` does, and for other arrays; UsageError for anything else.
    """
    items = [cast("Picture", item) for item in (given if isinstance(given, (list, tuple)) else [given])]
    if not items:
        raise ImageError("There is no image in an empty list.", _WANTED)
    sources = [_pictures(item, number) for number, item in enumerate(items)]
    counts = [source.count for source in sources]
    described = sources[0].description if len(sources) == 1 else f"the {len(sources)} inputs"

    def choose(_: int | None) -> Iterator[ImageEntry]:
        return itertools.chain.from_iterable(source.entries() for source in sources)

    return ImageSource(described, choose, count=None if None in counts else sum(filter(None, counts)))


def _pictures(item: Picture, number: int) -> ImageSource:
    if isinstance(item, np.ndarray):
        return _in_memory(_images_of(item), number)
    if isinstance(item, Image.Image):
        return _in_memory([item], number)
    if not isinstance(item, (str, os.PathLike)):
        raise UsageError(f"{type(item).__name__} is no picture.", f"Give {_TAKEN}.")
    if item == "":
        raise UsageError("The path is empty.", f"Give {_TAKEN}.")
    path = Path(item)
    if path.is_file() and _is_picture(path.name):
        entry = _folder_entry(path.parent, Path(path.name), None)
        source = ImageSource(f"picture {path}", lambda _: iter([entry]), count=1)
    else:
        source = open_images(path)
    is_file = path.is_file()

    def choose(_: int | None) -> Iterator[ImageEntry]:
        for entry in source.entries():
            name = entry.name if entry.file is None else entry.file
            is_all = is_file and name == path.name
            yield dataclasses.replace(entry, name=str(path) if is_all else f"{path}/{name}")

    return ImageSource(source.description, choose, count=source.count)


def _images_of(pixels: npt.NDArray[Any]) -> list[preprocess.Decoded]:
    if pixels.dtype not in _DTYPES or pixels.ndim not in (3, 4) or not pixels.size:
        raise ImageError(
            f"Pixels are uint8, or floats in 0..1, (H, W, C) or (N, H, W, C), not {pixels.dtype} {pixels.shape}.",
            "Give pictures as they are: they are resized, cropped and normalized here.",
        )
    return [_decoded(image) for image in (pixels if pixels.ndim == 4 else pixels[None])]


def _decoded(pixels: npt.NDArray[Any]) -> preprocess.Decoded:
    """Pixels (H, W, C) as they are, floats as float32; uint8 of one or three channels as an RGB picture."""
    if pixels.dtype != np.uint8:
        return pixels.astype(np.float32)
    if pixels.shape[-1] not in (1, 3):
        return pixels
    return preprocess.to_rgb(Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))


def _in_memory(images: list[preprocess.Decoded], first: int) -> ImageSource:
    entries = [ImageEntry(f"image {first + i}", partial(_held, image)) for i, image in enumerate(images)]
    return ImageSource("memory", lambda _: iter(entries), count=len(entries))


def _held(image: preprocess.Decoded) -> preprocess.Decoded:
    return loaded(image) if isinstance(image, Image.Image) else image


def _file(path: Path) -> ImageSource:
    if path.stat().st_size == 0:
        raise ImageError(f"{path} is empty.", _WANTED)
    with path.open("rb") as file:
        start = file.read(6)
    if start.startswith(_ZIP):
        return _npz(path)
    with _explained(path, "file"):
        is_tar = _is_tar(path)
    if start.startswith(_COMPRESSED) and not is_tar:
        raise ImageError(f"{path} is compressed, and not a tar that can be read.", _WANTED)
    return _tar(path) if is_tar else _single(path)


# One picture


def _single(path: Path) -> ImageSource:
    entry = ImageEntry(printable(path.name), partial(_load_file, path), file=path.name)
    try:
        entry.load()
    except ImageError as error:
        raise ImageError(f"{path} cannot be used. {error.message}", error.hint or _WANTED) from error
    return ImageSource(f"picture {path}", lambda _: iter([entry]), count=1)


def _load_file(path: Path) -> Image.Image:
    try:
        if not path.is_file():  # reading a pipe would block, and a dangling link has no file
            raise ImageError("It is not a regular file." if path.exists() else "The file is missing.")
        with path.open("rb") as file:
            return decode(file)
    except OSError as error:
        raise ImageError(f"It cannot be read ({error.strerror or error}).") from error


# A folder


def _folder(root: Path) -> ImageSource:
    files = sorted(_walk(root), key=lambda relative: relative.parts)
    pictures = [relative for relative in files if _is_picture(relative.name)]
    if not pictures:
        raise ImageError(
            f"Folder {root} holds no picture ({len(files)} other files).",
            f"Give a folder of files that end in {', '.join(SUFFIXES)}.",
        )
    classes = _classes(root, pictures)
    labels = {name: i for i, name in enumerate(classes)}
    entries = [_folder_entry(root, relative, labels.get(relative.parts[0])) for relative in pictures]
    taken = set(pictures)
    others = [printable(relative.as_posix()) for relative in files if relative not in taken]
    description = f"folder {root}" + (f" (beside {_listed(others)})" if others else "")

    def choose(limit: int | None) -> Iterator[ImageEntry]:
        return (entries[i] for i in _spread_first(len(entries), limit))

    return ImageSource(description, choose, count=len(entries), classes=classes)


def _folder_entry(root: Path, relative: Path, label: int | None) -> ImageEntry:
    name = relative.as_posix()
    if _is_unread(relative.name):
        return ImageEntry(printable(name), partial(_refuse, _UNREAD_REASON), label, name)
    return ImageEntry(printable(name), partial(_load_file, root / relative), label, name)


def _listed(names: list[str]) -> str:
    """`a.txt`, or `7 other files, such as a.txt and b.json`."""
    return names[0] if len(names) == 1 else f"{len(names)} other files, such as {' and '.join(names[:_NAMED])}"


def _walk(root: Path) -> Iterator[Path]:
    """Paths of all visible files below `root`, relative to it. Linked folders are entered, each only once."""
    seen = {os.path.realpath(root)}
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_raise):
        visible = sorted(s for s in subfolders if not s.startswith("."))
        subfolders[:] = [s for s in visible if _is_new(os.path.join(folder, s), seen)]
        yield from (Path(folder, name).relative_to(root) for name in names if not name.startswith("."))


def _is_new(folder: str, seen: set[str]) -> bool:
    real = os.path.realpath(folder)
    if real in seen:
        return False
    seen.add(real)
    return True


def _raise(error: OSError) -> None:
    raise ImageError(f"Folder {error.filename} cannot be read ({error.strerror}).", "Check its permissions.") from error


def _classes(root: Path, pictures: Iterable[Path]) -> tuple[str, ...]:
    if any(len(relative.parts) == 1 for relative in pictures):
        return ()  # there are pictures outside subfolders, so the folders are not classes
    # Empty folders count too, so that a class without pictures does not shift the others.
    return tuple(sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")))


def _is_picture(name: str) -> bool:
    return name.lower().endswith((*SUFFIXES, *UNREAD_SUFFIXES)) and not name.startswith(".")


def _is_unread(name: str) -> bool:
    return name.lower().endswith(UNREAD_SUFFIXES)


def _spread_first(total: int, limit: int | None) -> list[int]:
    """`limit` indices spread evenly over `total`, then the others as spares for images that turn out unreadable."""
    chosen = spread(total, limit)
    taken = set(chosen)
    return chosen + [i for i in range(total) if i not in taken]


# A tar


def _is_tar(path: Path) -> bool:
    try:
        with tarfile.open(path, "r:*", tarinfo=_TarInfo):
            return True
    except tarfile.TarError:
        return False


class _TarInfo(tarfile.TarInfo):
    """A tar member. Names in records of their own must have the length of names, because tarfile reads them whole."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Parse a header. ImageError for the record of a name that would fill the memory."""
        found = super().frombuf(buf, encoding, errors)
        if found.type in _NAME_RECORDS and found.size > _MOST_NAME_BYTES:
            raise ImageError(f"The tar has a name of {found.size:,} bytes.", "Make it again.")
        return found


def _tar(path: Path) -> ImageSource:
    if next(_tar_entries(path), None) is None:
        raise ImageError(f"Tar {path} holds no picture.", f"Its files must end in {', '.join(SUFFIXES)}.")
    return ImageSource(f"tar {path}", lambda _: _tar_entries(path))


def _tar_entries(path: Path) -> Iterator[ImageEntry]:
    """Pictures of a tar in its order, one file in memory at a time. Names are shown, never used as paths."""
    with _explained(path, "tar"), tarfile.open(path, "r:*", tarinfo=_TarInfo) as tar:
        while (member := tar.next()) is not None:
            if _is_picture(PurePosixPath(member.name).name) and not member.isdir():
                yield _tar_entry(tar, member)
            tar.members.clear()  # type: ignore[attr-defined]  # else tarfile keeps every member in memory
        _check_end(tar, path)


def _tar_entry(tar: tarfile.TarFile, member: tarfile.TarInfo) -> ImageEntry:
    name = printable(member.name)
    if _is_unread(member.name):
        return ImageEntry(name, partial(_refuse, _UNREAD_REASON))
    if not member.isreg():
        return ImageEntry(name, partial(_refuse, "It is a link or a device, and not followed in an archive."))
    if member.size > MAX_FILE_BYTES:
        return ImageEntry(
            name,
            partial(_refuse, f"The file has {member.size:,} bytes; {MAX_FILE_BYTES:,} are read at most."),
        )
    file = tar.extractfile(member)
    data = file.read() if file is not None else b""
    return ImageEntry(name, lambda: decode(io.BytesIO(data)), file=member.name)


def _refuse(reason: str) -> Image.Image:
    raise ImageError(reason)


def _check_end(tar: tarfile.TarFile, path: Path) -> None:
    """ImageError for a tar without the block of zeros at its end: tarfile also stops at a damaged header, silently."""
    assert tar.fileobj is not None  # open archives have one
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise ImageError(f"Tar {path} breaks off at byte {tar.offset:,} without an end mark.", "Copy it again.")


# An npz


class _Stored(NamedTuple):
    """An array in an npz: its member, shape and dtype, and the offset of its data in the member."""

    member: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    offset: int


def _npz(path: Path) -> ImageSource:
    with _explained(path, "npz"), zipfile.ZipFile(path) as archive:
        images = _images_header(archive, path)
        labels = _labels(archive, path, images)
    count = images.shape[0]

    def choose(limit: int | None) -> Iterator[ImageEntry]:
        return _npz_entries(path, images, labels, spread(count, limit))

    return ImageSource(f"npz {path}", choose, count=count)


def _npz_entries(
    path: Path, images: _Stored, labels: npt.NDArray[np.int64] | None, chosen: list[int]
) -> Iterator[ImageEntry]:
    """Read image by image from the compressed stream, so that a large array is never in memory."""
    shape = images.shape[1:]
    size = int(np.prod(shape)) * images.dtype.itemsize
    with (
        _explained(path, "npz"),
        zipfile.ZipFile(path) as archive,
        archive.open(images.member) as file,
    ):
        for i in chosen:
            file.seek(images.offset + i * size)
            image = np.frombuffer(_read_exactly(file, size), images.dtype).reshape(shape)
            label = None if labels is None else int(labels[i])
            yield ImageEntry(f"image {i}", partial(_decoded, image), label)


def _images_header(archive: zipfile.ZipFile, path: Path) -> _Stored:
    arrays = [name for name in archive.namelist() if name.endswith(".npy")]
    if "images.npy" in arrays:
        member = "images.npy"
    elif len(arrays) == 1:
        member = arrays[0]
    elif not arrays:
        raise ImageError(f"{path} is a zip file, not an npz.", "Unpack it and give the folder.")
    else:
        found = ", ".join(printable(a.removesuffix(".npy")) for a in arrays)
        raise ImageError(f"{path} holds {found}; which are the images?", "Name the array 'images'.")
    stored = _header(archive, member)
    _check_images(stored, path)
    return stored


def _check_images(stored: _Stored, path: Path) -> None:
    what = f"'{stored.member.removesuffix('.npy')}' in {path} is {stored.dtype} {stored.shape}"
    is_first = len(stored.shape) == 4 and stored.shape[1] in (1, 3) and stored.shape[3] > 4  # channels, not rows
    if stored.dtype not in _DTYPES or len(stored.shape) != 4 or is_first:
        raise ImageError(
            f"{what}; images must be uint8 (N, H, W, C), or floats in 0..1.", "Save RGB pixels 0..255 as uint8."
        )
    if not 1 <= stored.shape[3] <= MOST_CHANNELS:
        raise ImageError(f"{what}; not 1 to {MOST_CHANNELS} channels.", "Save channels last: (N, H, W, C).")
    if stored.shape[0] < 1:
        raise ImageError(f"{what}: no image.", _WANTED)
    preprocess.check_size(stored.shape[2], stored.shape[1])


def _labels(archive: zipfile.ZipFile, path: Path, images: _Stored) -> npt.NDArray[np.int64] | None:
    if "labels.npy" not in archive.namelist():
        return None
    stored = _header(archive, "labels.npy")
    if stored.dtype.kind not in "iu" or stored.shape != images.shape[:1]:
        raise ImageError(
            f"'labels' in {path} is {stored.dtype} {stored.shape}; it must be {images.shape[0]} integers.",
            "Save one class index per image.",
        )
    if stored.shape[0] > _MOST_LABELS:
        raise ImageError(f"'labels' in {path} has {stored.shape[0]:,} entries; {_MOST_LABELS:,} are read at most.")
    with archive.open(stored.member) as file:
        file.seek(stored.offset)
        data = _read_exactly(file, stored.shape[0] * stored.dtype.itemsize)
    return np.frombuffer(data, stored.dtype).astype(np.int64)


def _header(archive: zipfile.ZipFile, member: str) -> _Stored:
    """Shape and dtype of an array without reading it. Raises ImageError where it cannot be streamed."""
    with archive.open(member) as file:
        is_first = np.lib.format.read_magic(file) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if is_first else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        offset = file.tell()
    if fortran and len(shape) > 1:
        raise ImageError(f"'{member}' is stored column by column.", "Save numpy.ascontiguousarray(images).")
    info = archive.getinfo(member)
    size = offset + int(np.prod(shape, dtype=object)) * dtype.itemsize
    if not dtype.hasobject and info.file_size != size:
        raise ImageError(f"'{member}' is shorter or longer than its header says.", "Save it again.")
    if size > _LARGE_BYTES and size > _MOST_EXPANSION * info.compress_size:
        raise ImageError(
            f"'{member}' has {size:,} bytes in {info.compress_size:,}: no photographs are compressed so far.",
            "Give images.",
        )
    return _Stored(member, shape, dtype, offset)


def _read_exactly(file: IO[bytes], size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise EOFError("it ends too early")
    return data


@contextlib.contextmanager
def _explained(path: Path, kind: str) -> Iterator[None]:
    """Turn any exception that a damaged archive raises into an ImageError of one sentence."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        reason = printable(str(error)) or type(error).__name__
        message = f"The {kind} {path} is damaged or cannot be read ({reason})."
        raise ImageError(message, "Copy it again.") from error
