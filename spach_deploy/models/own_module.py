"""A model of the user's own: any nn.Module, given as an object or made by the user's factory.

Its inputs are those of an example, its outputs what it returns for that: a tensor, or a tuple, list or dictionary of
them. Nothing of the user's module is changed, and its `forward` is called as it is.

Copies of a module share its tensors.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib
import inspect
import os
import re
import sys
import time
import traceback
import types
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from spach_deploy.bundle.inputs import ROWS, ModelInputs, rows_of
from spach_deploy.bundle.outputs import DERIVED, INPUT, graph_outputs, named
from spach_deploy.bundle.schema import TensorInfo
from spach_deploy.common.errors import CheckpointError, ModelError, SpachError, UsageError
from spach_deploy.common.machine import find_memory
from spach_deploy.common.metrics import relative_l2
from spach_deploy.models.checkpoint import LoadedModel, load_model, read_values
from spach_deploy.models.checkpoint_content import shown
from spach_deploy.models.hyperparameters import OF_PIXELS, Setting, Source, check_pixels, for_channels, resolve_settings
from spach_deploy.models.outputs import SelectableOutputs
from spach_deploy.models.registry import check_spec, create_model, published_match
from spach_deploy.options.architecture import Architecture
from spach_deploy.options.specs import (
    ImageSize,
    ModelSpec,
    OutputSpec,
    Role,
    channel_statistics,
    sides,
    size_in_words,
    size_of_sides,
)

FORM = "package.module:factory"


def made_by(factory: str) -> tuple[nn.Module, ExampleInputs | None]:
    """The module that the user's `factory`, `package.module:name`, makes or is, and example inputs of it: those that
    the factory returns beside it, else the module's attribute `example_inputs`, else None. Runs the user's code.

    Modules are looked for in the current directory too, as `python -m` does. UsageError, with the user's own file and
    line, for one that cannot be imported, fails, or gives something else.
    """
    where, _, name = factory.partition(":")
    if not where or not name:
        raise UsageError(f"--module {factory!r} is not a factory.", f"Give --module {FORM}.")
    with _users_code(factory):
        found: Any = importlib.import_module(where)
        for part in name.split("."):
            found = getattr(found, part)
        made = found if isinstance(found, nn.Module) else found()
        module, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
        example = getattr(module, "example_inputs", None) if example is None else example
    if not isinstance(module, nn.Module):
        kind = type(made).__name__
        hint = f"Give {FORM} that returns a module, or a module and its example inputs."
        raise UsageError(f"--module {factory} gave a {kind}, not an nn.Module.", hint)
    return module, example


@contextlib.contextmanager
def _users_code(factory: str) -> Iterator[None]:
    """Import from the current directory too; any exception becomes a UsageError with the user's line."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    except (Exception, SystemExit) as error:  # the user's code raises what it likes
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename != __file__ and "importlib" not in frame.filename]
        where = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
        raise UsageError(f"--module {factory} cannot be made: {_reason(error)}{where}.", f"Give {FORM}.") from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)


def load_values(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Load a checkpoint's tensors into the user's module. CheckpointError that lists what does not fit."""
    needed = module.state_dict()
    problems = {
        "missing": [name for name in needed if name not in values and not name.endswith("num_batches_tracked")],
        "not the module's": [name for name in values if name not in needed],
        "of another shape": [
            f"{name} is {list(values[name].shape)} instead of {list(tensor.shape)}"
            for name, tensor in needed.items()
            if name in values and values[name].shape != tensor.shape
        ],
    }
    found = [f"{len(names)} {what} ({shown(names)})" for what, names in problems.items() if names]
    if found:
        raise CheckpointError(
            f"The checkpoint does not fit the module: {'; '.join(found)}.",
            "Give the checkpoint of this module; --ignore PATTERN drops tensors that are not its own.",
        )
    module.load_state_dict(dict(values), strict=False)


ExampleInputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""Example inputs: a tensor, several in the order of forward's arguments, or a dictionary by these arguments' names."""

INPUT_DTYPES = (torch.float32, torch.int64, torch.int32, torch.bool)
"""Dtypes of inputs that are no images."""


def input_names(module: nn.Module, count: int) -> list[str]:
    """Names of a graph's inputs: `input` for one, else those of forward's arguments."""
    if count == 1:
        return [INPUT]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [
        _usable(name)
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.kind in kinds
    ]
    if len(names) < count:
        names = [f"input_{index}" for index in range(count)]
    return names[:count]


def _image_inputs(named: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Which inputs are images (B, C, H, W): the first of 3 channels, else of 1, else of any; and all of its shape."""
    maps = {name: tensor for name, tensor in named.items() if tensor.ndim == 4 and tensor.dtype == torch.float32}
    by_channels = sorted(maps, key=lambda name: (maps[name].shape[1] != 3, maps[name].shape[1] != 1))
    return tuple(name for name in [*by_channels[:1], *maps] if maps[name].shape[1:] == maps[by_channels[0]].shape[1:])


def taken_inputs(named: Mapping[str, Tensor]) -> ModelInputs:
    """What a module takes, from example inputs by the graph's names. ModelError for what no graph takes."""
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            hint = "Give tensors; those of a dictionary go to the arguments of forward that have their names."
            raise ModelError(f"The example input {name} is a {type(tensor).__name__}, no tensor.", hint)
        if tensor.ndim < 2 or not all(tensor.shape):
            shape = tuple(tensor.shape)
            hint = "Give tensors such as (1, 3, H, W); (B, 1) for a number of each image."
            raise ModelError(f"The example input {name} has the shape {shape}, no tensor with a batch first.", hint)
        if tensor.dtype not in INPUT_DTYPES or tensor.device.type != "cpu" or tensor.layout != torch.strided:
            where = "" if tensor.device.type == "cpu" else f" on {tensor.device.type}"
            sparse = "" if tensor.layout == torch.strided else ", sparse"
            raise ModelError(
                f"The example input {name} is {_kind(tensor)}{where}{sparse}.",
                "Give float32 on the CPU; what is no image may be int64, int32 or bool too.",
            )
    images = tuple(dict.fromkeys(_image_inputs(named)))
    if not images:
        shapes = ", ".join(f"{name} {_kind(tensor)} {tuple(tensor.shape)}" for name, tensor in named.items())
        raise ModelError(
            f"The module takes {shapes}; what takes images, float32 (B, C, H, W), can be exported.",
            "Export the part of it that does.",
        )
    rows = {name: rows_of(tensor.numpy()) for name, tensor in named.items() if name not in images}
    return ModelInputs(tuple(named), images, rows, tuple(named[images[0]].shape[1:]))


def _kind(tensor: Tensor) -> str:
    """A tensor's dtype, as it is written."""
    return str(tensor.dtype).removeprefix("torch.")


def output_names(outputs: Any, prefix: str = "") -> list[str]:
    """Names of what a module returned, in order: a dictionary's keys, a named tuple's or dataclass's fields, `output`
    for one tensor, `output_0`, `output_1` for several; within these, joined by underscores. None within these, such as
    a loss in training alone, is left out.
    """
    if isinstance(outputs, Tensor):
        return [prefix or "output"]
    outputs = _as_dictionary(outputs)
    named = outputs.items() if isinstance(outputs, Mapping) else enumerate(outputs)
    start = f"{prefix}_" if prefix else "" if isinstance(outputs, Mapping) else "output_"
    parts = [(key, value) for key, value in named if value is not None]
    return [name for key, value in parts for name in output_names(value, _usable(f"{start}{key}"))]


def _as_dictionary(outputs: Any) -> Any:
    """A named tuple or a dataclass as a dictionary of its fields; anything else as it is."""
    if isinstance(outputs, tuple) and hasattr(outputs, "_asdict"):
        return outputs._asdict()
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, (type, Mapping)):
        return {field.name: getattr(outputs, field.name) for field in dataclasses.fields(outputs)}
    return outputs


def _usable(name: str) -> str:
    """A name that every package can hold: letters, digits, hyphens and underscores, and a letter first."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:64]
    return plain if plain[:1].isalpha() else f"output_{plain}"[:64]


def flattened(outputs: Any) -> list[Tensor]:
    """The tensors that a module returned: one, or those of a tuple, list, dictionary or dataclass, in order. None is
    left out; ModelError for what else is among them.
    """
    if isinstance(outputs, Tensor):
        return [outputs]
    outputs = _as_dictionary(outputs)
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    if isinstance(outputs, tuple | list):
        return [tensor for part in outputs if part is not None for tensor in flattened(part)]
    raise ModelError(
        f"The model returns {type(outputs).__name__}, and a graph returns tensors.",
        "Return a tensor, or a tuple, dictionary or dataclass of tensors.",
    )


class OwnForward(SelectableOutputs):
    """What `prepared` adds to the class of a user's module: the outputs that are exported, in order, as tensors.

    `takes`: its inputs. `arguments`: names of forward's arguments for them; empty where they go by their order.
    """

    returned: tuple[str, ...]
    takes: ModelInputs
    arguments: tuple[str, ...]

    def example(self, count: int = 1) -> tuple[Tensor, ...]:
        """A batch of `count` inputs, in order."""
        return tuple(drawn(self.takes, count))

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The chosen outputs in order; one alone as it is."""
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # it reads weights past the modules, in one operator
        try:
            returned = _given_to(super().forward, self.arguments, inputs)  # of the user's class
        except (Exception, SystemExit) as error:  # the user's code raises what it likes
            if torch.compiler.is_compiling():  # the tracer has exceptions of its own
                raise
            raise _failure(self, inputs, error) from error
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
        by_name = dict(zip(output_names(returned), flattened(returned), strict=True))
        tensors = tuple(by_name[name] for name in self.returned)
        return tensors[0] if len(tensors) == 1 else tensors


def _given_to(forward: Callable[..., Any], arguments: Sequence[str], inputs: Sequence[Tensor]) -> Any:
    """What `forward` returns for inputs in order, which go to these `arguments`, or by their order."""
    return forward(**dict(zip(arguments, inputs, strict=True))) if arguments else forward(*inputs)


_ATTRIBUTES = ("outputs", "returned", "takes", "arguments")
"""What `prepared` sets on a copy of the user's module."""


def prepared(module: nn.Module, outputs: Sequence[TensorInfo], example: Example) -> OwnForward:
    """A copy of the user's module that returns the example's outputs in order, as `outputs` says; it shares tensors.

    Its submodules have the same paths, and its `forward` calls the user's. ModelError for attributes that it needs.
    """
    if taken := [name for name in _ATTRIBUTES if hasattr(module, name)]:
        raise ModelError(f"Your module has an attribute {taken[0]!r}, which this package needs.", "Rename it.")
    kind = type(module)
    made: Any = own(module)
    made.__class__ = type(kind.__name__, (OwnForward, kind), {"__module__": kind.__module__})
    made.outputs, made.returned = tuple(outputs), tuple(example.outputs)
    made.takes, made.arguments = example.takes, example.arguments
    assert isinstance(made, OwnForward)
    return made


@dataclasses.dataclass(frozen=True)
class Example:
    """Inputs of a module, a batch of one, by the graph's names, and what it returns for them, by name.

    `takes`, `arguments`: as in `OwnForward`. `notes`: what may surprise, in sentences.
    """

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    takes: ModelInputs = dataclasses.field(default_factory=ModelInputs)
    arguments: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


_SAME = 1e-3
"""Relative L2 up to which two answers are the same but for rounding."""

_OTHER_BATCH = 3


def run_example(module: nn.Module, inputs: ExampleInputs) -> Example:
    """Run the module on inputs like the example's. What it computes has to be the same every time and for every batch.

    Of images the example tells the shape alone, of other inputs values too (`bundle.inputs.rows_of`). ModelError where
    it fails, changes itself, draws at random and mixes images up, and where an input or output is not a batch that a
    graph has.
    """
    named, arguments = named_inputs(module, inputs)
    takes = taken_inputs(named)
    several = drawn(takes, _OTHER_BATCH)
    one = [tensor[:1] for tensor in several]
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    given = [tensor.clone() for tensor in one]
    with _seeing_halves(module) as halves, SeeingValues() as values, _refusing_hidden(module):
        returned, again, together = (_called(module, arguments, tensors) for tensors in (one, one, several))
    pairs = zip(takes.names, given, one, strict=True)
    changed = [f"its {name}" if takes.is_single else f"its input {name}" for name, *two in pairs if not _is_same(*two)]
    changed += [f"its buffer {name}" for name, now in module.named_buffers() if not _is_same(before[name], now)]
    for name, buffer in module.named_buffers():
        buffer.data = before[name]
    if halves:
        raise ModelError(
            f"{next(iter(halves))} computes in 16 bits, as under torch.autocast, so it is no reference in FP32.",
            "Take autocast out of its forward; --fp16 and --bf16 set the types of the graph.",
        )
    found = [flattened(outputs) for outputs in (returned, again, together)]
    names = output_names(returned)
    if not names or len({len(tensors) for tensors in found}) > 1:
        what = "no tensors" if not names else "more outputs for some batches than for others"
        raise ModelError(f"The module returns {what}.", "Return the same tensors for every batch.")
    for name, first, second, third in zip(names, *found, strict=True):
        _check_output(name, first, second, third, changed)
    tensors = dict(zip(names, flattened(returned), strict=True))
    if len(tensors) < len(names):
        raise ModelError(f"Two outputs of the module are called alike: {', '.join(names)}.", "Give them other names.")
    takes = _apart(takes, tensors)
    return Example(dict(zip(takes.names, one, strict=True)), tensors, takes, arguments, tuple(values.notes()))


def _is_same(before: Tensor, now: Tensor) -> bool:
    """Whether a tensor has the values that it had, NaN among them."""
    return bool(torch.equal(before.nan_to_num(), now.nan_to_num()) and torch.equal(before.isnan(), now.isnan()))


class SeeingValues(TorchFunctionMode):
    """Sees, within the block, where the user's code takes values of tensors into Python: `bool`, `item`.

    Of what is decided by them a trace knows nothing: torch.export refuses it, unless the code hides it from the trace,
    with a `try` around it or by `torch.compiler.is_exporting()`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, None] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        frame = inspect.currentframe()
        caller = None if frame is None else frame.f_back
        if func in _INTO_PYTHON and caller is not None and is_users_file(caller.f_code.co_filename):
            self.lines[f"{caller.f_code.co_filename}:{caller.f_lineno}"] = None
        return func(*args, **(kwargs or {}))

    def notes(self) -> Iterator[str]:
        """A sentence where there are such lines."""
        if self.lines:
            yield (
                f"your code takes values of tensors into Python ({', '.join(self.lines)}): what it decides by them is"
                " not in the graph"
            )


_INTO_PYTHON = (Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.item, Tensor.tolist)
"""Functions that give the values of a tensor as Python's own."""


@contextlib.contextmanager
def _seeing_halves(module: nn.Module) -> Iterator[dict[str, None]]:
    """Paths of the modules that give halves while they run within the block."""
    halves: dict[str, None] = {}

    def hook_of(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def see(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dtype in (torch.float16, torch.bfloat16):
                halves[path] = None

        return see

    with contextlib.ExitStack() as hooks:
        for path, part in module.named_modules():
            if path:
                hooks.enter_context(part.register_forward_hook(hook_of(path)))
        yield halves


@contextlib.contextmanager
def _refusing_hidden(module: nn.Module) -> Iterator[None]:
    """ModelError, within the block, where a part runs that PyTorch does not see because a list or the like holds it."""
    seen = {id(part) for part in module.modules()}
    with contextlib.ExitStack() as hooks:
        for path, part in module.named_modules():
            for name, value in vars(part).items():
                for hidden in _held(value):
                    if id(hidden) not in seen:
                        refuse = functools.partial(_refuse_hidden, f"{path}.{name}" if path else name, value)
                        hooks.enter_context(hidden.register_forward_pre_hook(refuse))
        yield


def _held(value: Any) -> Iterator[nn.Module]:
    """The modules in a list, a tuple or a dictionary, and in those that it holds."""
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    for one in values:
        if isinstance(one, nn.Module):
            yield one
        else:
            yield from _held(one)


def _refuse_hidden(path: str, holder: Any, part: nn.Module, _inputs: Any) -> None:
    raise ModelError(
        f"{path} keeps parts of the module in a {type(holder).__name__}, where PyTorch does not see them: it neither"
        " puts them into evaluation mode, nor converts or saves them.",
        f"Keep them in an nn.{'ModuleDict' if isinstance(holder, dict) else 'ModuleList'}.",
    )


def named_inputs(module: nn.Module, inputs: ExampleInputs) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Example inputs by the graph's names, and the arguments of forward that they go to (none: by their order)."""
    if isinstance(inputs, Mapping):
        names = input_names(module, 1) if len(inputs) == 1 else [_usable(str(name)) for name in inputs]
        return dict(zip(names, inputs.values(), strict=True)), tuple(map(str, inputs))
    if not isinstance(inputs, Tensor | tuple | list):
        kind = type(inputs).__name__
        raise ModelError(f"The example inputs are a {kind}.", "Give a tensor, a tuple of tensors, or a dictionary.")
    several = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    if not several:
        raise ModelError("There are no example inputs.", "Give tensors such as (1, 3, H, W).")
    return dict(zip(input_names(module, len(several)), several, strict=True)), ()


def _apart(takes: ModelInputs, outputs: Collection[str]) -> ModelInputs:
    """The inputs under names that no output of a graph has."""
    if takes.is_single:
        return takes
    taken = {*outputs, *(role.value for role in (Role.LOGITS, *DERIVED))}
    new = {name: f"{name}_input" if name in taken else name for name in takes.names}
    rows = {new[name]: array for name, array in takes.rows.items()}
    names, images = (tuple(new[name] for name in these) for these in (takes.names, takes.images))
    if len({*names, *outputs}) < len(names) + len(outputs):
        raise ModelError(f"Inputs of the module are called alike: {', '.join(names)}.", "Give them other names.")
    return dataclasses.replace(takes, names=names, images=images, rows=rows)


def drawn(takes: ModelInputs, count: int, seed: int = 0) -> list[Tensor]:
    """A batch of inputs, in order: random images, every one of them another, and rows of the other inputs."""
    generator = torch.Generator().manual_seed(seed)
    images = {name: torch.rand(count, *takes.shape, generator=generator) for name in takes.images}
    rows = takes.rows_for(range(count))
    return [images[name] if name in images else torch.from_numpy(rows[name]) for name in takes.names]


def _called(module: nn.Module, arguments: Sequence[str], inputs: Sequence[Tensor]) -> Any:
    try:
        with torch.inference_mode():
            return _given_to(module, arguments, inputs)
    except ModelError:
        raise
    except (Exception, SystemExit) as error:  # the user's code raises what it likes
        raise _failure(module, inputs, error) from error


def _failure(module: nn.Module, inputs: Sequence[Tensor], error: BaseException) -> ModelError:
    """What the user's code raised, in a sentence that names the part of the module and the line."""
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
    place = place_in(module, error)
    if any(tensor.dtype is torch.float64 for tensor in inputs):
        plain = next(_plain_tensors(module), "")
        return ModelError(
            f"The module computes in FP32 and not in FP64, in which an export is proven: {place} raises"
            f" {_reason(error)}.",
            f"Make {plain}, a tensor that PyTorch does not move with the module, a buffer (register_buffer)."
            if plain
            else "Make the tensors of its forward in the type of its input, such as torch.zeros(n, dtype=x.dtype).",
        )
    return ModelError(
        f"The module fails on an input of {shapes}: {f'{place} raises ' if place else ''}{_reason(error)}.",
        "Give example inputs that it takes (--image-size, or example_inputs in Python), in float32.",
    )


def _plain_tensors(module: nn.Module) -> Iterator[str]:
    """Paths of floating tensors that are attributes of a module, and neither its parameters nor its buffers."""
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                yield f"{path}.{name}" if path else name


def _reason(error: BaseException) -> str:
    """An exception's kind and the first line of its text."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}".rstrip(".: ")


def place_in(model: nn.Module, error: BaseException) -> str:
    """The part of a user's module, and the line of the user's code, where an exception or its cause came from:
    `body.2 (Net.forward, nets.py:12)`; "" where none of the user's code ran.
    """
    paths = {id(module): path or "the model" for path, module in model.named_modules()}
    errors, part, line = [error], "", ""
    while (cause := errors[-1].__cause__ or errors[-1].__context__) is not None:
        errors.append(cause)
    for raised in errors:
        for frame, number in traceback.walk_tb(raised.__traceback__):
            code, owner = frame.f_code, frame.f_locals.get("self")
            if is_users_file(code.co_filename):
                if id(owner) in paths:
                    part = f"{paths[id(owner)]} ({type(owner).__name__}.{code.co_name}, "
                line = f"{code.co_filename}:{number}"
    return f"{part or '('}{line})" if line else ""


def place_of_forward(model: nn.Module) -> str:
    """The class of a user's module and the line of its forward: `Net (nets.py:12)`."""
    codes = (getattr(vars(kind).get("forward"), "__code__", None) for kind in type(model).__mro__)
    own_code = next((code for code in codes if code is not None and is_users_file(code.co_filename)), None)
    where = "" if own_code is None else f" ({own_code.co_filename}:{own_code.co_firstlineno})"
    return f"{type(model).__name__}{where}"


def is_users_file(path: str) -> bool:
    """Whether a file is neither of PyTorch nor of this package, whose own frames a traceback has too."""
    others = (Path(torch.__file__).parent, Path(__file__).parents[1])
    return not path.startswith("<") and not any(Path(path).is_relative_to(folder) for folder in others)


def _check_output(name: str, first: Tensor, again: Tensor, together: Tensor, changed: Sequence[str]) -> None:
    """`again`: of the same input as `first`; `together`: of a batch of `_OTHER_BATCH` that begins with it. `changed`:
    what the module changed as it ran.
    """
    if first.dtype != torch.float32:
        is_float = first.is_floating_point()
        hint = "Return it as float32, with .float()." if is_float else "Leave it out of what it returns."
        raise ModelError(f"The output {name!r} is {_kind(first)}, and a graph's outputs are floats of 32 bits.", hint)
    if first.shape[:1] != (1,) or together.shape != (_OTHER_BATCH, *first.shape[1:]):
        raise ModelError(
            f"The output {name!r} has the shape {tuple(first.shape)} for one image and {tuple(together.shape)} for"
            f" {_OTHER_BATCH}, so it does not begin with the batch.",
            "Return one row for each image.",
        )
    if not first.isfinite().all():
        raise ModelError(
            f"The output {name!r} has numbers that are not finite (infinite or NaN).",
            "Look for a division by zero, a logarithm or an exponential in its forward, and at its weights.",
        )
    if not relative_l2(again.float().numpy(), first.float().numpy()) <= _SAME:
        raise ModelError(
            f"The output {name!r} is another when the module runs again on the same input: it"
            f" {f'changes {shown(changed)}' if changed else 'draws at random, or changes an attribute of itself'}.",
            "An export needs a module that always computes the same.",
        )
    if not relative_l2(together[:1].float().numpy(), first.float().numpy()) <= _SAME:
        raise ModelError(
            f"The output {name!r} of an image depends on the other images of its batch.",
            "An export needs a module that treats each image by itself, as BatchNorm does in evaluation mode.",
        )


_CHECK_SECONDS = 120.0
"""Time that running a module in one of its profile's batches may take before it is left out."""


def check_batches(model: OwnForward, batches: Collection[int]) -> Iterator[str]:
    """Run the module in batches of these sizes: images of each have to get the answers that they get alone.

    Yields a sentence for sizes that were left out, for which the memory or the time does not suffice. ModelError for
    answers that differ, as where `forward` branches on the size of the batch.
    """
    one, memory = model.example(), find_memory()
    with _counting_bytes(model) as sizes:
        _called(model, (), one)
        start = time.perf_counter()
        _called(model, (), one)
        seconds = time.perf_counter() - start
    left_out: dict[str, list[int]] = {}
    for batch in sorted({*batches} - {1}):
        needs = batch * sum(sizes) // 2  # of two runs
        if memory is not None and needs > memory.available_bytes // 2:
            left_out.setdefault("more memory than is free", []).append(batch)
        elif batch * seconds + time.perf_counter() - start > _CHECK_SECONDS:
            left_out.setdefault(f"more than {_CHECK_SECONDS:.0f} s", []).append(batch)
        else:
            _check_batch(model, batch)
    for what, which in left_out.items():
        size = f"{which[0]}" if len(which) == 1 else f"{which[0]} to {which[-1]}"
        yield f"your module was not run in a batch of {size}, which takes {what}"


def _check_batch(model: OwnForward, batch: int) -> None:
    """ModelError where the first, middle or last image of a batch gets another answer than alone."""
    images = model.example(batch)
    together = flattened(_called(model, (), images))
    for row in sorted({0, batch // 2, batch - 1}):
        alone = flattened(_called(model, (), [tensor[row : row + 1] for tensor in images]))
        for info, answer, answers in zip(model.outputs, alone, together, strict=True):
            error = relative_l2(answers[row : row + 1].numpy(), answer.numpy())
            if answers.shape != (batch, *answer.shape[1:]) or not error <= _SAME:
                raise ModelError(
                    f"The output {info.name!r} of an image is another in a batch of {batch} than alone.",
                    "An export needs a module that answers alike for every size of the batch.",
                )


@contextlib.contextmanager
def _counting_bytes(module: nn.Module) -> Iterator[list[int]]:
    """Bytes of every tensor that a part of the module gives while it runs within the block."""
    sizes: list[int] = []

    def see(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            sizes.append(output.nbytes)

    with contextlib.ExitStack() as hooks:
        for part in module.modules():
            hooks.enter_context(part.register_forward_hook(see))
        yield sizes


@dataclasses.dataclass(frozen=True)
class OwnLoadedModel(LoadedModel):
    """A module of the user's own. `example`: a batch of one, by the names of the graph's inputs."""

    example: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def image_size(self) -> ImageSize:
        """Height and width of the images that it takes, in pixels."""
        return size_of_sides(*self.takes.shape[1:])

    @property
    def architecture(self) -> None:
        """A user's module has none."""
        return None

    @property
    def channels(self) -> int:
        """Number of channels of an image."""
        return self.takes.shape[0]

    @property
    def num_classes(self) -> int:
        """Number of classes of its logits; 0 without logits."""
        logits = next((tensor for tensor in self.model.outputs if tensor.role is Role.LOGITS), None)
        return 0 if logits is None else logits.shape[-1] or 0


def load(spec: ModelSpec, takes: ModelInputs | None = None) -> LoadedModel:
    """The user's own module where `spec` names one, else a model of `spach_deploy.models`. `takes`: the inputs of the
    bundle that it is of.
    """
    return load_model(spec) if spec.module is None else load_module(spec, takes)


def load_module(spec: ModelSpec, takes: ModelInputs | None = None) -> LoadedModel:
    """The module that the factory `spec.module` makes, with a checkpoint's weights if one is given.

    Its example inputs are the rows of `takes`, if those are several; what comes with the module (`made_by`); or an
    image of `--image-size`. Raises what `made_by`, `run_example` and `load_values` raise, and UsageError where
    `--image-size` contradicts the example.
    """
    assert spec.module is not None
    check_spec(spec)
    (module, example), sha256 = made_by(spec.module), None
    module = plain_module(module)
    notes = [f"ran {spec.module}, which is your own code"]
    if spec.checkpoint is None:
        notes.append("the weights are those that your code made")
    else:
        values, sha256, more = read_values(spec, tuple(module.state_dict())[:1])
        load_values(module, values)
        notes += more
    size = sides(spec.image_size or 224)
    if takes is not None and not takes.is_single:
        example = _example_of(module, takes)
    elif example is None:
        example = torch.zeros(1, 3, *size)
    loaded = loaded_module(module, example, spec, notes=tuple(notes), sha256=sha256)
    if spec.image_size is not None and sides(loaded.image_size) != size:
        raise UsageError(
            f"--image-size says {size_in_words(spec.image_size)}, and the example inputs of {spec.module} are images of"
            f" {size_in_words(loaded.image_size)}.",
            "Leave --image-size out.",
        )
    return loaded


_MADE_AGAIN_BYTES = 1 << 30
"""Largest module that is made a second time to see whether its weights are the same."""


def draws_weights(factory: str, loaded: LoadedModel) -> bool:
    """Whether the user's factory makes a module with other weights than `loaded` when it is called again."""
    weights = list(loaded.model.state_dict().values())
    if sum(tensor.nbytes for tensor in weights) > _MADE_AGAIN_BYTES:
        return False
    try:
        again = list(plain_module(made_by(factory)[0]).state_dict().values())
    except SpachError:  # a factory that works once; its module is there already
        return False
    if len(again) != len(weights):
        return True
    return not all(torch.equal(one, other.to(one)) for one, other in zip(weights, again, strict=True))


def _example_of(module: nn.Module, takes: ModelInputs) -> ExampleInputs:
    """Example inputs of a module as a bundle has them: by name where its forward has these names, else by order."""
    example = dict(zip(takes.names, drawn(takes, ROWS), strict=True))
    return example if set(example) <= set(inspect.signature(module.forward).parameters) else tuple(example.values())


def loaded_module(
    module: nn.Module,
    example: ExampleInputs,
    spec: ModelSpec,
    *,
    notes: tuple[str, ...] = (),
    sha256: str | None = None,
) -> LoadedModel:
    """A module that is there already, as the steps of an export take it. A model of this package needs no example.

    Raises ModelError for what cannot be exported, does not run on the example inputs, or takes no images.
    """
    module = plain_module(module)
    module, converted = in_float32(Traced(module) if isinstance(module, torch.fx.GraphModule) else module)
    module.eval()
    notes = (*notes, *converted)
    architecture = getattr(module, "architecture", None)
    if isinstance(module, SelectableOutputs) and isinstance(architecture, Architecture):
        settings = resolve_settings(architecture, spec.hyperparameters, {}, Source.USUAL)
        name = published_match(architecture).name
        if not _is_changed(module, architecture):
            return LoadedModel(module, name, "module", spec.checkpoint, sha256, notes, settings)
        module = Changed(module)
    ran = run_example(module, example)
    outputs = [_info(name, tensor, alone=len(ran.outputs) == 1) for name, tensor in ran.outputs.items()]
    model = prepared(module, outputs, ran)
    settings = _settings(spec, ran.takes.shape[0])
    notes = (*notes, *ran.notes, *_inputs_notes(ran.takes))
    return OwnLoadedModel(
        model, type(module).__name__, "module", spec.checkpoint, sha256, notes, settings, example=ran.inputs
    )


def _inputs_notes(takes: ModelInputs) -> Iterator[str]:
    """Which inputs get pictures and which get rows, in sentences; none for one input."""
    if takes.is_single:
        return
    first, *others = takes.images
    mirrored = f", and mirrored to {', '.join(others)}" if others else ""
    rows = f"; {', '.join(takes.rows)} {'has' if len(takes.rows) == 1 else 'have'} values of the example inputs"
    yield f"pictures go to the input {first}{mirrored}{rows if takes.rows else ''}"
    for name, array in takes.rows.items():
        if (array == array[:1]).all():
            yield f"the input {name} is the same for every image; example inputs of several rows that differ tell more"


def plain_module(module: nn.Module) -> nn.Module:
    """The module inside wrappers that add nothing to what it computes: torch.compile, DataParallel, and DDP.

    ModelError, which says what to give instead, for modules that cannot be exported from PyTorch at all.
    """
    inner = dict(module.named_children())
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    for name, is_wrapper in ((_COMPILED, True), ("module", isinstance(module, parallel))):
        if is_wrapper and list(inner) == [name]:
            return plain_module(inner[name])
    if problem := _why_not(module):
        raise ModelError(*problem)
    return module


class Traced(nn.Module):
    """A module that torch.fx traced, as a part of another one: its own class cannot be extended."""

    def __init__(self, traced: nn.Module) -> None:
        super().__init__()
        self.traced = traced

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        """What the traced module returns."""
        return self.traced(*inputs, **named)


class Changed(nn.Module):
    """A model of this package in which the user changed what a part computes: it is a module of the user's own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        """What the model returns."""
        return self.model(x)


def _is_changed(model: nn.Module, architecture: Architecture) -> bool:
    """Whether a part of a model of this package has hooks, a forward of its own, or another class than usual."""
    with torch.device("meta"):
        unchanged = create_model(architecture)
    classes, expected = ([type(part) for part in made.modules()] for made in (model, unchanged))
    return classes != expected or any(map(has_own_behaviour, model.modules()))


def has_own_behaviour(module: nn.Module) -> bool:
    """Whether a module computes something else than its class says: with hooks, or a forward of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _why_not(module: nn.Module) -> tuple[str, str] | None:
    """Why a module cannot be exported whatever its inputs are, and what to do; None where nothing speaks against it."""
    for path, part in module.named_modules():
        where, kind = f"Its part {path}" if path else "The module", type(part)
        if isinstance(part, torch.jit.ScriptModule):
            return f"{where} is TorchScript, whose blocks cannot be seen.", "Give the nn.Module that it was made of."
        if isinstance(part, torch.fx.GraphModule) and any("export" in base.__module__ for base in kind.__mro__):
            return f"{where} is an exported program.", "Give the nn.Module that it was made of."
        if ".quantized" in kind.__module__ and kind.__module__.startswith("torch."):
            return f"{where} is quantized already ({kind.__name__}).", "Give the float module; --int8 quantizes it."
        if kind.__name__ == "FullyShardedDataParallel":
            return f"{where} is sharded over processes.", "Gather its weights in one process, and load them there."
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            owner = name.rpartition(".")[0] or name
            return f"{owner} is lazy and has no weights yet.", "Call the module once on an input, then export it."
        if hasattr(tensor, "full_tensor"):  # a DTensor
            return f"{name} is sharded over processes.", "Gather its weights in one process, and load them there."
        if tensor.device.type == "meta":
            return f"{name} is on the meta device, without values.", "Load a checkpoint, or make the module on a CPU."
        if tensor.dtype == torch.float64 and isinstance(tensor, nn.Parameter):
            return f"{name} is float64, and an export computes in FP32 at most.", "Give the module as module.float()."
        if tensor.is_quantized or tensor.layout != torch.strided:
            what = "quantized already" if tensor.is_quantized else "sparse"
            return f"{name} is {what}.", "Give the module with plain float weights; --int8 quantizes it."
    return None


def in_float32(module: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """A copy of `module` in FP32 on the CPU without gradients, and notes on what was converted. Memory of tensors that
    are so already is shared.

    Halves become FP32 exactly. FP64 stays, because FP32 would round it.
    """
    copied = own(module)
    counts: Counter[str] = Counter()

    def plain(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        is_half = tensor.dtype in (torch.float16, torch.bfloat16)
        if not is_half and tensor.device.type == "cpu":  # not `requires_grad_`, which would change the user's too
            return nn.Parameter(tensor.detach(), requires_grad=False) if tensor.requires_grad else tensor
        what = {torch.float16: "FP16", torch.bfloat16: "BF16"}.get(tensor.dtype, "")
        counts[f"{what} tensors to FP32" if is_half else f"tensors to the CPU from {tensor.device.type}"] += 1
        moved = tensor.detach().to("cpu", torch.float32 if is_half else tensor.dtype)
        return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved

    made: dict[int, Tensor | None] = {}
    for part in copied.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if id(tensor) not in made:
                    made[id(tensor)] = plain(tensor)
                tensors[name] = made[id(tensor)]  # type: ignore[assignment]
    return copied, tuple(f"converted {count} {what}" for what, count in counts.items())


def _info(name: str, tensor: Tensor, *, alone: bool) -> TensorInfo:
    """An output as data. Its role is its name where that is one, logits for one vector alone, else `other`."""
    named = {role.value: role for role in (Role.LOGITS, Role.EMBEDDING, Role.FEATURES)}
    is_vector = tensor.ndim == 2 and tensor.shape[1] > 1
    role = named.get(name, Role.LOGITS if alone and is_vector else Role.OTHER)
    role = Role.OTHER if role is Role.LOGITS and not is_vector else role
    layout = {2: "NC", 3: "NLC", 4: "NCHW"}.get(tensor.ndim, "")
    final = Role.LOGITS.value if alone and role is Role.LOGITS else name
    return TensorInfo(name=final, dtype="float32", shape=(None, *tensor.shape[1:]), layout=layout, role=role)


def _settings(spec: ModelSpec, channels: int) -> tuple[Setting, ...]:
    """The evaluation transform's values, each with its source. UsageError for what the module's own code decides."""
    check_pixels(spec.hyperparameters, channels)
    given = for_channels(spec.hyperparameters, channels).given()
    mean, std = channel_statistics(channels)
    if wrong := [name for name in given if name not in OF_PIXELS]:
        flag = f"--{wrong[0].replace('_', '-')}"
        reason = f"{flag} is for the models of spach-export --list; your module's own code decides"
        raise UsageError(f"{reason}.", f"Leave {flag} out.")
    usual = {"mean": mean, "std": std}
    return (
        *(Setting(name, value, Source.USUAL) for name, value in usual.items() if name not in given),
        *(Setting(name, value, Source.COMMAND_LINE) for name, value in given.items()),
    )


def choose_outputs(model: OwnForward, spec: OutputSpec) -> None:
    """Keep the outputs whose roles `spec` asks for, all by default, and rename them.

    UsageError for a role that no output has, and for names that are unknown or not unique.
    """
    pairs = list(zip(model.outputs, model.returned, strict=True))
    roles = {info.role for info, _ in pairs}
    if missing := [role.value for role in spec.outputs if role not in roles]:
        has = ", ".join(f"{info.name} ({(info.role or Role.OTHER).value})" for info, _ in pairs)
        raise UsageError(f"No output of your module has the role {missing[0]}: it gives {has}.", "Leave --outputs out.")
    kept = [pair for pair in pairs if not spec.outputs or pair[0].role in spec.outputs]
    model.outputs = named(spec, [info for info, _ in kept])
    model.returned = tuple(name for _, name in kept)
    for tensor in graph_outputs(model.outputs, spec):
        if tensor.name in model.takes.names:
            raise UsageError(
                f"The output {tensor.name} would be called like an input of your module.",
                "Give it another name with --output-name.",
            )


def give(model: OwnForward, outputs: Sequence[TensorInfo]) -> None:
    """Let a module give the outputs of a bundle, which may have other names: those of the same places and shapes.

    ModelError where it does not have them.
    """
    rest = list(zip(model.outputs, model.returned, strict=True))
    returned: list[str] = []
    for wanted in outputs:
        same = [pair for pair in rest if (pair[0].role, pair[0].shape) == (wanted.role, wanted.shape)]
        if not same:
            has = ", ".join(info.name for info in model.outputs)
            raise ModelError(f"The bundle's output {wanted.name} is none of your module's: {has}.", "Give its module.")
        chosen = next((pair for pair in same if pair[0].name == wanted.name), same[0])
        rest.remove(chosen)
        returned.append(chosen[1])
    model.outputs, model.returned = tuple(outputs), tuple(returned)


_COMPILED = "_orig_mod"
"""The only child of what torch.compile makes of a module, and part of its tensors' names: the module itself."""

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def own(module: ModuleT) -> ModuleT:
    """A copy of `module` and its submodules that shares the parameter tensors; shared submodules stay shared."""
    return _own(module, {})  # type: ignore[return-value]


def _own(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    if id(module) not in done:
        if [name for name, _ in module.named_children()] == [_COMPILED]:
            return _own(module.get_submodule(_COMPILED), done)
        copied = _shallow(module)
        copied._parameters = dict(module._parameters)
        copied._buffers = dict(module._buffers)
        copied._forward_hooks = OrderedDict(module._forward_hooks)
        copied._forward_pre_hooks = OrderedDict(module._forward_pre_hooks)
        done[id(module)] = copied
        copied._modules = {
            name: None if child is None else _own(child, done) for name, child in module._modules.items()
        }
        if "forward" in vars(module):
            copied.forward = _of_copies(module.forward, done)
    return done[id(module)]


class ReplacedForward:
    """A function that the user put in the place of a module's forward, with copies of the modules that it holds."""

    def __init__(self, function: types.FunctionType, held: tuple[Any, ...]) -> None:
        self.function = function
        self.held = held

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Call it."""
        old, cells = self.function, tuple(map(types.CellType, self.held))
        made = types.FunctionType(old.__code__, old.__globals__, old.__name__, old.__defaults__, cells)
        made.__kwdefaults__ = old.__kwdefaults__
        return made(*inputs, **named)


def _of_copies(value: Any, done: dict[int, nn.Module]) -> Any:
    """A forward that the user put on a module, or what it holds, with copies in the place of modules."""
    if isinstance(value, nn.Module):
        return _own(value, done)
    if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
        return types.MethodType(value.__func__, _own(value.__self__, done))
    if isinstance(value, functools.partial):
        named = {name: _of_copies(given, done) for name, given in value.keywords.items()}
        return functools.partial(
            _of_copies(value.func, done), *(_of_copies(given, done) for given in value.args), **named
        )
    if isinstance(value, ReplacedForward):
        return ReplacedForward(value.function, tuple(_of_copies(held, done) for held in value.held))
    if isinstance(value, types.FunctionType) and value.__closure__:
        return ReplacedForward(value, tuple(_of_copies(cell.cell_contents, done) for cell in value.__closure__))
    return value


def _shallow(module: nn.Module) -> nn.Module:
    """A copy of one module; of one with parametrizations, which refuse `copy.copy`, by hand."""
    if not parametrize.is_parametrized(module):
        return copy.copy(module)
    copied = type(module).__new__(type(module))
    copied.__dict__.update(module.__dict__)
    return copied
