"""Clients of a Triton server: tritonclient, from the environment that carries the server."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.packaging.triton.server import Server
from tests.packaging.triton.server_environment import environment

Arrays = dict[str, npt.NDArray[Any]]

TYPES = {"float32": "FP32", "float16": "FP16", "uint8": "UINT8", "int64": "INT64", "object": "BYTES"}


@contextlib.contextmanager
def client_packages() -> Iterator[None]:
    """tritonclient can be imported; packages that are here already come first."""
    path = str(environment())
    sys.path.append(path)
    try:
        yield
    finally:
        sys.path.remove(path)


class Client:
    """One client, of HTTP or gRPC; not to be shared by threads."""

    def __init__(self, server: Server, protocol: str) -> None:
        self._module = importlib.import_module(f"tritonclient.{protocol}")
        port = server.grpc if protocol == "grpc" else server.http
        self.raw = self._module.InferenceServerClient(f"127.0.0.1:{port}")

    def ask(
        self, model: str, version: str = "", outputs: list[str] | None = None, **inputs: npt.NDArray[Any]
    ) -> Arrays:
        """All outputs, or those that are named."""
        result = self.raw.infer(model, self.tensors(inputs), model_version=version, outputs=self.wanted(outputs))
        response = result.get_response()
        found = response["outputs"] if isinstance(response, dict) else response.outputs
        names = [entry["name"] if isinstance(entry, dict) else entry.name for entry in found]
        return {name: result.as_numpy(name) for name in names}

    def tensors(self, inputs: Mapping[str, npt.NDArray[Any]]) -> list[Any]:
        tensors = []
        for name, array in inputs.items():
            tensor = self._module.InferInput(name, list(array.shape), TYPES[str(array.dtype)])
            tensor.set_data_from_numpy(np.ascontiguousarray(array))
            tensors.append(tensor)
        return tensors

    def wanted(self, outputs: list[str] | None, class_count: int = 0) -> list[Any] | None:
        """Outputs by name, as classes where a count is given."""
        if outputs is None:
            return None
        return [self._module.InferRequestedOutput(name, class_count=class_count) for name in outputs]

    def close(self) -> None:
        self.raw.close()


@contextlib.contextmanager
def client(server: Server, protocol: str) -> Iterator[Client]:
    """A client, closed with the block."""
    made = Client(server, protocol)
    try:
        yield made
    finally:
        made.close()
