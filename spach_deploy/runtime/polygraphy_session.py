"""Polygraphy's settings for a whole process: the flavour of TensorRT that it uses, and where its log goes.

Polygraphy binds `tensorrt` or `tensorrt_rtx` when its TensorRT loaders are first imported, and keeps it. `use_tensorrt`
makes that choice, and raises an error if the other flavour is wanted later. Engines are built in worker processes
(`spach_deploy.engine.build`), so only running a plan binds the main process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import re
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from spach_deploy.common.errors import UnavailableError
from spach_deploy.options.specs import Flavour
from spach_deploy.runtime.devices import MODULE_NAMES

_LOADERS = "polygraphy.backend.trt"
_lock = threading.Lock()


def use_tensorrt(flavour: Flavour) -> Any:
    """Bind Polygraphy in this process to `flavour`, and return that flavour's module.

    Raises UnavailableError when Polygraphy is bound to the other one already, ImportError when the module is absent or
    its libraries do not load.
    """
    wants_rtx = flavour is Flavour.TENSORRT_RTX
    with _lock:
        config: Any = importlib.import_module("polygraphy.config")
        if _LOADERS in sys.modules and wants_rtx != config.USE_TENSORRT_RTX:
            raise UnavailableError(
                f"Polygraphy drives one TensorRT per process, here {_bound_flavour(config).value} already.",
                f"Use {flavour.value} in a process of its own.",
            )
        config.USE_TENSORRT_RTX = wants_rtx
        config.AUTOINSTALL_DEPS = False  # Polygraphy must not install packages
        module = importlib.import_module(MODULE_NAMES[flavour])
        if _LOADERS not in sys.modules:
            importlib.import_module(_LOADERS)
            _leave_out_verbose(module)
        return module


def _leave_out_verbose(trt: Any) -> None:
    """Pass TensorRT's messages to Polygraphy without the verbose ones.

    There are tens of thousands of those; nobody keeps them, and Polygraphy takes microseconds for each while the
    compiler waits.
    """
    util: Any = importlib.import_module(f"{_LOADERS}.util")
    told = util.get_trt_logger()

    class Terse(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity != trt.Logger.VERBOSE:
                told.log(severity, text)

    util.TRT_LOGGER = Terse()


def _bound_flavour(config: Any) -> Flavour:
    return Flavour.TENSORRT_RTX if config.USE_TENSORRT_RTX else Flavour.TENSORRT


@dataclasses.dataclass(frozen=True)
class LogLine:
    """One message of the compiler, the parser or Polygraphy. `seconds` counts from the start of the log."""

    seconds: float
    severity: str
    text: str

    def __str__(self) -> str:
        return f"{self.seconds:8.3f} {self.severity:7} {self.text}"

    @property
    def is_error(self) -> bool:
        """Whether it reports a failure."""
        return self.severity == "error"


class _Collector(logging.Handler):
    def __init__(self, lines: list[LogLine]) -> None:
        super().__init__(level=1)
        self.lines = lines
        self.start = time.perf_counter()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(LogLine(time.perf_counter() - self.start, _severity(record.levelno), str(record.msg)))


def _severity(level: int) -> str:
    if level >= logging.ERROR:
        return "error"
    return "warning" if level >= logging.WARNING else "info"


@contextlib.contextmanager
def captured_log() -> Iterator[list[LogLine]]:
    """Collect what Polygraphy and TensorRT log into the list that is yielded; nothing reaches stdout or stderr.

    Kept are errors, warnings and information; TensorRT's verbose messages (15,000 lines for one model) are not.
    """
    logger = importlib.import_module("polygraphy.logger").G_LOGGER
    settings = ("use_python_logging_system", "module_severity", "colors", "letter")
    before = {name: getattr(logger, name) for name in settings}
    lines: list[LogLine] = []
    handler = _Collector(lines)
    python_logger = logging.getLogger("Polygraphy")
    propagate, level = python_logger.propagate, python_logger.level
    logger.use_python_logging_system, logger.colors, logger.letter = True, False, False
    logger.module_severity = logger.VERBOSE
    logger.once_logged.clear()  # else the log of a second build would lack warnings that the first had
    python_logger.addHandler(handler)
    python_logger.setLevel(1)
    python_logger.propagate = False
    try:
        yield lines
    finally:
        python_logger.removeHandler(handler)
        python_logger.setLevel(level)
        python_logger.propagate = propagate
        for name, value in before.items():
            setattr(logger, name, value)


def summarize_warnings(lines: list[LogLine] | tuple[LogLine, ...]) -> tuple[tuple[str, int], ...]:
    """Warnings of a log as (message, count); messages that differ only in numbers count as one."""
    kinds: dict[str, tuple[str, int]] = {}
    for line in lines:
        if line.severity == "warning":
            kind = re.sub(r"\d+", "#", line.text)
            text, count = kinds.get(kind, (line.text, 0))
            kinds[kind] = (text, count + 1)
    return tuple(kinds.values())


_NODE_ERROR = re.compile(r"^In node -?\d+ with name: (.*?) and operator: (.*?) \(\w+\): \w+: (.*)", re.S)
_API_ERROR = re.compile(r"Error Code \d+: [\w ]+ \((.*?)(?: In \w+ at /[^()]*)?\)$", re.S)
_SOURCE = re.compile(r"\[\w+\.cpp:\d+: \w+\] ")
_EMPTY_WORDS = re.compile(r"^(Invalid Engine|Could not parse ONNX correctly|Could not deserialize engine)")
_ECHO = re.compile(r"ModelImporter\.cpp|checkMacros\.cpp|^IRuntime.*ScopedCudaStream")


def reason_of_failure(lines: list[LogLine] | tuple[LogLine, ...]) -> str:
    """The compiler's or parser's reason for a failure, from its log; empty where the log has none.

    A parser error names its node and operator. Lines that only repeat another are left out.
    """
    errors = [line.text.strip() for line in lines if line.is_error and not _EMPTY_WORDS.match(line.text)]
    if nodes := [_node_reason(match) for text in errors if (match := _NODE_ERROR.match(text))]:
        return "; ".join(dict.fromkeys(nodes))
    told = [text for text in errors if not _ECHO.search(text)] or errors
    return _plain(told[0]) if told else ""


def _node_reason(match: re.Match[str]) -> str:
    name, operator, reason = match.groups()
    words = _plain(reason)
    if words == "false" or "Plugin not found" in words:  # the parser's messages for an operator that it does not know
        words = f"operator {operator} is not supported"
    return f"node {name!r} ({operator}): {words}"


def _plain(text: str) -> str:
    """`text` on one line, without source locations and error codes."""
    told = [line for line in text.splitlines() if not _ECHO.search(line)] or [text]
    matches = [match[1] for line in told if (match := _API_ERROR.search(line))]
    return " ".join(_SOURCE.sub("", matches[0] if matches else " ".join(told)).split())
