"""Children that hang, crash and babble; and the questions that are asked in them."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spach_deploy.common.versions import installed
from spach_deploy.doctor import machine_info as here_module
from spach_deploy.doctor.driver import Probe, ProbeResult
from spach_deploy.doctor.driver_question import ask, kernel_module_version
from spach_deploy.doctor.machine_info import gather
from spach_deploy.doctor.tensorrt_question import answer, judge
from spach_deploy.options.specs import Flavour

FAKES = Path(__file__).parents[1] / "engine" / "fakes" / "site-packages"
LONG_S = 60.0


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Asks a question whose body is the given lines."""

    def ask_it(body: str, limit_s: float = LONG_S, *arguments: str) -> ProbeResult:
        lines = "\n    ".join(["import os, signal, sys, time", *body.splitlines()])
        (tmp_path / "some_question.py").write_text(f"def answer(*arguments):\n    {lines}\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        with Probe("some_question", *arguments) as question:
            return question.answer(limit_s)

    return ask_it


def test_an_answer(asked: Any) -> None:
    assert asked("return {'said': arguments[0]}", LONG_S, "word") == ProbeResult({"said": "word"})


def test_noise_before_the_answer(asked: Any) -> None:
    """Libraries print: to stdout, to stderr, and without a newline."""
    body = "print('loading'); print('trouble', file=sys.stderr); os.write(1, b'no newline'); return {'a': 1}"
    assert asked(body) == ProbeResult({"a": 1})


def test_one_that_hangs_is_left(asked: Any) -> None:
    """It ignores every signal that can be ignored, as one held by a driver would ignore all."""
    found = asked("signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)", 0.5)
    assert (found.content, found.timed_out) == (None, True)
    assert found.failure == "nothing within 0.5 s"


def test_one_that_crashes(asked: Any) -> None:
    found = asked("os.kill(os.getpid(), signal.SIGSEGV)")
    assert found == ProbeResult(None, "it crashed (SIGSEGV)")


@pytest.mark.parametrize("body", ["os._exit(3)", "raise RuntimeError('no')", "return [1]", "return object()"])
def test_one_that_says_nothing_of_use(asked: Any, body: str) -> None:
    found = asked(body)
    assert found.content is None
    assert found.failure
    assert not found.timed_out


def test_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/no/such/python")
    with Probe("some_question") as question:
        assert question.answer(LONG_S).failure == "no process could be started"


def test_the_current_directory_is_not_imported_from(
    asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "work"
    other.mkdir()
    (other / "some_question.py").write_text("raise AssertionError")
    monkeypatch.chdir(other)
    assert asked("return {}") == ProbeResult({})


# The driver's question


class FakeDriver:
    """libcuda with GPUs of the given capabilities, or a result other than 0."""

    def __init__(self, *capabilities: tuple[int, int], init: int = 0) -> None:
        self.capabilities = capabilities
        self.init = init

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.init

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = 13010
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self.capabilities)
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:  # noqa: N802
        device._obj.value = ordinal
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:  # noqa: N802
        name.value = f"GPU {device.value}".encode()
        return 0

    def cuDeviceGetAttribute(self, value: Any, which: int, device: Any) -> int:  # noqa: N802
        value._obj.value = self.capabilities[device.value][which - 75]
        return 0

    def cuDeviceTotalMem_v2(self, total: Any, device: Any) -> int:  # noqa: N802
        total._obj.value = 24 * 10**9
        return 0


class FakeNvml:
    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlSystemGetDriverVersion(self, text: Any, size: int) -> int:  # noqa: N802
        text.value = b"580.65.06"
        return 0


def libraries(**found: Any) -> Any:
    def open_library(name: str) -> Any:
        if (library := found.get(name.partition(".")[0].replace("-", "_"))) is None:
            raise OSError(f"{name}: cannot open shared object file")
        return library

    return open_library


def test_gpus_are_asked_of_the_driver() -> None:
    said = ask(libraries(libcuda=FakeDriver((8, 9), (9, 0)), libnvidia_ml=FakeNvml()))
    assert (said["init"], said["driver"], said["cuda"]) == (0, "580.65.06", 13010)
    assert said["gpus"] == [
        {"name": "GPU 0", "capability": [8, 9], "bytes": 24 * 10**9},
        {"name": "GPU 1", "capability": [9, 0], "bytes": 24 * 10**9},
    ]


def test_a_driver_that_does_not_start() -> None:
    said = ask(libraries(libcuda=FakeDriver((8, 9), init=803)))
    assert (said["init"], said["gpus"], said["cuda"]) == (803, [], 13010)


def test_no_driver() -> None:
    said = ask(libraries())
    assert (said["init"], said["gpus"]) == (None, [])


def test_version_of_the_kernel_module(tmp_path: Path) -> None:
    file = tmp_path / "version"
    assert kernel_module_version(file) is None
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC 12.3\n")
    assert kernel_module_version(file) == "580.65.06"


# TensorRT's question


def test_a_package_that_is_not_there_or_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no_such_tensorrt" in answer("no_such_tensorrt")["error"]


class FakeRuntime:
    engine_header_size = 64

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def get_engine_validity(self, header: bytes) -> tuple[Any, int]:
        assert len(header) == 64
        return SimpleNamespace(name="INVALID"), 3


def fake_trt(runtime: Any) -> Any:
    logger: Any = lambda severity: None  # noqa: E731
    logger.ERROR = 1
    kinds = {"VERSION_MISMATCH": 1, "UNSUPPORTED_CC": 2, "OLD_CUDA_DRIVER": 4}
    members = {name: SimpleNamespace(value=value) for name, value in kinds.items()}
    diagnostics = SimpleNamespace(__members__=members)
    return SimpleNamespace(Runtime=runtime, Logger=logger, EngineInvalidityDiagnostics=diagnostics)


def test_flaws_are_named() -> None:
    found = judge(fake_trt(FakeRuntime), bytes(100))
    assert found == {"validity": "INVALID", "flaws": ["VERSION_MISMATCH", "UNSUPPORTED_CC"]}


def test_too_little_of_a_header_and_a_tensorrt_that_cannot_judge() -> None:
    assert judge(fake_trt(FakeRuntime), bytes(10)) == {}
    assert judge(fake_trt(lambda logger: object()), bytes(100)) == {}


def test_the_installed_tensorrt_for_rtx_refuses_what_is_no_plan() -> None:
    if installed("tensorrt-rtx") is None:
        pytest.skip("tensorrt-rtx is not installed")
    said = here_module.ask_tensorrt(Flavour.TENSORRT_RTX, bytes(64), LONG_S).content
    assert said is not None
    assert (said["validity"], said["flaws"]) == ("INVALID", ["MALFORMED_ENGINE"])


# All of it


def use_fake(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """In this process, where it is looked for, and in the child, where it is imported."""
    for folder in (FAKES / package, FAKES / "common"):
        monkeypatch.syspath_prepend(str(folder))
    parts = (str(FAKES / package), str(FAKES / "common"), os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, parts)))


def test_a_tensorrt_that_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake(monkeypatch, "tensorrt_11_4")
    assert gather(LONG_S).tensorrt[Flavour.TENSORRT].version == "11.4.0.5"


def test_a_tensorrt_whose_libraries_were_never_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake(monkeypatch, "tensorrt_broken")
    assert gather(LONG_S).tensorrt[Flavour.TENSORRT].error.startswith("libnvinfer.so.10: cannot open")


def questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Put other questions in the place of both."""
    package = tmp_path / "other_questions"
    package.mkdir()
    for name in ("driver_question", "tensorrt_question"):
        (package / f"{name}.py").write_text(f"import os, time\ndef answer(*arguments):\n    {body}\n")
    monkeypatch.setattr(here_module, "_PACKAGE", "other_questions")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_a_driver_that_hangs_does_not_hang_the_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions(tmp_path, monkeypatch, "time.sleep(600)")
    found = gather(limit_s=0.5)
    assert found.driver.is_broken
    assert found.driver.problem == "the NVIDIA driver does not answer: nothing within 0.5 s"
    assert not any(package.error for package in found.tensorrt.values())  # slow is not broken


def test_a_library_that_crashes_does_not_crash_the_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions(tmp_path, monkeypatch, "os.abort()")
    found = gather(LONG_S)
    assert "SIGABRT" in found.driver.problem
    assert all("SIGABRT" in package.error for package in found.tensorrt.values())
