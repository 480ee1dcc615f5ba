"""LayerNorm's free channel carries qkv's bias, where that costs no accuracy; where it would, the bias stays."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from spach_deploy.blocks import RewriteResult, rewrite
from spach_deploy.blocks.attention import StaticAttention
from spach_deploy.blocks.base import Outcome
from spach_deploy.bundle.outputs import INPUT, LOGITS
from spach_deploy.graph.editing import as_proto
from spach_deploy.graph.export import export_canonical
from spach_deploy.graph.passes import TENSORRT_PASSES, apply_passes
from spach_deploy.models.demo import load_demo_weights
from spach_deploy.models.spach import MixingBlock, Spach
from spach_deploy.options.specs import Precision
from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner
from tests.protos import rounded_graph, type_graph
from tests.static_models import IMAGE_SIZE, architecture, images, logits, relative_l2, small_model

NAME = "absorb_qkv_bias"
BLOCK = "blocks.1"


def set_qkv_bias_to_zero(block: MixingBlock) -> None:
    dict(block.named_parameters())["spatial_func.qkv.bias"].zero_()


def _block(model: nn.Module) -> MixingBlock:
    block = model.get_submodule(BLOCK)
    assert isinstance(block, MixingBlock)
    return block


def outcome(result: RewriteResult) -> Outcome:
    return result.outcomes[NAME]


def changed(change: Callable[[MixingBlock], object]) -> RewriteResult:
    """The rewritten `trans` model, one block of which was changed before."""
    model = copy.deepcopy(small_model("trans"))
    with torch.no_grad():
        change(_block(model))
    result = rewrite(model)
    assert relative_l2(logits(result.model, images(2)), logits(model, images(2))) < 2e-6
    return result


def reason(change: Callable[[MixingBlock], object]) -> str:
    """Why the changed block kept its bias; the others did not."""
    found = outcome(changed(change))
    assert BLOCK not in {entry.module for entry in found.changes}
    assert len(found.changes) == 2
    (skipped,) = found.skipped
    return skipped.removeprefix(f"{BLOCK}: ")


def test_no_attention_keeps_a_bias_in_its_qkv() -> None:
    result = rewrite(small_model("trans"))
    attentions = [module for module in result.model.modules() if isinstance(module, StaticAttention)]
    assert len(attentions) == len(outcome(result).changes) == 3
    assert not any(attention.qkv.bias.any() for attention in attentions)
    assert relative_l2(logits(result.model, images(3)), logits(small_model("trans"), images(3))) < 2e-6


def test_the_bias_of_query_key_and_value_goes_without_the_rewrite_before_it_too() -> None:
    result = rewrite(small_model("trans"), ["fold_qkv_bias"])
    assert len(outcome(result).changes) == 3
    assert relative_l2(logits(result.model, images(3)), logits(small_model("trans"), images(3))) < 2e-6


@pytest.mark.parametrize(("disabled", "quantized"), [(("tokens_first",), None), ((), ()), ((), ("*.cpe_net.net.1",))])
def test_it_is_for_floating_point_with_tokens_first(
    disabled: tuple[str, ...], quantized: tuple[str, ...] | None
) -> None:
    result = rewrite(small_model("trans"), disabled, quantized)
    assert outcome(result).changes == ()
    assert "tokens first" in outcome(result).skipped[0]
    ours, theirs = (dict(model.named_parameters()) for model in (result.model, small_model("trans")))
    assert ours[f"{BLOCK}.norm1.bias"].data_ptr() == theirs[f"{BLOCK}.norm1.bias"].data_ptr()


def test_a_norm_that_switches_a_channel_off_has_no_free_one() -> None:
    def change(block: MixingBlock) -> None:
        block.norm1.weight[3] = 0

    assert reason(change) == "norm1 has a weight of zero"


def test_a_channel_that_is_nearly_switched_off_does_not_carry_it() -> None:
    def change(block: MixingBlock) -> None:
        block.norm1.weight[3], block.norm1.bias[3] = 1e-6, 0

    assert reason(change) == "a channel that norm1 nearly switches off would have to carry it"


def test_a_bias_far_larger_than_its_weight_would_drown_it_in_rounding() -> None:
    def change(block: MixingBlock) -> None:
        block.norm1.bias[3], block.norm1.bias[4] = 1e3, -1e3

    assert reason(change) == "norm1's rounding would cost more than the bias's own"


def test_without_a_bias_there_is_nothing_to_do() -> None:
    assert reason(set_qkv_bias_to_zero) == "qkv has no bias"


@pytest.mark.parametrize("sign", [1, -1])
def test_half_precision_loses_no_more_with_it(sign: int) -> None:
    """A wide model, whose norm's bias leans to either side, as numbers that were rounded to half everywhere show it."""
    model = Spach(architecture(128, 8, 2, "3 trans", heads=4)).eval()
    load_demo_weights(model)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith(".norm1.bias"):
                parameter.add_(0.1 * sign)
    expected = logits(model, images(8))
    errors = []
    for disabled in ((NAME,), ()):
        graph = export_canonical(rewrite(model, disabled).model, IMAGE_SIZE)
        apply_passes(graph, TENSORRT_PASSES)
        half = rounded_graph(type_graph(as_proto(graph), Precision.FP16).model)
        with OnnxRuntimeRunner(half.SerializeToString(), threads=1) as runner:
            errors.append(relative_l2(runner.run({INPUT: images(8)})[LOGITS], expected))
    without, with_it = errors
    assert with_it < 1.15 * without
