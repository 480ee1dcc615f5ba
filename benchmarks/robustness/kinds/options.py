"""Options combined at random, with values that fit and values that do not; each command says itself what it takes."""

from __future__ import annotations

import importlib
from random import Random

import click

from benchmarks.robustness.box import Box
from benchmarks.robustness.case import Case, Kind, Maker
from benchmarks.robustness.damage import hostile_texts
from benchmarks.robustness.seeds import CLASSES, NAME, SIZE, seeds

_PROGRAMS = {
    "spach-export": "spach_deploy.cli.export",
    "spach-calibrate": "spach_deploy.cli.calibrate",
    "spach-validate": "spach_deploy.cli.validate",
    "spach-doctor": "spach_deploy.cli.doctor",
    "spach-package triton": "spach_deploy.cli.package_triton",
    "spach-package cpp": "spach_deploy.cli.package_cpp",
    "spach-package kubernetes": "spach_deploy.cli.package_kubernetes",
}
_NEVER = ("--open", "--debug", "--help", "--version")
"""A browser is started by `--open`; tracebacks are shown by `--debug`."""

_INPUTS = (
    "fp16",
    "fp32",
    "weights.pth",
    "legacy.pth",
    "photos",
    "photos.tar",
    "photos.npz",
    "calibration.npz",
    "scales.json",
)
_FITTING: dict[str, tuple[str, ...]] = {
    "model": (NAME, NAME, NAME, "ms_hybrid_s", "robots", ""),
    "image_size": (str(SIZE), str(SIZE), "31", "1", "0", "99999999", "33"),
    "num_classes": (str(CLASSES), str(CLASSES), "1", "1000", "999999999999"),
    "output": ("out/x", "out/a/b/c", "out", "out/kept.txt", "out/x/../y", ".", "/dev/null/x", "/proc/x", "out/\udcff"),
    "gpu": ("sm89", "sm75,sm89", "rtx4090", "", ",", "sm0", "gpu", "sm89,sm89"),
    "batch": ("1", "1:2:3", "3:2:1", "0", "", "1:2", "a", "1:1:99999999999", "-1:1:1"),
    "workspace": ("1G", "1", "", "-1", "99999999T", "1e3"),
    "timing_cache": ("out/timing.cache", "photos", "weights.pth"),
    "report": ("out/report.json", "out/no/report.json", "out/x", "/dev/null/x"),
    "calibration_cache": ("out/scales.json", "photos", "out/no/scales.json"),
    "replicas": ("1:2", "2", "0:0", "9:1", "", "a:b", "1:99999999999"),
    "triton_version": ("25.08", "99.99", "", "latest", "25"),
    "gpus": ("0", "0,1", "", "a", "-1", "99999999999999999999"),
    "version_policy": ("latest", "latest:2", "specific:1", "specific:9", "", "all", "latest:-1", "specific:1,1"),
    "image": ("registry.example.com/team/vit", "Bad Name", "", "a:b", "../x", "x/" * 200),
    "name": ("vit", "", "Bad Name", "../x", "x" * 300),
    "check": ("repository", "plans", "photos", "fp16", "nowhere"),
}
_NUMBERS = ("1", "0", "-1", "3", "5", "99999999999999999999", "nan", "inf", "1e400", "0.3", "", "1_0", "٣", "0x10")


def _command(program: str) -> click.Command:
    main = importlib.import_module(_PROGRAMS[program]).main
    assert isinstance(main, click.Command)
    return main


def _maker(program: str) -> Maker:
    def make(box: Box, chance: Random) -> Case:
        for name in _INPUTS:
            box.bring(seeds().path(name), name)
        for name in ("repository", "plans"):
            box.bring(seeds().path(name), name)
        arguments: list[str] = []
        for parameter in _command(program).params:
            arguments += _drawn(parameter, box, chance)
        if program == "spach-export":
            arguments += _cheap(arguments, chance)
        if chance.random() < 0.1:
            arguments.insert(chance.randrange(len(arguments) + 1), chance.choice(_STRAY))
        command = (*program.split(), *arguments)
        return Case("options", command, may_connect="://" in " ".join(arguments))

    return make


_STRAY = ("--", "-", "--nothing", "-x", "--model", "extra", "-o", "--output=", "=", "-vv", "\udcff", "--no-json")


def _cheap(arguments: list[str], chance: Random) -> list[str]:
    """Most exports are of the small model and without an engine, which would take its time."""
    more = [] if "--model" in arguments else ["--model", NAME]
    more += [] if "--image-size" in arguments else ["--image-size", str(SIZE)]
    more += [] if "--num-classes" in arguments else ["--num-classes", str(CLASSES)]
    if "--engine" not in arguments and chance.random() < 0.9:
        more += ["--engine", "none"]
    return more if chance.random() < 0.9 else []


def _drawn(parameter: click.Parameter, box: Box, chance: Random) -> list[str]:
    """Perhaps the option or argument, with a value."""
    if isinstance(parameter, click.Argument):
        count = chance.choice((1, 1, 1, 1, 0, 2)) if parameter.nargs != -1 else chance.choice((1, 1, 2, 0))
        return [_argument(box, chance) for _ in range(count)]
    assert isinstance(parameter, click.Option)
    spelled = [*parameter.opts, *parameter.secondary_opts]
    if any(name in _NEVER for name in spelled) or chance.random() > (0.85 if parameter.required else 0.12):
        return []
    name = chance.choice(spelled)
    if parameter.is_flag or parameter.flag_value is True:
        return [name]
    if parameter.multiple and getattr(parameter, "flag_value", None):
        return [name]
    return [name, _value(parameter, box, chance)]


def _argument(box: Box, chance: Random) -> str:
    bundles = (
        "fp16",
        "fp16",
        "fp32",
        "fp32/model.onnx",
        "fp16/engine.plan",
        "name=fp16",
        "nowhere",
        "photos",
        "weights.pth",
    )
    servers = (
        "grpc://127.0.0.1:9/small_robust",
        "http://127.0.0.1:9/small_robust",
        "http://127.0.0.1:99999/x",
        "http://",
        "grpc://a b/",
    )
    if chance.random() < 0.08:
        return chance.choice(servers)
    return chance.choice((*bundles, *bundles, *_safe_texts(box)))


def _safe_texts(box: Box) -> tuple[str, ...]:
    return tuple(text for text in hostile_texts(str(box.outside)) if "\0" not in text)


def _value(parameter: click.Option, box: Box, chance: Random) -> str:
    if isinstance(parameter.type, click.Choice):
        return chance.choice((*map(str, parameter.type.choices), *map(str, parameter.type.choices), "nothing", ""))
    fitting = _FITTING.get(parameter.name or "", ())
    if fitting and chance.random() < 0.8:
        return chance.choice(fitting)
    if isinstance(parameter.type, (click.types.IntParamType, click.types.FloatParamType)):
        return chance.choice(_NUMBERS)
    return chance.choice((*_INPUTS, *_INPUTS, *_safe_texts(box)))


_SHARES = (70, 15, 40, 10, 25, 10, 20)
KINDS = tuple(
    Kind(f"options, {program}", share, _maker(program)) for program, share in zip(_PROGRAMS, _SHARES, strict=True)
)
