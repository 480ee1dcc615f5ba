"""What a user may point `--images` at, and what becomes of everything in it that is no good picture."""

from __future__ import annotations

import dataclasses
import io
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from spach_deploy.common.errors import ImageError, UsageError
from spach_deploy.data import readers
from spach_deploy.data.readers import ImageSource, batches, content_hash, open_images
from spach_deploy.options.specs import Preprocessing

SMALL = Preprocessing.for_size(32)


def photo(seed: int = 0, kind: str = "PNG", size: tuple[int, int] = (40, 36)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def names(source: ImageSource) -> list[str]:
    return [item.name for item in source]


def png_bomb() -> bytes:
    """A PNG of 125 bytes whose header claims 30000 x 30000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a picture"),
    "text": (b"not a picture at all, only words", "not a picture"),
    "random": (np.random.default_rng(0).bytes(5000), "not a picture"),
    "truncated PNG": (photo()[:200], "cannot be decoded"),
    "truncated JPEG": (photo(kind="JPEG")[:-300], "cannot be decoded"),
    "bomb": (png_bomb(), "pixels"),
    "PostScript": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
        "not a picture",
    ),
}


# Folders


def test_folder_is_recursive_sorted_and_ignores_other_files(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPEG", "sub/c.webp", "sub/deeper/d.bmp"):
        write(tmp_path / name, photo(kind={"png": "PNG", "webp": "WEBP", "bmp": "BMP"}.get(name[-3:], "JPEG")))
    for name in ("notes.txt", ".hidden.png", ".cache/e.png", "sub/._c.png"):
        write(tmp_path / name, b"no picture")
    source = open_images(tmp_path)
    assert names(source) == ["a.JPEG", "b.png", "sub/c.webp", "sub/deeper/d.bmp"]
    assert source.skipped == ()
    assert source.count == 4
    assert source.description.endswith("(beside notes.txt)")
    assert [item.label for item in source] == [None] * 4


def test_files_of_other_kinds_are_named(tmp_path: Path) -> None:
    for name in ("a.png", "b.txt", "c.json", "d.md"):
        write(tmp_path / name, photo())
    assert open_images(tmp_path).description.endswith("(beside 3 other files, such as b.txt and c.json)")


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_pictures_in_formats_that_are_not_read_are_named(kind: str, tmp_path: Path) -> None:
    for name in ("phone.HEIC", "web.avif", "z.png"):
        write(tmp_path / "set" / name, photo())
    if kind == "tar":
        with tarfile.open(tmp_path / "set.tar", "w") as tar:
            tar.add(tmp_path / "set", "set")
    source = open_images(tmp_path / ("set" if kind == "folder" else "set.tar"))
    assert [Path(name).name for name in names(source)] == ["z.png"]
    assert [Path(skipped.name).name for skipped in source.skipped] == ["phone.HEIC", "web.avif"]
    assert all("convert it to JPEG or PNG" in skipped.reason for skipped in source.skipped)


def test_a_folder_of_unread_pictures_alone_says_so(tmp_path: Path) -> None:
    write(tmp_path / "phone.heic", b"whatever")
    with pytest.raises(ImageError, match=r"phone\.heic: Pictures of this format are not read"):
        list(open_images(tmp_path))


@pytest.mark.parametrize(
    ("limit", "used", "said"),
    [(9, 4, ""), (9, 3, " of 4"), (4, 3, " of 4"), (2, 2, " of 4, spread evenly")],
    ids=["all", "one unreadable", "a limit of all", "a limit of some"],
)
def test_images_are_spread_only_where_a_limit_chose(limit: int, used: int, said: str, tmp_path: Path) -> None:
    for seed in range(4):
        write(tmp_path / f"{seed}.png", photo(seed))
    assert open_images(tmp_path).limit(limit).of_all(used) == said


def test_class_folders_give_labels_as_image_folder_counts_them(tmp_path: Path) -> None:
    for name in ("dog/2.png", "cat/1.png", "dog/x/3.png"):
        write(tmp_path / name, photo())
    (tmp_path / "bird").mkdir()  # empty, and still class 0
    source = open_images(tmp_path)
    assert source.classes == ("bird", "cat", "dog")
    assert [(item.name, item.label) for item in source] == [
        ("cat/1.png", 1),
        ("dog/2.png", 2),
        ("dog/x/3.png", 2),
    ]
    (batch,) = batches(source, SMALL, 8)
    assert batch.labels is not None
    assert batch.labels.tolist() == [1, 2, 2]
    assert batch.labels.dtype == np.int64


def test_links_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "a.png", photo())
    folder = tmp_path / "photos"
    write(folder / "b.png", photo())
    (folder / "loop").symlink_to(folder)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    source = open_images(folder)
    assert names(source) == ["b.png", "linked/a.png"]
    assert [str(s) for s in source.skipped] == ["dangling.png: The file is missing."]


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_among_good_are_skipped_and_named(kind: str, tmp_path: Path) -> None:
    data, reason = BAD[kind]
    write(tmp_path / "a.png", photo())
    write(tmp_path / "bad.png", data)
    write(tmp_path / "c.png", photo())
    source = open_images(tmp_path)
    assert names(source) == ["a.png", "c.png"]
    (skipped,) = source.skipped
    assert skipped.name == "bad.png"
    assert reason in skipped.reason
    assert "0x" not in skipped.reason  # no addresses of objects


def test_sixteen_bit_and_pipe_are_skipped(tmp_path: Path) -> None:
    write(tmp_path / "a.png", photo())
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    os.mkfifo(tmp_path / "pipe.png")
    source = open_images(tmp_path)
    assert names(source) == ["a.png"]
    assert [s.name for s in source.skipped] == ["deep.png", "pipe.png"]


def test_folder_of_nothing_readable_is_an_error_that_names_files(tmp_path: Path) -> None:
    for i, (data, _) in enumerate(BAD.values()):
        write(tmp_path / f"{i}.png", data)
    with pytest.raises(ImageError, match=rf"None of the {len(BAD)} images.*0\.png: .*and {len(BAD) - 3} more"):
        names(open_images(tmp_path))


def test_skipped_starts_afresh_with_each_iteration(tmp_path: Path) -> None:
    write(tmp_path / "a.png", photo())
    write(tmp_path / "b.png", b"")
    source = open_images(tmp_path)
    assert names(source) == names(source)
    assert len(source.skipped) == 1


def test_limit_spreads_over_the_folder_and_replaces_unreadable_files(tmp_path: Path) -> None:
    for i in range(10):
        write(tmp_path / f"{i}.png", photo(i))
    assert names(open_images(tmp_path).limit(5)) == ["0.png", "2.png", "4.png", "6.png", "8.png"]
    assert names(open_images(tmp_path).limit(99)) == [f"{i}.png" for i in range(10)]
    assert open_images(tmp_path).limit(5).count == 5
    assert open_images(tmp_path).limit(5).limit(9).count == 5
    write(tmp_path / "2.png", b"")
    limited = open_images(tmp_path).limit(5)
    assert sorted(names(limited)) == ["0.png", "1.png", "4.png", "6.png", "8.png"]
    assert [s.name for s in limited.skipped] == ["2.png"]
    with pytest.raises(UsageError):
        limited.limit(0)


def test_names_cannot_command_a_terminal(tmp_path: Path) -> None:
    write(tmp_path / "red\x1b[31m.png", photo())
    assert names(open_images(tmp_path)) == ["red\\x1b[31m.png"]


def test_undecodable_name_can_be_printed(tmp_path: Path) -> None:
    write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")), photo())
    (name,) = names(open_images(tmp_path))
    name.encode("utf-8")


# Paths that are no source at all


def folder_without_pictures(tmp_path: Path) -> Path:
    write(tmp_path / "photos" / "notes.txt", b"x")
    return tmp_path / "photos"


def empty_folder(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


def empty_tar(tmp_path: Path) -> Path:
    tarfile.open(tmp_path / "e.tar", "w").close()
    return tmp_path / "e.tar"


def zip_of_pictures(tmp_path: Path) -> Path:
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        archive.writestr("a.png", photo())
    return tmp_path / "p.zip"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: p / "missing", "There is no"),
        (empty_folder, r"holds no picture \(0 other files\)"),
        (folder_without_pictures, r"holds no picture \(1 other files\)"),
        (lambda p: write(p / "empty.jpg", b""), "is empty"),
        (lambda p: write(p / "text.jpg", b"words " * 200), "not a picture"),
        (lambda p: write(p / "random.bin", np.random.default_rng(1).bytes(9000)), "not a picture"),
        (
            lambda p: write(p / "cut.tar.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03abc"),
            "compressed, and not a tar|damaged",
        ),
        (lambda p: write(p / "cut.npz", b"PK\x03\x04" + bytes(100)), "damaged"),
        (lambda p: write(p / "bomb.png", png_bomb()), "more pixels"),
        (empty_tar, "holds no picture"),
        (zip_of_pictures, "a zip file, not an npz"),
        (lambda p: Path("/dev/null"), "neither a folder nor a file"),
    ],
)
def test_unusable_path_is_one_sentence_with_a_next_step(
    make: Callable[[Path], Path], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ImageError, match=words) as caught:
        open_images(make(tmp_path))
    assert caught.value.hint
    assert "\n" not in str(caught.value)


# One picture


def test_single_picture(tmp_path: Path) -> None:
    source = open_images(write(tmp_path / "one.jpg", photo(kind="JPEG")))
    assert names(source) == ["one.jpg"]
    assert source.count == 1


# Tars


def make_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]  # the mode is a test's parameter
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("is_first", [True, False])
def test_a_name_that_would_fill_the_memory_is_not_read(is_first: bool, tmp_path: Path) -> None:
    """A record of a name is read whole by tarfile: compressed, gigabytes of it are a small file."""
    members = (("a.png", tarfile.REGTYPE, photo()), ("x", tarfile.XHDTYPE, bytes(1 << 17)))
    with tarfile.open(tmp_path / "t.tar.gz", "w:gz") as tar:
        for name, kind, data in members[is_first:]:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(ImageError, match=r"a name of 131,072 bytes"):
        list(open_images(tmp_path / "t.tar.gz"))


def test_arrays_are_judged_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((50, 32, 32, 3), np.uint8), labels=np.zeros(50, np.int64))
    assert open_images(tmp_path / "a.npz").count == 50
    monkeypatch.setattr(readers, "_LARGE_BYTES", 100_000)
    with pytest.raises(ImageError, match="no photographs are compressed so far"):
        open_images(tmp_path / "a.npz")
    monkeypatch.setattr(readers, "_LARGE_BYTES", 1 << 30)
    monkeypatch.setattr(readers, "_MOST_LABELS", 49)
    with pytest.raises(ImageError, match="50 entries; 49 are read at most"):
        open_images(tmp_path / "a.npz")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_tar_is_read_in_its_order_twice(mode: str, tmp_path: Path) -> None:
    members = {
        "x/b.png": photo(1),
        "notes.txt": b"x",
        "a.jpg": photo(2, "JPEG"),
        "._a.jpg": b"",
        "bad.png": b"?",
    }
    source = open_images(make_tar(tmp_path / "photos", members, mode))
    for _ in range(2):
        assert names(source) == ["x/b.png", "a.jpg"]
        assert [s.name for s in source.skipped] == ["bad.png"]
    assert source.count is None
    assert names(source.limit(1)) == ["x/b.png"]


def test_hostile_tar_writes_nothing_and_follows_nothing(tmp_path: Path) -> None:
    secret = write(tmp_path / "secret.png", photo(7))
    folder = tmp_path / "in"
    folder.mkdir()
    path = make_tar(folder / "evil.tar", {"../../x.png": photo(), "/abs.png": photo()})
    with tarfile.open(path, "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = kind, str(secret)
            tar.addfile(link)
        fifo = tarfile.TarInfo("fifo.png")
        fifo.type = tarfile.FIFOTYPE
        tar.addfile(fifo)
    before = sorted(tmp_path.rglob("*"))
    source = open_images(path)
    assert names(source) == ["../../x.png", "/abs.png"]
    assert [s.name for s in source.skipped] == ["link.png", "link.png", "fifo.png"]
    assert "not followed" in source.skipped[0].reason
    assert sorted(tmp_path.rglob("*")) == before
    assert not (tmp_path.parent / "x.png").exists()


def test_tar_member_of_unreasonable_size_is_skipped_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spach_deploy.data.readers.MAX_FILE_BYTES", 10_000)
    source = open_images(make_tar(tmp_path / "t.tar", {"a.png": photo(), "big.png": bytes(20_000)}))
    assert names(source) == ["a.png"]
    assert "20,000 bytes" in source.skipped[0].reason


def test_tar_forgets_members_it_has_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tarfile.TarFile] = []
    real = tarfile.open

    def remember(path: Path, mode: str, **options: Any) -> tarfile.TarFile:
        opened.append(real(path, "r:*", **options))
        return opened[-1]

    path = make_tar(tmp_path / "t.tar", {f"{i}.png": photo(i) for i in range(20)})
    source = open_images(path)
    monkeypatch.setattr(tarfile, "open", remember)
    held = [len(opened[-1].members) for _ in source]  # type: ignore[attr-defined]
    assert len(held) == 20
    assert max(held) <= 1


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("keep", [0.4, 0.7, 0.85])
def test_cut_tar_is_an_error_not_a_smaller_set(mode: str, keep: float, tmp_path: Path) -> None:
    path = make_tar(tmp_path / "t.tar", {f"{i}.png": photo(i) for i in range(9)}, mode)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ImageError, match=r"damaged|breaks off|not a tar that can be read"):
        names(open_images(path))


@pytest.mark.parametrize("member", [1, 2])
def test_tar_cut_between_members_or_with_a_garbled_header_is_an_error(member: int, tmp_path: Path) -> None:
    path = make_tar(tmp_path / "t.tar", {f"{i}.png": photo(i) for i in range(3)})
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[member].offset
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:offset])
    with pytest.raises(ImageError, match="without an end mark"):
        names(open_images(path))
    data[offset : offset + 100] = b"\xff" * 100
    path.write_bytes(data)
    with pytest.raises(ImageError, match="without an end mark"):
        names(open_images(path))


# Npz


def stack(n: int = 5) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(3).integers(0, 256, (n, 30, 40, 3), np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_gives_its_images_and_labels(save: Callable[..., None], tmp_path: Path) -> None:
    save(tmp_path / "a.npz", images=stack(), labels=np.array([3, 1, 4, 1, 5], np.uint16))
    source = open_images(tmp_path / "a.npz")
    for _ in range(2):
        items = list(source)
        assert all((np.asarray(item.image) == array).all() for item, array in zip(items, stack(), strict=True))
        assert [item.label for item in items] == [3, 1, 4, 1, 5]
    assert names(source.limit(2)) == ["image 0", "image 2"]
    assert (np.asarray(list(source.limit(2))[1].image) == stack()[2]).all()
    assert source.count == 5


def test_npz_with_one_array_of_any_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", stack())
    assert [item.label for item in open_images(tmp_path / "a.npz")] == [None] * 5


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": stack(), "y": stack()}, "holds x, y; which are the images"),
        ({"images": stack().astype(np.int64)}, r"int64 \(5, 30, 40, 3\); images must be uint8"),
        ({"images": stack().astype(">f4")}, r">f4 \(5, 30, 40, 3\); images must be uint8"),
        ({"images": stack().transpose(0, 3, 1, 2).copy()}, r"images must be uint8 \(N, H, W, C\)"),
        ({"images": np.zeros((1, 2, 2, 5000), np.uint8)}, "not 1 to 4096 channels"),
        ({"images": np.zeros((1, 2, 2, 0), np.uint8)}, "not 1 to 4096 channels"),
        ({"images": stack()[0]}, "images must be uint8"),
        ({"images": stack(0)}, "no image"),
        ({"images": np.zeros((2, 0, 5, 3), np.uint8)}, "no pixels"),
        ({"images": np.asfortranarray(stack())}, "column by column"),
        ({"images": np.array([{"a": 1}], dtype=object)}, "images must be uint8"),
        ({"images": stack(), "labels": np.arange(4)}, "must be 5 integers"),
        ({"images": stack(), "labels": np.ones(5)}, "must be 5 integers"),
        ({"images": stack(), "labels": np.array(["cat"] * 5)}, "must be 5 integers"),
    ],
)
def test_unusable_npz_is_explained(arrays: dict[str, Any], words: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ImageError, match=words):
        open_images(tmp_path / "a.npz")


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
def test_npz_gives_images_of_any_number_of_channels(dtype: Any, tmp_path: Path) -> None:
    images = (np.random.default_rng(0).random((3, 6, 7, 5)) * (200 if dtype is np.uint8 else 1)).astype(dtype)
    np.savez(tmp_path / "a.npz", images=images)
    taken = [item.image for item in open_images(tmp_path / "a.npz")]
    assert [getattr(image, "dtype", None) for image in taken] == [np.uint8 if dtype is np.uint8 else np.float32] * 3
    assert (np.stack([np.asarray(image) for image in taken]) == images.astype(np.float32)).all()


def test_grey_images_in_an_npz_are_taken_as_pictures(tmp_path: Path) -> None:
    grey = stack()[..., :1]
    np.savez(tmp_path / "a.npz", images=grey)
    (rgb,) = batches(open_images(tmp_path / "a.npz"), SMALL, 5)
    assert (rgb.pixels == rgb.pixels[..., :1]).all()
    one = dataclasses.replace(SMALL, mean=(0.5,), std=(0.5,))
    (batch,) = batches(open_images(tmp_path / "a.npz"), one, 5)
    assert (batch.pixels == rgb.pixels[..., :1]).all()


def test_images_of_other_channels_than_the_model_are_explained(tmp_path: Path) -> None:
    five = dataclasses.replace(SMALL, mean=(0.4,) * 5, std=(0.2,) * 5)
    np.savez(tmp_path / "a.npz", images=np.zeros((1, 8, 8, 4), np.uint8))
    write(tmp_path / "picture.png", photo(0))
    refusals = {"a.npz": r"The model takes images of 5 channels, and these have 4\.", "picture.png": "a picture has 3"}
    for name, words in refusals.items():
        with pytest.raises(ImageError, match=words) as refused:
            list(batches(open_images(tmp_path / name), five, 1))
        assert "(N, H, W, 5)" in str(refused.value.hint)


def test_npz_that_loads_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return os.mkdir, (str(tmp_path / "owned"),)

    np.savez(tmp_path / "a.npz", images=stack(), labels=np.array([Evil()] * 5, dtype=object))
    with pytest.raises(ImageError):
        open_images(tmp_path / "a.npz")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_npz_is_an_error(save: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    save(path, images=stack())
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 50] = bytes(50)
    path.write_bytes(data)
    with pytest.raises(ImageError, match="damaged"):
        names(open_images(path))
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match="damaged"):
        open_images(path)


# Batches and the hash


def test_batches_keep_order_and_the_last_is_smaller(tmp_path: Path) -> None:
    for i in range(5):
        write(tmp_path / f"{i}.png", photo(i))
    got = list(batches(open_images(tmp_path), SMALL, 2))
    assert [len(batch) for batch in got] == [2, 2, 1]
    assert [name for batch in got for name in batch.names] == [f"{i}.png" for i in range(5)]
    assert got[0].pixels.shape == (2, 32, 32, 3)
    assert got[0].labels is None
    with pytest.raises(UsageError):
        next(batches(open_images(tmp_path), SMALL, 0))


def test_batches_of_nothing_readable_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.png", b"")
    with pytest.raises(ImageError, match="The image in"):
        list(batches(open_images(tmp_path), SMALL, 2))


def test_reading_is_lazy(tmp_path: Path) -> None:
    for i in range(5):
        write(tmp_path / f"{i}.png", photo(i))
    source = open_images(tmp_path)
    iterator = iter(source)
    next(iterator)
    (tmp_path / "4.png").unlink()
    assert len(list(iterator)) == 3
    assert [s.name for s in source.skipped] == ["4.png"]


def test_same_pictures_give_the_same_pixels_from_every_container(tmp_path: Path) -> None:
    members = {f"{i}.png": photo(i) for i in range(3)}
    for name, data in members.items():
        write(tmp_path / "folder" / name, data)
    make_tar(tmp_path / "t.tar.gz", dict(reversed(members.items())), "w:gz")
    images = [np.asarray(Image.open(io.BytesIO(data))) for data in members.values()]
    np.savez_compressed(tmp_path / "a.npz", np.stack(images))
    hashes = {
        content_hash(batch.pixels for batch in batches(open_images(tmp_path / path), SMALL, size))
        for path, size in (("folder", 2), ("t.tar.gz", 1), ("a.npz", 3))
    }
    assert len(hashes) == 1


def test_content_hash_sees_pixels_and_repetition_only() -> None:
    images = stack(3)
    assert content_hash([images]) == content_hash([images[2:], images[:2]])
    changed = images.copy()
    changed[1, 5, 5, 0] ^= 1
    assert content_hash([changed]) != content_hash([images])
    assert content_hash([images, images[:1]]) != content_hash([images])
    assert content_hash([images.transpose(0, 2, 1, 3)]) != content_hash([images])
