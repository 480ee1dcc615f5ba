"""Every file of the package that is no program is installed with it: setup.cfg names it."""

from __future__ import annotations

import configparser
from pathlib import Path

import spach_deploy

ROOT = Path(spach_deploy.__file__).parent


def test_files_of_the_package_are_installed() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT.parent / "setup.cfg", encoding="utf-8")
    installed = {
        file
        for package, patterns in settings["options.package_data"].items()
        for pattern in patterns.replace("\n", ",").split(",")
        for file in ROOT.parent.joinpath(*package.split(".")).glob(pattern.strip() or "nothing")
    }
    files = {file for file in ROOT.rglob("*") if file.is_file() and not file.name.startswith(".")}
    missing = [str(file.relative_to(ROOT)) for file in files - installed if file.suffix not in (".py", ".pyc")]
    assert sorted(missing) == []
