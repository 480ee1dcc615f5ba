"""Which tensor is which place, told by values: the cases that whole graphs only meet by chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from spach_deploy.validation.bisect.probe_points import (
    QKV_PARTS,
    ChannelLayout,
    Computation,
    ProbeKind,
    ProbePoint,
    ProbeRecord,
    points_of_graph,
)
from spach_deploy.validation.bisect.tensor_matching import (
    EQUALIZED,
    MATCH_LIMIT_EIGHT_BITS,
    STATIC,
    Layout,
    Matcher,
    Order,
    ReferenceTensor,
    distinct,
)

SHAPE = (2, 5, 7)
RNG = np.random.default_rng(3)
VALUE = RNG.standard_normal(SHAPE).astype(np.float32)


def candidate(form: str, value: NDArray[np.float32], name: str = "blocks.0.norm1") -> ReferenceTensor:
    computation = Computation(
        None, (torch.from_numpy(value),), lambda _module, inputs, _rounding: inputs[0], ChannelLayout(2)
    )
    return ReferenceTensor(form, ProbeRecord(ProbePoint(name, name, ProbeKind.LEAF, ()), value, computation))


def off_by(error: float) -> NDArray[np.float32]:
    """`VALUE` with a relative L2 of `error`."""
    noise = RNG.standard_normal(SHAPE)
    noise *= error * np.linalg.norm(VALUE) / np.linalg.norm(noise)
    return VALUE + noise.astype(np.float32)


@pytest.mark.parametrize("order", Order)
def test_a_tensor_is_found_in_every_order_that_is_looked_for(order: Order) -> None:
    lies = Layout(tuple(SHAPE[axis] for axis in order.value), order).from_rows(VALUE)
    matcher = Matcher({"a": (candidate(STATIC, VALUE),)}, {"t": 0}, orders=tuple(Order))
    matcher.add("t", lies)
    (match,) = matcher.matches(matcher.forms()).values()
    assert match.layout.order is order
    np.testing.assert_array_equal(match.layout.to_rows(lies, SHAPE), VALUE)


def test_rows_of_tokens_before_images_are_found() -> None:
    matcher = Matcher({"a": (candidate(STATIC, VALUE),)}, {"t": 0}, orders=tuple(Order))
    matcher.add("t", VALUE.transpose(1, 0, 2).reshape(-1, 7))
    assert matcher.matches(matcher.forms())["a"].layout.order is Order.TOKENS_FIRST


def test_an_order_that_no_node_makes_is_not_looked_for() -> None:
    matcher = Matcher({"a": (candidate(STATIC, VALUE),)}, {"t": 0})
    matcher.add("t", VALUE.transpose(1, 0, 2))
    assert not matcher.matches(matcher.forms())


@pytest.mark.parametrize(
    ("shape", "orders"),
    [
        ((2, 5, 7), list(Order)),
        ((1, 5, 7), [Order.ROWS, Order.CHANNELS_FIRST]),
        ((2, 1, 7), [Order.ROWS]),
        ((2, 5, 1), [Order.ROWS, Order.TOKENS_FIRST]),
    ],
)
def test_orders_that_are_the_same_in_memory_are_one(shape: tuple[int, ...], orders: list[Order]) -> None:
    assert distinct(tuple(Order), shape) == orders


def test_in_eight_bits_a_value_that_lacks_its_bias_is_not_taken_for_the_value() -> None:
    """Both have what eight bits cost before; the one without its bias comes first in the graph."""
    matcher = Matcher({"a": (candidate(STATIC, VALUE),)}, {"bare": 0, "biased": 1, "moved": 2}, MATCH_LIMIT_EIGHT_BITS)
    biased = off_by(0.021)
    for tensor, value in (("bare", off_by(0.041)), ("biased", biased), ("moved", biased.reshape(10, 7))):
        matcher.add(tensor, value)
    assert matcher.matches(matcher.forms())["a"].tensor == "biased"


def test_in_eight_bits_a_graph_follows_the_form_that_it_is_nearest_to() -> None:
    """Another form may be within what eight bits may cost too."""
    exchanged = off_by(0.1)
    forms = (candidate(EQUALIZED, VALUE), candidate(STATIC, exchanged))
    matcher = Matcher({"blocks.0.norm1": forms}, {"t": 0}, MATCH_LIMIT_EIGHT_BITS)
    matcher.add("t", off_by(0.01))
    point = forms[0].recorded.point
    assert matcher.forms().follows(point, EQUALIZED)
    assert not matcher.forms().follows(point, STATIC)


def test_query_key_and_value_are_places_where_a_graph_makes_them() -> None:
    qkv, core = "blocks.0.spatial_func.qkv", "blocks.0.spatial_func/core"
    parts = [qkv + end for end in QKV_PARTS]
    places = {name: ProbePoint(name, qkv, ProbeKind.LEAF, ("blocks.0.norm1",)) for name in (qkv, *parts)}
    places[core] = ProbePoint(core, "blocks.0.spatial_func", ProbeKind.CORE, (qkv,))
    packed, parted = points_of_graph(places, {qkv, core}), points_of_graph(places, {*parts, core})
    assert list(packed) == [qkv, core]
    assert packed[core].parents == (qkv,)
    assert list(parted) == [*parts, core]
    assert parted[core].parents == tuple(parts)
    assert list(points_of_graph(places, parts[:2])) == [qkv, core]
