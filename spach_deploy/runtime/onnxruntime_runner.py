"""Run ONNX graphs in ONNX Runtime, on the CPU or a GPU, and write graphs to files for it.

Sessions are opened from files, because ONNX Runtime makes two more copies of all weights from bytes in memory.

`truncating_runtime` detects an ONNX Runtime whose QuantizeLinear truncates FP16 on a CPU, where ONNX rounds to nearest,
ties to even.

ONNX Runtime rounds FP16 from 1.30 on (microsoft/onnxruntime issues 18576 and 22741, fixed by 32452), and FP32 in every
version (`ROUNDS_FP16`). The installed one is tested with a graph of nine numbers.
Graphs that such a runtime computes wrongly are found by `graph.precision.formats.quantizes_fp16`: INT8 exports of
earlier versions of this package with the rest in FP16, and graphs of other tools.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from spach_deploy.common.errors import MissingPackageError, UnavailableError, UsageError, printable
from spach_deploy.common.files import naming_tmpdir, utf8_path
from spach_deploy.common.operating_system import temporary_folder
from spach_deploy.common.versions import ROUNDS_FP16
from spach_deploy.runtime import TensorSpec
from spach_deploy.runtime.batching import Arrays, BatchLimits, Feeds, check_feeds, run_in_batches

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray
    from onnx import ModelProto, TensorProto
    from typing_extensions import Self


_WEIGHTS = "weights"
_LARGE = 1024
"""Elements from which a tensor is stored as external data in temporary files."""

_ALIGNMENT = 4096
"""Alignment of external data in its file, in bytes: that of memory pages, because it is mapped."""


@contextlib.contextmanager
def saved_graph(*models: ir.Model) -> Iterator[Path]:
    """A temporary ONNX file with `models` one after the other, which protobuf reads as one merged message.

    Large weights are external data in the same temporary folder. The files are deleted on exit; a session that was
    opened from them does not need them any more.
    """
    with contextlib.ExitStack() as stack:
        with naming_tmpdir():
            path = stack.enter_context(temporary_folder("spach-")) / "graph.onnx"
            _save(models, path)
        yield path


def _save(models: tuple[ir.Model, ...], path: Path) -> None:
    with path.open("wb") as light, (path.parent / _WEIGHTS).open("wb") as weights:
        for model in models:
            for part in _parts(model, weights):
                light.write(part.SerializeToString())


def save_model(model: ir.Model, path: Path) -> None:
    """Write `model` to `path`, as `onnx_ir.save` does, but without a second copy of all weights in memory."""
    with path.open("wb") as file:
        write_graph(model, file)


def write_graph(model: ir.Model, file: IO[bytes]) -> None:
    """Write `model` as protobuf in parts, weights one by one, to keep memory small."""
    for part in _parts(model):
        file.write(part.SerializeToString())


def graph_bytes(model: ir.Model) -> bytes:
    """The bytes that `save_model` writes."""
    file = io.BytesIO()
    write_graph(model, file)
    return file.getvalue()


def message_of(model: ir.Model, inputs: Iterable[ir.Value], initializers: Iterable[ir.Value] = ()) -> ModelProto:
    """A protobuf with the nodes and outputs of `model`, and these inputs and initializers.

    Types and shapes of inner tensors are left out, because they follow from the nodes.
    """
    import onnx_ir as ir
    from onnx import ModelProto

    message = ModelProto(ir_version=model.ir_version)
    graph = message.graph
    graph.name = model.graph.name or ""
    graph.node.extend(map(ir.serde.serialize_node, model.graph))
    graph.input.extend(map(ir.serde.serialize_value, inputs))
    graph.output.extend(map(ir.serde.serialize_value, model.graph.outputs))
    graph.initializer.extend(map(tensor_proto, initializers))
    for domain, version in model.opset_imports.items():
        message.opset_import.add(domain=domain, version=version)
    message.functions.extend(ir.to_proto(function) for function in model.functions.values())
    return message


def tensor_proto(initializer: ir.Value) -> TensorProto:
    """An initializer as protobuf, with a copy of its data."""
    import onnx_ir as ir

    assert initializer.const_value is not None
    initializer.const_value.name = initializer.name
    return ir.serde.serialize_tensor(initializer.const_value)


def _parts(model: ir.Model, weights: IO[bytes] | None = None) -> Iterator[ModelProto]:
    """Protobufs that written one after the other are `model`: all but the weights, then each weight.

    Data of large weights goes to the file `weights` as external data, if one is given.
    """
    import onnx_ir as ir
    from onnx import ModelProto

    yield message_of(model, model.graph.inputs)
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        is_large = value.const_value.size >= _LARGE and value.const_value.dtype != ir.DataType.STRING
        tensor = _outside(value.const_value, weights) if is_large and weights is not None else value.const_value
        part = ModelProto()
        ir.serde.serialize_tensor_into(part.graph.initializer.add(), tensor)
        part.graph.initializer[0].name = value.name or ""
        yield part


def _outside(tensor: ir.TensorProtocol, weights: IO[bytes]) -> ir.ExternalTensor:
    """`tensor` as external data, which is written to `weights`."""
    import onnx_ir as ir

    weights.write(b"\0" * (-weights.tell() % _ALIGNMENT))
    start = weights.tell()
    length = weights.write(tensor.tobytes())
    return ir.ExternalTensor(_WEIGHTS, start, length, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name="")


Optimization = Literal["none", "basic", "extended", "all"]
_LEVELS: dict[Optimization, str] = {
    "none": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
_CRASHING = ("MatmulTransposeFusion",)
"""Optimizations that are left out: in ONNX Runtime 1.32 the fusion of transposes into MatMul and the blocked layout of
convolutions together end the process (segmentation fault) on FP16 graphs of a Conv before `nn.TransformerEncoder`.
"""


def new_session(model: str | bytes, options: Any, providers: Sequence[Any]) -> Any:
    """An ONNX Runtime session, as all of this package are made: without the optimizations that crash."""
    import onnxruntime

    return onnxruntime.InferenceSession(model, options, providers=list(providers), disabled_optimizers=list(_CRASHING))


_DTYPES = {"float": "float32", "double": "float64"}
NAME = "ONNX Runtime (CPU)"
CPU, CUDA = "cpu", "cuda"
_CUDA_PROVIDER = "CUDAExecutionProvider"

NOT_SPINNING = ("session.intra_op.allow_spinning", "0")
"""Session setting: idle threads sleep instead of spinning.

With two free cores that costs nothing. With one of them busy, two sleeping threads are as fast as one thread, and two
spinning ones are slower.
"""

UNPACKED = ("session.disable_prepacking", "1")
"""Session setting: do not copy weights into another layout for matrix products.

The copy takes time and memory when a session opens, and saves next to nothing in runs of a few images.
"""

_FATAL_ONLY = 4  # ONNX Runtime's log severity: below it, it prints the errors that it also raises


class OnnxRuntimeRunner:
    """Runs an ONNX graph, given as a path (also with external data) or as bytes.

    `threads` None lets ONNX Runtime choose. `optimization` "none" fuses and removes no nodes. `is_brief`: for runs of a
    few images; opening is faster. `max_batch`: larger batches are split, to bound memory. `on_gpu`: use an NVIDIA GPU
    if the installed ONNX Runtime can; `device`, inside the context, says where it runs: cuda or cpu. `inner`: graph
    outputs that are inner tensors of the model; `run` leaves them out, and `seen` keeps their values (1, ...) for the
    first image.

    Entering raises MissingPackageError without onnxruntime, UsageError for what is no ONNX graph, and UnavailableError
    where the CPU has no kernel for a node (bfloat16, for most).
    """

    def __init__(
        self,
        model: Path | bytes,
        *,
        threads: int | None = None,
        optimization: Optimization = "all",
        is_brief: bool = False,
        max_batch: int = 32,
        on_gpu: bool = False,
        inner: Collection[str] = (),
    ) -> None:
        self._model = model
        self._threads = threads
        self._optimization = optimization
        self._is_brief = is_brief
        self._max_batch = max_batch
        self._on_gpu = on_gpu
        self.device = CPU
        self._inner = tuple(inner)
        self.seen: dict[str, NDArray[Any]] = {}
        self._session: Any = None
        self.input_specs: Mapping[str, TensorSpec] = {}
        self.output_specs: Mapping[str, TensorSpec] = {}

    @property
    def name(self) -> str:
        """Name in tables and messages."""
        return NAME if self.device == CPU else "ONNX Runtime (CUDA)"

    def __enter__(self) -> Self:
        self._session = self._open(_import_onnxruntime())
        self.device = CUDA if self._on_gpu and self._session.get_providers()[0] == _CUDA_PROVIDER else CPU
        self.input_specs = _specs(self._session.get_inputs())
        self.output_specs = _specs(info for info in self._session.get_outputs() if info.name not in self._inner)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None

    def run(self, feeds: Feeds) -> Arrays:
        """Outputs of `feeds`; larger batches are split."""
        check_feeds(self.name, self.input_specs, feeds)
        leading = next(iter(self.input_specs.values())).shape[0]
        return run_in_batches(self._run_once, feeds, BatchLimits.of_shape(leading, self._max_batch))

    def _run_once(self, feeds: Arrays) -> Arrays:
        inner = () if self.seen else self._inner
        results = dict(
            zip((*self.output_specs, *inner), self._session.run([*self.output_specs, *inner], feeds), strict=True)
        )
        # Copied, because a result of ONNX Runtime keeps the whole memory pool of its session alive.
        self.seen.update({name: np.array(results[name][:1]) for name in inner})
        return {name: np.array(results[name]) for name in self.output_specs}

    def _open(self, ort: Any) -> Any:
        options = ort.SessionOptions()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _LEVELS[self._optimization])
        options.log_severity_level = _FATAL_ONLY
        options.add_session_config_entry(*NOT_SPINNING)
        if self._is_brief:
            options.add_session_config_entry(*UNPACKED)
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        try:
            with (
                contextlib.nullcontext(self._model)
                if isinstance(self._model, bytes)
                else utf8_path(self._model) as model
            ):
                return new_session(model, options, self._providers(ort))
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            raise self._explain(error) from error

    def _providers(self, ort: Any) -> list[str]:
        wanted = (*([_CUDA_PROVIDER] if self._on_gpu else []), "CPUExecutionProvider")
        return [name for name in wanted if name in ort.get_available_providers()]

    def _explain(self, error: Exception) -> Exception:
        what = "The given graph" if isinstance(self._model, bytes) else f"{self._model}"
        reason = printable((str(error).strip() or type(error).__name__).splitlines()[0])
        if type(error).__name__ == "NotImplemented":
            reason = reason.rpartition(" : ")[2]  # behind "[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED"
            return UnavailableError(f"ONNX Runtime has no CPU kernel for a node of {what}: {reason.rstrip('.')}.")
        return UsageError(f"{what} does not load in ONNX Runtime: {reason}", "Give an ONNX file such as model.onnx.")


def _import_onnxruntime() -> Any:
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise MissingPackageError("onnxruntime", "Running an ONNX graph", "pip install 'spach-deploy[cpu]'") from error


def _specs(infos: Iterable[Any]) -> dict[str, TensorSpec]:
    return {info.name: TensorSpec(_dtype(info.type), _shape(info.shape)) for info in infos}


def _dtype(text: str) -> str:
    inner = text.removeprefix("tensor(").removesuffix(")")
    return _DTYPES.get(inner, inner)


def _shape(extents: Any) -> tuple[int | None, ...]:
    return tuple(extent if isinstance(extent, int) else None for extent in extents)


NUMBERS = (0.5, -0.5, 1.5, -1.5, 2.5, 1.75, -1.75, 2.25, -0.75)
ROUNDED = (0, 0, 2, -2, 2, 2, -2, 2, -1)
"""`NUMBERS` rounded to INT8 at a scale of 1."""

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
        f" (microsoft/onnxruntime#22741, mended in {ROUNDS_FP16})"
    )


REMEDY = f"Export it again, which makes INT8 of FP32, or take ONNX Runtime {ROUNDS_FP16} or newer."


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
    session = new_session(model.SerializeToString(), options, ["CPUExecutionProvider"])
    found: NDArray[np.int8] = session.run(None, {"x": numbers})[0]
    return found
