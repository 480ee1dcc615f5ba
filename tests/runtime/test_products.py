"""Linear layers by oneDNN: the same numbers, and PyTorch's own product for everything else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from spach_deploy.runtime import products
from spach_deploy.runtime.products import products_by_onednn


@pytest.fixture(autouse=True)
def looked_at_anew() -> Iterator[None]:
    products._onednn.cache_clear()
    yield
    products._onednn.cache_clear()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Types of what oneDNN multiplies, on a processor that has AVX-512."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    found: list[torch.dtype] = []
    real = products._linear

    def watched(operator: Any, x: torch.Tensor, *others: Any) -> torch.Tensor:
        found.append(x.dtype)
        return real(operator, x, *others)

    monkeypatch.setattr(products, "_linear", watched)
    return found


def tensors(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=dtype)
    weight = torch.randn((5, shape[-1]), generator=generator, dtype=dtype)
    return x, weight, torch.randn(5, generator=generator, dtype=dtype)


def test_it_gives_what_pytorch_gives(seen: list[torch.dtype]) -> None:
    x, weight, bias = tensors(3, 7, 64)
    turned = tensors(3, 64, 7)[0].transpose(1, 2)
    layer = torch.nn.Linear(64, 5, bias=False)
    expected = linear(x, weight, bias), linear(turned, weight, bias), layer(x)
    with torch.inference_mode(), products_by_onednn():
        found = linear(x, weight, bias), linear(turned, weight, bias), layer(x)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert len(seen) == 4  # one to try it


def test_other_types_stay_with_pytorch(seen: list[torch.dtype]) -> None:
    x, weight, bias = tensors(2, 8, dtype=torch.float64)
    with products_by_onednn():
        assert torch.equal(linear(x, weight, bias), torch.addmm(bias, x, weight.t()))
    assert set(seen) == {torch.float32}


def test_behind_the_block_nothing_has_changed(seen: list[torch.dtype]) -> None:
    with products_by_onednn():
        pass
    linear(*tensors(2, 8))
    assert len(seen) == 1


@pytest.mark.parametrize("why", ["no AVX-512", "no operator", "another meaning"])
def test_pytorch_multiplies_where_onednn_cannot(
    why: str, seen: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "no AVX-512":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    elif why == "no operator":
        monkeypatch.setattr(torch.ops, "mkldnn", object())
    else:
        monkeypatch.setattr(products, "_linear", lambda operator, x, weight, bias: x)
    x, weight, bias = tensors(2, 8)
    with products_by_onednn():
        assert torch.equal(linear(x, weight, bias), torch.addmm(bias, x, weight.t()))
