"""The exporter's modules are loaded in another thread."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading

import pytest

from spach_deploy.onnx_graph import warm

CHECK = """
import sys
from spach_deploy.onnx_graph.warm import MODULES, exporter_loading
with exporter_loading():
    pass
assert not (missing := [name for name in MODULES if name not in sys.modules]), missing
before = set(sys.modules)
from tests.static_models import small_model
from spach_deploy.onnx_graph.export import torch_export
from spach_deploy.rewrites import rewrite
torch_export(rewrite(small_model("conv")).model, 32)
print(sorted(name for name in set(sys.modules) - before if name.startswith(("torch._dynamo", "onnxscript"))))
"""


def test_the_exporter_finds_its_modules_loaded() -> None:
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, check=True)
    late = done.stdout.strip().splitlines()[-1]
    assert late.count(",") < 40, late  # of more than a thousand modules


def test_the_block_ends_with_all_loaded_and_the_old_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    began = sys.getswitchinterval()
    seen = []
    monkeypatch.setattr(warm, "MODULES", ("no_such_module", "json"))
    monkeypatch.setattr(importlib, "import_module", lambda name: seen.append((name, threading.current_thread())))
    with pytest.raises(KeyError), warm.exporter_loading():
        raise KeyError
    assert [name for name, _ in seen] == ["no_such_module", "json"]
    assert all(thread is not threading.main_thread() for _, thread in seen)
    assert sys.getswitchinterval() == began


def test_a_module_that_is_missing_is_left_to_who_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "MODULES", ("no_such_module", "this"))
    monkeypatch.delitem(sys.modules, "this", raising=False)
    with warm.exporter_loading():
        pass
    assert "this" in sys.modules
