"""A case: a command with bad input, and what must hold when it has ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from random import Random

from benchmarks.robustness.box import Box

Check = Callable[[Box], str]
"""Called after exit code 0. Returns what is wrong, in words, or nothing."""


@dataclasses.dataclass(frozen=True)
class Case:
    """`what` was done to the input, and the command as a user types it, in the box's working folder.

    `must_refuse`: exit code 0 would be wrong. `may_connect`: the command is one that talks to a server.
    """

    what: str
    command: tuple[str, ...]
    must_refuse: bool = False
    may_connect: bool = False
    check: Check | None = dataclasses.field(default=None, repr=False)


Maker = Callable[[Box, Random], Case]
"""Writes the input of a case into the box. The same numbers from `Random` make the same case."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of bad input: how many of a thousand cases are of it, and what makes one."""

    name: str
    share: int
    make: Maker
