"""Where an export's time and memory go: phases by name, in the order in which they ended."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

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
    """What watches an export. Every method does nothing until a subclass overrides it."""

    def started(self, phase: str) -> None:
        """A phase begins."""

    def finished(self, phase: Phase) -> None:
        """A phase ended well."""

    def note(self, text: str) -> None:
        """A sentence that the user should read."""

    def building(self, event: Any) -> None:
        """A progress event of the engine builder (`spach_deploy.engine.compile.ProgressEvent`), from another thread."""

    def calibrating(self, progress: Any) -> None:
        """How far calibration is (`spach_deploy.quantization.calibration.CalibrationProgress`), after every image."""


class Phases:
    """Collects phases and notes, and tells an observer."""

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
        """A step as a phase; futures among its inputs are waited for."""
        with self.phase(name):
            return step(*(value.result() if isinstance(value, Future) else value for value in inputs))

    def record(self, name: str, seconds: float) -> None:
        """Add a phase that was measured elsewhere, such as the build beside the validation."""
        self.done.append(Phase(name, seconds, peak_resident_bytes()))
        self.observer.finished(self.done[-1])

    def note(self, text: str) -> None:
        """Keep a sentence for the report and say it now."""
        self.notes.append(text)
        self.observer.note(text)


def peak_resident_bytes() -> int:
    """Largest resident size of this process so far, as Linux counts it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
