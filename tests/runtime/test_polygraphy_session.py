from __future__ import annotations

import logging
import sys
import types
from typing import Any

import pytest

from spach_deploy.runtime import polygraphy_session
from spach_deploy.runtime.polygraphy_session import LogLine, captured_log, reason_of_failure, summarize_warnings


def error(text: str) -> LogLine:
    return LogLine(0.0, "error", text)


def test_polygraphys_log_is_collected_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    from polygraphy.logger import G_LOGGER

    for _ in range(2):  # also what it logs once per process
        with captured_log() as lines:
            G_LOGGER.warning("careful", mode=1)
            G_LOGGER.error("broken")
            G_LOGGER.extra_verbose("chatter")
        assert [(line.severity, line.text) for line in lines] == [("warning", "careful"), ("error", "broken")]
    assert capfd.readouterr() == ("", "")


class FakeTensorRT:
    """As much of a TensorRT as the logger touches."""

    class Logger:
        VERBOSE = 4

    class ILogger:
        pass


def test_polygraphy_is_not_told_what_nobody_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, str]] = []
    util = types.SimpleNamespace(
        TRT_LOGGER=None,
        get_trt_logger=lambda: types.SimpleNamespace(log=lambda severity, text: told.append((severity, text))),
    )
    monkeypatch.setitem(sys.modules, "polygraphy.backend.trt.util", util)
    polygraphy_session._leave_out_verbose(FakeTensorRT)
    logger: Any = util.TRT_LOGGER
    for severity in range(5):
        logger.log(severity, "word")
    assert told == [(severity, "word") for severity in range(4)]


def test_logging_is_as_before_afterwards() -> None:
    from polygraphy.logger import G_LOGGER

    before = (G_LOGGER.use_python_logging_system, G_LOGGER.module_severity.get(), G_LOGGER.letter)
    handlers = list(logging.getLogger("Polygraphy").handlers)
    with captured_log():
        assert G_LOGGER.use_python_logging_system
    assert (G_LOGGER.use_python_logging_system, G_LOGGER.module_severity.get(), G_LOGGER.letter) == before
    assert logging.getLogger("Polygraphy").handlers == handlers


def test_warnings_that_differ_in_numbers_only_are_one_kind() -> None:
    lines = [LogLine(0.0, "warning", f"layer {index} is slow") for index in range(5)]
    assert summarize_warnings([*lines, error("x")]) == (("layer 0 is slow", 5),)


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ([], ""),
        (["Invalid Engine. Please ensure the engine was built correctly"], ""),
        (
            ["IBuilder::b: Error Code 1: Myelin ([pass.cpp:337: check] Cannot compile 'fc1'. In run at /s/c.cpp:2)"],
            "Cannot compile 'fc1'.",
        ),
        (
            [
                "ModelImporter.cpp:140: While parsing node number 0",
                "In node 0 with name: a.b and operator: Det (checkDet): UNSUPPORTED_NODE: false",
                "Could not parse ONNX correctly",
            ],
            "node 'a.b' (Det): operator Det is not supported",
        ),
        (["ModelImporter.cpp:140: only an echo"], "ModelImporter.cpp:140: only an echo"),
        (["something that no pattern knows"], "something that no pattern knows"),
    ],
)
def test_the_reason_is_found_in_the_log(log: list[str], reason: str) -> None:
    assert reason_of_failure([error(text) for text in log]) == reason
