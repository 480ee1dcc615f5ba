"""Exact rewrites of the reference model into the static model: PyTorch -> PyTorch, one per file, in this order.

Each compares every module that it changes with the original, in FP64 (in FP32 where only the layout changes). The
pipeline compares the whole static model with the reference once more, in FP32 on real images. `--no-rewrite NAME`
leaves one out, so that a user can find a faulty one.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from spach_deploy.blocks import stem, token_mlp
from spach_deploy.blocks.attention import fold_attention_scale, fold_qkv_bias, pad_heads
from spach_deploy.blocks.backbone import grid_stream, prove_static, to_static
from spach_deploy.blocks.base import GraphForm, Outcome, Rewrite, joined, modules_of, own
from spach_deploy.blocks.depthwise import StaticPositionEncoding
from spach_deploy.blocks.mixing_block import absorb_qkv_bias, fold_layer_scale, fold_residual
from spach_deploy.blocks.replace import replace_known
from spach_deploy.common.machine import torch_threads
from spach_deploy.models.own_module import OwnForward
from spach_deploy.models.spach import Spach
from spach_deploy.options.architecture import Architecture

STATIC = "static_reshapes"


def fold_batchnorm(model: nn.Module, form: GraphForm) -> Outcome:
    """Fold BatchNorm into the layers beside it, in place, as each kind of block that has one says."""
    return joined(kind.fold_batchnorm(model, form) for kind in (token_mlp, stem))


REWRITES: tuple[Rewrite, ...] = (
    Rewrite("fold_batchnorm", "BatchNorm into the stem's convolutions", fold_batchnorm),
    Rewrite("fold_attention_scale", "attention scale into the query rows of qkv", fold_attention_scale),
    Rewrite("fold_layer_scale", "LayerScale into the projection after attention", fold_layer_scale),
    Rewrite("fold_qkv_bias", "key and value biases out of qkv", fold_qkv_bias),
    Rewrite("absorb_qkv_bias", "what is left of qkv's bias into its weight, by way of norm1", absorb_qkv_bias),
    Rewrite("pad_heads", "small heads padded with zeros to a size that fuses", pad_heads),
    Rewrite("fold_residual", "x + depthwise(x) into the centre tap", fold_residual),
    Rewrite("grid_stream", "token stream as (B, H, W, C), where it saves kernels", grid_stream),
)


@dataclasses.dataclass(frozen=True)
class RewriteResult:
    """The static model, and by rewrite what it changed (`STATIC` first: the modules that have a static form)."""

    model: nn.Module
    outcomes: dict[str, Outcome]

    @property
    def known(self) -> tuple[str, ...]:
        """Paths of the modules that have a static form."""
        return tuple(change.module for change in self.outcomes[STATIC].changes)


def rewrite(
    model: nn.Module,
    disabled: Collection[str] = (),
    quantized: Collection[str] | None = None,
    inputs: Sequence[Tensor] = (),
    in_float: Collection[str] = (),
) -> RewriteResult:
    """Static form of `model` with every rewrite that is not `disabled`; `model` itself is not changed.

    Of a model that is not one of `spach_deploy.models`, the known blocks get their static forms (`blocks.replace`), for
    which it runs on the example `inputs`.

    `disabled` may also name graph passes: some rewrites prepare for a pass and do something else without it.

    `quantized`: None if nothing will be quantized; else patterns of modules that will be quantized although the default
    rules (`quantization/sites.py`) leave them in float, such as depthwise convolutions. Rewrites that would cost
    quantization accuracy skip these modules, or the whole model, but for modules `in_float`, which are known to stay in
    floating point. Raises RewriteError when a rewrite changes what a module computes.
    """
    form = _form(disabled, is_quantized=quantized is not None, in_float=in_float)
    off = Outcome(skipped=("turned off: by --no-rewrite, or because it costs in this graph's runtime",))
    with torch_threads(1):  # tensors that are compared are small
        static, replaced = _static(model, inputs)
        _mark_quantized(static, quantized or ())
        outcomes = {STATIC: replaced}
        for step in REWRITES:
            outcomes[step.name] = off if step.name in disabled else step.apply(static, form)
    return RewriteResult(static, outcomes)


def rewrite_in_float(made: RewriteResult, disabled: Collection[str], in_float: Collection[str]) -> RewriteResult:
    """`made`, of a model that is quantized, with what `rewrite` does for modules that stay in floating point. The
    modules of `made` are not changed.
    """
    model, name = own(made.model), absorb_qkv_bias.__name__
    if name in disabled:
        return made
    with torch_threads(1):
        outcome = absorb_qkv_bias(model, _form(disabled, is_quantized=True, in_float=in_float))
    return RewriteResult(model, {**made.outcomes, name: outcome})


def _form(disabled: Collection[str], *, is_quantized: bool, in_float: Collection[str]) -> GraphForm:
    return GraphForm(
        "shift_depthwise" not in disabled, "tokens_first" not in disabled, is_quantized, frozenset(in_float)
    )


def _static(model: nn.Module, inputs: Sequence[Tensor]) -> tuple[nn.Module, Outcome]:
    if isinstance(model, Spach):
        static = own(to_static(model))
        return static, prove_static(model, static)
    return replace_known(model, inputs or _example(model))


def _example(model: nn.Module) -> tuple[Tensor, ...]:
    """An image for a model of `spach_deploy.models`; for a user's own module inputs like its example."""
    if isinstance(model, OwnForward):
        return model.example()
    architecture = model.architecture
    assert isinstance(architecture, Architecture)
    return (torch.zeros(1, architecture.channels, *architecture.image_size),)


def _mark_quantized(static: nn.Module, patterns: Collection[str]) -> None:
    for path, encoding in modules_of(static, StaticPositionEncoding):
        assert isinstance(encoding, StaticPositionEncoding)
        encoding.is_quantized = any(fnmatch.fnmatchcase(f"{path}.net.1", pattern) for pattern in patterns)
