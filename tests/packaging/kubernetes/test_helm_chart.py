"""The Helm chart: by default it makes what the overlay for production does, and its values change what they say."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from spach_deploy.packaging.kubernetes.deployment import ImageDigest, KubernetesOptions, Replicas
from spach_deploy.packaging.kubernetes.folder import write_folder
from spach_deploy.packaging.triton.options import Instances
from tests.packaging import programs
from tests.packaging.kubernetes.bundles import with_engine, with_rtx_engine
from tests.packaging.kubernetes.kustomize import Resource, built, documents, yaml

kubernetes_validate = pytest.importorskip("kubernetes_validate")

DIGEST = f"sha256:{'0123456789abcdef' * 4}"
KINDS: dict[str, dict[str, Any]] = {
    "plan": {},
    "graph with an ensemble": {"ensemble": True, "instances": Instances.parse(["2"])},
    "kserve": {"kserve": True},
    "pinned": {"image_digest": ImageDigest(DIGEST), "pull_secrets": ("one", "two"), "replicas": Replicas(3, 3)},
    "pinned kserve": {"kserve": True, "image_digest": ImageDigest(DIGEST), "pull_secrets": ("one",)},
}


def chart(folder: Path, **options: Any) -> Path:
    write_folder(_bundle(folder, options), folder / "helm", KubernetesOptions(helm=True, **options))
    return folder / "helm" / "chart"


def _bundle(folder: Path, options: dict[str, Any]) -> Path:
    if not (folder / "bundle").exists():
        (with_rtx_engine if options.get("ensemble") else with_engine)(folder / "bundle")
    return folder / "bundle"


# What needs no Helm


@pytest.mark.parametrize("kserve", [False, True])
def test_a_chart_has_a_template_for_everything_in_the_kustomization(tmp_path: Path, kserve: bool) -> None:
    folder = chart(tmp_path, kserve=kserve)
    write_folder(tmp_path / "bundle", tmp_path / "plain", KubernetesOptions(kserve=kserve))
    listed = yaml.safe_load((tmp_path / "plain" / "base" / "kustomization.yaml").read_text())["resources"]
    assert {file.name for file in (folder / "templates").iterdir()} == {*listed, "pod-monitor.yaml", "_helpers.tpl"}
    assert not re.search(r"@[A-Z_]+@|spach-model", "".join(f.read_text() for f in folder.rglob("*") if f.is_file()))


def test_its_values_are_what_was_asked_for(tmp_path: Path) -> None:
    folder = chart(
        tmp_path, pull_secrets=("one",), replicas=Replicas(3, 7), image="team/vit", image_digest=ImageDigest(DIGEST)
    )
    values = yaml.safe_load((folder / "values.yaml").read_text())
    about = yaml.safe_load((folder / "Chart.yaml").read_text())
    assert values["image"] == {"repository": "team/vit", "tag": about["appVersion"], "digest": DIGEST}
    assert values["imagePullSecrets"] == [{"name": "one"}]
    assert (values["autoscaling"]["minReplicas"], values["autoscaling"]["maxReplicas"], values["replicas"]) == (3, 7, 3)
    assert values["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert re.fullmatch(r"1\.0\.0\+[0-9A-Za-z.-]+", about["version"])
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((folder / "values.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.validate(values, schema)


# Rendered by Helm


def program() -> str:
    return shutil.which("helm") or str(programs.helm())


def helm(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program(), *map(str, arguments)], capture_output=True, text=True, check=False)


def rendered(folder: Path, *values: str, release: str = "tiny") -> list[Resource]:
    """What Helm makes of a chart with some values set."""
    given = [word for value in values for word in ("--set-json", value)]
    done = helm("template", release, folder, "--namespace", "tiny", *given)
    assert done.returncode == 0, done.stderr
    return documents(done.stdout)


def comparable(resources: Sequence[Resource]) -> dict[tuple[str, str], Resource]:
    """By kind and name, without what tells kustomize from Helm: the namespace, and labels of the tool and release."""
    found = {}
    for resource in copy.deepcopy(list(resources)):
        resource["metadata"].pop("namespace", None)
        found[resource["kind"], resource["metadata"]["name"]] = without(resource, OF_HELM)
    return found


OF_HELM = {"helm.sh/chart", *(f"app.kubernetes.io/{name}" for name in ("instance", "version", "managed-by"))}


def without(content: Any, names: set[str]) -> Any:
    """Nested content without the entries of these names."""
    if isinstance(content, dict):
        return {name: without(value, names) for name, value in content.items() if name not in names}
    return [without(value, names) for value in content] if isinstance(content, list) else content


def one(resources: Sequence[Resource], kind: str) -> Resource:
    (found,) = [resource for resource in resources if resource["kind"] == kind]
    return found


@pytest.mark.helm
@pytest.mark.parametrize("kind", KINDS)
def test_helm_makes_of_it_what_the_overlay_for_production_does(tmp_path: Path, kind: str) -> None:
    options = KINDS[kind]
    found = rendered(chart(tmp_path, **options))
    plain = write_folder(tmp_path / "bundle", tmp_path / "plain", KubernetesOptions(**options)).path
    expected = [r for r in built(plain / "overlays" / "production") if r["kind"] != "Namespace"]
    assert comparable(found) == comparable(expected)
    for resource in found:
        assert resource["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "Helm"
        if resource["kind"] not in ("InferenceService", "ServingRuntime"):
            kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.helm
@pytest.mark.parametrize("kserve", [False, True])
def test_helm_finds_no_fault_in_it(tmp_path: Path, kserve: bool) -> None:
    done = helm("lint", "--strict", chart(tmp_path, kserve=kserve))
    assert done.returncode == 0, done.stdout


@pytest.mark.helm
def test_its_values_change_what_they_say(tmp_path: Path) -> None:
    folder = chart(tmp_path)
    found = rendered(
        folder,
        f'image={{"repository": "other/vit", "tag": "1", "digest": "{DIGEST}"}}',
        'imagePullSecrets=[{"name": "mine"}]',
        'resources={"requests": {"cpu": "4"}, "limits": {"nvidia.com/gpu": "1"}}',
        'autoscaling={"minReplicas": 4, "maxReplicas": 5, "queueMicroseconds": 77}',
        'podMonitor={"enabled": true}',
    )
    spec = one(found, "Deployment")["spec"]["template"]["spec"]
    assert {c["image"] for c in (*spec["containers"], *spec["initContainers"])} == {f"other/vit@{DIGEST}"}
    assert spec["imagePullSecrets"] == [{"name": "mine"}]
    assert {c["resources"]["requests"]["cpu"] for c in (*spec["containers"], *spec["initContainers"])} == {"4"}
    scaling = one(found, "HorizontalPodAutoscaler")["spec"]
    assert (scaling["minReplicas"], scaling["maxReplicas"]) == (4, 5)
    assert scaling["metrics"][0]["pods"]["target"]["averageValue"] == "77"
    labels = {"app.kubernetes.io/name": "tiny", "app.kubernetes.io/instance": "tiny"}
    assert one(found, "PodMonitor")["spec"]["selector"]["matchLabels"] == labels


@pytest.mark.helm
@pytest.mark.parametrize("kserve", [False, True])
def test_two_releases_share_a_namespace(tmp_path: Path, kserve: bool) -> None:
    """No object has the name of another's, and each selector takes the pods of its own release alone."""
    folder = chart(tmp_path, kserve=kserve)
    of = {name: rendered(folder, "podMonitor.enabled=true", release=name) for name in ("canary", "stable-tiny")}
    named = {release: {(r["kind"], r["metadata"]["name"]) for r in found} for release, found in of.items()}
    assert not named["canary"] & named["stable-tiny"]
    assert {name for _, name in named["canary"]} == {"canary-tiny"}
    assert {name for _, name in named["stable-tiny"]} == {"stable-tiny"}
    for release, found in of.items():
        name = "canary-tiny" if release == "canary" else release
        own = {"app.kubernetes.io/name": "tiny", "app.kubernetes.io/instance": release}
        selector = {"serving.kserve.io/inferenceservice": name} if kserve else own
        for resource in found:
            labels = resource["metadata"]["labels"]
            assert labels.items() >= own.items()
            assert re.fullmatch(r"tiny-1\.0\.0_[A-Za-z0-9._-]+", labels["helm.sh/chart"])
            assert {"app.kubernetes.io/version", "app.kubernetes.io/component"} <= labels.keys()
        assert one(found, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"] == selector
        assert one(found, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == selector
        target = one(found, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]["name"]
        assert target == (f"{name}-predictor" if kserve else name)
        clients = one(found, "NetworkPolicy")["spec"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"]
        assert clients == {f"{name}/client": "true"}
        if kserve:
            predictor = one(found, "InferenceService")["spec"]["predictor"]
            assert (predictor["model"]["runtime"], predictor["serviceAccountName"]) == (name, name)
        else:
            spec = one(found, "Deployment")["spec"]
            assert spec["selector"]["matchLabels"] == own == one(found, "Service")["spec"]["selector"]
            assert spec["template"]["metadata"]["labels"].items() >= own.items()
            assert spec["template"]["spec"]["serviceAccountName"] == name


@pytest.mark.helm
def test_a_name_of_ones_own_and_a_long_one(tmp_path: Path) -> None:
    folder = chart(tmp_path)
    assert one(rendered(folder, 'fullnameOverride="mine"'), "Service")["metadata"]["name"] == "mine"
    long = one(rendered(folder, release="a" * 39 + "-tail"), "Service")["metadata"]["name"]
    assert long == "a" * 39


@pytest.mark.helm
@pytest.mark.parametrize("kserve", [False, True])
def test_without_an_autoscaler_there_are_as_many_pods_as_said(tmp_path: Path, kserve: bool) -> None:
    found = rendered(chart(tmp_path, kserve=kserve), "autoscaling.enabled=false", "replicas=6")
    assert not [r for r in found if r["kind"] in ("HorizontalPodAutoscaler", "PodMonitor")]
    if kserve:
        predictor = one(found, "InferenceService")["spec"]["predictor"]
        assert (predictor["minReplicas"], predictor["maxReplicas"]) == (6, 6)
    else:
        assert one(found, "Deployment")["spec"]["replicas"] == 6


@pytest.mark.helm
@pytest.mark.parametrize(
    "value",
    [
        'image.digest="latest"',
        'image.repository="host/Vit"',
        'image.tags="1"',
        "replicas=0",
        'autoscaling.minReplicas="2"',
        'imagePullSecrets=["name"]',
        'imagePullSecrets=[{"name": "My_Secret"}]',
        "replica=2",
        'fullnameOverride="My_Name"',
    ],
)
def test_a_value_that_cannot_be_is_refused_before_anything_is_done(tmp_path: Path, value: str) -> None:
    done = helm("template", "release", chart(tmp_path), "--set-json", value)
    assert done.returncode != 0
    assert "values don't meet the specifications of the schema" in done.stderr
