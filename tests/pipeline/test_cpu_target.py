"""spach-export --target cpu: candidates are measured, the fastest right one becomes the bundle."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from click.testing import CliRunner

from spach_deploy.benchmark import runners as contestants
from spach_deploy.benchmark.plain import PlainModel, plain_openvino, save_openvino
from spach_deploy.benchmark.result import Benchmark, Latency, OutputError, Ratio, RunnerResult, Timing
from spach_deploy.benchmark.rounds import BenchmarkRequest
from spach_deploy.benchmark.runners import (
    COMPILE_BF16,
    EAGER,
    IN_OPENVINO,
    ONNX_PLAIN,
    ONNX_RUNTIME,
    OPENVINO,
    OPENVINO_BF16,
    OPENVINO_PLAIN,
    OPENVINO_PLAIN_BF16,
    PLAIN,
    RunnerSetup,
)
from spach_deploy.blocks import STATIC
from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.store import GOLDEN, MANIFEST, Bundle
from spach_deploy.cli.validate import main as validate_command
from spach_deploy.common.errors import BundleError
from spach_deploy.common.files import Destination
from spach_deploy.options.specs import ExportOptions, Precision, QuantizationSpec
from spach_deploy.pipeline import cpu_target
from spach_deploy.pipeline import export as pipeline
from spach_deploy.pipeline.cpu_target import FormKey
from spach_deploy.pipeline.export import ExportResult
from spach_deploy.runtime.session import Session
from spach_deploy.validation.live_reference import Weights, rebuild
from tests import small_bundles
from tests.commands import contents, export, refusal
from tests.quantization.small_quantized import calibration_images

SMALL = ("--model", small_bundles.NAME, "--image-size", small_bundles.SIZE, "--num-classes", small_bundles.CLASSES)


class Stopwatch:
    """Answers for `measure`: so many times as fast as eager, and how right, by precision, or by runner in `plain`."""

    def __init__(self, plain: Mapping[str, float], **speeds: tuple[float, bool]) -> None:
        self.speeds = speeds
        self.plain = plain
        self.asked: list[BenchmarkRequest] = []

    def __call__(self, question: BenchmarkRequest, tell: Any) -> Benchmark:
        self.asked.append(question)
        bundle = Bundle.open(question.setup.bundle)
        tell("batch 8, round 1 of 5: a clock", 0.25)
        times, is_right = self.speeds[bundle.manifest.precision.asked.value]
        batch = question.batches[0]

        def runner(name: str, speed: float, error: float) -> RunnerResult:
            ratio = Ratio(speed, 0.95 * speed, 1.05 * speed)
            return RunnerResult(
                name, OutputError(error, 1e-2), (Timing(batch, Latency(9, 1 / speed, None, None), 10, 0.1, ratio),)
            )

        names = [name for name in question.names if name != EAGER]
        eager = (runner(EAGER, 1, 0.0),) if EAGER in question.names else ()
        runners = (*eager, *(runner(*self.result(name, times, is_right)) for name in names))
        assert question.setup.converted is not None
        for name in {*IN_OPENVINO} & {*names}:
            convert(bundle, question.setup.converted / IN_OPENVINO[name])
        return Benchmark("b", "small", "fp32", (batch,), 5, runners, {}, (), {}, {"processor": "a clock"})

    def paired(self, setups: Mapping[FormKey, RunnerSetup], batch: int, tell: Any) -> dict[FormKey, tuple[float, ...]]:
        """Answers for `paired`: seconds of three rounds that differ by 1 %."""
        seconds: dict[FormKey, tuple[float, ...]] = {}
        for (precision, name), setup in setups.items():
            speed = self.result(name, *self.speeds[Bundle.open(setup.bundle).manifest.precision.asked.value])[1]
            seconds[precision, name] = (0.99 / speed, 1 / speed, 1.01 / speed)
        return seconds

    def result(self, name: str, times: float, is_right: bool) -> tuple[str, float, float]:
        """The runner with its speed and error; a plain way that is not in `plain` is slow and right."""
        if name in PLAIN:
            return name, self.plain.get(name, 0.5), 1e-3
        return name, times, 1e-3 if is_right else 0.5


def convert(bundle: Bundle, path: Path) -> None:
    """What the runner of a plain way leaves behind."""
    manifest = bundle.manifest
    model = PlainModel(rebuild(manifest.model, Weights(), manifest.outputs).model, manifest)
    save_openvino(plain_openvino(model, manifest), path)


EXPORTED: dict[str, Path] = {}


@pytest.fixture(autouse=True)
def once(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each precision of the small model is exported for real once, and copied from then on."""

    def exported(
        options: ExportOptions, observer: Any, *, destination: Destination, scheduler: Any = None
    ) -> ExportResult:
        if options.model.name != small_bundles.NAME:
            return pipeline.export(options, observer, destination=destination)
        name = options.precision.value + ("-plain" if options.disabled_rewrites else "")
        if name not in EXPORTED:
            EXPORTED[name] = tmp_path_factory.mktemp("exported") / name
            pipeline.export(options, destination=Destination.of(EXPORTED[name]))
        shutil.copytree(EXPORTED[name], destination.path)
        bundle = Bundle.open(destination.path)
        for note in bundle.manifest.notes:
            observer.note(note)
        return ExportResult(bundle, None, None)  # type: ignore[arg-type]

    monkeypatch.setattr(cpu_target, "export", exported)


def run(
    monkeypatch: pytest.MonkeyPatch,
    target: Path,
    *arguments: object,
    plain: Mapping[str, float] = MappingProxyType({}),
    **speeds: tuple[float, bool],
) -> Any:
    watch = Stopwatch(plain, **speeds)
    monkeypatch.setattr(cpu_target, "measure", watch)
    monkeypatch.setattr(cpu_target, "paired", watch.paired)
    with small_bundles.registered():
        result = export(*SMALL, "--target", "cpu", "-o", target, *arguments)
    return result, watch


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without bfloat16 and VNNI, and ONNX Runtime alone."""
    on_a_machine(monkeypatch, openvino=False)


def on_a_machine(
    monkeypatch: pytest.MonkeyPatch, *, openvino: bool, bf16: bool = False, vnni: bool = False, plain: bool = False
) -> None:
    def why(name: str) -> str:
        return "not installed: pip install openvino" if not openvino else "" if bf16 or "bf16" not in name else "no"

    asked = contestants.why_not

    def why_not(name: str, setup: RunnerSetup, bundle: Bundle) -> str:
        return "not today" if name in PLAIN and not plain else asked(name, setup, bundle)

    monkeypatch.setattr(cpu_target, "why_not", why_not)
    monkeypatch.setattr(contestants, "has_bf16", lambda: bf16)
    monkeypatch.setattr(contestants, "why_no_openvino", why)
    monkeypatch.setattr(cpu_target, "why_no_openvino", why)
    monkeypatch.setattr(cpu_target, "has_vnni", lambda: vnni)


@pytest.mark.parametrize(
    ("speeds", "chosen"),
    [
        ({"int8": (3.0, True), "fp32": (2.0, True)}, "int8"),
        ({"int8": (3.0, False), "fp32": (2.0, True)}, "fp32"),
        ({"int8": (1.5, True), "fp32": (2.0, True)}, "fp32"),
    ],
    ids=["fastest", "fastest is wrong", "eight bits are slower"],
)
def test_the_fastest_right_form_becomes_the_bundle(
    speeds: dict[str, tuple[float, bool]], chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--calibration", calibration_images())
    result, _ = run(monkeypatch, tmp_path / "b", *arguments, plain={}, **speeds)
    assert result.exit_code == 0, result.output
    bundle = Bundle.open(tmp_path / "b")  # its hashes are checked
    assert bundle.manifest.precision.asked == chosen
    section = bundle.manifest.content()["cpu"]
    assert section["chosen"]["precision"] == chosen
    assert {form["precision"] for form in section["forms"]} == {"int8", "fp32"}
    assert section["machine"] == {"processor": "a clock"}
    assert f"{chosen} in ONNX Runtime" in result.stdout
    assert ("WRONG" in result.stdout) == (not all(right for _, right in speeds.values()))
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert "spach-cpu-" not in (bundle.path / MANIFEST).read_text()
    assert "spach-cpu-" not in (bundle.path / "report.json").read_text()


def test_all_but_the_products_stays_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--calibration", calibration_images(), "--int8", "--json")
    result, watch = run(monkeypatch, tmp_path / "b", *arguments, int8=(3.0, True))
    manifest = json.loads(result.stdout)
    assert manifest["precision"]["rest"] == "fp32"
    assert manifest["engine"]["flavour"] == "none"
    assert watch.asked[0].batches == (8,)


def test_bf16_is_tried_in_openvino_where_the_cpu_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_machine(monkeypatch, openvino=True, bf16=True)
    result, watch = run(monkeypatch, tmp_path / "b", fp32=(2.0, True), bf16=(4.0, True))
    assert result.exit_code == 0, result.output
    asked = [question.names for question in watch.asked]
    assert asked == [(EAGER, OPENVINO_BF16), (EAGER, ONNX_RUNTIME, OPENVINO)]
    manifest = Bundle.open(tmp_path / "b").manifest
    assert manifest.precision.asked == "bf16"
    assert manifest.content()["cpu"]["chosen"]["settings"] == {"INFERENCE_PRECISION_HINT": "bf16"}
    assert 'read_model("model.onnx")' in result.stdout
    assert f"model.reshape([8, 3, {small_bundles.SIZE}, {small_bundles.SIZE}])" in result.stdout
    assert 'compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})' in result.stdout
    assert "With --calibration DIR, INT8 is tried too." in result.stdout


@pytest.mark.parametrize("vnni", [True, False])
def test_eight_bits_are_stored_as_this_cpu_multiplies_them(vnni: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_target, "has_vnni", lambda: vnni)
    options = ExportOptions(quantization=QuantizationSpec(calibration_images()))
    assert cpu_target.options_for(options, Precision.INT8).quantization.vnni is vnni
    assert cpu_target.options_for(options, Precision.FP32).quantization == QuantizationSpec()


def test_eight_bits_run_in_everything_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_machine(monkeypatch, openvino=True, bf16=True)
    arguments = ("--calibration", calibration_images(), "--int8")
    result, watch = run(monkeypatch, tmp_path / "b", *arguments, int8=(3.0, True))
    assert result.exit_code == 0, result.output
    assert watch.asked[0].names == (EAGER, ONNX_RUNTIME, OPENVINO, OPENVINO_BF16)
    assert "INT8 is tried too" not in result.stdout


def test_without_images_only_fp32_is_tried_and_the_way_to_more_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, watch = run(monkeypatch, tmp_path / "b", fp32=(2.0, True))
    assert result.exit_code == 0
    assert len(watch.asked) == 1
    assert "With --calibration DIR, INT8 is tried too." in result.stdout


def test_nothing_right_is_exit_1_and_the_old_bundle_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, tmp_path / "b", fp32=(2.0, True))
    before = contents(tmp_path)
    result, _ = run(monkeypatch, tmp_path / "b", "--overwrite", fp32=(2.0, False))
    assert "No form computes what PyTorch computes: fp32 in ONNX Runtime 5.0e-01." in result.stderr
    assert result.exit_code == 1
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--fp16",), "chooses between int8, bf16 and fp32, not fp16"),
        (("--vnni", "--int8", "--calibration", "."), "sees for itself whether there is VNNI"),
        (("--int8",), "Give --calibration DIR."),
        (("--gpu", "sm89"), "--target cpu builds no engine"),
        (("--engine", "tensorrt"), "--target cpu builds no engine"),
        (("--auto",), "Give one of them"),
        (("--dry-run",), "Give one of them"),
        (("--calibration", "x", "--max-drop", "1"), "does not judge by labels"),
    ],
)
def test_contradictions_are_refused_before_any_work(arguments: tuple[str, ...], reason: str, tmp_path: Path) -> None:
    with small_bundles.registered():
        assert reason in refusal(export(*SMALL, "--target", "cpu", "-o", tmp_path / "b", *arguments))
    assert not (tmp_path / "b").exists()


def test_bf16_alone_needs_what_runs_it(tmp_path: Path) -> None:
    with small_bundles.registered():
        result = export(*SMALL, "--target", "cpu", "-o", tmp_path / "b", "--bf16")
    assert "runs bf16 in OpenVINO. Not installed: pip install openvino." in refusal(result, 3)
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_a_real_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_target, "_ROUNDS", 2)
    monkeypatch.setattr(cpu_target, "_SECONDS", 0.02)
    size = ("--image-size", "32", "--num-classes", "11", "--batch", "1:2:4")
    result = export("--model", "conv_xxs", *size, "--target", "cpu", "-o", tmp_path / "b")
    assert result.exit_code == 0, result.output
    chosen = Bundle.open(tmp_path / "b").manifest.content()["cpu"]["chosen"]
    assert (chosen["runner"], chosen["batch"], chosen["is_right"]) == ("onnxruntime", 2, True)
    assert chosen["images_per_second"] > 0


def test_an_opset_that_one_of_the_candidates_cannot_have_is_refused_before_the_first_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def exported(*arguments: object, **more: object) -> None:
        raise AssertionError("something was exported")

    monkeypatch.setattr(cpu_target, "why_no_openvino", lambda name: "")
    monkeypatch.setattr(cpu_target, "export", exported)
    sentence = refusal(export("--model", "ms_conv_xxs", "--target", "cpu", "--opset", 20))
    assert "Conv in bfloat16 needs opset 22" in sentence


def test_where_openvinos_own_conversion_is_fastest_the_bundle_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    on_a_machine(monkeypatch, openvino=True, bf16=True, plain=True)
    fast = {OPENVINO_PLAIN_BF16: 5.0, OPENVINO_PLAIN: 3.0}
    result, _ = run(monkeypatch, tmp_path / "b", plain=fast, bf16=(4.0, True), fp32=(2.0, True))
    assert result.exit_code == 0, result.output
    assert "That is a plain way: no form of ours is faster here" in result.stdout
    assert 'read_model("openvino.xml")' in result.stdout
    bundle = Bundle.open(tmp_path / "b")  # its hashes are checked
    assert bundle.manifest.precision.asked == "bf16"
    words = [*map(str, SMALL), "--output", str(tmp_path / "b"), "--target", "cpu"]
    assert bundle.manifest.command == f"spach-export {shlex.join(words)}"
    assert {"openvino.xml", "openvino.bin"} <= {*bundle.manifest.files}
    golden = Golden.load(bundle.file(GOLDEN))
    with Session(bundle, runtime="auto") as session:
        assert session.runtime == "openvino"
        assert session.run(golden.input[:1])["logits"].shape == (1, small_bundles.CLASSES)
    validated = CliRunner().invoke(validate_command, [str(bundle.path)])
    assert validated.exit_code == 0, validated.output
    assert "What --target cpu chose, openvino.xml, in OpenVINO (CPU)" in validated.stdout
    (bundle.path / "openvino.bin").write_bytes(b"other weights")
    with pytest.raises(BundleError, match=r"openvino\.bin was changed"):
        Bundle.open(tmp_path / "b")


def test_what_is_measured_is_told_and_what_every_export_says_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spach_deploy.cli.reporting._LINE_EVERY_S", 0.0)
    arguments = ("--calibration", calibration_images())
    result, watch = run(monkeypatch, tmp_path / "b", *arguments, int8=(3.0, True), fp32=(2.0, True))
    assert len(watch.asked) == 2
    assert result.stderr.count("Measuring: batch 8, round 1 of 5: a clock (25%).") == 2
    assert result.stderr.count("Demo weights") == 1


def test_where_onnx_runtimes_own_graph_is_fastest_the_bundle_has_no_rewrites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_machine(monkeypatch, openvino=False, plain=True)
    result, _ = run(monkeypatch, tmp_path / "b", plain={ONNX_PLAIN: 3.0}, fp32=(2.0, True))
    assert result.exit_code == 0, result.output
    assert "The bundle has it: its graph is without rewrites." in result.stdout
    graph = Bundle.open(tmp_path / "b").manifest.graph
    assert not any(graph.passes.values())
    assert {name for name, entry in graph.rewrites.items() if entry.modules} <= {STATIC}


def test_the_chosen_form_is_compared_with_the_best_plain_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_machine(monkeypatch, openvino=False, plain=True)
    result, _ = run(monkeypatch, tmp_path / "b", plain={ONNX_PLAIN: 2.0}, fp32=(3.0, True))
    assert "That is 1.50 (1.50 to 1.50) times as fast as the best plain way, ONNX Runtime, plain." in result.stdout


def test_a_plain_way_that_leaves_no_file_is_told_and_not_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    on_a_machine(monkeypatch, openvino=True, bf16=True, plain=True)
    result, _ = run(monkeypatch, tmp_path / "b", plain={COMPILE_BF16: 6.0}, bf16=(4.0, True), fp32=(2.0, True))
    assert "bf16 in OpenVINO, bf16" in result.stdout
    assert (
        "A plain way, torch.compile, bf16, is 1.50 times as fast as that; torch.compile leaves no file" in result.stdout
    )


def test_a_precision_that_was_asked_for_is_kept_beside_faster_plain_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    on_a_machine(monkeypatch, openvino=True, bf16=True, plain=True)
    arguments = ("--calibration", calibration_images(), "--int8")
    result, watch = run(monkeypatch, tmp_path / "b", *arguments, plain={OPENVINO_PLAIN_BF16: 6.0}, int8=(3.0, True))
    assert {OPENVINO_PLAIN, OPENVINO_PLAIN_BF16, ONNX_PLAIN} <= {*watch.asked[0].names}
    assert Bundle.open(tmp_path / "b").manifest.precision.asked == "int8"
    assert "is 2.00 times as fast as that; you asked for this precision." in result.stdout


def test_rounds_of_all_decide_not_ratios_of_several_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def paired(self: Stopwatch, setups: Mapping[FormKey, RunnerSetup], *rest: Any) -> dict[FormKey, tuple[float, ...]]:
        return {key: (1.0, 1.0, 1.01) if key[0] is Precision.FP32 else (2.0, 2.0, 2.01) for key in setups}

    monkeypatch.setattr(Stopwatch, "paired", paired)
    arguments = ("--calibration", calibration_images())
    result, _ = run(monkeypatch, tmp_path / "b", *arguments, plain={}, int8=(3.0, True), fp32=(2.0, True))
    section = Bundle.open(tmp_path / "b").manifest.cpu
    assert section is not None
    assert section.chosen.precision is Precision.FP32
    assert section.chosen.images_per_second == 8.0
    assert "fp32 in ONNX Runtime, 8.0 images/s" in result.stdout


def test_a_plain_way_in_fp32_is_not_judged_by_what_eight_bits_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    on_a_machine(monkeypatch, openvino=True, bf16=False, plain=True)
    arguments = ("--calibration", calibration_images(), "--int8")
    result, _ = run(monkeypatch, tmp_path / "b", *arguments, plain={OPENVINO_PLAIN: 9.0}, int8=(3.0, True))
    (row,) = [line for line in result.stdout.splitlines() if line.startswith("fp32") and "OpenVINO, plain" in line]
    assert row.endswith("1.0e-03  WRONG")


def test_a_runner_that_cannot_run_one_precision_is_not_left_out_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def why_not(name: str, setup: RunnerSetup, bundle: Bundle) -> str:
        is_int8 = bundle.manifest.precision.asked is Precision.INT8
        if name in PLAIN:
            return "not today"
        return "not in eight bits" if is_int8 and name == OPENVINO else contestants.why_not(name, setup, bundle)

    pytest.importorskip("openvino")
    on_a_machine(monkeypatch, openvino=True)
    monkeypatch.setattr(cpu_target, "why_not", why_not)
    arguments = ("--calibration", calibration_images())
    result, watch = run(monkeypatch, tmp_path / "b", *arguments, plain={}, int8=(3.0, True), fp32=(2.0, True))
    assert result.exit_code == 0, result.output
    assert [OPENVINO in question.names for question in watch.asked] == [False, True]
    assert [{*PLAIN} <= {*question.optional} for question in watch.asked] == [True, True]


def test_a_plain_way_that_did_not_run_is_told_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = run(monkeypatch, tmp_path / "b", fp32=(2.0, True))
    assert "Not run: ONNX Runtime, plain, not today." in result.stdout


def test_the_plain_ways_of_a_module_of_ones_own_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Stopwatch({}, fp32=(2.0, True))
    monkeypatch.setattr(cpu_target, "measure", watch)
    monkeypatch.setattr(cpu_target, "paired", watch.paired)
    module = ("--module", "tests.own_models:PlainNet", "--image-size", "32")
    result = export(*module, "--target", "cpu", "-o", tmp_path / "b")
    assert result.exit_code == 0, result.output
    (asked,) = watch.asked
    assert asked.setup.module == module[1]
    assert EAGER in {*asked.names} & {*asked.optional}  # it may draw its weights anew each time
