"""Runners: one interface to run an ONNX graph, a TensorRT plan or a served model, and `Session`, which runs a bundle.

A runner is a context manager. Inside it, `run` takes arrays by input name and returns arrays by output name. Inputs
larger than the runner's batch are split along axis 0, and the outputs concatenated. `validation/` compares outputs.
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
    """An input or output. `dtype`: NumPy's name. `shape`: None for a symbolic extent."""

    dtype: str
    shape: tuple[int | None, ...]


class Runner(Protocol):
    """Computes outputs from inputs. `input_specs`, `output_specs` and `run` may be used inside its context only."""

    @property
    def name(self) -> str:
        """The runner's name in tables and messages."""

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
        """Outputs by name for `feeds`, of any batch size. MismatchError for other names, dtypes or shapes."""
