from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spach_deploy.options.specs import Flavour
from spach_deploy.runtime.plan_identity import identify_plan_file, plan_identity


def rtx_plan(size: int = 500) -> bytes:
    head = b"vtrt" + bytes(4) + (2).to_bytes(8, "little") + size.to_bytes(8, "little") + bytes([1, 7, 1, 116])
    return head + bytes(size - len(head))


def test_flavour_and_version_of_both_flavours() -> None:
    identity = plan_identity(rtx_plan())
    assert (identity.flavour, identity.version, identity.is_plan) == (Flavour.TENSORRT_RTX, "1.7.1", True)
    ordinary = plan_identity(b"ftrt" + bytes(20) + bytes([10, 16, 1, 11]) + bytes(100))
    assert (ordinary.flavour, ordinary.version, ordinary.is_plan) == (Flavour.TENSORRT, "10.16.1", True)


@pytest.mark.parametrize("size", [5, 63, 64, 100, 499])
def test_a_truncated_plan_is_named_as_such(size: int) -> None:
    identity = plan_identity(rtx_plan()[:size])
    assert not identity.is_plan
    assert identity.flavour is Flavour.TENSORRT_RTX
    assert str(size) in (identity.problem or "")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it is empty"),
        (b"hello\n", "a text file"),
        ("Überraschung\n".encode() * 100, "a text file"),
        (bytes(range(256)), "does not begin as TensorRT plans do"),
        (bytes(600), "does not begin as TensorRT plans do"),
        (b"PK\x03\x04 and more", "zip archive"),
    ],
)
def test_what_is_no_plan_is_said_to_be_what_it_is(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "engine.plan"
    path.write_bytes(content)
    for identity in (plan_identity(content), identify_plan_file(path)):
        assert not identity.is_plan
        assert says in (identity.problem or "")


def test_random_bytes_never_raise() -> None:
    rng = np.random.default_rng(0)
    for size in range(0, 200, 7):
        assert not plan_identity(rng.bytes(size)).is_plan
