"""A checkpoint with weights drawn from a seed, under the names that the installed spach_deploy gives them.

    python benchmarks/recordings/weights.py FILE.pth

A script of its own, because another version's environment runs it.
"""

from __future__ import annotations

import sys

import torch

import spach_deploy


def write(path: str) -> None:
    """Weights of ms_trans_xxs: around 1 what multiplies a normalized channel, around 0 all others."""
    generator = torch.Generator().manual_seed(7)
    state = {}
    for name, value in spach_deploy.create_model("ms_trans_xxs").state_dict().items():
        middle = float(value.ndim == 1 and name.endswith("weight"))
        state[name] = middle + 0.05 * torch.randn(value.shape, generator=generator)
    torch.save({"model": state}, path)


if __name__ == "__main__":
    write(sys.argv[1])
