"""Ask a Triton server for the golden pack and compare its answers with PyTorch's, on the machine that will serve.

    golden_check.py --golden DIR --url http://127.0.0.1:8000                          a server that runs
    golden_check.py --golden DIR --url http://127.0.0.1:8000 -- tritonserver …        one that it starts, and ends

It is part of the image that spach-package kubernetes writes, runs before the server takes traffic, and needs nothing
but Python's standard library. The bounds are those that the export derived, per output and image; the rules are those
of spach-validate. Exit codes: 0 agreed, 1 disagreed or refused, 2 the golden pack is damaged, 3 no server answered.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import dataclasses
import hashlib
import http.client
import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

AGREED, DISAGREED, DAMAGED, UNAVAILABLE = 0, 1, 2, 3

_ARRAYS = {"FP32": "f", "FP64": "d", "INT32": "i", "INT64": "q", "UINT8": "B"}
_HEADER_LENGTH = "Inference-Header-Content-Length"
_REQUEST_SECONDS, _READY_SECONDS = 60, 5
_GRACE_SECONDS = 30
_MOST_BYTES = 1 << 30  # of a file of a golden pack
_JSON_BYTES, _WIDEST = 1 << 20, 8  # of an answer: the JSON in front, and a number

Row = Sequence[float]
Answers = dict[str, list[tuple[int, Row]]]
"""By output: the image that was sent, and the row that came back."""


class CheckError(Exception):
    """Why there is no verdict, or a bad one. `code` is the exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclasses.dataclass(frozen=True)
class Pack:
    """A golden pack: its description, and its files' content by name."""

    description: dict[str, Any]
    files: dict[str, bytes]

    @classmethod
    def read(cls, folder: Path) -> Pack:
        """The pack in `folder`. CheckError for one that is not whole."""
        try:
            description = _parsed(_content(folder, "golden.json"))
            files = {name: _content(folder, name) for name in description["sha256"]}
            pack = cls(description, files)._checked()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckError(f"{folder} holds no golden pack ({error}).", DAMAGED) from None
        for name, content in files.items():
            if hashlib.sha256(content).hexdigest() != description["sha256"][name]:
                raise CheckError(f"{folder / name} was changed since it was packaged.", DAMAGED)
        return pack

    def _checked(self) -> Pack:
        """This, once all that is used of it was looked at."""
        count, tensor = len(self.images), self.description["input"]
        _ = [self.model, self.files[tensor["file"]], tensor["name"], tensor["datatype"], *map(int, tensor["shape"])]
        for output in self.description["outputs"]:
            _ = [self.files[output["file"]], output["name"], output["datatype"], *map(int, output["shape"])]
            _ = output["ranks"] if output["kind"] == "indices" else output["tolerance"]["rel_l2"]
        if not count or not all(0 <= image < count for batch in self.description["batches"] for image in batch):
            raise ValueError("its batches are not of its images")
        return self

    def answer_bytes(self, batch: Sequence[int]) -> int:
        """The most that an answer to some images may have."""
        numbers = sum(math.prod(map(int, output["shape"])) for output in self.description["outputs"])
        return _JSON_BYTES + _WIDEST * len(batch) * numbers

    @property
    def model(self) -> str:
        """Triton's name of the model."""
        return str(self.description["model"])

    @property
    def images(self) -> list[str]:
        """Names of the images."""
        return list(self.description["images"])

    def input_bytes(self, batch: Sequence[int]) -> bytes:
        """Some images, one after another."""
        content = self.files[self.description["input"]["file"]]
        size = len(content) // len(self.images)
        return b"".join(content[index * size : (index + 1) * size] for index in batch)

    def expected(self, output: dict[str, Any]) -> list[Row]:
        """The reference's rows of an output, by image."""
        datatype = "INT64" if output["kind"] == "indices" else "FP32"
        return rows(datatype, self.files[output["file"]], len(self.images))


def _content(folder: Path, name: str) -> bytes:
    """A file's bytes. ValueError for one of another folder, or larger than any of a golden pack."""
    if Path(name).name != name:
        raise ValueError(f"{name} is in another folder")
    with (folder / name).open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"{name} has more than {_MOST_BYTES:,} bytes")
    return content


def _parsed(content: bytes) -> dict[str, Any]:
    """A JSON object, in which each name stands once. ValueError for anything else."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a name is in it twice")
        return dict(pairs)

    try:
        found = json.loads(content, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("it is no object")
    return found


def rows(datatype: str, content: bytes, count: int) -> list[Row]:
    """A tensor's bytes as `count` rows of numbers."""
    try:
        values = _numbers(datatype, content)
    except (ValueError, struct.error):
        raise CheckError(f"{len(content)} bytes are no numbers of type {datatype}.", DISAGREED) from None
    if count < 1 or len(values) % count:
        raise CheckError(f"{len(values)} numbers are no {count} rows.", DISAGREED)
    width = len(values) // count
    return [values[index * width : (index + 1) * width] for index in range(count)]


def _numbers(datatype: str, content: bytes) -> Row:
    if datatype == "FP16":
        return struct.unpack(f"<{len(content) // 2}e", content)
    if datatype not in _ARRAYS:
        raise CheckError(f"Numbers of type {datatype} cannot be compared.", DISAGREED)
    values = array.array(_ARRAYS[datatype])
    values.frombytes(content)
    if sys.byteorder == "big":
        values.byteswap()
    return values


class Server:
    """A Triton server's HTTP side. `seconds` bound a request of it, all in all."""

    def __init__(self, url: str, seconds: float = _REQUEST_SECONDS) -> None:
        self._seconds = seconds
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise CheckError(f"{url} is no address; give http://HOST:PORT.", DAMAGED)
        self._host, self._port = parts.hostname, parts.port or 8000

    def is_ready(self, model: str) -> bool:
        """Whether the server and the model are ready."""
        try:
            return all(self._get(path) == 200 for path in ("/v2/health/ready", f"/v2/models/{model}/ready"))
        except (OSError, http.client.HTTPException):
            return False

    def infer(self, pack: Pack, batch: Sequence[int]) -> Answers:
        """The answers for some images. CheckError where the request is refused or the answer has another form."""
        body, length = _request(pack, batch)
        try:
            path, most = f"/v2/models/{pack.model}/infer", pack.answer_bytes(batch)
            status, header, content = self._post(path, body, length, most)
        except (OSError, http.client.HTTPException) as error:
            raise CheckError(f"The server does not answer ({error or type(error).__name__}).", UNAVAILABLE) from None
        if status != 200:
            reason = content[:500].decode(errors="replace")
            raise CheckError(f"A batch of {len(batch)} was refused with {status}: {reason}", DISAGREED)
        return _answers(pack, batch, header, content)

    def _connection(self, seconds: float) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self._host, self._port, timeout=seconds)

    @contextlib.contextmanager
    def _connected(self, seconds: float) -> Iterator[http.client.HTTPConnection]:
        """A connection that is ended when the time is over: a socket's own limit begins anew with every byte."""
        connection, is_late = self._connection(seconds), threading.Event()
        with contextlib.closing(connection):
            connection.connect()
            opened: socket.socket = connection.sock

            def end() -> None:
                is_late.set()
                with contextlib.suppress(OSError):
                    opened.shutdown(socket.SHUT_RDWR)

            timer = threading.Timer(seconds, end)
            timer.start()
            try:
                yield connection
            except (OSError, http.client.HTTPException):
                if not is_late.is_set():
                    raise
            finally:
                timer.cancel()
        if is_late.is_set():
            raise TimeoutError(f"not whole within {seconds:g} s")

    def _get(self, path: str) -> int:
        with self._connected(_READY_SECONDS) as connection:
            connection.request("GET", path)
            status = connection.getresponse().status
        return status

    def _post(self, path: str, body: bytes, length: int, most_bytes: int) -> tuple[int, int | None, bytes]:
        """Status, length of the JSON before the tensors, content."""
        headers = {_HEADER_LENGTH: str(length), "Content-Type": "application/octet-stream"}
        with self._connected(self._seconds) as connection:
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            given, content = response.getheader(_HEADER_LENGTH), response.read(most_bytes + 1)
        if len(content) > most_bytes:
            raise CheckError(f"The server's answer has more than {most_bytes:,} bytes.", DISAGREED)
        try:
            return response.status, None if given is None else int(given), content
        except ValueError as error:  # a length that is no number
            raise CheckError(f"The server's answer cannot be read ({error}).", DISAGREED) from None


def _request(pack: Pack, batch: Sequence[int]) -> tuple[bytes, int]:
    """A request's body in Triton's binary form, and the length of the JSON in front."""
    content, tensor = pack.input_bytes(batch), pack.description["input"]
    given = {
        "name": tensor["name"],
        "datatype": tensor["datatype"],
        "shape": [len(batch), *tensor["shape"]],
        "parameters": {"binary_data_size": len(content)},
    }
    wanted = [{"name": entry["name"], "parameters": {"binary_data": True}} for entry in pack.description["outputs"]]
    header = json.dumps({"inputs": [given], "outputs": wanted}).encode()
    return header + content, len(header)


def _answers(pack: Pack, batch: Sequence[int], length: int | None, content: bytes) -> Answers:
    try:
        header = _parsed(content[:length])
        tensors = {str(entry["name"]): entry for entry in header["outputs"]}
        data, offset = {}, length or 0
        for name, entry in tensors.items():  # tensors follow in the order of the header
            size = max(0, int(entry["parameters"]["binary_data_size"]))
            data[name] = content[offset : offset + size]
            offset += size
        return {o["name"]: _rows_of(o, tensors, data, batch) for o in pack.description["outputs"]}
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckError(f"The server's answer cannot be read ({type(error).__name__}: {error}).", DISAGREED) from None


def _rows_of(
    output: dict[str, Any], tensors: dict[str, Any], data: dict[str, bytes], batch: Sequence[int]
) -> list[tuple[int, Row]]:
    name = output["name"]
    if name not in tensors:
        raise CheckError(f"The answer lacks the output {name}.", DISAGREED)
    form = [tensors[name].get("datatype"), [int(size) for size in tensors[name].get("shape", ())]]
    wanted = [output["datatype"], [len(batch), *output["shape"]]]
    if form != wanted:
        raise CheckError(f"The output {name} is {form[0]} {form[1]}, not {wanted[0]} {wanted[1]}.", DISAGREED)
    return list(zip(batch, rows(output["datatype"], data[name], len(batch)), strict=True))


@dataclasses.dataclass(frozen=True)
class OutputCheck:
    """What was measured of an output, in one line, and what is wrong with it."""

    measured: str
    faults: tuple[str, ...]


def compare(pack: Pack, answers: Answers) -> list[OutputCheck]:
    """One finding per output."""
    expected = {output["name"]: pack.expected(output) for output in pack.description["outputs"]}
    findings = []
    for output in pack.description["outputs"]:
        pairs = [(image, expected[output["name"]][image], row) for image, row in answers[output["name"]]]
        if output["kind"] == "indices":
            findings.append(_compare_indices(output, pairs, expected[output["ranks"]], pack.images))
        else:
            findings.append(_compare_floats(output, pairs, pack.images))
    return findings


Pairs = list[tuple[int, Row, Row]]
"""Image, reference, answer."""


def _compare_floats(output: dict[str, Any], pairs: Pairs, images: list[str]) -> OutputCheck:
    name, allowed = output["name"], output["tolerance"]
    if bad := [images[image] for image, _, row in pairs if not all(map(math.isfinite, row))]:
        return OutputCheck(f"{name}: not finite", (f"{name} has NaN or infinite values in {bad[0]}",))
    rel_l2 = max(relative_l2(reference, row) for _, reference, row in pairs)
    max_abs = max(abs(a - b) for _, reference, row in pairs for a, b in zip(reference, row, strict=True))
    least = min(cosine(reference, row) for _, reference, row in pairs)
    faults = [*_beyond(name, rel_l2, max_abs, least, allowed)]
    if output["kind"] == "scores":
        faults += _flips(name, pairs, images, allowed["flip_margin"])
    measured = f"{name}: relative L2 {rel_l2:.2e} of {allowed['rel_l2']:.2e} allowed, max absolute error {max_abs:.2e}"
    return OutputCheck(measured, tuple(faults))


def _beyond(name: str, rel_l2: float, max_abs: float, least: float, allowed: dict[str, Any]) -> Iterator[str]:
    """`not a <= b` rather than `a > b`: a NaN must not pass."""
    if not rel_l2 <= allowed["rel_l2"]:
        yield f"{name}: relative L2 is {rel_l2:.3g}, {allowed['rel_l2']:.3g} is allowed"
    if allowed["max_abs"] is not None and not max_abs <= allowed["max_abs"]:
        yield f"{name}: the largest absolute error is {max_abs:.3g}, {allowed['max_abs']:.3g} is allowed"
    if allowed["cosine_min"] is not None and not least >= allowed["cosine_min"]:
        yield f"{name}: the smallest cosine is {least:.6g}, {allowed['cosine_min']:.6g} is required"


def _flips(name: str, pairs: Pairs, images: list[str], margin: float) -> Iterator[str]:
    for image, reference, row in pairs:
        ours, theirs = _best(reference), _best(row)
        if ours != theirs and not reference[ours] - reference[theirs] <= margin:
            yield f"{name}: {images[image]} changes from class {ours} to {theirs}"


def _compare_indices(output: dict[str, Any], pairs: Pairs, scores: list[Row], images: list[str]) -> OutputCheck:
    """Indices may differ where the scores of both are closer than the margin."""
    name, margin = output["name"], output["tolerance"]["flip_margin"]
    faults, differ, total = [], 0, 0
    for image, reference, row in pairs:
        for rank, (ours, theirs) in enumerate(zip(reference, row, strict=True)):
            total += 1
            differ += ours != theirs
            if ours != theirs and not _gap(scores[image], int(ours), int(theirs)) <= margin:
                faults.append(f"{name}: {images[image]}, rank {rank}: {int(theirs)} for {int(ours)}")
    return OutputCheck(f"{name}: {total - differ} of {total} equal", tuple(faults))


def _gap(scores: Row, ours: int, theirs: int) -> float:
    return abs(scores[ours] - scores[theirs]) if 0 <= theirs < len(scores) else math.inf


def _best(row: Row) -> int:
    return max(range(len(row)), key=row.__getitem__)


def relative_l2(reference: Row, row: Row) -> float:
    """Norm of the difference over the reference's."""
    difference = math.fsum((a - b) ** 2 for a, b in zip(reference, row, strict=True))
    norm = math.fsum(a * a for a in reference)
    if difference == 0:
        return 0.0
    return math.sqrt(difference / norm) if norm > 0 else math.inf


def cosine(reference: Row, row: Row) -> float:
    """1 where both are zero, 0 where one is."""
    ours, theirs = math.fsum(a * a for a in reference), math.fsum(b * b for b in row)
    if ours == 0 or theirs == 0:
        return float(ours == theirs)
    product = math.fsum(a * b for a, b in zip(reference, row, strict=True))
    return product / (math.sqrt(ours) * math.sqrt(theirs))


def check(pack: Pack, server: Server) -> list[OutputCheck]:
    """Send every batch of the pack and compare. CheckError where there is nothing to compare."""
    answers: Answers = {output["name"]: [] for output in pack.description["outputs"]}
    for batch in pack.description["batches"]:
        for name, found in server.infer(pack, batch).items():
            answers[name] += found
    return compare(pack, answers)


def wait_until_ready(server: Server, model: str, seconds: float, process: subprocess.Popen[bytes] | None) -> None:
    """CheckError when the model is not ready in time, or the process that should serve it ended."""
    end = time.monotonic() + seconds
    if not server.is_ready(model):
        print(f"Waiting up to {seconds:g} s for {model}.", file=sys.stderr, flush=True)
    while not server.is_ready(model):
        if process is not None and process.poll() is not None:
            raise CheckError(f"The server ended with {process.returncode} before it was ready.", UNAVAILABLE)
        if time.monotonic() >= end:
            raise CheckError(f"{model} was not ready within {seconds:g} s.", UNAVAILABLE)
        time.sleep(0.2)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and all that it started: politely, then by force."""
    process.terminate()
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        say(f"The server did not end within {_GRACE_SECONDS} s and was killed.")
    if sys.platform != "win32":  # a pod's containers run Linux; this file is read on Windows only
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(options: argparse.Namespace) -> int:
    """The check, with the server's life around it where there is a command; prints and gives the exit code."""
    pack, server, process = Pack.read(options.golden), Server(options.url), None
    try:
        if options.server:
            process = subprocess.Popen(options.server, start_new_session=True)
        wait_until_ready(server, pack.model, options.seconds, process)
        findings = check(pack, server)
    except OSError as error:
        raise CheckError(f"{options.server[0]} cannot be started ({error.strerror}).", UNAVAILABLE) from None
    finally:
        if process is not None:
            stop(process)
    return _report(pack, findings)


def say(text: str) -> None:
    """A line of the log; what a file or a server put into it is escaped."""
    print("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text), flush=True)


def _report(pack: Pack, findings: list[OutputCheck]) -> int:
    faults = [fault for finding in findings for fault in finding.faults]
    batches = ", ".join(str(len(batch)) for batch in pack.description["batches"])
    say(f"Golden pack of {pack.model}: {len(pack.images)} images, in batches of {batches}.")
    for finding in findings:
        say(f"  {finding.measured}")
    for fault in faults[:20]:
        say(f"  WRONG {fault}.")
    say("DISAGREED with PyTorch in FP32." if faults else "AGREED with PyTorch in FP32.")
    return DISAGREED if faults else AGREED


def _end(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Compare a Triton server's answers with a golden pack.")
    parser.add_argument("--golden", type=Path, required=True, help="folder of golden.json")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server's HTTP address")
    parser.add_argument("--seconds", type=float, default=120.0, help="how long the server may take to be ready")
    parser.add_argument("server", nargs="*", help="after --: the command that starts the server")
    signal.signal(signal.SIGTERM, _end)  # so that a pod that is deleted ends its server too
    try:
        return run(parser.parse_args(arguments))
    except CheckError as error:
        say(f"NOT CHECKED: {error}" if error.code != DISAGREED else f"DISAGREED: {error}")
        return error.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
