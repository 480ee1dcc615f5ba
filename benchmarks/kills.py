"""Commands killed at random moments: is every bundle whole, is nothing left behind, is nobody left running?

    python -m benchmarks.kills [--count 200] [--seed 0] [--processes 2]

Exports (over an earlier bundle, into a new place, with a cache), validations, calibrations and packages of a small
model get SIGKILL, SIGTERM or SIGINT at a moment drawn from the time they take. After each, what was there before must
be whole, old or new; after all, one run of each command must leave no draft behind.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.results import record, table
from spach_deploy.bundle.cache import Store
from spach_deploy.bundle.store import Bundle
from tests.commands import ROOT, console_script

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
KILLS = 200
_REGISTER = (  # with no import that takes long: a kill is to hit the command, not what lets it know the small model
    "import spach_deploy.cli; from spach_deploy.models.published import ARCHITECTURES, Architecture;"
    " ARCHITECTURES['small'] = Architecture(width=16, patch_size=4, channel_ratio=3, heads=4,"
    " stages=((('conv', 2),), (('conv', 1), ('trans', 2)), (('trans', 3),)))"
)
_MODEL = ("--model", "small", "--image-size", "32", "--num-classes", "11")


@dataclasses.dataclass(frozen=True)
class Command:
    """A command to kill, by name, with its words."""

    name: str
    program: str
    words: tuple[str, ...]


COMMANDS = (
    Command(
        "export, replacing", "spach-export", (*_MODEL, "--engine", "none", "-o", "bundle", "--overwrite", "--no-cache")
    ),
    Command(
        "export, new", "spach-export", (*_MODEL, "--fp16", "--engine", "none", "-o", "new", "--overwrite", "--no-cache")
    ),
    Command("export, cached", "spach-export", (*_MODEL, "--engine", "none", "-o", "cached", "--overwrite")),
    Command("export, engine", "spach-export", (*_MODEL, "--gpu", "sm89", "-o", "engine", "--overwrite", "--no-cache")),
    Command("validate", "spach-validate", ("bundle", "--accept", "graph")),
    Command("package triton", "spach-package", ("triton", "bundle", "-o", "repository", "--overwrite")),
)


@dataclasses.dataclass(frozen=True)
class Killed:
    """One kill, and what was found wrong after it."""

    command: str
    signal: str
    code: int
    findings: tuple[str, ...]


class Place:
    """A directory with scripts, an earlier bundle and a cache, in which one worker kills one command after another."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="spach-kills-"))
        self.work = self.root / "work"
        self.work.mkdir()
        self.environment = os.environ | {
            "SPACH_CACHE": str(self.root / "cache"),
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(self.root),
            "PYTHONPATH": str(ROOT),
        }
        for command in COMMANDS:
            self._time(command)  # a first time, for what stays in the cache
        self.seconds = {command.name: self._time(command) for command in COMMANDS}

    def script(self, command: Command) -> Path:
        """The console script of a command, which knows the small model."""
        folder = self.root / command.program
        folder.mkdir(exist_ok=True)
        return console_script(command.program, folder, before=_REGISTER)

    def _time(self, command: Command) -> float:
        start = time.monotonic()
        process = self.start(command)
        process.communicate()
        assert process.returncode == 0, command
        return time.monotonic() - start

    def start(self, command: Command) -> subprocess.Popen[bytes]:
        """Start a command in a process group of its own."""
        return subprocess.Popen(
            [str(self.script(command)), *command.words],
            cwd=self.work,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def kill(self, command: Command, sent: signal.Signals, delay: float) -> Killed:
        """Kill a command after `delay` seconds, and look at what is left."""
        process = self.start(command)
        time.sleep(delay)
        process.send_signal(sent)
        _, stderr = process.communicate(timeout=120)
        findings = [*self._findings(stderr.decode(errors="replace"), process.returncode, sent)]
        findings += [f"still running: {name}" for name in _group(process.pid)]
        return Killed(command.name, sent.name, process.returncode, tuple(findings))

    def _findings(self, stderr: str, code: int, sent: signal.Signals) -> Iterator[str]:
        if "Traceback" in stderr and f'"{ROOT / "spach_deploy"}' in stderr:  # not Python's own start, before our code
            yield f"traceback: {stderr.strip().splitlines()[-1]}"
        if code not in (0, 1, 2, 3, 128 + sent, -sent):
            yield f"exit code {code}"
        for name in ("bundle", "new", "cached", "engine"):
            try:
                Bundle.open(self.work / name)
            except Exception as error:  # whatever it is, the bundle is not whole
                yield f"{name} is not whole: {error}"
        store = Store(self.root / "cache", 10**10)
        for entry in store.entries():
            target = Path(tempfile.mkdtemp(dir=self.root))
            if not store.take(entry, target):
                yield f"cache entry {entry.key[:8]} is not whole"
            shutil.rmtree(target)

    def leftovers(self) -> list[str]:
        """What is beside the commands' own results once each has run to its end."""
        for command in COMMANDS:
            self.start(command).communicate()
        wanted = {"bundle", "new", "cached", "engine", "repository"}
        return sorted({path.name for path in self.work.iterdir()} - wanted)


def _group(leader: int) -> list[str]:
    """Processes of the session that `leader` began, which should have ended with it."""
    time.sleep(0.3)
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


def work(job: tuple[int, int]) -> tuple[list[Killed], list[str]]:
    """One worker's share of kills."""
    count, seed = job
    generator = random.Random(seed)
    place = Place()
    killed = []
    for number in range(count):
        command = COMMANDS[number % len(COMMANDS)]
        delay = generator.uniform(0, 1.05 * place.seconds[command.name])
        killed.append(place.kill(command, generator.choice(SIGNALS), delay))
        if killed[-1].findings:
            print(killed[-1], flush=True)
    left = place.leftovers()
    shutil.rmtree(place.root, ignore_errors=True)
    return killed, left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=KILLS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    share = -(-arguments.count // arguments.processes)
    start = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        results = pool.map(work, [(share, arguments.seed + number) for number in range(arguments.processes)])
    killed = [entry for found, _ in results for entry in found]
    left = [name for _, names in results for name in names]
    body, is_whole = report(killed, left, time.monotonic() - start), arguments.count >= KILLS
    record("Kills at random moments", "python -m benchmarks.kills", body, is_whole=is_whole)


def report(killed: Sequence[Killed], left: Sequence[str], seconds: float) -> str:
    """The section's text."""
    rows = []
    for command in COMMANDS:
        mine = [entry for entry in killed if entry.command == command.name]
        signals = collections.Counter(entry.signal for entry in mine)
        ended = sum(entry.code == 0 for entry in mine)
        counts = (signals[sent.name] for sent in SIGNALS)
        rows.append([command.name, len(mine), *counts, ended, sum(bool(entry.findings) for entry in mine)])
    headings = ("command", "kills", "SIGKILL", "SIGTERM", "SIGINT", "had ended", "findings")
    found = [f"- {entry.command}, {entry.signal}: {finding}" for entry in killed for finding in entry.findings]
    return "\n\n".join(
        [
            f"{len(killed)} kills in {seconds:.0f} s; left behind at the end: {', '.join(left) or 'nothing'}.",
            table(headings, rows),
            "\n".join(found) or "Every bundle was whole after every kill, and nothing went on running.",
        ]
    )


if __name__ == "__main__":
    main()
