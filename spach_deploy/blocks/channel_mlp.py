"""The MLP over channels: two linear layers on each token."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from spach_deploy.blocks.base import Call, children_of, has_other_parameters


class StaticChannelMLP(nn.Module):
    """Two linear layers on rows: (..., C) -> (B*N, C), or (B, *shape) where `shape` is given."""

    def __init__(self, fc1: nn.Linear, act: nn.Module, fc2: nn.Linear, shape: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.fc1 = fc1
        self.act = act
        self.fc2 = fc2
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        """Mix channels of each token."""
        y: Tensor = self.fc2(self.act(self.fc1(x.reshape(-1, self.fc1.in_features))))
        return y if self.shape is None else y.reshape(-1, *self.shape)


def linear_of(module: nn.Module) -> nn.Linear | None:
    """A 1x1 convolution as a linear layer over channels that come last, which shares its weight; None for another."""
    if not isinstance(module, nn.Conv2d) or module.groups != 1:
        return None
    if module.kernel_size != (1, 1) or module.stride != (1, 1) or module.padding not in (0, (0, 0), "same", "valid"):
        return None
    linear = nn.Linear(module.in_channels, module.out_channels, bias=module.bias is not None, device="meta")
    linear.weight = nn.Parameter(module.weight.detach().flatten(1), requires_grad=False)
    linear.bias = module.bias  # type: ignore[assignment]  # a layer without bias has None
    return linear


def linear_pair(module: nn.Module) -> tuple[nn.Linear, nn.Linear, tuple[nn.Module, ...]] | None:
    """Two linear layers of which the second undoes the first's change of width, and the activations that may stand
    between them: the module's own, else all that have no parameters. None for another module.
    """
    linears = [child for child in module.children() if isinstance(child, nn.Linear)]
    others = [child for child in children_of(module) if not isinstance(child, nn.Linear)]
    if len(linears) != 2 or len(others) > 1 or has_other_parameters(module, linears):
        return None
    first, second = linears
    if (second.in_features, second.out_features) != (first.out_features, first.in_features):
        return None
    return first, second, tuple(others) or (nn.GELU(), nn.ReLU(), nn.SiLU(), nn.GELU("tanh"))


def static_forms(module: nn.Module, call: Call) -> Iterator[nn.Module]:
    """Channel MLPs that `module` may be, for any (..., C)."""
    pair = linear_pair(module)
    if pair is not None and len(call.input) > 2 and call.input == call.output and call.input[-1] == pair[0].in_features:
        for act in pair[2]:
            yield StaticChannelMLP(pair[0], act, pair[1], call.input[1:])
