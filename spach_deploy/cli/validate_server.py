"""spach-validate http://… and grpc://…: which options belong to a model on a server, and its validation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from spach_deploy.errors import UsageError

if TYPE_CHECKING:
    from spach_deploy.validation.validate import Validation


def is_server(target: str) -> bool:
    """Whether the target is meant as a model on a server, not as a file."""
    return re.match(r"(https?|grpcs?)://", target) is not None


def check_bundle(bundle: Path | None) -> None:
    """UsageError for a --bundle with a target that has its own."""
    if bundle is not None:
        raise UsageError("--bundle is for models on a server.", "Give http://HOST:PORT/MODEL, or leave it out.")


def validate_on_server(url: str, bundle: Path | None, misplaced: Mapping[str, object]) -> Validation:
    """The validation of the model at `url`. UsageError where the bundle is missing or an option of files is given."""
    given = [option for option, value in misplaced.items() if value is not None]
    if given:
        raise UsageError(f"{given[0]} is not for models on a server.", "They are sent the bundle's golden pack.")
    if bundle is None:
        raise UsageError("A server has no golden pack.", "Give --bundle DIR, what the model was packaged from.")
    from spach_deploy.runtime.triton_runner import ServedAt
    from spach_deploy.validation.server import ServerRequest, validate_server

    return validate_server(ServerRequest(ServedAt.parse(url), bundle))
