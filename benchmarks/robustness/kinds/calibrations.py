"""Calibration files, interrupted calibrations, and a bundle's record of its quantization."""

from __future__ import annotations

import hashlib
from random import Random

import numpy as np

from benchmarks.robustness.box import Box
from benchmarks.robustness.case import Case, Kind
from benchmarks.robustness.damage import damaged, damaged_json_text
from benchmarks.robustness.kinds.commands import OUT, reading_bundle
from benchmarks.robustness.seeds import MODEL, manifest_with, npz_bytes, seeds

_INT8 = ("spach-export", *MODEL, "--int8", "--engine", "none", "-o", OUT)


def _calibration(box: Box, chance: Random) -> Case:
    content, what = damaged_json_text(seeds().read("scales.json").decode(), chance, str(box.outside))
    name = box.put("input/scales.json", content)
    if chance.random() < 0.6:
        return Case(f"calibration: {what}", (*_INT8, "--calibration", name))
    images = box.bring(seeds().path("calibration.npz"), "calibration.npz").name
    name = box.put("out/scales.json", content)
    if chance.random() < 0.5:
        return Case(f"calibration kept: {what}", (*_INT8, "--calibration", images, "--calibration-cache", name))
    overwrite = ("--overwrite",) if chance.random() < 0.5 else ()
    command = ("spach-calibrate", *MODEL, "--calibration", images, "-o", name, *overwrite)
    return Case(f"calibration kept: {what}", command)


def _unfinished(box: Box, chance: Random) -> Case:
    """What a killed calibration would go on from."""
    head = '{"key": {}, "images": 3, "digest": "", "tensors": []}'
    content, what = damaged(npz_bytes(head=np.array(head)), chance)
    box.put("out/scales.json.unfinished", content)
    images = box.bring(seeds().path("calibration.npz"), "calibration.npz").name
    command = ("spach-calibrate", *MODEL, "--calibration", images, "-o", "out/scales.json")
    return Case(f"unfinished calibration: {what}", command)


def _record(box: Box, chance: Random) -> Case:
    """quantization.json, with its old hash in the manifest or a forged one."""
    box.bring(seeds().path("int8"), "bundle")
    text = (box.work / "bundle/quantization.json").read_text()
    content, what = damaged_json_text(text, chance, str(box.outside))
    box.put("bundle/quantization.json", content)
    if chance.random() < 0.3:
        return Case(f"quantization.json: {what}", reading_bundle(chance, "bundle"), content != text.encode())
    manifest_with(box.work / "bundle", quantization_json=hashlib.sha256(content).hexdigest())
    return Case(f"quantization.json and its hash: {what}", ("spach-validate", "bundle"))


KINDS = (
    Kind("calibration", 35, _calibration),
    Kind("calibration, unfinished", 5, _unfinished),
    Kind("quantization record", 35, _record),
)
