"""Findings of the check of a repository, and their output as text and JSON."""

from __future__ import annotations

import dataclasses
import enum
import itertools
from typing import Any

from spach_deploy.common.errors import printable
from spach_deploy.common.text import escaped, json_text


class Severity(str, enum.Enum):
    """`error`: the server refuses the model, or serves another than configured. `warning`: an accepted fault."""

    ERROR = "error"
    WARNING = "warning"


@dataclasses.dataclass(frozen=True)
class RepositoryFinding:
    """One fault: file and field, what was found there, what was expected, and how to fix it."""

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
    """The result of checking a repository: names of its models, and the findings."""

    repository: str
    models: tuple[str, ...]
    findings: tuple[RepositoryFinding, ...]

    @property
    def errors(self) -> tuple[RepositoryFinding, ...]:
        """The findings that are errors, not warnings."""
        return tuple(finding for finding in self.findings if finding.severity is Severity.ERROR)

    @property
    def exit_code(self) -> int:
        """1 with any error, else 0."""
        return 1 if self.errors else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "repository": self.repository,
            "models": list(self.models),
            "passed": not self.errors,
            "findings": [finding.to_dict() for finding in self.findings],
        }


def as_text(checked: Checked) -> str:
    """The findings by file, and a closing line."""
    lines: list[str] = []
    for file, findings in itertools.groupby(checked.findings, key=lambda finding: finding.file):
        lines.append(printable(file))
        lines.extend(printable(line) for finding in findings for line in _lines(finding))
    return escaped([*lines, *([""] if lines else []), _closing(checked)])


def as_json(checked: Checked) -> str:
    """The result as JSON."""
    return json_text(checked.to_dict())


def _lines(finding: RepositoryFinding) -> list[str]:
    mark = "warning: " if finding.severity is Severity.WARNING else ""
    field = f"{finding.field}: " if finding.field else ""
    return [
        f"  {mark}{field}found {finding.found}",
        f"    expected {finding.expected}",
        f"    fix      {finding.fix}",
    ]


def _closing(checked: Checked) -> str:
    models = _count(len(checked.models), "model")
    if not checked.findings:
        return f"{checked.repository}: {models}, nothing found."
    warnings = len(checked.findings) - len(checked.errors)
    counts = [_count(len(checked.errors), "finding")] if checked.errors or not warnings else []
    counts += [_count(warnings, "warning")] if warnings else []
    return f"{checked.repository}: {models}, {', '.join(counts)}."


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
