"""A check's findings for the terminal and as JSON."""

from __future__ import annotations

import itertools

from spach_deploy.deployment.triton.check.findings import Checked, Finding, Severity
from spach_deploy.errors import printable
from spach_deploy.text import escaped, json_text


def as_text(checked: Checked) -> str:
    """Findings by file, and a closing line."""
    lines: list[str] = []
    for file, findings in itertools.groupby(checked.findings, key=lambda finding: finding.file):
        lines.append(printable(file))
        lines.extend(printable(line) for finding in findings for line in _lines(finding))
    return escaped([*lines, *([""] if lines else []), _closing(checked)])


def as_json(checked: Checked) -> str:
    """The same as JSON."""
    return json_text(checked.to_dict())


def _lines(finding: Finding) -> list[str]:
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
