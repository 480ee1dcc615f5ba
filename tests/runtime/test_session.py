"""A bundle that runs: what takes it, what it is fed, and what it says."""

from __future__ import annotations

import dataclasses
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import spach_deploy
from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.store import GOLDEN, GRAPH
from spach_deploy.common.errors import ImageError, MissingPackageError, UnavailableError, UsageError
from spach_deploy.data.images import probe_source
from spach_deploy.options.specs import EngineTarget, ExportOptions, Flavour, IODtype, ModelSpec, OutputSpec, Precision
from spach_deploy.pipeline.export import export
from spach_deploy.runtime import onnxruntime_runner, tensorrt_runner
from spach_deploy.runtime import session as sessions
from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner
from spach_deploy.runtime.openvino_runner import OpenVinoRunner
from spach_deploy.runtime.session import Runtime, Session
from spach_deploy.runtime.warm_start import StartOptions
from tests import small_bundles
from tests.quantization import small_quantized
from tests.shared import once

pytest.importorskip("onnxruntime")

PROBES = Path(spach_deploy.__file__).parent / "data" / "probes"
NAMES = [str(path) for path in sorted(PROBES.glob("*.jpg"))]


def opened(path: Path) -> spach_deploy.Bundle:
    return spach_deploy.Bundle.open(path)


def fp16() -> spach_deploy.Bundle:
    """With a plan that does not run here, and every output there is."""
    return opened(small_bundles.bundle(Precision.FP16))


def uint8() -> spach_deploy.Bundle:
    """It takes pixels, in batches of two to four."""

    def make(target: Path) -> None:
        model = ModelSpec(small_bundles.NAME, image_size=small_bundles.SIZE, num_classes=small_bundles.CLASSES)
        outputs = OutputSpec(IODtype.UINT8)
        with small_bundles.registered():
            engine = EngineTarget(Flavour.NONE, batch=dataclasses.replace(EngineTarget().batch, min=2, opt=3, max=4))
            export(ExportOptions(model, Precision.FP32, outputs, engine, output=target))

    return opened(once("small-bundles/uint8", make))


def int8() -> spach_deploy.Bundle:
    return opened(small_quantized.bundle(Precision.INT8))


def agrees(bundle: spach_deploy.Bundle, logits: Any) -> bool:
    """Whether these are the golden pack's, as closely as a validation wants it."""
    wanted = Golden.load(bundle.file(GOLDEN)).outputs["logits"]
    assert logits.shape == wanted.shape
    error = np.linalg.norm(logits.astype(np.float64) - wanted) / np.linalg.norm(wanted)
    return bool(error < bundle.manifest.validation.tolerances.graph.outputs["logits"].rel_l2)


@pytest.mark.parametrize("make", [fp16, uint8, int8], ids=lambda make: str(make.__name__))
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_it_answers_as_pytorch_does_on_the_golden_images(make: Any, runtime: Any) -> None:
    pytest.importorskip(runtime)
    bundle = make()
    golden = Golden.load(bundle.file(GOLDEN))
    with bundle.session(runtime=runtime) as session:
        assert (session.runtime, session.device) == (runtime, "cpu")
        assert agrees(bundle, session.run(golden.input)["logits"])


def test_photographs_are_prepared_as_the_export_prepared_them() -> None:
    """The golden images are the built-in photographs, so that predictions are the softmax of the golden logits."""
    for bundle in (fp16(), uint8()):
        logits = Golden.load(bundle.file(GOLDEN)).outputs["logits"].astype(np.float64)
        wanted = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        with bundle.session() as session:
            found = session.predict(PROBES, top_k=2)
        assert [prediction.name for prediction in found] == NAMES
        for row, prediction in zip(wanted, found, strict=True):
            assert [best.index for best in prediction.classes] == np.argsort(-row)[:2].tolist()
            assert [best.probability for best in prediction.classes] == pytest.approx(np.sort(row)[::-1][:2], rel=1e-2)


def test_pictures_come_in_any_form(tmp_path: Path) -> None:
    picture = next(iter(probe_source())).image
    pixels = np.asarray(picture)
    npz = tmp_path / "two.npz"
    np.savez(npz, images=np.stack([pixels, pixels]))
    with fp16().session() as session:
        (wanted,) = session.predict(NAMES[0])
        assert len(wanted.classes) == 5
        forms: list[Any] = [picture, pixels, np.stack([pixels, pixels]), npz, str(npz)]
        found = [prediction for form in forms for prediction in session.predict(form)]
        assert {prediction.classes for prediction in found} == {wanted.classes}
        many = session.predict([NAMES[0], pixels, npz])
    assert [prediction.name for prediction in many] == [NAMES[0], "image 1", f"{npz}/image 0", f"{npz}/image 1"]


def test_what_cannot_be_read_is_skipped_with_a_warning(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with fp16().session() as session:
        with pytest.warns(UserWarning, match=r"Skipped .*bad\.png: It is not a picture"):
            found = session.predict(tmp_path)
        assert [prediction.name for prediction in found] == [f"{tmp_path / 'good.png'}"]
        with pytest.raises(ImageError, match=r"The image in .*bad\.png"):
            session.predict(tmp_path / "bad.png")
        wrongs: tuple[tuple[Any, str], ...] = ((tmp_path / "none.png", "There is no"), ([], "empty list"))
        for wrong, reason in wrongs:
            with pytest.raises(ImageError, match=reason):
                session.predict(wrong)
        with pytest.raises(ImageError, match=r"not int32 \(4, 4, 3\)"):
            session.predict(np.zeros((4, 4, 3), np.int32))


def test_a_picture_in_memory_that_cannot_be_decoded_is_an_image_error(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    closed = Image.new("RGB", (40, 40))
    closed.close()
    with fp16().session() as session, Image.open(path) as truncated:
        for picture in (truncated, closed):
            with pytest.raises(ImageError, match=r"^The image in memory cannot be used \(image 0: It cannot be"):
                session.predict(picture)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (b"a.png", "^bytes is no picture. Give a path, a Pillow image"),
        (None, "^NoneType is no picture"),
        ({"a.png"}, "^set is no picture"),
        ([io.BytesIO()], "^BytesIO is no picture"),
        (torch.zeros(3, 4, 4), "^Tensor is no picture"),
        ("", "The path is empty"),
    ],
)
def test_what_is_no_picture_is_refused_with_what_is_taken(given: Any, sentence: str) -> None:
    with fp16().session() as session, pytest.raises(UsageError, match=sentence):
        session.predict(given)


def test_batches_of_any_size_give_the_same() -> None:
    bundle = uint8()
    golden = Golden.load(bundle.file(GOLDEN)).input
    with bundle.session() as session:
        whole = session.run(golden)["logits"]
        for size in (1, 3, 5):
            np.testing.assert_allclose(session.run(golden[:size])["logits"], whole[:size], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.zeros((1, 3, 32, 32)), r"takes float32 \(N, 3, \d+, \d+\), normalized, not float64 \(1, 3, 32, 32\)"),
        (np.zeros((0, 3, small_bundles.SIZE, small_bundles.SIZE), np.float32), r"not float32 \(0, 3"),
        (np.float32(1), r"not float32 \(\)"),
    ],
)
def test_an_array_that_does_not_fit_is_refused_with_what_is_wanted(array: Any, sentence: str) -> None:
    with fp16().session() as session, pytest.raises(UsageError, match=sentence):
        session.run(array)


def test_labels_name_the_classes(tmp_path: Path) -> None:
    classes = small_bundles.CLASSES
    names = [f"thing {index}" for index in range(classes)]
    (tmp_path / "labels.txt").write_text("\n".join(names))
    for labels in (tmp_path / "labels.txt", names):
        with fp16().session(labels=labels) as session:
            best = session.predict(NAMES[0], top_k=1)[0].classes[0]
        assert best.label == f"thing {best.index}"
    with pytest.raises(UsageError, match=f"2 labels for {classes} classes"):
        fp16().session(labels=["a", "b"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"runtime": "fastest"}, "is no runtime"),
        ({"batch": 33}, "batch of 33"),
        ({"batch": 0}, "batch of 0"),
        ({"batch": "8"}, "batch of '8' is not"),
        ({"threads": 0}, "threads=0 is not possible. Give 1 to 1024"),
        ({"threads": 1025}, "threads=1025"),
        ({"threads": 1.5}, "threads=1.5"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        fp16().session(**options)


def test_top_k_is_of_the_classes_there_are() -> None:
    classes = small_bundles.CLASSES
    with fp16().session() as session:
        assert len(session.predict(NAMES[0], top_k=classes)[0].classes) == classes
        with pytest.raises(UsageError, match=f"The model has {classes} classes, not {classes + 1}"):
            session.predict(NAMES[0], top_k=classes + 1)
        for wrong in (1.5, "2", True):
            with pytest.raises(UsageError, match=f"The model has {classes} classes, not {wrong!r}"):
                session.predict(NAMES[0], top_k=wrong)  # type: ignore[arg-type]
        assert len(session.predict(NAMES[0], top_k=np.int64(2))[0].classes) == 2  # type: ignore[arg-type]


def test_a_session_takes_a_path_and_a_validation_a_bundle() -> None:
    with Session(fp16().path, threads=1) as session:
        assert len(session.predict(NAMES[0])) == 1
    with pytest.raises(UsageError, match=r"^int is neither a bundle nor a path"):
        Session(3)  # type: ignore[arg-type]


def test_it_runs_in_its_block_alone() -> None:
    session = fp16().session()
    with pytest.raises(UsageError, match="not open"):
        session.run(np.zeros(1))
    with session:
        assert session.name == "ONNX Runtime (CPU)"
        answers = session.predictions(NAMES[:2])
        next(answers)
    with pytest.raises(UsageError, match="not open"):
        next(answers)  # of a batch that ran within the block
    with pytest.raises(UsageError, match="not open"):
        session.predict(NAMES[0])


# What runs


class Engine:
    """In place of TensorRT: takes the small bundle's plan, and answers with its graph."""

    name, device, problem = "TensorRT engine", "cuda", ""
    start = StartOptions()

    def __init__(self, plan: bytes, flavour: Flavour, start: StartOptions) -> None:
        assert (plan, flavour, start) == (small_bundles.plan_bytes(), Flavour.TENSORRT_RTX, self.start)
        self._graph = OnnxRuntimeRunner(small_bundles.bundle(Precision.FP16) / GRAPH)

    def __enter__(self) -> Engine:
        self._graph.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self._graph.__exit__(*details)

    def run(self, feeds: Any) -> Any:
        return self._graph.run(feeds)


def test_the_engine_runs_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_runner, "TensorRTRunner", Engine)
    both: tuple[Runtime, ...] = ("auto", "engine")
    for runtime in both:
        with fp16().session(runtime=runtime) as session:
            assert (session.runtime, session.device, session.notes) == ("engine", "cuda", ())
            assert session.predict(NAMES[0])[0].classes
    with fp16().session(runtime="openvino") as session:
        assert session.runtime == "openvino"


@pytest.mark.parametrize(
    ("cache", "start"),
    [(False, StartOptions(runtime_cache=False)), ("my.cache", StartOptions(runtime_cache_file=Path("my.cache")))],
)
def test_an_engine_starts_as_the_session_is_told(
    cache: bool | str, start: StartOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_runner, "TensorRTRunner", Engine)
    monkeypatch.setattr(Engine, "start", dataclasses.replace(start, cuda_graphs=True))
    with fp16().session(runtime_cache=cache, cuda_graphs=True) as session:
        assert session.runtime == "engine"


def test_a_runtime_cache_that_is_not_used_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_runner, "TensorRTRunner", Engine)
    monkeypatch.setattr(Engine, "problem", "The runtime cache is damaged: not used.")
    with fp16().session() as session:
        assert session.notes == ("The runtime cache is damaged: not used.",)


@pytest.fixture
def _without_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, name, None)


def test_where_the_engine_cannot_run_the_graph_does_and_it_is_said() -> None:
    with fp16().session() as session:
        assert session.runtime == "onnxruntime"
        assert session.notes[0].startswith("The engine does not run here: ")
        assert len(session.notes) == 1  # its graph has the form for a CPU
    with uint8().session() as session:
        assert session.notes == ()
    with pytest.raises(UnavailableError, match="cannot run here"), fp16().session(runtime="engine"):
        pass
    with pytest.raises(UnavailableError, match="has no engine: --engine none"), uint8().session(runtime="engine"):
        pass


def test_a_graph_in_the_form_for_tensorrt_is_said_to_be_slower(tmp_path: Path) -> None:
    bundle = small_bundles.copy(small_bundles.bundle(), tmp_path / "b")
    manifest = small_bundles.read_manifest(bundle)
    manifest["graph"]["form"] = "tensorrt"
    small_bundles.write_manifest(bundle, manifest)
    with sessions.Session(bundle) as session:
        assert "is slower in ONNX Runtime than one that is exported with --engine none." in session.notes[1]


def test_what_only_tensorrt_for_rtx_takes_is_refused_or_said_to_do_nothing(tmp_path: Path) -> None:
    with uint8().session(runtime_cache=tmp_path / "no" / "file", cuda_graphs=True) as session:
        assert [note.split(":")[0] for note in session.notes] == [
            "runtime_cache does nothing here",
            "cuda_graphs does nothing here",
        ]
    wrong: Any = 5
    with pytest.raises(UsageError, match="runtime_cache=5 is not possible"):
        uint8().session(runtime_cache=wrong)


def test_without_onnxruntime_openvino_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with uint8().session() as session:
        assert (session.runtime, session.name) == ("openvino", "OpenVINO (CPU)")
    with pytest.raises(MissingPackageError, match="onnxruntime"), uint8().session(runtime="onnxruntime"):
        pass


@pytest.mark.usefixtures("_without_packages")
def test_where_nothing_runs_every_reason_is_told() -> None:
    with pytest.raises(UnavailableError) as caught, fp16().session():
        pass
    for part in ("Nothing here can run", "the engine: ", "ONNX Runtime: ", "OpenVINO: ", "pip install"):
        assert part in str(caught.value)


def test_eight_bits_for_vnni_are_not_run_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spach_deploy.Bundle, "needs_vnni", True)
    monkeypatch.setattr(sessions, "has_vnni", lambda: False)
    with pytest.raises(UnavailableError, match="for CPUs with VNNI"), int8().session(runtime="onnxruntime"):
        pass


def test_a_runtime_that_truncates_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spach_deploy.Bundle, "quantizes_fp16", True)
    monkeypatch.setattr(onnxruntime_runner, "truncating_runtime", lambda: "1.20.0")
    with int8().session() as session:
        assert "ONNX Runtime 1.20.0's QuantizeLinear truncates FP16" in session.notes[-1]


# OpenVINO


def test_what_openvino_does_not_read_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with (
        pytest.raises(UsageError, match=r"model\.onnx does not load in OpenVINO"),
        OpenVinoRunner(tmp_path / "model.onnx"),
    ):
        pass
