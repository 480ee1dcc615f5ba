"""Record what commands print, write and end with, or say how that differs from an earlier recording.

    python -m benchmarks.recordings before                            # of this environment's commands
    python -m benchmarks.recordings after --scripts OTHER/.venv/bin --against before
    python -m benchmarks.recordings after --against before --only 'wrong-*' 'help-*'
    python -m benchmarks.recordings after --against before --compare  # two recordings that are there
    python -m benchmarks.recordings tests/recordings/quick.json --quick     # what a test compares

Commands run one after the other in an empty folder, each in a process of its own, without the cache of exports: about
70 exports. Left out of what is compared: times, versions, folders, measured figures.
Exit codes: 0 recorded, and equal; 1 something differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.recordings.cases import QUICK, cases
from benchmarks.recordings.differences import compared
from benchmarks.recordings.inputs import make_changed_bundle, make_checkpoint, make_inputs
from benchmarks.recordings.recorder import Recording, Scripts, portable, record


def load(place: Path) -> dict[str, Recording]:
    """The recordings in a folder or a file, by case."""
    if place.suffix == ".json":
        return dict(json.loads(place.read_text(encoding="utf-8"))) if place.exists() else {}
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(place.glob("*.json"))}


def save(name: str, recording: Recording, place: Path) -> None:
    """Put one case's recording into a folder or a file."""
    if place.suffix == ".json":
        path, content = place, {**load(place), name: recording}
    else:
        path, content = place / f"{name}.json", recording
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{json.dumps(content, indent=1, ensure_ascii=False)}\n", encoding="utf-8")


def recorded(scripts: Path, patterns: Iterable[str]) -> Iterator[tuple[str, Recording]]:
    """Run the cases that fit, each in the folder in which the ones before it wrote."""
    places = {str(scripts): "SCRIPTS", str(scripts.parent): "ENVIRONMENT"}
    with tempfile.TemporaryDirectory(prefix="spach-recording-") as name:
        folder = Path(name)
        make_inputs(folder)
        make_checkpoint(folder, scripts / "python")
        for case in cases(patterns):
            make_changed_bundle(folder)
            yield case.name, record(case, Scripts(scripts), folder, places)


def main() -> int:
    arguments = _arguments()
    if not arguments.compare:
        patterns = arguments.only or (QUICK if arguments.quick else ["*"])
        for name, recording in recorded(arguments.scripts.absolute(), patterns):
            save(name, portable(recording) if arguments.quick else recording, arguments.place)
            print(f"{name:30} exit {recording['exit code']} {recording['seconds']:6.1f} s", flush=True)
    if arguments.against is None:
        return 0
    new = load(arguments.place)
    found = compared(load(arguments.against), new)
    for name, lines in found.items():
        print(f"{name}: {new[name]['command']}", *(f"  {line}" for line in lines), sep="\n")
    print(f"{len(found)} of {len(new)} cases differ")
    return int(bool(found))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", type=Path, help="where the recording goes: a folder, or one file.json")
    parser.add_argument("--scripts", type=Path, default=Path(sys.executable).parent, help="the folder of the commands")
    parser.add_argument("--against", type=Path, metavar="PLACE", help="an earlier recording; say what differs from it")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="cases, and those that they need")
    parser.add_argument("--quick", action="store_true", help="the few seconds of it that are the same everywhere")
    parser.add_argument("--compare", action="store_true", help="run nothing; compare what is in the two folders")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
