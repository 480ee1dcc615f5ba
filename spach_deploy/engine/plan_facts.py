r"""Read the kernels of an engine plan, the ONNX nodes in each and the bytes that they move, from its schedule.

The format is not documented and any version may change it. So nothing depends on these facts: they are shown to people,
and anything unexpected makes the result None, "not known".

A plan of TensorRT for RTX 1.7 contains its compiler's schedule as text. After the bytes `NLYM`, four more and the
text's length come the sections `header { }`, `descriptors { }` (tensors), `main { }` (one statement for each kernel, in
order) and `shape_main { }` (how extents follow from the batch). A statement looks like

    runtime_fusion={ name=__myl_FcAdd input_args={ "a" "b" } output_args={ "y" } layers="[ONNX Layer: head]" ... }

A kernel is a statement of `main` that runs on the GPU: `function` (pointwise, reductions, moves, and fused attention,
whose name contains `mha`), `runtime_fusion` (a matrix product with what follows it), `corrltn` (a convolution) or
`fully_connected` (a bare matrix product). No kernels are `shape_call` and statements that make only tensors in host
memory (a region called `hmem`), which compute extents and addresses, and `signal` and `wait`, which order streams.

Bytes moved are the bytes of all tensors that a kernel reads or writes, weights included, summed over kernels. Caches
may save some of them; how many is not known.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping

_MAGIC = b"NLYM"
_LENGTH_OFFSET, _TEXT_OFFSET = 8, 16
_FUSION_CONSTANTS = "runtime-fusion-consts"  # in schedules of the inside of one kernel, which are skipped
_NO_KERNEL = frozenset({"shape_call", "signal", "wait"})
_HOST_MEMORY = "hmem"
_MOVES = frozenset({"Move", "Tran", "Resh", "Slic", "Conc", "Repl", "Cast"})
_BYTES = {"bool": 1, "int8": 1, "uint8": 1, "fp8_e4m3": 1, "half": 2, "bf16": 2, "float": 4, "int32": 4, "int64": 8}
_PRODUCTS = frozenset({"gemm", "convolution"})
_FLOATS = frozenset({"int8", "fp8_e4m3", "half", "bf16", "float"})
_SHAPE_OPERATORS = frozenset({"copy", "mul", "add", "sub", "div", "min", "max"})
_DEEPEST = 64

_STRING_OR_BRACE = re.compile(r'"[^"]*"|[{}]')
_OPENED = re.compile(r"(\w+)\s*=?\s*$")
_LIST = r'(?<!\w){key}=\{{((?:"[^"]*"|[^"}}])*)\}}'
_STRING = re.compile(r'"([^"]*)"')
_LAYER = re.compile(r"\[ONNX Layer: (.*?)\](?=\x1f|\[|$)")
_LITERAL = re.compile(r"__s\^(-?\d+)i64")
_PIECE = re.compile(r"[A-Z][a-z0-9]*")


class _UnexpectedTextError(Exception):
    """The schedule has a form that this module does not know."""


@dataclasses.dataclass(frozen=True)
class KernelFact:
    """One kernel. `kind`: gemm, convolution, attention, move or pointwise. `layers`: the ONNX nodes that it computes.
    `operands`: names of the tensors that it reads and writes.
    """

    kind: str
    name: str
    layers: tuple[str, ...]
    operands: tuple[str, ...] = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class KernelWork:
    """What a kernel does in one inference: bytes that it moves, multiply-adds of its products, and their data type
    (TensorRT's name; empty without products).
    """

    bytes: int
    macs: int = 0
    dtype: str = ""


@dataclasses.dataclass(frozen=True)
class _PlanTensor:
    dtype: str
    extents: tuple[str, ...]
    is_on_host: bool = False

    @property
    def itemsize(self) -> int:
        return _BYTES[self.dtype]


@dataclasses.dataclass(frozen=True)
class _Extents:
    """Values of extents: integers, the batch, and names that `shape_main` (`program`) computes from it."""

    batch_names: frozenset[str]
    program: Mapping[str, tuple[str, tuple[str, ...]]]

    def value(self, name: str, batch: int, depth: int = 0) -> int:
        if re.fullmatch(r"\d+", name):
            return int(name)
        if name in self.batch_names:
            return batch
        if literal := _LITERAL.fullmatch(name):
            return int(literal[1])
        if name not in self.program or depth > _DEEPEST:
            raise _UnexpectedTextError(f"extent {name}")
        operator, inputs = self.program[name]
        return _compute(operator, [self.value(source, batch, depth + 1) for source in inputs])


@dataclasses.dataclass(frozen=True)
class PlanFacts:
    """The kernels of a plan in the order of its schedule."""

    kernels: tuple[KernelFact, ...]
    _tensors: Mapping[str, _PlanTensor] = dataclasses.field(repr=False)
    _extents: _Extents = dataclasses.field(repr=False)

    @property
    def kernels_by_kind(self) -> dict[str, int]:
        """Number of kernels by kind, largest first."""
        return dict(Counter(kernel.kind for kernel in self.kernels).most_common())

    @property
    def fused_attentions(self) -> int:
        """Number of attentions whose products and softmax are one kernel."""
        return self.kernels_by_kind.get("attention", 0)

    @property
    def products_by_dtype(self) -> dict[str, int]:
        """Number of matrix products and convolutions by data type (TensorRT's name: int8, half).

        The type is the narrowest that two of the kernel's operands share.
        """
        return dict(Counter(self._product_dtype(kernel) for kernel in self.kernels if kernel.kind in _PRODUCTS))

    def _product_dtype(self, kernel: KernelFact) -> str:
        types = Counter(self._tensors[name].dtype for name in kernel.operands if name in self._tensors)
        shared = [dtype for dtype, count in types.items() if count > 1 and dtype in _FLOATS]
        return min(shared, key=_BYTES.__getitem__, default="unknown")

    def bytes_moved(self, batch: int) -> int | None:
        """Bytes that all kernels read and write in one inference of `batch` images; None when not known."""
        try:
            return sum(self._operand_bytes(name, batch) for kernel in self.kernels for name in kernel.operands)
        except _UnexpectedTextError:
            return None

    def work(self, batch: int) -> tuple[KernelWork, ...] | None:
        """The work of every kernel in one inference of `batch` images; None when not known."""
        try:
            return tuple(self._work(kernel, batch) for kernel in self.kernels)
        except _UnexpectedTextError:
            return None

    def _work(self, kernel: KernelFact, batch: int) -> KernelWork:
        moved = sum(self._operand_bytes(name, batch) for name in kernel.operands)
        if kernel.kind == "attention":
            return KernelWork(moved, self._macs_of_attention(kernel, batch), self._product_dtype(kernel))
        if kernel.kind in _PRODUCTS:
            return KernelWork(moved, self._macs_of_product(kernel, batch), self._product_dtype(kernel))
        return KernelWork(moved)

    def _macs_of_product(self, kernel: KernelFact, batch: int) -> int:
        """Of outputs times what each sums up: in a convolution a row of the weight, in a product as many as follow from
        the sizes of its three tensors, (M, K) times (K, N) gives (M, N), so that (M K)(K N)(M N) = (M N K)^2.
        """
        shapes = [self._shape(name, batch) for name in kernel.operands]
        later = [self._shape(name, batch + 1) for name in kernel.operands]
        output = math.prod(shapes[-1])
        pairs = list(zip(shapes[:-1], later[:-1], strict=True))
        weights = [shape for shape, other in pairs if shape == other and len(shape) > 1]
        if not weights:
            raise _UnexpectedTextError(f"{kernel.name} without weights")
        weight = max(weights, key=math.prod)
        if kernel.kind == "convolution":
            return output * math.prod(weight[1:])
        sizes = [math.prod(shape) for shape, other in pairs if shape != other and len(shape) > 1]
        read = next((size for size in sizes if size != output), output)
        return math.isqrt(read * math.prod(weight) * output)

    def _macs_of_attention(self, kernel: KernelFact, batch: int) -> int:
        """Of q k^T and of the product with v; q is (..., N, d), k is (..., d, M)."""
        query, key = (self._shape(name, batch) for name in kernel.operands[:2])
        return 2 * math.prod(query) * key[-1]

    def _shape(self, name: str, batch: int) -> tuple[int, ...]:
        if name not in self._tensors:
            raise _UnexpectedTextError(f"operand {name}")
        return tuple(self._extents.value(extent, batch) for extent in self._tensors[name].extents)

    def _operand_bytes(self, name: str, batch: int) -> int:
        if name not in self._tensors:
            raise _UnexpectedTextError(f"operand {name}")
        tensor = self._tensors[name]
        if not tensor.extents:
            return 0  # a scalar, such as an extent that a kernel reads
        return tensor.itemsize * math.prod(self._extents.value(extent, batch) for extent in tensor.extents)


def _compute(operator: str, values: list[int]) -> int:
    match operator, values:
        case "copy", [value]:
            return value
        case "mul", [_, _]:
            return math.prod(values)
        case "add", [_, _]:
            return sum(values)
        case "sub", [left, right]:
            return left - right
        case "div", [left, right] if right:
            return left // right
        case "min", [_, *_]:
            return min(values)
        case "max", [_, *_]:
            return max(values)
    raise _UnexpectedTextError(operator)


def read_plan_facts(plan: bytes | memoryview) -> PlanFacts | None:
    """Facts of a serialized plan; None when it has no schedule, or one of unexpected form."""
    try:
        parts = [_read_schedule(text) for text in _schedules(bytes(plan))]
    except (_UnexpectedTextError, UnicodeDecodeError):
        return None
    return _joined(parts) if any(part.kernels for part in parts) else None


def _joined(parts: list[PlanFacts]) -> PlanFacts:
    """PlanFacts of a plan of several parts. Their names do not clash, because TensorRT numbers every part's own."""
    return PlanFacts(
        tuple(kernel for part in parts for kernel in part.kernels),
        {name: tensor for part in parts for name, tensor in part._tensors.items()},
        _Extents(
            frozenset().union(*(part._extents.batch_names for part in parts)),
            {name: entry for part in parts for name, entry in part._extents.program.items()},
        ),
    )


def _schedules(plan: bytes) -> Iterator[str]:
    position = plan.find(_MAGIC)
    while position >= 0:
        start = position + _TEXT_OFFSET
        length = int.from_bytes(plan[position + _LENGTH_OFFSET : position + _LENGTH_OFFSET + 4], "little")
        text = plan[start : start + length]
        if text.startswith(b"header {"):
            if len(text) < length:
                raise _UnexpectedTextError("cut off")
            if _FUSION_CONSTANTS.encode() not in text[:1000]:
                yield text.decode("utf-8")
        position = plan.find(_MAGIC, position + len(_MAGIC))


def _read_schedule(text: str) -> PlanFacts:
    sections = dict(_statements(text))
    if not {"header", "descriptors", "main"} <= sections.keys():
        raise _UnexpectedTextError("sections")
    tensors = {
        _value(body, "name"): _tensor(body)
        for kind, body in _statements(sections["descriptors"])
        if kind in ("tensor", "sub_tensor")
    }
    kernels = [
        _kernel(kind, body)
        for kind, body in _statements(sections["main"])
        if kind not in _NO_KERNEL and not _is_host_work(body, tensors)
    ]
    return PlanFacts(tuple(kernels), tensors, _read_extents(sections))


def _read_extents(sections: Mapping[str, str]) -> _Extents:
    batch_names = frozenset(_strings(sections["header"], "shape_inputs"))
    if len(batch_names) > 1:  # more than the batch is dynamic
        raise _UnexpectedTextError("extents")
    program = {}
    for kind, body in _statements(sections.get("shape_main", "")):
        outputs = _strings(body, "output")
        if kind in _SHAPE_OPERATORS and len(outputs) == 1:
            program[outputs[0]] = (kind, tuple(_strings(body, "input")))
    return _Extents(batch_names, program)


def _statements(text: str) -> Iterator[tuple[str, str]]:
    """(name, body) of every `name { body }` and `name={ body }` at the outermost level of `text`.

    Braces inside strings do not count.
    """
    depth = start = opened = 0
    name = ""
    for match in _STRING_OR_BRACE.finditer(text):
        if match[0] == "{":
            depth += 1
            if depth == 1:
                start = match.end()
                found = _OPENED.search(text, opened, match.start())
                name = found[1] if found else ""
        elif match[0] == "}":
            depth -= 1
            opened = match.end()
            if depth < 0 or not name:
                raise _UnexpectedTextError("braces")
            if depth == 0:
                yield name, text[start : match.start()]
    if depth:
        raise _UnexpectedTextError("braces")


def _is_host_work(body: str, tensors: Mapping[str, _PlanTensor]) -> bool:
    outputs = _operands(body, "output")
    return bool(outputs) and all(name in tensors and tensors[name].is_on_host for name in outputs)


def _kernel(kind: str, body: str) -> KernelFact:
    name = _value(body, "name")
    operands = (*_operands(body, "input"), *_operands(body, "output"))
    layers = tuple(_LAYER.findall(_quoted(body, "layers")))
    return KernelFact(_kind_of(kind, name, body), name, layers, operands)


def _kind_of(kind: str, name: str, body: str) -> str:
    if kind == "corrltn":
        return "convolution"
    if kind == "fully_connected":
        return "gemm"
    if kind == "runtime_fusion":
        return _value(body, "backbone")
    if kind != "function":
        return kind
    if "mha" in name:
        return "attention"
    pieces = set(_PIECE.findall(name.removeprefix("__myl_")))
    return "move" if pieces and pieces <= _MOVES else "pointwise"


def _operands(body: str, side: str) -> list[str]:
    return _strings(body, f"{side}_args") or _strings(body, side)


def _tensor(body: str) -> _PlanTensor:
    dtype = _value(body, "type")
    match = re.search(_LIST.format(key="dims"), body)
    if dtype not in _BYTES or match is None:
        raise _UnexpectedTextError(f"tensor of type {dtype}")
    region = re.search(r'(?<!\w)region="([^"]*)"', body)
    is_on_host = region is not None and _HOST_MEMORY in region[1]
    return _PlanTensor(dtype, tuple(re.findall(r'[^\s"]+', match[1])), is_on_host)


def _strings(body: str, key: str) -> list[str]:
    match = re.search(_LIST.format(key=key), body)
    return _STRING.findall(match[1]) if match else []


def _quoted(body: str, key: str) -> str:
    match = re.search(rf'(?<!\w){key}="([^"]*)"', body)
    return match[1] if match else ""


def _value(body: str, key: str) -> str:
    match = re.search(rf'(?<!\w){key}=(?:"([^"]*)"|([^\s"]+))', body)
    if match is None:
        raise _UnexpectedTextError(f"no {key}")
    return match[1] or match[2] or ""
