"""What a Triton server costs on top of calling ONNX Runtime directly, at 1, 8 and 64 requests at once.

    python -m benchmarks.server_overhead [BUNDLE] [--seconds 5] [--rounds 3]

Both sides run the same graph in the same ONNX Runtime with one thread: directly from as many threads of one process as
there are requests at once, and through tritonserver by as many HTTP and gRPC clients, without and with dynamic
batching; the model has one instance per core. The sides take turns within each round, so that whatever else the
machine does meets all of them. Given are medians over the rounds of the ratio of requests a second, direct over served:
1.0 would be a server for nothing. The server runs the graph through the Python backend of the tests, which copies each
tensor once more than Triton's own backend for ONNX Runtime would; clients share the machine with the server.

Without a BUNDLE a small hybrid of 32 px is exported. Needs the environment that `pytest -m triton` makes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy.typing as npt

from benchmarks.results import record, table
from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.store import GOLDEN, GRAPH, Bundle
from spach_deploy.packaging.triton.options import Backend, Batching, Instances, TritonOptions
from spach_deploy.packaging.triton.repository import write_repository
from spach_deploy.packaging.triton.served_model import BundleArgument
from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner
from tests import small_bundles
from tests.packaging.triton.clients import Client, client_packages
from tests.packaging.triton.server import Server, serving

CONCURRENCY = (1, 8, 64)

Array = npt.NDArray[Any]
Ask = Callable[[Array], object]
Open = Callable[[], tuple[Ask, Callable[[], None]]]
"""Makes, for one thread, what asks, and what closes it."""


def throughput(opened: Open, inputs: Array, concurrency: int, seconds: float) -> float:
    """Requests a second of `concurrency` threads that each ask again at once."""
    barrier = threading.Barrier(concurrency + 1)
    counts = [0] * concurrency
    end = [0.0]

    def work(number: int) -> None:
        ask, close = opened()
        ask(inputs[:1])  # connections are made before the clock runs
        barrier.wait()
        while time.perf_counter() < end[0]:
            index = (number + counts[number]) % len(inputs)
            ask(inputs[index : index + 1])
            counts[number] += 1
        close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(concurrency)]
    for thread in threads:
        thread.start()
    _start(barrier, end, seconds)
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - (end[0] - seconds))  # what was under way at the end is waited for


def _start(barrier: threading.Barrier, end: list[float], seconds: float) -> None:
    """Set the end before the threads may look at it."""
    while barrier.n_waiting < barrier.parties - 1:
        time.sleep(0.001)
    end[0] = time.perf_counter() + seconds
    barrier.wait()


def direct(runner: OnnxRuntimeRunner) -> Open:
    """ONNX Runtime in this process; a session may be used by many threads."""
    return lambda: (lambda array: runner.run({"input": array}), lambda: None)


def through(server: Server, protocol: str, model: str) -> Open:
    """A client of the server."""

    def opened() -> tuple[Ask, Callable[[], None]]:
        client = Client(server, protocol)
        return lambda array: client.ask(model, outputs=["logits"], input=array), client.close

    return opened


@contextlib.contextmanager
def sides(bundle: Path, folder: Path) -> Iterator[dict[str, Open]]:
    """Everything that is compared, ready to be asked."""
    batched = TritonOptions(Backend.ONNXRUNTIME, instances=Instances(os.cpu_count() or 1))
    single = dataclasses.replace(batched, batching=Batching(dynamic=False))
    joined = write_repository([BundleArgument(bundle, "joined")], folder / "joined", batched)
    alone = write_repository([BundleArgument(bundle, "alone")], folder / "alone", single)
    graph = OnnxRuntimeRunner(Bundle.open(bundle).file(GRAPH), threads=1)
    with client_packages(), graph as runner, serving([joined.path, alone.path], folder / "server") as server:
        yield {
            "direct": direct(runner),
            "HTTP": through(server, "http", "alone"),
            "gRPC": through(server, "grpc", "alone"),
            "gRPC, joined": through(server, "grpc", "joined"),
        }


def measure(bundle: Path, seconds: float, rounds: int) -> list[list[str]]:
    """A row per concurrency: requests a second directly, then direct over served for each way."""
    inputs = Golden.load(Bundle.open(bundle).file(GOLDEN)).input
    rows = []
    with tempfile.TemporaryDirectory() as folder, sides(bundle, Path(folder)) as compared:
        for concurrency in CONCURRENCY:
            found: dict[str, list[float]] = {name: [] for name in compared}
            for _ in range(rounds):
                for name, opened in compared.items():
                    found[name].append(throughput(opened, inputs, concurrency, seconds))
            rows.append(_row(concurrency, found))
    return rows


def _row(concurrency: int, found: dict[str, list[float]]) -> list[str]:
    base = found.pop("direct")
    cells = [str(concurrency), f"{statistics.median(base):,.0f}"]
    for served in found.values():
        ratios = sorted(have / got for have, got in zip(base, served, strict=True))
        cells.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", type=Path)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    bundle = options.bundle or small_bundles.bundle()
    model = Bundle.open(bundle).manifest.model
    load = os.getloadavg()[0]
    rows = measure(bundle, options.seconds, options.rounds)
    headings = ("at once", "direct, requests/s", "HTTP", "gRPC", "gRPC, requests joined")
    head = "Direct over served, medians and range of the rounds; below 1 the server is faster, by joining requests."
    head += f" The machine's load was {load:.1f} before it began.\n\n"
    command = f"python -m benchmarks.server_overhead {options.bundle or ''}".rstrip()
    command += f" --seconds {options.seconds:g} --rounds {options.rounds}"
    title = f"Server overhead, {model.name} at {model.image_size} px"
    record(title, command, head + table(headings, rows), ("onnxruntime", "numpy"))


if __name__ == "__main__":
    main()
