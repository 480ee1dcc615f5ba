"""Passes, ONNX -> ONNX, that spell the FP32 graph as one runtime fuses it best (TensorRT, CPU, CPU in eight bits).

Each is one file with one function, which changes the graph in place and returns the names of the nodes or modules that
it changed. `Pass` wraps it as an `onnx_ir` pass. The tuples below give their order. No pass changes the function that
the graph computes: it is compared with the reference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping

import onnx_ir as ir

from spach_deploy.bundle.schema import Form
from spach_deploy.common.errors import CertificateError
from spach_deploy.graph.editing import make_names_unique
from spach_deploy.graph.passes.axis_products import axis_products, separate_axes
from spach_deploy.graph.passes.channels_last import channels_last
from spach_deploy.graph.passes.first_norm import join_first_norm, spell_first_norm
from spach_deploy.graph.passes.group_norm import shorten_group_norm, split_group_norm, split_group_norm_for_cpu
from spach_deploy.graph.passes.idle_moves import remove_idle_moves
from spach_deploy.graph.passes.linear_as_matmul import linear_as_matmul
from spach_deploy.graph.passes.shift_depthwise import join_depthwise, shift_depthwise
from spach_deploy.graph.passes.tokens_first import images_first, tokens_first


@dataclasses.dataclass
class PassResult(ir.passes.PassResult):
    """The model, whether it was modified, and in `changed` the names of changed nodes or modules."""

    changed: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Pass(ir.passes.InPlacePass):
    """A pass with its name (for `--no-rewrite`), one line for `--list-rewrites`, and the function that it applies."""

    name: str
    summary: str
    apply: Callable[[ir.Model], tuple[str, ...]]

    def call(self, model: ir.Model) -> PassResult:
        """Change `model` in place. Any exception becomes a CertificateError that names the pass."""
        try:
            changed = self.apply(model)
        except Exception as error:
            what = f"The pass {self.name} does not know a graph like this one: {type(error).__name__}: {error}"
            raise CertificateError(f"{what}.", f"Leave it out: --no-rewrite {self.name}.") from error
        if changed:
            make_names_unique(model.graph)
        return PassResult(model, bool(changed), changed)


_CHANNELS_LAST = Pass("channels_last", "additions of images channels last, where their blocks work so", channels_last)

TENSORRT_PASSES: tuple[Pass, ...] = (
    _CHANNELS_LAST,
    Pass("spell_first_norm", "the LayerNorm behind the stem, spelt out", spell_first_norm),
    Pass("split_group_norm", "GroupNorm statistics in two levels", split_group_norm),
    Pass("shift_depthwise", "depthwise convolutions as shifted products", shift_depthwise),
    Pass("axis_products", "linear layers along both axes of a grid without a concatenation", axis_products),
    Pass("tokens_first", "attention with tokens before images, which needs no moves", tokens_first),
)

CPU_PASSES: tuple[Pass, ...] = (
    _CHANNELS_LAST,
    Pass("split_group_norm", "GroupNorm statistics in two levels", split_group_norm_for_cpu),
)
"""For graphs that run in ONNX Runtime alone: its GroupNorm loses digits on large images."""

_LINEAR_AS_MATMUL = Pass(
    "linear_as_matmul", "linear layers as MatMul and Add, for eight bits on a CPU", linear_as_matmul
)

CPU_INT8_PASSES: tuple[Pass, ...] = (*CPU_PASSES, _LINEAR_AS_MATMUL)
"""For graphs that run quantized to eight bits in ONNX Runtime on a CPU."""

_FROM_TENSORRT: tuple[Pass, ...] = (
    Pass("tokens_first", "attention with images before tokens", images_first),
    Pass("axis_products", "linear layers along each axis, concatenated", separate_axes),
    Pass("shift_depthwise", "shifted products as depthwise convolutions", join_depthwise),
    Pass("split_group_norm", "GroupNorm statistics in short sums", shorten_group_norm),
    Pass("spell_first_norm", "the LayerNorm behind the stem as one node", join_first_norm),
    Pass("idle_moves", "transposes and reshapes that cancel each other", remove_idle_moves),
)

PASSES: Mapping[Form, tuple[Pass, ...]] = {
    Form.TENSORRT: TENSORRT_PASSES,
    Form.CPU: CPU_PASSES,
    Form.CPU_INT8: CPU_INT8_PASSES,
}

FROM_TENSORRT_PASSES: Mapping[Form, tuple[Pass, ...]] = {
    Form.CPU: _FROM_TENSORRT,
    Form.CPU_INT8: (*_FROM_TENSORRT, _LINEAR_AS_MATMUL),
}
"""To the other forms, from that for TensorRT in FP32. Each is called like the pass that it takes back."""


def apply_passes(
    model: ir.Model, passes: tuple[Pass, ...], disabled: Collection[str] = ()
) -> dict[str, tuple[str, ...]]:
    """Run the passes whose names are not in `disabled` on `model`, in place. By pass: the names of what it changed."""
    return {step.name: step.call(model).changed for step in passes if step.name not in disabled}
