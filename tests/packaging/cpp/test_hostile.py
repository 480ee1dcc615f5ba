"""Files from somebody who means harm: an error with a reason, never a crash. AddressSanitizer and UBSan watch."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.packaging.cpp import models, plans
from tests.packaging.cpp.builds import Build
from tests.packaging.triton import tiny_bundles

pytestmark = pytest.mark.cpp

COUNT = 1000
EDGES = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def hostile(good: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Random bytes, `good` cut, lengthened, with bits flipped, with extreme numbers in it, with parts moved."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        kind = int(random.integers(0, 6))
        content = bytearray(good)
        at = int(random.integers(0, len(good)))
        if kind == 0:
            content = bytearray(random.bytes(int(random.integers(0, 2000))))
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            content += random.bytes(int(random.integers(1, 500)))
        elif kind == 3:
            for _ in range(int(random.integers(1, 20))):
                content[int(random.integers(0, len(content)))] ^= 1 << int(random.integers(0, 8))
        elif kind == 4:  # early, where sizes and counts are
            at = int(random.integers(0, min(len(good), 200)))
            content[at : at + 4] = struct.pack("<I", EDGES[int(random.integers(0, len(EDGES)))])
        else:
            other = int(random.integers(0, len(good)))
            content[at : at + 40] = good[other : other + 40]
        yield bytes(content)


def hostile_text(good: str, count: int, seed: int) -> Iterator[bytes]:
    """Words of model.txt replaced by what no one expects there, lines missing, doubled and moved."""
    random = np.random.default_rng(seed)
    words = ["-1", "0", "99999999999999999999", "1e999", "nan", "inf", "any", "x" * 5000, "\0", "", "0x10", "é", "-0.0"]
    for _ in range(count):
        lines = good.splitlines()
        for _ in range(int(random.integers(1, 4))):
            at = int(random.integers(0, len(lines)))
            parts = lines[at].split(" ")
            parts[int(random.integers(0, len(parts)))] = words[int(random.integers(0, len(words)))]
            lines[at] = " ".join(parts)
        if random.integers(0, 3) == 0:
            lines.insert(int(random.integers(0, len(lines))), lines.pop(int(random.integers(0, len(lines)))))
        if random.integers(0, 3) == 0:
            lines.append(lines[int(random.integers(0, len(lines)))])
        yield "\n".join(lines).encode()


def fuzz(build: Build, model: Path, folder: Path, inputs: list[bytes]) -> tuple[int, int]:
    """(files, taken); every other one was refused with a reason."""
    for number, content in enumerate(inputs):
        (folder / f"{number}.bin").write_bytes(content)
    (folder / "list").write_text("".join(f"{folder / f'{number}.bin'}\n" for number in range(len(inputs))))
    result = build.run("fuzz", folder / "list", SPACH_FUZZ_MODEL=str(model))
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.endswith(", 0 without a reason\n"), result.stdout
    total, taken = (int(part.split()[0]) for part in result.stdout.split(", ")[:2])
    return total, taken


def test_a_thousand_hostile_plans(asan: Build, model: Path, tmp_path: Path) -> None:
    good = (model / "engine.plan").read_bytes()[:3000]
    inputs = [b"p" + content for content in hostile(good, COUNT, seed=1)]
    total, taken = fuzz(asan, model, tmp_path, inputs)
    assert total == COUNT
    assert taken < COUNT / 2  # those whose header is whole and declares the very size; the hash is bent to fit


def test_a_thousand_hostile_golden_files(asan: Build, model: Path, tmp_path: Path) -> None:
    good = (model / "golden.bin").read_bytes()
    inputs = [b"g" + content for content in hostile(good, COUNT, seed=2)]
    total, taken = fuzz(asan, model, tmp_path, inputs)
    assert total == COUNT
    assert taken < COUNT / 2  # flipped bits in pixels: numbers like any others


def test_a_thousand_hostile_model_texts(asan: Build, model: Path, tmp_path: Path) -> None:
    good = (model / "model.txt").read_text()
    inputs = [b"m" + content for content in hostile_text(good, COUNT, seed=3)]
    total, taken = fuzz(asan, model, tmp_path, inputs)
    assert total == COUNT
    assert taken < COUNT / 2


LIES = {
    "input input float32 3 3 8 8": {
        "input input float32 4 268435456 268435456 268435456 268435456": "an unusable input",
        "input input float32 9 3 8 8": "an unusable input",
        "input input float32 3 3 8 9": "describes an input that no picture of the model's size becomes",
        "input input int64 3 3 8 8": "describes an input that no picture of the model's size becomes",
        "input input float64 3 3 8 8": "an unusable input",
    },
    "batch 1 4 8": {
        "batch 1 4 99999999": "an unusable batch",
        "batch 4 1 8": "an unusable batch",
        "batch 1 4 8 8": "an unusable batch",
    },
    "resize 9 8": {
        "resize 8 9": "an unusable resize",
        "resize 99999 8": "an unusable resize",
        "resize 9 9 8": "an unusable resize",
        "resize 9 9 8 9 9": "an unusable resize",
        "resize 9 7 8 8": "an unusable resize",
        "resize 9 9 8 9": "describes an input that no picture of the model's size becomes",
        "resize 9 8\ninterpolation lanczos": "an unusable interpolation",
    },
    "std 0.229 0.224 0.225": {
        "std 0.229 0 0.225": "an unusable std",
        "std 0.229 nan 0.225": "an unusable std",
        "std 0.229": "has a mean and a std of different numbers of channels",
    },
    "output top_indices int64 1 3": {
        "output logits int64 1 3": "names two tensors logits",
        "output top_indices int64 2 3 3": "describes an output that is no list of numbers: top_indices",
        "\n".join(f"output a{number} int64 1 3" for number in range(20)): "has too many outputs",
    },
    "spach-model 1": {"spach-model 2": "an unusable spach-model", "a-model 1": "does not begin as a model file does"},
    "flavour tensorrt-rtx": {"flavour onnx": "an unusable flavour", "": "has no entry flavour"},
    "precision fp16": {"precision fp16\nprecision fp16": "a second precision", "colour red": "an unknown entry"},
}


def test_a_model_text_that_lies_is_refused_with_the_line_and_why(asan: Build, model: Path, tmp_path: Path) -> None:
    good = (model / "model.txt").read_text()
    for truth, lies in LIES.items():
        assert good.count(f"{truth}\n") == 1, truth
        for lie, reason in lies.items():
            (tmp_path / "model.txt").write_text(good.replace(f"{truth}\n", f"{lie}\n"))
            result = asan.run("probe", "load", tmp_path, 0)
            assert result.returncode == 1, result.stderr
            assert result.stdout.startswith("bad file: model.txt "), result.stdout
            assert f"{reason}.\n" in result.stdout, (lie, result.stdout)


def test_good_files_are_taken_by_the_same_target(asan: Build, model: Path, tmp_path: Path) -> None:
    """Or refusing everything would pass above."""
    kinds = {b"p": "engine.plan", b"g": "golden.bin", b"m": "model.txt"}
    inputs = [kind + (model / name).read_bytes() for kind, name in kinds.items()]
    inputs.append(b"i" + struct.pack("<HHB", 7, 9, 2) + bytes(23 * 9))
    assert fuzz(asan, model, tmp_path, inputs) == (4, 4)


def test_hostile_pictures(asan: Build, model: Path, tmp_path: Path) -> None:
    good = struct.pack("<HHB", 9, 7, 3) + bytes(range(210))
    inputs = [b"i" + content for content in hostile(good, 300, seed=4)]
    assert fuzz(asan, model, tmp_path, inputs)[0] == 300


def test_hostile_folders_from_load_to_self_test(asan: Build, model: Path, tmp_path: Path) -> None:
    """Whole folders. Half of them carry hashes that fit what was changed: such a plan reaches TensorRT."""
    random = np.random.default_rng(5)
    names = ["engine.plan", "golden.bin", "model.txt"]
    folders = []
    for number in range(120):
        folder = tmp_path / str(number)
        folder.mkdir()
        name = names[number % 3]
        for other in names:
            (folder / other).write_bytes((model / other).read_bytes())
        if name == "model.txt":
            (spoiled,) = hostile_text((model / name).read_text(), 1, seed=number)
        else:
            (spoiled,) = hostile((model / name).read_bytes(), 1, seed=number)
        (folder / name).write_bytes(spoiled)
        if name == "golden.bin" and spoiled and random.integers(0, 2):
            models.refresh(folder, model.parents[1] / "bundle")
        folders.append(f"{folder}\n")
    (tmp_path / "list").write_text("".join(folders))
    result = asan.run("probe", "folders", tmp_path / "list")
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    loaded, tested = (int(part.split()[0]) for part in result.stdout.split(", ")[1:])
    assert 40 <= loaded < 120  # the folders whose golden pack was spoiled load, and most others do not
    assert tested < loaded


def test_a_hostile_plan_that_reaches_tensorrt_is_tensorrts_error(asan: Build, tmp_path: Path) -> None:
    """Size, hash, header and version fit, and what follows is none of the double's plans."""
    model = models.model(tmp_path)
    good = plans.plan_bytes(b"no graph", tiny_bundles.Tiny().batch)
    for number, content in enumerate((good, good[:64] + bytes(len(good) - 64))):
        (model / "engine.plan").write_bytes(content)
        models.refresh(model, tmp_path / "bundle")
        result = asan.run("probe", "load", model, 0)
        assert result.returncode == 1, number
        assert result.stdout.startswith("TensorRT error: "), result.stdout
