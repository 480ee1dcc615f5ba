"""spach-package polygraphy: a bundle's golden data for `polygraphy run`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from spach_deploy.cli.console import Command, command, show
from spach_deploy.common.text import escaped, json_text
from spach_deploy.options.click_options import FILE, click_options
from spach_deploy.options.table import POLYGRAPHY

if TYPE_CHECKING:
    from spach_deploy.packaging.polygraphy.folder import PolygraphyPackage


@click.command("polygraphy", cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=FILE)
@click_options(POLYGRAPHY)
@command
def main(bundle: Path, output: Path, overwrite: bool, as_json: bool) -> int:
    """Write BUNDLE's golden data as Polygraphy's inputs and outputs, with a data loader and a comparison.

    \b
    spach-package polygraphy build/ms_hybrid_s-fp16 -o golden
    cd golden && polygraphy run model.onnx --onnxrt \\
        --load-inputs inputs.json --load-outputs outputs.json

    Exit codes: 0 written, 1 a file is not the one that was exported, 2 bad usage or input, 3 Polygraphy is not
    installed.
    """
    from spach_deploy.packaging.polygraphy.folder import write_folder

    written = write_folder(bundle, output, overwrite=overwrite)
    show(_json(written) if as_json else _text(written))
    return 0


def _text(written: PolygraphyPackage) -> str:
    sizes = ", ".join(map(str, written.batches))
    lines = [f"model      {written.model}", f"batches    {sizes}", f"folder     {written.path}", "", "Run in it:"]
    return escaped([*lines, *(f"  {line}" for line in written.commands)])


def _json(written: PolygraphyPackage) -> str:
    content = {
        "folder": str(written.path),
        "model": written.model,
        "batches": list(written.batches),
        "commands": list(written.commands),
    }
    return json_text(content)
