"""Plans of the test double: a plan's header, what a builder would have fixed, and the graph (double/)."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

from spach_deploy.bundle import GRAPH, PLAN
from spach_deploy.specs import BatchProfile
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
    manifest = small_bundles.read_manifest(directory)
    graph = (directory / GRAPH).read_bytes()
    content = plan_bytes(graph, BatchProfile(**manifest["batch"]), flavour)
    (directory / PLAN).write_bytes(content)
    manifest["files"][PLAN] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    version = ".".join(str(number) for number in VERSIONS[flavour])
    gpus = [f"sm{gpu}" for gpu in GPUS]
    manifest["engine"] = {"flavour": flavour, "version": f"{version}.6", "gpus": gpus, "tf32": True}
    small_bundles.write_manifest(directory, manifest)
