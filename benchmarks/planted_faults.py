"""Does the derived tolerance reject a model one of whose weights is wrong?

    python -m benchmarks.planted_faults [MODEL ...] [--precision fp16]

Each tensor of two or more dimensions in turn gets Gaussian noise of 0.2 of its own standard deviation; the logits on
the built-in photographs are judged as an export would judge an engine's. Demo weights.
"""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np
import torch

from benchmarks.results import record, table
from spach_deploy.common.progress import ExportObserver, Phases
from spach_deploy.models.outputs import SelectableOutputs
from spach_deploy.options.specs import ExportOptions, ModelSpec, Precision
from spach_deploy.pipeline.steps.images import read_images
from spach_deploy.pipeline.steps.model import load
from spach_deploy.pipeline.steps.reference import checked_outputs
from spach_deploy.validation.compare import compare_outputs
from spach_deploy.validation.rounding_error import evaluate
from spach_deploy.validation.tolerance import derive_tolerances
from spach_deploy.validation.verdict import judge

SHARE = 0.2
MODELS = ("ms_hybrid_s", "ms_trans_xxs", "trans_xxs", "ms_mlp_xxs", "mlp_xxs", "ms_conv_xxs", "conv_xxs")


@dataclasses.dataclass(frozen=True)
class Fault:
    """One perturbed tensor: the worst image's relative L2, and whether the verdict rejected it."""

    tensor: str
    rel_l2: float
    rejected: bool


def faults(
    model: SelectableOutputs, images: np.ndarray, reference: np.ndarray, precision: Precision
) -> tuple[float, list[Fault]]:
    """The bound on relative L2, and what became of each fault."""
    bounds = derive_tolerances(model, images, {"logits": reference}, precision, model.outputs).graph.outputs
    generator = torch.Generator().manual_seed(0)
    found: list[Fault] = []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or name.endswith("gamma_1"):
            continue
        kept = parameter.detach().clone()
        parameter.data += SHARE * kept.std() * torch.randn(kept.shape, generator=generator)
        comparison = compare_outputs({"logits": reference}, {"logits": evaluate(model, images)})
        parameter.data = kept
        found.append(Fault(name, comparison.outputs[0].rel_l2_worst, not judge(comparison, bounds).passed))
    return bounds["logits"].rel_l2, found


def row(name: str, precision: Precision) -> list[str]:
    """One line of the table."""
    options = ExportOptions(model=ModelSpec(name=name), precision=precision)
    phases = Phases(ExportObserver())
    loaded = load(options, phases)
    photographs = read_images(options, loaded, phases)
    reference = checked_outputs(loaded.model, photographs.images)["logits"]
    bound, found = faults(loaded.model, photographs.images, reference, precision)
    weakest = min(found, key=lambda fault: fault.rel_l2)
    missed = ", ".join(fault.tensor for fault in found if not fault.rejected) or "none"
    cells = [
        name,
        f"{sum(fault.rejected for fault in found)} of {len(found)}",
        f"{bound:.1e}",
        f"{weakest.rel_l2:.1e}",
        weakest.tensor,
        missed,
    ]
    print(" | ".join(cells), flush=True)
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], default="fp16")
    arguments = parser.parse_args()
    precision = Precision(arguments.precision)
    rows = [row(name, precision) for name in arguments.models]
    headings = ("model", "rejected", "bound on rel. L2", "weakest fault", "in", "missed")
    command = f"python -m benchmarks.planted_faults {' '.join(arguments.models)} --precision {precision.value}"
    record(f"Planted faults, {precision.value}: 0.2 standard deviations in one tensor", command, table(headings, rows))


if __name__ == "__main__":
    main()
