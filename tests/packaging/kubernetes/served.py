"""A stand-in for a Triton server: one model over HTTP, in Triton's binary form, answering with what NumPy computes."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import numpy.typing as npt

from spach_deploy.bundle.outputs import expected_outputs, promised_dtypes
from spach_deploy.options.specs import IODtype
from tests.packaging.triton import tiny_bundles
from tests.packaging.triton.tiny_bundles import Tiny

Arrays = dict[str, npt.NDArray[Any]]
Spoil = Callable[[Arrays], Arrays]

_TYPES = {"float32": "FP32", "float16": "FP16", "int64": "INT64", "uint8": "UINT8"}
_LENGTH = "Inference-Header-Content-Length"


class StandIn:
    """What it serves, how it spoils answers, and how many of its first requests for readiness say no."""

    def __init__(self, tiny: Tiny, name: str, spoil: Spoil, not_ready: int = 0, status: int = 200) -> None:
        self.tiny, self.name, self.spoil = tiny, name, spoil
        self.not_ready, self.status = not_ready, status
        self.drips = False
        """Whether an answer to images comes byte by byte, slower than anybody waits."""

        self.says: dict[str, bytes] = {}
        """What it answers to GET at a path, instead of the truth."""

        self.batches: list[int] = []
        self.url = ""

    def told(self, path: str) -> bytes | None:
        """What it answers to GET, None for what it does not know."""
        model = f"/v2/models/{self.name}"
        inputs, outputs = (
            tiny_bundles.samples(self.tiny, 1),
            promised_dtypes(self.tiny.tensors_of_graph),
        )
        extents = {self.tiny.main: [-1, tiny_bundles.CLASSES]}
        given = [(name, _TYPES[dtype], extents.get(name, [-1, -1])) for name, dtype in outputs.items()]
        metadata = {
            "name": self.name,
            "inputs": [{"name": "input", "datatype": _TYPES[inputs.dtype.name], "shape": [-1, *inputs.shape[1:]]}],
            "outputs": [dict(zip(("name", "datatype", "shape"), entry, strict=True)) for entry in given],
        }
        known: dict[str, Any] = {model: metadata, f"{model}/config": {"max_batch_size": 8, "backend": "onnxruntime"}}
        known |= {key: {} for key in ("/v2/health/live", "/v2/health/ready", f"{model}/ready")}
        if path in self.says:
            return self.says[path]
        return json.dumps(known[path]).encode() if path in known else None

    def answer(self, inputs: npt.NDArray[Any]) -> Arrays:
        self.batches.append(len(inputs))
        logits = tiny_bundles.logits(self.tiny, inputs)
        dtypes = promised_dtypes(self.tiny.tensors_of_graph)
        outputs = expected_outputs({self.tiny.main: logits}, self.tiny.tensors_of_graph)
        return self.spoil({name: array.astype(dtypes[name]) for name, array in outputs.items()})


@contextlib.contextmanager
def serving(
    tiny: Tiny, spoil: Spoil = dict, *, name: str = "tiny", not_ready: int = 0, status: int = 200
) -> Iterator[StandIn]:
    """A server on a free port of this machine, for as long as the block lasts."""
    stand_in = StandIn(tiny, name, spoil, not_ready, status)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(stand_in))
    stand_in.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield stand_in
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _handler(stand_in: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            stand_in.not_ready -= 1
            body = stand_in.told(self.path)
            self._send(400 if body is None or stand_in.not_ready >= 0 else 200, body or b"")

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            length = int(self.headers[_LENGTH])
            assert self.path == f"/v2/models/{stand_in.name}/infer"
            if stand_in.status != 200:
                self._send(stand_in.status, b'{"error": "no"}')
                return
            header, content = _packed(stand_in.answer(_input(json.loads(body[:length]), body[length:], stand_in.tiny)))
            self._send(200, header + content, len(header))

        def _send(self, status: int, body: bytes, length: int | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            if length is not None:
                self.send_header(_LENGTH, str(length))
            self.end_headers()
            if not (stand_in.drips and length is not None):
                self.wfile.write(body)
                return
            with contextlib.suppress(OSError):  # the client has had enough
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.01)

        def log_message(self, format: str, *args: object) -> None:
            """Silence."""

    return Handler


def _input(header: dict[str, Any], content: bytes, tiny: Tiny) -> npt.NDArray[Any]:
    (tensor,) = header["inputs"]
    dtype = {IODtype.FP32: np.float32, IODtype.FP16: np.float16, IODtype.UINT8: np.uint8}[tiny.outputs.io_dtype]
    assert tensor["datatype"] == _TYPES[np.dtype(dtype).name]
    assert tensor["parameters"]["binary_data_size"] == len(content)
    return np.frombuffer(content, dtype).reshape(tensor["shape"])


def _packed(outputs: Arrays) -> tuple[bytes, bytes]:
    entries = [
        {
            "name": name,
            "datatype": _TYPES[array.dtype.name],
            "shape": list(array.shape),
            "parameters": {"binary_data_size": array.nbytes},
        }
        for name, array in outputs.items()
    ]
    content = b"".join(np.ascontiguousarray(array).tobytes() for array in outputs.values())
    return json.dumps({"outputs": entries}).encode(), content
