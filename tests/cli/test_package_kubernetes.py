"""spach-package kubernetes as a user calls it: what it prints, exit codes, refusals in one sentence."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from spach_deploy.cli.package import main
from tests import small_bundles
from tests.commands import console_script, refusal
from tests.packaging.kubernetes.bundles import with_engine, with_rtx_engine
from tests.packaging.triton import tiny_bundles
from tests.packaging.triton.tiny_bundles import Tiny


def package(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["kubernetes", *map(str, arguments)], prog_name="spach-package")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return with_engine(tmp_path / "bundle")


def test_a_folder_is_written_and_the_three_commands_are_shown(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "k8s"
    done = package(bundle, "-o", folder, "--triton-version", "25.08", "--image", "registry.example.com/team/vit")
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    image = json.loads((folder / "manifest.json").read_text())["image"]
    assert image.startswith("registry.example.com/team/vit:25.08-fp16-")
    assert done.stdout.splitlines() == [
        "model       tiny, fp16, as tiny in Triton",
        "serves      TensorRT 10.13.2.6 plan",
        "image       nvcr.io/nvidia/tritonserver:25.08-py3 (TensorRT 10.13.2.6, ONNX Runtime 1.23.0, CUDA 13.0)",
        "pods        2 to 8 of tiny, each with 1 GPU and 5Gi for sm90",
        "start-up    190 s (180 s + 0.0 MB at 20 MB/s, rounded up to 190 s)",
        f"folder      {folder}",
        "",
        "Run it:",
        f"  docker build -t {image} {folder}/image",
        f"  docker push {image}",
        f"  kubectl apply -k {folder}/overlays/production",
    ]


def test_an_rtx_bundle_becomes_a_graph_with_a_note(tmp_path: Path) -> None:
    done = package(with_rtx_engine(tmp_path / "b"), "-o", tmp_path / "k8s")
    assert done.exit_code == 0, done.output
    assert "serves      ONNX graph in ONNX Runtime" in done.stdout
    assert "note        Served as ONNX, by onnxruntime: Triton's TensorRT backend is ordinary TensorRT" in done.stdout


def test_json_says_the_same(bundle: Path, tmp_path: Path) -> None:
    done = package(bundle, "-o", tmp_path / "k8s", "--kserve", "--name", "classifier", "--json")
    content = json.loads(done.stdout)
    assert content["name"] == "classifier"
    assert content["kserve"] is True
    assert content["gpus"] == ["sm90"]
    assert content["startup_seconds"] == 190
    assert len(content["commands"]) == 3
    assert (tmp_path / "k8s" / "base" / "inference-service.yaml").is_file()


def test_a_digest_leaves_one_command(bundle: Path, tmp_path: Path) -> None:
    digest, base = f"sha256:{'12' * 32}", f"sha256:{'34' * 32}"
    options = (
        "--image-digest",
        digest,
        "--triton-digest",
        f"nvcr.io/nvidia/tritonserver@{base}",
        "--image-pull-secret",
        "a",
        "--image-pull-secret",
        "b",
    )
    done = package(bundle, "-o", tmp_path / "k8s", *options, "--json")
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout)
    assert content["image"] == f"registry.example.com/spach/tiny@{digest}"
    assert content["commands"] == [f"kubectl apply -k {tmp_path}/k8s/overlays/production"]
    assert f"FROM {content['triton_image']}@{base}\n" in (tmp_path / "k8s" / "image" / "Dockerfile").read_text()


def test_a_digest_with_a_name_names_the_image(bundle: Path, tmp_path: Path) -> None:
    pinned = f"reg.example.com:5000/team/vit@{DIGEST}"
    done = package(bundle, "-o", tmp_path / "k8s", "--image-digest", pinned, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["image"] == pinned


def test_a_chart_is_written_in_place_of_kustomizations(bundle: Path, tmp_path: Path) -> None:
    done = package(bundle, "-o", tmp_path / "k8s", "--helm", "--instances", "2")
    assert done.exit_code == 0, done.output
    chart = tmp_path / "k8s" / "chart"
    assert done.stdout.splitlines()[-1] == f"  helm upgrade --install tiny {chart} --namespace tiny --create-namespace"
    assert (chart / "templates" / "deployment.yaml").is_file()
    assert not (tmp_path / "k8s" / "base").exists()
    models = tmp_path / "k8s" / "image" / "models"
    assert "count: 2" in (models / "tiny" / "config.pbtxt").read_text()


def test_a_real_bundle_is_packaged(tmp_path: Path) -> None:
    """An FP16 export with every output, and its plan of TensorRT for RTX."""
    done = package(small_bundles.bundle(), "-o", tmp_path / "k8s", "--triton-version", "25.08", "--replicas", "1:3")
    assert done.exit_code == 0, done.output
    golden = json.loads((tmp_path / "k8s" / "image" / "golden" / "golden.json").read_text())
    assert [output["kind"] for output in golden["outputs"]] == ["scores", "scores", "values", "indices"]
    assert len(golden["images"]) == 8


def test_the_versions_are_listed() -> None:
    done = package("--list-versions")
    assert done.exit_code == 0
    assert "25.08    10.13.2.6   1.23.0        23     13.0" in done.stdout.splitlines()


def test_the_group_offers_it() -> None:
    assert "kubernetes" in CliRunner().invoke(main, ["--help"]).stdout


def test_the_installed_command_does_it_too(bundle: Path, tmp_path: Path) -> None:
    script = console_script("spach-package", tmp_path)
    done = subprocess.run(
        [str(script), "kubernetes", str(bundle), "-o", str(tmp_path / "k8s")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "k8s" / "base" / "deployment.yaml").is_file()


DIGEST = f"sha256:{'12' * 32}"
REFUSED = {
    "unknown release": (("--triton-version", "25.13"), "--triton-version 25.13: what that Triton image carries"),
    "another TensorRT": (("--triton-version", "25.09"), "it carries TensorRT 10.13.3.9, and the engine was built with"),
    "a name": (("--name", "My_Model"), "is no name for Kubernetes"),
    "an image with a tag": (("--image", "vit:1"), "is no image's name"),
    "a secret": (("--image-pull-secret", "My_Secret"), "--image-pull-secret 'My_Secret' is no secret's name"),
    "a digest": (("--image-digest", "0123"), "--image-digest '0123' is no digest"),
    "a digest of Triton": (("--triton-digest", "latest"), "--triton-digest 'latest' is no digest"),
    "one digest of two images": (
        ("--image-digest", DIGEST, "--triton-digest", f"nvcr.io/nvidia/tritonserver@{DIGEST}"),
        "--image-digest and --triton-digest are the same",
    ),
    "Triton's digest as that of the image": (
        ("--image-digest", f"nvcr.io/nvidia/tritonserver:25.08-py3@{DIGEST}"),
        "Give it to --triton-digest",
    ),
    "a digest of another image": (
        ("--image", "team/vit", "--image-digest", f"team/vit2@{DIGEST}"),
        "--image-digest is of team/vit2, and --image is team/vit",
    ),
    "the image's digest as Triton's": (
        ("--triton-digest", f"team/vit@{DIGEST}"),
        "--triton-digest is of team/vit, and the image is built on nvcr.io/nvidia/tritonserver:25.08-py3",
    ),
    "a digest of another release": (
        ("--triton-version", "25.08", "--triton-digest", f"nvcr.io/nvidia/tritonserver:25.07-py3@{DIGEST}"),
        "--triton-digest is of nvcr.io/nvidia/tritonserver:25.07-py3, and the image is built on",
    ),
    "no instances": (("--instances", "0"), "--instances 0 serves nothing"),
    "instances of nothing": (("--instances", "other:2"), "--instances names other, and nothing here runs under that"),
    "replicas": (("--replicas", "8:2"), "is no number of pods"),
    "labels": (("--labels", "/no/labels.txt"), "--labels /no/labels.txt cannot be read"),
    "a backend": (("--backend", "pytorch"), "'pytorch' is not one of"),
}


@pytest.mark.parametrize(("options", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_one_sentence(options: tuple[str, ...], reason: str, bundle: Path, tmp_path: Path) -> None:
    said = refusal(package(bundle, "-o", tmp_path / "k8s", *options))
    assert reason in said
    assert not (tmp_path / "k8s").exists()


def test_no_bundle_and_no_folder_is_one_sentence(bundle: Path) -> None:
    assert "Nothing to do." in refusal(package())
    assert "Nothing to do." in refusal(package(bundle))


def test_a_path_that_is_no_bundle_is_one_sentence(tmp_path: Path) -> None:
    assert "does not exist" in refusal(package(tmp_path / "none", "-o", tmp_path / "k8s"))
    assert "so it is no bundle" in refusal(package(tmp_path, "-o", tmp_path / "k8s"))


def test_a_plan_where_there_is_none_is_one_sentence(tmp_path: Path) -> None:
    without = tiny_bundles.write(tmp_path / "b", Tiny(engine="none"))
    said = refusal(package(without, "-o", tmp_path / "k8s", "--backend", "tensorrt"))
    assert "has no engine for --backend tensorrt: --engine none was asked for. Give --backend onnxruntime" in said


def test_a_plan_of_rtx_is_refused_in_one_sentence(tmp_path: Path) -> None:
    said = refusal(package(with_rtx_engine(tmp_path / "b"), "-o", tmp_path / "k8s", "--backend", "tensorrt"))
    assert "does not load plans of TensorRT for RTX. Give --backend onnxruntime, which serves the graph" in said


def test_a_folder_that_exists_is_one_sentence(bundle: Path, tmp_path: Path) -> None:
    target = tmp_path / "k8s"
    assert package(bundle, "-o", target).exit_code == 0
    assert "holds a deployment already. Give --overwrite" in refusal(package(bundle, "-o", target))
    assert package(bundle, "-o", target, "--overwrite").exit_code == 0
    (tmp_path / "file").write_text("")
    assert "exists and is not a directory" in refusal(package(bundle, "-o", tmp_path / "file"))


def test_a_wrong_call_names_the_whole_command() -> None:
    assert refusal(package("A", "B")) == (
        "Error: Got unexpected extra argument (B). See spach-package kubernetes --help."
    )
