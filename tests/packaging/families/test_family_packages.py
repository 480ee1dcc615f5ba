"""What is made of a bundle of each family beside SPACH: packages, a report, a bisection of a wrong weight."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
from click.testing import CliRunner

from spach_deploy.bundle.store import GRAPH, PLAN, Bundle
from spach_deploy.cli.package import main as package_command
from spach_deploy.cli.validate import main as validate
from tests import family_bundles, small_bundles
from tests.blocks.test_families import each
from tests.packaging.polygraphy.test_polygraphy_folder import graph_command, polygraphy
from tests.validation import faults


def package(kind: str, family: str, target: Path) -> Path:
    arguments = [kind, str(family_bundles.bundle(family)), "-o", str(target)]
    result = CliRunner().invoke(package_command, arguments)
    assert result.exit_code == 0, result.output
    return target


@each
def test_triton_serves_it(family: str, tmp_path: Path) -> None:
    repository = package("triton", family, tmp_path / "models")
    text = (repository / f"small_{family}" / "config.pbtxt").read_text()
    assert all(name in text for name in ("TYPE_UINT8", "logits", "probabilities", "top_values", "top_indices"))
    result = CliRunner().invoke(package_command, ["triton", "--check", str(repository)])
    assert result.exit_code == 0, result.output


@each
def test_kubernetes_runs_it(family: str, tmp_path: Path) -> None:
    folder = package("kubernetes", family, tmp_path / "k8s")
    served = list((folder / "image" / "models").rglob("config.pbtxt"))
    assert [path.parent.name for path in served] == [f"small_{family}"]


@each
def test_polygraphy_passes_on_its_graph(family: str, tmp_path: Path) -> None:
    done = polygraphy(package("polygraphy", family, tmp_path / "golden"), graph_command())
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Pass Rate: 100.00%" in done.stdout


@each
def test_a_bundle_says_what_it_is_of(family: str) -> None:
    bundle = Bundle.open(family_bundles.bundle(family))
    page = (family_bundles.bundle(family) / "report.html").read_text(encoding="utf-8")
    assert f"small_{family}" in page
    assert bundle.manifest.model.name == f"small_{family}"
    settings = bundle.manifest.content()["model"]["hyperparameters"]
    divisions = {"value": family_bundles.DIVISIONS, "source": "command line"}
    assert settings.get("divisions") == (divisions if family == "shiftvit" else None)
    assert not {"ScatterND", "Shape", "Expand", "Gather"} & {
        n.op_type for n in small_bundles.load_graph(bundle.path).graph.node
    }


WRONG = {"smlpnet": "channel_mix.1.2.net.0", "shiftvit": "layers.1.blocks.1.mlp.fc2"}


@each
def test_a_bisection_names_a_wrong_weight_of_a_block_that_was_repeated(family: str, tmp_path: Path) -> None:
    spoiled = small_bundles.copy(family_bundles.bundle(family), tmp_path / "spoiled")
    (spoiled / PLAN).unlink()
    graph = onnx.load(spoiled / GRAPH)
    faults.perturb(graph, f"{WRONG[family]}.weight")
    onnx.save(graph, spoiled / GRAPH)
    arguments = [str(spoiled / GRAPH), "--bisect", "--accept", "graph", "--json"]
    result = CliRunner().invoke(validate, arguments)
    assert result.exit_code == 1, result.output
    suspects = json.loads(result.stdout)["bisect"]["suspects"]
    assert [suspect["module"] for suspect in suspects] == [WRONG[family]]


@each
def test_a_right_bundle_validates(family: str) -> None:
    result = CliRunner().invoke(validate, [str(family_bundles.bundle(family)), "--accept", "graph", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["passed"] is True
