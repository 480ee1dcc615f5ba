"""Findings about a plan's file: its form and size, where it comes from, and what TensorRT says of its header."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from spach_deploy.doctor.compatibility import PlanRequirements
from spach_deploy.doctor.finding import Finding, Status, Task
from spach_deploy.doctor.machine_info import MachineInfo
from spach_deploy.doctor.plan_file import PlanFile
from spach_deploy.doctor.probe import ProbeResult
from spach_deploy.options.command_line import quoted
from spach_deploy.options.specs import Flavour

AskTensorRT = Callable[[Flavour, bytes], ProbeResult]
"""What the installed TensorRT says of a plan's first bytes: see `here.ask_tensorrt`."""

_RUN, _VERIFY = (Task.RUN,), (Task.VERIFY,)
_CUDA_ERROR = "CUDA_ERROR"


def about_form(path: Path, plan: PlanFile) -> Iterator[Finding]:
    """Is it a plan and nothing else, and all of it."""
    name, size = quoted(path), f"{plan.total_bytes - plan.offset:,} bytes"
    if plan.offset:
        what = f"{plan.before} stand before the plan"
        means = "TensorRT takes the plan only, from its first byte."
        strip = f"tail -c +{plan.offset + 1} {name} > plain.plan"
        yield Finding(Status.PROBLEM, "form", what, means, strip, _RUN, bad_target=True)
    if plan.missing_bytes:
        means = "It is cut off, as by a copy that did not end. Copy or build it again."
        what = f"{size}, and its header declares {plan.missing_bytes:,} more"
        yield Finding(Status.PROBLEM, "size", what, means, None, _RUN, bad_target=True)
    elif plan.surplus_bytes:
        declared = plan.total_bytes - plan.offset - plan.surplus_bytes
        means = "Something was appended. What TensorRT makes of that is not known."
        cut = f"tail -c +{plan.offset + 1} {name} | head -c {declared} > plain.plan"
        what = f"{size}, {plan.surplus_bytes:,} more than its header declares"
        yield Finding(Status.PROBLEM, "size", what, means, cut, _RUN, bad_target=True)
    elif plan.perhaps_cut:
        means = "Perhaps it is cut off: the number at byte 16, the size in published dumps of such headers, is larger."
        yield Finding(Status.UNKNOWN, "size", size, means)
    else:
        is_told = plan.flavour is Flavour.TENSORRT_RTX
        yield Finding(
            Status.OK, "size", size, "As declared in its header." if is_told else "Its header tells no other."
        )


def about_origin() -> Finding:
    """A plan alone."""
    means = "So nothing tells what it computes, its input profile or whether it was changed; there is no golden data."
    export = "spach-export --checkpoint FILE --fp16"
    return Finding(Status.MISSING, "manifest", "none beside it", means, export, _VERIFY)


def about_header(file: PlanFile, plan: PlanRequirements, here: MachineInfo, ask: AskTensorRT) -> Iterator[Finding]:
    """What TensorRT itself says of the header, where there is a GPU to say it of; it loads nothing."""
    package = here.tensorrt.get(file.flavour)
    if file.flavour is not Flavour.TENSORRT_RTX or package is None or package.error or not here.driver.gpus:
        return
    said = ask(file.flavour, file.head).content or {}
    validity, flaws = said.get("validity"), [flaw for flaw in said.get("flaws", ()) if flaw != _CUDA_ERROR]
    topic, asked = "header", "asked of tensorrt-rtx itself"
    if validity == "VALID":
        yield Finding(Status.OK, topic, f"valid, {asked}", "It is likely to load.")
    elif validity == "SUBOPTIMAL":
        means = "It is likely to load, but a plan built for this GPU would be faster."
        yield Finding(Status.OK, topic, f"valid but not the best, {asked}", means)
    elif validity == "INVALID" and flaws:
        means = f"It will not load: {', '.join(flaws).lower().replace('_', ' ')}."
        again = plan.rebuilt("--engine", file.flavour.value, "--gpu", str(here.driver.gpus[0].capability))
        yield Finding(Status.PROBLEM, topic, f"invalid, {asked}", means, again, _RUN)
    elif validity == "INVALID":  # seen where CUDA does not work, with no flaw named
        means = "It will not load, and no flaw is named: tensorrt-rtx could not use the GPU."
        yield Finding(Status.PROBLEM, topic, f"not to be judged, {asked}", means, "nvidia-smi", _RUN)
