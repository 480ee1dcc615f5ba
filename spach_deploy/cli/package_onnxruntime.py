"""spach-package onnxruntime: a folder that an ONNX Runtime application loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spach_deploy.cli.console import Command, command, show
from spach_deploy.common.text import escaped, json_text
from spach_deploy.options.click_options import FILE, click_options
from spach_deploy.options.command_line import quoted
from spach_deploy.options.table import ONNXRUNTIME

if TYPE_CHECKING:
    from spach_deploy.packaging.onnxruntime.folder import OnnxRuntimePackage


@click.command("onnxruntime", cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=FILE)
@click_options(ONNXRUNTIME)
@command
def main(
    bundle: Path, output: Path, labels: Path | None, embed: bool, device: str, overwrite: bool, as_json: bool
) -> int:
    """Write BUNDLE's graph in ONNX Runtime's form, its plan as an EPContext model, and programs in Python and C++.

    \b
    spach-package onnxruntime build/ms_hybrid_s-fp16 -o served
    python served/run.py
    spach-validate served

    The programs take the best execution provider that is there (TensorRT for RTX, TensorRT, CUDA, the CPU), run the
    golden images and exit with 1 where the answers are not PyTorch's.

    Exit codes: 0 written, 1 a file is not the one that was exported, 2 bad usage or input.
    """
    from spach_deploy.packaging.onnxruntime.folder import write_folder

    written = write_folder(bundle, output, labels=labels, embed=embed, cpu_only=device == "cpu", overwrite=overwrite)
    show(_json(written) if as_json else _text(written))
    return 0


def _text(written: OnnxRuntimePackage) -> str:
    manifest = written.bundle.manifest
    plan = f"model_ctx.onnx, for {written.provider}" if written.provider else f"none: {manifest.engine.why_none}"
    return escaped(
        [
            f"model      {manifest.model.name}, {written.facts.precision.value}, batch {written.facts.batch}",
            f"graph      model.onnx, for {' and '.join(written.graph.names)}",
            f"plan       {plan}",
            f"folder     {written.path}",
            *written.notes,
            "",
            "Compare it with PyTorch, here or wherever it will run:",
            *(f"  {line}" for line in _commands(written)),
        ]
    )


def _commands(written: OnnxRuntimePackage) -> tuple[str, ...]:
    return (f"python {quoted(written.path / 'run.py')}", f"spach-validate {quoted(written.path)}")


def _json(written: OnnxRuntimePackage) -> str:
    content: dict[str, Any] = {
        "folder": str(written.path),
        "model": written.bundle.manifest.model.name,
        "provider": written.provider or None,
        "notes": list(written.notes),
        "commands": list(_commands(written)),
    }
    return json_text(content)
