"""Runners: one way to feed a PyTorch model, an ONNX graph or a TensorRT plan and get its outputs.

A runner is a context manager; inside it, `run` takes arrays by input name and returns arrays by output name. Inputs
larger than the runner's batch are split along axis 0 and the outputs concatenated. Nothing is compared here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Self


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """An input or output: NumPy's name of its dtype, and its shape with None where an extent is symbolic."""

    dtype: str
    shape: tuple[int | None, ...]


class Runner(Protocol):
    """Something that computes outputs from inputs. Specs are known, and `run` works, inside its context only."""

    @property
    def name(self) -> str:
        """What it is, for tables and messages."""

    @property
    def input_specs(self) -> Mapping[str, TensorSpec]:
        """Inputs by name, in order."""

    @property
    def output_specs(self) -> Mapping[str, TensorSpec]:
        """Outputs by name, in order."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def run(self, feeds: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """Outputs of `feeds`, of any batch size. MismatchError when names, dtypes or shapes are not the inputs'."""
