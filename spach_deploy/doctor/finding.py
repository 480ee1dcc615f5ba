"""A finding of the doctor: a fact, what it means, the command that would change it, and the tasks that it blocks."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable
from typing import Any


class Status(str, enum.Enum):
    """How serious a finding is. `unknown`: neither this machine nor the file says."""

    OK = "ok"
    MISSING = "missing"
    PROBLEM = "problem"
    UNKNOWN = "unknown"


class Task(str, enum.Enum):
    """What a user wants to do. `run`: run engines. `verify`: compare graphs with the reference."""

    EXPORT = "export"
    BUILD = "build"
    RUN = "run"
    VERIFY = "verify"


EVERYTHING = tuple(Task)
"""All tasks: what a broken installation blocks."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One finding.

    `what` was found, `means` says in a sentence what follows, `command` would change it (None where no command would).
    `blocks`: tasks that cannot be done because of it. `bad_target`: the file that was asked about is at fault, not this
    machine.
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
    """Whether a task can be done here; `how` says how, or why not, as a clause."""

    task: Task
    possible: bool
    how: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"possible": self.possible, "how": self.how}


def reasons(findings: Iterable[Finding]) -> str:
    """The findings as one clause."""
    return "; ".join(_clause(finding) for finding in findings)


def _clause(finding: Finding) -> str:
    """Topic and fact, without the topic where the fact contains it (`no NVIDIA GPU is here`)."""
    return finding.what if finding.topic in finding.what else f"{finding.topic}: {finding.what}"


def blockers(findings: Iterable[Finding], task: Task) -> tuple[Finding, ...]:
    """Findings that block `task`."""
    return tuple(finding for finding in findings if task in finding.blocks)
