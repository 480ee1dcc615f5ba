"""Real plans by the real compiler, TensorRT for RTX, which needs no GPU to build."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spach_deploy.common.errors import BuildError, PrecisionError, UsageError
from spach_deploy.engine.build import EngineResult, build_engine, start_build
from spach_deploy.engine.flavours import TensorRTForRTX
from spach_deploy.engine.network_facts import check_achieved_precision
from spach_deploy.engine.worker import ProgressEvent
from spach_deploy.options.specs import BatchProfile, EngineTarget, Flavour, Precision
from spach_deploy.runtime.devices import is_installed
from spach_deploy.runtime.plan_identity import plan_identity
from tests.engine import tiny_graphs

pytestmark = pytest.mark.skipif(not is_installed(Flavour.TENSORRT_RTX), reason="tensorrt-rtx is not installed")
BATCH = BatchProfile(1, 2, 4)


def build(path: Path, precision: Precision = Precision.FP16, **options: Any) -> EngineResult:
    target = EngineTarget(batch=options.pop("batch", BATCH), **options)
    return build_engine(path, target, TensorRTForRTX(), precision=precision)


@pytest.mark.parametrize("precision", [precision for precision in Precision if not precision.is_quantized])
def test_builds_a_plan_in_every_precision_and_achieves_it(tmp_path: Path, precision: Precision) -> None:
    result = build(tiny_graphs.mlp(tmp_path / "mlp.onnx", precision.value), precision)
    identity = plan_identity(result.plan)
    assert identity.is_plan
    assert identity.flavour is result.flavour is Flavour.TENSORRT_RTX
    assert result.flavour_version.startswith(identity.version or "?")
    assert result.batch == BATCH
    assert [str(gpu) for gpu in result.gpus] == ["sm80", "sm86", "sm89", "sm120", "sm121"]
    achieved = check_achieved_precision(result.network, precision)
    assert achieved.layers_by_dtype == {precision.value: 2}


def test_a_layer_left_in_fp32_is_found_unless_it_was_kept_on_purpose(tmp_path: Path) -> None:
    network = build(tiny_graphs.mlp(tmp_path / "mlp.onnx", middle="fp32")).network
    with pytest.raises(PrecisionError, match=r"block\.fc2 \(fp32\)"):
        check_achieved_precision(network, Precision.FP16)
    achieved = check_achieved_precision(network, Precision.FP16, kept_float=["block.fc2"])
    assert achieved.kept == ("block.fc2",)
    assert achieved.layers_by_dtype == {"fp16": 1, "fp32": 1}
    with pytest.raises(PrecisionError, match=r"block\.fc1 \(fp16, to be kept in fp32\)"):
        check_achieved_precision(network, Precision.FP16, kept_float=["block.*"])


def test_log_and_progress_come_from_the_builder_and_nothing_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    events: list[ProgressEvent] = []
    path = tiny_graphs.mlp(tmp_path / "mlp.onnx")
    target, flavour = EngineTarget(batch=BATCH), TensorRTForRTX()
    with start_build(path, target, flavour, precision=Precision.FP16, on_progress=events.append) as build:
        result = build.result()
    assert capfd.readouterr() == ("", "")
    assert "Finished engine building" in result.log_text
    assert "STRONGLY_TYPED" in result.log_text
    assert events[0].parent is None
    assert events[-1] == ProgressEvent(events[0].phase, None, events[0].steps, events[0].steps, finished=True)
    assert result.parse_seconds + result.build_seconds <= result.seconds


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({}, {"TF32", "STRONGLY_TYPED"}),
        ({"tf32": False}, {"STRONGLY_TYPED"}),
        ({"version_compatible": True}, {"TF32", "VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME", "STRONGLY_TYPED"}),
    ],
)
def test_switches_reach_the_compiler(tmp_path: Path, options: dict[str, Any], flags: set[str]) -> None:
    result = build(tiny_graphs.mlp(tmp_path / "mlp.onnx", "fp32"), Precision.FP32, opt_level=2, **options)
    (line,) = (text for text in result.log_text.splitlines() if text.startswith("Flags"))
    assert set(line.partition("[")[2].rstrip("]").split(", ")) == flags


def test_a_fixed_batch_is_taken_as_it_is_and_another_one_refused(tmp_path: Path) -> None:
    path = tiny_graphs.mlp(tmp_path / "mlp.onnx", batch=3)
    assert build(path, batch=BatchProfile(3, 3, 3)).network.inputs[0].shape == (3, 64)
    with pytest.raises(UsageError, match=r"fixed batch of 3 and --batch is 1:2:4\. Give --batch 3"):
        build(path)


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (tiny_graphs.unknown_operator, r"node 'block\.odd' \(Strange\): operator Strange is not supported"),
        (tiny_graphs.types_that_do_not_meet, r"node 'block\.add' \(Add\).*types Half and Float"),
        (tiny_graphs.two_dynamic_extents, r"Input x of bad\.onnx has more than its batch symbolic"),
    ],
)
def test_a_graph_that_cannot_be_built_fails_with_the_compilers_reason(
    tmp_path: Path, graph: Callable[[Path], Path], reason: str
) -> None:
    with pytest.raises(BuildError, match=reason) as caught:
        build(graph(tmp_path / "bad.onnx"))
    assert "Invalid Engine" not in str(caught.value)


def test_too_small_a_workspace_is_named(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"within workspace limit.*--workspace") as caught:
        build(tiny_graphs.mlp(tmp_path / "mlp.onnx"), workspace_bytes=1 << 20)
    assert ".cpp" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"hello world", b"import antigravity\n" * 100, bytes(range(256)) * 9])
def test_a_file_that_is_no_graph_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rubbish.onnx"
    path.write_bytes(content)
    with pytest.raises(BuildError, match=r"rubbish\.onnx"):
        build(path)


def test_bad_options_are_refused_before_any_process_starts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no graph"):
        start_build(tmp_path / "absent.onnx", EngineTarget(), TensorRTForRTX(), precision=Precision.FP16)
    with pytest.raises(UsageError, match="--opt-level"):
        start_build(tmp_path, EngineTarget(opt_level=9), TensorRTForRTX(), precision=Precision.FP16)


def test_what_on_progress_raises_ends_the_build_and_comes_out_of_wait(tmp_path: Path) -> None:
    def complain(event: ProgressEvent) -> None:
        raise ZeroDivisionError(event.phase)

    path = tiny_graphs.mlp(tmp_path / "mlp.onnx")
    target, flavour = EngineTarget(), TensorRTForRTX()
    with (
        start_build(path, target, flavour, precision=Precision.FP16, on_progress=complain) as build,
        pytest.raises(ZeroDivisionError),
    ):
        build.result()
