"""Runs cases in a folder and reads what they printed and wrote."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.recordings.cases import Case, Text
from benchmarks.recordings.readings import plain, read_folder, read_graph, read_json

SECONDS = 900
TERMINAL = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}

Recording: TypeAlias = dict[str, Any]
"""What JSON holds of one case."""


@dataclasses.dataclass(frozen=True)
class Done:
    """A command that ended."""

    code: int
    stdout: str
    stderr: str


Run: TypeAlias = Callable[[Sequence[str], Path], Done]
"""Runs a command in a folder."""


@dataclasses.dataclass(frozen=True)
class Scripts:
    """Runs the commands of an environment as its users do, each in a process of its own, without a cache."""

    folder: Path

    def __call__(self, command: Sequence[str], folder: Path) -> Done:
        if not (self.folder / command[0]).exists():
            return Done(127, "", "This version has no such command.\n")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "SPACH"))}
        environment |= {"SPACH_CACHE": "none", **TERMINAL}
        done = subprocess.run(
            [self.folder / command[0], *command[1:]],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        return Done(done.returncode, done.stdout, done.stderr)


def record(case: Case, run: Run, folder: Path, places: dict[str, str]) -> Recording:
    """Run a case in `folder`; `places` are folders and what stands for them in the recording."""
    start = time.monotonic()
    done = run(case.command, folder)
    places = {str(folder): "FOLDER", **places}
    recording: Recording = {"command": " ".join(case.command), "exit code": done.code}
    if case.text is not Text.NONE:
        figures = case.text is Text.FIGURES
        recording["stdout"] = plain(done.stdout, places, figures=figures).splitlines()
        recording["stderr"] = plain(done.stderr, places, figures=figures).splitlines()
    written = _written(folder / case.output, places) if case.output else {}
    return recording | written | {"seconds": round(time.monotonic() - start, 1)}


def _written(output: Path, places: dict[str, str]) -> Recording:
    """What a file or folder holds."""
    if output.is_file():
        return {"json": {output.name: read_json(output.read_text(encoding="utf-8"), places)}}
    if not output.is_dir():
        return {}
    parsed = (path for path in sorted(output.rglob("*.json")) if path.stat().st_size < 500_000)
    graphs = sorted(output.rglob("model.onnx"))
    return {
        "files": read_folder(output, places),
        "json": {str(f.relative_to(output)): read_json(f.read_text(encoding="utf-8"), places) for f in parsed},
        "graphs": {str(f.relative_to(output)): read_graph(f, places) for f in graphs},
    }


def portable(recording: Recording) -> Recording:
    """What is the same on every machine with the pinned packages: without the last bits of weights and the report."""
    kept = {key: value for key, value in recording.items() if key not in ("seconds", "files", "json", "graphs")}
    if "files" in recording:
        manifest = recording["json"]["manifest.json"]
        kept["files"] = dict.fromkeys(recording["files"], "")
        kept["json"] = {"manifest.json": {k: v for k, v in manifest.items() if not _is_of_the_machine(k)}}
        kept["graphs"] = {name: _portable_graph(graph) for name, graph in recording["graphs"].items()}
    return kept


def _is_of_the_machine(key: str) -> bool:
    return key.startswith(("tools/", "precision/closest/")) or key.endswith("sha256")


def _portable_graph(graph: Recording) -> Recording:
    initializers = {name: text.rsplit(" ", 2)[0] for name, text in graph["initializers"].items()}
    return {key: graph[key] for key in ("versions", "inputs", "outputs", "nodes")} | {"initializers": initializers}
