"""Which Triton image fits which bundle, and the table that says so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from spach_deploy.common.errors import BundleError, UsageError
from spach_deploy.graph.runtimes import GraphNeeds, Runtimes, runtimes
from spach_deploy.options.specs import Precision
from spach_deploy.packaging.kubernetes.deployment import Deployment, KubernetesOptions, choose_image
from spach_deploy.packaging.triton.options import Backend
from spach_deploy.packaging.triton.served_model import ServedModel
from tests.packaging.kubernetes.bundles import with_engine, with_rtx_engine
from tests.packaging.triton import tiny_bundles
from tests.packaging.triton.tiny_bundles import Tiny

INSTEAD = "Give --backend onnxruntime, which serves the graph, or export it on the serving GPU with --engine tensorrt."


def image_for(bundle: Path, release: str | None = None, backend: Backend = Backend.AUTO) -> str:
    return Deployment.of(bundle, KubernetesOptions(release, backend=backend)).image.release


def refusal(bundle: Path, release: str | None = None, backend: Backend = Backend.AUTO) -> str:
    with pytest.raises(UsageError) as caught:
        image_for(bundle, release, backend)
    return str(caught.value)


def test_the_table_is_complete_and_says_where_it_is_from() -> None:
    known = runtimes()
    releases = [image.release for image in known.images]
    assert releases == sorted(set(releases))
    assert "25.08" in releases
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", known.read)
    for image in known.images:
        assert re.fullmatch(r"2\d\.(0[1-9]|1[0-2])", image.release)
        assert image.tensorrt is None or re.fullmatch(r"\d+\.\d+\.\d+(\.\d+)?", image.tensorrt)
        assert re.fullmatch(r"1\.\d+\.\d+", image.onnxruntime)
        assert re.fullmatch(r"1\d\.\d", image.cuda)
        assert image.reference == f"nvcr.io/nvidia/tritonserver:{image.release}-py3"
        assert image.notes.endswith(f"/rel-{image.release.replace('.', '-')}.html")
        known_entries = {"onnxruntime", "cuda", *(["tensorrt"] if image.tensorrt else [])}
        assert set(image.seen) == known_entries
        assert {word for words in image.seen.values() for word in words.split(", ")} <= set(known.sources)
        assert known.onnxruntime(image.onnxruntime) is not None


def test_what_an_onnx_runtime_loads_only_grows_and_says_where_it_was_seen() -> None:
    known = runtimes()
    loads = [(runtime.opset, runtime.ir) for runtime in known.onnxruntimes]
    assert loads == sorted(loads)
    assert {word for runtime in known.onnxruntimes for word in runtime.seen.split(", ")} <= set(known.sources)
    assert known.onnxruntime("1.2.0") is None
    between = known.onnxruntime("1.22.3")
    assert between is not None
    assert (between.version, between.opset) == ("1.22.3", 22)


def test_no_version_goes_back_from_one_image_to_the_next() -> None:
    known = runtimes().images
    for field in ("tensorrt", "onnxruntime", "cuda"):
        versions = [[int(part) for part in getattr(image, field).split(".")] for image in known if image.tensorrt]
        shortened = [version[:3] for version in versions]
        assert shortened == sorted(shortened), field


@pytest.mark.parametrize(
    ("built", "release"),
    [
        ("10.13.2.6", "25.08"),
        ("10.13.3.9", "25.10"),  # 25.09 carries it too; 25.10 is known by its first three parts
        ("10.14.1.48", "26.01"),
        ("10.9.0.34", "25.04"),
        ("11.1.0.106", "26.07"),
    ],
)
def test_a_plan_gets_the_newest_image_with_its_tensorrt(built: str, release: str, tmp_path: Path) -> None:
    assert image_for(with_engine(tmp_path / "b", built)) == release


def test_an_image_with_another_tensorrt_is_refused_and_those_that_fit_are_named(tmp_path: Path) -> None:
    bundle = with_engine(tmp_path / "b", "10.13.3.9")
    assert refusal(bundle, "25.08") == (
        "--triton-version 25.08: it carries TensorRT 10.13.2.6, and the engine was built with 10.13.3.9. "
        f"It fits 25.09 and 25.10. {INSTEAD}"
    )


def test_another_build_of_the_same_version_is_another_version(tmp_path: Path) -> None:
    assert "10.13.2.7" in refusal(with_engine(tmp_path / "b", "10.13.2.7"), "25.08")


def test_a_tensorrt_that_no_image_carries_is_refused(tmp_path: Path) -> None:
    said = refusal(with_engine(tmp_path / "b", "10.12.0.36"))
    assert said.startswith("No known Triton image fits: ")
    assert said.endswith(INSTEAD)
    assert image_for(tmp_path / "b", "25.08", Backend.ONNXRUNTIME) == "25.08"


@pytest.mark.parametrize("built", ["", "10.8", "unknown"])
def test_a_plan_of_a_version_that_is_not_told_fits_nothing(built: str, tmp_path: Path) -> None:
    assert "No known Triton image fits" in refusal(with_engine(tmp_path / "b", built))


def test_an_image_whose_tensorrt_is_not_known_takes_no_plan_but_a_graph(tmp_path: Path) -> None:
    bundle = with_engine(tmp_path / "b", "10.4.0.26")
    assert "which TensorRT that image carries is not known" in refusal(bundle, "24.09")
    assert image_for(bundle, "24.09", Backend.ONNXRUNTIME) == "24.09"


@pytest.mark.parametrize(
    ("built", "release", "loads"),
    [
        ("10.3.0.26", "25.08", True),
        ("10.13.2.6", "25.08", True),
        ("10.13.3.9", "25.08", False),
        ("10.13.2.6", "26.08", False),
    ],
)
def test_a_version_compatible_plan_loads_in_newer_ones_of_its_major_version(
    built: str, release: str, loads: bool, tmp_path: Path
) -> None:
    bundle = with_engine(tmp_path / "b", built, version_compatible=True)
    if loads:
        assert image_for(bundle, release) == release
    else:
        assert "it carries TensorRT" in refusal(bundle, release)


def test_a_plan_of_tensorrt_for_rtx_is_refused_and_its_graph_served(tmp_path: Path) -> None:
    bundle = with_rtx_engine(tmp_path / "b")
    for release in (None, "25.08"):
        said = refusal(bundle, release, Backend.TENSORRT)
        assert "does not load plans of TensorRT for RTX" in said
        assert said.endswith(INSTEAD)
    assert image_for(bundle) == runtimes().images[-1].release


@pytest.mark.parametrize("release", ["25.13", "latest", "", "24.07", "25.08-py3"])
def test_a_release_that_is_not_known_is_refused(release: str, tmp_path: Path) -> None:
    said = refusal(with_rtx_engine(tmp_path / "b"), release)
    assert said.startswith(f"--triton-version {release}: what that Triton image carries is not known here. Known are ")


@pytest.mark.parametrize(("opset", "release"), [(21, "24.08"), (22, "25.03"), (23, "25.08"), (25, "26.02")])
def test_a_graph_gets_the_images_that_load_its_opset(opset: int, release: str, tmp_path: Path) -> None:
    bundle = tiny_bundles.write(tmp_path / "b", Tiny(engine="none", opset=opset))
    assert image_for(bundle, release) == release
    if opset > 21:
        said = refusal(bundle, "24.08", Backend.ONNXRUNTIME)
        assert f"ONNX Runtime 1.18.1 loads opset 21, and the graph has opset {opset}. It fits {release}" in said
        assert "--backend" not in said  # it was given


def test_fp8_of_opset_20_loads_in_no_image() -> None:
    known = runtimes()
    assert known.fitting([GraphNeeds(20, 9, has_fp8=True)], on_gpu=True) == ()
    assert known.fitting([GraphNeeds(21, 10, has_fp8=True)], on_gpu=True) == known.images
    newest = known.onnxruntime("1.32.0")
    assert newest is not None
    assert newest.misfit(GraphNeeds(20, 9, has_fp8=True), on_gpu=False) == ""


def test_kubernetes_triton_and_its_check_agree_on_bfloat16(tmp_path: Path) -> None:
    runs = tiny_bundles.write(tmp_path / "runs", Tiny(engine="none", precision=Precision.BF16))
    assert image_for(runs, "26.02") == "26.02"
    assert "1.23.2 has no kernel for Conv in bfloat16, on no device. It fits 26.02" in refusal(runs, "26.01")
    padded = tiny_bundles.write(tmp_path / "b", Tiny(engine="none", precision=Precision.BF16, bfloat16=("Pad",)))
    assert "has no kernel for Pad in bfloat16" in refusal(padded, backend=Backend.ONNXRUNTIME)
    said = missing_engine(padded)
    assert "--backend onnxruntime" not in said
    assert said.endswith("Export it on the serving GPU with --engine tensorrt.")
    assert "Give --backend onnxruntime" in missing_engine(runs)


def missing_engine(bundle: Path) -> str:
    with pytest.raises(BundleError) as caught:
        image_for(bundle, backend=Backend.TENSORRT)
    return str(caught.value)


def test_a_bundle_without_an_engine_is_served_as_a_graph_unless_a_plan_was_asked_for(tmp_path: Path) -> None:
    bundle = tiny_bundles.write(tmp_path / "b", Tiny(engine="none"))
    assert Deployment.of(bundle, KubernetesOptions()).model.backend is Backend.ONNXRUNTIME
    with pytest.raises(BundleError, match="has no engine for --backend tensorrt"):
        image_for(bundle, backend=Backend.TENSORRT)


def test_an_image_whose_onnx_runtime_truncates_fp16_is_named_for_int8_that_is_made_of_it(tmp_path: Path) -> None:
    bundle = tiny_bundles.of_int8(tiny_bundles.write(tmp_path / "b", Tiny(engine="none")))
    note = Deployment.of(bundle, KubernetesOptions("25.08")).notes[-1]
    assert note.startswith("In this image: ONNX Runtime 1.23.0's QuantizeLinear truncates FP16 on a CPU")
    assert "Export it again" in note
    tiny_bundles.of_int8(bundle, quantized_from="fp32")
    assert not any("truncates" in text for text in Deployment.of(bundle, KubernetesOptions("25.08")).notes)


def test_a_matrix_can_be_another_one(tmp_path: Path) -> None:
    model: ServedModel = Deployment.of(with_engine(tmp_path / "b"), KubernetesOptions()).model
    entry: dict[str, Any] = {"tensorrt": "10.13.2", "onnxruntime": "1.30.0", "cuda": "14.0", "seen": {}}
    row = {"opset": 24, "ir": 11, "seen": "a test"}
    sections = {"onnxruntime": {"1.30.0": row}, "images": {"27.01": entry}, "sources": {}, "read": "2027-01-31"}
    other = Runtimes.parse({**sections, "cuda_bfloat16": {}, "fp8_below_opset_21": "1.32.0"})
    assert choose_image(model, None, other).cuda == "14.0"
