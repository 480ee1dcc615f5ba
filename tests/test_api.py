"""What `import spach_deploy` offers: names, keywords, and that the functions do what the commands do."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

import spach_deploy
from spach_deploy import models
from spach_deploy.bundle.store import GRAPH, REPORT
from spach_deploy.common.files import sha256_of
from spach_deploy.options import keywords
from spach_deploy.options.keywords import Batches, Channels, FilePath, Texts
from spach_deploy.options.specs import Precision
from spach_deploy.options.table import CALIBRATE, EXPORT, VALIDATE, Kind, Option
from tests import small_bundles
from tests.commands import ROOT

TYPES: dict[Kind, Any] = {
    Kind.TEXT: str,
    Kind.LIST: Texts,
    Kind.BATCHES: Batches,
    Kind.REPEATED: Texts,
    Kind.WHOLE: int,
    Kind.SIZE: int | tuple[int, int],
    Kind.REAL: float,
    Kind.PATH: FilePath,
    Kind.SWITCH: bool,
    Kind.FLAG: bool,
}
OTHERS: dict[str, Any] = {"mean": Channels, "std": Channels, "workspace": str | int}


@pytest.mark.parametrize("package", [spach_deploy, models], ids=lambda package: package.__name__)
def test_every_public_name_is_there(package: Any) -> None:
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, spach_deploy; spach_deploy.Bundle, spach_deploy.export; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"torch", "numpy", "onnx", "click", "PIL", "rich"} & set(loaded.split()) == set()


def wanted(option: Option) -> Any:
    """The type of a keyword, by what the table says."""
    if option.key in OTHERS:
        return OTHERS[option.key]
    return Literal[option.choices] if option.choices else TYPES[option.kind]


@pytest.mark.parametrize(
    ("command", "said", "explicit"),
    [
        (EXPORT, keywords.ExportKeywords, {"model"}),
        (CALIBRATE, keywords.CalibrateKeywords, {"model"}),
        (VALIDATE, keywords.ValidateKeywords, set()),
    ],
)
def test_type_checkers_know_what_the_table_has(command: str, said: type, explicit: set[str]) -> None:
    table, hints = keywords.keywords(command), get_type_hints(said)
    assert hints.keys() == table.keys() - explicit
    for key, hint in hints.items():
        found = get_args(hint) if get_origin(hint) is Literal else hint
        expected = wanted(table[key])
        assert found == (get_args(expected) if table[key].choices else expected), key


def test_help_shows_every_keyword() -> None:
    signature = inspect.signature(spach_deploy.export)
    assert keywords.keywords(EXPORT).keys() <= signature.parameters.keys()
    assert list(signature.parameters)[:4] == ["model", "example_inputs", "recipe", "observer"]
    assert "heads: Heads of every attention." in (spach_deploy.export.__doc__ or "")


def values(**given: Any) -> dict[str, Any]:
    return keywords.values_of_keywords("export", EXPORT, given)


def test_values_are_what_a_python_user_writes() -> None:
    assert values(gpu=("sm86", "sm89"), batch=(1, 8, 32), mean=(0.5, 0.25, 0.1), workspace=1 << 30, heads=None) == {
        "gpu": "sm86,sm89",
        "batch": "1:8:32",
        "mean": "0.5,0.25,0.1",
        "workspace": "1073741824",
    }
    assert values(image_size=(192, 256), std=0.25) == {"image_size": "192x256", "std": "0.25"}
    assert values(ignore="head*", keep_float=["a", "b"], batch=4) == {
        "ignore": ("head*",),
        "keep_float": ("a", "b"),
        "batch": "4",
    }
    assert values(images=Path("in"), norm_eps=1, calibration="p") == {
        "images": Path("in"),
        "norm_eps": 1.0,
        "calibration": Path("p"),
    }


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"image_size": (64, 64.0)}, "image_size = 64.0 is not a whole number. See docs/python.md."),
        ({"image_size": (64, 64, 64)}, "image_size = [64, 64, 64] is no height and width."),
        ({"crop": 1.5}, "crop = 1.5 is out of range. Give 0.1 to 1."),
        ({"image_size": 64.0}, "image_size = 64.0 is not a whole number. See docs/python.md."),
        ({"precision": "fp12"}, "precision = 'fp12' is unknown. One of fp32, fp16, bf16, int8, fp8."),
        ({"top_k": 0}, "top_k = 0 is out of range. Give 1 or more."),
        ({"image_size": 3_200_000}, "image_size = 3200000 is out of range. Give 1 to 16384."),
        ({"std": (58.4, 57.1, 57.4)}, "--std 58.4 is not in (0, 1]. Divide values of 0 to 255 by 255."),
        ({"softmax": "yes"}, "softmax = 'yes' is not a true or false. See docs/python.md."),
        ({"engine": "none", "gpu": "sm86"}, "--engine none builds no engine, so --gpu can do nothing."),
        ({"model": "ms_hybird_s"}, "ms_hybrid_s"),
    ],
)
def test_a_wrong_value_is_one_sentence(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(spach_deploy.UsageError) as caught:
        spach_deploy.export(**{"model": "ms_conv_xxs", **given})
    assert sentence in str(caught.value)


def test_an_unknown_keyword_is_pythons_own_error() -> None:
    with pytest.raises(TypeError, match=r"export\(\) got an unexpected keyword argument 'presicion'; did you mean"):
        spach_deploy.export("ms_conv_xxs", **{"presicion": "fp16"})  # type: ignore[arg-type]


class Notes(spach_deploy.ExportObserver):
    """An observer of phases alone."""

    def __init__(self) -> None:
        self.phases: list[str] = []

    def started(self, phase: str) -> None:
        self.phases.append(phase)


def small(**options: Any) -> spach_deploy.ExportResult:
    """An export of the small model without an engine."""
    size, classes = small_bundles.SIZE, small_bundles.CLASSES
    return spach_deploy.export(small_bundles.NAME, image_size=size, num_classes=classes, engine="none", **options)


def test_export_and_validate_do_what_the_commands_do(small_model_registered: None, tmp_path: Path) -> None:
    observer = Notes()
    done = small(output=tmp_path / "bundle", observer=observer)
    assert sha256_of(done.bundle.path / GRAPH) == sha256_of(small_bundles.bundle(Precision.FP32) / GRAPH)
    assert done.validation.passed
    assert "validate the graph" in observer.phases
    assert isinstance(done.bundle, spach_deploy.Bundle)
    report = (done.bundle.path / REPORT).read_bytes()
    found = spach_deploy.validate(done.bundle, accept="graph")
    assert found.passed
    assert found.run is not None
    assert found.run.command == f"spach-validate {done.bundle.path} --accept graph"
    assert (done.bundle.path / REPORT).read_bytes() == report
    with pytest.raises(spach_deploy.UsageError, match="holds a bundle already"):
        small(output=tmp_path / "bundle")
    with (done.bundle.path / GRAPH).open("ab") as file:
        file.write(b"\0")
    assert f"{GRAPH} was changed" in spach_deploy.validate(done.bundle.path).all_findings[0]
    with pytest.raises(spach_deploy.UsageError, match=f"{GRAPH} was changed"):
        spach_deploy.Bundle.open(done.bundle.path)


def test_calibrate_refuses_early(small_model_registered: None, tmp_path: Path) -> None:
    with pytest.raises(spach_deploy.UsageError, match="needs images to calibrate on"):
        spach_deploy.calibrate(small_bundles.NAME, output=tmp_path / "scales.json")
    with pytest.raises(spach_deploy.UsageError, match=r"does not end with \.json"):
        spach_deploy.calibrate(small_bundles.NAME, output=tmp_path / "scales", calibration=ROOT / "spach_deploy/data")
