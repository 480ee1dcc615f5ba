"""What the file of a version says of itself: its tensors, and the batches that it accepts.

An ONNX graph tells its tensors. A plan cannot be read without TensorRT and a GPU, so what the bundle's manifest beside
it says is taken, which holds for exactly the bytes whose SHA-256 it names.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from spach_deploy.bundle import GRAPH, PLAN, Manifest, TensorInfo
from spach_deploy.deployment.triton.repository import FACTS
from spach_deploy.errors import BundleError, UsageError
from spach_deploy.specs import BatchProfile


@dataclasses.dataclass(frozen=True)
class Facts:
    """Tensors by name, their shapes with None for a free extent. `profile` None: not known.

    `source` names the file that the tensors come from. `digest` is the SHA-256 that the served file must have, where
    the bundle it came from is known.
    """

    source: str
    inputs: dict[str, TensorInfo]
    outputs: dict[str, TensorInfo]
    profile: BatchProfile | None = None
    digest: str | None = None


def artifact_facts(version: Path, file_name: str, backend: str) -> Facts | None:
    """Facts of a version's file; None where there are none, which `check_files` reports."""
    manifest = bundle_manifest(version)
    graph = graph_tensors(version / file_name) if backend == "onnxruntime" else None
    if manifest is None:
        return None if graph is None else Facts(f"{version.name}/{file_name}", *graph)
    inputs, outputs = graph or (_by_name(manifest.inputs), _by_name(manifest.outputs))
    source = f"{version.name}/{file_name if graph else FACTS}"
    digest = manifest.files.get(GRAPH if backend == "onnxruntime" else PLAN)
    return Facts(source, inputs, outputs, _profile(manifest), digest)


def bundle_manifest(version: Path) -> Manifest | None:
    """The bundle's manifest of a version; None where it is absent or cannot be read."""
    try:
        return Manifest.read(version / FACTS)
    except BundleError:
        return None


def graph_tensors(path: Path) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo]] | None:
    """Inputs and outputs of an ONNX file; None for what is none."""
    import onnx

    try:
        graph = onnx.load(path, load_external_data=False).graph
        constants = {tensor.name for tensor in graph.initializer}
        inputs = _by_name([_tensor(value) for value in graph.input if value.name not in constants])
        outputs = _by_name([_tensor(value) for value in graph.output])
    except Exception:  # protobuf's own exceptions, OSError, and types that NumPy has no name for
        return None
    return (inputs, outputs) if graph.node else None


def _tensor(value: object) -> TensorInfo:
    from onnx import TensorProto, ValueInfoProto, helper

    assert isinstance(value, ValueInfoProto)
    kind = value.type.tensor_type
    is_bfloat = kind.elem_type == TensorProto.BFLOAT16
    dtype = "bfloat16" if is_bfloat else str(helper.tensor_dtype_to_np_dtype(kind.elem_type))
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim)
    return TensorInfo(value.name, dtype, shape)


def _by_name(tensors: list[TensorInfo] | tuple[TensorInfo, ...]) -> dict[str, TensorInfo]:
    return {tensor.name: tensor for tensor in tensors}


def _profile(manifest: Manifest) -> BatchProfile | None:
    try:
        return BatchProfile(**manifest.content["batch"])
    except (TypeError, UsageError):
        return None
