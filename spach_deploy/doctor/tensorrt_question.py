"""Whether a TensorRT package imports, and what it says of a plan's header. Runs in a child process (`probe`).

TensorRT for RTX can judge a plan by its header alone (`Runtime.get_engine_validity`). Loading a plan from elsewhere
would mean running its code. Source: TensorRT for RTX, "Engine Compatibility", "Compatibility Checks".
"""

from __future__ import annotations

import importlib
from typing import Any


def answer(module: str, header: str = "") -> dict[str, Any]:
    """The package's version, or `error`; with a plan's first bytes in hex also `validity` and `flaws`."""
    try:
        trt = importlib.import_module(module)
        found: dict[str, Any] = {"version": str(getattr(trt, "__version__", ""))}
    except Exception as error:  # OSError, ImportError, and what else a package may raise
        return {"error": f"{error}".splitlines()[0] if str(error) else type(error).__name__}
    return {**found, **judge(trt, bytes.fromhex(header))} if header else found


def judge(trt: Any, header: bytes) -> dict[str, Any]:
    """`validity` (VALID, SUBOPTIMAL, INVALID) and `flaws`, the names of its diagnostics; {} where this TensorRT cannot
    tell.
    """
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    if not hasattr(runtime, "get_engine_validity") or len(header) < runtime.engine_header_size:
        return {}
    validity, bits = runtime.get_engine_validity(header[: runtime.engine_header_size])
    kinds = trt.EngineInvalidityDiagnostics.__members__
    flaws = [name for name, kind in kinds.items() if int(bits) & int(kind.value)]
    return {"validity": validity.name, "flaws": flaws}
