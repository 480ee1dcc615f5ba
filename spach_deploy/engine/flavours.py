"""TensorRT and TensorRT for RTX behind one interface (`EngineFlavour`): check options, configure the builder.

`resolve` checks a user's options without building, on any machine: it returns the target as it will be built, or raises
an error that says what is not possible and what to do instead. `create_config` runs in the worker that builds.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

from spach_deploy.common.errors import SpachError, UnavailableError, UsageError
from spach_deploy.common.versions import old_package
from spach_deploy.options.gpus import format_gpus
from spach_deploy.options.specs import ComputeCapability, EngineTarget, Flavour, Precision
from spach_deploy.runtime.devices import RTX_CAPABILITIES, LocalGpu, is_installed, local_gpus, missing_package

Shape: TypeAlias = tuple[int, ...]
Profile: TypeAlias = Mapping[str, tuple[Shape, Shape, Shape]]
"""By input: smallest, optimal and largest shape."""

TURING = ComputeCapability(7, 5)
AMPERE = ComputeCapability(8, 0)
ADA = ComputeCapability(8, 9)
_OPT_LEVELS = range(6)
_SMALLEST_WORKSPACE = 1 << 20


class EngineFlavour(Protocol):
    """One of the two TensorRTs."""

    @property
    def flavour(self) -> Flavour:
        """Its name."""

    def why_not_here(self) -> SpachError | None:
        """Why it cannot build on this machine, as an error to raise; None when it can."""

    def resolve(self, target: EngineTarget, precision: Precision) -> EngineTarget:
        """`target` with its GPUs filled in. UsageError or UnavailableError for options that it cannot follow.

        `precision` is the graph's.
        """

    def create_config(self, trt: Any, target: EngineTarget, profile: Profile, monitor: Any) -> Any:
        """Polygraphy's loader of the builder configuration for a resolved target; called in the worker that builds.

        `trt` is the flavour's module, `monitor` the IProgressMonitor.
        """

    def timing_cache(self, target: EngineTarget) -> str | None:
        """File in which Polygraphy keeps tactic timings; None without one."""


def _package_lacking(flavour: Flavour) -> SpachError | None:
    """The error for a flavour whose package is absent or too old; None where it is neither."""
    if not is_installed(flavour):
        return missing_package(flavour, f"Building with --engine {flavour.value}")
    return old_package(flavour.value)


@dataclasses.dataclass(frozen=True)
class TensorRT:
    """Ordinary TensorRT, 10.x and 11.x: builds on, and for, the GPU of this machine."""

    gpus: tuple[LocalGpu, ...] | None = None
    flavour = Flavour.TENSORRT

    def why_not_here(self) -> SpachError | None:
        """An error without its package or without a GPU."""
        if lacking := _package_lacking(self.flavour):
            return lacking
        if not self._present():
            return UnavailableError(
                "--engine tensorrt builds on an NVIDIA GPU, and none with a working driver was found here.",
                "Build with --engine tensorrt-rtx, which needs no GPU, or build on a machine that has one.",
            )
        return None

    def resolve(self, target: EngineTarget, precision: Precision) -> EngineTarget:
        """`target` for the GPU of this machine, the only one that it can build for."""
        _check_common(target)
        _check_timing_cache(target)
        present = self._present()
        here = (present[0].capability,) if present else ()
        if target.gpus and here and target.gpus != here:
            raise UsageError(
                f"--engine tensorrt builds for the GPU of this machine, {present[0]}, not for "
                f"{format_gpus(target.gpus)}.",
                "Leave --gpu out, build on a machine with that GPU, or take --engine tensorrt-rtx.",
            )
        gpus = here or target.gpus
        _check_turing(gpus, precision, (Precision.BF16,))
        _check_fp8(gpus, precision)
        return dataclasses.replace(target, flavour=self.flavour, gpus=gpus)

    def create_config(self, trt: Any, target: EngineTarget, profile: Profile, monitor: Any) -> Any:
        """Sets options by name, because the values of TensorRT's enumerations differ between 10.x and 11.x."""
        from polygraphy.backend.trt import CreateConfig

        level = trt.HardwareCompatibilityLevel.AMPERE_PLUS if target.hardware_compatible else None
        return CreateConfig(
            tf32=target.tf32,
            hardware_compatibility_level=level,
            version_compatible=target.version_compatible,
            load_timing_cache=self.timing_cache(target),
            **_common_options(trt, target, profile, monitor),
        )

    def timing_cache(self, target: EngineTarget) -> str | None:
        """The file given with --timing-cache."""
        return str(target.timing_cache) if target.timing_cache else None

    def _present(self) -> tuple[LocalGpu, ...]:
        return local_gpus() if self.gpus is None else self.gpus


@dataclasses.dataclass(frozen=True)
class TensorRTForRTX:
    """TensorRT for RTX: builds without a GPU, wherever it has a wheel, one plan for one or several GPUs."""

    flavour = Flavour.TENSORRT_RTX

    def why_not_here(self) -> SpachError | None:
        """An error without its package; no GPU is needed."""
        return _package_lacking(self.flavour)

    def resolve(self, target: EngineTarget, precision: Precision) -> EngineTarget:
        """`target` for the GPUs named, by default all from Ampere on (FP8: Ada on) in one plan, which costs nothing."""
        _check_common(target)
        _refuse_what_rtx_lacks(target)
        least = ADA if precision is Precision.FP8 else AMPERE
        newer = tuple(gpu for gpu in RTX_CAPABILITIES if gpu >= least)
        gpus = target.gpus or newer
        _check_rtx_gpus(gpus)
        _check_turing(gpus, precision, (Precision.BF16, Precision.FP32))
        _check_fp8(gpus, precision)
        return dataclasses.replace(target, flavour=self.flavour, gpus=gpus)

    def create_config(self, trt: Any, target: EngineTarget, profile: Profile, monitor: Any) -> Any:
        """Clears TF32 after the other options where it is not wanted: it is on by default, and has no keyword."""
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
        from polygraphy.backend.trt import PostprocessConfig

        config = CreateConfigRTX(
            compute_capabilities=[(gpu.major, gpu.minor) for gpu in target.gpus],
            version_compatible=target.version_compatible,
            exclude_lean_runtime=target.version_compatible,  # the package has no lean runtime to include
            **_common_options(trt, target, profile, monitor),
        )

        def clear_tf32(builder: Any, network: Any, config: Any) -> None:
            config.clear_flag(trt.BuilderFlag.TF32)

        return config if target.tf32 else PostprocessConfig(config, clear_tf32)

    def timing_cache(self, target: EngineTarget) -> str | None:
        """None: it times no tactics while building."""
        return None


FLAVOURS: dict[Flavour, EngineFlavour] = {Flavour.TENSORRT: TensorRT(), Flavour.TENSORRT_RTX: TensorRTForRTX()}
"""The flavours, in the order in which `auto` tries them."""


def choose_flavour(requested: Flavour, flavours: Mapping[Flavour, EngineFlavour] = FLAVOURS) -> EngineFlavour | None:
    """The flavour to build with; None for `none`.

    `auto` takes the first of `flavours` that can build on this machine. Raises UnavailableError (MissingPackageError
    for an absent package) when the requested one cannot, or with `auto` none can.
    """
    if requested is Flavour.NONE:
        return None
    if requested is not Flavour.AUTO:
        chosen = flavours[requested]
        if obstacle := chosen.why_not_here():
            raise obstacle
        return chosen
    obstacles = []
    for candidate in flavours.values():
        if (obstacle := candidate.why_not_here()) is None:
            return candidate
        obstacles.append(obstacle.message)
    raise UnavailableError(
        f"No engine can be built here. {' '.join(obstacles)}",
        "Install tensorrt-rtx, which builds without a GPU: pip install 'spach-deploy[cpu]'; or take --engine none.",
    )


def _common_options(trt: Any, target: EngineTarget, profile: Profile, monitor: Any) -> dict[str, Any]:
    from polygraphy.backend.trt import Profile as PolygraphyProfile

    shapes = PolygraphyProfile()
    for name, (smallest, usual, largest) in profile.items():
        shapes.add(name, smallest, usual, largest)
    limits = None
    if target.workspace_bytes is not None:
        limits = {trt.MemoryPoolType.WORKSPACE: target.workspace_bytes}
    return {
        "profiles": [shapes],
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,  # keeps layer names in the plan
        "builder_optimization_level": target.opt_level,
        "memory_pool_limits": limits,
        "progress_monitor": monitor,
    }


def _check_common(target: EngineTarget) -> None:
    if target.opt_level is not None and target.opt_level not in _OPT_LEVELS:
        raise UsageError(f"--opt-level {target.opt_level} does not exist.", "Levels are 0 to 5.")
    if target.workspace_bytes is not None and target.workspace_bytes < _SMALLEST_WORKSPACE:
        raise UsageError(
            f"--workspace of {target.workspace_bytes} bytes is too small for any kernel.",
            "Leave it out, or give 256M or more.",
        )


def _check_timing_cache(target: EngineTarget) -> None:
    cache = target.timing_cache
    if cache is None:
        return
    place = cache if cache.exists() else cache.parent
    if cache.is_dir() or not os.access(place, os.W_OK):
        raise UsageError(f"--timing-cache {cache} cannot be written.", "Give a file in a directory that can.")


def _refuse_what_rtx_lacks(target: EngineTarget) -> None:
    if target.timing_cache is not None:
        raise UsageError(
            "--timing-cache does nothing with --engine tensorrt-rtx, which times no kernels while building.",
            "Leave it out, or take --engine tensorrt.",
        )
    if target.hardware_compatible:
        raise UsageError(
            "--hardware-compatible is not for --engine tensorrt-rtx, whose plan serves every GPU that --gpu names.",
            "Leave it out and name the GPUs, or take --engine tensorrt.",
        )


def _check_rtx_gpus(gpus: tuple[ComputeCapability, ...]) -> None:
    refused = tuple(gpu for gpu in gpus if gpu not in RTX_CAPABILITIES)
    if refused:
        raise UnavailableError(
            f"TensorRT for RTX does not compile for {format_gpus(refused)}: it covers {format_gpus(RTX_CAPABILITIES)}, "
            "and neither data-centre Hopper and Blackwell nor Jetson.",
            "Take --engine tensorrt on a machine with that GPU.",
        )
    if TURING in gpus and len(gpus) > 1:
        raise UsageError(
            f"--gpu {','.join(map(str, gpus))}: a plan has one schedule, that of its least GPU, so with sm75 in it "
            "every newer GPU runs Turing's (186 kernels instead of 163 for ms_hybrid_s in FP16).",
            "Export twice: once with --gpu sm75, once with the others.",
        )


def _check_turing(gpus: tuple[ComputeCapability, ...], precision: Precision, lacking: tuple[Precision, ...]) -> None:
    if TURING in gpus and precision in lacking:
        raise UsageError(
            f"--{precision.value} cannot be built for sm75: there are no {precision.value.upper()} matrix products for "
            "Turing in this flavour of TensorRT.",
            "Take --fp16, or GPUs from sm80 on.",
        )


def _check_fp8(gpus: tuple[ComputeCapability, ...], precision: Precision) -> None:
    lacking = [str(gpu) for gpu in gpus if gpu < ADA]
    if precision is Precision.FP8 and lacking:
        raise UsageError(
            f"--fp8 cannot be built for {', '.join(lacking)}: FP8 matrix products begin with Ada, sm89.",
            "Take --int8, or GPUs from sm89 on.",
        )
