"""Triton's HTTP side, with the standard library alone.

A request has a deadline for the whole of it, however slowly a server sends, and its answer a largest size. Tensors
travel in Triton's binary form: JSON, whose length is a header's, and the bytes behind it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from spach_deploy.runtime import TensorSpec
from spach_deploy.small_files import parse_json

DTYPES = {
    **{"BOOL": "bool", "BYTES": "object", "BF16": "bfloat16"},
    **{"FP16": "float16", "FP32": "float32", "FP64": "float64"},
    **{f"{sign}INT{bits}": f"{sign.lower()}int{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)},
}
"""NumPy's names of Triton's."""

MOST_BYTES = 1 << 28
"""Of an answer whose size is not known before."""

_JSON_BYTES = 1 << 20
"""Of the JSON in front of the tensors."""

_HEADER_LENGTH = "Inference-Header-Content-Length"
_WIDEST = 8

Array = npt.NDArray[Any]


class RefusedError(Exception):
    """The server refused the request, or its answer cannot be read."""


class HttpClient:
    """Requests to the server at `host` and `port`, each within `timeout_s`.

    OSError and http.client.HTTPException where no answer comes, RefusedError where it is a refusal or cannot be read.
    """

    def __init__(self, host: str, port: int, *, is_secure: bool, timeout_s: float) -> None:
        self._kind = http.client.HTTPSConnection if is_secure else http.client.HTTPConnection
        self._host, self._port, self._timeout_s = host, port, timeout_s

    def close(self) -> None:
        """Nothing is open between requests."""

    def is_server_live(self) -> bool:
        """Whether the server answers."""
        return self._request("GET", "/v2/health/live").status == 200

    def is_model_ready(self, model: str, version: str) -> bool:
        """Whether it serves the model."""
        return self._request("GET", f"{_path(model, version)}/ready").status == 200

    def metadata(self, model: str, version: str) -> Any:
        """Inputs and outputs of the model."""
        return self._json("GET", _path(model, version))

    def config(self, model: str, version: str) -> Any:
        """The model's configuration."""
        return self._json("GET", f"{_path(model, version)}/config")

    def repository_index(self) -> Any:
        """All models."""
        return self._json("POST", "/v2/repository/index")

    def infer(
        self, model: str, version: str, feeds: Mapping[str, Array], outputs: Mapping[str, TensorSpec]
    ) -> dict[str, Array]:
        """The outputs of `feeds`."""
        body, length = _body(feeds, list(outputs))
        headers = {_HEADER_LENGTH: str(length), "Content-Type": "application/octet-stream"}
        most = _answer_bytes(outputs, len(next(iter(feeds.values()))))
        answer = self._request("POST", f"{_path(model, version)}/infer", body, headers, most)
        return answer.accepted().tensors(outputs)

    def _json(self, method: str, path: str) -> Any:
        return self._request(method, path).accepted().json()

    def _request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        most_bytes: int = 16 * _JSON_BYTES,
    ) -> Answer:
        connection = self._kind(self._host, self._port, timeout=self._timeout_s)
        with contextlib.closing(connection), _deadline(connection, self._timeout_s):
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            content = response.read(most_bytes + 1)
            if len(content) > most_bytes:
                raise RefusedError(f"its answer has more than {most_bytes:,} bytes")
            return Answer(response.status, response.getheader(_HEADER_LENGTH), content)


class Answer:
    """What came back."""

    def __init__(self, status: int, header_length: str | None, content: bytes) -> None:
        self.status, self._content = status, content
        self._header_length = header_length

    def accepted(self) -> Answer:
        """This, where the server did what was asked. RefusedError with its reason otherwise."""
        if self.status == 200:
            return self
        with contextlib.suppress(ValueError, TypeError, KeyError):
            raise RefusedError(str(parse_json(self._content.decode())["error"])[:500])
        raise RefusedError(f"status {self.status}")

    def json(self) -> Any:
        """All of it as JSON."""
        try:
            return parse_json(self._content.decode())
        except ValueError as error:
            raise RefusedError(f"its answer is no JSON: {error}") from None

    def tensors(self, wanted: Mapping[str, TensorSpec]) -> dict[str, Array]:
        """The tensors that follow the JSON, in its order."""
        try:
            start = int(self._header_length or "")
            found, at = {}, start
            for entry in parse_json(self._content[:start].decode())["outputs"]:
                size = int(entry["parameters"]["binary_data_size"])
                if size < 0 or at + size > len(self._content):
                    raise ValueError("it ends too early")
                found[str(entry["name"])] = _array(entry, self._content[at : at + size])
                at += size
            return {name: found[name] for name in wanted}
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise RefusedError(f"its answer cannot be read: {type(error).__name__}: {error}") from None


@contextlib.contextmanager
def _deadline(connection: http.client.HTTPConnection, seconds: float) -> Iterator[None]:
    """Connect, and end the connection when the time is over: a socket's own limit begins anew with every byte."""
    is_late = threading.Event()

    def end() -> None:
        is_late.set()
        for found in {opened, connection.sock} - {None}:
            with contextlib.suppress(OSError):
                found.shutdown(socket.SHUT_RDWR)

    opened: Any = None
    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        connection.connect()
        opened = connection.sock
        yield
    except (OSError, http.client.HTTPException):
        if is_late.is_set():
            raise TimeoutError(f"not whole within {seconds:g} s") from None
        raise
    finally:
        timer.cancel()
    if is_late.is_set():  # what was read may end where the connection was ended
        raise TimeoutError(f"not whole within {seconds:g} s")


def _path(model: str, version: str) -> str:
    return f"/v2/models/{model}{f'/versions/{version}' if version else ''}"


def _body(feeds: Mapping[str, Array], outputs: Sequence[str]) -> tuple[bytes, int]:
    """A request in Triton's binary form, and the length of the JSON in front."""
    tensors = {name: np.ascontiguousarray(array).tobytes() for name, array in feeds.items()}
    inputs = [
        {
            "name": name,
            "datatype": triton_dtype(array.dtype),
            "shape": list(array.shape),
            "parameters": {"binary_data_size": len(tensors[name])},
        }
        for name, array in feeds.items()
    ]
    wanted = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
    header = json.dumps({"inputs": inputs, "outputs": wanted}).encode()
    return header + b"".join(tensors.values()), len(header)


def _answer_bytes(outputs: Mapping[str, TensorSpec], batch: int) -> int:
    """The most that an answer to `batch` images may have."""
    if any(None in spec.shape[1:] for spec in outputs.values()):
        return MOST_BYTES
    rows = sum(math.prod(size or 1 for size in spec.shape[1:]) for spec in outputs.values())
    return min(MOST_BYTES, _JSON_BYTES + _WIDEST * batch * rows)


def _array(entry: Mapping[str, Any], data: bytes) -> Array:
    shape = [int(size) for size in entry["shape"]]
    if entry["datatype"] == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return np.frombuffer(data, np.dtype(DTYPES[entry["datatype"]])).reshape(shape)


def triton_dtype(dtype: np.dtype[Any]) -> str:
    """Triton's name of a NumPy dtype."""
    return next(name for name, numpy_name in DTYPES.items() if numpy_name == str(dtype))
