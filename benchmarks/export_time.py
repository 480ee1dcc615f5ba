"""Time and memory of a whole export against plain torch.onnx.export + onnxsim of the same model.

    python -m benchmarks.export_time [MODEL ... | all] [--rounds 3] [--without NAME]

all: the 24 models of SPACH.

Both run as processes of their own, in turn, so that a machine whose speed drifts slows both. Ours certifies the graph,
measures ranges, builds the engine, derives tolerances and validates; plain only writes a graph. Memory is resident
size, sampled every 50 ms: of the largest process, and of all together (ours builds the engine in a process of its own).

`--without NAME` asks what a mechanism for speed is worth: in every round a third process runs ours with `MECHANISMS`'
statements executed in the module that has it, as soon as that is loaded. It prints and records nothing. A mechanism
stays where the export without it takes at least 5 % longer on at least half of the models.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.results import record, table
from spach_deploy.models.published import ARCHITECTURES

PLAIN = """
import sys, onnx
from benchmarks.kernels import plain_export
from spach_deploy.models.checkpoint import load_model
from spach_deploy.graph.export import simplify
from spach_deploy.options.specs import ModelSpec
onnx.save(simplify(plain_export(load_model(ModelSpec(name=sys.argv[1])).model)), sys.argv[2] + "/model.onnx")
"""
OURS = str(Path(sys.executable).with_name("spach-export"))
WITHOUT = """
import importlib.abc, sys
from importlib.machinery import PathFinder

changed, change = sys.argv[1:3]

class Changing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != changed:
            return None
        spec = PathFinder.find_spec(name, path)
        load = spec.loader.exec_module
        def load_and_change(module):
            load(module)
            exec(change, vars(module))
        spec.loader.exec_module = load_and_change
        return spec

sys.meta_path.insert(0, Changing())
sys.argv[:] = ["spach-export", *sys.argv[3:]]
from spach_deploy.cli.export import main
main()
"""
MECHANISMS = {
    "repeat": (
        "spach_deploy.graph.block_prototype",
        "_runs = lambda stage: [[index] for index in stage._modules]",
    ),
    "quick-exit": ("spach_deploy.cli.console", "is_our_script = lambda: False"),
    "overlapped": ("spach_deploy.pipeline.scheduler", "available_threads = lambda: 1"),
}
"""How each mechanism for speed is turned off: the module that has it, and what is executed there once it is loaded.

`repeat`: trace one block of each kind and repeat it. `quick-exit`: exit without interpreter teardown. `overlapped`: run
steps in a worker process beside others, and the engine's build beside the graph's validation.
"""
_PAGE = 4096
_SAMPLE_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one run: wall seconds, and largest resident bytes of one process and of all together."""

    seconds: float
    process_bytes: int
    tree_bytes: int


def measure(command: list[str]) -> Cost:
    """Run to the end and watch."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    largest = together = 0
    while process.poll() is None:
        sizes = [resident_bytes(pid) for pid in tree(process.pid)]
        largest, together = max(largest, *sizes, 0), max(together, sum(sizes))
        time.sleep(_SAMPLE_SECONDS)
    seconds = time.perf_counter() - start
    if process.returncode:
        assert process.stderr is not None
        sys.exit(f"{command} failed: {process.stderr.read().decode()}")
    return Cost(seconds, largest, together)


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:
        return []
    return [pid, *(below for child in children for below in tree(int(child)))]


def resident_bytes(pid: int) -> int:
    """Resident size now, 0 for a process that has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * _PAGE
    except OSError:
        return 0


def command_without(name: str) -> list[str]:
    """spach-export without a mechanism."""
    return [sys.executable, "-c", WITHOUT, *MECHANISMS[name]]


def compare_without(name: str, model: str, rounds: int) -> float:
    """Rounds of three: plain, ours, ours without the mechanism. Prints and gives the last's ratio to ours."""
    commands = {"plain": [], "ours": [OURS], "without": command_without(name)}
    costs: dict[str, list[Cost]] = {kind: [] for kind in commands}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for kind, command in commands.items():
                whole = [*command, *_options(model, f"{folder}/{kind}")] if command else _plain(model, folder)
                costs[kind].append(measure(whole))
    to_plain, to_ours = (_ratios(costs["without"], costs[kind]) for kind in ("plain", "ours"))
    print(f"{model} without {name}: {_spread(to_plain)} of plain, {_spread(to_ours)} of ours", flush=True)
    return statistics.median(to_ours)


def _plain(model: str, folder: str) -> list[str]:
    return [sys.executable, "-c", PLAIN, model, folder]


def _options(model: str, bundle: str) -> list[str]:
    return ["--model", model, "--fp16", "--no-cache", "-o", bundle]


def _ratios(costs: list[Cost], others: list[Cost]) -> list[float]:
    """Of seconds, pair by pair."""
    return [cost.seconds / other.seconds for cost, other in zip(costs, others, strict=True)]


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def compare(model: str, rounds: int) -> list[str]:
    """Pairs of runs; medians and the ratio pair by pair."""
    plain: list[Cost] = []
    ours: list[Cost] = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            plain.append(measure(_plain(model, folder)))
            ours.append(measure([OURS, *_options(model, f"{folder}/bundle")]))
    cells = [
        model,
        f"{statistics.median(cost.seconds for cost in plain):.1f}",
        f"{statistics.median(cost.seconds for cost in ours):.1f}",
        _spread(_ratios(ours, plain)),
        f"{max(cost.process_bytes for cost in plain) / 1e9:.2f}",
        f"{max(cost.process_bytes for cost in ours) / 1e9:.2f}",
        f"{max(cost.tree_bytes for cost in ours) / 1e9:.2f}",
    ]
    print(" | ".join(cells), flush=True)
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["ms_hybrid_s"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without", metavar="NAME", choices=MECHANISMS, help=f"one of {', '.join(MECHANISMS)}")
    arguments = parser.parse_args()
    whole = [name for name, architecture in ARCHITECTURES.items() if architecture.family == "spach"]
    models = whole if arguments.models == ["all"] else arguments.models
    if arguments.without is not None:
        worth = [compare_without(arguments.without, model, arguments.rounds) for model in models]
        print(f"5 % or more on {sum(ratio >= 1.05 for ratio in worth)} of {len(worth)} models")
        return
    rows = [compare(model, arguments.rounds) for model in models]
    headings = ("model", "plain s", "whole export s", "ratio", "plain GB", "largest process GB", "all GB")
    command = f"python -m benchmarks.export_time {' '.join(arguments.models)} --rounds {arguments.rounds}"
    record("Time and memory of an export", command, table(headings, rows), is_whole=set(models) == set(whole))


if __name__ == "__main__":
    main()
