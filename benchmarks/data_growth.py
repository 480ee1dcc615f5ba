"""Time and peak memory of calibration, validation and bisection as the number of images grows.

    python -m benchmarks.data_growth [MODEL] [--images 16 64 256] [--rounds 1]

Each run is the command a user types, in a process of its own, on an npz of photographs; memory is the largest resident
size of all its processes. *an image* is the slope of a straight line through the points, so loading and exporting,
which do not grow, are not in it. Where memory grows by less than an image's pixels for each image, nothing is kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.export_time import Cost, measure
from benchmarks.fitting import marginal
from benchmarks.photographs import SIDE, calibration_photographs, held_out_photographs
from benchmarks.results import record, table

JOBS = ("calibration", "validation", "bisection")


@dataclasses.dataclass(frozen=True)
class Place:
    """A folder with a bundle and, for each number, two npz files of so many different photographs."""

    folder: Path
    model: str
    image_size: int | None

    @property
    def bundle(self) -> Path:
        """The bundle that is validated and bisected."""
        return self.folder / "bundle"

    def prepare(self, counts: Sequence[int]) -> None:
        """Make all of it."""
        for count in counts:
            np.savez(self.folder / f"calibration{count}.npz", images=calibration_photographs(count))
            np.savez(self.folder / f"held_out{count}.npz", images=held_out_photographs(count))
        measure(self._command("export", "--fp16", "--engine", "none", "--no-cache", "-o", self.bundle))

    def command(self, job: str, count: int) -> list[str]:
        """What is measured."""
        if job == "calibration":
            images, output = self.folder / f"calibration{count}.npz", self.folder / f"{count}.json"
            output.unlink(missing_ok=True)
            return self._command("calibrate", "--calibration", images, "-o", output)
        extra = ("--bisect",) if job == "bisection" else ()
        images = self.folder / f"held_out{count}.npz"
        return _python("validate", self.bundle, "--images", images, "--max-images", count, *extra)

    def _command(self, module: str, *options: object) -> list[str]:
        size = () if self.image_size is None else ("--image-size", self.image_size)
        return _python(module, "--model", self.model, *size, *options)


def _python(module: str, *options: object) -> list[str]:
    code = f"from spach_deploy.cli.{module} import main; main()"
    return [sys.executable, "-c", code, *(str(option) for option in options)]


def rows(job: str, place: Place, counts: Sequence[int], rounds: int) -> list[list[str]]:
    """One line a number of images, then the slope."""
    found: dict[int, list[Cost]] = {count: [] for count in counts}
    for _ in range(rounds):
        for count in counts:
            found[count].append(measure(place.command(job, count)))
    seconds = [statistics.median(cost.seconds for cost in found[count]) for count in counts]
    memory = [max(cost.tree_bytes for cost in found[count]) / 1e6 for count in counts]
    lines = [[job, str(n), f"{s:.1f}", f"{m:,.0f}"] for n, s, m in zip(counts, seconds, memory, strict=True)]
    return [*lines, [job, "an image", f"{marginal(counts, seconds):.3f}", f"{marginal(counts, memory):.2f}"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="ms_conv_xxs")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--images", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder), arguments.model, arguments.image_size)
        place.prepare(arguments.images)
        for job in arguments.jobs:
            lines.extend(rows(job, place, arguments.images, arguments.rounds))
            print(lines[-1], flush=True)
    stored = SIDE * SIDE * 3 / 1e6
    body = f"{table(('command', 'images', 's', 'peak MB'), lines)}\n\nAn image's stored pixels are {stored:.2f} MB."
    size = "" if arguments.image_size is None else f" --image-size {arguments.image_size}"
    counts = " ".join(map(str, arguments.images))
    command = f"python -m benchmarks.data_growth {arguments.model}{size} --images {counts}"
    record("Time and memory as images grow", command, body, ("torch", "onnxruntime"))


if __name__ == "__main__":
    main()
