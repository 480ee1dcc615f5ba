"""The folder as a whole: the image's files, its README, and that it is written at once or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from spach_deploy.bundle.schema import Form, Manifest
from spach_deploy.common.errors import BundleError, UsageError
from spach_deploy.common.machine import VNNI_ONLY
from spach_deploy.options.specs import Precision
from spach_deploy.packaging.kubernetes.deployment import ImageDigest, KubernetesOptions
from spach_deploy.packaging.kubernetes.folder import KubernetesPackage, as_text, write_folder
from spach_deploy.packaging.triton.check import check_repository
from tests import small_bundles
from tests.commands import contents
from tests.packaging.kubernetes.bundles import with_engine, with_rtx_engine
from tests.packaging.triton import tiny_bundles
from tests.packaging.triton.tiny_bundles import Tiny
from tests.small_bundles import read_manifest, write_manifest


def write(folder: Path, bundle: Path | None = None, options: KubernetesOptions | None = None) -> KubernetesPackage:
    return write_folder(bundle or with_engine(folder / "bundle"), folder / "k8s", options or KubernetesOptions())


def hadolint(file: Path) -> subprocess.CompletedProcess[str]:
    """hadolint, with the strictest threshold. Skips where it is not installed."""
    beside_python = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    program = shutil.which("hadolint", path=beside_python)
    if program is None:
        pytest.skip("hadolint is not installed: scripts/setup dev")
    return subprocess.run([program, "--failure-threshold", "style", str(file)], capture_output=True, text=True)


@pytest.mark.parametrize("ensemble", [False, True])
def test_the_dockerfile_has_nothing_that_hadolint_minds(ensemble: bool, tmp_path: Path) -> None:
    written = write(tmp_path, with_rtx_engine(tmp_path / "b"), KubernetesOptions(ensemble=ensemble))
    found = hadolint(written.path / "image" / "Dockerfile")
    assert found.returncode == 0, found.stdout


def test_hadolint_minds_an_image_that_is_not_pinned(tmp_path: Path) -> None:
    file = tmp_path / "Dockerfile"
    file.write_text("FROM nvcr.io/nvidia/tritonserver\nRUN pip install pillow\n")
    found = hadolint(file)
    assert found.returncode == 1
    assert {"DL3006", "DL3013"} <= set(re.findall(r"DL\d{4}", found.stdout))


def instructions(written: KubernetesPackage) -> list[str]:
    text = (written.path / "image" / "Dockerfile").read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_the_image_is_the_user_s_triton_with_the_model_for_a_user_that_is_not_root(tmp_path: Path) -> None:
    lines = instructions(write(tmp_path, options=KubernetesOptions("25.08")))
    assert lines[0] == "FROM nvcr.io/nvidia/tritonserver:25.08-py3"
    assert [line.split()[2:] for line in lines if line.startswith("COPY")] == [
        ["golden_check.py", "/opt/spach/golden_check.py"],
        ["golden", "/opt/spach/golden"],
        ["models", "/models"],
    ]
    assert "USER 1000:1000" in lines
    assert lines.index("USER 1000:1000") > max(i for i, line in enumerate(lines) if line.startswith(("COPY", "RUN")))


def test_everything_that_is_copied_is_there_and_let_into_the_build(tmp_path: Path) -> None:
    written = write(tmp_path)
    image = written.path / "image"
    ignored = [line for line in (image / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    sources = [line.split()[2] for line in instructions(written) if line.startswith("COPY")]
    assert ignored == ["*", *(f"!{source}" for source in sources)]
    assert all((image / source).exists() for source in sources)


@pytest.mark.parametrize("ensemble", [False, True])
@pytest.mark.parametrize("rtx", [False, True])
def test_the_model_repository_has_no_finding(ensemble: bool, rtx: bool, tmp_path: Path) -> None:
    bundle = with_rtx_engine(tmp_path / "b") if rtx else with_engine(tmp_path / "b")
    models = write(tmp_path, bundle, KubernetesOptions(ensemble=ensemble)).path / "image" / "models"
    assert check_repository(models).findings == ()
    assert (models / "tiny" / "1" / ("model.onnx" if rtx else "model.plan")).is_file()
    assert "KIND_GPU" in (models / "tiny" / "config.pbtxt").read_text()
    assert (models / "tiny_ensemble").is_dir() == ensemble


def test_only_an_ensemble_installs_anything(tmp_path: Path) -> None:
    bundle = with_rtx_engine(tmp_path / "b")
    for ensemble in (True, False):
        written = write_folder(bundle, tmp_path / str(ensemble), KubernetesOptions(ensemble=ensemble))
        assert any(line.startswith("RUN pip install") for line in instructions(written)) == ensemble


def test_the_tag_follows_from_what_is_in_the_image(tmp_path: Path) -> None:
    bundle = with_engine(tmp_path / "b")
    again = [write_folder(bundle, tmp_path / f"k{i}", KubernetesOptions(kserve=bool(i))).image_tag for i in range(2)]
    assert again[0] == again[1]
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"name {i}\n" for i in range(tiny_bundles.CLASSES)))
    others = [
        write_folder(bundle, tmp_path / "labels", KubernetesOptions(labels=labels)).image_tag,
        write_folder(with_engine(tmp_path / "b2", tiny=Tiny(seed=8)), tmp_path / "k2", KubernetesOptions()).image_tag,
        write_folder(with_rtx_engine(tmp_path / "b3"), tmp_path / "k3", KubernetesOptions()).image_tag,
    ]
    assert len({again[0], *others}) == 4


@pytest.mark.parametrize("helm", [False, True])
@pytest.mark.parametrize("kserve", [False, True])
def test_the_readme_explains_every_file_and_gives_three_commands(kserve: bool, helm: bool, tmp_path: Path) -> None:
    written = write(tmp_path, options=KubernetesOptions(kserve=kserve, helm=helm))
    readme = (written.path / "README.md").read_text()
    explained = re.findall(r"`([^`]+)`", "\n".join(line.split("|")[1] for line in readme.splitlines() if "|" in line))
    files = {file.relative_to(written.path).as_posix() for file in written.path.rglob("*") if file.is_file()}
    left = {file for file in files if not any(file == e or (e.endswith("/") and file.startswith(e)) for e in explained)}
    assert left == {"README.md", "image/.dockerignore"}
    assert all((written.path / entry).exists() for entry in explained)
    image = f"registry.example.com/spach/tiny:{written.image_tag}"
    apply = "kubectl apply -k overlays/production"
    if helm:
        apply = "helm upgrade --install tiny chart --namespace tiny --create-namespace"
    for line in (f"docker build -t {image} image", f"docker push {image}", apply):
        assert f"\n    {line}\n" in readme


def test_what_was_pushed_is_named_by_its_digest_and_not_built_again(tmp_path: Path) -> None:
    digest, base = f"sha256:{'ab' * 32}", f"sha256:{'cd' * 32}"
    pinned: dict[str, Any] = {"image_digest": ImageDigest(digest), "triton_digest": ImageDigest(base)}
    written = write(tmp_path, options=KubernetesOptions("25.08", **pinned))
    readme, dockerfile = ((written.path / name).read_text() for name in ("README.md", "image/Dockerfile"))
    assert "docker build" not in readme
    assert "\n    kubectl apply -k overlays/production\n" in readme
    assert f"FROM nvcr.io/nvidia/tritonserver:25.08-py3@{base}\n" in dockerfile
    assert "--triton-digest" not in dockerfile
    assert hadolint(written.path / "image" / "Dockerfile").returncode == 0
    assert json.loads((written.path / "manifest.json").read_text())["image"].endswith(f"/tiny@{digest}")


@pytest.mark.parametrize(
    ("image", "host"), [("reg.example.com:5000/t/vit", "reg.example.com:5000"), ("t/vit", "REGISTRY")]
)
def test_a_pull_secret_is_asked_for_with_the_command_that_makes_it(image: str, host: str, tmp_path: Path) -> None:
    written = write(tmp_path, options=KubernetesOptions(image=image, pull_secrets=("one", "two")))
    readme = " ".join((written.path / "README.md").read_text().split())
    for secret in ("one", "two"):
        command = (
            f"kubectl create secret docker-registry {secret} --namespace tiny --docker-server={host} --docker-user"
        )
        assert command in readme


def test_every_yaml_file_is_part_of_a_kustomization_or_explained(tmp_path: Path) -> None:
    for kserve in (False, True):
        bundle = tmp_path / f"b{kserve}"
        written = write_folder(with_engine(bundle), tmp_path / f"k{kserve}", KubernetesOptions(kserve=kserve))
        listed = (written.path / "base" / "kustomization.yaml").read_text()
        found = {file.name for file in (written.path / "base").iterdir()} - {"kustomization.yaml"}
        assert set(re.findall(r"^  - (\S+\.yaml)$", listed, re.MULTILINE)) == found


def test_a_model_s_name_cannot_break_out_of_the_files(tmp_path: Path) -> None:
    bundle = with_engine(tmp_path / "b")
    manifest = read_manifest(bundle)
    manifest["model"]["name"] = 'x"\nUSER root\n# ${HOME} @NAME@'
    write_manifest(bundle, manifest)
    written = write(tmp_path, bundle)
    assert "USER root" not in instructions(written)
    assert not any("${HOME}" in line for line in instructions(written))


# Written at once or not at all


def test_an_earlier_folder_is_left_alone_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    bundle = with_engine(tmp_path / "b")
    write(tmp_path, bundle)
    before = contents(tmp_path / "k8s")
    with pytest.raises(BundleError, match="holds a deployment already"):
        write(tmp_path, bundle)
    assert contents(tmp_path / "k8s") == before
    write_folder(bundle, tmp_path / "k8s", KubernetesOptions(kserve=True), overwrite=True)
    assert (tmp_path / "k8s" / "base" / "inference-service.yaml").is_file()
    assert not (tmp_path / "k8s" / "base" / "deployment.yaml").exists()


@pytest.mark.parametrize("content", ["notes", '{"kind": "triton-model-repository"}', "[]", "{"])
def test_a_folder_of_something_else_is_never_replaced(content: str, tmp_path: Path) -> None:
    target = tmp_path / "k8s"
    target.mkdir()
    (target / "manifest.json").write_text(content)
    with pytest.raises(BundleError, match="left alone"):
        write_folder(with_engine(tmp_path / "b"), target, KubernetesOptions(), overwrite=True)
    assert (target / "manifest.json").read_text() == content


def test_nothing_is_left_of_a_folder_that_could_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spach_deploy.packaging.kubernetes import folder

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    bundle = with_engine(tmp_path / "b")
    monkeypatch.setattr(folder, "_write_manifests", full)
    with pytest.raises(BundleError, match="No space left"):
        write(tmp_path, bundle)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]


@pytest.mark.parametrize("file", ["engine.plan", "golden.npz"])
def test_a_bundle_that_was_changed_is_refused(file: str, tmp_path: Path) -> None:
    bundle = with_engine(tmp_path / "b")
    (bundle / file).write_bytes(b"changed")
    with pytest.raises(BundleError, match="not as it was exported"):
        write(tmp_path, bundle)


def test_the_manifest_says_what_it_is_and_what_it_is_from(tmp_path: Path) -> None:
    written = write(tmp_path)
    content = json.loads((written.path / "manifest.json").read_text())
    assert content["kind"] == "kubernetes-deployment"
    assert content["triton_image"] == "nvcr.io/nvidia/tritonserver:25.08-py3"
    assert content["image"] == f"registry.example.com/spach/tiny:{written.image_tag}"


def test_a_bundle_of_tensorrts_is_served_in_onnxruntimes_form_and_a_note_says_so(tmp_path: Path) -> None:
    bundle = small_bundles.for_tensorrt()
    written = write(tmp_path, bundle)
    (served,) = (written.path / "image" / "models").glob("*/1/model.onnx")
    facts = Manifest.read(served.with_name("bundle.json"))
    assert facts.form is Form.CPU
    assert facts.graph.certificate.nodes == len(onnx.load(served).graph.node)
    digest = hashlib.sha256(served.read_bytes()).hexdigest()
    assert digest != hashlib.sha256((bundle / "model.onnx").read_bytes()).hexdigest()
    assert digest in (written.path / "base" / "deployment.yaml").read_text()
    assert [note for note in written.deployment.notes if "Made anew in the form for ONNX Runtime" in note]
    assert written.deployment.sizes.artifact_bytes == served.stat().st_size
    assert check_repository(written.path / "image" / "models").findings == ()


@pytest.mark.parametrize("options", [KubernetesOptions(), KubernetesOptions(kserve=True), KubernetesOptions(helm=True)])
def test_a_bundle_of_target_cpu_asks_for_no_gpu(options: KubernetesOptions, tmp_path: Path) -> None:
    written = write(tmp_path, tiny_bundles.for_vnni(tmp_path / "b"), options)
    texts = {file: file.read_text() for file in written.path.rglob("*") if file.suffix in (".yaml", ".md", ".tpl")}
    assert [str(file) for file, text in texts.items() if "nvidia.com" in text] == []
    assert "each with 2 CPU cores and" in as_text(written)
    assert VNNI_ONLY in as_text(written)
    assert VNNI_ONLY in texts[written.path / "README.md"]
    config = (written.path / "image" / "models" / "tiny" / "config.pbtxt").read_text()
    assert "kind: KIND_CPU" in config


def test_bfloat16_of_target_cpu_is_refused(tmp_path: Path) -> None:
    bundle = tiny_bundles.write(tmp_path / "b", Tiny(engine="none", precision=Precision.BF16))
    with pytest.raises(UsageError, match=r"in bfloat16 on a CPU\. Export it for ONNX Runtime"):
        write(tmp_path, tiny_bundles.for_cpu(bundle))
