"""The benchmarks of growth on small models: the fit, the tables, and the runner of all scripts."""

from __future__ import annotations

import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import data_growth, growth
from benchmarks.export_time import Cost
from benchmarks.fitting import exponent, marginal
from spach_deploy.models import published as configs
from tests import static_models

ROOT = Path(__file__).parents[2]
ALL = ROOT / "benchmarks" / "all"


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_is_found(power: float) -> None:
    sizes = [1, 2, 4, 8]
    assert exponent(sizes, [3 * n**power for n in sizes]) == pytest.approx(power)


def test_without_two_sizes_there_is_no_slope() -> None:
    assert math.isnan(exponent([4], [1.0]))
    assert math.isnan(exponent([1, 2], [0.0, 1.0]))
    assert math.isnan(marginal([4], [1.0]))


def test_a_fixed_part_is_not_in_the_slope() -> None:
    assert marginal([1, 2, 10], [100 + 3 * n for n in (1, 2, 10)]) == pytest.approx(3)


def test_more_than_linear_is_said() -> None:
    assert growth.verdict({"latency": 1.0, "export": 2.0}) == (
        "Latency at most linear; export more than linear (limit 1.15)."
    )


def test_a_table_by_size_of_a_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(configs.ARCHITECTURES, "small", static_models.ARCHITECTURES["conv"])
    text = growth.by_size("small", [32, 64], rounds=1)
    assert "| 32 |" in text
    assert "| 64 |" in text
    row = next(line for line in text.splitlines() if line.startswith("| exponent of pixels"))
    cells = [float(cell) for cell in row.strip("| ").split("|")[1:]]
    assert cells[growth._UNITS.index("nodes")] == 0.0  # the same graph, other shapes
    assert 0.9 < cells[growth._UNITS.index("GMACs")] <= 1.01  # convolutions: as many as pixels; the head stays


def test_models_of_growing_depth_are_registered_only_while_they_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    known = set(configs.ARCHITECTURES)
    seen = []

    def costs(name: str, size: int, batch: int, rounds: int) -> growth.Costs:
        blocks = len(configs.ARCHITECTURES[name].mixers[0])
        seen.append(blocks)
        return growth.Costs(1.0, 1.0, 10 * blocks, 100 * blocks, 1000 * blocks, 0.1 * blocks)

    monkeypatch.setattr(growth, "costs", costs)
    assert "latency by multiply-adds at most linear" in growth.by_depth("trans", [1, 2, 4], 32, 1)
    assert seen == [1, 2, 4]
    assert set(configs.ARCHITECTURES) == known


def test_one_line_a_number_of_images_and_the_slope(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measure(command: list[str]) -> Cost:
        count = int(command[command.index("--max-images") + 1])
        return Cost(10 + 0.5 * count, 0, 10**9 + 10**6 * count)

    monkeypatch.setattr(data_growth, "measure", measure)
    lines = data_growth.rows("bisection", data_growth.Place(tmp_path, "ms_conv_xxs", None), [16, 64], 1)
    assert [line[1] for line in lines] == ["16", "64", "an image"]
    assert lines[-1][2:] == ["0.500", "1.00"]


@pytest.mark.parametrize("job", data_growth.JOBS)
def test_measured_commands_have_options_that_exist(job: str, tmp_path: Path) -> None:
    from tests.test_readme import COMMANDS, known_options

    command = data_growth.Place(tmp_path, "ms_conv_xxs", 64).command(job, 16)
    name = "spach-calibrate" if job == "calibration" else "spach-validate"
    assert f"spach_deploy.cli.{name.removeprefix('spach-')} " in command[2]
    assert {word for word in command[3:] if word.startswith("-")} <= known_options(COMMANDS[name])


def test_all_knows_every_benchmark_that_records_and_takes_an_hour_or_so() -> None:
    scripts = runpy.run_path(str(ALL))["SCRIPTS"]
    recording = {p.stem for p in ALL.parent.glob("*.py") if "import record" in p.read_text() and p.stem != "results"}
    left_out = {"digits_accuracy", "cifar10_accuracy", "peers", "truncation"}  # training; other tools and runtimes
    assert {name for name, *_ in scripts} >= recording - left_out
    assert sum(minutes for *_, minutes in scripts) < 80


def test_all_lists_goes_on_after_a_failure_and_says_so(tmp_path: Path) -> None:
    listed = subprocess.run([sys.executable, ALL, "--list"], capture_output=True, text=True, check=True).stdout
    assert "How cost grows" in listed
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "all").write_text(ALL.read_text())
    (folder / "cpu_forms.py").write_text("raise SystemExit(3)")
    (folder / "kills.py").write_text("")
    done = subprocess.run([sys.executable, folder / "all", "cpu_forms", "kills"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "FAILED with 3" in done.stdout
    assert "kills            done" in done.stdout


def test_an_unknown_benchmark_is_refused() -> None:
    done = subprocess.run([sys.executable, ALL, "nothing"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "There is no benchmark nothing" in done.stderr
