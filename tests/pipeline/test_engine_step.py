"""The engine: written and checked."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from onnx import ModelProto

from spach_deploy.bundle.store import BUILD_LOG, GRAPH, PLAN
from spach_deploy.common.errors import MismatchError, PrecisionError
from spach_deploy.common.progress import ExportObserver, Phases
from spach_deploy.engine.build import EngineResult
from spach_deploy.engine.network_facts import LayerFact, NetworkFacts
from spach_deploy.graph.certificate import Certificate
from spach_deploy.graph.precision.decision import PrecisionPolicy
from spach_deploy.options.specs import BatchProfile, Flavour, IODtype, Precision
from spach_deploy.pipeline.steps.engine import BuiltEngine, check_engine
from spach_deploy.pipeline.steps.precision import CertifiedGraph
from spach_deploy.runtime.polygraphy_session import LogLine

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


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    (tmp_path / GRAPH).write_bytes(b"graph")
    return tmp_path


def checked(result: EngineResult | None, staging: Path) -> tuple[BuiltEngine | None, Phases]:
    phases = Phases(ExportObserver())
    certificate = Certificate(20, 10, 1, {}, None, 0)
    typed = CertifiedGraph(ModelProto(), POLICY, certificate, (), {}, {}, {})
    return check_engine(result, typed, None, staging, phases), phases


def test_it_is_written_with_its_log_and_what_its_builder_warns_of(staging: Path) -> None:
    made, phases = checked(engine(staging), staging)
    assert made is not None
    assert made.facts is None
    assert (staging / PLAN).read_bytes() == b"plan"
    assert "reads model.onnx" in (staging / BUILD_LOG).read_text()
    assert set(made.files) == {GRAPH, PLAN, BUILD_LOG}
    assert [phase.name for phase in phases.done] == ["engine build (alongside)"]
    assert phases.notes == ["The engine builder warns: Slow.", "The engine builder warns 3 times: Strange."]


def test_a_wrong_precision_is_refused(staging: Path) -> None:
    with pytest.raises(PrecisionError, match="head"):
        checked(engine(staging, "fp32"), staging)
    assert not (staging / PLAN).exists()


def test_an_engine_of_another_graph_than_the_one_that_is_validated_is_refused(staging: Path) -> None:
    with pytest.raises(MismatchError, match="another graph"):
        checked(engine(staging, graph=b"another graph"), staging)
    assert not (staging / PLAN).exists()


def test_there_is_none_without_a_build(staging: Path) -> None:
    assert checked(None, staging)[0] is None
    assert [file.name for file in staging.iterdir()] == [GRAPH]
