"""Sizes as users write them."""

from __future__ import annotations

import pytest

from spach_deploy.common.text import parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *(("100", 100), ("100B", 100), ("0", 0), (" 512 M ", 512 * 2**20)),
        *(("2G", 2 * 2**30), ("2Gi", 2 * 2**30), ("2GiB", 2 * 2**30), ("2 gib", 2 * 2**30)),
        *(("2GB", 2 * 10**9), ("2 gb", 2 * 10**9), ("1.5MB", 1_500_000), ("1.5K", 1536), ("1TB", 10**12)),
    ],
)
def test_a_letter_alone_is_of_1024_as_trtexec_has_it_and_gb_is_of_1000(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "plenty", "-1", "2X", "2iB", "2 i", "1e9", "G", "1..5M", "nan"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no size"):
        parse_bytes(text)
