"""Names for Kubernetes, Triton and registries, and what a start and a pod's memory are reckoned at."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from spach_deploy.common.errors import UsageError
from spach_deploy.models import published as configs
from spach_deploy.packaging.kubernetes.deployment import (
    LONGEST,
    PROBE_SECONDS,
    Deployment,
    ImageDigest,
    KubernetesOptions,
    Replicas,
    Sizes,
    kubernetes_name,
    quantity,
    triton_name,
)
from spach_deploy.packaging.kubernetes.template_context import render
from spach_deploy.packaging.triton.options import Backend, Instances
from spach_deploy.packaging.triton.served_model import check_name
from tests.packaging.kubernetes.bundles import with_engine

DNS_1035 = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")

DIGEST = f"sha256:{'0123456789abcdef' * 4}"

AWKWARD = ["ms_hybrid_s+", "A.B_C", "224net", "+", "---", "é", "x" * 200, "name with spaces", "UPPER", "a/b", "", "1"]


@pytest.mark.parametrize("model", [*configs.ARCHITECTURES, *AWKWARD])
def test_every_model_s_name_becomes_one_that_all_take(model: str) -> None:
    name = kubernetes_name(model)
    assert DNS_1035.fullmatch(name), name
    assert len(name) <= LONGEST
    assert DNS_1035.fullmatch(f"{name}-predictor-staging")
    check_name(triton_name(model))


def test_models_keep_apart() -> None:
    names = list(configs.ARCHITECTURES)
    assert len({kubernetes_name(name) for name in names}) == len(names)
    assert len({triton_name(name) for name in names}) == len(names)
    assert kubernetes_name("ms_hybrid_s+") == "ms-hybrid-s-plus"
    assert triton_name("ms_hybrid_s+") == "ms_hybrid_s_plus"
    assert kubernetes_name("x" * 80) != kubernetes_name("x" * 81)


@pytest.mark.parametrize("name", ["", "Vit", "1vit", "vit_s", "-vit", "vit-", "a.b", "v" * (LONGEST + 1), "vit\n"])
def test_a_name_that_kubernetes_does_not_take_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="is no name for Kubernetes"):
        KubernetesOptions(name=name)


@pytest.mark.parametrize(
    "image", ["", "Vit", "vit:1", "host/Vit", "vit@sha256:0", "https://host/vit", "a//b", "vit/", "vit\n", "a b"]
)
def test_a_name_that_registries_do_not_take_is_refused(image: str) -> None:
    with pytest.raises(UsageError, match="is no image's name"):
        KubernetesOptions(image=image)


@pytest.mark.parametrize("image", ["vit", "team/vit", "registry.example.com/team/vit_s", "localhost:5000/vit-s.a"])
def test_names_of_images_are_taken(image: str) -> None:
    assert KubernetesOptions(image=image).image == image


@pytest.mark.parametrize("secret", ["", "Registry", "a_b", "-a", "a.", "a..b", "a/b", "a" * 254, "a\n", "a b"])
def test_a_name_that_no_secret_has_is_refused(secret: str) -> None:
    with pytest.raises(UsageError, match="is no secret's name"):
        KubernetesOptions(pull_secrets=("good", secret))


@pytest.mark.parametrize(
    "digest",
    [
        "",
        "0" * 64,
        "sha256:0",
        f"sha256:{'A' * 64}",
        f"sha512:{'0' * 64}",
        f"{DIGEST}\n",
        f"Vit@{DIGEST}",
        f"@{DIGEST}",
    ],
)
@pytest.mark.parametrize("option", ["--image-digest", "--triton-digest"])
def test_what_is_no_digest_is_refused(digest: str, option: str) -> None:
    with pytest.raises(UsageError, match=f"{option} .* is no digest"):
        ImageDigest.parse(option, digest)
    assert ImageDigest.parse(option, DIGEST) == ImageDigest(DIGEST)


@pytest.mark.parametrize(
    ("name", "tag"), [("vit", ""), ("localhost:5000/team/vit", ""), ("localhost:5000/vit", "25.08-py3")]
)
def test_a_digest_says_of_which_image_it_is(name: str, tag: str) -> None:
    text = f"{name}{':' if tag else ''}{tag}@{DIGEST}"
    read = ImageDigest.parse("--image-digest", text)
    assert read == ImageDigest(DIGEST, name, tag)
    assert str(read) == text


@pytest.mark.parametrize(("text", "bounds"), [("2:8", (2, 8)), ("1", (1, 1)), ("3:3", (3, 3))])
def test_replicas_are_read(text: str, bounds: tuple[int, int]) -> None:
    assert dataclasses.astuple(Replicas.parse(text)) == bounds


@pytest.mark.parametrize("text", ["", "0", "8:2", "2:", ":8", "a", "1:2:3", "-1", "2:99999", "2:8\n"])
def test_replicas_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no number of pods"):
        Replicas.parse(text)


# Sizes


def sizes(folder: Path, total: int, backend: Backend = Backend.AUTO) -> Sizes:
    """Of a bundle whose plan and graph are said to be so large; the files are holes."""
    bundle = with_engine(folder / "b")
    model = Deployment.of(bundle, KubernetesOptions(backend=backend)).model
    large = folder / "large"
    with large.open("wb") as file:
        file.truncate(total)
    versions = tuple(dataclasses.replace(version, artifact=large) for version in model.versions)
    return Sizes.of(dataclasses.replace(model, versions=versions))


@pytest.mark.parametrize(
    ("megabytes", "backend", "seconds"),
    [
        (1, Backend.TENSORRT, 190),
        (140, Backend.TENSORRT, 190),
        (1000, Backend.TENSORRT, 230),
        (1000, Backend.ONNXRUNTIME, 280),
    ],
)
def test_the_start_takes_as_long_as_the_engine_is_large(
    megabytes: int, backend: Backend, seconds: int, tmp_path: Path
) -> None:
    found = sizes(tmp_path, megabytes * 1_000_000, backend)
    assert found.startup_seconds == seconds
    assert found.startup_probes * PROBE_SECONDS >= seconds
    assert f"{megabytes}.0 MB at 20 MB/s" in found.arithmetic


def memory(folder: Path, instances: list[str]) -> int:
    options = KubernetesOptions(ensemble=True, instances=Instances.parse(instances))
    return Deployment.of(with_engine(folder / f"b{len(instances)}"), options).sizes.memory_bytes


def test_memory_grows_with_the_processes_that_decode_pictures(tmp_path: Path) -> None:
    assert memory(tmp_path, ["tiny_preprocess:9"]) - memory(tmp_path, []) >= 5 << 30


def test_memory_grows_with_the_engine(tmp_path: Path) -> None:
    gigabyte = 1 << 30
    assert sizes(tmp_path, gigabyte).memory_bytes >= 3 * gigabyte + (4 << 30)


@pytest.mark.parametrize(
    ("size", "text"),
    [(1, "1Mi"), (128 << 20, "128Mi"), ((128 << 20) + 1, "129Mi"), (4 << 30, "4Gi"), ((4 << 30) + 1, "5Gi")],
)
def test_quantities_are_rounded_up(size: int, text: str) -> None:
    assert quantity(size) == text


# Templates


def test_words_stand_in_lines_and_blocks_take_their_indentation() -> None:
    text = "name: @NAME@\nlist:\n  @LIST@\n  @NONE@\nend\n"
    words = {"NAME": "a", "LIST": "- b:\n    - c\n\n- d", "NONE": ""}
    assert render(text, words) == "name: a\nlist:\n  - b:\n      - c\n\n  - d\nend\n"


def test_a_word_that_there_is_not_is_an_error() -> None:
    with pytest.raises(KeyError, match="NOTHING"):
        render("@NOTHING@", {})
