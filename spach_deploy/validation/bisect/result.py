"""The result of a bisection: wrong steps and modules, as data for report.json and as lines for the terminal."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from spach_deploy.runtime.onnxruntime_runner import fault_of


@dataclasses.dataclass(frozen=True)
class StepResult:
    """One export step, compared with the reference.

    `error`: relative L2 of its logits, None where it did not run; `allowed`: its limit.
    """

    stage: str
    error: float | None
    allowed: float | None
    verdict: str
    why: str = ""
    seconds: float = 0.0

    @property
    def disagrees(self) -> bool:
        """Whether the step ran and is wrong."""
        return self.verdict == DISAGREES


AGREES, DISAGREES, NOT_RUN = "agrees", "disagrees", "not run"


@dataclasses.dataclass(frozen=True)
class Suspect:
    """A module whose output is wrong given right inputs. `error`: relative L2, infinite where no tensor resembles its
    output.
    """

    module: str
    kind: str
    error: float
    allowed: float
    why: str


@dataclasses.dataclass(frozen=True)
class ModuleResult:
    """One probe point: relative L2 in the graph as it is (`inherited`), and from the reference's inputs (`local`)."""

    module: str
    inherited: float
    local: float
    allowed: float
    tensor: str
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Unmatched:
    """A probe point without a tensor in the graph, and why that is no fault."""

    module: str
    why: str


@dataclasses.dataclass(frozen=True)
class Bisection:
    """The result of a bisection. `suspects`: in the order of the model.

    `truncated_by`: version of the installed ONNX Runtime, where that computes this graph wrongly
    (`runtime.truncation`).
    """

    suspects: tuple[Suspect, ...]
    modules: tuple[ModuleResult, ...]
    unmapped: tuple[Unmatched, ...]
    stages: tuple[StepResult, ...] = ()
    truncated_by: str | None = None

    @property
    def passed(self) -> bool:
        """Whether no step disagrees, and every module is right given right inputs."""
        return not self.suspects and not any(stage.disagrees for stage in self.stages)

    @property
    def first_stage(self) -> str | None:
        """The step that introduced the disagreement."""
        return next((stage.stage for stage in self.stages if stage.disagrees), None)

    @property
    def findings(self) -> tuple[str, ...]:
        """A sentence for each wrong module."""
        return tuple(
            f"{suspect.module or 'The model itself'} is wrong given right inputs: {suspect.kind}. {suspect.why}"
            for suspect in self.suspects
        )

    def lines(self) -> tuple[str, ...]:
        """At most six lines for the terminal."""
        version = self.truncated_by
        fault = [] if version is None else [f"The runtime's fault, not the graph's: {fault_of(version)}."]
        return (*_lines(self), *fault)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; inf and NaN become null."""
        return {
            "passed": self.passed,
            "lines": list(self.lines()),
            "first_stage": self.first_stage,
            "truncated_by": self.truncated_by,
            "stages": [_plain(stage) for stage in self.stages],
            "suspects": [_plain(suspect) for suspect in self.suspects],
            "modules": [_plain(module) for module in self.modules],
            "unmapped": [_plain(place) for place in self.unmapped],
        }


def _plain(entry: Any) -> dict[str, Any]:
    return {name: _finite(value) for name, value in dataclasses.asdict(entry).items()}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(bisection: Bisection) -> list[str]:
    lines = []
    if bisection.stages:
        lines.append(_step_line(bisection))
    if not bisection.suspects:
        worst = max(bisection.modules, key=lambda module: module.local / module.allowed, default=None)
        lines.append(
            f"Modules: all {len(bisection.modules)} compute the reference's output from the reference's inputs."
        )
        if worst is not None:
            lines.append(f"Nearest to its bound: {worst.module}, {worst.local:.1e} of {worst.allowed:.1e}.")
        return lines
    first = bisection.suspects[0]
    error = f"relative L2 {first.error:.1e}" if first.error != float("inf") else "unlike any tensor of the graph"
    lines.append(
        f"First wrong module: {first.module or 'the model itself'}, {error}, given right inputs;"
        f" rounding explains {first.allowed:.1e}."
    )
    lines.append(f"Kind: {first.kind}. {first.why}")
    others = [f"{suspect.module or 'the model itself'} ({suspect.kind})" for suspect in bisection.suspects[1:]]
    if others:
        lines.append(f"Wrong too: {', '.join(others[:3])}{f' and {len(others) - 3} more' if len(others) > 3 else ''}.")
    right = len(bisection.modules) - sum(module.local > module.allowed for module in bisection.modules)
    lines.append(f"The other {right} probe points compute what they should.")
    return lines


def _step_line(bisection: Bisection) -> str:
    names = {stage.stage: stage for stage in bisection.stages}
    first = bisection.first_stage
    if first is None:
        ran = [stage.stage for stage in bisection.stages if stage.verdict == AGREES]
        return f"Steps: all that ran agree ({' → '.join(ran)})."
    stage = names[first]
    before = [other.stage for other in bisection.stages if other.verdict == AGREES]
    error = "" if stage.error is None else f", relative L2 {stage.error:.1e} of {stage.allowed:.1e} allowed"
    return f"Step: {first} disagrees{error}{f'; {before[-1]} still agrees' if before else ''}."
