from __future__ import annotations

import platform
from pathlib import Path

import pytest

from spach_deploy.common import machine as processor
from spach_deploy.pipeline.cache import machine
from tests.processors import CPUINFO, pretend


@pytest.mark.parametrize(
    ("name", "flags", "bf16", "vnni"),
    [
        ("AVX2", {"avx2", "f16c", "fma"}, False, False),
        ("AVX-512", {"avx2", "f16c", "fma", "avx512f", "avx512_vnni", "avx512_bf16"}, True, True),
        ("ARM", {"asimd", "sve", "bf16", "i8mm"}, True, False),
        ("unknown", set(), False, False),
    ],
)
def test_flags_that_matter_say_what_it_multiplies(
    name: str, flags: set[str], bf16: bool, vnni: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(name, tmp_path, monkeypatch)
    assert processor.cpu_flags() == flags
    assert (processor.has_bf16(), processor.has_vnni()) == (bf16, vnni)


@pytest.mark.parametrize(
    ("flags", "bf16", "vnni"),
    [
        ({"avx2", "avx512_vnni"}, False, True),
        ({"avx_vnni"}, False, True),
        ({"amx_bf16", "amx_int8"}, True, True),
    ],
)
def test_any_one_of_them_is_enough(flags: set[str], bf16: bool, vnni: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "cpu_flags", lambda: flags)
    assert (processor.has_bf16(), processor.has_vnni()) == (bf16, vnni)


def test_a_name_that_the_system_does_not_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend("AMX", tmp_path, monkeypatch)
    assert processor.processor_name() == "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz"
    pretend("ARM", tmp_path, monkeypatch)
    assert processor.processor_name() == platform.machine()
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "nothing")
    assert processor.processor_name() == platform.machine()
    assert processor.cpu_flags() == set()


def test_an_export_kept_on_one_processor_is_not_taken_on_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    for name in CPUINFO:
        pretend(name, tmp_path, monkeypatch)
        seen.add(machine()["processor"])
    assert len(seen) == len(CPUINFO)
