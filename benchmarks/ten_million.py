"""What an image costs in calibration and in validation, in seconds of one core: what a run over millions is priced by.

    python -m benchmarks.ten_million [MODEL ...]

Seconds are of processor time on one thread, which other work on the machine disturbs least. Pictures are the built-in
photographs as JPEG files of 500 pixels on the longer side. Validation is spach-validate's own, of a FP16 graph: the
difference of two runs that differ in the number of images, divided by that difference.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from onnx import ModelProto
from PIL import Image

from benchmarks.results import record, table
from spach_deploy.blocks import rewrite
from spach_deploy.data.calibration_set_checks import CalibrationSetCollector
from spach_deploy.data.images import probe_source
from spach_deploy.data.readers import open_images
from spach_deploy.graph.editing import as_proto
from spach_deploy.graph.export import export_canonical
from spach_deploy.models import load_model
from spach_deploy.options.specs import ModelSpec, Preprocessing
from spach_deploy.quantization.formats import INT8
from spach_deploy.quantization.plan import Scaling
from spach_deploy.quantization.scales import Method
from spach_deploy.quantization.shards import CalibrationShard, CalibrationWork, collect_part, merge_all, observe_part
from spach_deploy.quantization.sites import Selection
from spach_deploy.quantization.statistics import TensorRequest
from tests.protos import candidates

LONGER_SIDE = 500
PREPROCESSING = Preprocessing()
FEW, MANY = 8, 24


def photographs(folder: Path, count: int) -> Path:
    """`count` JPEG files, each photograph again and again at another quality."""
    pictures = [item.image for item in probe_source() if isinstance(item.image, Image.Image)]
    for number, picture in zip(range(count), itertools.cycle(pictures), strict=False):
        small = picture.copy()
        small.thumbnail((LONGER_SIDE, LONGER_SIDE), Image.Resampling.LANCZOS)
        small.save(folder / f"{number:03}.jpg", quality=95 - number // len(pictures))
    return folder


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def observed(images: Path) -> Iterator[tuple[str, float]]:
    """The first pass, and what the head does with its results."""
    entries = tuple(open_images(images).entries())
    yield "decode and observe (first pass)", cpu_seconds(lambda: observe_part(PREPROCESSING, entries)) / len(entries)
    found = observe_part(PREPROCESSING, entries)
    taker = CalibrationSetCollector(open_images(images), PREPROCESSING)

    def take_all() -> None:
        for _, seen in found.seen:
            taker.take(seen)

    taken = cpu_seconds(take_all)
    yield "head: take an observation", taken / len(entries)


def graph_of(name: str) -> tuple[ModelProto, tuple[TensorRequest, ...]]:
    static = rewrite(load_model(ModelSpec(name)).model, (), ()).model
    model = as_proto(export_canonical(static, PREPROCESSING.image_size))
    return model, candidates(model, Selection(), Scaling(INT8, Method.MAX)).wanted


def calibrated(name: str, images: Path) -> Iterator[tuple[str, float]]:
    """The second pass, without and with histograms: what a task takes once it runs, and once for each part."""
    model, wanted = graph_of(name)
    entries = tuple(open_images(images).entries())
    digests = tuple(seen.digest for _, seen in observe_part(PREPROCESSING, entries).seen)
    for label, histograms in (("max", False), ("entropy, percentile, mse", True)):
        work = CalibrationWork(model.SerializeToString(), wanted, histograms, PREPROCESSING, 1)

        def part(count: int, work: CalibrationWork = work) -> float:
            return cpu_seconds(lambda: collect_part(work, CalibrationShard(0, entries[:count], digests[:count])))

        few, many = part(FEW), part(MANY)
        each = (many - few) / (MANY - FEW)
        yield f"calibrate (second pass), {label}", each
        if not histograms:  # the same with them, and lost in what they take
            yield "begin a part", few - FEW * each
        statistics = collect_part(work, CalibrationShard(0, entries[:1], digests[:1]))
        yield f"head: merge a part, {label}", cpu_seconds(lambda found=statistics: merge_all({}, found))  # type: ignore[misc]


def validated(name: str, images: Path) -> float:
    """Seconds that an image takes in spach-validate."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "b"
        _command("export", "--model", name, "--fp16", "--engine", "none", "-o", str(bundle))
        few, many = (
            _command("validate", str(bundle), "--images", str(images), "--max-images", str(count))
            for count in (FEW, MANY)
        )
    return (many - few) / (MANY - FEW)


def _command(name: str, *words: str) -> float:
    """Processor seconds of a command, on one core."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = f"from spach_deploy.cli.{name} import main; main()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SPACH_CACHE": "none"}
    core = {min(os.sched_getaffinity(0))}
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, core),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["ms_trans_xxs", "ms_hybrid_s"])
    names = parser.parse_args().models
    with tempfile.TemporaryDirectory() as folder:
        images = photographs(Path(folder), MANY)
        size = sum(file.stat().st_size for file in images.iterdir()) / MANY
        first = dict(observed(images))
        found = {
            name: {**first, **dict(calibrated(name, images)), "validate": validated(name, images)} for name in names
        }
    rows = [[what, *(f"{1000 * found[name][what]:,.2f} ms" for name in names)] for what in found[names[0]]]
    body = f"{table(['of one core', *names], rows)}\n\nFiles of {size / 1e3:.0f} kB on average."
    command = f"python -m benchmarks.ten_million {' '.join(names)}"
    record("An image's cost", command, body, ("torch", "onnxruntime"))


if __name__ == "__main__":
    main()
