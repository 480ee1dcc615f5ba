"""Manifests and reports of bundles and packages: entries of the wrong kind, names that climb, damaged text."""

from __future__ import annotations

import re
from random import Random

from benchmarks.robustness.box import Box
from benchmarks.robustness.case import Case, Kind
from benchmarks.robustness.damage import damaged_json_text, hostile_texts
from benchmarks.robustness.kinds.commands import EXPORT, reading_bundle
from benchmarks.robustness.seeds import seeds
from tests.small_bundles import read_manifest, write_manifest


def _damaged(box: Box, chance: Random) -> Case:
    name = chance.choice(("fp16", "fp32", "uint8", "int8", *(("rtx",) if seeds().has_engine else ())))
    box.bring(seeds().path(name), "bundle")
    text = (box.work / "bundle/manifest.json").read_text()
    content, what = damaged_json_text(text, chance, str(box.outside))
    box.put("bundle/manifest.json", content)
    return Case(f"manifest of {name}: {what}", reading_bundle(chance, "bundle"))


def _named(box: Box, chance: Random) -> Case:
    """What becomes file names, YAML, C++ and HTML in a package is a text that means something to each of them."""
    box.bring(seeds().path(chance.choice(("fp16", "uint8"))), "bundle")
    content = read_manifest(box.work / "bundle")
    text = chance.choice(hostile_texts(str(box.outside)))
    place = chance.choice(
        ("model", "input", "output", "interpolation", "gpus", "version", "flavour", "files", "layout")
    )
    if place == "model":
        content["model"]["name"] = text
    elif place in ("input", "output"):
        content[f"{place}s"][0]["name"] = text
    elif place == "layout":
        content["inputs"][0]["layout"] = text
    elif place == "interpolation":
        content["preprocessing"]["interpolation"] = text
    elif place == "files":
        content["files"][text] = {"sha256": "0" * 64, "bytes": 1}
    else:
        content["engine"][place] = [text] if place == "gpus" else text
    write_manifest(box.work / "bundle", content)
    return Case(f"{place} named {text[:40]!r}", reading_bundle(chance, "bundle"))


def _twice(box: Box, chance: Random) -> Case:
    """An object with one name twice: which of both values is read is the reader's affair."""
    box.bring(seeds().path("fp16"), "bundle")
    text = (box.work / "bundle/manifest.json").read_text()
    names = re.findall(r'"(\w+)": ', text)
    name = chance.choice(sorted(set(names)))
    box.put("bundle/manifest.json", text.replace(f'"{name}": ', f'"{name}": null, "{name}": ', 1))
    return Case(f"manifest with {name} twice", reading_bundle(chance, "bundle"), must_refuse=True)


def _report(box: Box, chance: Random) -> Case:
    """The report beside it, which nobody hashes."""
    box.bring(seeds().path("fp16"), "bundle")
    content, what = damaged_json_text((box.work / "bundle/report.json").read_text(), chance, str(box.outside))
    box.put("bundle/report.json", content)
    return Case(f"report.json: {what}", reading_bundle(chance, "bundle"))


def _target(box: Box, chance: Random) -> Case:
    """Where the bundle is to go lies something else."""
    kind = chance.choice(
        ("a project", "a package", "a file", "a link", "a broken bundle", "a folder", "a long name", "a loop")
    )
    must_refuse = True
    if kind == "a project":
        box.put("out/bundle/manifest.json", '{"name": "My app", "icons": []}')
        box.put("out/bundle/index.html", "<html></html>")
    elif kind == "a package":
        box.bring(seeds().path("repository"), "out/bundle")
    elif kind == "a file":
        box.put("out/bundle", b"mine")
    elif kind == "a link":
        (box.work / "out/bundle").symlink_to(box.outside)
    elif kind == "a loop":
        (box.work / "out/bundle").symlink_to(box.work / "out/bundle")
    elif kind == "a folder":
        box.put("out/bundle/thesis.tex", b"mine")
    elif kind == "a long name":
        return Case(kind, (*EXPORT[:-1], f"out/{'n' * chance.choice((200, 240, 256, 5000))}", "--overwrite"))
    else:
        box.bring(seeds().path("fp16"), "out/bundle")
        text = (box.work / "out/bundle/manifest.json").read_text()
        box.put("out/bundle/manifest.json", damaged_json_text(text, chance, str(box.outside))[0])
        must_refuse = False
    packages = tuple(
        ("spach-package", what, "input/bundle", "-o", "out/bundle") for what in ("triton", "cpp", "kubernetes")
    )
    box.bring(seeds().path("fp16"), "input/bundle")
    if kind == "a package":
        packages = packages[1:]
    command = chance.choice((EXPORT, *packages))
    return Case(f"the target is {kind}", (*command, "--overwrite"), must_refuse)


KINDS = (
    Kind("manifest", 80, _damaged),
    Kind("manifest, names", 40, _named),
    Kind("manifest, twice", 10, _twice),
    Kind("report", 10, _report),
    Kind("target", 20, _target),
)
