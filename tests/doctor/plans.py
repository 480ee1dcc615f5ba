"""Headers of plans: real ones of TensorRT for RTX 1.7.1, and what is publicly known of the others."""

from __future__ import annotations

from spach_deploy.options.specs import ComputeCapability
from spach_deploy.runtime.devices import RTX_CAPABILITIES

_RTX_HEADER = bytes.fromhex(  # of a plan built for sm89 by tensorrt-rtx 1.7.1.116, without its size and its GPUs
    "76747274000000000200000000000000"
    "00000000000000000107017476747274"
    "00000000000000000000000000000000"
    "00000000002100000000000000000000"
)[:64]


def rtx_plan(
    *gpus: ComputeCapability, total: int = 4096, version: tuple[int, ...] = (1, 7, 1, 116), later: bool = False
) -> bytes:
    """A plan of TensorRT for RTX: header, and zeros up to its size. No GPUs: those bits are as a build leaves them."""
    header = bytearray(_RTX_HEADER)
    header[16:24] = total.to_bytes(8, "little")
    header[24:28] = bytes(version)
    bits = sum(1 << RTX_CAPABILITIES.index(gpu) for gpu in gpus) | (1 << len(RTX_CAPABILITIES)) * later
    header[32:36] = bits.to_bytes(4, "little")
    return bytes(header) + bytes(total - len(header))


def ordinary_plan(*version: int, total: int = 4096, declared: int | None = None, serialization: int = 0) -> bytes:
    """A plan of TensorRT 8.6 or newer."""
    header = bytearray(64)
    header[:4] = b"ftrt"
    header[4:8] = serialization.to_bytes(4, "little")
    header[16:24] = (total if declared is None else declared).to_bytes(8, "little")
    header[24:28] = bytes(version)
    return bytes(header) + bytes(total - len(header))


def old_plan(serialization: int, total: int = 4096) -> bytes:
    """A plan of TensorRT 8.5 or older."""
    header = bytearray(64)
    header[:4] = b"ptrt"
    header[8] = serialization
    return bytes(header) + bytes(total - len(header))


def with_metadata(plan: bytes, text: bytes = b'{"task": "classify", "imgsz": [224, 224]}') -> bytes:
    """As Ultralytics writes a plan."""
    return len(text).to_bytes(4, "little") + text + plan
