"""Plans of the test double: a plan's header, what a builder would have fixed, and the graph (double/)."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

from spach_deploy.bundle.store import GRAPH, PLAN
from spach_deploy.options.specs import BatchProfile
from tests import small_bundles

MARK = b"SPACH-DOUBLE\n".ljust(16, b"\0")
GPUS = (86, 89)
VERSIONS = {"tensorrt-rtx": (1, 7, 1), "tensorrt": (10, 13, 2)}
MAGIC = {"tensorrt-rtx": b"vtrt", "tensorrt": b"ftrt"}


def plan_bytes(graph: bytes, batch: BatchProfile, flavour: str = "tensorrt-rtx") -> bytes:
    """A plan that the double runs by running `graph`."""
    body = MARK + struct.pack("<5I", batch.min, batch.opt, batch.max, len(GPUS), len(graph))
    body += struct.pack(f"<{len(GPUS)}I", *GPUS) + graph
    header = bytearray(64)
    header[:4] = MAGIC[flavour]
    if flavour == "tensorrt-rtx":
        header[16:24] = (64 + len(body)).to_bytes(8, "little")
    header[24:27] = bytes(VERSIONS[flavour])
    return bytes(header) + body


def give_plan(directory: Path, flavour: str = "tensorrt-rtx") -> None:
    """Make the bundle one whose engine the double runs."""
    batch = BatchProfile(**small_bundles.read_manifest(directory)["batch"])
    content = plan_bytes((directory / GRAPH).read_bytes(), batch, flavour)
    version = ".".join(str(number) for number in VERSIONS[flavour])
    set_plan(directory, content, flavour, f"{version}.6", [f"sm{gpu}" for gpu in GPUS])


def set_plan(directory: Path, content: bytes, flavour: str, version: str, gpus: list[str]) -> None:
    """Make the bundle one with this engine."""
    manifest = small_bundles.read_manifest(directory)
    (directory / PLAN).write_bytes(content)
    manifest["files"][PLAN] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    manifest["engine"] = {"flavour": flavour, "version": version, "gpus": gpus, "tf32": True}
    small_bundles.write_manifest(directory, manifest)
