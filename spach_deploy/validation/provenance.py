"""How a validation came about: what was typed, with which versions. What is needed to do it again."""

from __future__ import annotations

import dataclasses
from typing import Any

from spach_deploy.common.versions import tool_versions


@dataclasses.dataclass(frozen=True)
class Provenance:
    """A command line that repeats the validation, and versions by package. No time: the same run, the same report."""

    command: str
    tools: dict[str, str]

    @classmethod
    def here(cls, command: str) -> Provenance:
        """With what is installed here."""
        return cls(command, tool_versions())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)
