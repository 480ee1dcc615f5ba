"""Exact rewrites of the reference model into the static model: PyTorch -> PyTorch, one per file, in this order.

Each compares every module that it changes with the original, in FP64 (in FP32 where only the layout changes). The
pipeline compares the whole static model with the reference once more, in FP32 on real images. `--no-rewrite NAME`
leaves one out, so that a user can find a faulty one.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Collection

from spach_deploy.blocks.attention import fold_attention_scale, fold_qkv_bias
from spach_deploy.blocks.backbone import StaticSpach, grid_stream, prove_static, to_static
from spach_deploy.blocks.base import GraphForm, Outcome, Rewrite, modules_of, own
from spach_deploy.blocks.depthwise import StaticPositionEncoding, fold_residual
from spach_deploy.blocks.mixing_block import absorb_qkv_bias, fold_layer_scale
from spach_deploy.blocks.stem import fold_batchnorm
from spach_deploy.common.machine import torch_threads
from spach_deploy.models.spach import Spach

REWRITES: tuple[Rewrite, ...] = (
    Rewrite("fold_batchnorm", "BatchNorm into the stem's convolutions", fold_batchnorm),
    Rewrite("fold_attention_scale", "attention scale into the query rows of qkv", fold_attention_scale),
    Rewrite("fold_layer_scale", "LayerScale into the projection after attention", fold_layer_scale),
    Rewrite("fold_qkv_bias", "key and value biases out of qkv", fold_qkv_bias),
    Rewrite("absorb_qkv_bias", "what is left of qkv's bias into its weight, by way of norm1", absorb_qkv_bias),
    Rewrite("fold_residual", "x + depthwise(x) into the centre tap", fold_residual),
    Rewrite("grid_stream", "token stream as (B, H, W, C), where it saves kernels", grid_stream),
)


@dataclasses.dataclass(frozen=True)
class RewriteResult:
    """The static model, and by rewrite what it changed ("static_reshapes" first)."""

    model: StaticSpach
    outcomes: dict[str, Outcome]


def rewrite(model: Spach, disabled: Collection[str] = (), quantized: Collection[str] | None = None) -> RewriteResult:
    """Static form of `model` with every rewrite that is not `disabled`; `model` itself is not changed.

    `disabled` may also name graph passes: some rewrites prepare for a pass and do something else without it.

    `quantized`: None if nothing will be quantized; else patterns of modules that will be quantized although the default
    rules (`quantization/sites.py`) leave them in float, such as depthwise convolutions. Rewrites that would cost
    quantization accuracy skip these modules, or the whole model. Raises RewriteError when a rewrite changes what a
    module computes.
    """
    form = GraphForm("shift_depthwise" not in disabled, "tokens_first" not in disabled, quantized is not None)
    static = own(to_static(model))
    _mark_quantized(static, quantized or ())
    off = Outcome(skipped=("turned off with --no-rewrite",))
    with torch_threads(1):  # tensors that are compared are small
        outcomes = {"static_reshapes": prove_static(model, static)}
        for step in REWRITES:
            outcomes[step.name] = off if step.name in disabled else step.apply(static, form)
    return RewriteResult(static, outcomes)


def _mark_quantized(static: StaticSpach, patterns: Collection[str]) -> None:
    for path, encoding in modules_of(static, StaticPositionEncoding):
        assert isinstance(encoding, StaticPositionEncoding)
        encoding.is_quantized = any(fnmatch.fnmatchcase(f"{path}.net.1", pattern) for pattern in patterns)
