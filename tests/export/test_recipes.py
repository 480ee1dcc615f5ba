"""The recipes in export/: each is good as it stands, and the cheapest makes a bundle."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
from pathlib import Path

import pytest

from spach_deploy.bundle.schema import EngineSection
from spach_deploy.bundle.store import Bundle
from spach_deploy.options.recipe import export_options
from spach_deploy.options.specs import Flavour
from spach_deploy.pipeline.estimate import refuse_early
from tests.commands import ROOT, console_script

RECIPES = sorted((ROOT / "export").glob("*.toml"))
CHEAPEST = ROOT / "export" / "ms_conv_xxs-cpu.toml"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_asks_for_what_can_be_done(recipe: Path, tmp_path: Path) -> None:
    options = export_options({"output": tmp_path / "bundle"}, recipe)
    if importlib.util.find_spec("tensorrt_rtx") is None:
        options = dataclasses.replace(options, engine=dataclasses.replace(options.engine, flavour=Flavour.NONE))
    refuse_early(options)
    assert options.model.name is not None
    assert options.model.name.partition("+")[0] in recipe.stem


def test_there_is_a_readme_that_names_each() -> None:
    readme = (ROOT / "export" / "README.md").read_text(encoding="utf-8")
    assert RECIPES
    assert [recipe.name for recipe in RECIPES if recipe.name not in readme] == []


def exported(recipe: Path, folder: Path, *more: str) -> Bundle:
    """Through the console script, in a process of its own, as a user runs it."""
    script = console_script("spach-export", folder)
    call = [str(script), "--recipe", str(recipe), "-o", str(folder / "deep" / "bundle"), *more]
    done = subprocess.run(call, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "Bundle: deep/bundle"
    assert sorted(path.name for path in folder.iterdir()) == ["deep", "spach-export"]
    return Bundle.open(folder / "deep" / "bundle")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_makes_a_bundle(recipe: Path, tmp_path: Path) -> None:
    bundle = exported(recipe, tmp_path)
    assert (bundle.plan is None) == (bundle.manifest.engine.flavour == "none")


def test_the_cheapest_recipe_makes_a_bundle(tmp_path: Path) -> None:
    bundle = exported(CHEAPEST, tmp_path, "--image-size", "64")
    assert bundle.manifest.model.name == "ms_conv_xxs"
    assert bundle.plan is None
    assert bundle.manifest.engine == EngineSection(flavour=Flavour.NONE, reason="--engine none was asked for")
