"""A command line that a report shows asks for the very options that it was made from."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click
import pytest

from spach_deploy.cli.export import main as export_main
from spach_deploy.cli.validate import main as validate_main
from spach_deploy.common.files import Destination
from spach_deploy.options.command_line import export_command, validate_command
from spach_deploy.options.recipe import export_options
from spach_deploy.options.specs import (
    BatchProfile,
    ComputeCapability,
    EngineTarget,
    ExportOptions,
    FeatureLayout,
    Flavour,
    IODtype,
    ModelSpec,
    OutputSpec,
    Precision,
    QuantizationSpec,
    Role,
    WeightSource,
)

MODEL = ModelSpec("ms_hybrid_s")
EXPORTS = [
    ExportOptions(MODEL, Precision.FP16),
    ExportOptions(
        ModelSpec("ms_hybrid_s", Path("a run/x.pth"), WeightSource.EMA, 192, 10, ("head_dist.*", "*'s")),
        Precision.BF16,
        OutputSpec(IODtype.UINT8, 5, True, (Role.LOGITS, Role.FEATURES), FeatureLayout.TOKENS, ("logits=scores",)),
        EngineTarget(
            Flavour.TENSORRT_RTX,
            (ComputeCapability(8, 6), ComputeCapability(8, 9)),
            BatchProfile(2, 4, 8),
            opt_level=3,
            workspace_bytes=1 << 29,
            timing_cache=Path("cache"),
            tf32=False,
            version_compatible=True,
            hardware_compatible=True,
        ),
        images=Path("val/$x"),
        output=Path("build/it's"),
        overwrite=True,
        disabled_rewrites=("fold_residual", "grid_stream"),
        opset=22,
    ),
    ExportOptions(
        MODEL,
        Precision.INT8,
        engine=EngineTarget(Flavour.NONE),
        quantization=QuantizationSpec(
            Path("photos"),
            Destination.of(Path("cache.json")),
            "entropy",
            Precision.FP32,
            ("layer4.*",),
            ("stem.proj", "head"),
            ("layer1.*",),
            equalize=False,
            allow_overlap=True,
            max_rel_l2=0.0125,
            max_drop=0.3,
            labels=Path("labels.csv"),
            vnni=True,
        ),
    ),
]


def values(command: click.Command, line: str) -> dict[str, Any]:
    """Click's values of a command line, the program's name taken off."""
    return command.make_context(command.name, shlex.split(line)[1:]).params


@pytest.mark.parametrize("options", EXPORTS, ids=lambda options: options.precision.value)
def test_an_export_is_repeated(options: ExportOptions) -> None:
    assert export_options(values(export_main, export_command(options)), None) == options


def test_what_is_as_by_default_is_left_out() -> None:
    assert export_command(EXPORTS[0]) == "spach-export --model ms_hybrid_s --fp16"
    assert validate_command("build/x") == "spach-validate build/x"


def test_a_validation_is_repeated() -> None:
    given = {
        "bundle": Path("b"),
        "images": Path("val"),
        "max_images": 64,
        "labels": Path("val.csv"),
        "max_drop": 0.25,
        "checkpoint": Path("x.pth"),
        "weights": "ema",
        "ignore": ("head_dist.*", "loss"),
        "bisect": True,
        "against": Path("a"),
        "accept": "graph",
    }
    found = values(validate_main, validate_command("b x/model.onnx", Path("other"), given))
    assert (found.pop("target"), found.pop("other")) == ("b x/model.onnx", Path("other"))
    assert {key: found[key] for key in given} == given
