"""Where OpenVINO's time goes on this CPU, for ours beside the plain conversion, and how much faster any form could be.

    python -m benchmarks.cpu_bound [MODEL ...] [--batch 8] [--rounds 5]

Milliseconds by type of layer from OpenVINO's own profile: the least of the rounds, in which all forms take turns. Two
bounds on what a form in bfloat16, or in FP32, can gain over the plain conversion in the same precision:

- all but its products is free: the whole over its products (FullyConnected, MatMul, attention, convolutions), which are
  the same kernels of the same library in every form;
- its products at the highest speed that a product in that precision reaches here, or at the speed of memory, where that
  is longer (a roofline).
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch

from benchmarks.cpu_forms import MODELS, bundles
from benchmarks.results import record, table
from spach_deploy.benchmark.layers import Layer, layers
from spach_deploy.benchmark.plain import PlainModel, plain_openvino, save_openvino
from spach_deploy.benchmark.rounds import Peaks, shortest
from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.store import GOLDEN, GRAPH, Bundle
from spach_deploy.common.machine import available_threads, torch_threads
from spach_deploy.models import load_model
from spach_deploy.options.specs import ModelSpec, Precision

PRODUCTS = {"FullyConnected", "MatMul", "ScaledDotProductAttention", "Convolution", "GroupConvolution"}
PLAIN, OURS, OURS_INT8 = "plain, bf16", "ours, bf16", "ours, int8"
PLAIN_FP32, OURS_FP32 = "plain, fp32", "ours, fp32"
_IN_FP32 = (PLAIN_FP32, OURS_FP32)
_SIDES = (1024, 2048, 4096)
_SHOWN = 12


def files(made: Mapping[Precision, Bundle], name: str, folder: Path) -> Iterator[tuple[str, Path]]:
    """The model that OpenVINO reads, by form."""
    manifest, path = made[Precision.FP32].manifest, folder / "plain.xml"
    save_openvino(plain_openvino(PlainModel(load_model(ModelSpec(name)).model, manifest), manifest), path)
    yield PLAIN, path
    yield OURS, made[Precision.BF16].file(GRAPH)
    yield OURS_INT8, made[Precision.INT8].file(GRAPH)
    yield PLAIN_FP32, path
    yield OURS_FP32, made[Precision.FP32].file(GRAPH)


def request_of(path: Path, shape: tuple[int, ...], hint: str) -> Any:
    """A profiled inference request on all cores, its batch fixed, in the hint's precision where the graph is not in
    integers.
    """
    core = openvino.Core()
    model = core.read_model(path)
    model.reshape(list(shape))
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": available_threads(),
        "PERF_COUNT": True,
    }
    return core.compile_model(model, "CPU", settings).create_infer_request()


def milliseconds(requests: Mapping[str, Any], images: np.ndarray[Any, Any], rounds: int) -> dict[str, dict[str, float]]:
    """By form and type of layer: the sum of each layer's least time."""
    least: dict[str, dict[tuple[str, str], float]] = {form: defaultdict(lambda: float("inf")) for form in requests}
    for number in range(1 + rounds):
        for form, request in requests.items():
            request.infer([images])
            for layer in request.profiling_info if number else ():
                key = layer.node_type, layer.node_name
                if layer.status == layer.status.EXECUTED:
                    least[form][key] = min(least[form][key], 1000 * layer.real_time.total_seconds())
    sums: dict[str, dict[str, float]] = {form: defaultdict(float) for form in requests}
    for form, found in least.items():
        for (kind, _), time in found.items():
            sums[form][kind] += time
    return sums


def peaks(dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of the fastest product in `dtype`, and bytes/s of copies."""
    memory = Peaks(available_threads())
    memory.measure()
    best = 0.0
    with torch_threads(available_threads()):
        for side in _SIDES:
            left, right = (torch.rand(side, side).to(dtype) for _ in range(2))
            best = max(best, 2.0 * side**3 / shortest(functools.partial(torch.mm, left, right), "cpu"))
    return best, memory.best["bytes"]


def judged(plain: str, dtype: torch.dtype, times: Mapping[str, float], products: Sequence[Layer]) -> str:
    """Both bounds for the plain conversion in `dtype`, in words. `products`: of the graph, with their bytes in FP32."""
    flops, bandwidth = peaks(dtype)
    whole, share = sum(times.values()), dtype.itemsize / torch.float32.itemsize
    took = sum(time for kind, time in times.items() if kind in PRODUCTS)
    least = 1000 * sum(max(2 * layer.macs / flops, share * layer.bytes / bandwidth) for layer in products)
    return (
        f"{plain}: {whole:.0f} ms, of which {took:.0f} are products. With all else free, a form would be"
        f" {whole / took:.2f} times as fast. At the peak of {flops / 1e9:.0f} GFLOP/s and {bandwidth / 1e9:.0f} GB/s"
        f" the products take {least:.0f} ms: they run at {least / took:.0%} of the roofline."
    )


def rows(times: Mapping[str, Mapping[str, float]]) -> Iterator[list[object]]:
    """A line for each of the types that take most, one for the others, and the sums."""
    kinds = sorted({kind for found in times.values() for kind in found}, key=lambda kind: -_most(times, kind))
    for kind in kinds[:_SHOWN]:
        yield [kind, *(f"{found.get(kind, 0.0):.1f}" for found in times.values())]
    rest = kinds[_SHOWN:]
    yield ["others", *(f"{sum(found.get(kind, 0.0) for kind in rest):.1f}" for found in times.values())]
    yield ["all", *(f"{sum(found.values()):.1f}" for found in times.values())]


def _most(times: Mapping[str, Mapping[str, float]], kind: str) -> float:
    return max(found.get(kind, 0.0) for found in times.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    parts = []
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            made = dict(bundles(name, Path(folder)))
            golden = Golden.load(made[Precision.FP32].file(GOLDEN))
            images = golden.input[np.arange(arguments.batch) % len(golden.input)]
            requests = {
                form: request_of(path, images.shape, "f32" if form in _IN_FP32 else "bf16")
                for form, path in files(made, name, Path(folder))
            }
            times = milliseconds(requests, images, arguments.rounds)
            products = layers(made[Precision.FP32].file(GRAPH), arguments.batch)
            bounds = [
                judged(plain, dtype, times[plain], products)
                for plain, dtype in ((PLAIN, torch.bfloat16), (PLAIN_FP32, torch.float32))
            ]
            words = f"{name}, batch {arguments.batch}. {' '.join(bounds)}"
            parts.append(f"{words}\n\n{table((f'{name}, ms', *times), rows(times))}")
            print(parts[-1], flush=True)
    command = f"python -m benchmarks.cpu_bound {' '.join(arguments.models)} --batch {arguments.batch}"
    is_whole = {*MODELS} <= {*arguments.models}
    record("Bounds on a CPU", command, "\n\n".join(parts), ("torch", "openvino"), is_whole=is_whole)


if __name__ == "__main__":
    main()
