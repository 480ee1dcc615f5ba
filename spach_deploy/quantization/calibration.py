"""Calibration: collect statistics of activations over a user's images, and store the resulting plan in a file.

Images are streamed one by one. An interrupted calibration is saved and continued (`CalibrationState`). The calibration
file is JSON: the key (everything but the images that the result depends on), a summary of the images, and the
quantization plan. It is reused only if every entry of the key is the same; else the error names the first difference.
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

from spach_deploy.bundle.inputs import ModelInputs, feeds_of
from spach_deploy.common.errors import BundleError, ImageError, UsageError
from spach_deploy.common.files import Destination, identity, is_own, read_json
from spach_deploy.common.text import json_text
from spach_deploy.data.calibration_set_checks import CalibrationSetCollector, CalibrationSetSummary
from spach_deploy.data.images import content_hash
from spach_deploy.data.preprocess import normalize
from spach_deploy.data.readers import ImageSource, batches
from spach_deploy.options.specs import ImageSize, Preprocessing
from spach_deploy.quantization.plan import QuantizationPlan
from spach_deploy.quantization.statistics import Collector, TensorRequest, TensorStatistics

SCHEMA = 1
GRAPH_FORM = 1
"""Version of the method. Raise it when sites, statistics or scales are found differently: older
files are then refused.
"""

_MOST_BYTES = 1 << 30
"""Largest calibration file that is read, in bytes. That of ten million images has 200 MB."""

_STATE_EVERY_S = 10.0
_BATCH = 1
_FAR = 4.0
"""By which factor the median activation of a set may differ from that of photographs, either way."""


@dataclasses.dataclass(frozen=True)
class CalibrationKey:
    """Everything that a calibration depends on, but for the images. `half`: scales are FP16 numbers."""

    weights_sha256: str
    model: str
    image_size: ImageSize
    format: str
    method: str
    half: bool
    sites: str
    preprocessing: str
    graph_form: int = GRAPH_FORM

    @classmethod
    def of(cls, sites: Sequence[str], preprocessing: Preprocessing, **entries: Any) -> CalibrationKey:
        """A key with hashes of the quantized nodes' names (`sites`) and of the preprocessing."""
        return cls(
            sites=_short_hash("\n".join(sites)),
            preprocessing=_short_hash(json.dumps(dataclasses.asdict(preprocessing), sort_keys=True)),
            **entries,
        )

    def difference(self, other: Mapping[str, Any]) -> str:
        """The first entry in which `other`, the key of a file, differs, as a clause; empty where none does."""
        for name, value in json.loads(json.dumps(dataclasses.asdict(self))).items():
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
    return ("x".join(map(str, value)) if isinstance(value, list) else str(value))[:16]


@dataclasses.dataclass(frozen=True)
class CalibrationProgress:
    """Images done and in total (None: not known). `seconds_left` is None until the first image is done."""

    done: int
    total: int | None
    seconds_left: float | None


@dataclasses.dataclass(frozen=True)
class CollectedStatistics:
    """Statistics by tensor, and the summary of the images. `resumed`: images that an interrupted run had done already.

    `seconds`: time that this run took.
    """

    statistics: dict[str, TensorStatistics]
    summary: CalibrationSetSummary
    seconds: float
    resumed: int = 0


@dataclasses.dataclass(frozen=True)
class CalibrationSettings:
    """How to calibrate. `histograms`: whether the method needs more than the largest |x|. `state`: file for an
    unfinished calibration, which belongs to `key`. `threads` None lets ONNX Runtime choose. `takes`: the graph's
    inputs.
    """

    histograms: bool = True
    state: Path | None = None
    key: CalibrationKey | None = None
    threads: int | None = None
    on_progress: Callable[[CalibrationProgress], None] = lambda progress: None
    takes: ModelInputs = dataclasses.field(default_factory=ModelInputs)


def collect(
    model: ir.Model,
    wanted: Sequence[TensorRequest],
    source: ImageSource,
    preprocessing: Preprocessing,
    run: CalibrationSettings,
) -> CollectedStatistics:
    """Statistics of the FP32 graph `model`, float32 input (B, C, H, W), over all images of `source`.

    One image at a time, so memory is that of one inference and the statistics. Raises ImageError for an unfit set,
    UsageError when an unfinished calibration is of other images, PrecisionError for an activation that is not finite.
    """
    collector = Collector(model, wanted, histograms=run.histograms, threads=run.threads)
    checks = CalibrationSetCollector(source, preprocessing)
    state = CalibrationState(run, collector)
    skip = state.restored_images()
    start = time.monotonic()
    seen = hashlib.sha256()
    for done, batch in enumerate(batches(source, preprocessing, _BATCH), 1):
        checks.see(batch)
        seen.update(content_hash([batch.pixels]).encode())
        if done < skip:
            continue
        if done == skip:
            state.check(seen.hexdigest(), source)
            continue
        collector.run(feeds_of(run.takes.of(normalize(batch.pixels, preprocessing), done - 1)))
        if state.is_due:
            state.save(done, seen.hexdigest())
        run.on_progress(_progress(done, skip, source.count, time.monotonic() - start))
    summary = checks.summary()
    if summary.images < skip:
        state.refuse(source)
    state.remove()
    summary.check()
    return CollectedStatistics(collector.statistics, summary, time.monotonic() - start, skip)


def _progress(done: int, skipped: int, total: int | None, seconds: float) -> CalibrationProgress:
    fresh = done - skipped
    left = None if total is None or fresh < 1 else seconds / fresh * (total - done)
    return CalibrationProgress(done, total, left)


class Collected(Protocol):
    """Anything with statistics by tensor and the number of images that they are of."""

    statistics: dict[str, TensorStatistics]
    images: int


class CalibrationState:
    """File of an unfinished calibration: statistics, the number of images that they are of, and a hash of these images.

    Statistics do not show where they come from, so a file that another user could have written is ignored.
    """

    def __init__(self, run: CalibrationSettings, collected: Collected) -> None:
        self._run, self._collected = run, collected
        self._place = None if run.state is None else Destination.of(run.state)
        self._digest = ""
        self._saved = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether it is time to save again."""
        return self._run.state is not None and time.monotonic() - self._saved > _STATE_EVERY_S

    def restored_images(self) -> int:
        """Load the statistics of an unfinished run; returns how many images are done, 0 where nothing can be loaded."""
        if self._place is None or not is_own(self._place.path):
            return 0
        try:
            with np.load(self._place.path, allow_pickle=False) as arrays:
                head = json.loads(str(arrays["head"]))
                if self._run.key is None or self._run.key.difference(head["key"]):
                    return 0
                statistics = {name: _restored(arrays, index) for index, name in enumerate(head["tensors"])}
        except Exception:  # a damaged file counts as none
            return 0
        self._collected.statistics = statistics
        self._collected.images = int(head["images"])
        self._digest = str(head["digest"])
        return int(head["images"])

    def check(self, digest: str, source: ImageSource) -> None:
        """UsageError unless `digest`, of the images read so far, is that of the unfinished run's images."""
        if digest != self._digest:
            self.refuse(source)

    def refuse(self, source: ImageSource) -> NoReturn:
        """Raise UsageError: the unfinished run is of other images."""
        raise UsageError(
            f"{self._run.state} continues a calibration on other images than {source.description} holds now.",
            f"Delete {self._run.state} to begin again.",
        )

    def save(self, images: int, digest: str) -> None:
        """Write the file atomically. `digest`: hash of the `images` images done."""
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
        """Delete the file: the calibration is finished."""
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
    """Write a file atomically: a kill leaves the old one or the new one. UsageError where it cannot be written."""
    try:
        return place.write(write, mode=mode)
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"{place.path} cannot be written ({reason}).", "Choose another file.") from None


def check_activations(seen: Mapping[str, TensorStatistics], usual: Mapping[str, TensorStatistics], what: str) -> None:
    """ImageError for images whose activations are far larger or smaller than those of photographs.

    `seen`, `usual`: statistics of the same tensors on the calibration images and on photographs. The ratio is the
    median over all tensors, because single ones depend on what is on the pictures. `what` names the images.
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
    """A finished calibration. `images_sha256`: hash of the decoded images, whatever their order.

    `source`: the images, in words. `survey`: summary of the images, as JSON. `digests`: hash of each image.
    """

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
        """The manifest's entry: on which images, with which method the scales were set."""
        return {
            "source": self.source,
            "images": self.images,
            "images_sha256": self.images_sha256,
            "method": self.key.method,
            "weights_sha256": self.key.weights_sha256,
            "survey": dict(self.survey),
        }


def write_calibration(calibration: Calibration, place: Destination) -> None:
    """Write a calibration file atomically. UsageError where it cannot be written."""
    text = json_text(calibration.to_dict(), indent=None, separators=(",", ": "))
    lines = text.replace('{"module"', '\n{"module"').replace('{"name"', '\n{"name"') + "\n"
    _written(place, lambda file: file.write(lines.encode("utf-8")))


def read_calibration(path: Path, key: CalibrationKey) -> Calibration:
    """Read the calibration file at `path`. UsageError, naming the difference, for one that was not made for `key`."""
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
