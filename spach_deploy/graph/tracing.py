"""Tracing beside an export's other work.

Much of the time that a prototype takes, the exporter loads itself. So a copy of this process begins with that,
before there is a model, and traces the prototype that it is sent.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import tempfile
from multiprocessing.connection import Pipe
from types import TracebackType
from typing import TYPE_CHECKING

from spach_deploy.graph.block_prototype import Prototype, without_weights
from spach_deploy.graph.export import ExportedPrototype, trace
from spach_deploy.runtime.beside import Beside

if TYPE_CHECKING:
    from typing_extensions import Self

LOADED_LATER = (
    *("torch.onnx._internal.exporter._core", "torch.export._trace", "torch._functorch.aot_autograd"),
    *("onnxscript.function_libs.torch_lib.ops", "onnxsim"),
)
"""What the exporter imports where it is used. A name that is no more costs time and nothing else."""


class Tracing:
    """One prototype, traced in a copy of this process. Leaving the context ends the copy."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._is_asked = False
        self._copy = Beside(self._trace_what_comes, is_urgent=True)

    def __enter__(self) -> Self:
        self._file = self._stack.enter_context(tempfile.TemporaryFile())
        self._asked, self._asking = Pipe(duplex=False)
        for end in (self._asked, self._asking):
            self._stack.callback(end.close)
        self._stack.enter_context(self._copy)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def ask(self, prototype: Prototype, image_size: int) -> None:
        """Send what is to be traced. Done once; nothing happens where there is no copy."""
        if not self._copy.is_under_way:
            return
        with contextlib.suppress(OSError, AttributeError, TypeError, pickle.PicklingError):  # then nobody was asked
            # By way of a file: a pipe would hold this process up until the copy reads.
            size = self._file.write(pickle.dumps((without_weights(prototype), image_size)))
            self._file.flush()
            self._asking.send(size)
            self._is_asked = True

    def answer(self) -> ExportedPrototype | None:
        """The prototype's graph; None where no copy traced it, and whoever needs it does."""
        return self._copy.answer() if self._is_asked else None

    def _trace_what_comes(self) -> ExportedPrototype:
        """In the copy."""
        self._asking.close()
        for name in LOADED_LATER:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        size = self._asked.recv()
        return trace(*pickle.loads(os.pread(self._file.fileno(), size, 0)))
