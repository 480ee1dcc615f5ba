"""spach-package polygraphy, tried with the real `polygraphy run` on ONNX Runtime."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from click.testing import CliRunner, Result

from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.outputs import INPUT, LOGITS
from spach_deploy.bundle.store import GOLDEN, GRAPH
from spach_deploy.cli.package import main as package_command
from spach_deploy.cli.package_polygraphy import main
from spach_deploy.common.errors import UnavailableError
from spach_deploy.options.specs import EngineTarget, ExportOptions, Flavour, ModelSpec, OutputSpec, Precision, Role
from spach_deploy.packaging.polygraphy.folder import BOUNDS, ROUNDED, commands
from spach_deploy.pipeline.export import export
from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner
from tests import small_bundles
from tests.commands import contents, refusal
from tests.packaging.triton import tiny_bundles
from tests.packaging.triton.tiny_bundles import Tiny
from tests.validation import faults


def package(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("polygraphy") / "golden"
    result = package(small_bundles.bundle(), "-o", target)
    assert result.exit_code == 0, result.output
    assert "[I]" not in result.output
    return target


def polygraphy(folder: Path, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command of the README, run as it stands there."""
    program, *arguments = command.split()
    assert program == "polygraphy"
    code = "import sys; from polygraphy.tools import main; sys.exit(main())"
    call = [sys.executable, "-c", code, *arguments]
    return subprocess.run(call, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def graph_command() -> str:
    return commands(GRAPH, has_plan=False)[0]


def test_the_right_graph_passes(folder: Path) -> None:
    assert graph_command() in (folder / "README.md").read_text()
    done = polygraphy(folder, graph_command())
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Pass Rate: 100.00%" in done.stdout
    assert "logits: relative L2" in done.stdout


def test_its_json_inputs_are_the_loaders(folder: Path) -> None:
    command = graph_command().replace("--data-loader-script data_loader.py", "--load-inputs inputs.json")
    assert polygraphy(folder, command).returncode == 0


def test_a_wrong_graph_fails(folder: Path, tmp_path: Path) -> None:
    wrong = small_bundles.copy(folder, tmp_path / "wrong")
    graph = onnx.load(wrong / GRAPH)
    faults.perturb(graph, "layer2.2.channel_func.fc1.weight")
    onnx.save(graph, wrong / GRAPH)
    done = polygraphy(wrong, graph_command())
    assert done.returncode == 1
    assert "FAILED" in done.stdout


def test_an_embedding_is_compared_by_its_own_bound(tmp_path: Path) -> None:
    bundle, target = tmp_path / "bundle", tmp_path / "golden"
    model = ModelSpec(small_bundles.NAME, image_size=small_bundles.SIZE, num_classes=small_bundles.CLASSES)
    with small_bundles.registered():
        outputs = OutputSpec(outputs=(Role.EMBEDDING,))
        export(ExportOptions(model, Precision.FP32, outputs, EngineTarget(Flavour.NONE), output=bundle))
    assert package(bundle, "-o", target).exit_code == 0
    assert [*json.loads((target / BOUNDS).read_text())] == ["embedding"]
    done = polygraphy(target, graph_command())
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "embedding: relative L2" in done.stdout
    graph = onnx.load(target / GRAPH)
    faults.perturb(graph, "norm2.bias")
    onnx.save(graph, target / GRAPH)
    assert polygraphy(target, graph_command()).returncode == 1


def test_every_batch_is_one_that_the_profile_allows(folder: Path) -> None:
    inputs = json.loads((folder / "inputs.json").read_text())
    manifest = small_bundles.read_manifest(small_bundles.bundle())["batch"]
    with np.load(folder / "golden.npz") as golden:
        sizes = [int((batch >= 0).sum()) for batch in golden["batches"]]
    assert len(inputs) == len(sizes)
    assert all(manifest["min"] <= size <= manifest["max"] for size in sizes)


def test_a_bfloat16_graph_comes_with_a_copy_that_runs_on_a_cpu(tmp_path: Path) -> None:
    bundle = tiny_bundles.write(tmp_path / "b", Tiny(engine="none", precision=Precision.BF16))
    result = package(bundle, "-o", tmp_path / "golden")
    assert "polygraphy run rounded.onnx --onnxrt" in result.stdout
    golden = Golden.load(bundle / GOLDEN)
    with OnnxRuntimeRunner(tmp_path / "golden" / ROUNDED) as runner:
        logits = runner.run({INPUT: golden.input})[LOGITS]
    assert relative_l2(logits, golden.outputs["logits"]) < 2**-7  # bfloat16's own rounding
    with pytest.raises(UnavailableError), OnnxRuntimeRunner(tmp_path / "golden" / GRAPH):
        pass


def relative_l2(values: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    return float(np.linalg.norm(values - expected) / np.linalg.norm(expected))


def test_it_is_listed_and_refuses_what_is_not_its_own(folder: Path, tmp_path: Path) -> None:
    assert "polygraphy" in CliRunner().invoke(package_command, ["--help"]).stdout
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    before = contents(other)
    assert "left alone" in refusal(package(small_bundles.bundle(), "-o", other, "--overwrite"))
    assert contents(other) == before
    assert "--overwrite" in refusal(package(small_bundles.bundle(), "-o", folder))
    assert package(small_bundles.bundle(), "-o", folder, "--overwrite", "--json").exit_code == 0


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    assert "bundle" in refusal(package(tmp_path, "-o", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
