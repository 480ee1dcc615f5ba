"""A bundle's manifest as the specs and tolerances that a validation works with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.inputs import ModelInputs
from spach_deploy.bundle.schema import QuantizationSection, TensorInfo, reading
from spach_deploy.bundle.store import GOLDEN, GRAPH, MANIFEST, Bundle
from spach_deploy.common.errors import BundleError, UsageError
from spach_deploy.models.hyperparameters import read_section
from spach_deploy.options.specs import BatchProfile, Flavour, IODtype, Precision, Preprocessing
from spach_deploy.validation.tolerance import ToleranceSet

if TYPE_CHECKING:
    from torch import nn

    from spach_deploy.quantization.plan import QuantizationPlan


SERVE_SEVERAL = "Write it with spach-package triton or polygraphy, or run it with Session.run (docs/python.md)."
"""The next step where something takes graphs of one input alone."""


@dataclasses.dataclass(frozen=True)
class QuantizationFacts:
    """What a quantized bundle was made with.

    `record`: the file of its quantization plan. `weights_sha256`: of the calibrated weights. `disabled`: as
    `rewrites_left_out` says. `quantize`: the option. `in_float`: as the manifest says.
    """

    record: Path
    weights_sha256: str
    disabled: tuple[str, ...]
    quantize: tuple[str, ...]
    in_float: tuple[str, ...] = ()

    def static_model(self, model: nn.Module) -> nn.Module:
        """The static model of the reference `model`, as the quantization plan knows it."""
        from spach_deploy.blocks import rewrite

        return rewrite(model, self.disabled, self.quantize, in_float=self.in_float).model


@dataclasses.dataclass(frozen=True)
class BundleFacts:
    """A manifest's specs. `rest`: precision of layers that are not quantized. `tf32`: whether the engine may use
    TF32. `inputs`, `outputs`: those of the graph. `pack`: the golden pack's file.
    """

    precision: Precision
    rest: Precision
    preprocessing: Preprocessing
    io_dtype: IODtype
    outputs: tuple[TensorInfo, ...]
    batch: BatchProfile
    flavour: Flavour
    tolerances: ToleranceSet
    tf32: bool
    quantization: QuantizationFacts | None = None
    inputs: tuple[TensorInfo, ...] = ()
    pack: Path | None = None

    @functools.cached_property
    def takes(self) -> ModelInputs:
        """What the model takes: of several inputs those that are no images have the golden pack's values. BundleError
        where that cannot be read.
        """
        if self.pack is None or len(self.inputs) < 2:
            return ModelInputs()
        return ModelInputs.of_batch(Golden.load(self.pack).batch(self.inputs), self.inputs)

    def check_one_input(self, what: str, hint: str) -> None:
        """UsageError where the graph has several inputs, and `what` cannot feed these."""
        if len(self.inputs) > 1:
            names = ", ".join(tensor.name for tensor in self.inputs)
            raise UsageError(f"The bundle's graph has several inputs ({names}), and {what}.", hint)

    @classmethod
    def of(cls, bundle: Bundle) -> BundleFacts:
        """Read the manifest. BundleError where an entry is of the wrong kind."""
        manifest, where = bundle.manifest, str(bundle.path / MANIFEST)
        with reading(where, "model"):
            read_section(manifest.model.hyperparameters)
        with reading(where, "validation"):
            tolerances = ToleranceSet.of(manifest.validation.tolerances)
        return cls(
            manifest.precision.asked,
            manifest.precision.rest or manifest.precision.asked,
            manifest.preprocessing,
            manifest.output_options.io_dtype,
            manifest.outputs,
            manifest.batch,
            manifest.engine.flavour,
            tolerances,
            manifest.engine.tf32,
            None if manifest.quantization is None else _quantization(bundle, manifest.quantization),
            manifest.inputs,
            bundle.path / GOLDEN,
        )


def read_record(facts: BundleFacts) -> QuantizationPlan | None:
    """The quantization plan of a quantized bundle; None for others."""
    if facts.quantization is None:
        return None
    from spach_deploy.quantization.plan import read_plan

    return read_plan(facts.quantization.record)


def _quantization(bundle: Bundle, section: QuantizationSection) -> QuantizationFacts:
    record, made = bundle.path / section.scales, section.rewrites
    weights, disabled = section.calibration.weights_sha256, rewrites_left_out(bundle)
    return QuantizationFacts(record, weights, disabled, made.quantize, made.in_float)


def rewrites_left_out(bundle: Bundle) -> tuple[str, ...]:
    """Rewrites and passes without which a bundle was made: turned off, of another runtime, or of a later version."""
    from spach_deploy.blocks import REWRITES
    from spach_deploy.graph.passes import TENSORRT_PASSES

    graph, quantization = bundle.manifest.graph, bundle.manifest.quantization
    off = [name for name, entry in graph.rewrites.items() if any("--no-rewrite" in why for why in entry.skipped)]
    later = [step.name for step in REWRITES if graph.rewrites and step.name not in graph.rewrites]
    passes = [step.name for step in TENSORRT_PASSES if step.name not in graph.passes]
    asked = () if quantization is None else quantization.rewrites.disabled
    return tuple(dict.fromkeys([*off, *later, *passes, *asked]))


def check_interface(bundle: Bundle) -> None:
    """BundleError where inputs or outputs of the manifest are not those of the bundle's graph."""
    graph = graph_tensors(bundle.path / GRAPH)
    if graph is None:  # its reader says what is wrong with it
        return
    for kind, listed, found in zip(
        ("input", "output"), (bundle.manifest.inputs, bundle.manifest.outputs), graph, strict=True
    ):
        said = {tensor.name: _type(tensor) for tensor in listed}
        real = {name: _type(tensor) for name, tensor in found.items()}
        for name in (*said, *real):
            if (given := said.get(name, "none")) != (has := real.get(name, "none")):
                problem = f"{bundle.path / MANIFEST} says of {kind} {name}: {given}; {GRAPH} has {has}."
                raise BundleError(problem, "Export the bundle again.")


def _type(tensor: TensorInfo) -> str:
    return f"{tensor.dtype} [{', '.join('N' if size is None else str(size) for size in tensor.shape)}]"


def graph_tensors(path: Path) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo]] | None:
    """Inputs and outputs of an ONNX file; None for any other file."""
    import onnx

    try:
        graph = onnx.load(path, load_external_data=False).graph
        constants = {tensor.name for tensor in graph.initializer}
        inputs = by_name([_tensor(value) for value in graph.input if value.name not in constants])
        outputs = by_name([_tensor(value) for value in graph.output])
    except Exception:  # protobuf's own exceptions, OSError, and data types without a NumPy dtype
        return None
    return (inputs, outputs) if graph.node else None


def _tensor(value: object) -> TensorInfo:
    from onnx import TensorProto, ValueInfoProto, helper

    assert isinstance(value, ValueInfoProto)
    kind = value.type.tensor_type
    is_bfloat = kind.elem_type == TensorProto.BFLOAT16
    dtype = "bfloat16" if is_bfloat else str(helper.tensor_dtype_to_np_dtype(kind.elem_type))
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim)
    return TensorInfo(name=value.name, dtype=dtype, shape=shape)


def by_name(tensors: Iterable[TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors by their names."""
    return {tensor.name: tensor for tensor in tensors}
