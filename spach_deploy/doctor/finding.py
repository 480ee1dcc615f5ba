"""A finding: one fact, what it means, the command that would change it, and which tasks it stands in the way of."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable
from typing import Any


class Status(str, enum.Enum):
    """How it stands. `unknown`: neither this machine nor the file tells."""

    OK = "ok"
    MISSING = "missing"
    PROBLEM = "problem"
    UNKNOWN = "unknown"


class Task(str, enum.Enum):
    """What one comes for. `run`: engines. `verify`: graphs, by comparing them with the reference."""

    EXPORT = "export"
    BUILD = "build"
    RUN = "run"
    VERIFY = "verify"


EVERYTHING = tuple(Task)
"""What a broken installation stands in the way of."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the doctor's.

    `what` is there, `means` says in a sentence what follows, `command` would change it (None where no command would).
    `blocks` are the tasks that cannot be done because of it. `bad_target`: the file that was asked about is at fault.
    """

    status: Status
    topic: str
    what: str
    means: str = ""
    command: str | None = None
    blocks: tuple[Task, ...] = ()
    bad_target: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        entry = dataclasses.asdict(self)
        return {**entry, "status": self.status.value, "blocks": [task.value for task in self.blocks]}


@dataclasses.dataclass(frozen=True)
class TaskStatus:
    """Whether a task can be done here. `how` or why not, in a clause."""

    task: Task
    possible: bool
    how: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"possible": self.possible, "how": self.how}


def reasons(findings: Iterable[Finding]) -> str:
    """What they found, as one clause."""
    return "; ".join(_clause(finding) for finding in findings)


def _clause(finding: Finding) -> str:
    """The topic is said once: `no NVIDIA GPU is here` has it already."""
    return finding.what if finding.topic in finding.what else f"{finding.topic}: {finding.what}"


def blockers(findings: Iterable[Finding], task: Task) -> tuple[Finding, ...]:
    """Findings that stand in the way of `task`."""
    return tuple(finding for finding in findings if task in finding.blocks)
