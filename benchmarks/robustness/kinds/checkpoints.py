"""Checkpoints: damaged bytes of all three formats, damaged headers, and weights that are none."""

from __future__ import annotations

import argparse
import io
import json
from random import Random
from typing import Any

from benchmarks.robustness.box import Box
from benchmarks.robustness.case import Case, Kind, Maker
from benchmarks.robustness.damage import damaged, damaged_json, hostile_texts
from benchmarks.robustness.kinds.commands import OUT, export
from benchmarks.robustness.seeds import CLASSES, MODEL, SIZE, seeds


def _command(box: Box, chance: Random, name: str) -> tuple[str, ...]:
    """Most export it; others validate with it or calibrate it."""
    way = chance.random()
    if way < 0.7:
        more = ("--weights", "ema") if chance.random() < 0.2 else ()
        return export(box, chance, "--checkpoint", name, *more)
    if way < 0.9:
        box.bring(seeds().path("fp32"), "bundle")
        return ("spach-validate", "bundle", "--checkpoint", name)
    box.bring(seeds().path("calibration.npz"), "calibration.npz")
    arguments = ("--checkpoint", name, "--calibration", "calibration.npz", "-o", "out/scales.json")
    return ("spach-calibrate", *MODEL, *arguments)


def _same_weights(box: Box) -> str:
    """A zip has checksums: what comes out of a damaged one must be what went in."""
    path = box.work / OUT / "manifest.json"
    if not path.is_file():
        return ""
    expected = json.loads(seeds().path("fp32/manifest.json").read_text())["model"]["weights_sha256"]
    found = json.loads(path.read_text())["model"]["weights_sha256"]
    return "" if found == expected else "other weights than the checkpoint's were exported"


def _bytes_of(file: str) -> Maker:
    def make(box: Box, chance: Random) -> Case:
        content, what = damaged(seeds().read(file), chance)
        command = _command(box, chance, box.put(f"input/{file}", content))
        return Case(f"{file}: {what}", command, check=_same_weights if file == "weights.pth" else None)

    return make


def _safetensors_header(box: Box, chance: Random) -> Case:
    """Offsets, shapes and types that are wrong."""
    content = seeds().read("weights.safetensors")
    length = int.from_bytes(content[:8], "little")
    header, what = damaged_json(json.loads(content[8 : 8 + length]), chance, str(box.outside))
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    stated = len(text) if chance.random() < 0.9 else chance.choice((0, 1, len(text) + 1, 1 << 31, (1 << 63) - 1))
    name = box.put("input/weights.safetensors", stated.to_bytes(8, "little") + text + content[8 + length :])
    return Case(f"header of safetensors: {what}", _command(box, chance, name))


def _wrong_tensors(box: Box, chance: Random) -> Case:
    """A well-formed file whose content is no weights of this model."""
    import torch

    content = torch.load(seeds().path("weights.pth"), weights_only=False)
    state, key = content["model"], chance.choice(sorted(content["model"]))
    tensor = state[key]
    replacements: dict[str, Any] = {
        "half the rows": tensor[: tensor.shape[0] // 2] if tensor.ndim else tensor,
        "no rows": tensor[:0] if tensor.ndim else tensor,
        "another dimension": tensor[None],
        "NaN": torch.full_like(tensor, float("nan")),
        "infinity": torch.full_like(tensor, float("inf")),
        "1e38": torch.full_like(tensor, 1e38),
        "zeros": torch.zeros_like(tensor),
        "complex numbers": tensor.to(torch.complex64),
        "integers": tensor.to(torch.int8),
        "float64": tensor.double(),
        "float8": tensor.float().to(torch.float8_e4m3fn),
        "sparse": tensor.float().to_sparse(),
        "meta": tensor.to("meta"),
        "a number": 3,
        "None": None,
        "a list": [1, 2],
        "an expanded tensor": torch.zeros(1).expand(10**6),
        "a mapping": {"weight": tensor},
        "bytes": b"weights",
    }
    name = chance.choice(sorted(replacements))
    state[key] = replacements[name]
    return Case(f"{key} is {name}", _command(box, chance, _saved(box, content)))


def _odd_structure(box: Box, chance: Random) -> Case:
    """Names, nesting and `args` that nobody expects."""
    import torch

    content = torch.load(seeds().path("weights.pth"), weights_only=False)
    text = chance.choice(hostile_texts(str(box.outside)))
    model, circle = content["model"], {}  # type: ignore[var-annotated]
    circle["model"] = circle
    first = next(iter(model))
    odd: dict[str, Any] = {
        "a name of ours": {**content, "model": {**model, text: model[first]}},
        "one tensor renamed": {**content, "model": {(text if k == first else k): v for k, v in model.items()}},
        "itself inside": circle,
        "a list": [model],
        "a tensor": model[first],
        "nothing": {},
        "a text": text,
        "a number as a name": {**content, "model": {**model, 7: model[first]}},
        "names twice": {"model": {**model, f"module.{first}": model[first]}},
        "args of text": {**content, "args": text},
        "args.model": {**content, "args": argparse.Namespace(model=text, input_size=SIZE)},
        "args.input_size": {
            **content,
            "args": argparse.Namespace(model="small_robust", input_size=chance.choice(_SIZES)),
        },
        "args.nb_classes": {**content, "args": {"nb_classes": chance.choice(_SIZES)}},
        "args that hold args": {**content, "args": argparse.Namespace(args=argparse.Namespace(model=text))},
        "deep nesting": _nested(model, 30),
        "an ema of text": {"model_ema": text},
        "only an ema": {"model_ema": model},
    }
    name = chance.choice(sorted(odd))
    return Case(f"checkpoint of {name}", _command(box, chance, _saved(box, odd[name])))


_SIZES = (-1, 0, 10**30, float("nan"), "224", None, [224, 224], (3, 224, 224), True, CLASSES + 1)


def _nested(content: Any, depth: int) -> Any:
    for _ in range(depth):
        content = {"model": content}
    return content


def _saved(box: Box, content: Any) -> str:
    import torch

    file = io.BytesIO()
    torch.save(content, file)
    return box.put("input/weights.pth", file.getvalue())


KINDS = (
    Kind("checkpoint, zip", 70, _bytes_of("weights.pth")),
    Kind("checkpoint, legacy", 40, _bytes_of("legacy.pth")),
    Kind("checkpoint, safetensors", 30, _bytes_of("weights.safetensors")),
    Kind("checkpoint, safetensors header", 30, _safetensors_header),
    Kind("checkpoint, wrong tensors", 40, _wrong_tensors),
    Kind("checkpoint, odd structure", 40, _odd_structure),
)
