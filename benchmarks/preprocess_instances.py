"""What a picture costs a server's processors, by the number of instances of the step that decodes pictures.

    python -m benchmarks.preprocess_instances [--seconds 4] [--rounds 3]

One tritonserver has ensembles whose first step has 1, 2, 4 and 8 instances. They take turns within each round, so that
whatever else the machine does meets all of them; 16 gRPC clients send photographs, which become 224 px. Given are
medians over the rounds of the processor time of all the server's processes for a picture, which does not depend on what
else the machine does as pictures a second would, and the memory that one process of the step has of its own. The
default number of instances follows from it. Needs the environment that `pytest -m triton` makes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.results import record, table
from benchmarks.server_overhead import Ask, Open, throughput
from spach_deploy.data import images
from spach_deploy.options.specs import Preprocessing, channel_statistics
from spach_deploy.packaging.triton.options import Backend, Ensemble, Instances, TritonOptions
from spach_deploy.packaging.triton.repository import write_repository
from spach_deploy.packaging.triton.served_model import BundleArgument
from tests.packaging.triton import tiny_bundles
from tests.packaging.triton.clients import Client, client_packages
from tests.packaging.triton.server import Server, serving
from tests.packaging.triton.tiny_bundles import Tiny

COUNTS, CLIENTS = (1, 2, 4, 8), 16


def repository(folder: Path) -> Path:
    """One bundle under a name for each number of instances."""
    transform = Preprocessing.for_size((224, 224), *channel_statistics(3), crop=0.9)
    bundle = tiny_bundles.write(folder / "bundle", Tiny(preprocessing=transform, engine="none"))
    instances = Instances.parse([f"m{count}_preprocess:{count}" for count in COUNTS])
    options = TritonOptions(Backend.ONNXRUNTIME, instances=instances, ensemble=Ensemble())
    arguments = [BundleArgument(bundle, f"m{count}") for count in COUNTS]
    return write_repository(arguments, folder / "repository", options).path


def asking(server: Server, model: str) -> Open:
    """A client that sends pictures to a step."""

    def opened() -> tuple[Ask, Callable[[], None]]:
        client = Client(server, "grpc")
        return lambda pictures: client.ask(model, image=pictures), client.close

    return opened


def processor_seconds(server: Server) -> float:
    """What all processes of the server have used of the processors."""
    ticks = 0
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == server.pid:  # its process group
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def own_megabytes(server: Server) -> float:
    """The largest private memory of the processes of the steps, in MB."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        command = (entry / "cmdline").read_bytes() if (entry / "cmdline").exists() else b""
        if b"_preprocess/1/model.py" in command and str(server.pid).encode() in command:
            private = re.findall(r"^Private_\w+:\s+(\d+) kB", (entry / "smaps_rollup").read_text(), re.MULTILINE)
            found.append(sum(map(int, private)) / 1000)
    return max(found)


def measure(seconds: float, rounds: int) -> tuple[list[list[str]], float]:
    """A row for each number of instances, and the memory of a process."""
    files = sorted(Path(images.__file__).with_name("probes").glob("*.jpg"))
    pictures = np.array([[file.read_bytes()] for file in files], np.object_)
    used: dict[int, list[float]] = {count: [] for count in COUNTS}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(client_packages())
        server = stack.enter_context(serving([repository(folder)], folder / "server"))
        for _ in range(rounds):
            for count in COUNTS:
                opened, before = asking(server, f"m{count}_ensemble"), processor_seconds(server)
                pictures_sent = throughput(opened, pictures, CLIENTS, seconds) * seconds
                used[count].append(1000 * (processor_seconds(server) - before) / pictures_sent)
        memory = own_megabytes(server)
    rows = [
        [str(count), f"{statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f})"]
        for count, times in used.items()
    ]
    return rows, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    rows, memory = measure(options.seconds, options.rounds)
    head = f"Medians and range of the rounds, {CLIENTS} clients; a process has {memory:.0f} MB of its own. "
    head += f"The machine's load was {load:.1f} before it began.\n\n"
    command = f"python -m benchmarks.preprocess_instances --seconds {options.seconds:g} --rounds {options.rounds}"
    record(
        "Instances that decode pictures",
        command,
        head + table(("instances", "ms of a core a picture"), rows),
        ("numpy",),
    )


if __name__ == "__main__":
    main()
