"""Loads what torch.onnx.export needs in another thread, while this one computes.

The exporter's modules take three seconds to load, on one core; a model's arithmetic waits for no module.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from collections.abc import Iterator

MODULES = ("torch._dynamo", "torch.export", "torch.onnx.ops", "onnxscript.function_libs.torch_lib.ops", "onnxsim")
"""In torch.onnx.export's order. Some are not public: one that is missing is loaded, or missed, by who needs it."""

_TURN_SECONDS = 0.0005
"""How long a thread may keep the interpreter: the default is ten times as long, and each operator would wait for it."""


@contextlib.contextmanager
def exporter_loading() -> Iterator[None]:
    """The exporter's modules are loaded beside the block, which should load none of its own, and are there after it."""
    thread = threading.Thread(target=_load, name="exporter's modules")
    turn = sys.getswitchinterval()
    sys.setswitchinterval(_TURN_SECONDS)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        sys.setswitchinterval(turn)


def _load() -> None:
    for name in MODULES:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
