"""Processes that an export needs later and that take seconds to be ready: begun while it loads its own modules."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import TYPE_CHECKING

from spach_deploy.engine.build import Builder
from spach_deploy.options.specs import Flavour

if TYPE_CHECKING:
    from typing_extensions import Self


class Ahead:
    """The process that builds the engine, None where none is wanted, and the copy that traces.

    Entering raises what `engine.flavours.choose_flavour` raises for `requested`, before PyTorch is loaded. Leaving ends
    both.
    """

    def __init__(self, requested: Flavour) -> None:
        self._requested = requested
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self.builder = stack.enter_context(Builder.for_flavour(self._requested))
            from spach_deploy.graph.tracing import Tracing  # loads PyTorch, while the builder loads its compiler

            self.tracing = stack.enter_context(Tracing())
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
