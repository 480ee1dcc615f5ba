"""Calibration: statistics over a user's images, streamed, continued after a kill, and the file that keeps the result.

A calibration file is JSON: the key (everything that the result depends on), the survey of the images, and the plan made
from them. It is reused only when every entry of the key is the same; what differs is named.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import onnx_ir as ir

from spach_deploy.common.errors import BundleError, ImageError, UsageError
from spach_deploy.common.files import Destination, identity, is_own, read_json
from spach_deploy.common.text import json_text
from spach_deploy.data.calibration_set_checks import CalibrationSetCollector, CalibrationSetSummary
from spach_deploy.data.images import content_hash
from spach_deploy.data.preprocess import normalize
from spach_deploy.data.readers import ImageSource, batches
from spach_deploy.graph.export import INPUT
from spach_deploy.options.specs import Preprocessing
from spach_deploy.quantization.plan import QuantizationPlan
from spach_deploy.quantization.statistics import Collector, TensorRequest, TensorStatistics

SCHEMA = 1
GRAPH_FORM = 1
"""Raised whenever sites, statistics or the way from them to scales change, so that older files are stale."""

_MOST_BYTES = 1 << 30
"""Of a calibration file: that of ten million images has 200 MB."""

_STATE_EVERY_S = 10.0
_BATCH = 1
_FAR = 4.0
"""How many times larger or smaller than on photographs the activations of a set may typically be."""


@dataclasses.dataclass(frozen=True)
class CalibrationKey:
    """What a calibration depends on, beside the images."""

    weights_sha256: str
    model: str
    image_size: int
    format: str
    method: str
    half: bool
    sites: str
    preprocessing: str
    graph_form: int = GRAPH_FORM

    @classmethod
    def of(cls, sites: Sequence[str], preprocessing: Preprocessing, **entries: Any) -> CalibrationKey:
        """With the names of the quantized nodes and the preprocessing as hashes."""
        return cls(
            sites=_short_hash("\n".join(sites)),
            preprocessing=_short_hash(json.dumps(dataclasses.asdict(preprocessing), sort_keys=True)),
            **entries,
        )

    def difference(self, other: Mapping[str, Any]) -> str:
        """In words, the first entry that differs; empty where none does."""
        for name, value in dataclasses.asdict(self).items():
            if other.get(name) != value:
                return f"{_WORDS.get(name, name)}: {_shown(other.get(name))} there, {_shown(value)} now"
        return ""


_WORDS = {
    "weights_sha256": "other weights",
    "model": "another model",
    "image_size": "another image size",
    "sites": "other quantized layers",
    "format": "another format",
    "method": "another method",
    "half": "other types around the layers",
    "graph_form": "another version of spach-deploy's graphs",
}


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _shown(value: Any) -> str:
    return str(value)[:16]


@dataclasses.dataclass(frozen=True)
class CalibrationProgress:
    """How far a calibration is. `seconds_left` is None until the first image is done."""

    done: int
    total: int | None
    seconds_left: float | None


@dataclasses.dataclass(frozen=True)
class CollectedStatistics:
    """Statistics and what the images were. `resumed`: images that an interrupted run had done already."""

    statistics: dict[str, TensorStatistics]
    survey: CalibrationSetSummary
    seconds: float
    resumed: int = 0


@dataclasses.dataclass(frozen=True)
class CalibrationSettings:
    """How to run. `state`: file that keeps an unfinished calibration; `threads` None lets ONNX Runtime choose."""

    histograms: bool = True
    state: Path | None = None
    key: CalibrationKey | None = None
    threads: int | None = None
    on_progress: Callable[[CalibrationProgress], None] = lambda progress: None


def collect(
    model: ir.Model,
    wanted: Sequence[TensorRequest],
    source: ImageSource,
    preprocessing: Preprocessing,
    run: CalibrationSettings,
) -> CollectedStatistics:
    """Statistics of the FP32 graph `model`, float32 input (B, 3, S, S), over all images of `source`.

    One image at a time: memory is that of one inference and the statistics. Raises ImageError for a set that is unfit.
    """
    collector = Collector(model, wanted, histograms=run.histograms, threads=run.threads)
    taker = CalibrationSetCollector(source, preprocessing)
    state = CalibrationState(run, collector)
    skip = state.restored_images()
    start = time.monotonic()
    seen = hashlib.sha256()
    for done, batch in enumerate(batches(source, preprocessing, _BATCH), 1):
        taker.see(batch)
        seen.update(content_hash([batch.pixels]).encode())
        if done < skip:
            continue
        if done == skip:
            state.check(seen.hexdigest(), source)
            continue
        collector.run({INPUT: normalize(batch.pixels, preprocessing)})
        if state.is_due:
            state.save(done, seen.hexdigest())
        run.on_progress(_progress(done, skip, source.count, time.monotonic() - start))
    survey = taker.survey()
    if survey.images < skip:
        state.refuse(source)
    state.remove()
    survey.check()
    return CollectedStatistics(collector.statistics, survey, time.monotonic() - start, skip)


def _progress(done: int, skipped: int, total: int | None, seconds: float) -> CalibrationProgress:
    fresh = done - skipped
    left = None if total is None or fresh < 1 else seconds / fresh * (total - done)
    return CalibrationProgress(done, total, left)


class Collected(Protocol):
    """What has been seen: statistics by tensor, and of how many images."""

    statistics: dict[str, TensorStatistics]
    images: int


class CalibrationState:
    """An unfinished calibration in a file: statistics, how many images they are of, and a hash of these images.

    Nobody can see where statistics come from, so that a file that others may have written is not continued.
    """

    def __init__(self, run: CalibrationSettings, collected: Collected) -> None:
        self._run, self._collected = run, collected
        self._place = None if run.state is None else Destination.of(run.state)
        self._digest = ""
        self._saved = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether it should be saved again."""
        return self._run.state is not None and time.monotonic() - self._saved > _STATE_EVERY_S

    def restored_images(self) -> int:
        """How many images are done already, their statistics taken over; 0 where there is nothing to continue."""
        if self._place is None or not is_own(self._place.path):
            return 0
        try:
            with np.load(self._place.path, allow_pickle=False) as arrays:
                head = json.loads(str(arrays["head"]))
                if self._run.key is None or self._run.key.difference(head["key"]):
                    return 0
                statistics = {name: _restored(arrays, index) for index, name in enumerate(head["tensors"])}
        except Exception:  # a damaged state is as good as none
            return 0
        self._collected.statistics = statistics
        self._collected.images = int(head["images"])
        self._digest = str(head["digest"])
        return int(head["images"])

    def check(self, digest: str, source: ImageSource) -> None:
        """UsageError when the images that were done are others than those that are there now."""
        if digest != self._digest:
            self.refuse(source)

    def refuse(self, source: ImageSource) -> NoReturn:
        """UsageError: the state is of other images."""
        raise UsageError(
            f"{self._run.state} continues a calibration on other images than {source.description} holds now.",
            f"Delete {self._run.state} to begin again.",
        )

    def save(self, images: int, digest: str) -> None:
        """Write the state in one step."""
        key = self._run.key
        if self._place is None or key is None:
            return
        names = list(self._collected.statistics)
        head = {"key": dataclasses.asdict(key), "images": images, "digest": digest, "tensors": names}
        arrays: dict[str, Any] = {"head": np.array(json.dumps(head))}
        for index, name in enumerate(names):
            arrays.update(_stored(self._collected.statistics[name], index))
        self._place = _written(self._place, lambda file: np.savez(file, **arrays), mode=0o600)
        self._saved = time.monotonic()

    def remove(self) -> None:
        """The calibration is whole."""
        if self._place is not None and identity(self._place.path) == self._place.before:
            self._place.path.unlink(missing_ok=True)


def _stored(entry: TensorStatistics, index: int) -> dict[str, Any]:
    fields = {field.name: getattr(entry, field.name) for field in dataclasses.fields(entry)}
    return {f"{index}.{name}": np.asarray(value) for name, value in fields.items() if value is not None}


def _restored(arrays: Any, index: int) -> TensorStatistics:
    fields = dataclasses.fields(TensorStatistics)
    values = {field.name: arrays[f"{index}.{field.name}"] for field in fields if f"{index}.{field.name}" in arrays}
    counts = {name: int(values[name]) for name in ("count", "batches")}
    return TensorStatistics(**{"histogram": None, **values, **counts})


def _written(place: Destination, write: Callable[[Any], object], *, mode: int = 0o666) -> Destination:
    """Write a file so that a kill leaves the old one or the new one. UsageError where it cannot be written."""
    try:
        return place.write(write, mode=mode)
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"{place.path} cannot be written ({reason}).", "Choose another file.") from None


def check_activations(seen: Mapping[str, TensorStatistics], usual: Mapping[str, TensorStatistics], what: str) -> None:
    """ImageError for images that drive the model far outside what photographs do.

    `seen`, `usual`: statistics of the same tensors on the calibration images and on photographs. The typical tensor is
    looked at, the median over all of them, because single ones may differ with what is on the pictures.
    """
    ratios = []
    for name, entry in seen.items():
        reference = float(np.sqrt(usual[name].mean_square.mean())) if name in usual else 0.0
        if reference > 0:
            ratios.append(float(np.sqrt(entry.mean_square.mean())) / reference)
    typical = float(np.median(ratios)) if ratios else 1.0
    if not 1 / _FAR <= typical <= _FAR:
        raise ImageError(
            f"On {what} the model's activations are typically {typical:.2g} times those on photographs, so scales from"
            " them would not fit.",
            "Calibrate on images like those that the model is for.",
        )


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A finished calibration. `images_sha256` is a hash of the decoded images, in any order."""

    key: CalibrationKey
    source: str
    images: int
    images_sha256: str
    survey: Mapping[str, Any]
    plan: QuantizationPlan
    seconds: float
    digests: frozenset[bytes] = dataclasses.field(default=frozenset(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "schema": SCHEMA,
            "key": dataclasses.asdict(self.key),
            "source": self.source,
            "images": self.images,
            "images_sha256": self.images_sha256,
            "seconds": round(self.seconds, 3),
            "survey": dict(self.survey),
            "digests": sorted(digest.hex()[:16] for digest in self.digests),
            "plan": self.plan.to_dict(),
        }

    def summary(self) -> dict[str, Any]:
        """For the manifest: where the scales come from."""
        return {
            "source": self.source,
            "images": self.images,
            "images_sha256": self.images_sha256,
            "method": self.key.method,
            "weights_sha256": self.key.weights_sha256,
            "survey": dict(self.survey),
        }


def write_calibration(calibration: Calibration, place: Destination) -> None:
    """Write a calibration file in one step. UsageError where it cannot be written."""
    text = json_text(calibration.to_dict(), indent=None, separators=(",", ": "))
    lines = text.replace('{"module"', '\n{"module"').replace('{"name"', '\n{"name"') + "\n"
    _written(place, lambda file: file.write(lines.encode("utf-8")))


def read_calibration(path: Path, key: CalibrationKey) -> Calibration:
    """A calibration file that was made for `key`. UsageError, naming the difference, for any other."""
    try:
        content = read_json(path, _MOST_BYTES)
        found, schema = dict(content["key"]), content["schema"]
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}).", "Give images or a calibration file.") from None
    except (ValueError, TypeError, KeyError) as error:
        reason = f" ({error})" if isinstance(error, ValueError) else ""
        raise UsageError(f"{path} is no calibration file{reason}.", "Make one with spach-calibrate.") from None
    difference = key.difference(found) if schema == SCHEMA else f"schema {schema} there, {SCHEMA} now"
    if difference:
        raise UsageError(
            f"The calibration {path} does not fit this export ({difference}).",
            "Calibrate again with spach-calibrate, or give --calibration a folder of images.",
        )
    try:
        return Calibration(
            key=key,
            source=str(content["source"]),
            images=int(content["images"]),
            images_sha256=str(content["images_sha256"]),
            survey=dict(content["survey"]),
            plan=QuantizationPlan.from_dict(content["plan"], str(path)),
            seconds=float(content["seconds"]),
            digests=frozenset(bytes.fromhex(digest) for digest in content["digests"]),
        )
    except (ValueError, TypeError, KeyError, OverflowError, BundleError):
        raise UsageError(f"{path} is a damaged calibration file.", "Make it again with spach-calibrate.") from None
