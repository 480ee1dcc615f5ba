"""Bundles made by hand in milliseconds: a linear model behind every interface that an export can have.

The manifest is written by `seal`, the golden logits are the model's own in FP32, a plan is a header with nothing
behind it. What only a real export can show is tested on `tests.small_bundles`.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from msgspec import convert, to_builtins
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.outputs import INPUT, LOGITS, PROBABILITIES, TOP_INDICES, TOP_VALUES, graph_outputs
from spach_deploy.bundle.schema import Manifest, TensorInfo
from spach_deploy.bundle.store import GOLDEN, GRAPH, PLAN, seal
from spach_deploy.common.files import sha256_of
from spach_deploy.options.specs import BatchProfile, IODtype, OutputSpec, Precision, Preprocessing, Role
from tests import manifests, small_bundles

SIZE = 8
CLASSES = 7
RESIZE = 9
PREPROCESSING = Preprocessing(SIZE, RESIZE)

_DTYPES = {IODtype.FP32: TensorProto.FLOAT, IODtype.FP16: TensorProto.FLOAT16, IODtype.UINT8: TensorProto.UINT8}


@dataclasses.dataclass(frozen=True)
class Tiny:
    """What the bundle is like. `engine`: tensorrt, tensorrt-rtx, or none for a bundle without a plan.

    `main`: name of the product; `role`: what it is. In bf16 the product is computed in bfloat16, of numbers that
    `bfloat16` names: MatMul, and Conv or Pad before it.
    """

    name: str = "tiny"
    outputs: OutputSpec = dataclasses.field(default_factory=OutputSpec)
    batch: BatchProfile = dataclasses.field(default_factory=lambda: BatchProfile(1, 4, 8))
    engine: str = "tensorrt"
    precision: Precision = Precision.FP16
    classes: int = CLASSES
    seed: int = 7
    opset: int = 17
    bfloat16: tuple[str, ...] = ("Conv",)
    preprocessing: Preprocessing = PREPROCESSING
    main: str = LOGITS
    role: Role = Role.LOGITS

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """The outputs that the model computes."""
        shape = (None, self.classes)
        return (TensorInfo(name=self.main, dtype="float32", shape=shape, layout="NC", role=self.role),)

    @property
    def tensors_of_graph(self) -> tuple[TensorInfo, ...]:
        """All outputs."""
        return graph_outputs(self.tensors, self.outputs)


EMBEDDING = Tiny(main="vector", role=Role.EMBEDDING)
"""A model without logits."""

RENAMED = Tiny(outputs=OutputSpec(top_k=3, softmax=True), main="scores")
"""A model whose logits have another name."""


def write(folder: Path, tiny: Tiny | None = None) -> Path:
    """A bundle in `folder`, which is made."""
    tiny = tiny or Tiny()
    folder.mkdir(parents=True)
    graph = _graph(tiny)
    opset = max(tiny.opset, 22) if tiny.precision is Precision.BF16 else tiny.opset
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10 if opset > 20 else 8)
    onnx.save(model, folder / GRAPH)
    _golden(tiny).save(folder / GOLDEN)
    if tiny.engine != "none":
        (folder / PLAN).write_bytes(plan_bytes(tiny.engine))
    seal(folder, _manifest(tiny, ir.from_proto(model).graph))
    return folder


def keep_weights_in(graph: Path, location: str) -> None:
    """Make it a graph whose weights are said to lie in another file."""
    model = onnx.load(graph, load_external_data=False)
    tensor = model.graph.initializer[0]
    del tensor.external_data[:]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    graph.write_bytes(model.SerializeToString())


def with_weights_in(bundle: Path, location: str) -> Path:
    """The bundle as if it had been exported with such a graph."""
    keep_weights_in(bundle / GRAPH, location)
    manifest = small_bundles.read_manifest(bundle)
    manifest["files"][GRAPH]["sha256"] = sha256_of(bundle / GRAPH)
    small_bundles.write_manifest(bundle, manifest)
    return bundle


def of_int8(bundle: Path, **section: Any) -> Path:
    """The bundle as one of INT8 with the rest in FP16; `section` says more, as `quantized_from`."""
    manifest = small_bundles.read_manifest(bundle)
    manifest["quantization"] = manifests.quantization(**section)
    small_bundles.write_manifest(bundle, manifest)
    return bundle


def for_cpu(bundle: Path, precision: Precision = Precision.BF16, **settings: str) -> Path:
    """The bundle as one of --target cpu; `settings` of the runner that was chosen, by default OpenVINO in bf16."""
    settings = settings or {"INFERENCE_PRECISION_HINT": "bf16"}
    form: dict[str, Any] = {
        "precision": precision.value,
        "runner": "openvino-bf16",
        "batch": 8,
        "images_per_second": 9.0,
    }
    form |= {"times_eager": 2.0, "ratio": None, "rel_l2": 1e-3, "is_right": True, "settings": settings}
    manifest = small_bundles.read_manifest(bundle)
    manifest["cpu"] = {"chosen": form, "forms": [form], "machine": {}}
    small_bundles.write_manifest(bundle, manifest)
    return bundle


def for_vnni(folder: Path) -> Path:
    """A bundle of --target cpu that is INT8 for processors with VNNI, by its manifest."""
    bundle = for_cpu(write(folder, Tiny(engine="none")), Precision.INT8, INFERENCE_PRECISION_HINT="f32")
    return of_int8(bundle, rest="fp32", quantized_from="fp32", vnni=True)


def weights(tiny: Tiny) -> npt.NDArray[np.float32]:
    """The model: logits = input @ weights, (C H W, classes)."""
    values = math.prod(tiny.preprocessing.pixel_shape)
    return np.random.default_rng(tiny.seed).normal(0, 0.2, (values, tiny.classes)).astype(np.float32)


def _shape(tiny: Tiny) -> tuple[int, int, int]:
    """Of one input."""
    height, width, channels = tiny.preprocessing.pixel_shape
    return (height, width, channels) if tiny.outputs.io_dtype is IODtype.UINT8 else (channels, height, width)


def samples(tiny: Tiny, count: int = 4, seed: int = 11) -> npt.NDArray[Any]:
    """Inputs as the model's caller sends them."""
    random = np.random.default_rng(seed)
    if tiny.outputs.io_dtype is IODtype.UINT8:
        return random.integers(0, 256, (count, *_shape(tiny)), np.uint8)
    dtype = np.float16 if tiny.outputs.io_dtype is IODtype.FP16 else np.float32
    return random.normal(0, 1, (count, *_shape(tiny))).astype(dtype)


def logits(tiny: Tiny, inputs: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """What the model answers, in FP32."""
    pixels = inputs.astype(np.float32)
    if tiny.outputs.io_dtype is IODtype.UINT8:
        pixels = pixels.transpose(0, 3, 1, 2)
    return (pixels.reshape(len(pixels), -1) @ weights(tiny)).astype(np.float32)


def _golden(tiny: Tiny) -> Golden:
    inputs = samples(tiny)
    return Golden(inputs, {tiny.main: logits(tiny, inputs)}, tuple(f"{index}.jpg" for index in range(len(inputs))))


def plan_bytes(engine: str) -> bytes:
    if engine == "tensorrt-rtx":
        return small_bundles.plan_bytes()
    return b"ftrt" + bytes(20) + bytes((10, 8, 0)) + bytes(1024)


def _graph(tiny: Tiny) -> GraphProto:
    io_dtype, k = tiny.outputs.io_dtype, tiny.outputs.top_k
    answers = TensorProto.FLOAT16 if io_dtype is IODtype.FP16 else TensorProto.FLOAT
    shape: list[str | int | None] = ["batch", *_shape(tiny)]
    perm = [0, 3, 1, 2] if io_dtype is IODtype.UINT8 else [0, 1, 2, 3]
    nodes: list[NodeProto] = [
        helper.make_node("Cast", [INPUT], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["channels"], perm=perm),
        *_product(tiny),
        helper.make_node("Cast", ["product"], [tiny.main], to=answers),
    ]
    outputs = [helper.make_tensor_value_info(tiny.main, answers, ["batch", tiny.classes])]
    constants = _constants(tiny)
    if tiny.outputs.softmax:
        nodes.append(helper.make_node("Softmax", [tiny.main], [PROBABILITIES], axis=-1))
        outputs.append(helper.make_tensor_value_info(PROBABILITIES, answers, ["batch", tiny.classes]))
    if k:
        constants.append(numpy_helper.from_array(np.array([k], np.int64), "k"))
        nodes.append(helper.make_node("TopK", [tiny.main, "k"], [TOP_VALUES, TOP_INDICES], axis=-1))
        outputs.append(helper.make_tensor_value_info(TOP_VALUES, answers, ["batch", k]))
        outputs.append(helper.make_tensor_value_info(TOP_INDICES, TensorProto.INT64, ["batch", k]))
    inputs = [helper.make_tensor_value_info(INPUT, _DTYPES[io_dtype], shape)]
    return helper.make_graph(nodes, "tiny", inputs, outputs, constants)


def _product(tiny: Tiny) -> list[NodeProto]:
    """channels -> product = flat @ weights, in the precision."""
    if tiny.precision is not Precision.BF16:
        flat = helper.make_node("Flatten", ["channels"], ["flat"])
        return [flat, helper.make_node("MatMul", ["flat", "weights"], ["product"])]
    nodes = [helper.make_node("Cast", ["channels"], ["half"], to=TensorProto.BFLOAT16)]
    extra = {"Conv": ["half", "same"], "Pad": ["half", "none"]}
    for kind in tiny.bfloat16:
        nodes.append(helper.make_node(kind, [nodes[-1].output[0], *extra[kind][1:]], [f"after_{kind}"]))
    return [
        *nodes,
        helper.make_node("Flatten", [nodes[-1].output[0]], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["half_product"]),
        helper.make_node("Cast", ["half_product"], ["product"], to=TensorProto.FLOAT),
    ]


def _constants(tiny: Tiny) -> list[TensorProto]:
    """The weights, and what the extra operators of bfloat16 read: they change nothing."""
    if tiny.precision is not Precision.BF16:
        return [numpy_helper.from_array(weights(tiny), "weights")]
    given = [("weights", weights(tiny)), ("same", np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1))]
    half = [helper.make_tensor(name, TensorProto.BFLOAT16, a.shape, a.ravel()) for name, a in given]
    return [*half, numpy_helper.from_array(np.zeros(8, np.int64), "none")]


def _manifest(tiny: Tiny, graph: ir.Graph) -> Manifest:
    from spach_deploy.options.specs import EngineTarget, ExportOptions
    from spach_deploy.pipeline.steps.manifest import interface_sections

    options = ExportOptions(outputs=tiny.outputs, engine=EngineTarget(batch=tiny.batch))
    engine = {"flavour": tiny.engine, "version": "10.8", "gpus": ["sm89"], "tf32": True}
    bounded = [str(tensor.name) for tensor in graph.outputs if tensor.name != TOP_INDICES]
    content = manifests.sections(
        asked=tiny.precision.value,
        model=manifests.model(
            tiny.name, tiny.preprocessing.image_size, tiny.classes if tiny.role is Role.LOGITS else 0
        ),
        preprocessing=to_builtins(tiny.preprocessing),
        **to_builtins(vars(interface_sections(graph, tiny.tensors, options))),
        engine={"flavour": "none", "reason": "--engine none was asked for"} if tiny.engine == "none" else engine,
        validation={"passed": True, "level": "graph", "tolerances": manifests.tolerances(*bounded)},
    )
    return convert(content, Manifest)
