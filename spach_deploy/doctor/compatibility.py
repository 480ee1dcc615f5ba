"""Which engines this machine's TensorRT packages can build and run, and whether a given plan can run here.

Sources: NVIDIA TensorRT, "Engine Compatibility" (all four numbers of the version must match, unless the plan is version
compatible and the runtime is newer; without hardware compatibility a plan is bound to its GPU architecture); TensorRT
for RTX, "Engine Compatibility" (no plan runs with another release).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from spach_deploy.common.operating_system import setting_variable
from spach_deploy.common.versions import is_older, release
from spach_deploy.doctor.commands import installing
from spach_deploy.doctor.driver import LEAST_DRIVER, Gpu
from spach_deploy.doctor.finding import Finding, Status, Task
from spach_deploy.doctor.machine_info import MachineInfo
from spach_deploy.options.gpus import SUPPORTED, format_gpus
from spach_deploy.options.specs import ComputeCapability, Flavour
from spach_deploy.runtime.devices import RTX_CAPABILITIES

RUNS_ON = {Flavour.TENSORRT: SUPPORTED, Flavour.TENSORRT_RTX: RTX_CAPABILITIES}
"""Compute capabilities that each flavour compiles for and runs on."""

_AMPERE = ComputeCapability(8, 0)
_RUN = (Task.RUN,)


# What this machine's TensorRT packages can do


def works(info: MachineInfo, flavour: Flavour) -> bool:
    """Whether that TensorRT is installed, imports, and is new enough."""
    package = info.tensorrt.get(flavour)
    if package is None or package.error:
        return False
    return not package.version or info.requirements.get(flavour.value).is_met_by(package.version)


def builders(info: MachineInfo) -> tuple[Flavour, ...]:
    """Flavours that can build engines here: tensorrt-rtx wherever it imports, tensorrt only for this machine's GPU."""
    return tuple(
        flavour
        for flavour in RUNS_ON
        if works(info, flavour) and (flavour is Flavour.TENSORRT_RTX or flavour in runners(info))
    )


def runners(info: MachineInfo) -> tuple[Flavour, ...]:
    """Flavours whose engines run here, on the first GPU."""
    return tuple(
        flavour
        for flavour in RUNS_ON
        if works(info, flavour) and runs_on_gpu(info, flavour) and driver_runs(info, flavour)
    )


def runs_on_gpu(info: MachineInfo, flavour: Flavour) -> bool:
    """Whether that TensorRT supports the first GPU."""
    return bool(info.driver.gpus) and info.driver.gpus[0].capability in RUNS_ON[flavour]


def driver_runs(info: MachineInfo, flavour: Flavour) -> bool:
    """Whether the driver supports the package's CUDA version; True where either is unknown."""
    package = info.tensorrt.get(flavour)
    return package is None or package.cuda is None or info.driver.runs_cuda(package.cuda)


# Whether a plan can run


@dataclasses.dataclass(frozen=True)
class PlanRequirements:
    """What a plan was built with and for, from its manifest or its bytes; None where neither says.

    `newer_gpus`: it also runs on GPUs that are newer than `gpus`. `rebuild` returns the command that builds it again,
    with words added; None where its export is unknown.
    """

    flavour: Flavour
    version: str | None
    gpus: tuple[ComputeCapability, ...] | None
    newer_gpus: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False
    rebuild: Callable[..., str] | None = None

    def rebuilt(self, *words: str) -> str | None:
        """The command that builds it again."""
        return None if self.rebuild is None else self.rebuild(*words)


def compatibility(plan: PlanRequirements, info: MachineInfo) -> tuple[Finding, ...]:
    """Findings about package, GPU and driver, each with what would have to change."""
    return (_package(plan, info), _gpu(plan, info), *_driver(plan, info))


# The package


def _package(plan: PlanRequirements, info: MachineInfo) -> Finding:
    name, package = plan.flavour.value, info.tensorrt.get(plan.flavour)
    install = installing(_exactly(plan)) if _can_be_installed(plan) else plan.rebuilt("--engine", "auto")
    if package is None:
        others = " and ".join(flavour.value for flavour in info.tensorrt)
        means = f"{others} is here, and cannot load it: the two take no plans of one another." if others else ""
        return Finding(Status.MISSING, name, "not installed here", means, install, _RUN)
    if package.error:
        again = installing("--force-reinstall", _exactly(plan))
        means = f"It does not import: {package.error.rstrip('.')}."
        return Finding(Status.PROBLEM, name, package.version or "installed", means, again, _RUN)
    return _version(plan, package.version, install)


def _exactly(plan: PlanRequirements) -> str:
    """The exact requirement: `tensorrt-rtx==1.7.1.116`, or `==1.7.1.*` where the build number is unknown."""
    numbers = release(plan.version or "")
    if len(numbers) < 3:
        return plan.flavour.value
    wildcard = "" if len(numbers) > 3 else ".*"
    return f"{plan.flavour.value}=={'.'.join(str(number) for number in numbers)}{wildcard}"


def _can_be_installed(plan: PlanRequirements) -> bool:
    """False for TensorRT before 10, which has no wheels for the supported Pythons."""
    numbers = release(plan.version or "")
    return plan.flavour is Flavour.TENSORRT_RTX or not numbers or numbers[0] >= 10


def _version(plan: PlanRequirements, has: str, install: str | None) -> Finding:
    """Compare the plan's version with the installed one `has`, in as many numbers as both have."""
    built, installed = release(plan.version or ""), release(has)
    name, what = plan.flavour.value, f"{has} here, built with {plan.version or 'an unknown version'}"
    if not built or not installed:
        means = "Its bytes do not tell the version that built it; plans take that same version."
        return Finding(Status.UNKNOWN, name, what, means)
    length = min(len(built), len(installed))
    if built[:length] == installed[:length]:
        return Finding(Status.OK, name, what, "The same version, as plans take it.", install)
    if built[:3] == installed[:3]:
        means = "The same release in another build. Documented is that all numbers must match; TensorRT decides."
        return Finding(Status.UNKNOWN, name, what, means, install)
    if plan.version_compatible and is_older(plan.version or "", has):
        return Finding(Status.OK, name, what, "It was built for later versions too.", install)
    return Finding(Status.PROBLEM, name, what, _why_not(plan, built, installed), install, _RUN)


def _why_not(plan: PlanRequirements, built: tuple[int, ...], installed: tuple[int, ...]) -> str:
    if built[0] != installed[0]:
        return f"Another major version: a plan of {built[0]}.x is not loaded by {installed[0]}.x. Build it again here."
    if plan.version_compatible:
        return "It was built for later versions too, not for earlier ones."
    return "A plan takes the version that built it. Install that one, or build the plan again with this one."


# The GPU


def _gpu(plan: PlanRequirements, info: MachineInfo) -> Finding:
    built_for = _built_for(plan)
    if not info.driver.gpus:
        means = f"To run it takes {built_for}."
        status = Status.PROBLEM if info.driver.is_broken else Status.MISSING
        return Finding(status, "NVIDIA GPU", info.driver.problem, means, info.driver.remedy, _RUN)
    first = info.driver.gpus[0]
    fits = _runs_on(plan, first.capability)
    if fits is None:
        means = "Its bytes do not tell the GPU that it was built for; plans of tensorrt take that same architecture."
        return Finding(Status.UNKNOWN, "NVIDIA GPU", str(first), means)
    if fits:
        return Finding(Status.OK, "NVIDIA GPU", str(first), f"It was built for {built_for}.", _build_for(plan, first))
    return _wrong_gpu(plan, info, first, built_for)


def _built_for(plan: PlanRequirements) -> str:
    if plan.flavour is Flavour.TENSORRT and plan.hardware_compatible:
        return "any NVIDIA GPU from Ampere on"
    if plan.gpus is None:
        return "an NVIDIA GPU of the kind that it was built for, which its bytes do not tell"
    later = " or a later one" if plan.newer_gpus else ""
    return f"an NVIDIA GPU of {format_gpus(plan.gpus)}{later}"


def _runs_on(plan: PlanRequirements, gpu: ComputeCapability) -> bool | None:
    if plan.flavour is Flavour.TENSORRT_RTX and gpu not in RTX_CAPABILITIES and gpu < RTX_CAPABILITIES[-1]:
        return False
    if plan.flavour is Flavour.TENSORRT and plan.hardware_compatible:
        return gpu >= _AMPERE
    if plan.gpus is None:
        return None
    return gpu in plan.gpus or (plan.newer_gpus and gpu > RTX_CAPABILITIES[-1])


def _build_for(plan: PlanRequirements, gpu: Gpu) -> str | None:
    """The command that builds the plan for `gpu`: tensorrt-rtx takes a GPU by name, tensorrt builds for this
    machine's.
    """
    if gpu.capability in RUNS_ON[Flavour.TENSORRT_RTX] and plan.flavour is Flavour.TENSORRT_RTX:
        return plan.rebuilt("--engine", plan.flavour.value, "--gpu", str(gpu.capability))
    return plan.rebuilt("--engine", Flavour.TENSORRT.value)


def _wrong_gpu(plan: PlanRequirements, info: MachineInfo, first: Gpu, built_for: str) -> Finding:
    what = f"{first}, and it was built for {built_for.removeprefix('an NVIDIA GPU of ')}"
    fitting = [ordinal for ordinal, gpu in enumerate(info.driver.gpus) if _runs_on(plan, gpu.capability)]
    if fitting:
        means = f"Engines run on the first GPU. The one that fits is GPU {fitting[0]}, {info.driver.gpus[fitting[0]]}."
        choose = setting_variable("CUDA_VISIBLE_DEVICES", str(fitting[0]))
        return Finding(Status.PROBLEM, "NVIDIA GPU", what, means, choose, _RUN)
    if plan.flavour is Flavour.TENSORRT_RTX and first.capability not in RTX_CAPABILITIES:
        means = f"TensorRT for RTX runs on {format_gpus(RTX_CAPABILITIES)} only. Build it with tensorrt, here."
    else:
        means = "A plan runs on what it was built for. Build it again for this one."
    return Finding(Status.PROBLEM, "NVIDIA GPU", what, means, _build_for(plan, first), _RUN)


# The driver


def _driver(plan: PlanRequirements, info: MachineInfo) -> tuple[Finding, ...]:
    """A finding only where the driver is too old for the installed package's CUDA."""
    package, driver = info.tensorrt.get(plan.flavour), info.driver
    if not driver.gpus or package is None or package.cuda is None or driver.runs_cuda(package.cuda):
        return ()
    cuda = ".".join(str(number) for number in driver.cuda or ())
    what = f"{driver.version or 'version not known'}, runs CUDA {cuda} and older"
    least = LEAST_DRIVER[package.cuda]
    means = f"{plan.flavour.value} was made with CUDA {package.cuda}, which takes driver {least} or newer."
    return (Finding(Status.PROBLEM, "NVIDIA driver", what, means, driver.upgrade, _RUN),)
