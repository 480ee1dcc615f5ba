"""The folder that spach-package polygraphy writes, in one step: a killed run leaves the old folder or none.

FOLDER/
  manifest.json    marks the folder as written by spach-package, from which bundle
  README.md        the commands that use it
  model.onnx       the bundle's graph; engine.plan where it has one
  rounded.onnx     for a graph with bfloat16: the same graph in FP32 with every bfloat16 tensor rounded, for CPUs
  inputs.json outputs.json   for --load-inputs and --load-outputs
  data_loader.py golden.npz  for --data-loader-script
  compare.py bounds.json     for --compare-func-script
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spach_deploy._version import __version__
from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.inputs import feeds_of
from spach_deploy.bundle.outputs import expected_outputs
from spach_deploy.bundle.store import GOLDEN, GRAPH, MANIFEST, PLAN, Bundle, DirectoryKind, check_target, writing
from spach_deploy.common.errors import MissingPackageError
from spach_deploy.common.text import json_text
from spach_deploy.graph.external_data import check_is_one_file
from spach_deploy.graph.runtimes import GraphNeeds
from spach_deploy.runtime.onnxruntime_runner import save_model
from spach_deploy.validation.bundle_facts import BundleFacts, check_interface
from spach_deploy.validation.runs import plan_batches

if TYPE_CHECKING:
    import onnx_ir as ir

CONTENTS = DirectoryKind("polygraphy", "Polygraphy's data")
SCRIPTS = Path(__file__).with_name("scripts")
ROUNDED = "rounded.onnx"
INPUTS, OUTPUTS, LOADER, COMPARE, BOUNDS = "inputs.json", "outputs.json", "data_loader.py", "compare.py", "bounds.json"
RUNNER = "PyTorch in FP32"
"""Polygraphy's name of the reference outputs."""

_LARGEST_BATCH = 4
_FED = "input."
"""What the names of inputs begin with in golden.npz; no output's name has a full stop."""


@dataclasses.dataclass(frozen=True)
class PolygraphyPackage:
    """A written folder: its model, the sizes of its batches, and the commands to run in it."""

    path: Path
    model: str
    batches: tuple[int, ...]
    commands: tuple[str, ...]


def write_folder(bundle: Path, output: Path, *, overwrite: bool = False) -> PolygraphyPackage:
    """Write the golden data of `bundle`, its graph and its plan to `output`.

    Raises BundleError where `bundle` is not a bundle or was changed, or the target cannot be written.
    """
    destination = check_target(output, overwrite=overwrite, contents=CONTENTS)
    opened = Bundle.open(bundle)
    facts = BundleFacts.of(opened)
    check_is_one_file(opened.file(GRAPH))
    check_interface(opened)
    golden = Golden.load(opened.path / GOLDEN)
    batches = _batches(len(golden.names), facts)
    rounded = _rounded(opened.path / GRAPH)
    run = commands(GRAPH if rounded is None else ROUNDED, has_plan=opened.plan is not None)
    with writing(destination) as staging:
        shutil.copyfile(opened.path / GRAPH, staging / GRAPH)
        if rounded is not None:
            save_model(rounded, staging / ROUNDED)
        if opened.plan is not None:
            shutil.copyfile(opened.plan, staging / PLAN)
        for script in (LOADER, COMPARE):
            shutil.copyfile(SCRIPTS / script, staging / script)
        _write_data(staging, golden, facts, batches)
        (staging / BOUNDS).write_text(_bounds(facts), encoding="utf-8", newline="\n")
        (staging / "README.md").write_text(_readme(opened, facts, run), encoding="utf-8", newline="\n")
        (staging / MANIFEST).write_text(_manifest(opened), encoding="utf-8", newline="\n")
    sizes = tuple(len(batch) for batch in batches)
    return PolygraphyPackage(output, opened.manifest.model.name, sizes, run)


def _rounded(graph: Path) -> ir.Model | None:
    """A graph with bfloat16 as FP32 with rounding, for CPUs, where ONNX Runtime has no bfloat16; else None."""
    needs = GraphNeeds.of(graph)
    if needs is None or not needs.bfloat16:
        return None
    import onnx
    import onnx_ir as ir

    from spach_deploy.graph.precision.rounding import rounded_graph

    return rounded_graph(ir.from_proto(onnx.load(graph)))


def _batches(count: int, facts: BundleFacts) -> list[list[int]]:
    """Indices of images for each run, in sizes that the profile allows; images are repeated where there are too few."""
    batches: list[list[int]] = []
    start = 0
    for size in plan_batches(count, facts.batch, _LARGEST_BATCH):
        whole = max(size, facts.batch.min)
        batches.append([(start + offset) % count for offset in range(whole)])
        start += size
    return batches


def _write_data(folder: Path, golden: Golden, facts: BundleFacts, batches: list[list[int]]) -> None:
    try:
        from polygraphy.comparator import IterationResult, RunResults
        from polygraphy.json import save_json
        from polygraphy.logger import G_LOGGER
    except ImportError as error:
        raise MissingPackageError("polygraphy", "Its data", "pip install polygraphy") from error
    given = golden.batch(facts.inputs)
    inputs = [feeds_of(given[batch]) for batch in batches]
    expected = expected_outputs(golden.outputs, facts.outputs)
    results = [
        IterationResult({name: a[batch] for name, a in expected.items()}, runtime=0.0, runner_name=RUNNER)
        for batch in batches
    ]
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        save_json(inputs, str(folder / INPUTS))
        save_json(RunResults([(RUNNER, results)]), str(folder / OUTPUTS))
    longest = max(map(len, batches))
    padded = np.array([[*batch, *[-1] * (longest - len(batch))] for batch in batches], np.int64)
    arrays = {f"{_FED}{name}": array for name, array in feeds_of(given).items()}
    named = {**arrays, **golden.outputs, "names": np.array(golden.names), "batches": padded}
    np.savez(folder / GOLDEN, **named)  # type: ignore[arg-type]  # no array is called allow_pickle


def _bounds(facts: BundleFacts) -> str:
    bounds = {name: {"rel_l2": tolerance.rel_l2} for name, tolerance in facts.tolerances.graph.outputs.items()}
    return json_text(bounds) + "\n"


def _manifest(bundle: Bundle) -> str:
    content = {
        "kind": CONTENTS.kind,
        "spach_deploy": __version__,
        "bundle": bundle.path.name,
        "model": bundle.manifest.model.name,
        "graph_sha256": bundle.manifest.files[GRAPH].sha256,
    }
    return json_text(content) + "\n"


def commands(graph: str, *, has_plan: bool) -> tuple[str, ...]:
    """The commands to run in the folder: the file `graph` in ONNX Runtime, and the plan if there is one."""
    compared = f"--load-outputs {OUTPUTS} --compare-func-script {COMPARE}"
    in_onnxruntime = f"polygraphy run {graph} --onnxrt --data-loader-script {LOADER} {compared}"
    plan = f"polygraphy run {PLAN} --model-type engine --trt --load-inputs {INPUTS} {compared}"
    return (in_onnxruntime, plan) if has_plan else (in_onnxruntime,)


def _readme(bundle: Bundle, facts: BundleFacts, run: tuple[str, ...]) -> str:
    model = f"{bundle.manifest.model.name}, {facts.precision.value}"
    lines = "\n".join(f"    {command}" for command in run)
    rounded = (
        f"`{ROUNDED}` is `{GRAPH}` in FP32 with every bfloat16 tensor rounded, as spach-validate runs it: ONNX Runtime"
        " computes nothing in bfloat16 on a CPU.\n"
    )
    return (
        f"# {model}: golden data for Polygraphy\n\n"
        f"Run in this folder:\n\n{lines}\n\n"
        f"`{OUTPUTS}` holds what PyTorch in FP32 answered to the images of `{INPUTS}`; `{LOADER}` gives the same images"
        f" without JSON. `{COMPARE}` judges as spach-validate does, by the relative L2 of each image and the bounds in"
        f" `{BOUNDS}`; Polygraphy's own `--rtol` and `--atol` judge single numbers, for which no bound was derived.\n"
        "An engine of TensorRT for RTX needs `POLYGRAPHY_USE_TENSORRT_RTX=1` in front, and its GPU.\n"
        f"{rounded if ROUNDED in run[0] else ''}"
    )
