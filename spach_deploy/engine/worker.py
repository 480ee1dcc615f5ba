"""The process that builds one engine: loads the compiler, reads a request from a connection, writes progress and the
outcome to it.

Started by `spach_deploy.engine.build`, never by hand.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from spach_deploy.common.errors import SpachError
from spach_deploy.engine.compile import Compiled, ProgressEvent, compile_plan
from spach_deploy.engine.flavours import FLAVOURS
from spach_deploy.engine.network_facts import NetworkFacts
from spach_deploy.options.specs import EngineTarget, Flavour
from spach_deploy.runtime.polygraphy_session import LogLine, use_tensorrt


@dataclasses.dataclass(frozen=True)
class Request:
    """What to build. The plan is written to the open file `plan_fd`."""

    onnx_path: Path
    target: EngineTarget
    plan_fd: int


@dataclasses.dataclass(frozen=True)
class Built:
    """The build succeeded; all but the plan."""

    graph_sha256: str
    version: str
    network: NetworkFacts
    log: tuple[LogLine, ...]
    parse_seconds: float
    build_seconds: float


def main(connection_fd: int, flavour: str) -> None:
    """Serve the one request that comes over the connection with this file descriptor; end where none comes."""
    connection = Connection(connection_fd)
    with contextlib.suppress(Exception):  # ignored here; compile_plan raises it again
        use_tensorrt(Flavour(flavour))
    try:
        request: Request = connection.recv()
    except (EOFError, OSError):
        return
    _exit_with_parent(connection)
    connection.send(_outcome(request, connection.send))


def _outcome(request: Request, send: Callable[[ProgressEvent], None]) -> Built | SpachError:
    try:
        compiled = compile_plan(request.onnx_path, request.target, FLAVOURS[request.target.flavour], send)
        _write_plan(compiled, request.plan_fd)
    except SpachError as error:
        return error
    return Built(
        compiled.graph_sha256,
        compiled.version,
        compiled.network,
        compiled.log,
        compiled.parse_seconds,
        compiled.build_seconds,
    )


def _write_plan(compiled: Compiled, plan_fd: int) -> None:
    with open(plan_fd, "wb") as file:
        file.write(compiled.plan)


def _exit_with_parent(connection: Connection) -> None:
    """End this process when the other end closes, as it does when the parent cancels or dies."""

    def watch() -> None:
        try:
            connection.recv()
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
