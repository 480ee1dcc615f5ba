"""The library with the real TensorRT for RTX, which a machine without a GPU links and asks, and which refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from spach_deploy.bundle.store import GRAPH
from spach_deploy.engine.build import build_engine
from spach_deploy.engine.flavours import TensorRTForRTX
from spach_deploy.options.specs import EngineTarget, Precision
from spach_deploy.packaging.cpp.folder import write_folder
from tests.packaging.cpp import builds, models, plans
from tests.packaging.cpp.builds import Build, Variant, real_tensorrt_rtx

pytestmark = pytest.mark.cpp


@pytest.fixture(scope="session")
def real(package: Path) -> Build:
    """Linked with the real library; CUDA's runtime is the double's, which claims to have a GPU."""
    real_tensorrt_rtx()
    return builds.build(Variant.REAL_RTX, package)


def test_without_a_gpu_it_ends_with_the_reason(real: Build, model: Path) -> None:
    result = real.run("spach_self_test", model, SPACH_DOUBLE_DEVICES="0")
    assert result.returncode == 3
    assert result.stderr.startswith("Error: no GPU. No NVIDIA GPU with a working driver was found")


def installed_version() -> tuple[int, ...]:
    import importlib.metadata

    return tuple(int(part) for part in importlib.metadata.version("tensorrt-rtx").split(".")[:3])


def of_version(model: Path, version: tuple[int, ...]) -> None:
    text = (model / "model.txt").read_text()
    (model / "model.txt").write_text(text.replace("version 1.7.1.6", "version " + ".".join(map(str, version))))


def test_its_refusal_of_a_plan_is_passed_on(real: Build, tmp_path: Path) -> None:
    """The real library's own words, through our logger; and the process ends well."""
    model = models.model(tmp_path)
    of_version(model, installed_version())
    result = real.run("spach_self_test", model)
    assert result.returncode == 3, result.stderr
    assert result.stderr.startswith("Error: TensorRT error. IRuntime::deserializeCudaEngine: Error Code 1")
    other_gpu = real.run("spach_self_test", model, SPACH_DOUBLE_GPU="75")
    assert other_gpu.stderr.startswith("Error: wrong GPU. The plan is for sm86, sm89, and this GPU is sm75. IRuntime::")


def test_a_real_plan_passes_every_check_and_only_the_driver_is_missing(real: Build, tmp_path: Path) -> None:
    """Built here by the real compiler: magic, size and version are what the checks take them to be."""
    bundle = models.bundle(tmp_path / "bundle")
    target = EngineTarget(batch=models.EVERY.batch)
    result = build_engine(bundle / GRAPH, target, TensorRTForRTX(), precision=Precision.FP32)
    plans.set_plan(bundle, result.plan, "tensorrt-rtx", result.flavour_version, [str(gpu) for gpu in result.gpus])
    write_folder(bundle, tmp_path / "package")
    model = tmp_path / "package" / "model"
    refused = real.run("spach_self_test", model)
    assert refused.returncode == 3, refused.stderr
    assert refused.stderr.startswith("Error: TensorRT error. ")
    assert "CUDA driver version is insufficient" in refused.stderr
    assert "Serialization" not in refused.stderr
    cut = (model / "engine.plan").read_bytes()[:-1]
    (model / "engine.plan").write_bytes(cut)
    models.refresh(model, bundle)
    declared = real.run("spach_self_test", model)
    assert declared.stderr.startswith(f"Error: truncated. engine.plan has {len(cut)} bytes, and its header declares")


def test_its_version_is_compared_with_the_plans(real: Build, tmp_path: Path) -> None:
    model = models.model(tmp_path)
    of_version(model, (1, 0, 99))
    result = real.run("spach_self_test", model)
    assert result.returncode == 3
    shown = ".".join(str(number) for number in installed_version())
    assert result.stderr == (
        "Error: other TensorRT version. engine.plan was built by tensorrt-rtx 1.0.99, and this program runs with "
        f"{shown}. A plan needs the version that built it.\n"
    )
