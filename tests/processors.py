"""What /proc/cpuinfo says on other processors, cut to the lines and features that matter here and a few that do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from spach_deploy.common import machine as processor

_AVX2 = "fpu vme sse sse2 ht syscall nx avx f16c fma bmi1 avx2 bmi2"
_AVX512 = f"{_AVX2} avx512f avx512dq avx512bw avx512vl avx512_vnni avx512_bf16"

CPUINFO = {
    "AVX2": f"processor\t: 0\nmodel name\t: AMD Ryzen 7 3700X 8-Core Processor\nflags\t\t: {_AVX2}\n",
    "AVX-512": f"processor\t: 0\nmodel name\t: AMD EPYC 9654 96-Core Processor\nflags\t\t: {_AVX512}\n",
    "AMX": "processor\t: 0\nmodel name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz\n"
    f"flags\t\t: {_AVX512} avx_vnni avx512_fp16 amx_bf16 amx_tile amx_int8\n",
    "ARM": "processor\t: 0\nBogoMIPS\t: 2000.00\nFeatures\t: fp asimd evtstrm aes fphp asimdhp sve asimddp i8mm bf16\n"
    "CPU implementer\t: 0x41\n",
    "unknown": "",
}


def pretend(name: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """This process reads that processor's description from now on, until `patch` is undone."""
    file = folder / "cpuinfo"
    file.write_text(CPUINFO[name], encoding="utf-8")
    patch.setattr(processor, "CPUINFO", file)
