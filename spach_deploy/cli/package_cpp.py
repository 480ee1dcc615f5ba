"""spach-package cpp: a C++ library with the bundle's plan in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spach_deploy.cli.console import Command, command, show
from spach_deploy.common.text import escaped, json_text
from spach_deploy.options.click_options import FILE, click_options
from spach_deploy.options.command_line import quoted
from spach_deploy.options.table import CPP

if TYPE_CHECKING:
    from spach_deploy.packaging.cpp.folder import CppPackage


@click.command("cpp", cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=FILE)
@click_options(CPP)
@command
def main(bundle: Path, output: Path, labels: Path | None, overwrite: bool, as_json: bool) -> int:
    """Write a C++17 library that loads BUNDLE's engine, with a self-test, an example and a benchmark.

    \b
    spach-package cpp build/ms_hybrid_s-fp16 -o engine-cpp --labels imagenet.txt
    cmake -S engine-cpp -B engine-cpp/build -DTENSORRT_ROOT=/opt/tensorrt
    cmake --build engine-cpp/build && ctest --test-dir engine-cpp/build

    Exit codes: 0 written, 1 a file is not the one that was exported, 2 bad usage or input.
    """
    from spach_deploy.packaging.cpp.folder import write_folder

    written = write_folder(bundle, output, labels=labels, overwrite=overwrite)
    show(_json(written) if as_json else _text(written))
    return 0


def _text(written: CppPackage) -> str:
    model = written.model
    gpus = ", ".join(model.gpus) or "the GPU that it was built on"
    return escaped(
        [
            f"model      {model.name}, {model.facts.precision.value}, batch {model.facts.batch}",
            f"engine     {model.facts.flavour.value} {model.version} for {gpus}",
            f"library    {written.path}",
            "",
            "Build it and run the self-test:",
            *(f"  {line}" for line in _commands(written)),
        ]
    )


def _commands(written: CppPackage) -> tuple[str, ...]:
    path = written.path
    build = quoted(path / "build")
    return (
        f"cmake -S {quoted(path)} -B {build} -DTENSORRT_ROOT=DIR",
        f"cmake --build {build}",
        f"{quoted(path / 'build' / 'spach_self_test')} {quoted(path / 'model')}",
    )


def _json(written: CppPackage) -> str:
    model = written.model
    content: dict[str, Any] = {
        "folder": str(written.path),
        "model": model.name,
        "flavour": model.facts.flavour.value,
        "version": model.version,
        "gpus": list(model.gpus),
        "labels": written.has_labels,
        "commands": list(_commands(written)),
    }
    return json_text(content)
