"""Ordinary TensorRT 10 and 11 through Polygraphy's own loaders, against packages that carry their surfaces."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from spach_deploy.common.errors import BuildError, MissingPackageError
from spach_deploy.engine.build import EngineResult, build_engine
from spach_deploy.engine.flavours import TensorRT
from spach_deploy.engine.network_facts import check_achieved_precision
from spach_deploy.options.specs import BatchProfile, ComputeCapability, EngineTarget, Precision
from spach_deploy.runtime.devices import LocalGpu
from spach_deploy.runtime.plan_identity import plan_identity

FAKES = Path(__file__).parent / "fakes/site-packages"
VERSIONS = {"tensorrt_10_16": "10.16.1", "tensorrt_11_4": "11.4.0"}
HERE = TensorRT(gpus=(LocalGpu("NVIDIA A10", ComputeCapability(8, 6)),))


@pytest.fixture(params=VERSIONS)
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    install(request.param, monkeypatch)
    return str(request.param)


def install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = (str(FAKES / package), str(FAKES / "common"), os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, parts)))


def build(path: Path, package: str, graph: dict[str, Any] | None = None, **options: Any) -> EngineResult:
    version = [int(number) for number in VERSIONS.get(package, "0.0.0").split(".")]
    layers = [{"name": "head", "kind": "MATRIX_MULTIPLY", "dtype": "HALF"}]
    defaults = {"inputs": [["images", "FLOAT", [-1, 3, 8, 8]]], "layers": layers, "version": version}
    path.write_text(json.dumps({**defaults, **(graph or {})}))
    return build_engine(path, EngineTarget(**options), HERE, precision=Precision.FP16)


def calls(result: EngineResult) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(result.plan[result.plan.index(b"{") :])
    return record


def test_the_network_is_strongly_typed_whatever_bit_that_is(tmp_path: Path, package: str) -> None:
    result = build(tmp_path / "graph", package)
    assert calls(result)["network_flags"] == {"tensorrt_10_16": 2, "tensorrt_11_4": 1}[package]
    assert result.flavour_version.startswith(VERSIONS[package])
    assert plan_identity(result.plan).version == VERSIONS[package]


def test_the_builder_names_the_bytes_that_it_parsed(tmp_path: Path, package: str) -> None:
    result = build(tmp_path / "graph", package)
    assert result.graph_sha256 == hashlib.sha256((tmp_path / "graph").read_bytes()).hexdigest()


def test_profile_verbosity_and_monitor_are_set(tmp_path: Path, package: str) -> None:
    record = calls(build(tmp_path / "graph", package, batch=BatchProfile(1, 8, 32)))
    assert record["profiles"] == [{"images": [[1, 3, 8, 8], [8, 3, 8, 8], [32, 3, 8, 8]]}]
    assert record["attributes"]["profiling_verbosity"] == "DETAILED"
    assert "Monitor" in record["attributes"]["progress_monitor"]
    assert record["flags"] == ["TF32"]  # and no precision flag: precision is in the graph


def test_every_switch_is_honoured(tmp_path: Path, package: str) -> None:
    cache = tmp_path / "timings"
    result = build(
        tmp_path / "graph",
        package,
        opt_level=3,
        workspace_bytes=1 << 28,
        tf32=False,
        version_compatible=True,
        hardware_compatible=True,
        timing_cache=cache,
    )
    record = calls(result)
    assert record["attributes"]["builder_optimization_level"] == "3"
    assert record["attributes"]["hardware_compatibility_level"] == "AMPERE_PLUS"
    assert record["pools"] == {"WORKSPACE": 1 << 28}
    assert (record["flags"], record["cleared"]) == (["VERSION_COMPATIBLE"], ["TF32"])
    assert cache.read_bytes() == b"timings"
    again = calls(build(tmp_path / "graph", package, timing_cache=cache))
    assert again["timing_cache_bytes"] == len(b"timings")


def test_achieved_precision_is_read_from_the_network(tmp_path: Path, package: str) -> None:
    result = build(tmp_path / "graph", package)
    assert check_achieved_precision(result.network, Precision.FP16).layers_by_dtype == {"fp16": 1}


def test_no_plan_gives_the_reason_in_the_builders_log(tmp_path: Path, package: str) -> None:
    reason = "Could not find any implementation for node {ForeignNode[head]}."
    log = [["WARNING", "warning"], ["ERROR", f"IBuilder::build: Error Code 10: Internal Error ({reason})"]]
    with pytest.raises(BuildError, match=r"tensorrt cannot build graph: Could not find any implementation") as caught:
        build(tmp_path / "graph", package, {"builder_fails": True, "builder_log": log})
    assert "Invalid Engine" not in str(caught.value)


def test_no_plan_and_no_reason_is_said_in_as_many_words(tmp_path: Path, package: str) -> None:
    with pytest.raises(BuildError, match="it gave no reason"):
        build(tmp_path / "graph", package, {"builder_fails": True})


def test_a_parser_error_names_the_node(tmp_path: Path, package: str) -> None:
    error = "In node 3 with name: layer1.0.det and operator: Det (checkDet): UNSUPPORTED_NODE: false"
    with pytest.raises(BuildError, match=r"node 'layer1\.0\.det' \(Det\): operator Det is not supported"):
        build(tmp_path / "graph", package, {"parser_errors": [error]})


def test_warnings_are_summarized_with_counts(tmp_path: Path, package: str) -> None:
    log = [["WARNING", f"Tactic {index} ran out of memory"] for index in range(3)] + [["WARNING", "Another"]]
    result = build(tmp_path / "graph", package, {"builder_log": log})
    assert result.warnings == (("Tactic 0 ran out of memory", 3), ("Another", 1))


def test_libraries_that_do_not_load_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install("tensorrt_broken", monkeypatch)
    with pytest.raises(MissingPackageError, match=r"libnvinfer.*installer fetches them from NVIDIA's own") as caught:
        build(tmp_path / "graph", "tensorrt_broken")
    assert caught.value.package.startswith("a working tensorrt")


@pytest.mark.parametrize(
    ("number", "step"),
    [
        (signal.SIGSEGV, "--no-rewrite NAME gives it another graph, and --engine none exports the graph alone"),
        (signal.SIGKILL, "fewer --gpu or a smaller --batch"),
    ],
)
def test_a_compiler_that_dies_is_an_error_and_not_the_end_of_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, step: str
) -> None:
    install("tensorrt_11_4", monkeypatch)
    with pytest.raises(BuildError, match=rf"{number.name}, saying: words of a dying compiler") as caught:
        build(tmp_path / "graph", "tensorrt_11_4", {"builder_gets_signal": number})
    assert step in caught.value.hint
