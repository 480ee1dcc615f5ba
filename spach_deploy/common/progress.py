"""Progress of an export: its phases with time and peak memory, its notes, and the callbacks for both."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from spach_deploy.common.operating_system import peak_resident_bytes

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Phase:
    """A finished phase. `peak_bytes` is the process's largest resident size up to its end."""

    name: str
    seconds: float
    peak_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"name": self.name, "seconds": round(self.seconds, 3), "peak_bytes": self.peak_bytes}


class ExportObserver:
    """Callbacks of an export. Every method does nothing until a subclass overrides it."""

    def started(self, phase: str) -> None:
        """A phase begins."""

    def finished(self, phase: Phase) -> None:
        """A phase ended without an error."""

    def note(self, text: str) -> None:
        """A sentence that the user should read."""

    def building(self, event: Any) -> None:
        """A progress event of the engine builder (`spach_deploy.engine.worker.ProgressEvent`), from another thread."""

    def calibrating(self, progress: Any) -> None:
        """How far calibration is (`spach_deploy.quantization.calibration.CalibrationProgress`), after every image."""


def results_of(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs with futures replaced by their results. Raises what they raise."""
    return tuple(value.result() if isinstance(value, Future) else value for value in inputs)


class Phases:
    """Records phases and notes of one export, and passes them to an observer."""

    def __init__(self, observer: ExportObserver) -> None:
        self.observer = observer
        self.done: list[Phase] = []
        self.notes: list[str] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the block; nothing is recorded when it raises."""
        self.observer.started(name)
        start = time.perf_counter()
        yield
        phase = Phase(name, time.perf_counter() - start, peak_resident_bytes())
        self.done.append(phase)
        self.observer.finished(phase)

    def do(self, name: str, step: Callable[..., Result], *inputs: Any) -> Result:
        """Run `step(*inputs)` as a phase. Futures among the inputs are replaced by their results first."""
        with self.phase(name):
            return step(*results_of(inputs))

    def record(self, name: str, seconds: float) -> None:
        """Add a phase that was measured elsewhere, such as the engine build that ran during the validation."""
        self.done.append(Phase(name, seconds, peak_resident_bytes()))
        self.observer.finished(self.done[-1])

    def note(self, text: str) -> None:
        """Record a sentence for the manifest, and pass it to the observer."""
        self.notes.append(text)
        self.observer.note(text)
