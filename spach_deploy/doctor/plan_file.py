"""A plan from anywhere, as far as its bytes tell: who built it, for which GPUs, what stands before it, is it whole.

The headers are not documented as a whole. What is read, and where that is known from:

- `ftrt`, TensorRT from 8.6 on: a serialization version at byte 4, and where it is 0 the four numbers of the product's
  version at bytes 24 to 27 (NVIDIA/TensorRT, samples/common/sampleEngines.cpp, which prints them for
  `trtexec --getPlanVersionOnly`). At byte 16 stands what in a published dump is the size in bytes, which is taken for
  a hint only. For which GPU it was built stands in no known place.
- `ptrt`, TensorRT up to 8.5: a serialization version at byte 8; three are known (NVIDIA/TensorRT issue 3073).
- `vtrt`, TensorRT for RTX: size at byte 16, version at 24 to 27, and after a second `vtrt` at byte 28 a bit for each
  compute capability that it was built for (seen by building for each with 1.7.1).
- Before a plan may stand metadata: four bytes of length and JSON (Ultralytics), or anything else (NVIDIA/TensorRT issue
  1751 invites to do so). A plan is looked for in the first megabyte.

So all of this explains; whether a plan loads is decided by TensorRT.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from spach_deploy.runtime.devices import RTX_CAPABILITIES
from spach_deploy.runtime.plan_identity import HEADER_BYTES, PlanIdentity, plan_identity
from spach_deploy.specs import ComputeCapability, Flavour

SEARCHED_BYTES = 1 << 20
"""How far into a file a plan is looked for."""

_RTX, _ORDINARY, _OLD = b"vtrt", b"ftrt", b"ptrt"
_OLD_VERSIONS = {205: "8.2", 213: "8.4", 232: "8.5"}
_PLAUSIBLE_MAJORS = range(8, 16)
_MOST_BYTES = 1 << 40
_LONGEST_JSON = 1 << 24


@dataclasses.dataclass(frozen=True)
class PlanFile:
    """What a file with a plan in it tells.

    `offset`: where the plan begins; `before` says in words what stands there. `version` has four numbers where the
    header has them. `gpus` is None where the bytes do not tell; `newer_gpus`: it also carries code that later ones can
    compile. `missing_bytes` and `surplus_bytes` are against the size in the header; `perhaps_cut` where that is a hint.
    """

    flavour: Flavour
    version: str | None
    head: bytes
    total_bytes: int
    offset: int = 0
    before: str = ""
    gpus: tuple[ComputeCapability, ...] | None = None
    newer_gpus: bool = False
    missing_bytes: int = 0
    surplus_bytes: int = 0
    perhaps_cut: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether TensorRT can be given the file as it is."""
        return not (self.offset or self.missing_bytes or self.surplus_bytes)


def find_plan(path: Path) -> PlanFile | None:
    """The plan in a file; None where there is none within reach. Raises OSError where the file cannot be read."""
    total = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(SEARCHED_BYTES)
        offset, before = _locate(start, total)
        if offset is None:
            return None
        file.seek(offset)
        head = file.read(HEADER_BYTES)
    return _read(head, total, offset, before)


def _locate(start: bytes, total: int) -> tuple[int | None, str]:
    """Where the plan begins, and what stands before it."""
    if start[:4] in (_RTX, _ORDINARY, _OLD):
        return 0, ""
    length = json_prefix(start)
    if length is not None and start[4 + length : 8 + length] in (_RTX, _ORDINARY, _OLD):
        return 4 + length, f"{4 + length:,} bytes of JSON with their length, as Ultralytics writes them"
    for offset in _candidates(start):
        if _is_plausible(start[offset : offset + HEADER_BYTES], total - offset):
            return offset, f"{offset:,} bytes of another tool's"
    return None, ""


def json_prefix(start: bytes) -> int | None:
    """Bytes of JSON that follow a 4-byte length at the start of a file; None where there are none."""
    length = int.from_bytes(start[:4], "little")
    if not 2 <= length <= min(_LONGEST_JSON, len(start) - 4) or start[4:5] != b"{":
        return None
    try:
        json.loads(start[4 : 4 + length])
    except (ValueError, RecursionError):
        return None
    return length


def _candidates(start: bytes) -> list[int]:
    """Where a magic number stands, in the order of the file."""
    found = []
    for magic in (_RTX, _ORDINARY):
        offset = start.find(magic)
        while offset >= 0:
            found.append(offset)
            offset = start.find(magic, offset + 1)
    return sorted(found)


def _is_plausible(head: bytes, total: int) -> bool:
    """Whether what follows a magic number in the middle of a file reads like a header: any bytes may spell it."""
    if len(head) < HEADER_BYTES or int.from_bytes(head[4:8], "little"):
        return False
    if head[:4] == _RTX:
        return head[28:32] == _RTX or int.from_bytes(head[16:24], "little") == total
    return head[24] in _PLAUSIBLE_MAJORS


def _read(head: bytes, total: int, offset: int, before: str) -> PlanFile:
    identity = plan_identity(head, total - offset)
    assert identity.flavour is not None
    declared = int.from_bytes(head[16:24], "little") if len(head) >= HEADER_BYTES else HEADER_BYTES
    excess = (total - offset) - declared
    plan = PlanFile(identity.flavour, _version(head, identity), head, total, offset, before)
    if len(head) < HEADER_BYTES:
        return dataclasses.replace(plan, missing_bytes=-excess)
    if head[:4] == _ORDINARY:
        return dataclasses.replace(plan, perhaps_cut=excess < 0 and declared < _MOST_BYTES)
    if head[:4] == _OLD:
        return plan
    gpus, newer = _rtx_gpus(head)
    missing, surplus = max(0, -excess), max(0, excess)
    return dataclasses.replace(plan, gpus=gpus, newer_gpus=newer, missing_bytes=missing, surplus_bytes=surplus)


def _version(head: bytes, identity: PlanIdentity) -> str | None:
    if head[:4] == _OLD:
        return _OLD_VERSIONS.get(head[8]) if len(head) > 8 else None
    if identity.version is None or int.from_bytes(head[4:8], "little"):
        return None
    return ".".join(str(number) for number in head[24:28])


def _rtx_gpus(head: bytes) -> tuple[tuple[ComputeCapability, ...] | None, bool]:
    """The GPUs whose bits are set, and whether the bit beyond them, for later ones, is set."""
    bits = int.from_bytes(head[32:36], "little")
    beyond = len(RTX_CAPABILITIES)
    if head[28:32] != _RTX or not bits or bits >> (beyond + 1):
        return None, False
    gpus = tuple(gpu for position, gpu in enumerate(RTX_CAPABILITIES) if bits >> position & 1)
    return gpus, bool(bits >> beyond & 1)
