"""A model of the user's own: any nn.Module, given as an object or made by the user's factory.

Its inputs are those of an example, its outputs what it returns for that: a tensor, or a tuple, list or dictionary of
them. Nothing of the user's module is changed, and its `forward` is called as it is.

Copies of a module share its tensors.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import inspect
import os
import re
import sys
import traceback
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from spach_deploy.bundle.outputs import INPUT, named
from spach_deploy.bundle.schema import TensorInfo
from spach_deploy.common.errors import CheckpointError, ModelError, UsageError
from spach_deploy.common.metrics import relative_l2
from spach_deploy.models.checkpoint import LoadedModel, load_model, read_values
from spach_deploy.models.checkpoint_content import shown
from spach_deploy.models.hyperparameters import OF_PIXELS, Setting, Source, for_channels, resolve_settings
from spach_deploy.models.outputs import SelectableOutputs
from spach_deploy.models.registry import check_spec, published_match
from spach_deploy.options.architecture import Architecture
from spach_deploy.options.specs import ImageSize, ModelSpec, OutputSpec, Role, channel_statistics, sides, size_of_sides

FORM = "package.module:factory"


def made_by(factory: str) -> nn.Module:
    """The module that the user's `factory`, `package.module:name`, makes or is. Runs the user's code.

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
    if not isinstance(made, nn.Module):
        raise UsageError(f"--module {factory} gave a {type(made).__name__}, not an nn.Module.", f"Give {FORM}.")
    return made


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
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(f"--module {factory} cannot be made: {reason}{where}.", f"Give {FORM}.") from error
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


def input_names(module: nn.Module, count: int) -> list[str]:
    """Names of a graph's inputs: `input` for one, else those of forward's arguments."""
    if count == 1:
        return [INPUT]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [
        name for name, parameter in inspect.signature(module.forward).parameters.items() if parameter.kind in kinds
    ]
    if len(names) < count:
        names = [f"input_{index}" for index in range(count)]
    return names[:count]


def output_names(outputs: Any, prefix: str = "") -> list[str]:
    """Names of what a module returned, in order: a dictionary's keys, `output` for one tensor, `output_0`, `output_1`
    for several; within these, joined by underscores.
    """
    if isinstance(outputs, Tensor):
        return [prefix or "output"]
    named = outputs.items() if isinstance(outputs, Mapping) else enumerate(outputs)
    start = f"{prefix}_" if prefix else "" if isinstance(outputs, Mapping) else "output_"
    return [name for key, value in named for name in output_names(value, _usable(f"{start}{key}"))]


def _usable(name: str) -> str:
    """A name that every package can hold: letters, digits, hyphens and underscores, and a letter first."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:64]
    return plain if plain[:1].isalpha() else f"output_{plain}"[:64]


def flattened(outputs: Any) -> list[Tensor]:
    """The tensors that a module returned: one, or those of a tuple, list or dictionary, in order. ModelError for what
    else is among them.
    """
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    if isinstance(outputs, tuple | list):
        return [tensor for part in outputs for tensor in flattened(part)]
    raise ModelError(
        f"The model returns {type(outputs).__name__}, and a graph returns tensors.",
        "Return a tensor, or a tuple or dictionary of tensors.",
    )


class OwnForward(SelectableOutputs):
    """What `prepared` adds to the class of a user's module: the outputs that are exported, in order, as tensors."""

    returned: tuple[str, ...]

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The chosen outputs in order; one alone as it is."""
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # it reads weights past the modules, in one operator
        try:
            returned = super().forward(*inputs)  # of the user's class
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
        by_name = dict(zip(output_names(returned), flattened(returned), strict=True))
        tensors = tuple(by_name[name] for name in self.returned)
        return tensors[0] if len(tensors) == 1 else tensors


def prepared(module: nn.Module, outputs: Sequence[TensorInfo], returned: Sequence[str]) -> OwnForward:
    """A copy of the user's module that returns the outputs `returned` in order, as `outputs` says; it shares tensors.

    Its submodules have the same paths, and its `forward` calls the user's. ModelError for attributes that it needs.
    """
    if taken := [name for name in ("outputs", "returned") if hasattr(module, name)]:
        raise ModelError(f"Your module has an attribute {taken[0]!r}, which this package needs.", "Rename it.")
    kind = type(module)
    made: Any = own(module)
    made.__class__ = type(kind.__name__, (OwnForward, kind), {"__module__": kind.__module__})
    made.outputs, made.returned = tuple(outputs), tuple(returned)
    assert isinstance(made, OwnForward)
    return made


@dataclasses.dataclass(frozen=True)
class Example:
    """Example inputs of a module, a batch of one, by the graph's names, and what it returns for them, by name."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


_SAME = 1e-3
"""Relative L2 up to which two answers are the same but for rounding."""

_OTHER_BATCH = 3


def run_example(module: nn.Module, inputs: Sequence[Tensor]) -> Example:
    """Run the module on its example inputs. What it computes has to be the same every time and for every batch.

    ModelError where it fails, changes itself, draws at random or mixes images up, and where an input or output is not
    a batch of floats.
    """
    for tensor in inputs:
        if not isinstance(tensor, Tensor) or tensor.ndim < 2:
            raise ModelError("An example input is no tensor with a batch first.", "Give tensors such as (1, 3, H, W).")
    generator = torch.Generator().manual_seed(0)
    several = [
        torch.rand(_OTHER_BATCH, *tensor.shape[1:], generator=generator, dtype=tensor.dtype) for tensor in inputs
    ]
    one = [tensor[:1] for tensor in several]
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    returned, again, together = (_called(module, tensors) for tensors in (one, one, several))
    for name, buffer in module.named_buffers():
        buffer.data = before[name]
    names = output_names(returned)
    for name, first, second, third in zip(names, *map(flattened, (returned, again, together)), strict=True):
        _check_output(name, first, second, third)
    tensors = dict(zip(names, flattened(returned), strict=True))
    if len(tensors) < len(names):
        raise ModelError(f"Two outputs of the module are called alike: {', '.join(names)}.", "Give them other names.")
    return Example(dict(zip(input_names(module, len(one)), one, strict=True)), tensors)


def _called(module: nn.Module, inputs: Sequence[Tensor]) -> Any:
    try:
        with torch.inference_mode():
            return module(*inputs)
    except Exception as error:  # the user's code raises what it likes
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_users_file(frame.filename)]
        where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
        raise ModelError(
            f"The module fails on an input of {shapes}: {reason}{where}.",
            "Give example inputs that it takes (--image-size, or example_inputs in Python), in float32.",
        ) from error


def is_users_file(path: str) -> bool:
    """Whether a file is neither of PyTorch nor of this package, whose own frames a traceback has too."""
    others = (Path(torch.__file__).parent, Path(__file__).parents[1])
    return not path.startswith("<") and not any(Path(path).is_relative_to(folder) for folder in others)


def _check_output(name: str, first: Tensor, again: Tensor, together: Tensor) -> None:
    """`again`: of the same input as `first`; `together`: of a batch of `_OTHER_BATCH` that begins with it."""
    if not first.is_floating_point():
        kind = str(first.dtype).removeprefix("torch.")
        raise ModelError(
            f"The output {name} is {kind}, and a graph's outputs are floats.", "Leave it out of what it returns."
        )
    if first.shape[:1] != (1,) or together.shape != (_OTHER_BATCH, *first.shape[1:]):
        raise ModelError(
            f"The output {name} has the shape {tuple(first.shape)} for one image and {tuple(together.shape)} for"
            f" {_OTHER_BATCH}, so it does not begin with the batch.",
            "Return one row for each image.",
        )
    if not relative_l2(again.float().numpy(), first.float().numpy()) <= _SAME:
        raise ModelError(
            f"The output {name} is another when the module runs again on the same input: it draws at random, changes"
            " itself, or is not finite.",
            "An export needs a module that always computes the same.",
        )
    if not relative_l2(together[:1].float().numpy(), first.float().numpy()) <= _SAME:
        raise ModelError(
            f"The output {name} of an image depends on the other images of its batch.",
            "An export needs a module that treats each image by itself, as BatchNorm does in evaluation mode.",
        )


@dataclasses.dataclass(frozen=True)
class OwnLoadedModel(LoadedModel):
    """A module of the user's own. `example`: a batch of one, by the names of the graph's inputs."""

    example: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def image_size(self) -> ImageSize:
        """Height and width of the images that it takes, in pixels."""
        return size_of_sides(*self.example[INPUT].shape[2:])

    @property
    def architecture(self) -> None:
        """A user's module has none."""
        return None

    @property
    def channels(self) -> int:
        """Number of channels of an image."""
        return self.example[INPUT].shape[1]

    @property
    def num_classes(self) -> int:
        """Number of classes of its logits; 0 without logits."""
        logits = next((tensor for tensor in self.model.outputs if tensor.role is Role.LOGITS), None)
        return 0 if logits is None else logits.shape[-1] or 0


def load(spec: ModelSpec) -> LoadedModel:
    """The user's own module where `spec` names one, else a model of `spach_deploy.models`."""
    return load_model(spec) if spec.module is None else load_module(spec)


def load_module(spec: ModelSpec) -> LoadedModel:
    """The module that the factory `spec.module` makes, with a checkpoint's weights if one is given.

    Its example input is the attribute `example_inputs` of what the factory gives, or an image of `--image-size`. Raises
    what `made_by`, `run_example` and `load_values` raise.
    """
    assert spec.module is not None
    check_spec(spec)
    module, sha256 = made_by(spec.module), None
    notes = [f"ran {spec.module}, which is your own code"]
    if spec.checkpoint is None:
        notes.append("the weights are those that your code made")
    else:
        values, sha256, more = read_values(spec, tuple(module.state_dict())[:1])
        load_values(module, values)
        notes += more
    given = getattr(module, "example_inputs", None)
    example = torch.zeros(1, 3, *sides(spec.image_size or 224)) if given is None else given
    return loaded_module(module, example, spec, notes=tuple(notes), sha256=sha256)


def loaded_module(
    module: nn.Module,
    example: Tensor | Sequence[Tensor],
    spec: ModelSpec,
    *,
    notes: tuple[str, ...] = (),
    sha256: str | None = None,
) -> LoadedModel:
    """A module that is there already, as the steps of an export take it. A model of this package needs no example.

    Raises ModelError for what does not run on the example inputs, and for what does not take images alone.
    """
    module = own(module).requires_grad_(False).eval()
    architecture = getattr(module, "architecture", None)
    if isinstance(module, SelectableOutputs) and isinstance(architecture, Architecture):
        settings = resolve_settings(architecture, spec.hyperparameters, {}, Source.USUAL)
        name = published_match(architecture).name
        return LoadedModel(module, name, "module", spec.checkpoint, sha256, notes, settings)
    ran = run_example(module, [example] if isinstance(example, Tensor) else list(example))
    if list(ran.inputs) != [INPUT] or ran.inputs[INPUT].ndim != 4:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in ran.inputs.items())
        raise ModelError(f"The module takes {shapes}; what takes images (B, C, H, W) alone can be exported.")
    outputs = [_info(name, tensor, alone=len(ran.outputs) == 1) for name, tensor in ran.outputs.items()]
    model = prepared(module, outputs, list(ran.outputs))
    settings = _settings(spec, ran.inputs[INPUT].shape[1])
    return OwnLoadedModel(
        model, type(module).__name__, "module", spec.checkpoint, sha256, notes, settings, example=ran.inputs
    )


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


ModuleT = TypeVar("ModuleT", bound=nn.Module)


def own(module: ModuleT) -> ModuleT:
    """A copy of `module` and its submodules that shares the parameter tensors; shared submodules stay shared."""
    return _own(module, {})  # type: ignore[return-value]


def _own(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    if id(module) not in done:
        copied = copy.copy(module)
        copied._parameters = dict(module._parameters)
        copied._buffers = dict(module._buffers)
        copied._forward_hooks = OrderedDict(module._forward_hooks)
        copied._forward_pre_hooks = OrderedDict(module._forward_pre_hooks)
        done[id(module)] = copied
        copied._modules = {
            name: None if child is None else _own(child, done) for name, child in module._modules.items()
        }
    return done[id(module)]
