"""spach-package onnxruntime: its folder, run.py on ONNX Runtime's CPU provider, and spach-validate of such a folder.

NVIDIA's provider needs a GPU. A double stands for it where run.py would choose it.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner, Result
from onnx import AttributeProto, helper

from spach_deploy.bundle.schema import Form
from spach_deploy.bundle.store import CONTEXT, GOLDEN, GRAPH, MANIFEST, PLAN, Bundle
from spach_deploy.cli.package import main as package_command
from spach_deploy.cli.package_onnxruntime import main
from spach_deploy.cli.validate import main as validate_command
from spach_deploy.common.files import sha256_of
from spach_deploy.doctor.finding import Status
from spach_deploy.doctor.table import as_text
from spach_deploy.doctor.target import examine_target
from spach_deploy.graph import ep_context
from spach_deploy.graph.ep_context import COMPATIBILITY, RTX_PROVIDER, TENSORRT_PROVIDER
from spach_deploy.graph.runtimes import GraphNeeds, reading
from spach_deploy.options.gpus import parse_gpus
from spach_deploy.options.specs import (
    BatchProfile,
    EngineTarget,
    ExportOptions,
    Flavour,
    IODtype,
    ModelSpec,
    OutputSpec,
    Precision,
    Role,
)
from spach_deploy.packaging.onnxruntime.folder import MODEL_TEXT, TEMPLATES, golden_file, plugin_command
from spach_deploy.pipeline.export import export as run_export
from tests import small_bundles
from tests.commands import contents, export, refusal
from tests.doctor.machines import cpu_machine
from tests.packaging.onnxruntime.folders import recorded
from tests.packaging.triton import tiny_bundles
from tests.packaging.triton.tiny_bundles import EMBEDDING, RENAMED, Tiny
from tests.quantization import small_quantized
from tests.shared import once
from tests.validation import faults

SAMPLE = json.loads(Path(__file__).with_name("ep_context.json").read_text(encoding="utf-8"))
CPU, RUN = "CPUExecutionProvider", "run.py"

needs_rtx = pytest.mark.skipif(not importlib.util.find_spec("tensorrt_rtx"), reason="tensorrt-rtx is not installed")


def package(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def validate(*arguments: object) -> Result:
    return CliRunner().invoke(validate_command, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder() -> Path:
    """Of an FP16 bundle with every output of a classifier and a plan; shared, not to be changed."""

    def make(target: Path) -> None:
        result = package(small_bundles.bundle(), "-o", target)
        assert result.exit_code == 0, result.output

    return once("onnxruntime/folder", make)


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return small_bundles.copy(folder, tmp_path / "own")


def written(tmp_path: Path, tiny: Tiny, *options: object) -> Path:
    """The folder of a tiny bundle."""
    result = package(tiny_bundles.write(tmp_path / "bundle", tiny), "-o", tmp_path / "served", *options)
    assert result.exit_code == 0, result.output
    return tmp_path / "served"


def run(folder: Path, *arguments: str) -> int:
    """run.py of a folder, in this process. Its exit code."""
    spec = importlib.util.spec_from_file_location("run_of_the_folder", folder / RUN)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:  # as of a program, whose folder Python looks into
        patch.syspath_prepend(folder)
        patch.delitem(sys.modules, "golden", raising=False)
        spec.loader.exec_module(module)
    code: int = module.main([*arguments])
    return code


# run.py


def test_the_first_provider_that_is_here_runs_it_and_agrees(folder: Path) -> None:
    """As a user calls it, with nothing of this package at hand."""
    code = (
        f"import runpy, sys; sys.path[:0] = [{str(folder)!r}]; runpy.run_path({str(folder / RUN)!r}, None, '__main__')"
    )
    there = "sys.exit(9 if {'spach_deploy', 'onnx', 'torch'} & {*sys.modules} else end.code)"
    program = f"try:\n    {code}\nexcept SystemExit as end:\n    {there}"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{CPU} runs model.onnx" in done.stdout
    assert "8 images: what PyTorch answers in FP32" in done.stdout
    assert "inf" not in done.stdout
    assert re.search(r"top_indices int64 .*\n    between classes that differ .*, allowed", done.stdout)
    assert f"{RTX_PROVIDER} does not run {CONTEXT} here" in done.stderr


@needs_rtx
def test_a_bundle_with_a_real_plan_gets_the_form_for_onnx_runtime(tmp_path: Path) -> None:
    """And with every role that an output can have."""
    bundle, target = with_rtx_plan(), tmp_path / "served"
    result = package(bundle, "-o", target)
    assert result.exit_code == 0, result.output
    served, exported = (len(onnx.load(place / GRAPH).graph.node) for place in (target, bundle))
    assert served < exported
    assert "Made anew in the form for ONNX Runtime" in result.stdout
    assert Bundle.open(target).manifest.graph.made is not None
    assert run(target) == 0
    checked = validate(target)
    assert checked.exit_code == 3, checked.output
    assert "in the form for ONNX Runtime" in " ".join(checked.stdout.split())
    (target / CONTEXT).write_bytes((target / CONTEXT).read_bytes().replace(b"76747274", b"76747275"))  # of "vtrt"
    assert "describes another plan" in " ".join(validate(listed_again(target, CONTEXT)).stdout.split())
    recorded(target, CONTEXT)
    features = golden_file(target, "features2")
    features.write_bytes(bytes(features.stat().st_size))
    assert run(target) == 2
    recorded(target, features.name)
    assert run(target) == 1


def with_rtx_plan() -> Path:
    """A bundle as spach-export writes it, made once."""

    def make(target: Path) -> None:
        model = ModelSpec(small_bundles.NAME, image_size=small_bundles.SIZE, num_classes=small_bundles.CLASSES)
        outputs = OutputSpec(top_k=3, outputs=(Role.LOGITS, Role.EMBEDDING, Role.FEATURES))
        engine = EngineTarget(Flavour.TENSORRT_RTX, gpus=parse_gpus("sm89"), batch=BatchProfile(1, 2, 4))
        with small_bundles.registered():
            run_export(ExportOptions(model, Precision.FP16, outputs, engine, output=target))

    return once("onnxruntime/rtx-bundle", make)


def test_without_the_provider_of_the_plan_one_sentence_names_the_package(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, RTX_PROVIDER) == 3
    said = capsys.readouterr().err.splitlines()
    assert run(folder, "NoSuchExecutionProvider") == 3
    assert len(said) == 2
    assert "pip install onnxruntime-ep-nv-tensorrt-rtx" in said[0]
    assert said[1] == "Error: no execution provider here runs this model."


def test_a_provider_that_does_not_load_is_passed_over(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """NVIDIA's package without a driver: its library is there, and its own libraries are not."""
    plugin = provider_package(str(tmp_path / "libmissing.so"))
    monkeypatch.setitem(sys.modules, plugin.__name__, plugin)
    assert run(folder) == 0
    shown = capsys.readouterr()
    assert "libmissing.so" in shown.err
    assert f"{CPU} runs model.onnx" in shown.out


def provider_package(library: str) -> types.ModuleType:
    """NVIDIA's package, as far as run.py uses it."""
    module: Any = types.ModuleType("onnxruntime_ep_nv_tensorrt_rtx")
    module.get_ep_name = lambda: RTX_PROVIDER
    module.get_library_path = lambda: library
    return module  # type: ignore[no-any-return]


def test_the_plan_comes_first_where_its_provider_is(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[tuple[str, list[object]]] = []
    real = onnxruntime.InferenceSession

    class Options(onnxruntime.SessionOptions):  # type: ignore[misc]
        def add_provider_for_devices(self, devices: list[object], settings: dict[str, str]) -> None:
            self.devices = devices

    def session(model: Path, options: Options, **more: object) -> Any:
        opened.append((model.name, options.devices))
        return real(own / GRAPH, providers=[CPU])

    gpu = types.SimpleNamespace(ep_name=RTX_PROVIDER)
    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", lambda name, path: None)
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: [types.SimpleNamespace(ep_name=CPU), gpu])
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", provider_package("there.so"))
    assert run(own) == 0
    assert opened == [(CONTEXT, [gpu])]
    assert f"{RTX_PROVIDER} runs {CONTEXT}" in capsys.readouterr().out
    bounds = (own / MODEL_TEXT).read_text()
    (own / MODEL_TEXT).write_text(with_bound(bounds, CONTEXT, "1e-12"))
    assert run(own) == 1
    (own / MODEL_TEXT).write_text(with_bound(bounds, GRAPH, "1e-12"))
    assert run(own) == 0


def with_bound(text: str, file: str, rel_l2: str) -> str:
    """model.txt with another bound of relative L2 for the outputs of a file."""
    lines = [line.split() for line in text.splitlines()]
    changed = [[*w[:3], rel_l2, *w[4:]] if w[:2] == ["bound", file] else w for w in lines]
    return "".join(" ".join(words) + "\n" for words in changed)


def test_a_wrong_graph_is_found(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = onnx.load(own / GRAPH)
    faults.perturb(graph, "layer2.2.channel_func.fc1.weight")
    onnx.save(graph, own / GRAPH)
    assert run(own) == 2
    assert "model.onnx was changed since it was written" in capsys.readouterr().err
    recorded(own)
    assert run(own) == 1
    assert "8 images: not what PyTorch answers in FP32" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["logits", "probabilities", "top_values", "top_indices"])
def test_every_output_is_compared(own: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    dtype = np.int64 if name == "top_indices" else np.float32
    values = np.fromfile(golden_file(own, name), dtype)
    golden_file(own, name).write_bytes(np.roll(values, 1).tobytes())
    assert run(own) == 2
    assert f"golden.{name}.bin was changed since it was written" in capsys.readouterr().err
    recorded(own, golden_file(own, name).name)
    assert run(own) == 1


def test_what_is_not_finite_does_not_agree(own: Path) -> None:
    graph = onnx.load(own / GRAPH)
    weight = "layer2.2.channel_func.fc1.weight"
    faults.set_value(graph, weight, np.full_like(faults.value(graph, weight), np.nan))
    onnx.save(graph, own / GRAPH)
    recorded(own)
    assert run(own) == 1


def test_a_bound_that_is_no_number_bounds_nothing(own: Path) -> None:
    (own / MODEL_TEXT).write_text(with_bound(model_text_of(own), GRAPH, "nan"))
    assert run(own) == 1


def test_programs_are_of_a_screen_each() -> None:
    assert {name: len((TEMPLATES / name).read_text().splitlines()) // 75 for name in (RUN, "main.cpp")} == {
        RUN: 0,
        "main.cpp": 0,
    }


@pytest.mark.parametrize("name", [MODEL_TEXT, GRAPH, CONTEXT, PLAN, "golden.input.bin", "golden.logits.bin"])
def test_a_folder_without_one_of_its_files_is_damaged(own: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (own / name).unlink()
    assert run(own) == 2
    shown = capsys.readouterr()
    assert len(shown.err.splitlines()) == 1
    assert "damaged" in shown.err


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "golden.input.bin").write_bytes(b""),
        lambda folder: (folder / "golden.logits.bin").write_bytes(bytes(8)),
        lambda folder: (folder / MODEL_TEXT).write_text("batch 8\n"),
        lambda folder: (folder / MODEL_TEXT).write_text(without(folder, "bound model.onnx logits")),
        lambda folder: (folder / MODEL_TEXT).write_text(without(folder, "batch") + "batch 0\n"),
        lambda folder: (folder / MODEL_TEXT).write_text(with_bound(model_text_of(folder), GRAPH, "x")),
        lambda folder: (folder / GRAPH).write_bytes((folder / GRAPH).read_bytes()[:1000]),
        lambda folder: (folder / PLAN).write_bytes(bytes(4096)),
    ],
)
def test_files_that_do_not_fit_are_damaged(own: Path, change: Callable[[Path], object]) -> None:
    change(own)
    assert run(own) == 2


def model_text_of(folder: Path) -> str:
    return (folder / MODEL_TEXT).read_text()


def without(folder: Path, start: str) -> str:
    lines = (folder / MODEL_TEXT).read_text().splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith(start))


def test_a_graph_that_fails_or_is_none_is_no_traceback(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own / GRAPH).write_bytes(b"no graph")
    recorded(own)
    assert run(own) == 3
    assert f"{CPU} does not run model.onnx here" in capsys.readouterr().err
    shutil.copyfile(tiny_bundles.write(own / "tiny", Tiny()) / GRAPH, own / GRAPH)
    recorded(own)
    assert run(own) == 1
    assert "Error: model.onnx failed while it ran: " in capsys.readouterr().err


@pytest.mark.parametrize(("words", "code"), [(["--fast"], 2), ([CPU, CPU], 2), (["--help"], 0)])
def test_usage(folder: Path, words: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, *words) == code
    assert "Exit codes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "tiny",
    [
        EMBEDDING,
        RENAMED,
        Tiny(outputs=OutputSpec(io_dtype=IODtype.UINT8, top_k=3)),
        Tiny(outputs=OutputSpec(io_dtype=IODtype.FP16)),
        Tiny(batch=BatchProfile(6, 7, 8)),
        Tiny(batch=BatchProfile(1, 1, 1), classes=2),
        Tiny(engine="none"),
    ],
    ids=["embedding", "renamed", "uint8", "fp16", "large batches", "two classes", "no plan"],
)
def test_every_interface(tmp_path: Path, tiny: Tiny) -> None:
    folder = written(tmp_path, tiny)
    assert run(folder) == 0
    assert "Read on a CPU" not in (folder / "README.md").read_text()  # no graph like this was tried
    main = golden_file(folder, tiny.main)
    main.write_bytes((np.fromfile(main, np.float32) * np.float32(1.5)).tobytes())
    recorded(folder, main.name)
    assert run(folder) == 1


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.FP8])
def test_eight_bits(tmp_path: Path, precision: Precision) -> None:
    """README.md says what the doctor does of runtimes that read the graph."""
    result = package(small_quantized.bundle(precision), "-o", tmp_path / "served")
    assert result.exit_code == 0, result.output
    assert f"On a GPU {precision.value.upper()} gains no time in ONNX Runtime" in result.stdout
    needs = GraphNeeds.of(tmp_path / "served" / GRAPH)
    assert needs is not None
    assert reading(needs).startswith("ONNX Runtime from ")
    assert reading(needs) in (tmp_path / "served" / "README.md").read_text()
    findings = examine_target(tmp_path / "served", cpu_machine()).findings
    assert [found.what for found in findings if found.topic == "read by"] == [reading(needs)]
    assert run(tmp_path / "served", CPU) == 0
    assert validate(tmp_path / "served").exit_code == 0


def test_eight_bits_for_the_cpu_have_the_form_that_computes_in_integers(tmp_path: Path) -> None:
    folder = tmp_path / "served"
    result = package(small_quantized.for_tensorrt(), "-o", folder, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "eight bits in ONNX Runtime" in result.stdout
    assert "gains no time" not in result.stdout
    assert "CUDA" not in (folder / MODEL_TEXT).read_text()
    manifest = Bundle.open(folder).manifest
    assert manifest.form is Form.CPU_INT8
    assert run(folder) == 0
    assert validate(folder).exit_code == 0


def test_bfloat16_needs_a_gpu_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = tiny_bundles.write(tmp_path / "bundle", Tiny(engine="none", precision=Precision.BF16))
    result = package(bundle, "-o", tmp_path / "served")
    said = "model.onnx runs on no CPU: ONNX Runtime computes nothing in bfloat16 there"
    assert said in result.stdout
    readme = (tmp_path / "served" / "README.md").read_text()
    assert said in readme
    oldest = re.search(r"for CUDA from (\S+) on", readme)
    assert oldest is not None
    assert f'pip install "onnxruntime-gpu>={oldest[1]}" numpy' in readme
    assert all(CPU not in place for place in (result.stdout, readme, (tmp_path / "served" / MODEL_TEXT).read_text()))
    assert run(tmp_path / "served") == 3
    assert "CUDAExecutionProvider does not run model.onnx here" in capsys.readouterr().err
    assert run(tmp_path / "served", CPU) == 3
    assert "NOT_IMPLEMENTED" in capsys.readouterr().err
    assert "in bfloat16 on a CPU" in refusal(package(bundle, "-o", tmp_path / "other", "--device", "cpu"))
    assert "every half tensor rounded" in " ".join(validate(tmp_path / "served").stdout.split())


def test_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "labels.txt").write_text("".join(f"animal {number}\n" for number in range(tiny_bundles.CLASSES)))
    folder = written(tmp_path, Tiny(), "--labels", tmp_path / "labels.txt")
    assert run(folder) == 0
    assert capsys.readouterr().out.count("animal") == 4
    (folder / "labels.txt").write_text("one class\n")
    assert run(folder) == 2
    bundle = tiny_bundles.write(tmp_path / "embedding", EMBEDDING)
    refused = package(bundle, "-o", tmp_path / "other", "--labels", tmp_path / "labels.txt")
    assert "has no logits" in refusal(refused)
    assert not (tmp_path / "other").exists()


# The EPContext model


def test_it_has_the_structure_that_the_provider_writes_itself(folder: Path) -> None:
    model = onnx.load(folder / CONTEXT)
    onnx.checker.check_model(model)
    (node,) = model.graph.node
    found = {
        a.name: {"type": AttributeProto.AttributeType.Name(a.type), "value": helper.get_attribute_value(a)}
        for a in node.attribute
    }
    wanted = SAMPLE["attributes"]
    assert (node.domain, node.op_type) == (SAMPLE["domain"], SAMPLE["op_type"])
    assert {name: entry["type"] for name, entry in found.items()} == {n: e["type"] for n, e in wanted.items()}
    fixed = {name: entry["value"] for name, entry in wanted.items() if entry["value"] != "free"}
    assert {name: text(found[name]["value"]) for name in fixed} == fixed
    assert found["ep_cache_context"]["value"] == PLAN.encode()
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert set(metadata) == set(SAMPLE["metadata"])
    assert metadata["external_dependencies"] == SAMPLE["metadata"]["external_dependencies"]
    assert metadata[COMPATIBILITY] == (folder / PLAN).read_bytes()[:64].hex()
    assert (model.ir_version, {entry.domain: entry.version for entry in model.opset_import}[""]) == (9, 20)


def text(value: object) -> object:
    return value.decode() if isinstance(value, bytes) else value


def test_its_inputs_and_outputs_are_the_graphs(folder: Path) -> None:
    graphs = [onnx.load(folder / name).graph for name in (CONTEXT, GRAPH)]
    inputs, outputs = ([[(v.name, v.type) for v in getattr(g, kind)] for g in graphs] for kind in ("input", "output"))
    assert inputs[0] == inputs[1]
    assert outputs[0] == outputs[1]


def test_onnx_runtime_without_the_provider_names_it(folder: Path) -> None:
    with pytest.raises(Exception, match=f"NOT_IMPLEMENTED.*{RTX_PROVIDER}"):
        onnxruntime.InferenceSession(folder / CONTEXT, providers=[CPU])


def test_a_plan_of_ordinary_tensorrt_is_for_the_classic_provider(tmp_path: Path) -> None:
    folder = written(tmp_path, Tiny(engine="tensorrt"))
    model = onnx.load(folder / CONTEXT)
    attributes = {a.name: helper.get_attribute_value(a) for a in model.graph.node[0].attribute}
    assert attributes["source"] == TENSORRT_PROVIDER.encode()
    assert attributes["hardware_architecture"] == b"89"
    assert not model.metadata_props
    assert f"run {CONTEXT} {TENSORRT_PROVIDER}" in (folder / MODEL_TEXT).read_text()
    assert validate(folder).exit_code == 3


def test_the_plan_can_be_in_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "served"
    assert package(small_bundles.bundle(), "-o", target, "--embed").exit_code == 0
    assert not (target / PLAN).exists()
    attributes = {a.name: helper.get_attribute_value(a) for a in onnx.load(target / CONTEXT).graph.node[0].attribute}
    assert attributes["embed_mode"] == 1
    assert attributes["ep_cache_context"] == (small_bundles.bundle() / PLAN).read_bytes()
    assert run(target) == 0
    assert validate(target).exit_code == 3
    monkeypatch.setattr(ep_context, "MOST_BYTES", 1000)
    assert "Leave --embed out" in refusal(package(small_bundles.bundle(), "-o", tmp_path / "other", "--embed"))
    without_plan = tiny_bundles.write(tmp_path / "bundle", Tiny(engine="none"))
    assert "the bundle has none" in refusal(package(without_plan, "-o", tmp_path / "other", "--embed"))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("version", "ends"), [("1.7.1", "==0.5.0"), ("1.6.1.40", "==0.4.0"), ("9.9", "onnxruntime-ep-nv-tensorrt-rtx")]
)
def test_the_command_names_the_provider_that_carries_the_version(version: str, ends: str) -> None:
    assert plugin_command(version).endswith(ends)


# spach-validate


def test_the_graph_is_validated_and_a_plan_that_did_not_run_is_said(folder: Path) -> None:
    result = validate(folder, "--report", folder.parent / "report.json")
    assert result.exit_code == 3, result.output
    assert "AGREED" in result.stdout
    assert "model.onnx ran instead" in " ".join(result.stdout.split())
    assert validate(folder / CONTEXT, "--accept", "graph", "--json").exit_code == 0
    assert validate(folder / GRAPH, "--json").exit_code == 0


def test_a_folder_without_a_plan_agrees(tmp_path: Path) -> None:
    result = validate(written(tmp_path, Tiny(engine="none")))
    assert result.exit_code == 0, result.output


def test_a_graph_that_was_changed_is_found(own: Path) -> None:
    graph = onnx.load(own / GRAPH)
    faults.perturb(graph, "layer2.2.channel_func.fc1.weight")
    onnx.save(graph, own / GRAPH)
    result = validate(own)
    assert result.exit_code == 1
    assert "model.onnx was changed since the folder was written" in " ".join(result.stdout.split())
    assert "Output 'logits': relative L2" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("name", "finding"),
    [
        (PLAN, "engine.plan is missing since the folder was written"),
        (CONTEXT, "model_ctx.onnx is missing"),
        (GRAPH, "model.onnx is missing"),
        (MODEL_TEXT, "model.txt is missing"),
    ],
)
def test_a_missing_file_is_found(own: Path, name: str, finding: str) -> None:
    (own / name).unlink()
    result = validate(own)
    assert result.exit_code == 1, result.output
    said = " ".join(result.stdout.split())
    assert finding in said
    assert ("model.onnx ran instead" in said) == (name != GRAPH)
    assert ("Nothing ran instead" in said) == (name == GRAPH)
    assert "The plan itself did not run" in said
    assert "no plan was to be run" not in said


@pytest.mark.parametrize("name", [GRAPH, CONTEXT, PLAN])
def test_a_damaged_file_is_found(own: Path, name: str) -> None:
    (own / name).write_bytes(b"nothing of the kind")
    result = validate(own)
    assert result.exit_code == 1, result.output
    said = " ".join(result.stdout.split())
    assert f"{name} was changed" in said
    assert "The plan itself did not run" in said
    assert "no plan was to be run" not in said
    assert "Traceback" not in result.output


def test_without_a_golden_pack_there_is_nothing_to_trust(own: Path) -> None:
    (own / GOLDEN).unlink()
    assert "no reference to trust" in refusal(validate(own), code=1)


def test_programs_may_be_edited(own: Path) -> None:
    (own / RUN).write_text("print('mine')")
    (own / "README.md").unlink()
    assert validate(own).exit_code == 3


def listed_again(folder: Path, name: str) -> Path:
    """The folder with a manifest that lists a file as it is now."""
    manifest = small_bundles.read_manifest(folder)
    manifest["files"][name] = {"sha256": sha256_of(folder / name), "bytes": (folder / name).stat().st_size}
    small_bundles.write_manifest(folder, manifest)
    return folder


def test_an_ep_context_model_of_another_plan_is_found(own: Path) -> None:
    plan = bytearray((own / PLAN).read_bytes())
    plan[30] ^= 1
    (own / PLAN).write_bytes(plan)
    listed_again(own, PLAN)
    result = validate(own)
    assert result.exit_code == 1
    assert "model_ctx.onnx describes another plan" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("name", "value", "finding"),
    [
        ("ep_cache_context", b"../engine.plan", "names the plan '../engine.plan', which is not beside it"),
        ("ep_cache_context", b"other.plan", "cannot be read (No such file or directory)"),
        ("", b"", "is no EPContext model"),
    ],
)
def test_an_ep_context_model_that_loads_no_plan_is_found(own: Path, name: str, value: bytes, finding: str) -> None:
    model = onnx.load(own / CONTEXT)
    for attribute in model.graph.node[0].attribute:
        if attribute.name == name:
            attribute.s = value
    if not name:
        model = onnx.load(own / GRAPH)
    onnx.save(model, own / CONTEXT)
    listed_again(own, CONTEXT)
    result = validate(own)
    assert result.exit_code == 1
    assert finding in " ".join(result.stdout.split())


def test_an_ep_context_model_with_other_outputs_is_found(own: Path) -> None:
    model = onnx.load(own / CONTEXT)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value += 1
    onnx.save(model, own / CONTEXT)
    listed_again(own, CONTEXT)
    assert "The outputs of model_ctx.onnx are not those of model.onnx" in " ".join(validate(own).stdout.split())


def test_a_plan_of_another_graph_is_found(own: Path) -> None:
    manifest = small_bundles.read_manifest(own)
    manifest["engine"]["graph_sha256"] = "0" * 64
    small_bundles.write_manifest(own, manifest)
    result = validate(own)
    assert result.exit_code == 1
    assert "built from another graph than model.onnx was made of" in " ".join(result.stdout.split())


# spach-doctor


@pytest.mark.parametrize("options", [(), ("--embed",)])
def test_the_doctor_knows_the_plan_and_proposes_no_export_over_the_folder(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    folder = written(tmp_path, Tiny(), *options)
    target = examine_target(folder, cpu_machine())
    assert target.exit_code == 3
    plan = next(found for found in target.findings if found.topic == (CONTEXT if options else PLAN))
    assert plan.status is Status.OK
    assert "none was built" not in as_text(target)
    commands = [shlex.split(found.command) for found in target.findings if "spach-export" in (found.command or "")]
    assert commands
    assert all(words[-2:] == ["-o", f"{folder}-bundle"] and "--overwrite" not in words for words in commands)
    if options:
        (folder / CONTEXT).write_bytes(b"changed")
        assert examine_target(folder, cpu_machine()).exit_code == 1


def test_the_doctor_does_not_say_that_the_plan_was_built_from_a_graph_that_was_made_anew(own: Path) -> None:
    manifest = small_bundles.read_manifest(own)
    graph = {"graph_sha256": "0" * 64, "nodes": 9, "bytes": 9, "runtime": "ONNX Runtime 1.32.0"}
    manifest["graph"]["made"] = {**graph, "rewritten": {}, "fp32_rel_l2": {}, "rel_l2": {}}
    small_bundles.write_manifest(own, manifest)
    assert "that it was built from" not in as_text(examine_target(own, cpu_machine()))


# The folder


def test_it_is_listed_and_refuses_what_is_not_its_own(folder: Path, tmp_path: Path) -> None:
    assert "onnxruntime" in CliRunner().invoke(package_command, ["--help"]).stdout
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    before = contents(other)
    bundle = tiny_bundles.write(tmp_path / "bundle", Tiny())
    assert "left alone" in refusal(package(bundle, "-o", other, "--overwrite"))
    assert contents(other) == before
    assert package(bundle, "-o", tmp_path / "served").exit_code == 0
    assert "--overwrite" in refusal(package(bundle, "-o", tmp_path / "served"))
    assert json.loads(package(bundle, "-o", tmp_path / "served", "--overwrite", "--json").stdout)["model"] == "tiny"


def test_an_export_does_not_take_it_for_a_bundle_of_its_own(tmp_path: Path) -> None:
    folder = written(tmp_path, Tiny())
    before = contents(folder)
    refused = export("--model", "trans_xxs", "-o", folder, "--overwrite", "--engine", "none")
    assert "holds something else than a bundle" in refusal(refused)
    assert contents(folder) == before


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    assert "bundle" in refusal(package(tmp_path, "-o", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    bundle = tiny_bundles.write(tmp_path / "bundle", Tiny())
    (bundle / GRAPH).write_bytes(b"changed")
    assert "not as it was exported" in refusal(package(bundle, "-o", tmp_path / "out"), code=1)
    elsewhere = tiny_bundles.with_weights_in(tiny_bundles.write(tmp_path / "elsewhere", Tiny()), "weights.bin")
    assert "weights.bin" in refusal(package(elsewhere, "-o", tmp_path / "out"))


def test_the_manifest_marks_it(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["kind"] == "onnxruntime"
    assert RUN not in manifest["files"]
    assert manifest["files"][PLAN]["sha256"] == sha256_of(folder / PLAN)


def test_a_bundle_of_target_cpu_is_for_the_cpu(tmp_path: Path) -> None:
    bundle = tiny_bundles.for_cpu(tiny_bundles.write(tmp_path / "bundle", Tiny(engine="none")), onnxruntime="1")
    result = package(bundle, "-o", tmp_path / "served")
    assert result.exit_code == 0, result.output
    assert "graph      model.onnx, for CPUExecutionProvider\n" in result.stdout
    assert "CUDA" not in (tmp_path / "served" / MODEL_TEXT).read_text()


def test_bfloat16_of_target_cpu_is_refused_with_what_runs_it(tmp_path: Path) -> None:
    written = tiny_bundles.write(tmp_path / "bundle", Tiny(engine="none", precision=Precision.BF16))
    said = refusal(package(tiny_bundles.for_cpu(written), "-o", tmp_path / "served"))
    assert "ONNX Runtime computes nothing in bfloat16 on a CPU. Export it for ONNX Runtime" in said
    assert "or run this bundle in OpenVINO with spach_deploy.Session." in said
    assert not (tmp_path / "served").exists()
