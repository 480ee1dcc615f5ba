from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from spach_deploy.cli.calibrate import main as calibrate_command
from spach_deploy.cli.export import main as export_command
from spach_deploy.cli.recipes import KEYS
from spach_deploy.cli.validate import main as validate_command

ROOT = Path(__file__).parents[1]
COMMANDS = {"spach-calibrate": calibrate_command, "spach-export": export_command, "spach-validate": validate_command}
PAGES = [
    ROOT / "README.md",
    ROOT / "export" / "README.md",
    ROOT / "calibration" / "README.md",
    ROOT / "CONTRIBUTING.md",
]


def known_options(command: click.Command) -> set[str]:
    return {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--help", "-h"}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_the_documentation_exist(page: Path) -> None:
    for line in page.read_text(encoding="utf-8").splitlines():
        for start in (
            m.start()
            for m in re.finditer(r"(?<![\w./-])(?:\.venv/bin/)?spach-(?:calibrate|export|validate) --?\w", line)
        ):
            words = shlex.split(re.split(r"[`|;#]", line[start:])[0].removeprefix(".venv/bin/"))
            unknown = {w for w in words if w.startswith("-")} - known_options(COMMANDS[words[0]])
            assert not unknown, line


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_options_named_in_running_text_exist() -> None:
    named = set(re.findall(r"`(--[a-z0-9-]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert named <= known_options(export_command) | known_options(validate_command)


def test_the_table_of_recipe_keys_is_complete() -> None:
    text = (ROOT / "export" / "README.md").read_text(encoding="utf-8")
    table = text.split("| key | value |")[1].split("\n\n")[0]
    assert {
        key
        for row in table.splitlines()
        for key in re.findall(r"`([a-z0-9_]+)`", row.split("|")[1] if "|" in row else "")
    } == set(KEYS)
