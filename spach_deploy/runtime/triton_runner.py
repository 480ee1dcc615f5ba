"""Models that a Triton server serves, over HTTP or gRPC.

    http://localhost:8000/ms_hybrid_s        grpc://localhost:8001/ms_hybrid_s/2

HTTP is spoken with the standard library. tritonclient is imported when a server is talked to by gRPC; it is no
dependency of this package.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from spach_deploy.errors import MismatchError, MissingPackageError, UnavailableError, UsageError
from spach_deploy.runtime import TensorSpec
from spach_deploy.runtime.batching import Arrays, BatchLimits, Feeds, check_feeds, run_in_batches
from spach_deploy.runtime.triton_http import DTYPES, MOST_BYTES, HttpClient, RefusedError, triton_dtype

if TYPE_CHECKING:
    from typing_extensions import Self

DEFAULT_TIMEOUT_S = 60.0
_PORTS = {"http": 8000, "https": 443, "grpc": 8001, "grpcs": 443}
_WANTED = "Give http://HOST:PORT/MODEL or grpc://HOST:PORT/MODEL, with /VERSION after it where it matters."


@dataclasses.dataclass(frozen=True)
class ServedAt:
    """A model on a server. `version` empty: the newest one that is served."""

    protocol: str
    host: str
    port: int
    model: str
    version: str = ""

    @classmethod
    def parse(cls, url: str) -> ServedAt:
        """`http://host:port/model[/version]`, the same with grpc, https or grpcs. UsageError for anything else."""
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
        """Whether it is spoken to by gRPC."""
        return self.protocol.startswith("grpc")

    @property
    def address(self) -> str:
        """Host and port, as tritonclient takes them."""
        return f"{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.protocol}://{self.address}/{self.model}{f'/{self.version}' if self.version else ''}"


class TritonRunner:
    """Runs a model on a Triton server. `timeout_s` bounds each request.

    Entering raises MissingPackageError for gRPC without tritonclient, MismatchError for a server that does not describe
    its model as Triton does, UnavailableError where no server answers or the model is
    not ready, UsageError where the server has no such model.
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
        """What it is."""
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

        MismatchError where the server refuses a request, UnavailableError where it does not answer.
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
        """Learn what the model takes and gives."""
        model, version = self._served.model, self._served.version
        if not self._call("is_server_live"):
            raise UnavailableError(f"The server at {self._served.address} is not live.", "Look at its log.")
        if not self._call("is_model_ready", model, version):
            raise self._not_ready()
        metadata, config = self._call("metadata", model, version), self._call("config", model, version)
        try:
            config = config.get("config", config)  # gRPC wraps it
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
        """A call of the client, its errors as ours."""
        try:
            return getattr(self._client, method)(*arguments, **options)
        except Exception as error:  # sockets', gevent's, gRPC's and Triton's own
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
    """tritonclient with the same questions as `HttpClient`, each with a deadline and a largest answer."""

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
    """A message as HTTP has it, in JSON."""
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
