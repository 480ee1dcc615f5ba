"""Labels of images, and names of classes: of the wrong number, damaged, in text, CSV and JSON."""

from __future__ import annotations

import json
import os
from random import Random

from benchmarks.robustness.box import Box
from benchmarks.robustness.case import Case, Kind
from benchmarks.robustness.damage import damaged, hostile_texts, odd_values
from benchmarks.robustness.kinds.commands import EXPORT
from benchmarks.robustness.seeds import CLASSES, seeds


def _names(box: Box, chance: Random) -> Case:
    """Names of the classes, for a package."""
    lines = [f"class {index}" for index in range(CLASSES)]
    for _ in range(chance.choice((0, 1, 3))):
        lines[chance.randrange(CLASSES)] = chance.choice(hostile_texts(str(box.outside)))
    content = ("\r\n" if chance.random() < 0.2 else "\n").join(lines).encode("utf-8", "surrogatepass")
    what = "odd names"
    if chance.random() < 0.6:
        content, what = damaged(content, chance)
    name = box.put("labels.txt", content)
    if chance.random() < 0.15:
        (box.work / name).unlink()
        chance.choice((os.mkdir, os.mkfifo))(box.work / name)
        what = "no file"
    box.bring(seeds().path("fp16"), "bundle")
    package = chance.choice(("triton", "cpp", "kubernetes"))
    command: tuple[str, ...] = ("spach-package", package, "bundle", "-o", "out/package", "--labels", name)
    return Case(
        f"names of classes: {what}", (*command, "--ensemble") if chance.random() < 0.2 and package != "cpp" else command
    )


def _classes(box: Box, chance: Random) -> Case:
    """Classes of images, for accuracy."""
    box.bring(seeds().path("photos"), "photos")
    names = [str(path.relative_to(box.work / "photos")) for path in sorted((box.work / "photos").rglob("*.*"))]
    pairs = {name: index % CLASSES for index, name in enumerate(names)}
    suffix = chance.choice(("txt", "csv", "json", "npz", "xml"))
    odd = {**pairs, names[0]: chance.choice(odd_values(str(box.outside)))}
    forms = {
        "txt": "".join(f"{name} {value}\n" for name, value in odd.items()),
        "csv": "name,class\n" + "".join(f"{name},{value}\n" for name, value in odd.items()),
        "json": json.dumps(odd),
    }
    content = forms.get(suffix, forms["txt"]).encode("utf-8", "surrogatepass")
    what = f"{ascii(odd[names[0]])[:60]} for a class"
    if chance.random() < 0.5:
        content, what = damaged(content, chance)
    name = box.put(f"labels.{suffix}", content)
    images = ("--images", "photos", "--labels", name)
    if chance.random() < 0.3:
        drop = ("--max-drop", chance.choice(("0.3", "nan", "-1", "1e9")))
        calibration = box.bring(seeds().path("scales.json"), "scales.json").name
        int8 = tuple("--int8" if part == "--fp32" else part for part in EXPORT)
        return Case(f"labels.{suffix}: {what}", (*int8, "--calibration", calibration, *images, *drop))
    box.bring(seeds().path("fp32"), "bundle")
    weights = box.bring(seeds().path("weights.pth"), "weights.pth").name
    return Case(f"labels.{suffix}: {what}", ("spach-validate", "bundle", *images, "--checkpoint", weights))


KINDS = (
    Kind("labels, names", 25, _names),
    Kind("labels, classes", 30, _classes),
)
