"""The offline check: nothing is found in what is written here, and each thing that can be broken is found by name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from spach_deploy.common.errors import UsageError
from spach_deploy.options.specs import Precision
from spach_deploy.packaging.triton.check import Checked, Severity, check_repository
from spach_deploy.packaging.triton.check.findings import as_json, as_text
from spach_deploy.packaging.triton.options import Accelerator, Backend, TritonOptions
from spach_deploy.packaging.triton.repository import write_repository
from spach_deploy.packaging.triton.served_model import BundleArgument
from tests.packaging.triton import tiny_bundles
from tests.packaging.triton.broken_repositories import (
    BROKEN,
    GOOD,
    GRAPH_FILE,
    block,
    both,
    clear,
    parameter,
    preferred,
    set_,
)
from tests.packaging.triton.tiny_bundles import Tiny


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Repositories that are as they should be, not to be changed."""
    root = tmp_path_factory.mktemp("good")

    def get(name: str) -> Path:
        if not (root / name).exists():
            tiny, options = GOOD[name]
            bundle = tiny_bundles.write(root / f"{name}-bundle", tiny)
            write_repository([BundleArgument(bundle)], root / name, options)
        return root / name

    return get


@pytest.mark.parametrize("name", GOOD)
def test_nothing_is_found_in_what_is_written_here(good: Callable[[str], Path], name: str) -> None:
    checked = check_repository(good(name))
    assert checked.findings == ()
    assert checked.exit_code == 0
    assert checked.models


@pytest.mark.parametrize("name", BROKEN)
def test_each_thing_that_is_broken_is_found_by_name(good: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    broken = BROKEN[name]
    repository = tmp_path / "repository"
    shutil.copytree(good(broken.base), repository)
    broken.spoil(repository)
    checked = check_repository(repository)
    assert checked.exit_code == 1
    listed = [(finding.file, finding.field, finding.found) for finding in checked.errors]
    assert [f for f in listed if f[:2] == (broken.file, broken.field) and broken.found in f[2]], listed
    assert all(finding.expected and finding.fix for finding in checked.errors)


def test_there_are_enough_of_them() -> None:
    assert len(BROKEN) >= 40
    assert {broken.base for broken in BROKEN.values()} <= set(GOOD)


# Warnings, other repositories, the report


def bfloat16(folder: Path, kinds: str) -> Checked:
    """The check of a repository with a bfloat16 graph whose only instance group is of these kinds."""
    bundle = tiny_bundles.write(folder / "bundle", Tiny(engine="none", precision=Precision.BF16))
    write_repository([BundleArgument(bundle)], folder / "repository", TritonOptions())
    config = folder / "repository" / "tiny" / "config.pbtxt"
    config.write_text(config.read_text().replace("kind: KIND_GPU", kinds))
    return check_repository(folder / "repository")


@pytest.mark.parametrize(("kind", "errors", "findings"), [("GPU", 0, 0), ("CPU", 1, 1), ("AUTO", 0, 1)])
def test_bfloat16_is_for_gpus_only(kind: str, errors: int, findings: int, tmp_path: Path) -> None:
    checked = bfloat16(tmp_path, f"kind: KIND_{kind}")
    assert (len(checked.errors), len(checked.findings)) == (errors, findings)
    assert all("computes nothing in bfloat16 on a CPU" in finding.expected for finding in checked.findings)


def test_a_graph_that_no_triton_runs_is_found(tmp_path: Path) -> None:
    padded = Tiny(engine="none", precision=Precision.BF16, bfloat16=("Pad",))
    bundle = tiny_bundles.write(tmp_path / "bundle", padded)
    write_repository([BundleArgument(bundle)], tmp_path / "repository", TritonOptions(force=True))
    (found,) = check_repository(tmp_path / "repository").errors
    assert "has no kernel for Pad in bfloat16" in found.found


def test_what_tensorrt_compiles_needs_no_kernel_of_onnx_runtime(tmp_path: Path) -> None:
    padded = Tiny(engine="none", precision=Precision.BF16, bfloat16=("Pad",))
    bundle = tiny_bundles.write(tmp_path / "bundle", padded)
    write_repository([BundleArgument(bundle)], tmp_path / "repository", TritonOptions(accelerator=Accelerator.TENSORRT))
    assert check_repository(tmp_path / "repository").findings == ()


def test_a_mode_that_was_not_compared_is_a_warning(tmp_path: Path) -> None:
    bundle = tiny_bundles.write(tmp_path / "bundle", Tiny(precision=Precision.FP32))
    repository = tmp_path / "repository"
    write_repository([BundleArgument(bundle)], repository, TritonOptions(accelerator=Accelerator.TENSORRT))
    assert check_repository(repository).findings == ()
    block("precision_mode", "FP16")(repository)
    (finding,) = check_repository(repository).findings
    assert (finding.severity, finding.field) == (Severity.WARNING, parameter("precision_mode"))
    block("int8_calibration_table_name", "calibration.flatbuffers")(repository)
    block("precision_mode", "INT8")(repository)
    assert check_repository(repository).findings == ()


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda text: "\ufeff" + text, "a byte order mark before the name"),
        (lambda text: text + "\n", "an empty last line"),
    ],
)
def test_labels_that_an_editor_spoiled(
    good: Callable[[str], Path], tmp_path: Path, spoil: Callable[[str], str], found: str
) -> None:
    shutil.copytree(good("plan"), tmp_path / "repository")
    labels = tmp_path / "repository" / "tiny" / "labels.txt"
    labels.write_text(spoil(labels.read_text()), encoding="utf-8")
    assert {finding.found for finding in check_repository(tmp_path / "repository").errors} == {found}


def test_a_graph_without_its_weights_is_found(tmp_path: Path) -> None:
    file = tmp_path / "repository" / GRAPH_FILE
    bundle = tiny_bundles.write(tmp_path / "bundle", Tiny(engine="none"))
    write_repository([BundleArgument(bundle)], tmp_path / "repository", TritonOptions())
    file.with_name("bundle.json").unlink()
    onnx.save(onnx.load(file), file, save_as_external_data=True, location="weights.data", size_threshold=0)
    assert check_repository(tmp_path / "repository").errors == ()
    file.with_name("weights.data").unlink()
    (finding,) = check_repository(tmp_path / "repository").errors
    assert finding.found == "no weights.data, which holds its weights"
    tiny_bundles.keep_weights_in(file, "../../../../etc/passwd")
    (finding,) = check_repository(tmp_path / "repository").errors
    assert finding.found == "weights in ../../../../etc/passwd, which leads outside of its folder"
    assert "passwd" not in finding.fix


def test_a_plan_of_rtx_that_was_asked_for_is_a_warning(tmp_path: Path) -> None:
    bundle = tiny_bundles.write(tmp_path / "bundle", Tiny(engine="tensorrt-rtx"))
    write_repository([BundleArgument(bundle)], tmp_path / "repository", TritonOptions(Backend.TENSORRT))
    checked = check_repository(tmp_path / "repository")
    assert checked.exit_code == 0
    assert [finding.severity for finding in checked.findings] == [Severity.WARNING]
    assert "does not load plans of TensorRT for RTX" in checked.findings[0].expected


def test_more_than_the_profile_is_a_warning_for_a_graph(good: Callable[[str], Path], tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(good("graph"), repository)
    set_("max_batch_size", 64)(repository)
    checked = check_repository(repository)
    assert checked.exit_code == 0
    assert [finding.field for finding in checked.findings] == ["max_batch_size"]


def test_a_repository_of_others_is_checked_by_its_graphs(tmp_path: Path) -> None:
    folder = tmp_path / "repository" / "theirs" / "3"
    folder.mkdir(parents=True)
    bundle = tiny_bundles.write(tmp_path / "bundle")
    shutil.copy(bundle / "model.onnx", folder / "model.onnx")
    config = 'backend: "onnxruntime" max_batch_size: 99 input {{ name: "input" data_type: TYPE_FP32 dims: {dims} }}'
    config += ' output {{ name: "logits" data_type: TYPE_FP32 dims: 7 }}'
    file = folder.parent / "config.pbtxt"
    file.write_text(config.format(dims="[3, 8, 8]"))
    assert check_repository(tmp_path / "repository").findings == ()
    file.write_text(config.format(dims="[3, 9, 9]"))
    assert [finding.field for finding in check_repository(tmp_path / "repository").findings] == ["input[0].dims"]


def test_a_backend_that_is_not_named_is_known_by_the_file(good: Callable[[str], Path], tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(good("plan"), repository)
    both(clear("platform"), clear("backend"))(repository)
    assert check_repository(repository).findings == ()
    set_("input.0.data_type", 10)(repository)
    assert "input[0].data_type" in [finding.field for finding in check_repository(repository).errors]


def test_constants_of_old_graphs_are_no_inputs(tmp_path: Path) -> None:
    """Up to IR version 3 a graph listed its weights among its inputs."""
    bundle = tiny_bundles.write(tmp_path / "bundle", Tiny(engine="none"))
    write_repository([BundleArgument(bundle)], tmp_path / "repository", TritonOptions())
    path = tmp_path / "repository" / GRAPH_FILE
    model = onnx.load(path)
    model.graph.input.append(helper.make_tensor_value_info("weights", 1, [192, 7]))
    onnx.save(model, path)
    (path.parent / "bundle.json").unlink()
    assert [finding.field for finding in check_repository(tmp_path / "repository").findings] == []


@pytest.mark.parametrize("base", ["graph", "explicit"])
def test_whatever_is_damaged_the_check_says_so_and_does_not_fail(
    good: Callable[[str], Path], tmp_path: Path, base: str
) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(good(base), repository)
    random = np.random.default_rng(3)
    files = [path for path in sorted(repository.rglob("*")) if path.suffix in (".pbtxt", ".json", ".onnx", ".txt")]
    for _ in range(100):
        file = files[random.integers(len(files))]
        whole = file.read_bytes()
        start = int(random.integers(len(whole)))
        new = random.integers(32, 127, random.integers(0, 4), np.uint8).tobytes()
        file.write_bytes(whole[:start] + new + whole[start + int(random.integers(0, 40)) :])
        assert check_repository(repository).exit_code in (0, 1)  # a lost default or the name of a label harms nothing
        file.write_bytes(whole)


def test_an_empty_repository_is_a_finding(tmp_path: Path) -> None:
    assert check_repository(tmp_path).exit_code == 1


@pytest.mark.parametrize(("name", "reason"), [("nowhere", "does not exist"), ("file", "is not a folder")])
def test_what_is_no_repository_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=reason):
        check_repository(tmp_path / name)


def test_the_report_names_file_field_found_expected_and_fix(good: Callable[[str], Path], tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(good("plan"), repository)
    set_("max_batch_size", 64)(repository)
    preferred(4, 64)(repository)
    checked = check_repository(repository)
    assert as_text(checked).splitlines() == [
        "tiny/config.pbtxt",
        "  max_batch_size: found 64",
        "    expected at most 8: the engine's batch profile is 1:4:8",
        "    fix      Write max_batch_size: 8, or export it with a larger --batch.",
        "",
        f"{repository}: 1 model, 1 finding.",
    ]
    report = json.loads(as_json(checked))
    assert not report["passed"]
    assert set(report["findings"][0]) == {"file", "field", "found", "expected", "fix", "severity"}
    assert as_text(Checked("r", ("a", "b"), ())) == "r: 2 models, nothing found."


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("trt_engine_cache_path", "", "none"),
        ("trt_engine_cache_path", "engines", "below wherever the server is started"),
        ("trt_engine_cache_enable", "false", "which is not used"),
        ("trt_engine_cache_path", "/models/engines", "read-only"),
        ("trt_engine_cache_path", "/engines/../models", "read-only"),
    ],
)
def test_a_cache_folder_that_may_be_lost_is_a_warning(
    good: Callable[[str], Path], tmp_path: Path, name: str, value: str, found: str
) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(good("accelerated"), repository)
    block(name, value or None)(repository)
    checked = check_repository(repository)
    assert [(finding.severity, finding.field) for finding in checked.findings] == [
        (Severity.WARNING, parameter("trt_engine_cache_path"))
    ]
    assert found in checked.findings[0].found
    assert checked.exit_code == 0


def test_engines_in_a_common_folder_are_a_warning(tmp_path: Path) -> None:
    bundle, repository = (
        tiny_bundles.write(tmp_path / "bundle", Tiny(precision=Precision.BF16)),
        tmp_path / "repository",
    )
    arguments = [BundleArgument(bundle, name) for name in ("tiny", "other")]
    write_repository(arguments, repository, TritonOptions(accelerator=Accelerator.TENSORRT))
    assert check_repository(repository).findings == ()
    config = repository / "other" / "config.pbtxt"
    config.write_text(re.sub(r"/tmp/other-\w+", "/engines", config.read_text()))
    config = repository / "tiny" / "config.pbtxt"
    config.write_text(re.sub(r"/tmp/tiny-\w+", "/engines", config.read_text()))
    findings = check_repository(repository).findings
    assert [finding.found for finding in findings] == [
        '"/engines", which tiny uses too',
        '"/engines", which other uses too',
    ]
    assert {finding.severity for finding in findings} == {Severity.WARNING}
    block("trt_engine_cache_prefix", "tiny")(repository)
    assert check_repository(repository).findings == ()
    shutil.copytree(repository / "tiny" / "1", repository / "tiny" / "2")
    assert [finding.found for finding in check_repository(repository).findings] == [
        '"/engines", which its other versions use too'
    ]


def test_every_parameter_that_the_backend_documents_is_known(good: Callable[[str], Path], tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(good("accelerated"), repository)
    documented = {
        "max_workspace_size_bytes": "4294967296",
        "trt_max_partition_iterations": "1000",
        "trt_min_subgraph_size": "1",
        "trt_builder_optimization_level": "3",
        "trt_auxiliary_streams": "-1",
        "trt_tactic_sources": "-CUDNN,+CUBLAS",
        "trt_cuda_graph_enable": "False",
        "trt_ep_context_embed_mode": "1",
        "int8_use_native_calibration_table": "0",
    }
    for name, value in documented.items():
        block(name, value)(repository)
    assert check_repository(repository).findings == ()
