"""The manifests: valid by Kubernetes' and KServe's schemas, locked down, and consistent with each other."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spach_deploy.options.specs import IODtype, OutputSpec, Precision
from spach_deploy.packaging.kubernetes.deployment import ImageDigest, KubernetesOptions, Replicas
from spach_deploy.packaging.kubernetes.folder import KubernetesPackage, write_folder
from tests.packaging.kubernetes.bundles import with_engine, with_rtx_engine
from tests.packaging.kubernetes.kustomize import Resource, built, built_by_kustomize, command, documents, yaml
from tests.packaging.triton.tiny_bundles import Tiny

kubernetes_validate = pytest.importorskip("kubernetes_validate")
jsonschema = pytest.importorskip("jsonschema")

KUBERNETES = ("1.30", "1.34", kubernetes_validate.latest_version())
KSERVE_SCHEMA = json.loads(Path(__file__).with_name("kserve_schema.json").read_text())
CRDS = ("InferenceService", "ServingRuntime", "PodMonitor")
RELEASED = "10.13.2.6"
CRD_FOLDER = os.environ.get("SPACH_KSERVE_CRDS", "")

KSERVE_VARIANTS = ("kserve", "kserve ensemble")
VARIANTS = ("plan", "graph", "ensemble", *KSERVE_VARIANTS)


@pytest.fixture(scope="module", params=VARIANTS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> KubernetesPackage:
    """The folder of a model with an awkward name."""
    folder = tmp_path_factory.mktemp("kubernetes")
    tiny = Tiny(name="ms_hybrid_s+", outputs=OutputSpec(IODtype.FP32, top_k=2))
    ensemble, kserve = "ensemble" in request.param, "kserve" in request.param
    if request.param in ("plan", "kserve"):
        bundle = with_engine(folder / "bundle", RELEASED, tiny)
    else:
        bundle = with_rtx_engine(folder / "bundle", Tiny(**{**vars(tiny), "engine": "tensorrt-rtx"}))
    options = KubernetesOptions(kserve=kserve, ensemble=ensemble, replicas=Replicas(2, 5), triton_version="25.08")
    return write_folder(bundle, folder / "k8s", options)


@pytest.fixture(params=["staging", "production"])
def resources(written: KubernetesPackage, request: pytest.FixtureRequest) -> list[Resource]:
    """What an overlay applies."""
    return built(written.path / "overlays" / request.param)


def one(resources: list[Resource], kind: str) -> Resource:
    (found,) = [resource for resource in resources if resource["kind"] == kind]
    return found


def pod(resources: list[Resource]) -> Resource:
    """The pod that these make: the Deployment's, or what KServe merges of runtime and service."""
    if any(resource["kind"] == "Deployment" for resource in resources):
        template = one(resources, "Deployment")["spec"]["template"]
        return {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(template)}
    return kserve_pod(one(resources, "ServingRuntime"), one(resources, "InferenceService"))


def kserve_pod(runtime: Resource, service: Resource) -> Resource:
    """KServe's pod: the runtime's fields and the predictor's, its own label."""
    not_a_pod_s = {"annotations", "supportedModelFormats", "protocolVersions", "minReplicas", "maxReplicas", "model"}
    spec = {**runtime["spec"], **service["spec"]["predictor"]}
    name = service["metadata"]["name"]
    labels = {**service["metadata"]["labels"], "serving.kserve.io/inferenceservice": name}
    kept = {field: copy.deepcopy(value) for field, value in spec.items() if field not in not_a_pod_s}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": kept}


def containers(resources: list[Resource]) -> list[Any]:
    spec = pod(resources)["spec"]
    return [*spec["initContainers"], *spec["containers"]]


# Schemas


def validate(resource: Resource, version: str) -> None:
    kubernetes_validate.validate(resource, version, strict=True)


@pytest.mark.parametrize("version", KUBERNETES)
def test_resources_are_valid_by_kubernetes_schemas_strictly(resources: list[Resource], version: str) -> None:
    validated = [resource for resource in resources if resource["kind"] not in CRDS]
    for resource in validated:
        validate(resource, version)
    validate(pod(resources), version)
    kinds = {resource["kind"] for resource in validated}
    assert {"Namespace", "ServiceAccount", "HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy"} <= kinds


def test_that_schema_refuses_a_field_that_there_is_not(resources: list[Resource]) -> None:
    broken = pod(resources)
    broken["spec"]["containers"][0]["readinessProbes"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(broken, KUBERNETES[-1])


def validate_kserve(resource: Resource) -> None:
    schema = {**KSERVE_SCHEMA, "$ref": f"#/definitions/{resource['kind']}"}
    jsonschema.Draft7Validator(schema).validate(resource)


@pytest.mark.parametrize("written", KSERVE_VARIANTS, indirect=True)
def test_kserve_resources_have_only_published_fields(written: KubernetesPackage) -> None:
    for overlay in ("staging", "production"):
        found = built(written.path / "overlays" / overlay)
        validate_kserve(one(found, "ServingRuntime"))
        validate_kserve(one(found, "InferenceService"))


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("ServingRuntime", ("spec", "securityContext"), {}),
        ("ServingRuntime", ("spec", "supportedModelFormats"), [{"format": "triton"}]),
        ("InferenceService", ("spec", "predictor", "replicas"), 2),
        ("InferenceService", ("spec", "predictor", "minReplicas"), "2"),
        ("InferenceService", ("spec", "predictor", "model", "format"), {"name": "triton"}),
        ("InferenceService", ("apiVersion",), "serving.kserve.io/v1"),
    ],
)
def test_that_schema_refuses_what_kserve_would(kind: str, path: tuple[str, ...], value: Any, tmp_path: Path) -> None:
    written = write_folder(with_engine(tmp_path / "b"), tmp_path / "k8s", KubernetesOptions(kserve=True))
    resource = one(built(written.path / "base"), kind)
    validate_kserve(resource)
    parent = resource
    for part in path[:-1]:
        parent = parent[part]
    parent[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        validate_kserve(resource)


def strict(schema: Any) -> Any:
    """A CRD's schema that refuses what the API server would drop: fields that it does not list."""
    if isinstance(schema, list):
        return [strict(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: strict(value) for name, value in schema.items()}
    is_open = {"additionalProperties", "x-kubernetes-preserve-unknown-fields"} & set(schema)
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not is_open:
        closed["additionalProperties"] = False
    return closed


@pytest.mark.skipif(not CRD_FOLDER, reason="SPACH_KSERVE_CRDS names no folder with KServe's CRDs (its config/crd/full)")
@pytest.mark.parametrize("written", KSERVE_VARIANTS, indirect=True)
@pytest.mark.parametrize("kind", ["InferenceService", "ServingRuntime"])
def test_kserve_resources_are_valid_by_its_own_crds(written: KubernetesPackage, kind: str) -> None:
    (definition,) = documents((Path(CRD_FOLDER) / f"serving.kserve.io_{kind.lower()}s.yaml").read_text())
    for overlay in ("staging", "production"):
        resource = one(built(written.path / "overlays" / overlay), kind)
        (version,) = [v for v in definition["spec"]["versions"] if resource["apiVersion"].endswith(f"/{v['name']}")]
        validator = jsonschema.Draft7Validator(strict(version["schema"]["openAPIV3Schema"]))
        kept = {**resource, "metadata": {}}
        validator.validate(kept)
        kept["spec"] = {**resource["spec"], "predictors": {}}
        assert not validator.is_valid(kept)


@pytest.mark.skipif(command() is None, reason="neither kustomize nor kubectl is installed")
@pytest.mark.parametrize("folder", ["base", "overlays/staging", "overlays/production"])
def test_kustomize_builds_what_the_tests_resolve_by_hand(written: KubernetesPackage, folder: str) -> None:
    ours, theirs = built(written.path / folder), built_by_kustomize(written.path / folder)
    assert {key(resource): resource for resource in ours} == {key(resource): resource for resource in theirs}


def key(resource: Resource) -> tuple[str, str]:
    return resource["kind"], resource["metadata"]["name"]


def test_the_component_for_the_prometheus_operator_can_be_added(written: KubernetesPackage, tmp_path: Path) -> None:
    overlay = written.path / "overlays" / "production" / "kustomization.yaml"
    text = overlay.read_text()
    commented = "# components:\n#   - ../../components/prometheus-operator\n"
    assert commented in text
    overlay.write_text(text.replace(commented, commented.replace("# ", "", 1).replace("#   -", "  -")))
    try:
        found = built(overlay.parent)
        if command() is not None:
            assert key(one(built_by_kustomize(overlay.parent), "PodMonitor")) == key(one(found, "PodMonitor"))
    finally:
        overlay.write_text(text)
    monitor = one(found, "PodMonitor")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= pod(found)["metadata"]["labels"].items()
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in {port["name"] for port in pod(found)["spec"]["containers"][0]["ports"]}


# Security


def test_pods_meet_the_standard_that_their_namespace_enforces(resources: list[Resource]) -> None:
    """Pod security standard `restricted`, and a root file system that cannot be written."""
    namespace = one(resources, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    spec = pod(resources)["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 1000
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    for container in containers(resources):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["runAsNonRoot"] is True
        assert context["privileged"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert not any("hostPort" in port for port in container.get("ports", ()))


def test_what_is_writable_is_an_empty_dir_with_a_limit(resources: list[Resource]) -> None:
    volumes = {volume["name"]: volume for volume in pod(resources)["spec"]["volumes"]}
    assert all(set(volume) == {"name", "emptyDir"} for volume in volumes.values())
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    for container in containers(resources):
        places = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert places == {"/tmp": "tmp", "/dev/shm": "shm"}
        environment = {entry["name"]: entry["value"] for entry in container["env"]}
        assert environment["HOME"] == "/tmp"
        assert environment["CUDA_CACHE_PATH"].startswith("/tmp/")
        memory = size(container["resources"]["limits"]["memory"])
        assert size(volumes["shm"]["emptyDir"]["sizeLimit"]) < memory


def test_pods_get_no_token_and_no_traffic_out(resources: list[Resource]) -> None:
    assert one(resources, "ServiceAccount")["automountServiceAccountToken"] is False
    spec = pod(resources)["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["serviceAccountName"] == one(resources, "ServiceAccount")["metadata"]["name"]
    policy = one(resources, "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["egress"] == []
    assert all(rule.get("from") and rule.get("ports") for rule in policy["ingress"])


# Resources, probes


def size(quantity: str) -> int:
    """Bytes of a quantity."""
    match = re.fullmatch(r"(\d+)(Mi|Gi)", quantity)
    assert match, quantity
    return int(match[1]) << {"Mi": 20, "Gi": 30}[match[2]]


def test_every_container_has_a_gpu_and_bounded_memory(resources: list[Resource]) -> None:
    for container in containers(resources):
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert requests["nvidia.com/gpu"] == limits["nvidia.com/gpu"] == "1"
        assert size(requests["memory"]) == size(limits["memory"]) >= 4 << 30


def test_probes_ask_triton_and_the_start_has_the_time_it_needs(
    written: KubernetesPackage, resources: list[Resource]
) -> None:
    (server,) = pod(resources)["spec"]["containers"]
    port = {entry["name"]: entry["containerPort"] for entry in server["ports"]}["http"]
    for probe, path in (("startupProbe", "ready"), ("readinessProbe", "ready"), ("livenessProbe", "live")):
        assert server[probe]["httpGet"] == {"path": f"/v2/health/{path}", "port": port}
    startup = server["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= written.deployment.sizes.startup_seconds
    assert f"--http-port={port}" in server["args"]
    grace = pod(resources)["spec"]["terminationGracePeriodSeconds"]
    assert grace > 10 + 30  # preStop, then --exit-timeout-secs


# Golden check


def test_the_golden_check_runs_before_the_server_with_the_same_model(resources: list[Resource]) -> None:
    spec = pod(resources)["spec"]
    (check,), (server,) = spec["initContainers"], spec["containers"]
    assert check["image"] == server["image"]
    script, command_line = check["args"][: check["args"].index("--")], check["args"][check["args"].index("--") + 1 :]
    assert script[:3] == ["python3", "/opt/spach/golden_check.py", "--golden=/opt/spach/golden"]
    assert command_line[:2] == server["args"][:2] == ["tritonserver", "--model-repository=/models"]
    assert "--http-address=127.0.0.1" in command_line
    (url,) = [argument for argument in script if argument.startswith("--url=")]
    assert f"--http-port={url.rpartition(':')[2]}" in command_line
    for field in ("env", "resources", "securityContext", "volumeMounts"):
        assert check[field] == server[field]


def test_the_image_is_the_one_to_be_built(written: KubernetesPackage, resources: list[Resource]) -> None:
    assert {container["image"] for container in containers(resources)} == {
        f"registry.example.com/spach/ms-hybrid-s-plus:{written.image_tag}"
    }
    assert written.image_tag.startswith("25.08-fp16-")


DIGEST = f"sha256:{'0123456789abcdef' * 4}"


@pytest.mark.parametrize("kserve", [False, True])
def test_pods_name_what_was_pushed_by_its_digest_and_pull_it_with_the_secrets(kserve: bool, tmp_path: Path) -> None:
    options = KubernetesOptions(kserve=kserve, image_digest=ImageDigest(DIGEST), pull_secrets=("one", "two.of-them"))
    written = write_folder(with_engine(tmp_path / "b"), tmp_path / "k8s", options)
    found = built(written.path / "overlays" / "production")
    assert {container["image"] for container in containers(found)} == {f"registry.example.com/spach/tiny@{DIGEST}"}
    assert pod(found)["spec"]["imagePullSecrets"] == [{"name": "one"}, {"name": "two.of-them"}]
    validate(pod(found), KUBERNETES[-1])
    if kserve:
        validate_kserve(one(found, "InferenceService"))
        assert "imagePullSecrets" in one(found, "InferenceService")["spec"]["predictor"]
    if command() is not None:
        theirs = built_by_kustomize(written.path / "overlays" / "production")
        assert {key(r): r for r in theirs} == {key(r): r for r in found}


def test_without_secrets_pods_have_none(resources: list[Resource]) -> None:
    assert "imagePullSecrets" not in pod(resources)["spec"]


# What refers to what


def test_selectors_find_the_pods(resources: list[Resource]) -> None:
    labels = pod(resources)["metadata"]["labels"].items()
    selectors = [
        one(resources, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        one(resources, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        *(entry["labelSelector"]["matchLabels"] for entry in pod(resources)["spec"]["topologySpreadConstraints"]),
    ]
    selectors += [r["spec"]["selector"] for r in resources if r["kind"] == "Service"]
    selectors += [r["spec"]["selector"]["matchLabels"] for r in resources if r["kind"] == "Deployment"]
    for selector in selectors:
        assert selector
        assert selector.items() <= labels


def test_the_service_and_the_policy_name_the_server_s_ports(resources: list[Resource]) -> None:
    (server,) = pod(resources)["spec"]["containers"]
    ports = {entry["name"]: entry["containerPort"] for entry in server["ports"]}
    for service in (r for r in resources if r["kind"] == "Service"):
        assert {port["targetPort"] for port in service["spec"]["ports"]} == {"http", "grpc"}
    allowed = [[port["port"] for port in rule["ports"]] for rule in one(resources, "NetworkPolicy")["spec"]["ingress"]]
    assert allowed == [[ports["http"], ports["grpc"]], [ports["metrics"]]]
    assert f"--metrics-port={ports['metrics']}" in server["args"]


def test_the_autoscaler_scales_what_there_is_on_a_metric_that_the_adapter_makes(
    written: KubernetesPackage, resources: list[Resource]
) -> None:
    autoscaler = one(resources, "HorizontalPodAutoscaler")["spec"]
    name = "ms-hybrid-s-plus-predictor" if written.deployment.options.kserve else "ms-hybrid-s-plus"
    assert autoscaler["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
    assert not any("replicas" in r["spec"] for r in resources if r["kind"] == "Deployment")
    adapter = yaml.safe_load((written.path / "monitoring" / "prometheus-adapter.yaml").read_text())
    (rule,) = adapter["rules"]["custom"]
    assert autoscaler["metrics"][0]["pods"]["metric"]["name"] == rule["name"]["as"]
    assert re.fullmatch(rule["name"]["matches"], "nv_inference_queue_duration_us")
    series = re.findall(r"rate\((nv_\w+)\{<<.LabelMatchers>>\}\[1m\]\)", rule["metricsQuery"])
    assert series == ["nv_inference_queue_duration_us", "nv_inference_request_success"]
    assert rule["metricsQuery"].endswith(" by (<<.GroupBy>>)")
    comment = (written.path / "base" / "hpa.yaml").read_text().replace("\n# ", " ")
    assert "prometheus-adapter (custom.metrics.k8s.io) hands it to this autoscaler as triton_queue_time_us" in comment


def test_staging_has_one_pod_and_production_as_many_as_asked(written: KubernetesPackage) -> None:
    bounds = {}
    for overlay in ("staging", "production"):
        found = built(written.path / "overlays" / overlay)
        autoscaler = one(found, "HorizontalPodAutoscaler")["spec"]
        bounds[overlay] = (autoscaler["minReplicas"], autoscaler["maxReplicas"])
        if written.deployment.options.kserve:
            predictor = one(found, "InferenceService")["spec"]["predictor"]
            assert (predictor["minReplicas"], predictor["maxReplicas"]) == bounds[overlay]
        namespaces = {r["metadata"].get("namespace") for r in found if r["kind"] != "Namespace"}
        assert namespaces == {one(found, "Namespace")["metadata"]["name"]}
        keys = [entry["topologyKey"] for entry in pod(found)["spec"]["topologySpreadConstraints"]]
        assert ("topology.kubernetes.io/zone" in keys) == (overlay == "production")
    assert bounds == {"staging": (1, 1), "production": (2, 5)}


@pytest.mark.parametrize("written", KSERVE_VARIANTS, indirect=True)
def test_kserve_finds_its_runtime_and_leaves_scaling_to_the_autoscaler(written: KubernetesPackage) -> None:
    found = built(written.path / "base")
    runtime, service = one(found, "ServingRuntime"), one(found, "InferenceService")
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    formats = [{"name": f["name"], "version": f["version"]} for f in runtime["spec"]["supportedModelFormats"]]
    assert model["modelFormat"] in formats
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    assert [container["name"] for container in runtime["spec"]["containers"]] == ["kserve-container"]
    assert service["metadata"]["annotations"]["serving.kserve.io/autoscalerClass"] == "external"


# Names


def strings(value: Any, under: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from strings(inner, (*under, str(name)))
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner, under)
    elif isinstance(value, str):
        yield under, value


DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")
LABEL_KEY = re.compile(r"([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


def test_every_name_and_label_is_one_that_kubernetes_takes(resources: list[Resource]) -> None:
    for resource in resources:
        for path, text in strings(resource):
            if path[-1] in ("name", "namespace") and "env" not in path and "metric" not in path:
                assert DNS_LABEL.fullmatch(text), (path, text)
            if len(path) > 1 and path[-2] in ("labels", "matchLabels", "selector"):
                assert LABEL_KEY.fullmatch(path[-1]), path
                assert LABEL_VALUE.fullmatch(text), (path, text)


# Placement


def affinity(written: KubernetesPackage) -> Any:
    return pod(built(written.path / "base"))["spec"].get("affinity")


def test_a_plan_goes_to_the_gpus_it_was_built_for(tmp_path: Path) -> None:
    bundle = with_engine(tmp_path / "b", gpus=["sm90", "sm100", "bad gpu"])
    found = affinity(write_folder(bundle, tmp_path / "k8s", KubernetesOptions()))
    terms = found["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    wanted = [{e["key"].rpartition(".")[2]: e["values"] for e in term["matchExpressions"]} for term in terms]
    assert wanted == [{"major": ["9"], "minor": ["0"]}, {"major": ["10"], "minor": ["0"]}]


def test_a_hardware_compatible_plan_goes_to_ampere_and_newer(tmp_path: Path) -> None:
    bundle = with_engine(tmp_path / "b", gpus=["sm80"], hardware_compatible=True)
    found = affinity(write_folder(bundle, tmp_path / "k8s", KubernetesOptions()))
    (term,) = found["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert term["matchExpressions"] == [{"key": "nvidia.com/gpu.compute.major", "operator": "Gt", "values": ["7"]}]


def test_a_graph_goes_to_any_gpu(tmp_path: Path) -> None:
    bundle = with_rtx_engine(tmp_path / "b")
    assert affinity(write_folder(bundle, tmp_path / "k8s", KubernetesOptions())) is None


def environment(written: KubernetesPackage) -> dict[str, str]:
    (server,) = pod(built(written.path / "base"))["spec"]["containers"]
    return {entry["name"]: entry["value"] for entry in server["env"]}


def test_tf32_is_off_where_the_bundle_has_no_room_for_it(tmp_path: Path) -> None:
    exact = with_engine(tmp_path / "exact", tiny=Tiny(precision=Precision.FP32), tf32=False)
    roomy = with_engine(tmp_path / "roomy", tiny=Tiny(precision=Precision.FP32), tf32=True)
    for bundle, value in ((exact, "0"), (roomy, None)):
        written = write_folder(bundle, tmp_path / f"{bundle.name}-k8s", KubernetesOptions())
        assert environment(written).get("NVIDIA_TF32_OVERRIDE") == value


def test_a_version_compatible_plan_is_loaded_as_one(tmp_path: Path) -> None:
    flag = "--backend-config=tensorrt,version-compatible=true"
    for compatible in (True, False):
        bundle = with_engine(tmp_path / f"b{compatible}", version_compatible=compatible)
        written = write_folder(bundle, tmp_path / f"k{compatible}", KubernetesOptions(triton_version="25.08"))
        assert [flag in container["args"] for container in containers(built(written.path / "base"))] == [compatible] * 2


def test_comments_fit_on_a_line(written: KubernetesPackage) -> None:
    files = [file for file in written.path.rglob("*") if file.suffix in (".yaml", ".md") or file.name == "Dockerfile"]
    for file in files:
        if "models" in file.parts:  # the model repository has a README of its own
            continue
        assert [line for line in file.read_text().splitlines() if len(line) > 140] == [], file
        assert not re.search(r"@[A-Z_]+@", file.read_text())


def test_documents_are_found_in_text_with_several() -> None:
    assert documents("a: 1\n---\n---\nb: 2\n") == [{"a": 1}, {"b": 2}]
