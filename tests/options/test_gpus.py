from __future__ import annotations

import pytest

from spach_deploy.common.errors import UsageError
from spach_deploy.options.gpus import CARDS, format_gpus, parse_gpus
from spach_deploy.options.specs import ComputeCapability


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sm86,sm89,rtx4090,l4", "sm86, sm89"),
        ("8.9", "sm89"),
        (" SM_120 , sm80", "sm80, sm120"),
        ("sm120a", "sm120"),
        ("RTX A6000", "sm86"),
        ("rtx-a6000", "sm86"),
        ("RTX 6000 Ada Generation", "sm89"),
        ("NVIDIA A100-SXM4-80GB", "sm80"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "sm89"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "sm120"),
        ("rtx4070ti, RTX3060Ti", "sm86, sm89"),
        ("Tesla T4", "sm75"),
        ("NVIDIA H100 80GB HBM3", "sm90"),
        ("Jetson AGX Orin", "sm87"),
    ],
)
def test_capabilities_and_card_names_as_people_write_them(text: str, expected: str) -> None:
    assert format_gpus(parse_gpus(text)) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sm33", "not a compute capability that TensorRT supports"),
        ("sm89,7.0", "not a compute capability that TensorRT supports"),
        ("rtx4091", "rtx4090"),
        ("rtx6000", "rtx6000ada"),  # three cards are called so; none is guessed
        ("rubbish!", "such as sm89"),
        ("", "names no GPU"),
        (" , ", "names no GPU"),
    ],
)
def test_what_is_no_gpu_is_refused_with_the_nearest_names(text: str, says: str) -> None:
    with pytest.raises(UsageError, match="--gpu") as caught:
        parse_gpus(text)
    assert says in str(caught.value)


def test_every_card_name_parses_to_its_own_capability() -> None:
    assert {name: parse_gpus(name) for name in CARDS} == {name: (gpu,) for name, gpu in CARDS.items()}


def test_common_cards() -> None:
    expected = {
        "rtx2080": (7, 5), "t4": (7, 5), "a100": (8, 0), "a10": (8, 6), "rtx3090": (8, 6), "rtxa6000": (8, 6),
        "l4": (8, 9), "l40s": (8, 9), "rtx4090": (8, 9), "h100": (9, 0), "rtx5090": (12, 0), "orin": (8, 7),
    }  # fmt: skip
    assert {name: CARDS[name] for name in expected} == {
        name: ComputeCapability(*pair) for name, pair in expected.items()
    }
