"""What a check found."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any


class Severity(str, enum.Enum):
    """`error`: the server refuses it, or serves something else than it says. `warning`: known, and accepted."""

    ERROR = "error"
    WARNING = "warning"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong: in which file of the repository, in which field, what stands there and what should."""

    file: str
    field: str
    found: str
    expected: str
    fix: str
    severity: Severity = Severity.ERROR

    def to_dict(self) -> dict[str, str]:
        """Plain JSON."""
        return {**dataclasses.asdict(self), "severity": self.severity.value}


@dataclasses.dataclass(frozen=True)
class Checked:
    """A check of a repository: its models by name, and the findings."""

    repository: str
    models: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings that are no mere warnings."""
        return tuple(finding for finding in self.findings if finding.severity is Severity.ERROR)

    @property
    def exit_code(self) -> int:
        """1 on any error."""
        return 1 if self.errors else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "repository": self.repository,
            "models": list(self.models),
            "passed": not self.errors,
            "findings": [finding.to_dict() for finding in self.findings],
        }
