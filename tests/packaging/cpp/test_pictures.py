"""JPEG and PNG as spach_classify reads them: Pillow's pixels, and a sentence for what is none."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from spach_deploy.data import images as probes
from tests.packaging.cpp.builds import Build
from tests.packaging.cpp.test_hostile import hostile

pytestmark = pytest.mark.cpp


@pytest.fixture(scope="session", autouse=True)
def _libraries(plain: Build) -> None:
    """Skips where the program could not be built with both."""
    cached = (plain.path / "programs" / "CMakeCache.txt").read_text()
    if re.search(r"^(JPEG_LIBRARY_RELEASE|PNG_LIBRARY_RELEASE):\w+=.*NOTFOUND$", cached, re.MULTILINE):
        pytest.skip("No libjpeg or libpng here (apt-get install libjpeg-dev libpng-dev).")


def decoded(build: Build, folder: Path, pictures: dict[str, bytes]) -> dict[str, tuple[str, bytes]]:
    """(what is said, pixels) of each."""
    for name, content in pictures.items():
        (folder / name).write_bytes(content)
    (folder / "list").write_text("".join(f"{folder / name}\n" for name in pictures))
    result = build.run("decode", folder / "list")
    assert (result.returncode, result.stderr) == (0, ""), result.stderr[-3000:]
    said = result.stdout.splitlines()
    assert len(said) == len(pictures)
    pixels = [folder / f"{name}.rgb" for name in pictures]
    return {
        name: (line, file.read_bytes() if file.exists() else b"")
        for name, line, file in zip(pictures, said, pixels, strict=True)
    }


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def photograph() -> Image.Image:
    return Image.fromarray(np.asarray(next(iter(probes.probe_source())).image)[:301, :203])


def of_mode(mode: str) -> Image.Image:
    if mode == "LA":
        return Image.merge("LA", (photograph().convert("L"), photograph().convert("L").rotate(90, expand=False)))
    if mode == "RGBA":
        return Image.merge("RGBA", (*photograph().split(), photograph().convert("L")))
    return photograph().convert(mode)


def test_png_is_pillows_bit_by_bit(asan: Build, tmp_path: Path) -> None:
    pictures = {f"{mode}.png": saved(of_mode(mode), "PNG") for mode in ("RGB", "RGBA", "L", "LA", "P", "1")}
    pictures["transparent.png"] = saved(of_mode("P"), "PNG", transparency=3)
    pictures["gamma.png"] = with_gamma(pictures["RGB.png"])
    for bits in (1, 2, 4):
        pictures[f"palette{bits}.png"] = saved(photograph().quantize(2**bits), "PNG", bits=bits)
    for name, (said, rgb) in decoded(asan, tmp_path, pictures).items():
        assert said == "203 x 301", name
        assert rgb == Image.open(tmp_path / name).convert("RGB").tobytes(), name


def with_gamma(png: bytes) -> bytes:
    """With a gAMA chunk, of which Pillow takes no notice."""
    import struct
    import zlib

    chunk = b"gAMA" + struct.pack(">I", 20000)
    return png[:33] + struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:]


def test_jpeg_is_pillows_within_what_two_builds_of_libjpeg_differ_by(asan: Build, tmp_path: Path) -> None:
    """Pillow carries a libjpeg-turbo of its own; versions may round chroma otherwise, by a few levels."""
    pictures = {f"{mode}.jpg": saved(of_mode(mode), "JPEG", quality=90) for mode in ("RGB", "L")}
    kinds: dict[str, dict[str, Any]] = {
        "progressive": {"progressive": True},
        "444": {"subsampling": 0},
        "422": {"subsampling": 1},
    }
    for name, options in kinds.items():
        pictures[f"{name}.jpg"] = saved(photograph(), "JPEG", quality=80, **options)
    turned = Image.Exif()
    turned[0x0112] = 6
    pictures["turned.jpg"] = saved(photograph(), "JPEG", exif=turned)
    for name, (said, rgb) in decoded(asan, tmp_path, pictures).items():
        assert said == "203 x 301", name
        wanted = np.asarray(Image.open(tmp_path / name).convert("RGB")).reshape(-1)
        difference = np.abs(np.frombuffer(rgb, np.uint8).astype(int) - wanted)
        assert difference.max() <= 3, f"{name}: {difference.max()}"


def grey16() -> bytes:
    return saved(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)), "PNG")


def test_a_picture_that_is_none_is_refused_with_the_reason(asan: Build, tmp_path: Path) -> None:
    jpeg, png = saved(photograph(), "JPEG"), saved(photograph(), "PNG")
    refused = {
        "cut.jpg": (jpeg[: len(jpeg) // 2], "is a JPEG picture that ends too early."),
        "head.jpg": (jpeg[:20], "is no readable JPEG picture: "),
        "cmyk.jpg": (saved(photograph().convert("CMYK"), "JPEG"), "is a JPEG picture in CMYK; save it as RGB."),
        "cut.png": (png[: len(png) // 2], "is no readable PNG picture: it ends too early."),
        "16 bits.png": (grey16(), "is a grey PNG picture of 16 bits; save it with 8."),
        "webp.jpg": (saved(photograph(), "WEBP"), "is no JPEG, PNG or binary PPM picture (P6)."),
        "empty": (b"", "cannot be read."),
    }
    got = decoded(asan, tmp_path, {name: content for name, (content, _) in refused.items()})
    for name, (_, reason) in refused.items():
        assert got[name][0].startswith(reason), (name, got[name][0])
        assert got[name][1] == b"", name


def test_hostile_pictures_end_in_a_sentence(asan: Build, tmp_path: Path) -> None:
    small = photograph().resize((40, 30))
    pictures = {}
    for form in ("JPEG", "PNG"):
        for number, content in enumerate(hostile(saved(small, form), 200, seed=len(form))):
            pictures[f"{number}.{form}"] = content
    said = [line for line, _ in decoded(asan, tmp_path, pictures).values()]
    assert any("readable JPEG" in line for line in said)
    assert any("readable PNG" in line for line in said)


def test_classify_takes_them_by_what_they_are_and_not_by_their_names(plain: Build, model: Path, tmp_path: Path) -> None:
    """The same pixels, as PNG and as PPM, on several threads."""
    image = photograph()
    names = ["picture.ppm", "picture.jpg", "bär.png"]
    image.save(tmp_path / names[0])
    (tmp_path / names[1]).write_bytes(saved(image, "PNG"))
    shutil.copy(tmp_path / names[1], tmp_path / names[2])
    result = plain.run("spach_classify", "-m", model, "-k", 2, "-t", 3, *(tmp_path / name for name in names))
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[1:3] == lines[4:6] == lines[7:9]
    assert lines[::3] == [str(tmp_path / name) for name in names]
