"""Products computed another way: the same numbers, and PyTorch's own for everything else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from spach_deploy.runtime import products
from spach_deploy.runtime.products import depthwise, fast_products


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
    with torch.inference_mode(), fast_products():
        found = linear(x, weight, bias), linear(turned, weight, bias), layer(x)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert len(seen) == 4  # one to try it


def test_other_types_stay_with_pytorch(seen: list[torch.dtype]) -> None:
    x, weight, bias = tensors(2, 8, dtype=torch.float64)
    with fast_products():
        assert torch.equal(linear(x, weight, bias), torch.addmm(bias, x, weight.t()))
    assert set(seen) == {torch.float32}


def test_behind_the_block_nothing_has_changed(seen: list[torch.dtype]) -> None:
    with fast_products():
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
    with fast_products():
        assert torch.equal(linear(x, weight, bias), torch.addmm(bias, x, weight.t()))


def convolution(**settings: Any) -> torch.nn.Conv2d:
    torch.manual_seed(0)
    return torch.nn.Conv2d(6, **{"out_channels": 6, "kernel_size": 3, "padding": 1, "groups": 6, **settings}).double()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What is convolved tap by tap."""
    found: list[torch.Tensor] = []

    def watched(x: torch.Tensor, *others: Any) -> torch.Tensor:
        found.append(x)
        return depthwise(x, *others)

    monkeypatch.setattr(products, "depthwise", watched)
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("is_last", [True, False])
def test_a_depthwise_convolution_in_fp64_is_a_sum_of_taps(bias: bool, is_last: bool, taken: list[torch.Tensor]) -> None:
    layer = convolution(bias=bias)
    x = torch.randn((2, 6, 5, 4), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = x.contiguous(memory_format=torch.channels_last) if is_last else x
    with torch.inference_mode(), fast_products():
        found = layer(x)
    assert len(taken) == 1
    assert torch.allclose(found, layer(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "settings",
    [{"groups": 1}, {"padding": 0}, {"stride": 2}, {"dilation": 2}, {"kernel_size": 5, "padding": 1}, {"groups": 3}],
)
def test_other_convolutions_stay_with_pytorch(settings: dict[str, int], taken: list[torch.Tensor]) -> None:
    layer, x = convolution(**settings), torch.ones((1, 6, 8, 8), dtype=torch.float64)
    with torch.inference_mode(), fast_products():
        assert torch.equal(layer(x), convolution(**settings)(x))
        assert torch.equal(convolution().float()(x.float()), convolution().float()(x.float()))
    assert not taken
