"""What a model gives: logits, an embedding, maps of its network stages, in the order and under the names asked for.

The embedding is what the head reads: the mean over tokens of the last stage, normalized. Feature maps are what each
stage gives, before any normalization: what the published models give a detector (`downstream`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor, nn

from spach_deploy.bundle.outputs import NCHW, TOKENS, StageShape, vector
from spach_deploy.bundle.schema import TensorInfo
from spach_deploy.options.architecture import Architecture
from spach_deploy.options.specs import Role


class SelectableOutputs(nn.Module):
    """A model whose outputs are chosen before it runs, by setting `outputs`.

    `architecture`: what it computes. `stage_shapes`: (channels, height, width) of what each network stage gives.
    """

    architecture: Architecture
    stage_shapes: tuple[StageShape, ...]

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """The outputs, in order."""
        return self._outputs

    @outputs.setter
    def outputs(self, chosen: Sequence[TensorInfo]) -> None:
        self._outputs = tuple(chosen)
        self._roles = tuple((tensor.role or Role.OTHER).value for tensor in chosen)
        self._layout = next((tensor.layout for tensor in chosen if tensor.role is Role.FEATURES), NCHW)

    def arranged(
        self, maps: Callable[[], Iterable[Tensor]], embedding: Callable[[], Tensor], head: Callable[[Tensor], Tensor]
    ) -> Tensor | tuple[Tensor, ...]:
        """The chosen outputs in order; one alone as it is.

        `maps`: of all stages, in `self.layout`. `embedding` (B, C), and logits that `head` makes of it, are computed
        where they are asked for.
        """
        features = iter(maps()) if "features" in self._roles else iter(())
        vector = embedding() if "embedding" in self._roles or "logits" in self._roles else None
        made = tuple(self._made(role, features, vector, head) for role in self._roles)
        return made[0] if len(made) == 1 else made

    def _made(
        self, role: str, features: Iterator[Tensor], vector: Tensor | None, head: Callable[[Tensor], Tensor]
    ) -> Tensor:
        if role == "features":
            return next(features)
        assert vector is not None
        return head(vector) if role == "logits" else vector

    @property
    def layout(self) -> str:
        """Layout of feature maps, `NCHW` or `TOKENS`."""
        return self._layout


@contextlib.contextmanager
def giving(model: nn.Module, role: Role) -> Iterator[None]:
    """Within the block, the model gives this output alone; a module whose outputs cannot be chosen gives its own."""
    if not isinstance(model, SelectableOutputs):
        yield
        return
    chosen, model.outputs = model.outputs, (vector(role, 0),)
    try:
        yield
    finally:
        model.outputs = chosen


def stage_shapes(architecture: Architecture) -> tuple[StageShape, ...]:
    """(channels, height, width) of what each stage gives."""
    return tuple((dim, *grid) for dim, grid in zip(architecture.stage_dims, architecture.grids, strict=True))


def image_or_tokens(x: Tensor, layout: str) -> Tensor:
    """A map (B, C, H, W) in a layout of feature maps."""
    return x.flatten(2).transpose(1, 2) if layout == TOKENS else x
