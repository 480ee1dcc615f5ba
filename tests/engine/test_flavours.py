from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

from spach_deploy.common.errors import MissingPackageError, SpachError, UnavailableError, UsageError
from spach_deploy.engine.flavours import EngineFlavour, TensorRT, TensorRTForRTX, choose_flavour
from spach_deploy.options.gpus import format_gpus, parse_gpus
from spach_deploy.options.specs import ComputeCapability, EngineTarget, Flavour, Precision
from spach_deploy.runtime.devices import MODULE_NAMES, LocalGpu

A10 = LocalGpu("NVIDIA A10", ComputeCapability(8, 6))
T4 = LocalGpu("Tesla T4", ComputeCapability(7, 5))


@dataclasses.dataclass(frozen=True)
class FlavourThatCan(TensorRTForRTX):
    obstacle: SpachError | None = None

    def why_not_here(self) -> SpachError | None:
        return self.obstacle


def flavours(
    tensorrt: SpachError | None, rtx: SpachError | None
) -> tuple[dict[Flavour, EngineFlavour], EngineFlavour, EngineFlavour]:
    first, second = FlavourThatCan(tensorrt), FlavourThatCan(rtx)
    return {Flavour.TENSORRT: first, Flavour.TENSORRT_RTX: second}, first, second


def test_auto_takes_tensorrt_where_it_can_build() -> None:
    both, first, _ = flavours(None, None)
    assert choose_flavour(Flavour.AUTO, both) is first


def test_auto_takes_rtx_where_tensorrt_cannot_build() -> None:
    both, _, second = flavours(UnavailableError("no GPU"), None)
    assert choose_flavour(Flavour.AUTO, both) is second


def test_auto_says_why_each_cannot_build() -> None:
    both, *_ = flavours(UnavailableError("first reason."), UnavailableError("second reason."))
    with pytest.raises(UnavailableError, match=r"first reason.*second reason.*pip install.*--engine none") as caught:
        choose_flavour(Flavour.AUTO, both)
    assert caught.value.exit_code == 3


def test_none_builds_nothing() -> None:
    both, *_ = flavours(UnavailableError("x"), UnavailableError("x"))
    assert choose_flavour(Flavour.NONE, both) is None


def test_the_flavour_asked_for_is_not_replaced_by_the_other() -> None:
    both, *_ = flavours(UnavailableError("no GPU"), None)
    with pytest.raises(UnavailableError, match="no GPU"):
        choose_flavour(Flavour.TENSORRT, both)


def test_absent_tensorrt_names_the_install_command_and_explains_its_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])  # nothing can be found
    for module in MODULE_NAMES.values():
        monkeypatch.delitem(sys.modules, module, raising=False)
    obstacle = TensorRT(gpus=(A10,)).why_not_here()
    assert isinstance(obstacle, MissingPackageError)
    assert "pip install 'spach-deploy[gpu]'" in str(obstacle)
    assert "installer fetches them from NVIDIA's own" in str(obstacle)
    rtx = TensorRTForRTX().why_not_here()
    assert "pip install 'spach-deploy[cpu]'" in str(rtx)


FAKE_TENSORRT = Path(__file__).parent / "fakes/site-packages/tensorrt_11_4"


def test_tensorrt_without_a_gpu_says_what_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FAKE_TENSORRT))
    obstacle = TensorRT(gpus=()).why_not_here()
    assert isinstance(obstacle, UnavailableError)
    assert "--engine tensorrt-rtx" in str(obstacle)
    assert TensorRT(gpus=(A10,)).why_not_here() is None


def test_tensorrt_builds_for_the_gpu_present() -> None:
    here = TensorRT(gpus=(A10,))
    assert here.resolve(EngineTarget(), Precision.FP16).gpus == (A10.capability,)
    assert here.resolve(EngineTarget(gpus=parse_gpus("a10")), Precision.FP16).flavour is Flavour.TENSORRT
    with pytest.raises(UsageError, match=r"NVIDIA A10 \(sm86\), not for sm89"):
        here.resolve(EngineTarget(gpus=parse_gpus("l4")), Precision.FP16)


def test_rtx_builds_for_everything_from_ampere_on_by_default() -> None:
    target = TensorRTForRTX().resolve(EngineTarget(), Precision.FP16)
    assert format_gpus(target.gpus) == "sm80, sm86, sm89, sm120, sm121"
    assert target.flavour is Flavour.TENSORRT_RTX


@pytest.mark.parametrize("gpus", ["sm90", "h100", "sm100", "sm89,sm90", "orin"])
def test_rtx_refuses_what_it_does_not_compile_for(gpus: str) -> None:
    with pytest.raises(UnavailableError, match="neither data-centre Hopper and Blackwell") as caught:
        TensorRTForRTX().resolve(EngineTarget(gpus=parse_gpus(gpus)), Precision.FP16)
    assert "--engine tensorrt on a machine with that GPU" in str(caught.value)


def test_rtx_refuses_turing_beside_newer_gpus_and_names_the_price() -> None:
    with pytest.raises(UsageError, match=r"186 kernels instead of 163.*Export twice"):
        TensorRTForRTX().resolve(EngineTarget(gpus=parse_gpus("t4,l4")), Precision.FP16)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_rtx_refuses_precisions_that_turing_lacks(precision: Precision) -> None:
    target = EngineTarget(gpus=parse_gpus("t4"))
    assert TensorRTForRTX().resolve(target, Precision.FP16).gpus == (T4.capability,)
    with pytest.raises(UsageError, match=f"--{precision.value} cannot be built for sm75"):
        TensorRTForRTX().resolve(target, precision)


def test_tensorrt_builds_fp32_but_not_bf16_for_turing() -> None:
    assert TensorRT(gpus=(T4,)).resolve(EngineTarget(), Precision.FP32).gpus == (T4.capability,)
    with pytest.raises(UsageError, match="--bf16"):
        TensorRT(gpus=(T4,)).resolve(EngineTarget(), Precision.BF16)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"opt_level": 6}, "--opt-level 6"),
        ({"opt_level": -1}, "--opt-level -1"),
        ({"workspace_bytes": 1024}, "--workspace of 1024 bytes"),
        ({"timing_cache": Path("cache")}, "--timing-cache does nothing"),
        ({"hardware_compatible": True}, "--hardware-compatible is not for"),
    ],
)
def test_rtx_refuses_options_it_cannot_honour(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        TensorRTForRTX().resolve(EngineTarget(**options), Precision.FP16)


def test_tensorrt_refuses_a_timing_cache_that_cannot_be_written(tmp_path: Path) -> None:
    here = TensorRT(gpus=(A10,))
    assert here.resolve(EngineTarget(timing_cache=tmp_path / "new"), Precision.FP16).timing_cache
    for bad in (tmp_path, tmp_path / "absent" / "cache"):
        with pytest.raises(UsageError, match="--timing-cache"):
            here.resolve(EngineTarget(timing_cache=bad), Precision.FP16)
