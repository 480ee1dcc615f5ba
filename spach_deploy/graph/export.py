"""Static PyTorch model -> FP32 ONNX graph: torch.onnx.export, onnxsim, node names by module, symbolic batch.

Two things save time, and neither changes the graph:

- Only one block of each kind is traced; its nodes are repeated with the other blocks' weights (`block_prototype.py`).
- The batch is traced as a fixed number and made symbolic afterwards (`free_batch`), because torch.onnx takes twice the
  time with a symbolic one. The static model has the batch first in every tensor and states it in reshapes only.

The result is compared with PyTorch at several batch sizes, like any other graph.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx import ModelProto
from torch import Tensor, nn

from spach_deploy.blocks.backbone import StaticSpach
from spach_deploy.bundle.outputs import INPUT
from spach_deploy.common.errors import CertificateError, ModelError
from spach_deploy.common.metrics import relative_l2
from spach_deploy.graph.block_prototype import (
    Parameters,
    Prototype,
    block_of,
    make_prototype,
    part_outputs,
    replace_stand_ins,
    stamp_blocks,
    with_ordinary_weights,
    with_stand_ins,
)
from spach_deploy.graph.editing import array_of, as_proto, name_by_module, name_of, name_unowned
from spach_deploy.graph.passes.block_boundaries import restore_block_boundaries
from spach_deploy.models.outputs import SelectableOutputs
from spach_deploy.models.own_module import OwnForward, drawn, flattened, place_in, place_of_forward
from spach_deploy.options.specs import OPSET, ImageSize, sides
from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner, saved_graph

BATCH = "batch"
_TRACED_BATCH, _OTHER_BATCH = 3, 2
_ROUNDING = 1e-4
"""Relative L2 that rounding may cause between PyTorch and a graph in ONNX Runtime. Later steps compare closely."""

_REWRITE_IT = "Write it with operations on tensors alone, without branches on their values or conversions to Python."


def free_batch(model: ir.Model, traced: int, name: str) -> None:
    """Make the batch of a graph symbolic, in place, that was traced with the fixed batch `traced`.

    Inputs and outputs get the symbolic dimension `name` first; reshapes to (traced * n, ...) become
    reshapes to (-1, ...). Raises CertificateError for a reshape whose first extent is no multiple of `traced`, or that
    has a -1 already.
    """
    graph = model.graph
    for value in (*graph.inputs, *graph.outputs):
        _check_batch(value, traced)
        assert value.shape is not None
        value.shape = ir.Shape([name, *value.shape[1:]])
    for node in graph:
        shape = node.inputs[1] if node.op_type == "Reshape" else None
        extents = array_of(shape)
        if shape is not None and extents is not None and extents[0] > 0:
            freed = np.array(_freed(extents.tolist(), traced, name_of(node)), np.int64)
            shape.const_value = ir.Tensor(freed, name=shape.name)


def _freed(shape: list[int], traced: int, node: str) -> list[int]:
    if shape[0] % traced or -1 in shape:
        raise CertificateError(f"{node} reshapes to {shape}, from which the batch cannot be told.")
    return [-1, *shape[1:]]


def _check_batch(value: ir.Value, traced: int) -> None:
    """CertificateError for an input or output that is not a batch."""
    if not value.shape or value.shape[0] != traced:
        raise CertificateError(f"{value.name} has the shape {value.shape}, which does not begin with the batch.")


def export_module(
    model: nn.Module,
    example: Mapping[str, Tensor],
    outputs: Sequence[str],
    feeds: Callable[[int], Mapping[str, Tensor]] | None = None,
) -> ir.Model:
    """ONNX graph of any module, opset 20, with a symbolic batch first in every input and output.

    `example`: inputs by the names that the graph's inputs get, in the order of the module's arguments, each with a
    batch of 1 or more. `outputs`: names of what it returns, in the order of a tuple's or dictionary's values. `feeds`:
    a batch of this size by name, by default random numbers in the example's shapes.

    It is traced with a fixed batch, as reshapes to known sizes; where that is not right for other batches, with a
    symbolic one. Raises ModelError, with the module and the line, for what cannot be traced.
    """
    feeds = feeds or functools.partial(_random, example)
    fed = feeds(_TRACED_BATCH)
    for traced in (_repeated, _whole):
        with contextlib.suppress(CertificateError):
            graph = traced(model, fed, outputs)
            if _is_right(graph, model, feeds(_OTHER_BATCH)):
                return graph
    program = _program(model, fed, outputs, symbolic=True)
    _check_is_free(program, model)
    return _named(program, model)


def _check_is_free(program: ir.Model, model: nn.Module) -> None:
    """ModelError where a trace with a symbolic batch has a fixed one, which torch.onnx tries next and does not say."""
    if any(value.shape and isinstance(value.shape[0], int) for value in program.graph.inputs):
        raise ModelError(
            f"The forward of {place_of_forward(model)}, or of a part of it, fixes the batch: what it does, such as a"
            " loop over the images, is traced for one size.",
            "Write it with operations on the whole batch.",
        )


def _whole(model: nn.Module, fed: Mapping[str, Tensor], outputs: Sequence[str]) -> ir.Model:
    """The graph of all of `model`. CertificateError where its batch cannot be made symbolic."""
    program = _program(model, fed, outputs)
    free_batch(program, _TRACED_BATCH, BATCH)
    return _named(program, model)


def _repeated(model: nn.Module, fed: Mapping[str, Tensor], outputs: Sequence[str]) -> ir.Model:
    """The same, with one block traced of those that differ in weights alone. CertificateError where that is not so, or
    where the batch cannot be made symbolic.
    """
    prototype = with_ordinary_weights(with_stand_ins(model))
    blocks = {path for paths in prototype.repeats.values() for path in paths}
    program = _program(prototype.model, fed, outputs)
    free_batch(program, _TRACED_BATCH, BATCH)
    name_by_module(program)
    program = replace_stand_ins(program, prototype, model)
    _as_inputs(program.graph, blocks, least_rank=2)
    graph = ir.from_proto(simplify(as_proto(program)))
    _as_initializers(graph.graph, len(fed), Parameters(model))
    name_unowned(graph, [path for path, _ in model.named_modules(remove_duplicate=False)])
    return graph


def _as_initializers(graph: ir.Graph, inputs: int, parameters: Parameters) -> None:
    """Turn weights, which `_as_inputs` has made graph inputs after the first ones, back into initializers, in place."""
    for value in graph.inputs[inputs:]:
        graph.inputs.remove(value)
        value.const_value = parameters.get(name_of(value))
        graph.register_initializer(value)


def _random(example: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
    """A batch of inputs of the example's shapes, each of them another: equal ones would hide that images are mixed
    up.
    """
    generator = torch.Generator().manual_seed(batch)
    return {name: torch.rand(batch, *tensor.shape[1:], generator=generator) for name, tensor in example.items()}


def _like_example(model: OwnForward, batch: int) -> dict[str, Tensor]:
    """A batch of inputs like those that a user's own module was run on."""
    return dict(zip(model.takes.names, drawn(model.takes, batch, seed=batch), strict=True))


def _named(program: ir.Model, model: nn.Module) -> ir.Model:
    """The simplified graph, with its nodes named by modules."""
    name_by_module(program)
    graph = ir.from_proto(simplify(as_proto(program)))
    name_unowned(graph, [path for path, _ in model.named_modules(remove_duplicate=False)])
    return graph


def _is_right(graph: ir.Model, model: nn.Module, feeds: Mapping[str, Tensor]) -> bool:
    """Whether the graph computes what the module computes at the batch of `feeds`, but for rounding."""
    with torch.inference_mode():
        expected = flattened(model(*feeds.values()))
    try:
        with saved_graph(graph) as path, OnnxRuntimeRunner(path, optimization="none") as runner:
            found = runner.run({name: tensor.numpy() for name, tensor in feeds.items()})
    except Exception:  # a graph whose batch is not free fails as its operators like
        return False
    return all(
        value.shape == tuple(wanted.shape) and relative_l2(value, wanted.numpy()) <= _ROUNDING
        for value, wanted in zip(found.values(), expected, strict=True)
    )


def _program(
    model: nn.Module, example: Mapping[str, Tensor], outputs: Sequence[str], *, symbolic: bool = False
) -> ir.Model:
    """What torch.onnx makes of a module. ModelError for what it cannot trace."""
    batch = {0: torch.export.Dim(BATCH)} if symbolic else None
    try:
        with quiet_exporter():
            program = torch.onnx.export(
                model,
                tuple(example.values()),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(example),
                output_names=list(outputs),
                dynamic_shapes=None if batch is None else _shapes(model, [batch for _ in example]),
                verbose=False,
            )
    except Exception as error:  # torch.export raises what it likes
        raise ModelError(f"torch.export cannot trace {_place(model, error)}.", _REWRITE_IT) from error
    assert program is not None
    return program.model


def is_alike_in_batches(model: OwnForward, largest: int) -> bool:
    """Whether torch.export finds that a user's module does the same in every batch of 2 to `largest`: that its forward
    neither branches on the size of the batch nor takes it for a constant. False also for what it cannot trace.
    """
    inputs = model.example(_TRACED_BATCH)
    batch = {0: torch.export.Dim(BATCH, min=2, max=max(largest, _TRACED_BATCH))}
    try:
        with quiet_exporter():
            torch.export.export(model, inputs, dynamic_shapes=_shapes(model, [batch for _ in inputs]), strict=False)
    except Exception:  # torch.export raises what it likes
        return False
    return True


def _shapes(model: nn.Module, inputs: list[dict[int, Any]]) -> tuple[Any, ...]:
    """Dynamic shapes in the structure of the arguments of forward, which may be `*inputs`."""
    kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
    return (tuple(inputs),) if inspect.Parameter.VAR_POSITIONAL in kinds[:1] else tuple(inputs)


def _place(model: nn.Module, error: BaseException) -> str:
    """The module and line of the model's own code at which tracing ended, and why, in words."""
    cause = error
    while (earlier := cause.__cause__ or cause.__context__) is not None:
        cause = earlier
    reason = str(cause).strip().splitlines()
    if reason and "data-dependent" in reason[0]:
        reason = ["what it does depends on the values of a tensor"]
    why = reason[0].rstrip(".") if reason else type(cause).__name__
    return f"{place_in(model, error) or type(model).__name__}: {why}"


def export_canonical(model: nn.Module, image_size: ImageSize, channels: int = 3) -> ir.Model:
    """ONNX graph of `model`: input (batch, channels, H, W) float32 -> its outputs (batch, ...) float32, opset 20.

    H and W are `image_size` in pixels; the batch is symbolic. The initializers share the memory of the model's
    parameters.
    Raises CertificateError for a graph whose batch cannot be made symbolic, whose blocks cannot be repeated, or that
    onnxsim computes differently.
    """
    if not isinstance(model, StaticSpach):
        assert isinstance(model, SelectableOutputs)
        names = [tensor.name for tensor in model.outputs]
        if isinstance(model, OwnForward):
            return export_module(model, {}, names, functools.partial(_like_example, model))
        example = torch.zeros(1, channels, *sides(image_size))
        return _repeated(model, _random({INPUT: example}, _TRACED_BATCH), names)
    prototype = make_prototype(model)
    return stamp_blocks(_traced(prototype, (channels, *sides(image_size))), prototype.repeats, model)


def _traced(prototype: Prototype, shape: tuple[int, int, int]) -> ir.Model:
    """The prototype's graph, named by modules and simplified. Its blocks' weights are graph inputs, after the first."""
    ordinary = with_ordinary_weights(prototype).model
    assert isinstance(ordinary, StaticSpach)
    names = [tensor.name for tensor in ordinary.outputs]
    exported = _program(ordinary, {INPUT: torch.zeros(_TRACED_BATCH, *shape)}, names)
    free_batch(exported, _TRACED_BATCH, BATCH)
    _as_inputs(exported.graph, prototype.repeats)
    name_by_module(exported)
    model = ir.from_proto(simplify(as_proto(exported)))
    restore_block_boundaries(model, is_grid=ordinary.grid_stream)
    part_outputs(model, prototype.repeats)
    return model


def _as_inputs(graph: ir.Graph, blocks: Collection[str], least_rank: int = 1) -> None:
    """Turn the float weights of `blocks` with `least_rank` axes or more from initializers into graph inputs, in place.

    They are most of the bytes, and the simplifier would copy them several times. Of a prototype, nothing may be folded
    into them either.
    """
    for name, value in list(graph.initializers.items()):
        is_weight = value.dtype == ir.DataType.FLOAT and len(value.shape or ()) >= least_rank
        if is_weight and block_of(name, blocks) is not None:
            graph.initializers.pop(name)
            value.const_value = None
            graph.inputs.append(value)


def simplify(model: ModelProto) -> ModelProto:
    """`model` after onnxsim's constant folding and fusions. Raises CertificateError when onnxsim reports a
    difference.
    """
    import onnxsim

    simplified, equal = onnxsim.simplify(model, check_n=0)
    if not equal:
        raise CertificateError("onnxsim's simplified graph differs from the exported one.")
    result: ModelProto = simplified
    return result


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence what torch prints and logs while it exports: progress, warnings about packages that are not needed, and
    the graph up to where it failed. Exceptions still come.
    """
    silent = io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
