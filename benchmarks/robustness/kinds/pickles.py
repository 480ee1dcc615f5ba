"""Inputs that would run code: pickles with `__reduce__`, and archives that climb out or are bombs.

A payload that runs writes the canary, which the judge looks for.
"""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np

from benchmarks.robustness.box import CANARY, Box
from benchmarks.robustness.case import Case, Kind
from benchmarks.robustness.kinds.commands import EXPORT, export
from benchmarks.robustness.seeds import MODEL, npz_bytes, seeds


class _Payload:
    """Unpickles as the result of a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


def _payload(box: Box, chance: Random) -> tuple[Any, str]:
    import os
    import subprocess

    import torch

    canary = str(box.outside / CANARY)
    code = f"open({canary!r}, 'w').close()"
    payloads = (
        (_Payload(os.system, f"touch {canary}"), "os.system"),
        (_Payload(eval, code), "eval"),
        (_Payload(exec, code), "exec"),
        (_Payload(os.mkdir, canary), "os.mkdir"),
        (_Payload(open, canary, "w"), "open"),
        (_Payload(subprocess.call, ("touch", canary)), "subprocess.call"),
        (_Payload(subprocess.Popen, ("touch", canary)), "subprocess.Popen"),
        (_Payload(torch.hub.load, "nobody/nothing", "x"), "torch.hub.load"),
        (_Payload(np.save, canary, np.zeros(1)), "numpy.save"),
        (_Payload(__import__, "antigravity"), "import"),
    )
    return chance.choice(payloads)


def _pickled_checkpoint(box: Box, chance: Random) -> Case:
    """Anywhere in a checkpoint of either format, or as a plain pickle."""
    import torch

    payload, what = _payload(box, chance)
    content = torch.load(seeds().path("weights.pth"), weights_only=False)
    place = chance.choice(("args", "epoch", "model", "state", "alone", "key"))
    if place == "state":
        content["model"]["extra"] = payload
    elif place == "key":
        content["model"] = {"head.weight": content["model"], "z": [payload]}
    else:
        content = payload if place == "alone" else {**content, place: payload}
    file, form = io.BytesIO(), chance.choice(("zip", "legacy", "pickle"))
    if form == "pickle":
        pickle.dump(content if place == "alone" else {"w": payload}, file, protocol=chance.choice((2, 4, 5)))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    suffix = chance.choice(("pth", "pt", "safetensors", "bin"))
    name = box.put(f"input/weights.{suffix}", file.getvalue())
    if chance.random() < 0.3:
        box.bring(seeds().path("fp32"), "bundle")
        return Case(f"{what} in {place} of a {form}", ("spach-validate", "bundle", "--checkpoint", name), True)
    return Case(f"{what} in {place} of a {form}", export(box, chance, "--checkpoint", name), must_refuse=True)


def _pickled_array(box: Box, chance: Random) -> Case:
    """Object arrays, which numpy would unpickle: images, calibration, golden pack, an interrupted calibration."""
    payload, what = _payload(box, chance)
    objects = np.array([payload], dtype=object)
    place = chance.choice(("images", "labels", "calibration", "golden", "state"))
    if place == "images":
        name = box.put("input/photos.npz", npz_bytes(images=objects))
        return Case(f"{what} in images.npz", (*EXPORT, "--images", name), must_refuse=True)
    if place == "labels":
        name = box.put("input/photos.npz", npz_bytes(images=np.zeros((2, 8, 8, 3), np.uint8), labels=objects))
        box.bring(seeds().path("fp32"), "bundle")
        return Case(f"{what} in labels of images.npz", ("spach-validate", "bundle", "--images", name), True)
    if place == "golden":
        box.bring(seeds().path("fp32"), "bundle")
        box.put("bundle/golden.npz", npz_bytes(input=objects, logits=objects, names=objects))
        return Case(f"{what} in golden.npz", ("spach-validate", "bundle"), must_refuse=True)
    box.bring(seeds().path("calibration.npz"), "calibration.npz")
    if place == "calibration":
        box.put("calibration.npz", npz_bytes(images=objects))
    box.put("out/scales.json.unfinished", npz_bytes(head=objects))
    command = ("spach-calibrate", *MODEL, "--calibration", "calibration.npz", "-o", "out/scales.json")
    return Case(f"{what} in a {place} file", command, must_refuse=place == "calibration")


_CLIMBING = (
    *(f"../../outside/{CANARY}", f"../{CANARY}", f"/tmp/{CANARY}", f"a/../../../{CANARY}", f"..\\..\\{CANARY}"),
    *(f"./{CANARY}/../../../outside/{CANARY}", f"C:\\{CANARY}", f"//{CANARY}", f"\0{CANARY}"),
)


def _climbing_zip(box: Box, chance: Random) -> Case:
    """Members whose names lead out of the folder that a careless reader unpacks into."""
    name = chance.choice(_CLIMBING).replace("\0", "")
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, b"written")
        archive.writestr(f"{name}/data.pkl", pickle.dumps({"a": 1}))
        archive.writestr(f"{name}/version", b"3\n")
        archive.writestr(f"{name}.npy", b"\x93NUMPY")
    path = box.put(f"input/archive.{chance.choice(('pth', 'npz', 'zip'))}", file.getvalue())
    return Case(f"a zip with {name!r}", _reading_archive(box, chance, path), must_refuse=True)


def _climbing_tar(box: Box, chance: Random) -> Case:
    """Names that climb, links that point out, devices and pipes, among pictures that are whole."""
    file, picture = io.BytesIO(), seeds().read("photos/class0/0.png")
    name = chance.choice(_CLIMBING).replace("\0", "")
    kind = chance.choice((tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE))
    with tarfile.open(fileobj=file, mode="w", format=chance.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))) as tar:
        for index, suffix in enumerate(("", ".png")):
            member = tarfile.TarInfo(f"{name}{suffix}")
            member.type = kind if index else tarfile.REGTYPE
            member.linkname = chance.choice(("/etc/passwd", "../../kept.txt", str(box.outside / "kept.txt")))
            member.size = len(picture) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(picture) if member.isreg() else None)
        whole = tarfile.TarInfo("whole.png")
        whole.size = len(picture)
        tar.addfile(whole, io.BytesIO(picture))
    path = box.put(f"input/archive.{chance.choice(('tar', 'tar', 'pth'))}", file.getvalue())
    return Case(f"a tar with {name!r} of type {kind!r}", _reading_archive(box, chance, path))


def _reading_archive(box: Box, chance: Random, path: str) -> tuple[str, ...]:
    box.bring(seeds().path("fp32"), "bundle")
    ways: tuple[tuple[str, ...], ...] = (
        (*EXPORT, "--checkpoint", path),
        (*EXPORT, "--images", path),
        ("spach-validate", "bundle", "--images", path),
        ("spach-validate", path),
        ("spach-doctor", path),
        ("spach-calibrate", *MODEL, "--calibration", path, "-o", "out/scales.json"),
    )
    return chance.choice(ways)


def _bomb(box: Box, chance: Random) -> Case:
    """Small files that say, or become, very large ones."""
    zeros, file = bytes(1 << 28), io.BytesIO()
    kind = chance.choice(("png", "npz", "labels", "pth", "tar.gz", "tar names", "json", "tensor", "gif"))
    if kind == "png":
        name = box.put("input/photos/a.png", _png_header(chance.choice((60000, 2**31 - 1))))
        return Case("a PNG of many pixels", (*EXPORT, "--images", "input/photos"), True)
    if kind == "gif":
        name = box.put(
            "input/a.gif", b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\0;"
        )
        return Case("a GIF of many pixels", (*EXPORT, "--images", name), True)
    if kind == "npz":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("images.npy", "w") as member:
            np.lib.format.write_array_header_1_0(
                member, {"descr": "|u1", "fortran_order": False, "shape": (1, 1 << 14, 1 << 14, 3)}
            )
            for _ in range(3):
                member.write(zeros)
        return Case("an npz of one huge image", (*EXPORT, "--images", box.put("input/a.npz", file.getvalue())), True)
    if kind == "labels":
        np.savez_compressed(file, images=np.zeros((1, 8, 8, 3), np.uint8), labels=np.zeros(1 << 28, np.uint8))
        return Case("an npz of many labels", (*EXPORT, "--images", box.put("input/a.npz", file.getvalue())), True)
    if kind == "tar names":
        with tarfile.open(fileobj=file, mode="w:gz") as tar:
            member_info = tarfile.TarInfo("x")
            member_info.type, member_info.size = tarfile.XHDTYPE, len(zeros)
            tar.addfile(member_info, io.BytesIO(zeros))
        return Case("a tar of one long name", (*EXPORT, "--images", box.put("input/a.tar.gz", file.getvalue())), True)
    if kind == "tar.gz":
        with tarfile.open(fileobj=file, mode="w:gz") as tar:
            member_info = tarfile.TarInfo("a.png")
            member_info.size = len(zeros) * 2
            tar.addfile(member_info, io.BytesIO(zeros + zeros))
        return Case("a tar of zeros", (*EXPORT, "--images", box.put("input/a.tar.gz", file.getvalue())), True)
    if kind == "json":
        box.bring(seeds().path("fp32"), "bundle")
        box.put("bundle/manifest.json", b"[" * 200_000)
        return Case("a manifest of brackets", ("spach-validate", "bundle"), True)
    if kind == "tensor":
        header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
        name = box.put("input/w.safetensors", len(header).to_bytes(8, "little") + header)
        return Case("a tensor of 4 TB", export(box, chance, "--checkpoint", name), True)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 1}))
        for index in range(8):
            archive.writestr(f"archive/data/{index}", zeros)
    return Case(
        "a checkpoint of zeros", export(box, chance, "--checkpoint", box.put("input/w.pth", file.getvalue())), True
    )


def _png_header(side: int) -> bytes:
    import struct
    import zlib

    head = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + bytes(40)


KINDS = (
    Kind("code in a checkpoint", 30, _pickled_checkpoint),
    Kind("code in an array", 20, _pickled_array),
    Kind("archive that climbs, zip", 20, _climbing_zip),
    Kind("archive that climbs, tar", 25, _climbing_tar),
    Kind("bomb", 15, _bomb),
)
