"""The recipes in calibration/: each asks for what can be done, for the largest model of its family."""

from __future__ import annotations

from pathlib import Path

import pytest

from spach_deploy.bundle.store import Bundle
from spach_deploy.common.errors import UsageError
from spach_deploy.models.published import ARCHITECTURES
from spach_deploy.options.quantization import check_quantization
from spach_deploy.options.recipe import export_options
from spach_deploy.options.specs import Precision
from tests.commands import ROOT, export
from tests.quantization.small_quantized import calibration_images

RECIPES = sorted((ROOT / "calibration").glob("*.toml"))
OTHERS = {"smlpnet": "smlpnet_base", "shiftvit": "shiftvit_light_base"}
"""Families with other sizes than SPACH: the model of their recipe."""

FAMILIES = {name.removesuffix("_s") for name in ARCHITECTURES if name.endswith("_s")} | {*OTHERS}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_lacks_nothing_but_the_images(recipe: Path) -> None:
    with pytest.raises(UsageError, match="--int8 needs images"):
        check_quantization(export_options({}, recipe))
    options = export_options({"calibration": calibration_images()}, recipe)
    check_quantization(options)
    assert options.precision is Precision.INT8
    family = recipe.stem.removesuffix("-int8")
    assert options.model.name == OTHERS.get(family, f"{family}_s")


def test_every_family_has_a_recipe_that_the_readme_names() -> None:
    readme = (ROOT / "calibration" / "README.md").read_text(encoding="utf-8")
    assert {recipe.stem.removesuffix("-int8") for recipe in RECIPES} == FAMILIES
    assert all(recipe.name in readme for recipe in RECIPES)


@pytest.mark.parametrize(
    "recipe",
    [recipe if recipe.stem == "ms_conv-int8" else pytest.param(recipe, marks=pytest.mark.slow) for recipe in RECIPES],
    ids=lambda path: path.stem,
)
def test_a_recipe_quantizes_the_smallest_of_its_family(recipe: Path, tmp_path: Path) -> None:
    family = recipe.stem.removesuffix("-int8")
    sizes = ("xxs", "xs", "s", "tiny", "light_tiny")
    model = next(name for name in (f"{family}_{size}" for size in sizes) if name in ARCHITECTURES)
    size = ("--image-size", 64) if family in ("ms_conv", "conv", *OTHERS) else ()
    arguments = ("--model", model, "--calibration", calibration_images(), "--engine", "none", *size)
    result = export("--recipe", recipe, *arguments, "-o", tmp_path / "bundle")
    assert result.exit_code == 0, result.stderr
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.manifest.precision.asked == "int8"
    assert bundle.manifest.content()["quantization"]["calibration"]["images"] == 16
