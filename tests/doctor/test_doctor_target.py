"""Bundles and plans as they come: whole, spoiled, from elsewhere, or something else altogether."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.store import GOLDEN, GRAPH, MANIFEST, PLAN
from spach_deploy.cli.export import main as export_command
from spach_deploy.common.errors import BundleError, UsageError
from spach_deploy.common.files import sha256_of
from spach_deploy.doctor.driver import ProbeResult
from spach_deploy.doctor.finding import Finding, Status, Task
from spach_deploy.doctor.machine_info import InstalledOnnxRuntime, MachineInfo
from spach_deploy.doctor.table import as_text
from spach_deploy.doctor.target import Target, examine_target
from spach_deploy.options.specs import BatchProfile, Flavour, Precision
from tests import manifests, processors, small_bundles
from tests.doctor import bundles
from tests.doctor.machines import A100, H100, L4, T4, cpu_machine, gpu_machine
from tests.doctor.plans import old_plan, ordinary_plan, rtx_plan, with_metadata
from tests.packaging.triton import tiny_bundles
from tests.packaging.triton.tiny_bundles import Tiny


def says(**content: Any) -> Callable[[Flavour, bytes], ProbeResult]:
    return lambda flavour, header: ProbeResult({"version": "1.7.1.116", **content})


VALID = says(validity="VALID", flaws=[])


def examine(path: Path, here: MachineInfo | None = None) -> Target:
    return examine_target(path, gpu_machine(L4) if here is None else here, VALID)


def finding(target: Target, topic: str) -> Finding:
    (found,) = (item for item in target.findings if item.topic == topic)
    return found


def verdict(target: Target) -> str:
    text = as_text(target, width=500)
    return next(line for line in text.splitlines() if line.startswith(("YES", "NO", "PERHAPS")))


def refused(path: Path) -> str:
    with pytest.raises(UsageError) as error:
        examine(path)
    return str(error.value)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return bundles.write_bundle(tmp_path / "bundle")


def written(tmp_path: Path, content: bytes, name: str = "other.engine") -> Path:
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


# Bundles


@pytest.mark.parametrize("name", ["", PLAN, MANIFEST])
def test_a_bundle_that_can_run_here(bundle: Path, name: str) -> None:
    target = examine(bundle / name)
    assert target.exit_code == 0
    assert {item.status for item in target.findings} == {Status.OK}
    assert verdict(target) == "YES, this machine can run it."


def test_a_real_bundle() -> None:
    target = examine(small_bundles.bundle(), gpu_machine(T4))
    assert target.exit_code == 3
    assert finding(target, "input profile").what == "input: float32 N x 3 x 32 x 32 (NCHW)"
    assert "built for sm86, sm89" in verdict(target)


def test_no_gpu(bundle: Path) -> None:
    target = examine(bundle, cpu_machine())
    assert target.exit_code == 3
    assert verdict(target) == "NO, this machine cannot run it: no NVIDIA GPU is here."
    assert finding(target, GRAPH).command == f"spach-validate {bundle} --accept graph"


def test_a_bfloat16_graph_runs_on_no_cpu_and_can_be_verified_there(tmp_path: Path) -> None:
    bundle = tiny_bundles.write(tmp_path / "b", Tiny(precision=Precision.BF16))
    found = finding(examine(bundle, cpu_machine()), GRAPH)
    assert found.status is Status.OK
    assert found.what == "ONNX Runtime 1.32.0 computes nothing in bfloat16 on a CPU"
    assert "spach-validate runs it in FP32" in found.means


def test_a_graph_that_is_too_new_for_the_onnx_runtime_that_is_here(tmp_path: Path) -> None:
    bundle = tiny_bundles.write(tmp_path / "b", Tiny(opset=22))
    older = InstalledOnnxRuntime({"onnxruntime": "1.20.1"}, "onnxruntime", "1.20.1", ("cpu",))
    found = finding(examine(bundle, dataclasses.replace(cpu_machine(), onnxruntime=older)), GRAPH)
    assert (found.status, found.blocks) == (Status.PROBLEM, (Task.VERIFY,))
    assert found.what == "ONNX Runtime 1.20.1 loads opset 21, and the graph has opset 22"


def test_the_command_that_changes_the_verdict_is_at_the_end(bundle: Path) -> None:
    text = as_text(examine(bundle, gpu_machine(T4)))
    last = f"spach-export --model ms_hybrid_s --fp16 --engine tensorrt-rtx --gpu sm75 --overwrite -o {bundle}"
    assert text.splitlines()[-1] == f"  $ {last}"


@pytest.mark.parametrize("name", [PLAN, GRAPH, GOLDEN])
@pytest.mark.parametrize("change", ["changed", "missing"])
def test_a_file_that_is_not_what_was_exported(bundle: Path, name: str, change: str) -> None:
    if change == "missing":
        (bundle / name).unlink()
    else:
        (bundle / name).write_bytes(b"something else")
    target = examine(bundle)
    assert target.exit_code == 1
    assert f"{name} {'is missing' if change == 'missing' else 'was changed'}" in verdict(target)
    assert not target.to_dict()["can_run"]


def test_a_plan_that_is_missing_from_its_bundle(bundle: Path) -> None:
    (bundle / PLAN).unlink()
    assert "engine.plan is missing" in verdict(examine(bundle / PLAN))


def test_a_changed_report_is_nobodys_business(bundle: Path) -> None:
    """Validating again writes it again."""
    bundles.rewrite(bundle, files={**bundles.read(bundle)["files"], "report.json": {"sha256": "0", "bytes": 2}})
    (bundle / "report.json").write_text("{}")
    assert examine(bundle).exit_code == 0


def test_a_bundle_without_golden_data_can_run_and_not_be_verified(bundle: Path) -> None:
    target = examine(bundles.without(bundle, GOLDEN))
    found = finding(target, "golden data")
    assert (target.exit_code, found.status) == (0, Status.MISSING)
    assert found.command == f"spach-validate {bundle} --images DIR --checkpoint FILE"


def test_a_bundle_without_a_plan(bundle: Path) -> None:
    bundles.without(bundle, PLAN)
    bundles.rewrite(bundle, engine={"flavour": "none", "reason": "--engine none was asked for"})
    target = examine(bundle)
    found = finding(target, PLAN)
    assert (target.exit_code, found.status, found.what) == (0, Status.OK, "--engine none was asked for")
    assert verdict(target) == "YES, in ONNX Runtime this machine can run it."
    assert target.to_dict()["runtime"] == "ONNX Runtime"
    assert found.command is not None
    assert "--engine auto" in found.command


def test_a_bundle_without_a_plan_where_nothing_runs_its_graph(tmp_path: Path) -> None:
    bundle = tiny_bundles.write(tmp_path / "b", Tiny(engine="none"))
    target = examine(bundle, cpu_machine(onnxruntime=None))
    found = finding(target, PLAN)
    assert target.exit_code == 3
    assert verdict(target).startswith("NO, this machine cannot run it: engine.plan: --engine none was asked for")
    assert found.means == "Nothing here runs its graph. onnxruntime is not here; openvino is not here."
    assert found.command is not None
    assert "pip install" in found.command


WITH_OPENVINO = {**cpu_machine().packages, "openvino": "2026.4.1"}


def test_a_bundle_of_target_cpu_runs_where_the_export_measured_it(tmp_path: Path) -> None:
    bundle = tiny_bundles.for_cpu(tiny_bundles.write(tmp_path / "b", Tiny(engine="none", precision=Precision.BF16)))
    target = examine(bundle, cpu_machine(packages=WITH_OPENVINO))
    text = as_text(target, width=500)
    assert target.exit_code == 0
    assert verdict(target) == "YES, in OpenVINO this machine can run it."
    assert "--engine auto" not in text
    assert "no runtime" not in text


def test_a_bundle_of_target_cpu_without_openvino_is_told_to_install_it(tmp_path: Path) -> None:
    bundle = tiny_bundles.for_cpu(tiny_bundles.write(tmp_path / "b", Tiny(engine="none", precision=Precision.BF16)))
    target = examine(bundle, cpu_machine())
    found = finding(target, PLAN)
    assert target.exit_code == 3
    assert "openvino is not here; ONNX Runtime 1.32.0 computes nothing in bfloat16 on a CPU" in found.means
    assert found.command is not None
    assert found.command.endswith("install openvino")


def test_int8_for_vnni_runs_on_no_processor_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tiny_bundles.for_vnni(tmp_path / "b")
    here = cpu_machine(packages=WITH_OPENVINO)
    processors.pretend("AVX-512", tmp_path, monkeypatch)
    assert examine(bundle, here).exit_code == 0
    processors.pretend("AVX2", tmp_path, monkeypatch)
    target = examine(bundle, here)
    assert target.exit_code == 3
    assert "Nothing here runs its graph. It is for CPUs with VNNI" in finding(target, PLAN).means


@pytest.mark.parametrize(
    ("section", "version", "is_wrong"),
    [
        ({"format": "int8", "rest": "fp16"}, "1.29.0", True),
        ({"format": "int8", "rest": "fp16"}, "1.30.0", False),
        ({"format": "int8", "rest": "fp16", "quantized_from": "fp32"}, "1.29.0", False),
        ({"format": "int8", "rest": "fp32"}, "1.29.0", False),
        ({"format": "fp8", "rest": "fp16", "quantized_from": "fp16"}, "1.29.0", False),
    ],
)
def test_int8_of_fp16_where_onnx_runtime_truncates_it(
    bundle: Path, section: dict[str, Any], version: str, is_wrong: bool
) -> None:
    bundles.rewrite(bundle, quantization=manifests.quantization(**section))
    runtime = InstalledOnnxRuntime({"onnxruntime": version}, "onnxruntime", version, ("cpu",))
    target = examine(bundle, dataclasses.replace(gpu_machine(L4), onnxruntime=runtime))
    found = finding(target, GRAPH)
    assert target.exit_code == 0  # its plan runs
    assert found.status is (Status.PROBLEM if is_wrong else Status.OK)
    assert (f"ONNX Runtime {version}'s QuantizeLinear truncates FP16" in found.what) == is_wrong
    assert ("Export it again" in found.means) == is_wrong


def test_a_plan_that_is_not_of_the_flavour_in_the_manifest(tmp_path: Path) -> None:
    path = bundles.write_bundle(tmp_path / "bundle", plan=ordinary_plan(10, 16, 1, 11))
    assert examine(path).exit_code == 2


def test_a_bundle_of_tensorrt(tmp_path: Path) -> None:
    plan = ordinary_plan(10, 16, 1, 11)
    engine = {"flavour": "tensorrt", "version": "10.16.1.11", "gpus": ["sm90"]}
    path = bundles.write_bundle(tmp_path / "bundle", plan=plan, **engine)
    assert examine(path, gpu_machine(H100)).exit_code == 0
    assert examine(path, gpu_machine(L4)).exit_code == 3
    bundles.rewrite(path, engine={**engine, "hardware_compatible": True})
    assert examine(path, gpu_machine(L4)).exit_code == 0


@pytest.mark.parametrize(
    ("batch", "says"), [({"min": 1, "opt": 8, "max": 32}, "N is 1 to 32"), ({"min": 4, "opt": 4, "max": 4}, "N is 4,")]
)
def test_the_input_profile(bundle: Path, batch: dict[str, int], says: str) -> None:
    bundles.rewrite(bundle, batch=batch)
    found = finding(examine(bundle), "input profile")
    assert found.what == "input: float32 N x 3 x 224 x 224 (NCHW)"
    assert says in found.means


@pytest.mark.parametrize(
    "sections",
    [
        {"batch": {"min": 0, "opt": 8, "max": 32}},
        {"batch": 8},
        {"batch": {"opt": "8"}},
        {"model": []},
        {"engine": {"flavour": "tensorflow"}},
        {"output_options": None},
        {"validation": "passed"},
        {"schema_version": 99},
        {"files": {"engine.plan": 3}},
        {"engine": {"flavour": "tensorrt-rtx", "gpus": "sm86"}},
    ],
)
def test_a_manifest_with_entries_of_the_wrong_kind(bundle: Path, sections: dict[str, Any]) -> None:
    bundles.rewrite(bundle, **sections)
    assert "manifest.json" in refused(bundle)


@pytest.mark.parametrize("gpus", [[], ["sm999"]])
def test_gpus_that_cannot_be_read_are_not_known(bundle: Path, gpus: list[str]) -> None:
    bundles.rewrite(bundle, engine={**bundles.read(bundle)["engine"], "gpus": gpus})
    assert finding(examine(bundle), "NVIDIA GPU").status is Status.UNKNOWN


def test_the_export_that_would_change_it_is_one_that_spach_export_takes(bundle: Path) -> None:
    model = {**manifests.model("ms_hybrid_s", 256, 9), "checkpoint": "my run.pth", "weights": "ema"}
    options = {"io_dtype": "uint8", "top_k": 5, "softmax": True}
    pixels = {"name": "input", "dtype": "uint8", "shape": [None, 256, 256, 3], "layout": "NHWC"}
    logits = {"name": "logits", "dtype": "float32", "shape": [None, 9], "layout": "NC"}
    tensors: dict[str, Any] = {"inputs": [pixels], "outputs": [logits], "preprocessing": manifests.preprocessing(256)}
    bundles.rewrite(bundle, model=model, output_options=options, batch={"min": 2, "opt": 4, "max": 8}, **tensors)
    command = finding(examine(bundle, gpu_machine(T4)), "NVIDIA GPU").command
    assert command is not None
    assert "--checkpoint 'my run.pth' --weights ema --image-size 256 --fp16 --io-dtype uint8 --top-k 5" in command
    context = export_command.make_context("spach-export", shlex.split(command)[1:])
    assert context.params["batch"] is not None


def test_control_characters_of_a_manifest_do_not_reach_the_terminal(bundle: Path) -> None:
    model = {**bundles.read(bundle)["model"], "name": "red\x1b[31m\nYES"}
    bundles.rewrite(bundle, model=model)
    text = as_text(examine(bundle, cpu_machine()))
    assert "\x1b" not in text
    assert "\nYES" not in text


# Plans from elsewhere


def test_a_plan_of_tensorrt_for_rtx(tmp_path: Path) -> None:
    path = written(tmp_path, rtx_plan(A100.capability, L4.capability))
    target = examine(path)
    assert (target.exit_code, target.name) == (0, "a plan of tensorrt-rtx, version 1.7.1.116")
    assert finding(target, "manifest").status is Status.MISSING
    other = examine(path, gpu_machine(T4))
    assert (other.exit_code, finding(other, "NVIDIA GPU").status) == (3, Status.PROBLEM)


def test_a_plan_of_tensorrt_is_not_known_to_fit_its_gpu(tmp_path: Path) -> None:
    target = examine(written(tmp_path, ordinary_plan(10, 16, 1, 11)))
    assert target.exit_code == 0
    assert verdict(target).startswith("PERHAPS")
    assert finding(target, "NVIDIA GPU").status is Status.UNKNOWN


def test_a_plan_of_the_other_flavour(tmp_path: Path) -> None:
    path = written(tmp_path, rtx_plan(L4.capability))
    only_ordinary = gpu_machine(L4, tensorrt={Flavour.TENSORRT: gpu_machine(L4).tensorrt[Flavour.TENSORRT]})
    target = examine(path, only_ordinary)
    assert target.exit_code == 3
    assert "tensorrt is here, and cannot load it" in finding(target, "tensorrt-rtx").means


@pytest.mark.parametrize("content", [ordinary_plan(8, 6, 1, 6), old_plan(232)])
def test_a_plan_of_another_major_version(tmp_path: Path, content: bytes) -> None:
    target = examine(written(tmp_path, content))
    assert target.exit_code == 3
    assert "Another major version" in finding(target, "tensorrt").means


def test_a_plan_that_is_cut_off(tmp_path: Path) -> None:
    target = examine(written(tmp_path, rtx_plan(L4.capability)[:1000]))
    assert target.exit_code == 2
    assert "1,000 bytes, and its header declares 3,096 more" in verdict(target)


def test_a_plan_that_may_be_cut_off(tmp_path: Path) -> None:
    target = examine(written(tmp_path, ordinary_plan(10, 16, 1, 11)[:1000]))
    assert (target.exit_code, finding(target, "size").status) == (0, Status.UNKNOWN)


@pytest.mark.parametrize("spoil", [with_metadata, lambda plan: plan + b"appended", lambda plan: b"model v3\n" + plan])
def test_the_command_gives_the_plain_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[bytes], bytes]
) -> None:
    """Run as it is printed, it makes a file that can run here."""
    path = written(tmp_path, spoil(rtx_plan(L4.capability)), "my engine.plan")
    target = examine(path)
    assert target.exit_code == 2
    (command,) = (item.command for item in target.findings if item.bad_target)
    monkeypatch.chdir(tmp_path)
    assert command is not None
    assert os.system(command) == 0
    assert (tmp_path / "plain.plan").read_bytes() == rtx_plan(L4.capability)
    assert examine(tmp_path / "plain.plan").exit_code == 0


def test_tensorrt_itself_is_asked_where_there_is_a_gpu(tmp_path: Path) -> None:
    path, here = written(tmp_path, rtx_plan(L4.capability)), gpu_machine(L4)
    invalid = examine_target(path, here, says(validity="INVALID", flaws=["VERSION_MISMATCH", "UNSUPPORTED_CC"]))
    assert (invalid.exit_code, finding(invalid, "header").status) == (3, Status.PROBLEM)
    assert "version mismatch, unsupported cc" in finding(invalid, "header").means
    for flaws in ([], ["CUDA_ERROR"]):
        unusable = examine_target(path, here, says(validity="INVALID", flaws=flaws))
        assert (unusable.exit_code, finding(unusable, "header").command) == (3, "nvidia-smi")
    suboptimal = examine_target(path, here, says(validity="SUBOPTIMAL", flaws=[]))
    assert (suboptimal.exit_code, finding(suboptimal, "header").status) == (0, Status.OK)
    for silent in (says(), says(error="it crashed"), lambda flavour, header: ProbeResult(None, "nothing within 3 s")):
        assert not [item for item in examine_target(path, here, silent).findings if item.topic == "header"]


def test_without_a_gpu_tensorrt_is_not_asked(tmp_path: Path) -> None:
    """Its answer would be `invalid`, for want of a driver."""
    target = examine_target(written(tmp_path, rtx_plan(L4.capability)), cpu_machine(), says(validity="INVALID"))
    assert not [item for item in target.findings if item.topic == "header"]


def test_a_bundles_plan_by_another_name(bundle: Path) -> None:
    renamed = (bundle / PLAN).rename(bundle / "renamed.plan")
    assert "engine.plan is missing" in verdict(examine(renamed))
    (bundle / PLAN).write_bytes(renamed.read_bytes())
    assert examine(renamed).name == "ms_hybrid_s in fp16, a bundle"


def test_another_plan_beside_a_manifest_is_a_plan_from_elsewhere(bundle: Path) -> None:
    path = written(bundle, rtx_plan(T4.capability), "turing.plan")
    assert examine(path).name.startswith("a plan of")


# Something else


def test_files_that_are_no_plan(bundle: Path, tmp_path: Path) -> None:
    assert "is an ONNX graph, not a plan" in refused(bundle / GRAPH)
    assert "is empty" in refused(written(tmp_path, b""))
    assert "is nothing but zeros" in refused(written(tmp_path, bytes(100)))
    assert "is a text file" in refused(written(tmp_path, b"hello"))


def test_a_plan_inside_a_container(tmp_path: Path) -> None:
    graph = b"\x08\x0a\x12\x07EPcache" + bytes(40) + rtx_plan(L4.capability)
    assert "is an ONNX graph, not a plan, with a plan inside it from byte 51 on" in refused(written(tmp_path, graph))


def test_nothing_there(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nothing.plan")


def test_a_directory_that_is_no_bundle(tmp_path: Path) -> None:
    assert "is a directory without manifest.json" in refused(tmp_path)
    model = tmp_path / "ms_hybrid_s" / "1"
    model.mkdir(parents=True)
    path = written(model, rtx_plan(L4.capability), "model.plan")
    assert refused(tmp_path).endswith(f"Try spach-doctor {path}.")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "engine.plan")
    assert "neither a file nor a directory" in refused(tmp_path / "engine.plan")


def test_a_manifest_that_is_no_json(bundle: Path) -> None:
    (bundle / MANIFEST).write_text("{")
    assert "is not JSON" in refused(bundle)


def test_json(bundle: Path) -> None:
    content = json.loads(json.dumps(examine(bundle, cpu_machine()).to_dict()))
    assert (content["can_run"], content["exit_code"]) == (False, 3)
    assert {"files", "golden data", "input profile", PLAN, "NVIDIA GPU"} <= {
        entry["topic"] for entry in content["findings"]
    }


def test_advice_repeats_the_call_that_the_manifest_has(bundle: Path) -> None:
    """What the user gave is there whole, and what the advice changes is there once."""
    named = "--checkpoint $'/weights/caf\\351.pt' --int8 --images '/data/some images' --rest fp16"
    bundles.rewrite(
        bundle,
        command=f"spach-export --model x {named} --engine none --gpu sm80 --batch 1:2:2 --output there --overwrite",
    )
    target = examine(bundle, gpu_machine(T4))
    last = f"--overwrite -o {bundle}"
    same = f"spach-export --model x {named} --engine none --gpu sm80"
    assert finding(target, "files").command == f"{same} --batch 1:2:2 {last}"
    batch = str(BatchProfile(**bundles.read(bundle)["batch"]))
    assert finding(target, "input profile").command == f"{same} --batch {batch} {last}"
    rebuilt = f"spach-export --model x {named} --batch 1:2:2 --engine tensorrt-rtx --gpu sm75 {last}"
    assert finding(target, "NVIDIA GPU").command == rebuilt


def test_a_manifests_call_that_does_more_is_not_repeated(bundle: Path) -> None:
    bundles.rewrite(bundle, command="spach-export --model x; rm -rf .")
    assert (
        finding(examine(bundle), "files").command == f"spach-export --model ms_hybrid_s --fp16 --overwrite -o {bundle}"
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (bundles.golden()[:-30], "is not a zip file"),
        (bundles.golden(names=np.array([{}])), "'names' is not what its header says"),
        (bundles.golden(input=np.zeros((1 << 17, 3, 19, 19), np.uint8)[:, :, :0]), "(131072,) inputs, 1 answers"),
        (bundles.golden(logits=np.zeros((1, 7))), "its logits are float64 (1, 7)"),
    ],
    ids=["cut", "objects", "count", "dtype"],
)
def test_golden_data_that_validate_refuses_are_no_golden_data(bundle: Path, content: bytes, words: str) -> None:
    (bundle / GOLDEN).write_bytes(content)
    files = bundles.read(bundle)["files"]
    bundles.rewrite(bundle, files={**files, GOLDEN: {"sha256": sha256_of(bundle / GOLDEN), "bytes": len(content)}})
    target = examine(bundle)
    assert (target.exit_code, finding(target, "golden data").status) == (2, Status.PROBLEM)
    assert words in finding(target, "golden data").what
    with pytest.raises(BundleError) as refused:
        Golden.load(bundle / GOLDEN)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("location", "words"),
    [("../../secret", "which leads outside of its directory"), ("gone.data", "which is not beside it")],
)
def test_a_graph_whose_weights_are_elsewhere_does_not_run(location: str, words: str, tmp_path: Path) -> None:
    bundle = tiny_bundles.with_weights_in(tiny_bundles.write(tmp_path / "b"), location)
    target = examine(bundle)
    assert (target.exit_code, finding(target, GRAPH).status) == (2, Status.PROBLEM)
    assert finding(target, GRAPH).what == f"its weights are in {location}, {words}"


def test_who_else_reads_the_graph(tmp_path: Path) -> None:
    bundle = small_bundles.copy(small_bundles.bundle(Precision.FP32), tmp_path / "b")
    assert finding(examine(bundle, cpu_machine()), "read by").what == (
        "ONNX Runtime from 1.17, OpenVINO from 2024.6, OpenCV from 4.11,"
        " onnxruntime-web from 1.17, onnxruntime-node from 1.17"
    )


def test_of_a_graph_unlike_all_that_were_tried_nothing_is_said(tmp_path: Path) -> None:
    bundle = small_bundles.copy(small_bundles.bundle(Precision.FP16), tmp_path / "b")  # with top-k
    assert not any(found.topic == "read by" for found in examine(bundle, cpu_machine()).findings)
