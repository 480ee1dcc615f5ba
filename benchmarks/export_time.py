"""Time and memory of a whole export against plain torch.onnx.export + onnxsim of the same model.

    python -m benchmarks.export_time [MODEL ... | all] [--rounds 3]

Both run as processes of their own, in turn, so that a machine whose speed drifts slows both. Ours certifies the graph,
measures ranges, builds the engine, derives tolerances and validates; plain only writes a graph. Memory is resident
size, sampled every 50 ms: of the largest process, and of all together (ours builds the engine in a process of its own).
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
from spach_deploy.models.published import CONFIGS

PLAIN = """
import sys, onnx
from benchmarks.kernels import plain_export
from spach_deploy.models.checkpoint import load_model
from spach_deploy.graph.export import simplify
from spach_deploy.options.specs import ModelSpec
onnx.save(simplify(plain_export(load_model(ModelSpec(name=sys.argv[1])).model)), sys.argv[2] + "/model.onnx")
"""
OURS = str(Path(sys.executable).with_name("spach-export"))
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


def compare(model: str, rounds: int) -> list[str]:
    """Pairs of runs; medians and the ratio pair by pair."""
    plain: list[Cost] = []
    ours: list[Cost] = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            plain.append(measure([sys.executable, "-c", PLAIN, model, folder]))
            options = ["--model", model, "--fp16", "-o", f"{folder}/bundle"]
            ours.append(measure([OURS, *options]))
    ratios = [b.seconds / a.seconds for a, b in zip(plain, ours, strict=True)]
    cells = [
        model,
        f"{statistics.median(cost.seconds for cost in plain):.1f}",
        f"{statistics.median(cost.seconds for cost in ours):.1f}",
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
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
    arguments = parser.parse_args()
    models = list(CONFIGS) if arguments.models == ["all"] else arguments.models
    rows = [compare(model, arguments.rounds) for model in models]
    headings = ("model", "plain s", "whole export s", "ratio", "plain GB", "largest process GB", "all GB")
    command = f"python -m benchmarks.export_time {' '.join(arguments.models)} --rounds {arguments.rounds}"
    record("Time and memory of an export", command, table(headings, rows), is_whole=set(models) == set(CONFIGS))


if __name__ == "__main__":
    main()
