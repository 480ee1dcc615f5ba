"""The engine's stage: written and checked beside other work, and nothing of it left behind."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest

from spach_deploy.bundle.store import BUILD_LOG, GRAPH, PLAN
from spach_deploy.common.errors import BuildError, MismatchError, PrecisionError
from spach_deploy.common.progress import Phases, Silent
from spach_deploy.engine.build import EngineResult
from spach_deploy.engine.flavours import FLAVOURS
from spach_deploy.engine.network_facts import LayerFact, NetworkFacts
from spach_deploy.graph.precision.decision import PrecisionPolicy
from spach_deploy.options.specs import BatchProfile, ExportOptions, Flavour, IODtype, ModelSpec, Precision
from spach_deploy.pipeline.steps import engine as stages_engine
from spach_deploy.pipeline.steps.engine import EngineBuild
from spach_deploy.runtime.polygraphy_session import LogLine

PATIENCE_S = 30
POLICY = PrecisionPolicy(Precision.FP16, IODtype.FP32, 1)
WARNINGS = (("Slow.", 1), ("Strange.", 3))


def engine(staging: Path, dtype: str = "fp16", graph: bytes = b"graph") -> EngineResult:
    layer = LayerFact("head", "MATRIX_MULTIPLY", "head", (dtype, dtype), (dtype,))
    log = (LogLine(0.0, "info", f"reads {staging}/model.onnx"),)
    network = NetworkFacts((), (), (layer,))
    return EngineResult(
        *(b"plan", hashlib.sha256(graph).hexdigest(), Flavour.TENSORRT_RTX, "1.0", (), BatchProfile()),
        *(network, log, WARNINGS, 0.1, 0.2),
        seconds=0.3,
    )


class FakeBuild:
    """A build under way until it is given its engine, or cancelled."""

    def __init__(self) -> None:
        self.result: EngineResult | None = None
        self._ended = threading.Event()

    def give(self, result: EngineResult) -> None:
        self.result = result
        self._ended.set()

    def cancel(self) -> None:
        self._ended.set()

    def wait(self) -> EngineResult:
        assert self._ended.wait(PATIENCE_S)
        if self.result is None:
            raise BuildError("It was ended.")
        return self.result


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    (tmp_path / GRAPH).write_bytes(b"graph")
    return tmp_path


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> FakeBuild:
    monkeypatch.setattr(stages_engine, "read_plan_facts", lambda plan: None)
    return FakeBuild()


def begun(running: FakeBuild | None) -> tuple[EngineBuild, Phases]:
    phases, options = Phases(Silent()), ExportOptions(ModelSpec("conv_xxs"), Precision.FP16)
    build = EngineBuild(FLAVOURS[Flavour.TENSORRT_RTX], options, phases, None)
    build._build = running  # type: ignore[assignment]
    return build, phases


def test_it_is_written_before_it_is_asked_for(staging: Path, running: FakeBuild) -> None:
    build, phases = begun(running)
    with build.finishing(POLICY, None, staging) as finished:
        running.give(engine(staging))
        made = finished()
    assert made is not None
    assert (staging / PLAN).read_bytes() == b"plan"
    assert "reads model.onnx" in (staging / BUILD_LOG).read_text()
    assert set(made.files) == {GRAPH, PLAN, BUILD_LOG}
    assert [phase.name for phase in phases.done] == ["engine build (alongside)"]
    assert phases.notes == ["The engine builder warns: Slow.", "The engine builder warns 3 times: Strange."]


def test_a_wrong_precision_is_told_where_it_is_asked_for(staging: Path, running: FakeBuild) -> None:
    build, _ = begun(running)
    running.give(engine(staging, "fp32"))
    with build.finishing(POLICY, None, staging) as finished, pytest.raises(PrecisionError, match="head"):
        finished()


def test_an_engine_of_another_graph_than_the_one_that_is_validated_is_refused(
    staging: Path, running: FakeBuild
) -> None:
    build, _ = begun(running)
    running.give(engine(staging, graph=b"another graph"))
    with build.finishing(POLICY, None, staging) as finished, pytest.raises(MismatchError, match="another graph"):
        finished()
    assert not (staging / PLAN).exists()


def test_nothing_is_written_behind_a_block_that_fails(staging: Path, running: FakeBuild) -> None:
    build, phases = begun(running)
    with pytest.raises(ValueError, match="stop"), build.finishing(POLICY, None, staging):
        raise ValueError("stop")
    assert [file.name for file in staging.iterdir()] == [GRAPH]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("finish-engine")]
    assert not phases.done


def test_there_is_none_without_a_build(staging: Path) -> None:
    build, _ = begun(None)
    with build.finishing(POLICY, None, staging) as finished:
        assert finished() is None
