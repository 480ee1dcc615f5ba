"""What a page is made from (report, manifest, pictures), and how numbers and words are shown.

A report may be another version's or lack a section, so every read has a fallback. Templates have the functions in
`FILTERS` as filters. `pictures_of` makes small JPEGs of the images that the model saw.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from spach_deploy.bundle.inputs import Batch, image_of
from spach_deploy.bundle.schema import EngineSection, GraphSection, Manifest
from spach_deploy.options.specs import Flavour, Preprocessing

Json = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ReportContent:
    """report.json, the bundle's manifest, and pictures as data URIs by image number.

    `made`: when the page is made, ISO 8601; a report itself has no time in it.
    """

    report: Json
    manifest: Manifest | None = None
    pictures: Mapping[int, str] = dataclasses.field(default_factory=dict)
    made: str = ""

    @property
    def engine(self) -> EngineSection:
        """The manifest's; one without a plan where there is no manifest."""
        return EngineSection(flavour=Flavour.NONE) if self.manifest is None else self.manifest.engine

    @property
    def graph(self) -> GraphSection:
        """The manifest's, or an empty one."""
        return GraphSection() if self.manifest is None else self.manifest.graph

    @property
    def evidence(self) -> list[Json]:
        """All runs, the most conclusive first."""
        return list(self.report.get("evidence") or ())

    @property
    def first(self) -> Json:
        """The run that decides; empty where nothing ran."""
        return self.evidence[0] if self.evidence else {}

    @property
    def main(self) -> Json:
        """The comparison of the first run's logits; of its first output where there are none; empty without any."""
        return main_output(self.first)

    @property
    def bounds(self) -> Json:
        """The tolerances of `main`."""
        outputs: Json = self.first.get("tolerances", {}).get("outputs", {})
        found: Json = outputs.get(self.main.get("name", ""), {})
        return found


def main_output(run: Json) -> Json:
    """The comparison of a run's logits; of its first output where there are none; empty without any."""
    outputs = list(run.get("comparison", {}).get("outputs", ()))
    logits = (output for output in outputs if output.get("role", output["name"]) == "logits")
    return next(logits, outputs[0] if outputs else {})


ABSENT = "–"
"""What stands where there is no number."""

_LONGEST_LINE = 64
_WORD = re.compile(r"""(?:\$'(?:\\.|[^'\\])*'|'[^']*'|"(?:\\.|[^"\\])*"|\\.|\S)+""", re.DOTALL)
"""A word of a command line, quotes and all."""

_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def scientific(value: Any) -> str:
    """1.13e-03, as in the terminal. report.json has inf and NaN as text."""
    if value is None:
        return ABSENT
    number = float(value)
    return f"{number:.2e}" if math.isfinite(number) else str(number)


def general(value: Any) -> str:
    """Three digits, such as 0.0351 or 12.4."""
    return ABSENT if value is None else f"{float(value):.3g}"


def times(value: Any) -> str:
    """A factor: 1,322 or 12.4."""
    number = float(value)
    return f"{number:,.0f}" if 100 <= number < math.inf else f"{number:.3g}"


def percent(value: Any, digits: int = 2) -> str:
    """A share of one as 97.50 %."""
    return ABSENT if value is None else f"{100 * float(value):.{digits}f} %"


def count(value: Any) -> str:
    """12,345."""
    return ABSENT if value is None else f"{int(value):,}"


def size(value: Any) -> str:
    """Bytes as 142.3 MB, powers of 1000."""
    if value is None:
        return ABSENT
    number, unit = float(value), 0
    while number >= 1000 and unit < len(_UNITS) - 1:
        number, unit = number / 1000, unit + 1
    return f"{number:.1f} {_UNITS[unit]}" if unit else f"{int(number)} {_UNITS[unit]}"


def seconds(value: Any) -> str:
    """0.04 s, 12.3 s, 2 min 5 s."""
    if value is None:
        return ABSENT
    number = float(value)
    if number >= 60:
        minutes, rest = divmod(round(number), 60)
        return f"{minutes} min {rest} s"
    return f"{number:.1f} s" if number >= 1 else f"{number:.2f} s"


def moment(value: Any) -> str:
    """An ISO 8601 time as 2026-11-25 07:48 UTC."""
    try:
        when = datetime.datetime.fromisoformat(str(value))
    except ValueError:
        return str(value)
    return f"{when:%Y-%m-%d %H:%M} UTC"


def sentence(text: str) -> str:
    """Capitalized, with a full stop at its end."""
    text = text.strip()
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith(('.', '?', '!')) else '.'}"


def command(text: str) -> str:
    """A command line; a long one over several lines as a shell takes it, broken before options."""
    lines = [""]
    for piece in _pieces(_WORD.findall(text)):
        if lines[-1] and len(lines[-1]) + len(piece) > _LONGEST_LINE:
            lines.append("")
        lines[-1] = f"{lines[-1]} {piece}".lstrip()
    return " \\\n    ".join(lines)


def _pieces(words: list[str]) -> list[str]:
    """The words in pieces: an option with its values is one piece."""
    pieces: list[str] = []
    for word in words:
        if pieces and not word.startswith("-"):
            pieces[-1] = f"{pieces[-1]} {word}"
        else:
            pieces.append(word)
    return pieces


def plural(number: int, word: str) -> str:
    """1 image, 2 images."""
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"


FILTERS: dict[str, Callable[..., str]] = {
    "scientific": scientific,
    "general": general,
    "times": times,
    "percent": percent,
    "count": count,
    "size": size,
    "seconds": seconds,
    "moment": moment,
    "sentence": sentence,
    "plural": plural,
    "command": command,
}


SIDE = 176
"""Pixels at most: twice what the page gives a picture, for dense screens."""

_QUALITY = 80

Inputs = Callable[[int, int], Batch]


def pictures_of(inputs: Inputs, preprocessing: Preprocessing, images: Iterable[int]) -> dict[int, str]:
    """Images by number as data URIs (JPEG).

    `inputs(start, stop)`: engine inputs, whose images are uint8 (n, H, W, C) or floats (n, C, H, W) normalized by
    `preprocessing`.
    """
    return {index: _data_uri(pixels_of(image_of(inputs(index, index + 1))[0], preprocessing)) for index in images}


def pixels_of(image: npt.NDArray[Any], preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """One input as uint8 (H, W, 3): RGB, else the first channel in grey."""
    pixels = _levels(image, preprocessing)
    return np.ascontiguousarray(pixels if pixels.shape[-1] == 3 else pixels[..., :1].repeat(3, axis=-1))


def _levels(image: npt.NDArray[Any], preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """One input as uint8 (H, W, C)."""
    if image.dtype == np.uint8:
        return image
    mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    scaled = (image.astype(np.float32) * std + mean) * 255
    levels: npt.NDArray[np.uint8] = np.clip(np.rint(scaled), 0, 255).astype(np.uint8).transpose(1, 2, 0)  # CHW -> HWC
    return levels


def _data_uri(pixels: npt.NDArray[np.uint8]) -> str:
    from PIL import Image

    picture = Image.fromarray(pixels)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
