"""The worker process that builds one engine. `spach_deploy.engine.build` starts it.

It loads the compiler, reads one `Request` from a connection, and writes progress and the outcome (`Built` or an error)
to it.
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
    """What to build. `plan_fd`: descriptor of the open file to which the plan is written."""

    onnx_path: Path
    target: EngineTarget
    plan_fd: int


@dataclasses.dataclass(frozen=True)
class Built:
    """The outcome of a successful build, without the plan, which is in the request's file."""

    graph_sha256: str
    version: str
    network: NetworkFacts
    log: tuple[LogLine, ...]
    parse_seconds: float
    build_seconds: float


def main(connection_fd: int, flavour: str) -> None:
    """Build for the one request on the connection `connection_fd`; return if the connection closes without one."""
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
    """Start a thread that ends this process when the parent closes the connection, cancels the build or dies."""

    def watch() -> None:
        try:
            connection.recv()
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
