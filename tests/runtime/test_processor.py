from __future__ import annotations

from pathlib import Path

import pytest

from spach_deploy.runtime import processor


def test_flags_that_matter_are_read(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Made Up\nflags\t\t: fpu avx2 amx_bf16 sse\n")
    assert processor.cpu_flags(cpuinfo) == {"avx2", "amx_bf16"}
    assert processor.cpu_flags(tmp_path / "nothing") == set()
    assert processor.processor_name(cpuinfo) == "Made Up"
    assert processor.processor_name(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("flags", "bf16", "vnni"),
    [
        ({"avx2"}, False, False),
        ({"avx2", "avx512_vnni"}, False, True),
        ({"avx_vnni"}, False, True),
        ({"avx512_vnni", "avx512_bf16"}, True, True),
        ({"amx_bf16", "amx_int8"}, True, True),
        ({"asimd", "bf16"}, True, False),
    ],
)
def test_what_it_multiplies(flags: set[str], bf16: bool, vnni: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "cpu_flags", lambda: flags)
    assert (processor.has_bf16(), processor.has_vnni()) == (bf16, vnni)
