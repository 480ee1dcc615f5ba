"""Session: run a bundle from Python, in TensorRT if its engine runs on this machine, else in ONNX Runtime or OpenVINO.

with Session(bundle) as session:
    session.predict("photo.jpg", top_k=5)
    session.run(array)["logits"]
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from spach_deploy.bundle.outputs import model_outputs, of_role, softmax
from spach_deploy.bundle.schema import IMAGE_LAYOUTS, Form, TensorInfo
from spach_deploy.bundle.store import GRAPH, PLAN, Bundle
from spach_deploy.common.errors import MismatchError, SpachError, UnavailableError, UsageError, printable
from spach_deploy.common.machine import MOST_THREADS, available_threads, has_vnni
from spach_deploy.common.text import noun
from spach_deploy.options.specs import BatchProfile, Flavour, IODtype, Preprocessing, Role
from spach_deploy.runtime import Runner
from spach_deploy.runtime.warm_start import StartOptions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Self

    from spach_deploy.data.images import ImageSource
    from spach_deploy.data.readers import Pictures

Runtime = Literal["auto", "engine", "onnxruntime", "openvino"]
AUTO, ENGINE, ONNX_RUNTIME, OPENVINO = "auto", "engine", "onnxruntime", "openvino"
TITLES: Mapping[str, str] = {ENGINE: "the engine", ONNX_RUNTIME: "ONNX Runtime", OPENVINO: "OpenVINO"}
_USUAL_TOP_K = 5


@dataclasses.dataclass(frozen=True)
class ClassScore:
    """A class: its index in the model's outputs, its probability, and its name where labels were given."""

    index: int
    probability: float
    label: str | None = None


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Result for one image: its name, its best classes, the most probable first (none without logits), and by name the
    other outputs that the model computes: an embedding (C), feature maps (C, H, W) or (H W, C).
    """

    name: str
    classes: tuple[ClassScore, ...]
    outputs: Mapping[str, NDArray[Any]] = dataclasses.field(default_factory=dict, repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class _Settings:
    threads: int
    batch: int
    start: StartOptions


class LocalRunner(Runner, Protocol):
    """A runner on this machine."""

    @property
    def device(self) -> str:
        """`cuda` or `cpu`. May be used inside its context only."""


class Session:
    """Runs a bundle inside a `with` block, in one thread at a time.

    `bundle`: a bundle or its path. `runtime`: auto, or the only one to use. `labels`: names of the classes, a file with
    one per line or a sequence.
    `batch`: how many images `predict` runs at once; by default the batch that the bundle's profile is tuned for.
    `threads`: CPU threads, by default all cores. `runtime_cache`: whether an engine of TensorRT for RTX keeps the
    kernels that it compiles for this GPU, so that the next process starts sooner: in the user's cache folder, or in the
    file of this path. `cuda_graphs`: it captures itself as a CUDA graph for each batch size, and replays that.

    Inside the block, `runtime` is what runs (engine, onnxruntime or openvino), `device` where (cuda or cpu), `name`
    both in words, and `notes` are sentences for the user: why the engine does not run, what makes the graph slow or
    wrong on this machine. Entering raises UnavailableError, with the reasons, where this machine cannot run the bundle,
    or not in the given runtime.
    """

    def __init__(
        self,
        bundle: Bundle | str | os.PathLike[str],
        *,
        runtime: Runtime = "auto",
        labels: str | os.PathLike[str] | Sequence[str] | None = None,
        batch: int | None = None,
        threads: int | None = None,
        runtime_cache: bool | str | os.PathLike[str] = True,
        cuda_graphs: bool = False,
    ) -> None:
        if runtime not in (AUTO, *TITLES):
            raise UsageError(f"{runtime!r} is no runtime.", f"Give one of {', '.join((AUTO, *TITLES))}.")
        self.bundle = _opened(bundle)
        self.runtime: str = runtime
        self.device = ""
        self.notes: tuple[str, ...] = ()
        self._asked = runtime
        self._facts = _Facts.of(self.bundle)
        if labels is not None and self._facts.logits is None:
            raise self._facts.no_classes("--labels", self.bundle)
        self._labels = _labels(labels, self._facts.classes)
        self._batch = self._facts.checked_batch(batch)
        start = StartOptions(runtime_cache is not False, _cache_file(runtime_cache), cuda_graphs)
        self._settings = _Settings(_checked_threads(threads), self._batch, start)
        self._exit = contextlib.ExitStack()
        self._runner: LocalRunner | None = None

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self.runtime, self._runner, reasons = self._open(stack)
            self.device = self._runner.device
            self.notes = tuple(self._remarks(reasons))
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner = None
        self._exit.close()

    @property
    def name(self) -> str:
        """Runtime and device, in words."""
        return self._running().name

    def run(self, array: NDArray[Any] | Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Outputs by name for preprocessed images; more than the profile's largest batch are split.

        `array`: the engine's input, normalized float32 or float16 (N, C, H, W), or with --io-dtype uint8 pixels
        (N, H, W, C); of a graph with several inputs a dictionary of them. Nothing is converted: UsageError for another
        dtype or shape.
        """
        import numpy as np

        runner, wanted = self._running(), self._facts.inputs
        named = array if isinstance(array, Mapping) else {wanted[0].name: array}
        if named.keys() != {tensor.name for tensor in wanted}:
            names, had = ", ".join(tensor.name for tensor in wanted), ", ".join(map(str, named))
            given = had if isinstance(array, Mapping) else "one array"
            raise UsageError(f"This bundle takes {names}, not {given}.", "Give a dictionary of arrays by these names.")
        feeds = {tensor.name: np.asarray(named[tensor.name]) for tensor in wanted}
        for tensor in wanted:
            self._facts.check_fits(tensor, feeds[tensor.name])
        if len({len(given) for given in feeds.values()}) > 1:
            sizes = ", ".join(f"{name} {len(given)}" for name, given in feeds.items())
            raise UsageError(f"The inputs are not of one batch: {sizes}.", "Give as many rows of each.")
        return runner.run({name: np.ascontiguousarray(given) for name, given in feeds.items()})

    def predict(self, images: Pictures, top_k: int | None = None) -> list[Prediction]:
        """The best classes of each picture, in order; `top_k` of them, five or all if fewer by default. Without logits
        there are none, and `Prediction.outputs` has what there is.

        `images`: a path of a picture, a folder, a tar or an npz; a Pillow image; pixels (H, W, C) or (N, H, W, C),
        uint8 or floats in 0..1; or a list of these. They are resized, cropped and normalized as the bundle's manifest
        says.
        Pictures of folders and archives that cannot be read are skipped with a warning; ImageError where none can.
        """
        return list(self.predictions(images, top_k))

    def predictions(self, images: Pictures | ImageSource, top_k: int | None = None) -> Iterator[Prediction]:
        """`predict` as an iterator, in bounded memory. With an `ImageSource`, `skipped` of it has the unreadable
        images.
        """
        from spach_deploy.data.images import ImageSource
        from spach_deploy.data.readers import open_pictures

        if len(self._facts.inputs) > 1:
            names = ", ".join(tensor.name for tensor in self._facts.inputs)
            raise UsageError(
                f"{self.bundle.path} takes several inputs ({names}), and pictures alone are one.",
                "Give all of them to Session.run, as a dictionary of arrays (docs/python.md).",
            )
        if top_k is not None and self._facts.logits is None:
            raise self._facts.no_classes("--top-k", self.bundle)
        count = self._facts.checked_top_k(top_k)
        if isinstance(images, ImageSource):
            return self._predictions(images, count)
        return self._and_warn(open_pictures(images), count)

    def _and_warn(self, source: ImageSource, count: int) -> Iterator[Prediction]:
        yield from self._predictions(source, count)
        if source.skipped:
            warnings.warn(f"Skipped {'; '.join(map(str, source.skipped))}", stacklevel=3)

    def _predictions(self, source: ImageSource, count: int) -> Iterator[Prediction]:
        from spach_deploy.data.images import batches
        from spach_deploy.data.preprocess import to_input

        for batch in batches(source, self._facts.preprocessing, self._batch):
            inputs = to_input(batch.pixels, self._facts.preprocessing, self._facts.io_dtype)
            outputs = self.run(inputs)
            scores = None if self._facts.logits is None else probabilities(outputs, self._facts.outputs)
            for index, name in enumerate(batch.names):
                self._running()  # the block may have ended since this batch ran
                others = {other: outputs[other][index] for other in self._facts.others}
                row = None if scores is None else scores[index]
                if not _is_finite(row, others):
                    raise MismatchError(
                        f"{printable(name)}: what {self.name} answers is not finite.",
                        f"spach-validate {self.bundle.path} --images PATH says where that begins.",
                    )
                yield Prediction(name, () if row is None else tuple(self._best(row, count)), others)

    def _best(self, row: NDArray[np.float64], count: int) -> Iterator[ClassScore]:
        for index in (-row).argsort(kind="stable")[:count].tolist():
            yield ClassScore(index, float(row[index]), None if self._labels is None else self._labels[index])

    def _running(self) -> LocalRunner:
        if self._runner is None:
            raise UsageError("The session is not open.", "Use it within `with bundle.session() as session:`.")
        return self._runner

    def _open(self, stack: contextlib.ExitStack) -> tuple[str, LocalRunner, dict[str, str]]:
        """Open the first runtime that works: its name, its runner, and by name why those before it do not work."""
        names = self._facts.order if self._asked == AUTO else (self._asked,)
        reasons: dict[str, str] = {}
        for name in names:
            try:
                return name, stack.enter_context(_OPENERS[name](self.bundle, self._settings)), reasons
            except SpachError as error:
                if self._asked == ONNX_RUNTIME and isinstance(error, UnavailableError) and not error.hint:
                    error.hint = f"Run it with --runtime {OPENVINO}, or leave --runtime out to take what runs it."
                if self._asked != AUTO:
                    raise
                reasons[name] = error.message.removeprefix("The engine cannot run here: ").rstrip(".")
        told = "; ".join(f"{TITLES[name]}: {reason}" for name, reason in reasons.items())
        raise UnavailableError(f"Nothing here can run {self.bundle.path}. {told}.", "pip install 'spach-deploy[cpu]'")

    def _remarks(self, reasons: Mapping[str, str]) -> Iterator[str]:
        if self.bundle.plan is not None and ENGINE in reasons:
            yield f"The engine does not run here: {reasons[ENGINE]}."
        if problem := getattr(self._runner, "problem", ""):
            yield problem
        if self.runtime != ENGINE or self.bundle.manifest.engine.flavour is not Flavour.TENSORRT_RTX:
            start = self._settings.start
            given = (("runtime_cache", start.runtime_cache_file is not None), ("cuda_graphs", start.cuda_graphs))
            for name in (name for name, is_given in given if is_given):
                yield f"{name} does nothing here: it is for an engine of TensorRT for RTX, and {self.name} runs."
        if self.runtime != ENGINE and self.bundle.manifest.form is Form.TENSORRT:
            yield (
                f"The graph has the form for TensorRT's compiler and is slower in {TITLES[self.runtime]} than one that"
                " is exported with --engine none."
            )
        if self.runtime == ONNX_RUNTIME and self.device == "cpu" and self.bundle.quantizes_fp16:
            from spach_deploy.runtime.onnxruntime_runner import REMEDY, fault_of, truncating_runtime

            if (version := truncating_runtime()) is not None:
                yield f"{fault_of(version)}, so that its answers are wrong. {REMEDY}"


def probabilities(outputs: Mapping[str, NDArray[Any]], tensors: Sequence[TensorInfo]) -> NDArray[np.float64]:
    """Probabilities, float64 (N, classes): the graph's own output if it has one, else the softmax of its logits."""
    import numpy as np

    given = of_role(tensors, Role.PROBABILITIES)
    if given is not None:
        return outputs[given.name].astype(np.float64)
    logits = of_role(tensors, Role.LOGITS)
    assert logits is not None
    return softmax(outputs[logits.name])


def _is_finite(row: NDArray[np.float64] | None, others: Mapping[str, NDArray[Any]]) -> bool:
    import numpy as np

    if row is not None and not row[0] >= 0:  # NaN: the softmax of logits that are not finite
        return False
    return all(bool(np.isfinite(values).all()) for values in others.values())


def _opened(given: Bundle | str | os.PathLike[str]) -> Bundle:
    """The bundle, opened where its path is given."""
    if isinstance(given, (str, os.PathLike)):
        return Bundle.open(Path(given))
    if not isinstance(given, Bundle):
        raise UsageError(f"{type(given).__name__} is neither a bundle nor a path.", "Give a Bundle or its path.")
    return given


def _cache_file(runtime_cache: bool | str | os.PathLike[str]) -> Path | None:
    if isinstance(runtime_cache, bool):
        return None
    if not isinstance(runtime_cache, (str, os.PathLike)):
        raise UsageError(f"runtime_cache={runtime_cache!r} is not possible.", "Give True, False or a file's path.")
    return Path(runtime_cache)


def _checked_threads(threads: int | None) -> int:
    if threads is None:
        return available_threads()
    if (whole := _whole(threads, MOST_THREADS)) is None:
        raise UsageError(f"threads={threads!r} is not possible.", f"Give 1 to {MOST_THREADS}.")
    return whole


def _whole(given: object, most: int) -> int | None:
    """`given` where it is an integer, Python's or NumPy's, from 1 to `most`; else None."""
    try:
        number = operator.index(given)  # type: ignore[arg-type]
    except TypeError:
        return None
    return number if 1 <= number <= most and not isinstance(given, bool) else None


def _labels(given: str | os.PathLike[str] | Sequence[str] | None, classes: int) -> tuple[str, ...] | None:
    """Names of the classes, from a file or a sequence; UsageError if their number is not `classes`."""
    from spach_deploy.data.labels import read_labels

    if given is None:
        return None
    if isinstance(given, (str, os.PathLike)):
        return read_labels(Path(given), classes)
    if len(given) != classes:
        raise UsageError(
            f"There are {len(given)} labels for {classes} {noun(classes, 'class')}.",
            "Give one for each, in their order.",
        )
    return tuple(given)


@dataclasses.dataclass(frozen=True)
class _Facts:
    """Facts of a manifest: the bundle's inputs, preprocessing and batch profile, and the order of runtimes to try."""

    inputs: tuple[TensorInfo, ...]
    io_dtype: IODtype
    preprocessing: Preprocessing
    profile: BatchProfile
    classes: int
    outputs: tuple[TensorInfo, ...]
    order: tuple[str, ...]

    @classmethod
    def of(cls, bundle: Bundle) -> _Facts:
        manifest = bundle.manifest
        on_cpu = (OPENVINO, ONNX_RUNTIME) if bundle.is_for_openvino else (ONNX_RUNTIME, OPENVINO)
        return cls(
            manifest.inputs,
            manifest.output_options.io_dtype,
            manifest.preprocessing,
            manifest.batch,
            manifest.model.num_classes,
            manifest.outputs,
            (ENGINE, *on_cpu),
        )

    @property
    def logits(self) -> TensorInfo | None:
        """The logits; None where the graph has none to rank: of one class they are a number."""
        return None if self.classes == 1 else of_role(self.outputs, Role.LOGITS)

    @property
    def others(self) -> tuple[str, ...]:
        """The other outputs that the model computes."""
        ranked = None if self.logits is None else self.logits.name
        return tuple(tensor.name for tensor in model_outputs(self.outputs) if tensor.name != ranked)

    def no_classes(self, option: str, bundle: Bundle) -> UsageError:
        """The error for an option that is about classes, where there are none."""
        names = ", ".join(tensor.name for tensor in self.outputs)
        one = " of one class" if self.classes == 1 else ""
        what = f"{option} is about classes, and {bundle.path} gives {names}{one} alone."
        return UsageError(what, f"Leave {option} out.")

    def check_fits(self, wanted: TensorInfo, given: NDArray[Any]) -> None:
        """UsageError for an array of another dtype or shape than an input has."""
        fits = given.ndim == len(wanted.shape) and given.shape[1:] == wanted.shape[1:] and len(given) > 0
        if str(given.dtype) == wanted.dtype and fits:
            return
        shape = ", ".join("N" if extent is None else str(extent) for extent in wanted.shape)
        is_one = len(self.inputs) == 1
        meaning = f", {self.meaning}" if is_one or wanted.layout in IMAGE_LAYOUTS else ""
        raise UsageError(
            f"This bundle takes {'' if is_one else f'{wanted.name}, '}{wanted.dtype} ({shape}){meaning}, not"
            f" {given.dtype} {given.shape}.",
            "Convert it, or give pictures as they are to predict." if is_one else "Convert it.",
        )

    @property
    def meaning(self) -> str:
        """The images' values, in words."""
        if self.io_dtype is not IODtype.UINT8:
            return "normalized"
        return f"{'RGB ' if self.preprocessing.channels == 3 else ''}pixels from 0 to 255"

    def checked_batch(self, batch: int | None) -> int:
        """How many images run at once; UsageError for more than the profile's largest batch."""
        if batch is None:
            return self.profile.opt
        if (whole := _whole(batch, self.profile.max)) is None:
            raise UsageError(f"A batch of {batch!r} is not in the bundle's profile.", f"Give 1 to {self.profile.max}.")
        return whole

    def checked_top_k(self, top_k: int | None) -> int:
        """How many classes a prediction has; UsageError for more than the model has."""
        if top_k is None:
            return min(_USUAL_TOP_K, self.classes)
        if (whole := _whole(top_k, self.classes)) is None:
            raise UsageError(f"The model has {self.classes} classes, not {top_k!r}.", f"Give 1 to {self.classes}.")
        return whole


def _engine(bundle: Bundle, settings: _Settings) -> LocalRunner:
    from spach_deploy.runtime.tensorrt_runner import TensorRTRunner

    if bundle.plan is None:
        reason = bundle.manifest.engine.why_none
        raise UnavailableError(f"Bundle {bundle.path} has no engine: {reason}.", "Let another runtime run its graph.")
    return TensorRTRunner(bundle.file(PLAN).read_bytes(), bundle.manifest.engine.flavour, start=settings.start)


def _onnx_runtime(bundle: Bundle, settings: _Settings) -> LocalRunner:
    from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner

    _check_processor(bundle)
    return OnnxRuntimeRunner(bundle.file(GRAPH), threads=settings.threads, max_batch=settings.batch, on_gpu=True)


def _openvino(bundle: Bundle, settings: _Settings) -> LocalRunner:
    from spach_deploy.runtime.openvino_runner import runner_of

    _check_processor(bundle)
    return runner_of(bundle, threads=settings.threads, max_batch=settings.batch)


def _check_processor(bundle: Bundle) -> None:
    if bundle.needs_vnni and not has_vnni():
        raise UnavailableError("Its INT8 graph is for CPUs with VNNI, and this one has none.", "Export without --vnni.")


_OPENERS: Mapping[str, Callable[[Bundle, _Settings], LocalRunner]] = {
    ENGINE: _engine,
    ONNX_RUNTIME: _onnx_runtime,
    OPENVINO: _openvino,
}
