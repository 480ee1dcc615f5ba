"""Tracing in a copy of this process: its answer, and what it leaves to others."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

from spach_deploy.common.errors import CertificateError
from spach_deploy.graph import tracing
from spach_deploy.graph.block_prototype import prototype_of
from spach_deploy.graph.export import ExportedPrototype, trace
from spach_deploy.graph.tracing import Tracing
from spach_deploy.models.spach import Spach
from spach_deploy.runtime import beside
from tests.static_models import CLASSES, CONFIGS, IMAGE_SIZE

FRESH = Spach(CONFIGS["trans"], image_size=IMAGE_SIZE, num_classes=CLASSES).eval()
"""A model that no other test can have hung anything on."""

PROTOTYPE = prototype_of(FRESH)


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no Ray, which other tests of this process may have loaded."""
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    monkeypatch.setattr(beside, "available_threads", lambda: 2)


def test_the_copy_traces_what_it_is_sent() -> None:
    with Tracing() as copy:
        copy.ask(PROTOTYPE, IMAGE_SIZE)
        assert copy.answer() == trace(PROTOTYPE, IMAGE_SIZE)


def test_there_is_no_answer_on_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "available_threads", lambda: 1)
    with Tracing() as copy:
        copy.ask(PROTOTYPE, IMAGE_SIZE)
        assert copy.answer() is None


def fails(*arguments: Any) -> ExportedPrototype:
    raise CertificateError("It cannot be traced.")


def ends(*arguments: Any) -> ExportedPrototype:
    os._exit(3)


@pytest.mark.parametrize("fault", [fails, ends])
def test_a_copy_that_cannot_trace_has_no_answer(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "trace", fault)
    with Tracing() as copy:
        copy.ask(PROTOTYPE, IMAGE_SIZE)
        assert copy.answer() is None


def test_a_copy_that_is_gone_is_asked_in_vain() -> None:
    with Tracing() as copy:
        copy._copy._process.kill()
        copy._copy._process.join()
        copy.ask(PROTOTYPE, IMAGE_SIZE)
        assert copy.answer() is None


def test_one_that_is_never_asked_ends() -> None:
    with Tracing() as copy:
        process = copy._copy._process
        assert process.is_alive()
    assert not process.is_alive()


def test_what_cannot_be_sent_is_left_to_others() -> None:
    model = Spach(CONFIGS["trans"], image_size=IMAGE_SIZE, num_classes=CLASSES).eval()
    model.head.register_forward_hook(lambda *_: None)
    with Tracing() as copy:
        copy.ask(prototype_of(model), IMAGE_SIZE)
        assert copy.answer() is None
