"""A cell, opened: `run()` answers the batch that was set, `wait()` returns when the device has done it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.cells import Cell
from spach_deploy.models.checkpoint import load_model
from spach_deploy.options.specs import EngineTarget, Flavour, ModelSpec, Precision

Run = Callable[[], Any]
SetBatch = Callable[[np.ndarray[Any, Any]], Run]
"""Puts images (N, 3, S, S) float32 onto the device; what it returns gives logits there."""


def wait(device: str) -> None:
    """Until the device is idle."""
    if device == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def opened(cell: Cell, folder: Path, device: str, model: str, image_size: int | None) -> Iterator[SetBatch]:
    """The runner of a cell."""
    if cell.runner == "onnxruntime":
        yield _onnx_runtime(folder / cell.file, device)
    elif cell.runner == "tensorrt":
        yield _tensorrt(folder / cell.file, cell.precision)
    else:
        with torch.inference_mode():
            yield _torch(cell, device, ModelSpec(model, image_size=image_size))


def _torch(cell: Cell, device: str, spec: ModelSpec) -> SetBatch:
    dtype = torch.float16 if cell.precision == "fp16" else torch.float32
    layout = torch.channels_last if cell.runner == "channels-last" else torch.contiguous_format
    reference: Any = load_model(spec).model
    module = reference.to(device=device, dtype=dtype, memory_format=layout)
    if cell.runner == "compile":
        module = torch.compile(module, mode="max-autotune" if device == "cuda" else None, dynamic=False)

    def set_batch(images: np.ndarray[Any, Any]) -> Run:
        batch = torch.from_numpy(images).to(device=device, dtype=dtype).contiguous(memory_format=layout)
        return _graphed(module, batch) if cell.runner == "cuda-graphs" else lambda: module(batch)

    return set_batch


def _graphed(module: Any, batch: torch.Tensor) -> Run:
    """The launches of one run, recorded once and replayed."""
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            module(batch)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = module(batch)

    def run() -> torch.Tensor:
        graph.replay()
        return result  # type: ignore[no-any-return]

    return run


def _onnx_runtime(file: Path, device: str) -> SetBatch:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    providers = ["CUDAExecutionProvider"] if device == "cuda" else ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(str(file), options, providers=providers)
    if session.get_providers()[0] != providers[0]:
        raise RuntimeError(f"ONNX Runtime did not take {providers[0]}: its CUDA libraries do not load")
    name = session.get_inputs()[0].name

    def set_batch(images: np.ndarray[Any, Any]) -> Run:
        binding = session.io_binding()
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(images, device, 0))
        binding.bind_output("logits", device, 0)

        def run() -> np.ndarray[Any, Any]:
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            return _Later(binding)  # type: ignore[return-value]

        return run

    return set_batch


class _Later:
    """ONNX Runtime's answer, copied only where somebody looks at it."""

    def __init__(self, binding: Any) -> None:
        self._binding = binding

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return np.asarray(self._binding.copy_outputs_to_cpu()[0], dtype)


def _tensorrt(file: Path, precision: str) -> SetBatch:
    """Built for this GPU, fed and read through PyTorch's memory."""
    from spach_deploy.engine.build import build_engine
    from spach_deploy.engine.flavours import choose_flavour
    from spach_deploy.runtime.polygraphy_session import use_tensorrt

    flavour = choose_flavour(Flavour.AUTO)
    assert flavour is not None
    asked = Precision.INT8 if precision == "int8" else Precision.FP16
    target = flavour.resolve(EngineTarget(flavour.flavour), Precision.FP16)
    plan = build_engine(file, target, flavour, precision=asked).plan
    trt: Any = use_tensorrt(flavour.flavour)
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    return engine_batches(
        runtime.deserialize_cuda_engine(plan), torch.device("cuda"), lambda: torch.cuda.current_stream().cuda_stream
    )


def engine_batches(engine: Any, device: torch.device, stream: Callable[[], int]) -> SetBatch:
    """Batches of a deserialized engine; `stream` gives the CUDA stream to run on."""
    context = engine.create_execution_context()
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    source = next(name for name in names if engine.get_tensor_mode(name).name == "INPUT")

    def set_batch(images: np.ndarray[Any, Any]) -> Run:
        batch = torch.from_numpy(images).to(device).contiguous()
        context.set_input_shape(source, tuple(batch.shape))
        outputs = {name: _buffer(engine, context, name, device) for name in names if name != source}
        for name, tensor in {source: batch, **outputs}.items():
            context.set_tensor_address(name, tensor.data_ptr())

        def run() -> torch.Tensor:
            _ = batch  # alive as long as its address is used
            if not context.execute_async_v3(stream()):
                raise RuntimeError("TensorRT did not run the engine")
            return outputs["logits"]

        return run

    return set_batch


def _buffer(engine: Any, context: Any, name: str, device: torch.device) -> torch.Tensor:
    dtypes = {"FLOAT": torch.float32, "HALF": torch.float16, "INT64": torch.int64, "INT32": torch.int32}
    dtype = dtypes[engine.get_tensor_dtype(name).name]
    return torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device=device)
