"""How a validation came about: what was typed, when, and with which versions. What is needed to do it again."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any

from spach_deploy.tool_versions import tool_versions


@dataclasses.dataclass(frozen=True)
class Run:
    """A command line that repeats the validation, when it was run (ISO 8601, UTC), and versions by package."""

    command: str
    created: str
    tools: dict[str, str]

    @classmethod
    def now(cls, command: str) -> Run:
        """Of this moment, here."""
        created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        return cls(command, created, tool_versions())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)
