"""Plans: damaged, prefixed by other tools, too short or too long, beside a manifest that knows it or was forged."""

from __future__ import annotations

import hashlib
import json
from random import Random

from benchmarks.robustness.box import Box
from benchmarks.robustness.case import Case, Kind
from benchmarks.robustness.damage import Damaged, damaged, damaged_json
from benchmarks.robustness.kinds.commands import reading_bundle
from benchmarks.robustness.seeds import manifest_with, seeds


def _changed(content: bytes, chance: Random, box: Box) -> Damaged:
    way = chance.random()
    if way < 0.6:
        return damaged(content, chance)
    if way < 0.8:
        place, value = chance.randrange(64), chance.randrange(256)
        return content[:place] + bytes((value,)) + content[place + 1 :], f"byte {place} of the header is {value}"
    metadata = {"stride": 32, "names": {"0": "person"}, "imgsz": [640, 640]}
    text = json.dumps(damaged_json(metadata, chance, str(box.outside))[0]).encode("utf-8", "surrogatepass")
    length = len(text) if chance.random() < 0.7 else chance.choice((0, -1, len(text) * 2, 2**31 - 1))
    return length.to_bytes(4, "little", signed=True) + text + content, "another tool's metadata before it"


def _plan(box: Box, chance: Random) -> tuple[bytes, str]:
    """A plan that is damaged, and what was done; its bundle lies in the box."""
    box.bring(seeds().path(chance.choice(("fp16", "rtx") if seeds().has_engine else ("fp16",))), "bundle")
    content = (box.work / "bundle/engine.plan").read_bytes()
    result, what = _changed(content, chance, box)
    while result == content:
        result, what = _changed(content, chance, box)
    return result, what


def _stale(box: Box, chance: Random) -> Case:
    """In its bundle, whose manifest says what it was."""
    content, what = _plan(box, chance)
    box.put("bundle/engine.plan", content)
    return Case(f"engine.plan: {what}", reading_bundle(chance, "bundle"), must_refuse=True)


def _forged(box: Box, chance: Random) -> Case:
    """In its bundle, whose manifest was changed to fit."""
    content, what = _plan(box, chance)
    box.put("bundle/engine.plan", content)
    manifest_with(box.work / "bundle", engine_plan=hashlib.sha256(content).hexdigest())
    return Case(f"engine.plan and its hash: {what}", reading_bundle(chance, "bundle"))


def _alone(box: Box, chance: Random) -> Case:
    """A file of its own, under any name."""
    content, what = _plan(box, chance)
    name = box.put(f"input/model.{chance.choice(('plan', 'engine', 'trt', 'bin', 'onnx', 'plan'))}", content)
    command = chance.choice((("spach-doctor", name), ("spach-doctor", name, "--json"), ("spach-validate", name)))
    return Case(f"a plan alone: {what}", command)


KINDS = (
    Kind("plan", 35, _stale),
    Kind("plan, believed", 25, _forged),
    Kind("plan, alone", 30, _alone),
)
