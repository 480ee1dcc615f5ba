"""Run a model on a Triton inference server, over HTTP or gRPC.

    http://localhost:8000/ms_hybrid_s        grpc://localhost:8001/ms_hybrid_s/2

HTTP uses the standard library (`HttpClient`). gRPC needs tritonclient, which is no dependency of this package and is
imported on use.

A request over HTTP has one deadline for all of it, however slowly the server sends, and its response a largest size.
Tensors are sent in the binary form of KServe's protocol v2 as Triton extends it: JSON, whose length is in a header, and
after it the bytes of all tensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import importlib
import json
import math
import re
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from spach_deploy.common.errors import MismatchError, MissingPackageError, UnavailableError, UsageError
from spach_deploy.common.files import parse_json
from spach_deploy.runtime import TensorSpec
from spach_deploy.runtime.batching import Arrays, BatchLimits, Feeds, check_feeds, run_in_batches

if TYPE_CHECKING:
    from typing_extensions import Self


DTYPES = {
    **{"BOOL": "bool", "BYTES": "object", "BF16": "bfloat16"},
    **{"FP16": "float16", "FP32": "float32", "FP64": "float64"},
    **{f"{sign}INT{bits}": f"{sign.lower()}int{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)},
}
"""By Triton's name of a data type: NumPy's name."""

MOST_BYTES = 1 << 28
"""Largest response in bytes, where its size does not follow from the request."""

_JSON_BYTES = 1 << 20
"""Largest JSON before the tensors of a response, in bytes."""

_HEADER_LENGTH = "Inference-Header-Content-Length"
_WIDEST = 8

Array = npt.NDArray[Any]


class RefusedError(Exception):
    """The server refused the request, or its response cannot be read."""


class HttpClient:
    """Sends requests to the server at `host` and `port`, each within `timeout_s` seconds.

    Methods raise OSError or http.client.HTTPException without a response, RefusedError for a refusal or a response that
    cannot be read.
    """

    def __init__(self, host: str, port: int, *, is_secure: bool, timeout_s: float) -> None:
        self._kind = http.client.HTTPSConnection if is_secure else http.client.HTTPConnection
        self._host, self._port, self._timeout_s = host, port, timeout_s

    def close(self) -> None:
        """Does nothing: every request has its own connection."""

    def is_server_live(self) -> bool:
        """Whether the server is live."""
        return self._request("GET", "/v2/health/live").status == 200

    def is_model_ready(self, model: str, version: str) -> bool:
        """Whether the server serves the model."""
        return self._request("GET", f"{_path(model, version)}/ready").status == 200

    def metadata(self, model: str, version: str) -> Any:
        """Inputs and outputs of the model, as JSON."""
        return self._json("GET", _path(model, version))

    def config(self, model: str, version: str) -> Any:
        """The model's configuration, as JSON."""
        return self._json("GET", f"{_path(model, version)}/config")

    def repository_index(self) -> Any:
        """All models in the server's repository, as JSON."""
        return self._json("POST", "/v2/repository/index")

    def infer(
        self, model: str, version: str, feeds: Mapping[str, Array], outputs: Mapping[str, TensorSpec]
    ) -> dict[str, Array]:
        """Outputs by name for `feeds`."""
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
    ) -> HttpResponse:
        connection = self._kind(self._host, self._port, timeout=self._timeout_s)
        with contextlib.closing(connection), _deadline(connection, self._timeout_s):
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            content = response.read(most_bytes + 1)
            if len(content) > most_bytes:
                raise RefusedError(f"its answer has more than {most_bytes:,} bytes")
            return HttpResponse(response.status, response.getheader(_HEADER_LENGTH), content)


class HttpResponse:
    """A response: status, length of the JSON (None without tensors), and the body."""

    def __init__(self, status: int, header_length: str | None, content: bytes) -> None:
        self.status, self._content = status, content
        self._header_length = header_length

    def accepted(self) -> HttpResponse:
        """This response if its status is a success; else RefusedError with the server's reason."""
        if self.status == 200:
            return self
        with contextlib.suppress(ValueError, TypeError, KeyError):
            raise RefusedError(str(parse_json(self._content.decode())["error"])[:500])
        raise RefusedError(f"status {self.status}")

    def json(self) -> Any:
        """The body as JSON."""
        try:
            return parse_json(self._content.decode())
        except ValueError as error:
            raise RefusedError(f"its answer is no JSON: {error}") from None

    def tensors(self, wanted: Mapping[str, TensorSpec]) -> dict[str, Array]:
        """The tensors after the JSON, by name."""
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
    """Connect, and close the connection after `seconds`: a socket's own timeout starts again with every byte."""
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
    if is_late.is_set():  # the response may have been cut off by the deadline
        raise TimeoutError(f"not whole within {seconds:g} s")


def _path(model: str, version: str) -> str:
    return f"/v2/models/{model}{f'/versions/{version}' if version else ''}"


def _body(feeds: Mapping[str, Array], outputs: Sequence[str]) -> tuple[bytes, int]:
    """The body of an inference request, JSON and then the tensors' bytes, and the length of the JSON."""
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
    """Largest response for `batch` images, in bytes."""
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


DEFAULT_TIMEOUT_S = 60.0
_PORTS = {"http": 8000, "https": 443, "grpc": 8001, "grpcs": 443}
_WANTED = "Give http://HOST:PORT/MODEL or grpc://HOST:PORT/MODEL, with /VERSION after it where it matters."


@dataclasses.dataclass(frozen=True)
class ServedAt:
    """Address of a model on a Triton server. `version` empty: the newest that is served."""

    protocol: str
    host: str
    port: int
    model: str
    version: str = ""

    @classmethod
    def parse(cls, url: str) -> ServedAt:
        """Read `http://host:port/model[/version]`, also with https, grpc or grpcs. UsageError for anything else."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise UsageError(f"{url} is no address ({error}).", _WANTED) from None
        path = parts.path.strip("/").removeprefix("v2/models/").replace("/versions/", "/")
        match = re.fullmatch(r"([A-Za-z0-9._-]+)(?:/([1-9]\d*))?", path)
        if parts.scheme not in _PORTS or not host or match is None or parts.query or parts.username:
            raise UsageError(f"{url} names no model on a server.", _WANTED)
        return cls(parts.scheme, host, port or _PORTS[parts.scheme], match[1], match[2] or "")

    @property
    def is_grpc(self) -> bool:
        """Whether the protocol is gRPC."""
        return self.protocol.startswith("grpc")

    @property
    def address(self) -> str:
        """Host and port, as tritonclient takes them."""
        return f"{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.protocol}://{self.address}/{self.model}{f'/{self.version}' if self.version else ''}"


class TritonRunner:
    """Runs a model on a Triton server. `timeout_s`: seconds for each request.

    Entering raises MissingPackageError for gRPC without tritonclient, UnavailableError where no server responds or the
    model is not ready, UsageError where the server has no such model, MismatchError where the description of the model
    is not Triton's.
    """

    def __init__(self, served: ServedAt, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self._served = served
        self._timeout_s = timeout_s
        self._client: Any = None
        self._max_batch = 0
        self.platform = ""
        self.input_specs: Mapping[str, TensorSpec] = {}
        self.output_specs: Mapping[str, TensorSpec] = {}

    @property
    def name(self) -> str:
        """Name in tables and messages."""
        return f"Triton at {self._served.address}"

    def __enter__(self) -> Self:
        self._client = self._connect()
        try:
            self._ask()
        except BaseException:
            self._client.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()
        self._client = None

    def run(self, feeds: Feeds) -> Arrays:
        """Outputs of `feeds`; larger batches are split.

        Raises MismatchError where the server refuses a request, UnavailableError where it does not respond.
        """
        check_feeds(self.name, self.input_specs, feeds)
        leading = next(iter(self.input_specs.values())).shape[0]
        return run_in_batches(self._run_once, feeds, BatchLimits.of_shape(leading, self._max_batch or 32))

    def _run_once(self, feeds: Arrays) -> Arrays:
        found: Arrays = self._call("infer", self._served.model, self._served.version, feeds, self.output_specs)
        return found

    def _connect(self) -> Any:
        served = self._served
        if served.is_grpc:
            return _GrpcClient(served, self._timeout_s)
        return HttpClient(served.host, served.port, is_secure=served.protocol == "https", timeout_s=self._timeout_s)

    def _ask(self) -> None:
        """Read inputs, outputs and largest batch of the model from the server."""
        model, version = self._served.model, self._served.version
        if not self._call("is_server_live"):
            raise UnavailableError(f"The server at {self._served.address} is not live.", "Look at its log.")
        if not self._call("is_model_ready", model, version):
            raise self._not_ready()
        metadata, config = self._call("metadata", model, version), self._call("config", model, version)
        try:
            config = config.get("config", config)  # over gRPC it is inside another message
            self._max_batch = int(config.get("max_batch_size") or 0)
            self.platform = str(config.get("platform") or config.get("backend") or "")
            self.input_specs = _specs(metadata["inputs"])
            self.output_specs = _specs(metadata["outputs"])
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise MismatchError(
                f"{self._served} does not describe its model as Triton does ({reason}).", "Is it a Triton server?"
            ) from None

    def _not_ready(self) -> Exception:
        index = self._call("repository_index")
        listed = index.get("models") if isinstance(index, dict) else index
        entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
        mine = [entry for entry in entries if entry.get("name") == self._served.model]
        reasons = [str(entry["reason"]) for entry in mine if entry.get("reason")]
        if mine:
            why = f" ({'; '.join(reasons)})" if reasons else ""
            return UnavailableError(f"{self._served} is not ready{why}.", "Look at the server's log.")
        names = sorted({str(entry.get("name")) for entry in entries})
        return UsageError(
            f"The server at {self._served.address} has no model {self._served.model}.",
            f"It has {', '.join(names)}." if names else "It has none.",
        )

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of the client; its exceptions become errors of this package."""
        try:
            return getattr(self._client, method)(*arguments, **options)
        except Exception as error:  # of sockets, gevent, gRPC or tritonclient
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> Exception:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        is_refusal = type(error).__name__ == "InferenceServerException" or isinstance(error, RefusedError)
        is_silence = any(word in reason for word in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "Deadline Exceeded", "499"))
        if is_refusal and not is_silence:
            return MismatchError(f"{self._served} refused: {reason}")
        return UnavailableError(
            f"No answer from {self._served} ({reason}).", "Is tritonserver running there, and is that its port?"
        )


class _GrpcClient:
    """tritonclient with the methods of `HttpClient`, each with a deadline and a largest response."""

    def __init__(self, served: ServedAt, timeout_s: float) -> None:
        self._module = _import_client()
        self._limit = {"client_timeout": timeout_s}
        limits = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", MOST_BYTES)]
        self._client = self._module.InferenceServerClient(
            served.address, ssl=served.protocol == "grpcs", channel_args=limits
        )

    def close(self) -> None:
        self._client.close()

    def is_server_live(self) -> bool:
        return bool(self._client.is_server_live(**self._limit))

    def is_model_ready(self, model: str, version: str) -> bool:
        return bool(self._client.is_model_ready(model, version, **self._limit))

    def metadata(self, model: str, version: str) -> Any:
        return _plain(self._client.get_model_metadata(model, version, **self._limit))

    def config(self, model: str, version: str) -> Any:
        return _plain(self._client.get_model_config(model, version, **self._limit))

    def repository_index(self) -> Any:
        return _plain(self._client.get_model_repository_index(**self._limit))

    def infer(self, model: str, version: str, feeds: Arrays, outputs: Mapping[str, TensorSpec]) -> Arrays:
        inputs = []
        for name, array in feeds.items():
            tensor = self._module.InferInput(name, list(array.shape), triton_dtype(array.dtype))
            tensor.set_data_from_numpy(np.ascontiguousarray(array))
            inputs.append(tensor)
        wanted = [self._module.InferRequestedOutput(name) for name in outputs]
        result = self._client.infer(model, inputs, model_version=version, outputs=wanted, **self._limit)
        found = {name: result.as_numpy(name) for name in outputs}
        if missing := [name for name, array in found.items() if array is None]:
            raise RefusedError(f"its answer lacks {', '.join(missing)}")
        return found


def _import_client() -> Any:
    try:
        return importlib.import_module("tritonclient.grpc")
    except ImportError as error:
        install = "pip install 'tritonclient[grpc]'"
        raise MissingPackageError("tritonclient[grpc]", "Asking a Triton server by gRPC", install) from error


def _plain(answer: Any) -> Any:
    """A protobuf of gRPC as the JSON that HTTP gives."""
    json_format = importlib.import_module("google.protobuf.json_format")
    return json_format.MessageToDict(answer, preserving_proto_field_name=True)


def _specs(tensors: list[dict[str, Any]]) -> dict[str, TensorSpec]:
    return {
        tensor["name"]: TensorSpec(DTYPES.get(tensor["datatype"], tensor["datatype"]), _shape(tensor["shape"]))
        for tensor in tensors
    }


def _shape(extents: list[int | str]) -> tuple[int | None, ...]:
    sizes = [int(extent) for extent in extents]  # JSON of a message has 64-bit numbers as text
    return tuple(None if size < 0 else size for size in sizes)
