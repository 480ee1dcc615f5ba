from __future__ import annotations

import ctypes
import sys

import pytest

from spach_deploy.runtime.pages import LARGE, SMALL_OBJECTS, VARIABLE, for_small_objects, small_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has them")


def are_off() -> bool:
    return bool(ctypes.CDLL(None).prctl(42, 0, 0, 0, 0) == 1)


def test_large_pages_are_off_within_the_block_and_as_before_behind_it() -> None:
    before = are_off()
    with small_pages():
        assert are_off()
        with small_pages():
            pass
        assert are_off()
    assert are_off() == before
    with pytest.raises(ValueError, match="stop"), small_pages():
        raise ValueError("stop")
    assert are_off() == before


def test_a_process_of_small_objects_is_started_for_them_unless_a_user_has_wishes_of_their_own() -> None:
    for environment in ({"A": "b"}, {"A": "b", VARIABLE: LARGE}):
        assert for_small_objects(environment) == {"A": "b", VARIABLE: SMALL_OBJECTS}
    for own in ("", "glibc.malloc.hugetlb=2"):
        assert for_small_objects({VARIABLE: own}) == {VARIABLE: own}
