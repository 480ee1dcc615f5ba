from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from spach_deploy.cli.benchmark import main as benchmark_command
from spach_deploy.cli.calibrate import main as calibrate_command
from spach_deploy.cli.doctor import main as doctor_command
from spach_deploy.cli.export import main as export_command
from spach_deploy.cli.package import main as package_group
from spach_deploy.cli.predict import main as predict_command
from spach_deploy.cli.validate import main as validate_command
from spach_deploy.options.recipe import KEYS

ROOT = Path(__file__).parents[1]
COMMANDS: dict[str, click.Command] = {
    "spach-benchmark": benchmark_command,
    "spach-calibrate": calibrate_command,
    "spach-doctor": doctor_command,
    "spach-export": export_command,
    "spach-predict": predict_command,
    "spach-validate": validate_command,
}
PAGES = [
    ROOT / "README.md",
    ROOT / "export" / "README.md",
    ROOT / "calibration" / "README.md",
    ROOT / "examples" / "cifar10" / "README.md",
    ROOT / "CONTRIBUTING.md",
]


def known_options(command: click.Command) -> set[str]:
    return {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--help", "-h"}


def command_of(words: list[str]) -> click.Command | None:
    """The command, or subcommand, that a line calls; None for one that is only named."""
    if words[0] != "spach-package":
        return COMMANDS[words[0]]
    assert isinstance(package_group, click.Group)
    return package_group.get_command(click.Context(package_group), words[1]) if len(words) > 1 else None


def calls(page: Path) -> list[list[str]]:
    """The commands that a page shows with options, as words."""
    found = []
    for line in page.read_text(encoding="utf-8").splitlines():
        for match in re.finditer(
            r"(?<![\w./-])(?:\.venv/bin/)?(?=spach-(?:benchmark|calibrate|doctor|export|package|predict|validate) )",
            line,
        ):
            words = shlex.split(re.split(r"[`|;#]", line[match.end() :])[0].replace("'", '"'))
            found.append(words)
    return [words for words in found if any(word.startswith("-") for word in words)]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_the_documentation_exist(page: Path) -> None:
    for words in calls(page):
        command = command_of(words)
        assert command is not None, words
        assert {word for word in words if word.startswith("-")} <= known_options(command), words


def test_the_documentation_shows_every_way_to_serve() -> None:
    shown = {words[1] for words in calls(ROOT / "README.md") if words[0] == "spach-package"}
    assert shown == {"triton", "cpp", "polygraphy", "onnxruntime", "kubernetes"}


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_options_named_in_running_text_exist() -> None:
    named = set(re.findall(r"`(--[a-z0-9-]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert isinstance(package_group, click.Group)
    context = click.Context(package_group)
    packages = (package_group.get_command(context, name) for name in package_group.list_commands(context))
    commands = [*COMMANDS.values(), *(command for command in packages if command is not None)]
    assert named <= set().union(*map(known_options, commands))


def test_the_table_of_recipe_keys_is_complete() -> None:
    text = (ROOT / "export" / "README.md").read_text(encoding="utf-8")
    table = text.split("| key | value |")[1].split("\n\n")[0]
    assert {
        key
        for row in table.splitlines()
        for key in re.findall(r"`([a-z0-9_]+)`", row.split("|")[1] if "|" in row else "")
    } == set(KEYS)
