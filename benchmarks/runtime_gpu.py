"""What a GPU makes of a model in everything that runs it: PyTorch, CUDA graphs, ONNX Runtime, TensorRT; with verdicts.

    python -m benchmarks.runtime_gpu                        # on any NVIDIA GPU, at most 8 minutes
    python -m benchmarks.runtime_gpu --minutes 30           # goes on where an earlier run stopped
    python -m benchmarks.runtime_gpu --device cpu --model conv_xxs --image-size 64 --batches 1,2   # a rehearsal

Each cell (a runner, a graph, a precision) is measured in a process of its own, which first has to give the right
answers: within what the precision may lose on eight photographs. A cell that is wrong is not timed. What is done is
kept in `--folder`, so that a run that ran out of time, or died, goes on there; the most telling cells come first, and
what was left out is said. Writes RESULTS-GPU.md beside this file (`--output`).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import report
from benchmarks.gpu.cells import CELLS, Cell, cell_named, why_not
from benchmarks.gpu.prepare import ALLOWED, GOLDEN, prepare
from benchmarks.gpu.runners import opened, wait

WARM_RUNS, LEAST_RUNS, TURN_S = 3, 5, 0.5
STATE = "state.json"


def measure(cell: Cell, arguments: argparse.Namespace) -> dict[str, Any]:
    """One cell, in this process: its error, then seconds of each batch."""
    with np.load(arguments.folder / GOLDEN) as golden:
        images, logits = golden["images"], golden["logits"]
    allowed = json.loads((arguments.folder / ALLOWED).read_text(encoding="utf-8"))[cell.precision]
    with opened(cell, arguments.folder, arguments.device, arguments.model, arguments.image_size) as set_batch:
        answers = np.concatenate([_host(set_batch(images[i : i + 4])()) for i in range(0, len(images), 4)])
        errors = np.linalg.norm(answers - logits, axis=1) / np.linalg.norm(logits, axis=1)
        found: dict[str, Any] = {"error": float(errors.max()), "allowed": allowed, "seconds": {}}
        if not found["error"] <= allowed:
            return found | {"problem": "wrong: not timed"}
        for batch in arguments.batches:
            try:
                run = set_batch(images[np.arange(batch) % len(images)])
                found["seconds"][str(batch)] = _median_seconds(run, arguments.device)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                return found | {"problem": f"batch {batch}: {str(error).splitlines()[0][:160]}"}
    return found


def _host(answer: Any) -> np.ndarray[Any, Any]:
    tensor = answer.float().cpu().numpy() if isinstance(answer, torch.Tensor) else np.asarray(answer)
    return tensor.astype(np.float64)


def _median_seconds(run: Any, device: str) -> float:
    for _ in range(WARM_RUNS):
        run()
    wait(device)
    times: list[float] = []
    end = time.perf_counter() + TURN_S
    while len(times) < LEAST_RUNS or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peaks(device: str) -> dict[str, float]:
    """FLOP/s of square products in each precision, and bytes/s of copies, at best, measured now."""
    side, count = (8192, 1 << 30) if device == "cuda" else (1024, 1 << 27)
    found = {}
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16 if device == "cuda" else torch.float32)):
        left = torch.rand(side, side, device=device, dtype=dtype)
        found[name] = 2 * side**3 / _median_seconds(lambda left=left: left @ left, device)
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return found | {"bytes": 2 * count / _median_seconds(lambda: target.copy_(source), device)}


def installed() -> frozenset[str]:
    """Which of the packages that decide what can run are here."""
    found = set()
    for package in ("tensorrt", "tensorrt-rtx"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(package)
            found.add(package)
    with contextlib.suppress(ImportError):
        import onnxruntime

        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            found.add("onnxruntime-cuda")
    return frozenset(found)


def run_cells(arguments: argparse.Namespace, end: float) -> dict[str, Any]:
    """Measure what is not done yet until time is up; the state, which is also on disk after every cell."""
    state = _state(arguments)
    capability = torch.cuda.get_device_capability() if arguments.device == "cuda" else None
    longest = 0.0
    for cell in CELLS:
        done = state["cells"].get(cell.name, {})
        if done.get("seconds") or done.get("error") is not None:
            continue
        if reason := why_not(cell, arguments.device, capability, installed()):
            state["cells"][cell.name] = {"problem": reason}
            continue
        left = end - time.monotonic()
        if left < longest:
            state["cells"][cell.name] = {"problem": "left out: no time"}
            continue
        start = time.monotonic()
        state["cells"][cell.name] = _in_a_process(cell, arguments, max(left, 1.0))
        longest = max(longest, time.monotonic() - start)
        _keep(state, arguments)
        print(
            f"{time.monotonic() - start:6.1f} s  {cell.name}: {report.in_words(state['cells'][cell.name])}", flush=True
        )
    _keep(state, arguments)
    return state


def _in_a_process(cell: Cell, arguments: argparse.Namespace, limit_s: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.runtime_gpu", *_words(arguments), "--cell", cell.name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {"problem": "left out: no time"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        return {"problem": said[-1][:200]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def _words(arguments: argparse.Namespace) -> list[str]:
    words = ["--model", arguments.model, "--device", arguments.device, "--folder", str(arguments.folder)]
    words += ["--batches", ",".join(map(str, arguments.batches))]
    return [*words, "--image-size", str(arguments.image_size)] if arguments.image_size else words


def _state(arguments: argparse.Namespace) -> dict[str, Any]:
    """What earlier runs with the same words on the same device found."""
    about = {"words": _words(arguments), "device": device_name(arguments.device)}
    with contextlib.suppress(OSError, ValueError):
        state: dict[str, Any] = json.loads((arguments.folder / STATE).read_text(encoding="utf-8"))
        if state["about"] == about:
            return state
    return {"about": about, "cells": {}}


def _keep(state: dict[str, Any], arguments: argparse.Namespace) -> None:
    draft = arguments.folder / f"{STATE}.new"
    draft.write_text(json.dumps(state, indent=1), encoding="utf-8")
    draft.replace(arguments.folder / STATE)


def device_name(device: str) -> str:
    """The GPU's name, or CPU."""
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def arguments_of(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ms_hybrid_s")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--batches", default="1,8,32,128", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--folder", type=Path, default=Path("build") / "runtime_gpu")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--prepare", action="store_true", help="make graphs and answers, which need no GPU, and end")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    return parser.parse_args(given)


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    print(f"{time.monotonic() - start:6.1f} s  {what}", flush=True)


def main(given: list[str] | None = None) -> int:
    arguments = arguments_of(given)
    if arguments.cell:
        print(json.dumps(measure(cell_named(arguments.cell), arguments)))
        return 0
    end = time.monotonic() + 60 * arguments.minutes
    if arguments.device == "cuda" and not arguments.prepare and not torch.cuda.is_available():
        print("No NVIDIA GPU that PyTorch can use is here; --device cpu rehearses.", file=sys.stderr)
        return 3
    with _told("prepare"):
        prepare(arguments.model, arguments.folder, arguments.image_size)
    if arguments.prepare:
        return 0
    state = run_cells(arguments, end)
    with _told("peaks"):
        limits = peaks(arguments.device)
    text = report.markdown(state, limits, arguments.folder / CELLS[1].file, arguments.batches)
    name = re.sub(r"\W+", "-", device_name(arguments.device)).strip("-").lower()
    output = arguments.output or Path(__file__).with_name(f"RESULTS-{name}.md")
    output.write_text(text, encoding="utf-8")
    print(f"{text}\nWritten: {output}")
    return 1 if any("wrong" in cell.get("problem", "") for cell in state["cells"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
