"""Known blocks in any model: found by structure, replaced by their static forms in a copy, each proven in FP64.

The user's own `forward` stays. Only children that are one of the kinds of `spach_deploy.blocks` are replaced: a kind
proposes forms that a module may have (`static_forms`), and the first that computes what the module computes is taken.
A module of no known kind stays as it is, and its children are looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from spach_deploy.blocks import attention, channel_mlp, depthwise, downsampling, mixing_block, shift, stem, token_mlp
from spach_deploy.blocks.base import FP64_LIMIT, Call, Change, Outcome, double, own, probe
from spach_deploy.common.metrics import relative_l2
from spach_deploy.models.own_module import has_own_behaviour

_KINDS = (stem, downsampling, depthwise, attention, channel_mlp, token_mlp, shift)

_OWN = "spach_deploy.models."


def calls_of(model: nn.Module, inputs: Sequence[Tensor]) -> dict[nn.Module, Call]:
    """Shapes of every module that takes one tensor and gives one, the same each time, when `model` runs on `inputs`.

    Left out are modules with a part that others call: they need that part.
    """
    found: dict[nn.Module, set[Call | None]] = {}
    running: list[nn.Module] = []
    owners: dict[nn.Module, list[nn.Module]] = {}
    for module in model.modules():
        for part in module.modules():
            owners.setdefault(part, []).append(module)

    def begin(module: nn.Module, _given: tuple[object, ...]) -> None:
        running.append(module)
        for owner in owners[module]:
            if owner not in running:
                found.setdefault(owner, set()).add(None)

    def note(module: nn.Module, given: tuple[object, ...], output: object) -> None:
        running.remove(module)
        is_single = len(given) == 1 and isinstance(given[0], Tensor) and isinstance(output, Tensor)
        call = Call(tuple(given[0].shape), tuple(output.shape)) if is_single else None  # type: ignore[attr-defined]
        found.setdefault(module, set()).add(call)

    hooks = [module.register_forward_pre_hook(begin) for module in model.modules()]
    hooks += [module.register_forward_hook(note) for module in model.modules()]
    try:
        with torch.inference_mode():
            model(*inputs)
    finally:
        for handle in hooks:
            handle.remove()
    return {module: call for module, calls in found.items() if len(calls) == 1 and (call := next(iter(calls)))}


def replace_known(model: nn.Module, inputs: Sequence[Tensor]) -> tuple[nn.Module, Outcome]:
    """A copy of `model` with its known blocks in static form, for inputs of these shapes, and which ones they are.

    The copy shares the parameters. `model` is in evaluation mode, float32, on the CPU.
    """
    finder = _Finder(calls_of(model, inputs))
    copied = own(model)
    replaced = finder.form_of("", model)
    if replaced is None:
        finder.replace_children("", copied, model)
    return own(replaced or copied), Outcome(tuple(finder.changes))


class _Finder:
    """Finds static forms, and keeps what was proven in `changes`."""

    def __init__(self, calls: dict[nn.Module, Call]) -> None:
        self.changes: list[Change] = []
        self._calls = calls
        self._proven: dict[object, tuple[int, float]] = {}
        """Of this package's own reference models one block of each structure and shape is proven: which of the
        proposed forms it has, and the error.
        """

    def replace_children(self, path: str, copied: nn.Module, module: nn.Module) -> None:
        """Replace the known children of `copied`, which is a copy of `module`, and look into the others."""
        for name, child in module._modules.items():
            inner = f"{path}.{name}" if path else name
            copy = copied._modules[name]
            if child is None or copy is None:
                continue
            form = self.form_of(inner, child)
            if form is not None:
                copied._modules[name] = form
            else:
                self.replace_children(inner, copy, child)

    def form_of(self, path: str, module: nn.Module) -> nn.Module | None:
        """The static form of `module`, or None where it is of no known kind."""
        call = self._calls.get(module)
        if call is None or not list(module.children()):
            return None
        structure = (tuple(map(type, module.modules())), call)
        is_alike = not any(map(has_own_behaviour, module.modules()))
        known = self._proven.get(structure) if is_alike else None
        for index, form in enumerate(self._forms(module, call)):
            if known is not None and index < known[0]:
                continue
            error = _error(module, form, call) if known is None else known[1]
            if error is not None and error <= FP64_LIMIT:
                self.changes.append(Change(path, error))
                if is_alike and type(module).__module__.startswith(_OWN):
                    self._proven[structure] = index, error
                return form.eval()
        return None

    def _forms(self, module: nn.Module, call: Call) -> Iterator[nn.Module]:
        for kind in _KINDS:
            yield from kind.static_forms(module, call)
        yield from mixing_block.static_forms(module, call, self._known_children(module))

    def _known_children(self, module: nn.Module) -> dict[str, nn.Module]:
        """Static forms of the children of a module that may be a whole block."""
        if not any(isinstance(child, nn.LayerNorm) for child in module.children()):
            return {}
        looking = _Finder(self._calls)
        forms = {name: looking.form_of(name, child) for name, child in module.named_children()}
        return {name: _in_block(form) for name, form in forms.items() if form is not None}


def _in_block(form: nn.Module) -> nn.Module:
    """A form as a block uses it: on rows."""
    if isinstance(form, attention.StaticAttention | channel_mlp.StaticChannelMLP):
        form.shape = None
    return form


def _error(module: nn.Module, form: nn.Module, call: Call) -> float | None:
    """Relative L2 of both in FP64 on random numbers; None where one does not run on them."""
    x = probe(2, *call.input[1:])
    try:
        with torch.inference_mode():
            expected = double(module)(x)
            return relative_l2(double(form)(x).numpy(), expected.numpy())
    except Exception:  # the user's code raises what it likes
        return None
