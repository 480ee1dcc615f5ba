"""A thousand bad inputs: does anything crash, hang, write where it should not, or run what an input says?

    python -m benchmarks.bad_inputs                       # all of them; writes RESULTS.md
    python -m benchmarks.bad_inputs --count 100 --seed 7  # others
    python -m benchmarks.bad_inputs --only "recipe, values" --keep /tmp/boxes
    python -m benchmarks.bad_inputs --show "recipe, values" 17

Commands run in forks of this process, which has loaded torch once, every tenth in a process of its own. A finding is
what `benchmarks.robustness.judge` says; `--keep` leaves the boxes of findings.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLCONFIGDIR", tempfile.mkdtemp(prefix="spach-matplotlib-"))

from benchmarks.results import record, table
from benchmarks.robustness.box import Box
from benchmarks.robustness.case import Case, Kind
from benchmarks.robustness.forks import Outcome, Running, Way
from benchmarks.robustness.judge import judge
from benchmarks.robustness.kinds import KINDS
from benchmarks.robustness.seeds import seeds

SEED, COUNT, OWN_PROCESS_EVERY, WORKERS = 7, 1000, 10, 2


@dataclasses.dataclass(frozen=True)
class Id:
    """Which case: its kind, and its number among those of that kind."""

    kind: Kind
    number: int
    seed: int

    def __str__(self) -> str:
        return f"{self.kind.name} {self.number}"

    @property
    def own_process(self) -> bool:
        """Whether it runs in a process of its own."""
        return self.number % OWN_PROCESS_EVERY == OWN_PROCESS_EVERY - 1

    def make(self, folder: Path) -> tuple[Box, Case]:
        """Its box, filled, and the case."""
        box = Box.new(folder / str(self).replace(" ", "-").replace(",", ""))
        return box, self.kind.make(box, Random(f"{self.seed} {self}"))


@dataclasses.dataclass(frozen=True)
class Judged:
    """A case that ended."""

    id: Id
    case: Case
    outcome: Outcome
    findings: tuple[str, ...]


def cases(count: int, seed: int, kinds: Iterable[Kind] = KINDS) -> list[Id]:
    """`count` cases, divided among the kinds by their shares."""
    kinds = list(kinds)
    total = sum(kind.share for kind in kinds)
    numbers = [max(round(count * kind.share / total), 1) for kind in kinds]
    return [Id(kind, number, seed) for kind, most in zip(kinds, numbers, strict=True) for number in range(most)]


def sample(count: int, seed: int) -> list[Id]:
    """`count` of the usual cases, of as many kinds."""
    chosen = Random(seed).sample(KINDS, min(count, len(KINDS)))
    usual = {kind.name: [id_ for id_ in cases(COUNT, SEED) if id_.kind is kind] for kind in chosen}
    return [Random(f"{seed} {name}").choice(ids) for name, ids in usual.items()]


def run_all(ids: Iterable[Id], folder: Path, *, workers: int = WORKERS, keep: bool = False) -> Iterator[Judged]:
    """Run cases, a few at a time, each as it ends."""
    waiting, running = collections.deque(ids), []  # type: ignore[var-annotated]
    cores = sorted(os.sched_getaffinity(0))
    while waiting or running:
        while waiting and len(running) < workers:
            id_ = waiting.popleft()
            box, case = id_.make(folder)
            before = box.tree()
            way = Way(id_.own_process, case.may_connect, cores[len(waiting) % len(cores)])
            process = Running(box, case.command, way)
            running.append((id_, box, case, before, process))
        for entry in list(running):
            id_, box, case, before, process = entry
            if (outcome := process.poll()) is not None:
                running.remove(entry)
                findings = tuple(judge(case, outcome, box, before))
                if not (findings and keep):
                    shutil.rmtree(box.root, ignore_errors=True)
                yield Judged(id_, case, outcome, findings)
        time.sleep(0.005)


def warm_up(folder: Path) -> None:
    """Load what commands load, in this process, so that forks have it.

    On one core: OpenMP's threads do not come along into a fork, which would wait for them.
    """
    from benchmarks.robustness.seeds import run

    here, cores = Path.cwd(), os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    seeds()
    os.chdir(folder)
    run("spach-validate", seeds().path("fp32"), "--json")
    run("spach-package", "triton", "--check", seeds().path("repository"))
    run("spach-package", "kubernetes", seeds().path("fp16"), "-o", folder / "warm", "--overwrite")
    os.chdir(here)
    os.sched_setaffinity(0, cores)


def main() -> int:
    arguments = _arguments()
    folder = Path(arguments.keep or tempfile.mkdtemp(prefix="spach-boxes-"))
    folder.mkdir(parents=True, exist_ok=True)
    warm_up(folder)
    if arguments.show:
        return _show(arguments, folder)
    kinds = [kind for kind in KINDS if not arguments.only or kind.name.startswith(arguments.only)]
    start, done = time.monotonic(), []
    for judged in run_all(cases(arguments.count, arguments.seed, kinds), folder, keep=bool(arguments.keep)):
        done.append(judged)
        for finding in judged.findings:
            print(
                f"{judged.id}: {judged.case.what}\n  {shlex.join(judged.case.command)[:400]}\n  {finding}", flush=True
            )
        if len(done) % 100 == 0:
            print(f"{len(done)} cases, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    _tell(done, time.monotonic() - start, arguments)
    if not arguments.keep:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if any(judged.findings for judged in done) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--only", metavar="KIND", help="kinds whose names begin so; RESULTS.md is left alone")
    parser.add_argument("--keep", metavar="DIR", help="leave the boxes of findings here")
    parser.add_argument("--show", nargs=2, metavar=("KIND", "NUMBER"), help="run one case and show what it prints")
    return parser.parse_args()


def _show(arguments: argparse.Namespace, folder: Path) -> int:
    kind = next(kind for kind in KINDS if kind.name == arguments.show[0])
    id_ = Id(kind, int(arguments.show[1]), arguments.seed)
    box, case = id_.make(folder)
    before = box.tree()
    command = (*case.command, "--debug") if "--debug" not in case.command else case.command
    outcome = Running(box, command, Way(id_.own_process, case.may_connect)).wait()
    print(f"{case.what}\n{shlex.join(case.command)}\n{outcome.stdout}\n{outcome.stderr}")
    print(f"exit code {outcome.code}, {outcome.seconds:.1f} s, {outcome.peak_bytes / 1e9:.2f} GB, in {box.root}")
    print("\n".join(judge(case, outcome, box, before)))
    return 0


def _tell(done: list[Judged], seconds: float, arguments: argparse.Namespace) -> None:
    """The table of kinds, and what was found."""
    rows = [_row(kind.name, [judged for judged in done if judged.id.kind is kind]) for kind in KINDS]
    rows = [row for row in rows if row[1]] + [_row("all", done)]
    headings = ("kind", "cases", "exit 0", "exit 1", "exit 2", "exit 3", "findings")
    longest = max(done, key=lambda judged: judged.outcome.seconds)
    own = sum(judged.id.own_process for judged in done)
    body = (
        f"{table(headings, rows)}\n\n{own} of {len(done)} in processes of their own, the others in forks;"
        f" {seconds:.0f} s in all, the longest {longest.outcome.seconds:.1f} s ({longest.id})."
    )
    if arguments.only or arguments.count < COUNT:
        print(body)
        return
    command = f"python -m benchmarks.bad_inputs --count {arguments.count} --seed {arguments.seed}"
    record("Bad inputs", command, body, ("torch", "onnx", "onnxruntime", "tensorrt-rtx"))


def _row(name: str, done: list[Judged]) -> list[object]:
    codes = collections.Counter(judged.outcome.code for judged in done)
    return [name, len(done), *(codes[code] for code in range(4)), sum(bool(judged.findings) for judged in done)]


if __name__ == "__main__":
    sys.exit(main())
