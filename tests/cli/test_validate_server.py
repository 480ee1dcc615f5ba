"""spach-validate http://… and grpc://…: which options go with it. What a server answers: tests/packaging/triton."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.outputs import LOGITS
from spach_deploy.bundle.store import Bundle
from spach_deploy.cli.validate import main
from spach_deploy.validation.bundle_facts import BundleFacts
from spach_deploy.validation.result import golden_set
from spach_deploy.validation.runs import Level, RunOutputs, run_result
from spach_deploy.validation.server import truncation_hints
from tests.commands import refusal
from tests.packaging.kubernetes.served import serving
from tests.packaging.triton import tiny_bundles
from tests.packaging.triton.tiny_bundles import Tiny


def validate(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


URL = "http://localhost:8000/tiny"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return tiny_bundles.write(tmp_path / "bundle")


def test_a_server_has_no_golden_pack_of_its_own() -> None:
    assert "Give --bundle DIR" in refusal(validate(URL))


def test_a_bundle_is_for_servers_only(bundle: Path) -> None:
    assert "--bundle is for models on a server" in refusal(validate(bundle, "--bundle", bundle))


@pytest.mark.parametrize("option", ["--images", "--labels", "--checkpoint"])
def test_options_of_files_are_refused(bundle: Path, option: str) -> None:
    assert f"{option} is not for models on a server" in refusal(validate(URL, "--bundle", bundle, option, "x"))


def test_an_address_without_a_model_is_refused(bundle: Path) -> None:
    assert "names no model on a server" in refusal(validate("grpc://localhost:8001", "--bundle", bundle))


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(validate(URL, "--bundle", tmp_path / "nowhere"))


def test_a_changed_golden_pack_is_no_reference(bundle: Path) -> None:
    (bundle / "golden.npz").write_bytes(b"")
    assert "golden.npz was changed" in refusal(validate(URL, "--bundle", bundle), code=1)


def test_without_a_client_it_is_exit_3(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    said = refusal(validate("grpc://localhost:8001/tiny", "--bundle", bundle), code=3)
    assert "pip install 'tritonclient[grpc]'" in said


def test_a_server_over_http_is_asked_without_any_client(bundle: Path) -> None:
    with serving(Tiny()) as server:
        result = validate(f"{server.url}/tiny", "--bundle", bundle)
    assert result.exit_code == 0, result.output
    assert "AGREED with PyTorch" in result.stdout


@pytest.mark.parametrize(
    ("level", "problem", "section", "is_told"),
    [
        (Level.GRAPH, "It is off.", {}, True),
        (Level.GRAPH, "It is off.", {"quantized_from": "fp32"}, False),
        (Level.ENGINE, "It is off.", {}, False),
        (Level.GRAPH, "", {}, False),
    ],
    ids=["INT8 of FP16", "INT8 of FP32", "a plan", "that agrees"],
)
def test_a_served_graph_that_disagrees_may_be_truncated(
    level: Level, problem: str, section: dict[str, str], is_told: bool, bundle: Path
) -> None:
    opened = Bundle.open(tiny_bundles.of_int8(bundle, **section))
    golden, facts = Golden.load(opened.file("golden.npz")), BundleFacts.of(opened)
    eval_set = golden_set(golden, "", facts.outputs, facts.batch)
    ran = RunOutputs("graph", (len(eval_set),), {LOGITS: golden.outputs["logits"]}, problem)
    hints = truncation_hints(opened, run_result(level, ran, eval_set, facts.tolerances.graph))
    assert bool(hints) == is_told
    assert all("ONNX Runtime before 1.30 truncates on a CPU" in hint for hint in hints)
