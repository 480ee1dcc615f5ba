"""README.md's commands for C++, as they are written there, with the doubles where it says /opt/tensorrt."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from spach_deploy.cli.package import main as package_command
from spach_deploy.specs import Precision
from tests import small_bundles
from tests.deployment.cpp import plans
from tests.deployment.cpp.builds import Build
from tests.docs.pages import section_commands

README = Path(__file__).parents[3] / "README.md"

pytestmark = pytest.mark.cpp


def test_the_worked_example_builds_and_passes_its_self_test(
    plain: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bundle = small_bundles.copy(small_bundles.bundle(Precision.FP16), tmp_path / "build" / "ms_hybrid_s-fp16")
    plans.give_plan(bundle)
    Path("imagenet.txt").write_text("".join(f"class {number}\n" for number in range(small_bundles.CLASSES)))
    nvidia = plain.path / "nvidia"
    shown = section_commands(README, "Into production")
    commands = [line for line in shown if line.startswith(("spach-package cpp", "cmake", "engine-cpp/"))]
    assert len(commands) == 4
    for command in commands:
        words = shlex.split(command.replace("/opt/tensorrt", str(nvidia / "tensorrt")))
        if words[0] == "spach-package":
            assert CliRunner().invoke(package_command, words[1:]).exit_code == 0
            continue
        environment = {**os.environ, **plain.variables, "CMAKE_GENERATOR": "Ninja", "CMAKE_BUILD_TYPE": "Debug"}
        found = [f"-DCUDAToolkit_ROOT={nvidia / 'cuda'}"] if "-S" in words else []
        done = subprocess.run([*words, *found], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stdout[-1500:], done.stderr[-1500:])
    assert done.stdout.endswith("\nPASSED\n")
