"""report.json: a validation in full."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

from spach_deploy.errors import UsageError
from spach_deploy.text import json_text
from spach_deploy.validation.validate import Validation


def as_json(validation: Validation) -> str:
    """The report as text."""
    return dumped(validation.to_dict())


def dumped(content: dict[str, Any]) -> str:
    """A report's content as text."""
    return json_text(content) + "\n"


def write_report(validation: Validation, path: Path) -> None:
    """Write the report in one step. UsageError where it cannot be written."""
    write_whole(path, as_json(validation))


def write_whole(path: Path, text: str) -> None:
    """Write a report or its page in one step: a killed run leaves the old file. UsageError where that fails."""
    draft = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        reason = error.strerror or error
        raise UsageError(f"The report {path} cannot be written ({reason}).", "Choose another --report FILE.") from None
