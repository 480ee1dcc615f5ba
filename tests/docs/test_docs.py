"""Every command of the documentation is run, on a small model under the name that pages use, in a folder of its own.

What a test machine lacks is in `NOT_HERE` with the reason; what takes long runs with `-m slow`. Of both the options are
checked. Outputs that pages show must have the kinds of lines that really come, in this order.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from benchmarks.photographs import calibration_photographs, held_out_photographs
from spach_deploy.benchmark import rounds, worker
from spach_deploy.benchmark import runners as contestants
from spach_deploy.benchmark.runners import RunnerSetup
from spach_deploy.models.demo import load_demo_weights
from spach_deploy.models.published import ARCHITECTURES
from spach_deploy.models.spach import Spach
from tests import static_models
from tests.docs.pages import Shown, commands, forms, is_within, python_blocks, section_commands
from tests.test_readme import COMMANDS, command_of, known_options

pytest.importorskip("sklearn")
pytest.importorskip("skimage")
pytest.importorskip("tensorrt_rtx")

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
NAME = "ms_hybrid_s"
SMALL = static_models.architecture(16, 4, 2, "1 conv | 1 conv, 1 trans | 1 trans", heads=4).replace(
    image_size=224, classes=1000
)
NOT_HERE = {
    "scripts/setup": "continuous integration begins with it",
    "cmake": "TensorRT's headers; tests/packaging/cpp/test_library.py runs these lines against doubles",
    "engine-cpp/build/": "what cmake would have built",
    "served/build/": "what cmake would have built; tests/packaging/onnxruntime/test_onnxruntime_cpp.py runs it",
    "tritonserver": "a server; tests marked triton start one",
    "spach-validate grpc://": "a server; tests marked triton start one",
    "docker": "docker",
    "kubectl": "a cluster",
    "helm upgrade": "a cluster; tests marked helm render the chart",
}
SLOW = (
    *("spach-export --model ms_hybrid_s --auto", "--max-rel-l2", "--max-drop", "polygraphy run"),
    *("--target cpu", "spach-benchmark"),  # these measure
)


GIVEN = ("photos", "val", "run7", "imagenet.txt")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all pages, one after the other, with what they suppose: photographs, a checkpoint, class names."""
    root = tmp_path_factory.mktemp("docs") / "here"
    for folder, pictures in (("photos", calibration_photographs(24)), ("val", held_out_photographs(8))):
        for number, picture in enumerate(pictures):
            path = root / folder / (f"class{number % 2}" if folder == "val" else "") / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
    (root / "imagenet.txt").write_text("".join(f"class {number}\n" for number in range(1000)))
    (root / "run7").mkdir()
    tensors = model().state_dict()
    torch.save({"model": tensors, "args": {"model": NAME}}, root / "run7" / "checkpoint.pth")
    torch.save({**tensors, "head_dist.weight": torch.zeros(1)}, root / "run7" / "two_heads.pth")
    return root


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That folder without what another page left. Exports that several pages begin with come from a cache."""
    for path in place.iterdir():
        if path.name not in GIVEN:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    monkeypatch.chdir(place)
    monkeypatch.setenv("SPACH_CACHE", str(place.parent / "cache"))
    monkeypatch.setitem(ARCHITECTURES, NAME, SMALL)
    monkeypatch.setattr("webbrowser.open", lambda page: True)
    monkeypatch.setattr(rounds, "RunnerProcess", WorkerHere)
    return place


class WorkerHere(contextlib.ExitStack):
    """A benchmark's runner in this process, which alone knows the small model, and in short turns."""

    device, pid, open_s = "cpu", 0, 0.0

    def __init__(self, name: str, setup: RunnerSetup) -> None:
        super().__init__()
        self.runner = self.enter_context(contestants.opened(name, setup))

    def first_outputs(self, *asked: Any) -> Any:
        return worker._reply(self.runner, "first_outputs", asked)

    def turn(self, inputs: Any, seconds: float) -> Any:
        return worker._reply(self.runner, "turn", (inputs, seconds / 50))

    def profile(self, inputs: Any) -> Any:
        return worker._reply(self.runner, "profile", inputs)


def model() -> Spach:
    """The small model with the demo weights that exports without a checkpoint have."""
    made = Spach(SMALL.replace(image_size=224, classes=1000)).eval()
    load_demo_weights(made)
    return made


def spoil_a_graph() -> None:
    """other.onnx: the bundle's graph without the bias of a projection."""
    graph = onnx.load(f"build/{NAME}-fp16/model.onnx")
    bias = next(tensor for tensor in graph.graph.initializer if tensor.name.endswith("channel_func.fc2.bias"))
    bias.raw_data = bytes(len(bias.raw_data))
    onnx.save(graph, "other.onnx")


class Shell:
    """Runs what pages show: our commands in this process, the rest in a shell; `$?` is of the last."""

    def __init__(self) -> None:
        self.code = 0

    def run(self, command: str) -> list[str]:
        """What it prints, stdout and stderr."""
        if command == "echo $?":
            return [str(self.code)]
        words, _, target = command.partition(" > ")
        program, *arguments = shlex.split(words)
        if program not in (*COMMANDS, "spach-package"):
            return self._other(command)
        if "other.onnx" in arguments:
            spoil_a_graph()
        from spach_deploy.cli.package import main as package

        main: Any = package if program == "spach-package" else COMMANDS[program]
        result = CliRunner().invoke(main, arguments, prog_name=program)
        self.code = result.exit_code
        assert "Traceback" not in result.output, command
        if target:
            Path(target).write_text(result.stdout)
        return str(result.output).splitlines()

    def _other(self, command: str) -> list[str]:
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)
        self.code = done.returncode
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout.splitlines()


def not_here(command: str) -> bool:
    return any(command.startswith(start) for start in NOT_HERE)


def check_options(command: str) -> None:
    """Of a command of ours that is not run."""
    words = shlex.split(command)
    if words[0].startswith("spach-"):
        found = command_of(words)
        assert found is not None, command
        assert {word for word in words if word.startswith("-")} <= known_options(found), command


def codes(shown: Shown, following: Shown | None) -> set[int]:
    """Exit codes that are right: what the page says next, or its error's; a check without a GPU may end with 3."""
    if shown.command == "echo $?":
        return set(range(4))
    if following is not None and following.command == "echo $?" and following.output:
        return {int(following.output[0])}
    if shown.exit_code is not None:
        return {shown.exit_code}
    return {0, 3} if shown.command.startswith(("spach-validate", "spach-doctor")) else {0}


def is_reused(lines: list[str]) -> bool:
    """Whether an export came, or would come, from the cache: then there is less to say."""
    return any(line.startswith("reused") or "come from the cache" in line for line in lines)


def follow(page: Path, *, slow: bool) -> None:
    shell, listed = Shell(), list(commands(page))
    for shown, following in zip(listed, [*listed[1:], None][: len(listed)], strict=True):
        if not_here(shown.command) or (any(part in shown.command for part in SLOW) and not slow):
            check_options(shown.command)
            continue
        printed = shell.run(shown.command)
        assert shell.code in codes(shown, following), (shown.command, printed[-12:])
        if shown.output and is_reused(printed) == is_reused(list(shown.output)):
            wanted, found = forms(shown.output), forms(printed)
            assert is_within(wanted, found), (shown.command, wanted, found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_works_as_it_is_written(page: Path, here: Path) -> None:
    follow(page, slow=False)


@pytest.mark.parametrize("page", ["python", "own_module"])
def test_the_programs_of_a_page_work_as_they_are_written(page: str, here: Path) -> None:
    """Its blocks, one after the other, as one program."""
    program = python_blocks(ROOT / "docs" / f"{page}.md")
    assert program
    exec(compile(program, f"docs/{page}.md", "exec"), {"__name__": "page"})


@pytest.mark.slow
@pytest.mark.parametrize("page", ["int8", "cpu", "cpp"])
def test_what_takes_long_on_a_page(page: str, here: Path) -> None:
    follow(ROOT / "docs" / f"{page}.md", slow=True)


def test_into_production_of_the_readme_works_as_it_is_written(here: Path) -> None:
    """Triton, C++, Kubernetes and Polygraphy: what can run here does, and writes what it says."""
    shell = Shell()
    shell.run(f"spach-export --model {NAME} --fp16")
    ran = []
    for command in section_commands(ROOT / "README.md", "Into production"):
        if not_here(command):
            check_options(command)
            continue
        shell.run(command)
        assert shell.code == 0, command
        ran.append(command.split()[1])
    assert {"triton", "cpp", "kubernetes", "polygraphy"} <= set(ran)
    written = [path for path in ("models", "engine-cpp", "k8s", "golden") if any(here.joinpath(path).iterdir())]
    assert len(written) == 4


def test_every_reason_for_not_running_is_needed() -> None:
    every = [shown.command for page in PAGES for shown in commands(page)]
    every += section_commands(ROOT / "README.md", "Into production")
    for start in NOT_HERE:
        assert any(command.startswith(start) for command in every), start


def test_a_wrong_page_fails(here: Path) -> None:
    def page(text: str) -> Path:
        (here / "page.md").write_text(f"```console\n{text}```\n")
        return here / "page.md"

    follow(page("$ spach-export --list\nms_hybrid_s\n$ echo $?\n0\n"), slow=False)
    for wrong in (
        "$ spach-export --lists\n",
        "$ spach-export --list\n$ echo $?\n2\n",
        "$ spach-export --list\nnothing of it\n",
    ):
        with pytest.raises(AssertionError):
            follow(page(wrong), slow=False)


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for page in PAGES:
        assert page.name == "README.md" or f"({page.name})" in index
