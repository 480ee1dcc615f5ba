"""Splitting work: index ranges of a batch size, chunks of a stream, and evenly spread samples."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def ranges(count: int, size: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """Index ranges (start, stop) that cover `start` to `count`, `size` at a time; the last may be shorter."""
    return ((first, min(first + size, count)) for first in range(start, count, size))


def chunked(items: Iterable[Item], size: int) -> Iterator[tuple[Item, ...]]:
    """Tuples of `size` consecutive items; the last may be shorter. Reads one chunk of `items` at a time."""
    remaining = iter(items)
    while chunk := tuple(itertools.islice(remaining, size)):
        yield chunk


def spread(count: int, limit: int | None) -> list[int]:
    """`limit` indices evenly spread over `count`; all of them where there are no more, or `limit` is None."""
    return list(range(count)) if limit is None or limit >= count else [i * count // limit for i in range(limit)]


def spread_with_ends(count: int, limit: int) -> list[int]:
    """`limit` of `count` indices, evenly spread, the first and the last among them; all where there are no more."""
    return list(range(count)) if limit >= count else [round(i * (count - 1) / max(1, limit - 1)) for i in range(limit)]
