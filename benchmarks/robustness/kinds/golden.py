"""The golden pack: damaged, of other shapes and types, with answers that are no numbers."""

from __future__ import annotations

import hashlib
import io
import zipfile
from random import Random
from typing import Any

import numpy as np

from benchmarks.robustness.box import Box
from benchmarks.robustness.case import Case, Kind
from benchmarks.robustness.damage import damaged, hostile_texts
from benchmarks.robustness.kinds.commands import reading_bundle
from benchmarks.robustness.seeds import manifest_with, npz_bytes, seeds


def _damaged(box: Box, chance: Random) -> Case:
    box.bring(seeds().path(chance.choice(("fp16", "uint8", "fp32"))), "bundle")
    content, what = damaged((box.work / "bundle/golden.npz").read_bytes(), chance)
    box.put("bundle/golden.npz", content)
    if chance.random() < 0.5:
        return Case(f"golden.npz: {what}", reading_bundle(chance, "bundle"), must_refuse=True)
    manifest_with(box.work / "bundle", golden_npz=hashlib.sha256(content).hexdigest())
    return Case(f"golden.npz and its hash: {what}", reading_bundle(chance, "bundle"))


def _other(box: Box, chance: Random) -> Case:
    """Whole files with other content, whose hash fits."""
    box.bring(seeds().path(chance.choice(("fp16", "uint8", "fp32"))), "bundle")
    with np.load(box.work / "bundle/golden.npz") as arrays:
        golden = dict(arrays)
    name = chance.choice(("input", "logits", "names"))
    value = golden[name]
    odd: dict[str, Any] = {
        "NaN": value * np.float32("nan") if value.dtype.kind == "f" else value[::-1],
        "infinity": value + np.float32("inf") if value.dtype.kind == "f" else value[:0],
        "too few": value[:-1],
        "none": value[:0],
        "one dimension more": value[None],
        "flat": value.ravel(),
        "complex numbers": np.zeros(value.shape, np.complex64),
        "texts": np.full(value.shape, chance.choice(hostile_texts(str(box.outside))).replace("\0", "")),
        "booleans": np.ones(value.shape, bool),
        "float64": np.ones(value.shape, np.float64),
        "a structure": np.zeros(value.shape, [("a", "f4"), ("b", "S3")]),
        "zeros": np.zeros(value.shape, value.dtype),
        "a scalar": np.float32(1),
        "Fortran's order": np.asfortranarray(value),
        "big-endian": value.astype(value.dtype.newbyteorder(">")),
        "dates": np.zeros(value.shape, "datetime64[s]"),
    }
    what = chance.choice(sorted(odd))
    content = npz_bytes(**{**golden, name: odd[what]})
    if chance.random() < 0.15:
        content, what = npz_bytes(**{key: golden[key] for key in golden if key != name}), "missing"
    box.put("bundle/golden.npz", content)
    manifest_with(box.work / "bundle", golden_npz=hashlib.sha256(content).hexdigest())
    return Case(f"{name} of golden.npz: {what}", reading_bundle(chance, "bundle"))


def _archive(box: Box, chance: Random) -> Case:
    """The same arrays in a zip that NumPy does not write, or answers that would fill the memory. The hash fits."""
    box.bring(seeds().path("fp16"), "bundle")
    kind = chance.choice(("encrypted", "lzma", "bzip2", "a gigabyte of zeros"))
    way = {"lzma": zipfile.ZIP_LZMA, "bzip2": zipfile.ZIP_BZIP2}.get(kind, zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(box.work / "bundle/golden.npz") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    if kind == "a gigabyte of zeros":
        members["logits.npy"] = _array_bytes(np.zeros((8, 1 << 25), np.float32))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", way) as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    content = bytearray(file.getvalue())
    if kind == "encrypted":
        for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            content[content.index(mark) + place] |= 1
    box.put("bundle/golden.npz", bytes(content))
    manifest_with(box.work / "bundle", golden_npz=hashlib.sha256(content).hexdigest())
    return Case(f"golden.npz: {kind}", reading_bundle(chance, "bundle"), must_refuse=False)


def _array_bytes(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


KINDS = (
    Kind("golden pack", 30, _damaged),
    Kind("golden pack, odd", 30, _other),
    Kind("golden pack, archive", 8, _archive),
)
