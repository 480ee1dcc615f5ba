"""One entry in the table is an option everywhere: on the command line, in recipes, in recorded commands and in help."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from spach_deploy.cli.benchmark import main as benchmark
from spach_deploy.cli.calibrate import main as calibrate
from spach_deploy.cli.console import Command
from spach_deploy.cli.doctor import main as doctor
from spach_deploy.cli.export import main as export
from spach_deploy.cli.package import main as package
from spach_deploy.cli.package_cpp import main as cpp
from spach_deploy.cli.package_kubernetes import main as kubernetes
from spach_deploy.cli.package_onnxruntime import main as onnxruntime
from spach_deploy.cli.package_polygraphy import main as polygraphy
from spach_deploy.cli.package_triton import main as triton
from spach_deploy.cli.predict import main as predict
from spach_deploy.cli.validate import main as validate
from spach_deploy.common.errors import UsageError
from spach_deploy.options.click_options import click_options
from spach_deploy.options.command_line import export_command, export_words
from spach_deploy.options.recipe import export_options, filled, read_recipe, value_of, with_value
from spach_deploy.options.specs import ExportOptions, Precision
from spach_deploy.options.table import (
    COMMANDS,
    EXPORT,
    GROUPS,
    OUTPUT,
    TABLE,
    TRITON,
    Kind,
    Option,
    filling,
    options_of,
)
from spach_deploy.packaging.triton.options import Backend, Device, EnsembleInput
from tests.commands import ROOT

MAINS: dict[str, click.Command] = dict(
    zip(
        COMMANDS,
        (export, calibrate, validate, predict, benchmark, doctor, triton, cpp, polygraphy, onnxruntime, kubernetes),
        strict=True,
    )
)
TEN = (
    *("--recipe", "--model", "--checkpoint", "--fp32", "--fp16", "--bf16", "--int8", "--fp8", "--images"),
    *("--calibration", "--engine", "--gpu", "--batch", "-o"),
)
"""The ten that matter first; a precision is one of them."""


def helped(main: click.Command, name: str) -> str:
    result = CliRunner().invoke(main, ["--help"], prog_name=name, env={"COLUMNS": "80"})
    assert result.exit_code == 0
    return result.stdout


def sections(text: str) -> dict[str, list[str]]:
    """Flags of each group of a help, the long ones or those before a comma."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if title := re.fullmatch(r"(\w[^:]*):", line):
            found[title[1]] = []
        elif found and (flag := re.match(r"  (--?[\w-]+)", line)):
            found[list(found)[-1]].append(flag[1])
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_option_once_in_named_groups(name: str) -> None:
    groups = sections(helped(MAINS[name], name))
    assert list(groups) == [group for group in GROUPS if group in groups]
    shown = [flag for flags in groups.values() for flag in flags]
    assert sorted(shown) == sorted(set(shown))
    options = [option for option in options_of(name) if option.kind is not Kind.FLAGS]
    assert {option.flags.split()[0] for option in options} <= set(shown)
    assert [line for line in helped(MAINS[name], name).splitlines() if len(line) > 80] == []


def test_what_matters_most_comes_first() -> None:
    groups = sections(helped(export, EXPORT))
    assert next(iter(groups)) == "Common"
    assert tuple(groups["Common"]) == TEN
    assert {"Model", "Quantization", "Engine", "Inputs and outputs", "Output"} <= set(groups)


def test_the_page_of_all_options_is_as_the_table_says() -> None:
    call = [sys.executable, str(ROOT / "scripts" / "options_page.py")]
    written = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT)})
    page = ROOT / "docs" / "options.md"
    assert page.read_text(encoding="utf-8") == written.stdout, "python scripts/options_page.py > docs/options.md"


def test_the_help_of_the_family_names_its_ways() -> None:
    text = helped(package, "spach-package")
    assert {"--version", "triton", "cpp", "polygraphy", "kubernetes"} <= set(text.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_has_a_flag_twice(name: str) -> None:
    flags = [flag for option in options_of(name) for flag in (*option.flags.split(), option.off_flag) if flag]
    assert [flag for flag, count in Counter(flags).items() if count > 1] == []


def test_choices_are_what_their_owners_know() -> None:
    choices = {option.flag: option.choices for option in options_of(TRITON)}
    for flag, known in (("--backend", Backend), ("--device", Device), ("--ensemble-input", EnsembleInput)):
        assert list(choices[flag]) == [entry.value for entry in known]


def fields(spec: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of everything in a spec that is no spec itself."""
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if dataclasses.is_dataclass(value) and type(value).__name__ != "BatchProfile":
            yield from fields(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def test_every_field_of_an_export_is_filled_by_one_option() -> None:
    assert sorted(option.field for option in filling()) == sorted(fields(ExportOptions()))


SAMPLES = {
    "precision": "int8",
    "mean": "0.1,0.25,1e-07",
    "std": "0.123456789",
    "image_size": [192, 256],
    "gpu": "sm86,rtx4090",
    "batch": "1:2:3",
    "workspace": "2G",
    "outputs": "embedding,features",
}


def sample(option: Option) -> Any:
    """A value that is not the default, as a recipe says it."""
    if option.kind is Kind.SWITCH:
        return not value_of(ExportOptions(), option.field)
    kinds = {Kind.WHOLE: 3, Kind.REAL: 0.123456789, Kind.REPEATED: ["a*", "b c"], Kind.PATH: "in/a file"}
    choice = option.choices[-1] if option.choices else "text"
    return SAMPLES.get(option.key, kinds.get(option.kind, choice))


def written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


@pytest.mark.parametrize("option", [o for o in filling() if o.in_recipes], ids=lambda option: option.key)
def test_recipe_and_command_line_say_the_same(option: Option, tmp_path: Path) -> None:
    """What a recipe says is recorded as a command, and this command gives the same export, bit for bit."""
    recipe = tmp_path / "recipe.toml"
    eight_bits = "" if option.field == "precision" else "precision = 'int8'\n"
    recipe.write_text(f"{eight_bits}{option.key} = {written(sample(option))}\n", encoding="utf-8")
    said = export_options({}, recipe)
    assert value_of(said, option.field) != value_of(ExportOptions(), option.field)
    words = shlex.split(export_command(said))
    assert words[0] == "spach-export"
    assert export_options(export.make_context("spach-export", words[1:]).params) == said


@dataclasses.dataclass(frozen=True)
class Greeted(ExportOptions):
    """An export with something new in it."""

    greeting: str | None = None


def test_a_new_entry_is_an_option_everywhere(tmp_path: Path) -> None:
    new = Option("--greeting", Kind.TEXT, "Say this.", "greeting", group=OUTPUT, commands=(EXPORT,), shown="hello")
    table = (*TABLE, new)

    @click.command("greet", cls=Command)
    @click_options(EXPORT, table)
    def command(**given: Any) -> None:
        made = filled(Greeted(), given, given["recipe"], table)
        click.echo(f"{made.greeting} {' '.join(export_words(made, table))}")

    recipe = tmp_path / "recipe.toml"
    recipe.write_text('greeting = "moin"\nprecision = "fp16"')
    assert re.search(r"^  --greeting TEXT +Say this\.  \[hello\]$", helped(command, "greet"), re.MULTILINE)
    assert "--greeting" in sections(helped(command, "greet"))[OUTPUT]
    assert CliRunner().invoke(command, ["--recipe", str(recipe)]).output == "moin --fp16 --greeting moin\n"
    told = CliRunner().invoke(command, ["--recipe", str(recipe), "--greeting", "hi"])
    assert told.output == "hi --fp16 --greeting hi\n"
    with pytest.raises(UsageError, match="unknown key 'greeting'"):
        read_recipe(recipe)


def test_a_value_goes_into_its_field_alone() -> None:
    before = ExportOptions(precision=Precision.FP16)
    after = with_value(before, "model.hyperparameters.heads", 6)
    assert after.model.hyperparameters.given() == {"heads": 6}
    assert with_value(after, "model.hyperparameters.heads", None) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_command_needs_is_asked_for(name: str) -> None:
    arguments = ["x" for parameter in MAINS[name].params if isinstance(parameter, click.Argument)]
    for option in (option for option in options_of(name) if option.is_required):
        result = CliRunner().invoke(MAINS[name], arguments, prog_name=name)
        assert result.exit_code == 2
        assert "Missing option '-o' / '--output'" in result.stderr, option
