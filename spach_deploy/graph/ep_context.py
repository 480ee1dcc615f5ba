"""ONNX Runtime's EPContext models: graphs of one node, for which an execution provider loads an engine plan.

    model = context_model(graph, PlanContext.of(manifest.engine, plan), embedded=False)
    context = EPContext.read(folder / "model_ctx.onnx")
    context.plan, context.problems(folder / "model.onnx")

The node is `EPContext` of the domain com.microsoft. `ep_cache_context` is the plan's file name, relative to the model's
folder (providers refuse absolute paths and `..`), or the plan itself where `embed_mode` is 1. The metadata of a model
for TensorRT for RTX has the first 64 bytes of the plan as hex, from which its provider tells whether the plan is for a
GPU without reading it.

The operator's schema: onnxruntime.ai/docs/execution-providers/EP-Context-Design.html. Attributes and metadata are those
that the providers write themselves (tests/packaging/onnxruntime/ep_context.json).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spach_deploy.common.errors import BundleError, UsageError, printable
from spach_deploy.options.specs import Flavour

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

    from spach_deploy.bundle.schema import EngineSection

DOMAIN, OPERATOR = "com.microsoft", "EPContext"
RTX_PROVIDER, TENSORRT_PROVIDER = "NvTensorRTRTXExecutionProvider", "TensorrtExecutionProvider"
PROVIDERS = {Flavour.TENSORRT_RTX: RTX_PROVIDER, Flavour.TENSORRT: TENSORRT_PROVIDER}
"""The execution provider that loads a plan, by the TensorRT that built it."""

COMPATIBILITY = f"ep_compatibility_info.{RTX_PROVIDER}"
DEPENDENCIES = "external_dependencies"
HEADER_BYTES = 64
_AGAIN = "Write the folder again."
_IR_VERSION, _OPSET = 9, 20
"""IR 9 is what opset 20 needs; older runtimes refuse 10."""

MOST_BYTES = (1 << 31) - (1 << 20)
"""Largest plan that is embedded: protobuf reads no message of 2 GiB, and the rest of the model is small."""


@dataclasses.dataclass(frozen=True)
class PlanContext:
    """What an EPContext node says of a plan.

    `file`: the plan. `architecture`: compute capability without a point, such as 89, or 80+ for all from Ampere on.
    """

    file: Path
    provider: str
    architecture: str

    @classmethod
    def of(cls, engine: EngineSection, file: Path) -> PlanContext:
        """Of a bundle's plan. A plan of TensorRT for RTX carries what each GPU needs, so that it is 80+."""
        is_portable = engine.flavour is Flavour.TENSORRT_RTX or engine.hardware_compatible or not engine.gpus
        return cls(file, PROVIDERS[engine.flavour], "80+" if is_portable else engine.gpus[0].removeprefix("sm"))


def context_model(graph: ModelProto, plan: PlanContext, *, embedded: bool) -> ModelProto:
    """An EPContext model around a plan, with the inputs and outputs of `graph`, the model that the plan was built from.

    `embedded`: the plan's bytes are in the model; else it names the file, which must lie beside it. UsageError for a
    plan that is too large to be embedded.
    """
    from onnx import helper

    size = plan.file.stat().st_size
    if embedded and size > MOST_BYTES:
        raise UsageError(
            f"{plan.file.name} has {size / 1e9:.1f} GB, and a single ONNX file holds less than 2.1 GB.",
            "Leave --embed out: the plan then lies beside the model.",
        )
    inputs, outputs = ([_named(value) for value in values] for values in (graph.graph.input, graph.graph.output))
    content = plan.file.read_bytes() if embedded else plan.file.name
    node = helper.make_node(
        OPERATOR, [v.name for v in inputs], [v.name for v in outputs], name=_NODE, domain=DOMAIN,
        **_attributes(plan, content),
    )  # fmt: skip
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(DOMAIN, 1)]
    made = helper.make_model(
        helper.make_graph([node], _NODE, inputs, outputs),
        ir_version=_IR_VERSION, opset_imports=opsets, producer_name="spach-deploy",
    )  # fmt: skip
    helper.set_model_props(made, _metadata(plan, embedded=embedded))
    return made


_NODE = "engine"


def _named(value: Any) -> Any:
    """An input or output as it is, without documentation and metadata."""
    from onnx import ValueInfoProto

    return ValueInfoProto(name=value.name, type=value.type)


def _attributes(plan: PlanContext, content: bytes | str) -> dict[str, Any]:
    return {
        "main_context": 0,
        "embed_mode": int(isinstance(content, bytes)),
        "ep_cache_context": content,
        "ep_context_op_domain": DOMAIN,
        "ep_sdk_version": "1.0",
        "hardware_architecture": plan.architecture,
        "max_size": 0,
        "onnx_model_filename": "model.onnx",
        "partition_name": _NODE,
        "source": plan.provider,
    }


def _metadata(plan: PlanContext, *, embedded: bool) -> dict[str, str]:
    if plan.provider != RTX_PROVIDER:
        return {}
    return {
        COMPATIBILITY: _header(plan.file),
        **({} if embedded else {DEPENDENCIES: "ep_context_binary"}),
    }


def _header(plan: Path) -> str:
    with plan.open("rb") as file:
        return file.read(HEADER_BYTES).hex()


@dataclasses.dataclass(frozen=True)
class EPContext:
    """An EPContext model that was read. `inputs`, `outputs`: their types as protobuf, by name."""

    file: Path
    node: NodeProto
    metadata: Mapping[str, str]
    inputs: Mapping[str, bytes]
    outputs: Mapping[str, bytes]

    @classmethod
    def read(cls, file: Path) -> EPContext:
        """Read the model. BundleError where it cannot be read, or is none."""
        import onnx

        try:
            model = onnx.load(file, load_external_data=False)
            onnx.checker.check_model(model)
        except Exception as error:  # protobuf's own, OSError, ValidationError
            reason = printable((str(error).strip() or type(error).__name__).splitlines()[0])
            raise BundleError(f"{file} is not an ONNX graph ({reason}).", _AGAIN) from None
        nodes = model.graph.node
        if [(node.domain, node.op_type) for node in nodes] != [(DOMAIN, OPERATOR)]:
            raise BundleError(f"{file} is no EPContext model: it has {len(nodes)} nodes and not that one.", _AGAIN)
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        return cls(file, nodes[0], metadata, _types(model.graph.input), _types(model.graph.output))

    def _attribute(self, name: str) -> Any:
        from onnx import helper

        found = (attribute for attribute in self.node.attribute if attribute.name == name)
        return next((helper.get_attribute_value(attribute) for attribute in found), None)

    @property
    def is_embedded(self) -> bool:
        """Whether the plan's bytes are in the model; also where nothing is said, as the operator defines it."""
        return bool(self._attribute("embed_mode") != 0)

    @property
    def plan(self) -> bytes:
        """The plan. BundleError where it is missing or lies where no provider reads it."""
        content = self._attribute("ep_cache_context") or b""
        if self.is_embedded:
            return bytes(content)
        name = printable(content.decode("utf-8", "replace"))
        if not name or Path(name).name != name:
            raise BundleError(f"{self.file} names the plan {name!r}, which is not beside it.", _AGAIN)
        try:
            return (self.file.parent / name).read_bytes()
        except OSError as error:
            problem = f"{self.file.parent / name}, which {self.file.name} loads, cannot be read ({error.strerror})."
            raise BundleError(problem, _AGAIN) from None

    def problems(self, graph: Path) -> Iterator[str]:
        """What does not fit the plan or the model `graph`, a sentence each."""
        import onnx

        header = self.metadata.get(COMPATIBILITY, "")
        if self._attribute("source") == RTX_PROVIDER.encode() and header != self.plan[:HEADER_BYTES].hex():
            yield f"{self.file.name} describes another plan: {COMPATIBILITY} is not the start of the one that it loads."
        model = onnx.load(graph, load_external_data=False).graph
        for kind, given, wanted in (("inputs", self.inputs, model.input), ("outputs", self.outputs, model.output)):
            if given != _types(wanted):
                yield f"The {kind} of {self.file.name} are not those of {graph.name}."


def _types(values: Iterable[Any]) -> dict[str, bytes]:
    return {value.name: value.type.SerializeToString(deterministic=True) for value in values}
