"""Which runtime reads which graph, and which ONNX Runtime each Triton image carries: `runtimes.json`, `consumers.json`.

All advice on where a graph can run goes by both tables, through `OnnxRuntimeRelease.misfit` and `reading`: Triton
repositories and their check, Kubernetes manifests, the folders for ONNX Runtime and Polygraphy, the doctor. `sources`
in runtimes.json says where its rows are from. consumers.json is what ONNX Runtime, OpenVINO, OpenCV and npm's packages
made of small graphs of every family; `benchmarks/consumers` writes it, and docs/runtimes.md shows it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spach_deploy.common.errors import UsageError
from spach_deploy.common.versions import ROUNDS_FP16

if TYPE_CHECKING:
    import onnx_ir as ir

REPOSITORY = "nvcr.io/nvidia/tritonserver"

NO_BFLOAT16 = "ONNX Runtime computes nothing in bfloat16 on a CPU."
INSTEAD_OF_BFLOAT16 = (
    "Export it for ONNX Runtime, with --target cpu --int8 --calibration DIR or with --fp32 --engine none, or run this"
    " bundle in OpenVINO with spach_deploy.Session."
)
"""The next step where a bundle of --target cpu has a graph in bfloat16, which OpenVINO computes."""

DATA = Path(__file__).with_name("runtimes.json")
"""File of the table."""

CONSUMERS = Path(__file__).with_name("consumers.json")
"""File of what runtimes made of graphs."""

WEIGHT_SPLIT = "Split of a weight"
"""Counts as an operator: graphs with attention had it once, and OpenCV 4 reads no such graph."""


@dataclasses.dataclass(frozen=True)
class GraphNeeds:
    """What an ONNX graph requires of a runtime. `ir`: its IR version. `bfloat16`: operators that read or make
    bfloat16. `formats`: fp16, bf16, fp8 and int8, as far as it has them, `int8 of fp16`, and types of inputs
    that are not FP32.
    `operators`: the names of all its operators; empty where the graph was not read.
    """

    opset: int
    ir: int
    bfloat16: frozenset[str] = frozenset()
    has_fp8: bool = False
    formats: frozenset[str] = frozenset()
    operators: frozenset[str] = frozenset()

    def in_fp32(self) -> GraphNeeds:
        """Of the same graph with every half tensor rounded and computed in FP32."""
        return dataclasses.replace(self, bfloat16=frozenset(), formats=self.formats - {"fp16", "bf16"})

    @classmethod
    def of(cls, graph: Path | bytes) -> GraphNeeds | None:
        """The requirements of an ONNX file or its bytes; external data is not read.

        None for what is no ONNX graph, or has a tensor whose type cannot be inferred.
        """
        import onnx
        import onnx_ir as ir

        from spach_deploy.graph.precision.formats import FLOAT, infer_all_types

        try:
            loaded = (
                onnx.load_from_string(graph) if isinstance(graph, bytes) else onnx.load(graph, load_external_data=False)
            )
            model = ir.from_proto(loaded)
            infer_all_types(model)
            opset = next(version for domain, version in model.opset_imports.items() if domain in ("", "ai.onnx"))
        except Exception:  # protobuf's and shape inference's own, OSError, PrecisionError, a graph without an opset
            return None
        types = {node: {v.dtype for v in (*node.inputs, *node.outputs) if v is not None} for node in model.graph}
        bfloat16 = {node.op_type for node, kinds in types.items() if ir.DataType.BFLOAT16 in kinds}
        has_fp8 = any(ir.DataType.FLOAT8E4M3FN in kinds for kinds in types.values())
        formats = {_FORMATS[kind.name] for found in types.values() for kind in found if kind and kind.name in _FORMATS}
        formats |= {f"{value.dtype.name} input" for value in model.graph.inputs if value.dtype not in (None, FLOAT)}
        if not has_fp8:
            formats |= {_quantized(node) for node in types if node.op_type == "QuantizeLinear"}
        return cls(
            *(int(opset), int(model.ir_version), frozenset(bfloat16), has_fp8),
            formats=frozenset(formats),
            operators=frozenset(map(_operator, types)),
        )


_FORMATS = {"FLOAT16": "fp16", "BFLOAT16": "bf16", "FLOAT8E4M3FN": "fp8"}


def _quantized(node: ir.Node) -> str:
    """Two formats, because ONNX Runtime before 1.30 computes INT8 of FP16 wrongly on a CPU."""
    source = node.inputs[0]
    is_half = source is not None and source.dtype is not None and source.dtype.name == "FLOAT16"
    return "int8 of fp16" if is_half else "int8"


def _operator(node: ir.Node) -> str:
    source = node.inputs[0] if node.op_type == "Split" else None
    return WEIGHT_SPLIT if source is not None and source.is_initializer() else str(node.op_type)


@dataclasses.dataclass(frozen=True)
class Trial:
    """A graph that a runtime was given. `problem`: what it said, or how far its answers were off; empty if right."""

    needs: GraphNeeds = dataclasses.field(repr=False)
    problem: str


@dataclasses.dataclass(frozen=True)
class Reader:
    """A release of a runtime, and what it made of graphs on a CPU."""

    name: str
    version: str
    trials: tuple[Trial, ...] = dataclasses.field(repr=False)

    def misfit(self, needs: GraphNeeds) -> str | None:
        """Why this release does not read a graph, in its own words; empty where it does.

        That is what it made of graphs with the same opset, IR version and formats. None where there was none, where
        these lack one of the graph's operators, or where it read only some.
        """
        alike = [trial for trial in self.trials if _is_alike(trial.needs, needs)]
        seen = frozenset[str]().union(*(trial.needs.operators for trial in alike))
        problems = [trial.problem for trial in alike if trial.problem]
        if not needs.operators or not needs.operators <= seen or 0 < len(problems) < len(alike):
            return None
        return problems[0] if problems else ""


def _is_alike(one: GraphNeeds, other: GraphNeeds) -> bool:
    return (one.opset, one.ir, one.formats) == (other.opset, other.ir, other.formats)


@dataclasses.dataclass(frozen=True)
class OnnxRuntimeRelease:
    """A release of ONNX Runtime and the graphs that it runs.

    `opset`, `ir`: the newest opset and IR version that it loads. `fp8_opset`: the oldest opset in which it loads graphs
    with FP8. `cuda_bfloat16`: operators for which its CUDA provider has a kernel in bfloat16 (its CPU provider has none
    that computes). `seen`: keys of the table's `sources`. `tried`: the newest release in consumers.json that is not
    newer.
    """

    version: str
    opset: int
    ir: int
    seen: str
    fp8_opset: int
    cuda_bfloat16: frozenset[str] = dataclasses.field(repr=False)
    tried: Reader | None = dataclasses.field(default=None, repr=False)

    @property
    def truncates_fp16(self) -> bool:
        """Whether its QuantizeLinear of FP16 truncates on a CPU instead of rounding."""
        return version_numbers(self.version) < version_numbers(ROUNDS_FP16)

    def misfit(self, needs: GraphNeeds, *, on_gpu: bool) -> str:
        """Why this release cannot run a graph, as a clause; empty where no reason is known."""
        if needs.opset > self.opset:
            return f"ONNX Runtime {self.version} loads opset {self.opset}, and the graph has opset {needs.opset}"
        if needs.has_fp8 and needs.opset < self.fp8_opset:
            loads = f"loads FP8 from opset {self.fp8_opset} on"
            return f"ONNX Runtime {self.version} {loads}, and the graph has opset {needs.opset}"
        if needs.ir > self.ir:
            return f"ONNX Runtime {self.version} loads IR version {self.ir}, and the graph has {needs.ir}"
        if needs.bfloat16 and not on_gpu:
            return f"ONNX Runtime {self.version} computes nothing in bfloat16 on a CPU"
        lacking = sorted(needs.bfloat16 - self.cuda_bfloat16)
        if lacking:
            return f"ONNX Runtime {self.version} has no kernel for {' and '.join(lacking)} in bfloat16, on no device"
        if not on_gpu and self.tried is not None and (problem := self.tried.misfit(needs)):
            return f"ONNX Runtime {self.tried.version} does not read such a graph on a CPU: {problem}"
        return ""


@dataclasses.dataclass(frozen=True)
class TritonImage:
    """NVIDIA's Triton image of a release (YY.MM), and the versions in it. `tensorrt` None: not known.

    `seen`: by field, keys of the table's `sources`.
    """

    release: str
    tensorrt: str | None
    onnxruntime: str
    cuda: str
    seen: Mapping[str, str] = dataclasses.field(repr=False)

    @property
    def tag(self) -> str:
        """The tag of the image with Python, such as `25.08-py3`."""
        return f"{self.release}-py3"

    @property
    def reference(self) -> str:
        """The image's name with its tag, as a Dockerfile has it."""
        return f"{REPOSITORY}:{self.tag}"

    @property
    def notes(self) -> str:
        """URL of the release notes."""
        page = f"rel-{self.release.replace('.', '-')}.html"
        return f"https://docs.nvidia.com/deeplearning/triton-inference-server/release-notes/{page}"


@dataclasses.dataclass(frozen=True)
class Runtimes:
    """The table: all releases and images that are known, oldest first.

    `read`: the date of the table. `sources`: by a key that `seen` uses, where the fact is from.
    """

    onnxruntimes: tuple[OnnxRuntimeRelease, ...]
    images: tuple[TritonImage, ...]
    read: str
    sources: Mapping[str, str]

    @classmethod
    def parse(cls, content: Any) -> Runtimes:
        """The table from the JSON of `runtimes.json`."""
        since = content["cuda_bfloat16"]
        runtimes = [
            OnnxRuntimeRelease(
                version,
                **entry,
                fp8_opset=_fp8_opset(version, content),
                cuda_bfloat16=_by(version, since),
                tried=_tried(version),
            )
            for version, entry in content["onnxruntime"].items()
        ]
        images = [TritonImage(release, **entry) for release, entry in content["images"].items()]
        return cls(
            tuple(sorted(runtimes, key=lambda runtime: version_numbers(runtime.version))),
            tuple(sorted(images, key=lambda image: image.release)),
            str(content["read"]),
            content["sources"],
        )

    def image(self, release: str) -> TritonImage:
        """The image of a release (YY.MM). UsageError for one that is not in the table."""
        found = next((image for image in self.images if image.release == release), None)
        if found is None:
            raise UsageError(
                f"--triton-version {release}: what that Triton image carries is not known here.",
                f"Known are {self.images[0].release} to {self.images[-1].release}; --list-versions shows them.",
            )
        return found

    def fitting(self, needs: Iterable[GraphNeeds], *, on_gpu: bool) -> tuple[TritonImage, ...]:
        """Images whose ONNX Runtime runs all graphs with these needs, oldest first."""
        asked = tuple(needs)
        return tuple(image for image in self.images if not self.misfit(image, asked, on_gpu=on_gpu))

    def misfit(self, image: TritonImage, needs: Iterable[GraphNeeds], *, on_gpu: bool) -> str:
        """Why an image's ONNX Runtime cannot run all graphs with these needs, as a clause; empty where it can."""
        runtime = self.onnxruntime(image.onnxruntime)
        if runtime is None:
            return f"what ONNX Runtime {image.onnxruntime} loads is not known"
        clauses = (runtime.misfit(graph, on_gpu=on_gpu) for graph in needs)
        return next((clause for clause in clauses if clause), "")

    def of_tensorrt(self, needs: GraphNeeds) -> GraphNeeds:
        """The requirements of a graph that ONNX Runtime hands to TensorRT, which needs no kernels of its own.

        Kernels that its CUDA provider has remain: they tell since when the provider of TensorRT takes BF16.
        """
        return dataclasses.replace(needs, bfloat16=needs.bfloat16 & self.onnxruntimes[-1].cuda_bfloat16)

    def truncates_fp16(self, version: str) -> bool:
        """Whether this version of ONNX Runtime is known to truncate where FP16 is quantized on a CPU."""
        runtime = self.onnxruntime(version)
        return runtime is not None and runtime.truncates_fp16

    def onnxruntime(self, version: str) -> OnnxRuntimeRelease | None:
        """The row of a version, or of the newest older one: newer versions load what older ones load.

        None for a version older than all rows.
        """
        asked = version_numbers(version)
        older = [runtime for runtime in self.onnxruntimes if version_numbers(runtime.version) <= asked]
        return dataclasses.replace(older[-1], version=version, tried=_tried(version)) if older else None


def _tried(version: str) -> Reader | None:
    """The newest release of ONNX Runtime in consumers.json that is not newer than `version`."""
    numbers = version_numbers(version)
    older = [one for one in readers() if one.name == "ONNX Runtime" and version_numbers(one.version) <= numbers]
    return older[-1] if older else None


def _fp8_opset(version: str, content: Any) -> int:
    return 20 if version_numbers(version) >= version_numbers(content["fp8_below_opset_21"]) else 21


def _by(version: str, since: Mapping[str, str]) -> frozenset[str]:
    """The operators of `since` whose first version is not newer than `version`."""
    numbers = version_numbers(version)
    return frozenset(name for name, first in since.items() if version_numbers(first) <= numbers)


@functools.cache
def runtimes() -> Runtimes:
    """The table that comes with this package."""
    return Runtimes.parse(json.loads(DATA.read_text(encoding="utf-8")))


@functools.cache
def readers() -> tuple[Reader, ...]:
    """The runtimes of consumers.json, those of one name together, oldest first."""
    content = json.loads(CONSUMERS.read_text(encoding="utf-8"))
    graphs = content["graphs"]
    needs = {name: needs_of_entry(entry) for name, entry in graphs.items()}
    return tuple(
        Reader(
            runtime["name"],
            runtime["version"],
            tuple(
                Trial(needs[name], problem_of(answer, graphs[name]["allowed"]))
                for name, answer in runtime["answers"].items()
            ),
        )
        for runtime in content["runtimes"]
    )


def needs_of_entry(entry: Mapping[str, Any]) -> GraphNeeds:
    """The requirements of a graph of consumers.json."""
    formats, operators = frozenset(entry["formats"]), frozenset(entry["operators"])
    bfloat16 = frozenset(entry["bfloat16"])
    return GraphNeeds(entry["opset"], entry["ir"], bfloat16, "fp8" in formats, formats, operators)


def problem_of(answer: str | float, allowed: float) -> str:
    """What is wrong with an answer of consumers.json, as a clause; empty if nothing. Its words, or its relative L2."""
    if isinstance(answer, str):
        return answer
    return "" if answer <= allowed else f"relative L2 is {answer:.1e}; {allowed:.1e} is allowed"


def reading(needs: GraphNeeds) -> str:
    """Which runtimes read such a graph on a CPU and which do not, as `ONNX Runtime from 1.20, OpenCV from 5.0; not
    onnxruntime-web`, or `no runtime that was tried, not OpenCV`. Empty where nothing is known.
    """
    reads, not_read = [], []
    names = dict.fromkeys(reader.name for reader in readers())
    for name in names:
        found = [(reader.version, reader.misfit(needs)) for reader in readers() if reader.name == name]
        first = next((n for n in range(len(found)) if all(misfit == "" for _, misfit in found[n:])), None)
        if first is not None:
            reads.append(f"{name} from {'.'.join(found[first][0].split('.')[:2])}")
        elif all(misfit for _, misfit in found):
            not_read.append(name)
    refused = f"not {', '.join(not_read)}" if not_read else ""
    if refused and not reads:
        return f"no runtime that was tried, {refused}"
    return "; ".join(filter(None, (", ".join(reads), refused)))


def version_numbers(version: str) -> tuple[int, ...]:
    """`10.13.2.6` -> (10, 13, 2, 6); up to the first part that is no number."""
    numbers: list[int] = []
    for part in version.split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)
