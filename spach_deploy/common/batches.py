"""Parts of what is many: ranges of numbers, runs of a stream, and some of all, evenly spread."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def ranges(count: int, size: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """`start` to `count` as (start, stop), `size` at a time; the last may be shorter."""
    return ((first, min(first + size, count)) for first in range(start, count, size))


def chunked(items: Iterable[Item], size: int) -> Iterator[tuple[Item, ...]]:
    """Runs of `size` items; the last may be shorter. Takes no more of `items` than one run at a time."""
    left = iter(items)
    while chunk := tuple(itertools.islice(left, size)):
        yield chunk


def spread(count: int, limit: int | None) -> list[int]:
    """`limit` of `count` indices, evenly spread; all where there are no more, or `limit` is None."""
    return list(range(count)) if limit is None or limit >= count else [i * count // limit for i in range(limit)]


def spread_with_ends(count: int, limit: int) -> list[int]:
    """`limit` of `count` indices, evenly spread, the first and the last among them; all where there are no more."""
    return list(range(count)) if limit >= count else [round(i * (count - 1) / max(1, limit - 1)) for i in range(limit)]
