"""What is measured: a runner with a graph in a precision, the most telling first, because time may run out."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Cell:
    """`runner`: eager, channels-last, compile, cuda-graphs, onnxruntime or tensorrt.

    `graph`: the model itself, or plain (torch.onnx.export), ours, or convolutions (ours with depthwise ones as such).
    """

    runner: str
    graph: str
    precision: str

    @property
    def name(self) -> str:
        """How it is called in tables and on the command line."""
        return "/".join(part for part in (self.runner, self.graph, self.precision) if part != "model")

    @property
    def file(self) -> str:
        """The graph's file among what was prepared."""
        return f"{self.graph}-{self.precision}.onnx"


CELLS = (
    Cell("eager", "model", "fp16"),
    Cell("onnxruntime", "ours", "fp16"),
    Cell("onnxruntime", "plain", "fp16"),
    Cell("compile", "model", "fp16"),
    Cell("tensorrt", "ours", "fp16"),
    Cell("tensorrt", "plain", "fp16"),
    Cell("tensorrt", "convolutions", "fp16"),
    Cell("onnxruntime", "convolutions", "fp16"),
    Cell("tensorrt", "ours", "int8"),
    Cell("onnxruntime", "ours", "int8"),
    Cell("cuda-graphs", "model", "fp16"),
    Cell("channels-last", "model", "fp16"),
    Cell("eager", "model", "fp32"),
    Cell("onnxruntime", "ours", "fp32"),
    Cell("onnxruntime", "plain", "fp32"),
)


def cell_named(name: str) -> Cell:
    """The cell of that name."""
    return next(cell for cell in CELLS if cell.name == name)


def why_not(cell: Cell, device: str, capability: tuple[int, int] | None, installed: frozenset[str]) -> str:
    """Why a cell cannot be measured; empty where it can. `installed`: of tensorrt, tensorrt-rtx, onnxruntime-cuda."""
    if device == "cpu":
        no_gpu = cell.runner in ("cuda-graphs", "tensorrt")
        if no_gpu or (cell.precision == "fp16" and cell.runner in ("eager", "channels-last", "compile")):
            return "needs a GPU"
        return ""
    if cell.runner == "onnxruntime" and "onnxruntime-cuda" not in installed:
        return "no CUDA provider: pip install onnxruntime-gpu"
    if cell.runner == "tensorrt":
        return _why_no_tensorrt(capability, installed)
    return ""


def _why_no_tensorrt(capability: tuple[int, int] | None, installed: frozenset[str]) -> str:
    if "tensorrt" in installed:
        return ""
    if "tensorrt-rtx" not in installed:
        return "neither tensorrt nor tensorrt-rtx is installed"
    if capability in ((9, 0), (10, 0), (10, 3)):
        return "TensorRT for RTX does not support data-centre Hopper and Blackwell; ordinary TensorRT is not installed"
    return ""
