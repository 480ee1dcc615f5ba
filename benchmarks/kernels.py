"""How many kernels TensorRT for RTX schedules, and how many bytes they move, by graph form.

    python -m benchmarks.kernels [MODEL ...] [--family spach] [--precision fp16] [--gpu sm89] [--no-rewrite NAME ...]
    python -m benchmarks.kernels --family shiftvit --bundles build

`--bundles DIR`: the figures of ours alone, of the plans in DIR/MODEL-PRECISION, which spach-export built for that GPU.

Forms: *plain*, torch.onnx.export of the reference model; *simplified*, the same through onnxsim; *convolutions*, our
graph with depthwise convolutions (`--no-rewrite shift_depthwise`); *ours*, what spach-export builds from. All are typed
by the same rules, so only the form differs. The figures are the compiler's own schedule, read from the plan's text.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
import torch
from onnx import ModelProto

from benchmarks.results import record, table
from spach_deploy.blocks import rewrite
from spach_deploy.bundle.store import PLAN
from spach_deploy.common.errors import SpachError
from spach_deploy.engine.build import build_engine
from spach_deploy.engine.flavours import TensorRTForRTX
from spach_deploy.engine.plan_facts import PlanFacts, read_plan_facts
from spach_deploy.graph.editing import as_proto
from spach_deploy.graph.export import export_canonical, simplify
from spach_deploy.graph.passes import TENSORRT_PASSES, apply_passes
from spach_deploy.graph.passes.tokens_first import part_weights
from spach_deploy.models.demo import load_demo_weights
from spach_deploy.models.outputs import SelectableOutputs
from spach_deploy.models.published import ARCHITECTURES
from spach_deploy.models.registry import create_model
from spach_deploy.options.architecture import MIXERS
from spach_deploy.options.gpus import parse_gpus
from spach_deploy.options.specs import OPSET, EngineTarget, Precision
from tests.protos import type_graph

BATCH = 8


def plain_export(model: SelectableOutputs) -> ModelProto:
    """What a user gets from torch.onnx.export."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    batch = torch.export.Dim("batch", min=1, max=65535)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (torch.zeros(2, model.architecture.channels, *model.architecture.image_size),),
            dynamo=True,
            opset_version=OPSET,
            input_names=["input"],
            output_names=["logits"],
            dynamic_shapes=({0: batch},),
            verbose=False,
        )
    assert program is not None
    proto: ModelProto = program.model_proto
    return proto


def forms(name: str, left_out: Sequence[str] = ()) -> Iterator[tuple[str, ModelProto]]:
    """The model's FP32 graph in each form; ours without the rewrites and passes that are `left_out`."""
    model = create_model(name)
    load_demo_weights(model)
    plain = plain_export(model)
    yield "plain", plain
    yield "simplified", simplify(plain)
    for label, disabled in (("convolutions", [*left_out, "shift_depthwise"]), ("ours", left_out)):
        yield label, formed(model, disabled)


def formed(model: SelectableOutputs, left_out: Sequence[str] = ()) -> ModelProto:
    """Our FP32 graph for TensorRT, without the rewrites and passes that are `left_out`."""
    graph = export_canonical(rewrite(model, left_out).model, model.architecture.image_size[0])
    apply_passes(graph, TENSORRT_PASSES, left_out)
    part_weights(graph)
    return as_proto(graph)


def facts(graph: ModelProto, precision: Precision, target: EngineTarget) -> PlanFacts | None:
    """Build for `target` and read the schedule."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(type_graph(graph, precision).model, path)
        return read_plan_facts(build_engine(path, target, TensorRTForRTX(), precision=precision).plan)


def cell(found: PlanFacts | None) -> str:
    """Kernels, and MB moved where that is known."""
    if found is None:
        return "not known"
    moved = found.bytes_moved(BATCH)
    return f"{len(found.kernels)}" + ("" if moved is None else f" / {moved / 1e6:,.0f}")


def row_of_bundle(name: str, path: Path) -> list[str]:
    """One line of the table of plans that are built already."""
    found = read_plan_facts((path / PLAN).read_bytes())
    return [name, cell(found), "" if found is None else str(found.fused_attentions)]


def row(name: str, precision: Precision, target: EngineTarget, left_out: Sequence[str] = ()) -> list[str]:
    """One line of the table."""
    cells = [name]
    attentions = ""
    for label, graph in forms(name, left_out):
        try:
            found = facts(graph, precision, target)
        except SpachError as error:
            print(f"{name} {label}: {error}")
            cells.append("does not build")
            continue
        cells.append(cell(found))
        attentions = attentions if found is None else str(found.fused_attentions)
    print(" | ".join([*cells, attentions]), flush=True)
    return [*cells, attentions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--family", choices=MIXERS, default="spach", help="whose models, where none are named")
    parser.add_argument("--bundles", type=Path, metavar="DIR")
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], default="fp16")
    parser.add_argument("--gpu", default="sm89")
    parser.add_argument("--no-rewrite", action="append", default=[], metavar="NAME", help="as of spach-export")
    arguments = parser.parse_args()
    precision = Precision(arguments.precision)
    target = EngineTarget(gpus=parse_gpus(arguments.gpu))
    family = [name for name, architecture in ARCHITECTURES.items() if architecture.family == arguments.family]
    models = arguments.models or family
    title = f"Kernels and bytes moved, {precision.value}, {arguments.gpu}"
    command = f"python -m benchmarks.kernels --precision {precision.value} --gpu {arguments.gpu}"
    if arguments.family != "spach":
        title, command = f"{title}, {arguments.family}", f"{command} --family {arguments.family}"
    if arguments.bundles is None:
        headings: tuple[str, ...] = ("model", "plain", "simplified", "ours, convolutions", "ours", "attentions fused")
        rows = [row(name, precision, target, arguments.no_rewrite) for name in models]
    else:
        headings, command = ("model", "ours", "attentions fused"), f"{command} --bundles {arguments.bundles}"
        rows = [row_of_bundle(name, arguments.bundles / f"{name}-{precision.value}") for name in models]
    body = f"Kernels / MB moved at batch {BATCH}.\n\n{table(headings, rows)}"
    record(title, command, body, is_whole=set(models) == set(family) and not arguments.no_rewrite)


if __name__ == "__main__":
    main()
