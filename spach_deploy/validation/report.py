"""report.json: a validation in full."""

from __future__ import annotations

from typing import Any

from spach_deploy.common.errors import UsageError
from spach_deploy.common.files import Destination
from spach_deploy.common.text import json_text
from spach_deploy.validation.validate import Validation


def as_json(validation: Validation) -> str:
    """The report as text."""
    return dumped(validation.to_dict())


def dumped(content: dict[str, Any]) -> str:
    """A report's content as text."""
    return json_text(content) + "\n"


def write_report(validation: Validation, place: Destination) -> None:
    """Write the report in one step. UsageError where it cannot be written."""
    write_whole(place, as_json(validation))


def write_whole(place: Destination, text: str) -> None:
    """Write a report or its page in one step: a killed run leaves the old file. UsageError where that fails."""
    try:
        place.write_text(text)
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(
            f"The report {place.path} cannot be written ({reason}).", "Choose another --report FILE."
        ) from None
