from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from spach_deploy.benchmark.contestants import TITLES
from spach_deploy.cli.benchmark import _RUNNERS, main
from tests import small_bundles
from tests.commands import refusal


def benchmark(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_json_has_figures_facts_and_what_did_not_run() -> None:
    """The bundle's model is not known to other processes: PyTorch's runners say so, and the graph is measured."""
    result = benchmark(small_bundles.bundle(), "--batch", "2", "--rounds", "2", "--seconds", "0.01", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["batches"] == [2]
    assert "onnxruntime" in [runner["runner"] for runner in found["runners"]]
    assert "small_hybrid" in found["skipped"]["eager"]
    assert found["machine"]["threads"] == found["machine"]["cores"]
    assert found["machine"]["versions"]["onnxruntime"]
    assert found["macs"] > 0


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (("--batch", "1,x"), 2, "--batch 1,x is no list of whole numbers. Give it like 1,8."),
        (("--batch", "1000"), 2, "not 1000"),
        (("--plot", "nowhere/speed.svg"), 2, "nowhere is no directory"),
        (("--runner", "fastest"), 2, "fastest"),
        (("--rounds", "1"), 2, "--rounds"),
        (("--runner", "eager"), 3, "PyTorch eager cannot run here"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(arguments: tuple[str, ...], code: int, reason: str) -> None:
    assert reason in refusal(benchmark(small_bundles.bundle(), *arguments), code)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    refusal(benchmark(tmp_path))


def test_the_options_name_every_runner() -> None:
    assert set(_RUNNERS) == set(TITLES)
