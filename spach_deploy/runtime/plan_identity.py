"""Identify a TensorRT plan by its header: the flavour and version that wrote it, and whether the file is complete.

The header is not documented. These fields were seen in plans of TensorRT for RTX 1.7: magic `vtrt`, serialization
version at byte 8, total size at 16, product version at 24. For ordinary TensorRT (magic `ftrt`), NVIDIA/TensorRT issue
3073 reports the version at byte 24. So this only refuses files that are no plan, and explains plans that do not load;
whether a plan loads is TensorRT's decision.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from spach_deploy.options.specs import Flavour

HEADER_BYTES = 64
"""How many leading bytes `plan_identity` reads."""

_MAGIC = {b"vtrt": Flavour.TENSORRT_RTX, b"ftrt": Flavour.TENSORRT, b"ptrt": Flavour.TENSORRT}


@dataclasses.dataclass(frozen=True)
class PlanIdentity:
    """Fields of a plan's header; None where unknown. `problem`: why this is no complete plan, as a clause, or None."""

    flavour: Flavour | None
    version: str | None
    problem: str | None

    @property
    def is_plan(self) -> bool:
        """Whether this is a complete TensorRT plan, by its header."""
        return self.problem is None


def plan_identity(head: bytes | memoryview, total_bytes: int | None = None) -> PlanIdentity:
    """Identify a plan by its first HEADER_BYTES bytes. `total_bytes` is its size where `head` is not all of it."""
    start = bytes(head[:HEADER_BYTES])
    total = len(head) if total_bytes is None else total_bytes
    flavour = _MAGIC.get(start[:4])
    if flavour is None:
        return PlanIdentity(None, None, _what_else(bytes(head[:512])))
    if total < HEADER_BYTES:
        return PlanIdentity(flavour, None, f"it ends after {total} bytes")
    version = None if start[:4] == b"ptrt" else ".".join(str(number) for number in start[24:27])
    problem = _truncation(start, total) if flavour is Flavour.TENSORRT_RTX else None
    return PlanIdentity(flavour, version, problem)


def identify_plan_file(path: Path) -> PlanIdentity:
    """`plan_identity` of a file, of which only the header is read. OSError as `open` raises it."""
    with path.open("rb") as file:
        return plan_identity(file.read(512), path.stat().st_size)


def _truncation(start: bytes, total: int) -> str | None:
    declared = int.from_bytes(start[16:24], "little")
    return None if declared == total else f"its header declares {declared} bytes and it has {total}"


def _what_else(head: bytes) -> str:
    if not head:
        return "it is empty"
    if head[:2] == b"PK":
        return "it is a zip archive, such as torch.save or numpy.savez write"
    try:
        text = head.decode("utf-8", errors="strict") if len(head) < 512 else head[:-4].decode("utf-8")
    except UnicodeDecodeError:
        return "it does not begin as TensorRT plans do"
    printable = all(character.isprintable() or character.isspace() for character in text)
    return "it is a text file" if printable else "it does not begin as TensorRT plans do"
