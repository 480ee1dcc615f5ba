"""Detect ONNX Runtimes whose QuantizeLinear truncates FP16 on a CPU, where ONNX rounds to nearest, ties to even.

ONNX Runtime rounds FP16 from 1.30 on (microsoft/onnxruntime issues 18576 and 22741, fixed by 32452), and FP32 in every
version. The installed one is tested with a graph of nine numbers; graph/runtimes.json lists which others truncate.
Graphs that such a runtime computes wrongly are found by `graph.precision.elements.quantizes_fp16`: INT8 exports of
earlier versions of this package with the rest in FP16, and graphs of other tools.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NUMBERS = (0.5, -0.5, 1.5, -1.5, 2.5, 1.75, -1.75, 2.25, -0.75)
ROUNDED = (0, 0, 2, -2, 2, 2, -2, 2, -1)
"""`NUMBERS` rounded to INT8 at a scale of 1."""

MENDED = "1.30"
"""First version of ONNX Runtime that rounds FP16."""

Quantize = Callable[["NDArray[np.float16]"], "NDArray[np.int8]"]


@functools.cache
def truncating_runtime() -> str | None:
    """Version of the installed ONNX Runtime, if it truncates; None if it rounds, is absent or cannot quantize FP16."""
    try:
        import onnxruntime

        return str(onnxruntime.__version__) if truncates(_quantized_here) else None
    except Exception:  # not installed, or it does not quantize FP16 at all, so nothing goes wrong unnoticed
        return None


def truncates(quantize: Quantize) -> bool:
    """Whether `quantize`, from FP16 at a scale of 1, gives other integers than ONNX defines."""
    import numpy as np

    return not np.array_equal(quantize(np.array(NUMBERS, np.float16)), ROUNDED)


def fault_of(version: str) -> str:
    """The fault of an ONNX Runtime that truncates, as a clause for messages."""
    return (
        f"ONNX Runtime {version}'s QuantizeLinear truncates FP16 on a CPU instead of rounding it"
        f" (microsoft/onnxruntime#22741, mended in {MENDED})"
    )


REMEDY = f"Export it again, which makes INT8 of FP32, or take ONNX Runtime {MENDED} or newer."


def _quantized_here(numbers: NDArray[np.float16]) -> NDArray[np.int8]:
    import onnx_ir as ir
    import onnxruntime

    x, q = ir.val("x", ir.DataType.FLOAT16, numbers.shape), ir.val("q", ir.DataType.INT8, numbers.shape)
    constants = {"scale": ir.tensor(1.0, ir.DataType.FLOAT16), "zero": ir.tensor(0, ir.DataType.INT8)}
    scale, zero = (ir.val(name, const_value=tensor) for name, tensor in constants.items())
    node = ir.node("QuantizeLinear", [x, scale, zero], outputs=[q])
    graph = ir.Graph([x], [q], nodes=[node], initializers=[scale, zero], opset_imports={"": 19}, name="nine numbers")
    model = ir.to_proto(ir.Model(graph, ir_version=9))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # do not print errors, they are raised
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: NDArray[np.int8] = session.run(None, {"x": numbers})[0]
    return found
