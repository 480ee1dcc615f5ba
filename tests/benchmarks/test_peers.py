"""Other tools' graphs against ours: the environments, the recipes and the report, without installing anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from benchmarks import peers
from benchmarks.peer_tools.environments import PEERS, Ended, Environment, Peer, environment, reason, run
from benchmarks.peers import OURS, RECIPES, Judge, Recipe, Row, made, refusal, verdicts, worst_relative_l2
from spach_deploy.options.gpus import parse_gpus
from spach_deploy.options.specs import EngineTarget

PEER = Peer("Tool", "tool", "1.0", (("torch==2.13.0+cpu",), ("--no-deps", "tool==1.0")))


class Shell:
    """Notes commands; the one that holds `failing` fails."""

    def __init__(self, failing: str = "nothing") -> None:
        self.commands: list[list[str]] = []
        self._failing = failing

    def __call__(self, command: Sequence[str], seconds: float) -> Ended:
        self.commands.append(list(command))
        if "venv" in command:
            Path(command[-1]).mkdir(parents=True, exist_ok=True)
        if self._failing in command:
            return Ended(1, "Looking\nERROR: No matching distribution found\n[notice] a new pip\n")
        return Ended(0, "")


def test_an_environment_is_made_once(tmp_path: Path) -> None:
    shell = Shell()
    first = environment(PEER, tmp_path, shell)
    assert [command[-1] for command in shell.commands[1:]] == ["torch==2.13.0+cpu", "tool==1.0"]
    assert environment(PEER, tmp_path, shell) == first == Environment(tmp_path / PEER.folder / "bin" / "python")
    assert len(shell.commands) == 3


def test_what_does_not_install_is_a_reason_and_tried_again(tmp_path: Path) -> None:
    shell = Shell("tool==1.0")
    assert environment(PEER, tmp_path, shell).problem == "ERROR: No matching distribution found"
    assert environment(PEER, tmp_path, Shell()).problem == ""


def test_other_packages_are_another_environment() -> None:
    assert Peer("Tool", "tool", "1.0", (("tool==1.0",),)).folder != PEER.folder


def test_no_tool_brings_cuda() -> None:
    for peer in PEERS.values():
        assert peer.installs[0] == ("torch==2.13.0+cpu",)
        words = " ".join(" ".join(step) for step in peer.installs)
        assert f"{peer.package}=={peer.version}" in words
        assert "onnxruntime-gpu" not in words


def test_a_command_that_hangs_or_is_not_there_is_a_reason() -> None:
    assert "not done" in run(["sleep", "5"], 0.05).text
    assert "No such file" in run(["./no_such_program"], 5).text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", "without a word"),
        ("one\ntwo\n", "two"),
        ("TypeError: a | b\nbye\n", "TypeError: a / b"),
        ("Error " + 200 * "x", "Error " + 103 * "x" + "…"),
    ],
)
def test_the_reason_in_few_words(text: str, shown: str) -> None:
    assert reason(text) == shown


RECIPE = Recipe("ort", "half", "FP16", ("tool.py", "{model}", "{output}", "--data", "{calibration}"))


def test_a_tool_gets_the_files(tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    output.touch()
    shell = Shell()
    where = Environment(Path("env/bin/python"))
    assert made(RECIPE, where, Path("in.onnx"), Path("images.npz"), output, shell) == ""
    assert shell.commands == [["env/bin/python", "tool.py", "in.onnx", str(output), "--data", "images.npz"]]


def test_a_tool_that_is_missing_fails_or_writes_nothing_is_a_reason(tmp_path: Path) -> None:
    def problem(where: Environment, shell: Shell) -> str:
        return made(RECIPE, where, Path("in.onnx"), Path("images.npz"), tmp_path / "out.onnx", shell)

    here = Environment(Path("python"))
    assert problem(Environment(Path("python"), "no network"), Shell()) == "did not install: no network"
    assert problem(here, Shell("tool.py")) == "the tool fails: ERROR: No matching distribution found"
    assert problem(here, Shell()) == "the tool fails: without a word"


def test_recipes_are_told_apart_and_name_files_that_exist() -> None:
    assert len({recipe.label + recipe.precision for recipe in RECIPES}) == len(RECIPES)
    assert {recipe.peer for recipe in RECIPES} == set(PEERS)
    for recipe in RECIPES:
        assert {"{model}", "{output}"} <= set(recipe.arguments)
        assert ("{calibration}" in recipe.arguments) == (recipe.precision == "INT8")
        assert recipe.arguments[0] == "-m" or Path(recipe.arguments[0]).is_file()


def test_the_worst_image_counts() -> None:
    wanted = np.array([[3.0, 4.0, *[0.0] * 6], [1.0, *[0.0] * 7]], np.float32)
    moved = wanted + np.array([[0, 0.5, *[0] * 6], [0, 0.25, *[0] * 6]], np.float32)
    assert worst_relative_l2(moved, wanted) == pytest.approx(0.25)
    assert worst_relative_l2(np.full((2, 8), np.nan, np.float32), wanted) == float("inf")


def test_a_refusal_names_the_operator() -> None:
    assert (
        refusal("In node 3: getPluginCreator: SkipLayerNormalization not found") == "no operator SkipLayerNormalization"
    )
    assert refusal("error: out of memory") == "error: out of memory"


def save(path: Path, operator: str, domain: str = "") -> Path:
    node = helper.make_node(operator, ["x"], ["y"], domain=domain)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy")
    graph = helper.make_graph([node], "graph", [x], [y])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


@pytest.fixture
def judge() -> Judge:
    images = np.array([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]], np.float32)
    return Judge(images, -images, EngineTarget(gpus=parse_gpus("sm89")))


def test_a_graph_is_built_and_held_against_pytorch(judge: Judge, tmp_path: Path) -> None:
    row = judge.row("tool", "FP32", save(tmp_path / "neg.onnx", "Neg"))
    assert (row.kernels, row.error, row.is_right) == (1, 0.0, True)
    assert judge.row("tool", "FP32", save(tmp_path / "abs.onnx", "Abs")).error == pytest.approx(2.0)


def test_what_the_compiler_refuses_is_still_judged_by_its_numbers(judge: Judge, tmp_path: Path) -> None:
    row = judge.row("tool", "FP32", save(tmp_path / "gelu.onnx", "QuickGelu", "com.microsoft"))
    assert row.kernels is None
    assert row.problem.startswith("TensorRT refuses: ")
    assert "QuickGelu" in row.problem
    assert row.error is not None


def test_what_nobody_runs_has_neither(judge: Judge, tmp_path: Path) -> None:
    row = judge.row("tool", "FP32", save(tmp_path / "none.onnx", "Nonsense", "nowhere"))
    assert (row.kernels, row.error, row.is_right) == (None, None, False)
    assert row.cells()[-1] == "does not run"


def rows(kernels: int, error: float) -> list[Row]:
    other = Row("Tool: half", "FP16", error, kernels, 90.0)
    return [Row(OURS, "FP16", 1e-3, 50, 100.0), other, Row("Tool: refused", "FP16", 1e-4, problem="refused")]


def test_where_another_has_less_is_said_plainly() -> None:
    assert list(verdicts(rows(40, 2e-3))) == [
        "FP16: kernels 50 ours, 40 best of the others (Tool: half): **another has less**.",
        "FP16: MB 100 ours, 90 best of the others (Tool: half): **another has less**.",
        "FP16: relative L2 1.0e-03 ours, 2.0e-03 best of the others (Tool: half): ours has least.",
    ]
    assert next(verdicts(rows(50, 2e-3))).endswith("as good.")


def test_a_graph_that_computes_something_else_is_no_competitor() -> None:
    assert list(verdicts(rows(1, 0.5))) == []


def test_a_section_is_ordered_by_precision(capsys: pytest.CaptureFixture[str]) -> None:
    text = peers.section("small", [Row(OURS, "FP16", 1e-3, 5, 1.0), Row(OURS, "FP32", 1e-7, 6, 2.0, 1, "3 float")])
    assert "small | ours | FP16" in capsys.readouterr().out
    assert text.index("| ours | FP32 | 6 | 2 | 1 | 3 float | 1.0e-07 |") < text.index("| ours | FP16 | 5 |")
