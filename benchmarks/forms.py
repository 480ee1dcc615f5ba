"""Which of the equivalent forms that we give a model pays, alone and in pairs, by the compiler's own schedule.

    python -m benchmarks.forms [STACK ...] [--gpu sm86,sm89,sm120] [--precision fp16] [--pairs]

Stacks of three blocks, of the widths of ms_hybrid_s, in which a build takes seconds. Every rewrite and every pass can
be left out; each such graph is first run in ONNX Runtime against the reference model, and one that computes something
else is an error. The table gives kernels and bytes of the form that spach-export uses, what leaving out one form adds,
and every form, and with `--pairs` every pair of forms, without which the schedule would be better: the winner is what
`rewrites/` and `passes/` do.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator

import numpy as np
import torch
from onnx import ModelProto

from benchmarks.candidates import CANDIDATES
from benchmarks.kernels import BATCH, facts, formed
from benchmarks.results import record, table
from spach_deploy.blocks import REWRITES
from spach_deploy.common.metrics import relative_l2
from spach_deploy.graph.passes import TENSORRT_PASSES
from spach_deploy.models.demo import load_demo_weights
from spach_deploy.models.spach import Spach
from spach_deploy.options.architecture import Architecture
from spach_deploy.options.gpus import parse_gpus
from spach_deploy.options.specs import EngineTarget, Precision
from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner
from tests.protos import in_place
from tests.static_models import architecture

STACKS = {
    "conv": architecture(96, 4, 2, "3 conv"),
    "trans": architecture(192, 16, 3, "3 trans", heads=6),
    "mlp": architecture(192, 16, 3, "3 mlp", shared=True),
    "hybrid": architecture(64, 4, 3, "2 conv | 1 conv, 1 trans | 2 trans", heads=4),
    "convolutional stem": architecture(64, 4, 3, "2 conv | 2 trans", heads=4, stem="conv"),
}
SIZE, CLASSES = 224, 100
FORMS = (*(step.name for step in REWRITES), *(step.name for step in TENSORRT_PASSES))
_NOISE = 2e-5
"""Largest relative L2 that FP32 alone puts between two forms of so few blocks."""


@dataclasses.dataclass(frozen=True)
class Change:
    """Forms of ours that are left out, or a candidate that is put in."""

    left_out: tuple[str, ...] = ()
    candidate: str = ""

    def __str__(self) -> str:
        return self.candidate or " and ".join(f"no {form}" for form in self.left_out)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What the compiler makes of a form. `bytes_moved`: at batch 8."""

    kernels: int
    bytes_moved: int

    def beats(self, other: Schedule) -> bool:
        """Less of one, and no more of the other."""
        mine, theirs = (self.kernels, self.bytes_moved), (other.kernels, other.bytes_moved)
        return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


class Stack:
    """A few blocks and their reference's answers."""

    def __init__(self, architecture: Architecture) -> None:
        self.model = Spach(architecture.replace(image_size=SIZE, classes=CLASSES)).eval()
        load_demo_weights(self.model)
        self.images = np.random.default_rng(0).standard_normal((2, 3, SIZE, SIZE)).astype(np.float32)
        with torch.inference_mode():
            self.logits = self.model(torch.from_numpy(self.images)).numpy()

    def graph(self, change: Change) -> ModelProto | None:
        """Its graph in another form, proven to compute the same; None where a candidate finds nothing to change."""
        graph = formed(self.model, change.left_out)
        if change.candidate and not in_place(CANDIDATES[change.candidate], graph):
            return None
        with OnnxRuntimeRunner(graph.SerializeToString()) as runner:
            answer = runner.run({next(iter(runner.input_specs)): self.images})["logits"]
        error = relative_l2(answer, self.logits)
        if error > _NOISE:
            sys.exit(f"{change or 'As it is'}: the graph computes something else: {error:.1e}.")
        return graph


def changes(most: int) -> Iterator[Change]:
    """None, every form left out, and so on up to `most` forms at once; then every candidate."""
    for left_out in itertools.chain.from_iterable(itertools.combinations(FORMS, n) for n in range(most + 1)):
        yield Change(left_out)
    yield from (Change(candidate=name) for name in CANDIDATES)


def schedules(stack: Stack, precision: Precision, gpus: list[str], most: int) -> Iterator[tuple[str, Change, Schedule]]:
    """GPU, what was changed, and what came of it."""
    for change in changes(most):
        graph = stack.graph(change)
        if graph is None:
            continue
        for gpu in gpus:
            found = facts(graph, precision, EngineTarget(gpus=parse_gpus(gpu)))
            assert found is not None
            yield gpu, change, Schedule(len(found.kernels), found.bytes_moved(BATCH) or 0)


def rows(name: str, precision: Precision, gpus: list[str], most: int) -> Iterator[list[object]]:
    """A row a GPU."""
    found: dict[str, dict[Change, Schedule]] = {gpu: {} for gpu in gpus}
    for gpu, change, schedule in schedules(Stack(STACKS[name]), precision, gpus, most):
        found[gpu][change] = schedule
    for gpu, of in found.items():
        whole = of[Change()]
        adds = [_difference(of[change], whole) if change in of else "-" for change in changes(1) if change != Change()]
        better = [str(change) for change, schedule in of.items() if schedule.beats(whole)]
        yield [name, gpu, f"{whole.kernels} / {whole.bytes_moved / 1e6:,.1f}", *adds, "; ".join(better) or "none"]


def _difference(one: Schedule, other: Schedule) -> str:
    kernels, moved = one.kernels - other.kernels, (one.bytes_moved - other.bytes_moved) / 1e6
    return "same" if not kernels and abs(moved) < 0.05 else f"{kernels:+d} / {moved:+,.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stacks", nargs="*", default=list(STACKS))
    parser.add_argument("--gpu", default="sm86,sm89,sm120")
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], default="fp16")
    parser.add_argument("--pairs", action="store_true", help="leave out pairs of forms too: an hour and more")
    arguments = parser.parse_args()
    lines = []
    for name in arguments.stacks:
        for line in rows(name, Precision(arguments.precision), arguments.gpu.split(","), 1 + arguments.pairs):
            print(" | ".join(map(str, line)), flush=True)
            lines.append(line)
    headings = (
        "stack",
        "GPU",
        "all forms: kernels / MB",
        *(str(change) for change in changes(1) if change != Change()),
        "better",
    )
    body = f"Kernels / MB moved at batch {BATCH}, of three to six blocks.\n\n{table(headings, lines)}"
    command = " ".join(["python -m benchmarks.forms", *sys.argv[1:]])
    if set(arguments.stacks) == set(STACKS):
        record(f"Equivalent forms, {arguments.precision}", command, body, ("torch", "tensorrt-rtx"))


if __name__ == "__main__":
    main()
