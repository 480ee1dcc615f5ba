"""What `spach-export --list` and `--list-rewrites` print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spach_deploy.models.registry import ModelInfo, list_models
from spach_deploy.text import json_text, rendered

_WIDTH = 110
_NUMBERS = ("params", "MACs", "top-1")


def models_as_table() -> str:
    """One line a model: parameters and MACs at 224 pixels, blocks of each stage, published accuracy."""
    rows = [
        (
            info.name,
            f"{info.parameters / 1e6:.1f} M",
            f"{info.macs / 1e9:.2f} G",
            _short(info.stages),
            "" if info.published_top1 is None else f"{info.published_top1:.1f}",
            info.reference_name,
        )
        for info in list_models()
    ]
    table = _table(("model", "params", "MACs", "stages", "top-1", "published name (alias)"), rows)
    return f"{table}\n\nBlocks of each stage: c convolution, t attention, m spatial MLP. MACs at 224 pixels."


def _short(stages: str) -> str:
    """`2 conv, 10 trans` -> `2c 10t`."""
    for mixer in ("conv", "trans", "mlp"):
        stages = stages.replace(f" {mixer}", mixer[0])
    return stages.replace(", ", " ")


def models_as_json() -> str:
    """The same facts as JSON."""
    return json_text([_facts(info) for info in list_models()])


def _facts(info: ModelInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "parameters": info.parameters,
        "macs": info.macs,
        "stages": info.stages,
        "published_top1": info.published_top1,
        "reference_name": info.reference_name,
        "published_checkpoint": info.published_checkpoint,
    }


def rewrites_as_table() -> str:
    """Names that --no-rewrite takes."""
    return _table(("rewrite", "what it does"), _steps())


def _steps() -> list[tuple[str, str]]:
    from spach_deploy.onnx_graph.passes import TENSORRT_PASSES
    from spach_deploy.rewrites import REWRITES

    passes = [(step.name, step.summary) for step in TENSORRT_PASSES]
    return [*((step.name, step.summary) for step in REWRITES), *passes]


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, no_wrap=True, justify="right" if heading in _NUMBERS else "left")
    for row in rows:
        table.add_row(*row)
    return rendered([table], width=_WIDTH)
