"""Damage: to bytes as disks, networks and hands do it, and to JSON as hands and other programs do it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

Damaged = tuple[bytes, str]
"""The bytes, and what was done to them."""

_EXTREME = (
    0,
    1,
    0x7F,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    0x7FFFFFFFFFFFFFFF,
    0xFFFFFFFFFFFFFFFF,
)


def damaged(content: bytes, chance: Random) -> Damaged:
    """`content` with one to three kinds of damage, never what it was."""
    said: list[str] = []
    result = content
    while result == content:
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            result, what = chance.choice(_DAMAGES)(result, chance)
            said.append(what)
    return result, ", ".join(said)


def flipped(content: bytes, chance: Random) -> Damaged:
    """One to sixteen bits."""
    result = bytearray(content or b"\0")
    count = chance.choice((1, 1, 2, 4, 16))
    places = [chance.randrange(len(result)) for _ in range(count)]
    for place in places:
        result[place] ^= 1 << chance.randrange(8)
    return bytes(result), f"{count} bits flipped from byte {min(places)}"


def truncated(content: bytes, chance: Random) -> Damaged:
    """The end, or all but a few bytes, are gone."""
    length = chance.choice(
        (0, 1, 8, chance.randrange(len(content) + 1), max(len(content) - chance.randrange(1, 64), 0))
    )
    return content[:length], f"cut to {length} bytes"


def _beheaded(content: bytes, chance: Random) -> Damaged:
    length = chance.choice((1, 4, 8, chance.randrange(len(content) + 1)))
    return content[length:], f"the first {length} bytes gone"


def _overwritten(content: bytes, chance: Random) -> Damaged:
    start, length = chance.randrange(len(content) + 1), chance.choice((1, 4, 64, 4096))
    length = min(length, len(content) - start)
    filling = chance.choice((bytes(length), b"\xff" * length, chance.randbytes(length)))
    return content[:start] + filling + content[start + length :], f"{length} bytes overwritten at {start}"


def _extreme(content: bytes, chance: Random) -> Damaged:
    """A number of four or eight bytes, such as a length, becomes an extreme one."""
    size = chance.choice((1, 2, 4, 8))
    start = chance.randrange(max(min(len(content), chance.choice((64, 512, len(content) + 1))), 1))
    number = chance.choice(_EXTREME) & (1 << 8 * size) - 1
    coded = number.to_bytes(size, chance.choice(("little", "big")))
    return content[:start] + coded + content[start + size :], f"{number:#x} at {start}"


def _inserted(content: bytes, chance: Random) -> Damaged:
    start, length = chance.randrange(len(content) + 1), chance.choice((1, 16, 4096))
    return content[:start] + chance.randbytes(length) + content[start:], f"{length} bytes inserted at {start}"


def _repeated(content: bytes, chance: Random) -> Damaged:
    start, length = chance.randrange(len(content) + 1), chance.choice((8, 256, 4096))
    return content[: start + length] + content[start:], f"{length} bytes twice at {start}"


def _removed(content: bytes, chance: Random) -> Damaged:
    start, length = chance.randrange(len(content) + 1), chance.choice((1, 16, 4096))
    return content[:start] + content[start + length :], f"{length} bytes removed at {start}"


def _appended(content: bytes, chance: Random) -> Damaged:
    length = chance.choice((1, 100, 5000))
    return content + chance.randbytes(length), f"{length} bytes appended"


def _something_else(content: bytes, chance: Random) -> Damaged:
    others = {
        "nothing": b"",
        "a web page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "noise": chance.randbytes(300),
        "zeros": bytes(len(content)),
        "gzip": b"\x1f\x8b\x08" + chance.randbytes(60),
        "another order": content[len(content) // 2 :] + content[: len(content) // 2],
    }
    name = chance.choice(sorted(others))
    return others[name], f"{name} in its place"


_DAMAGES: tuple[Callable[[bytes, Random], Damaged], ...] = (
    *(flipped, flipped, flipped, truncated, truncated, _beheaded, _overwritten, _overwritten, _extreme, _extreme),
    *(_inserted, _repeated, _removed, _appended, _something_else),
)


# Text


def hostile_texts(outside: str) -> tuple[str, ...]:
    """Texts that mean something to whoever is careless: paths that climb out, templates, shells, terminals."""
    return (
        "",
        " ",
        "x" * 5000,
        f"../../outside/{'pwned'}",
        f"{outside}/pwned",
        "..",
        "/",
        "a/b",
        ".",
        "{{ 7 * 7 }}{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
        "{{ cycler.__init__.__globals__.os.system('touch pwned') }}",
        f"$(touch {outside}/pwned)",
        f"`touch {outside}/pwned`; touch {outside}/pwned",
        "' OR 1=1 --",
        "\x1b[31mred\x1b[2J\x07",
        "a\nb\r\nError: forged",
        "name\twith\ttabs",
        "\u202eevil\u2066",
        "%s%n%x{0}{self.__class__}",
        "<script>alert(1)</script>",
        "[bold red]markup[/] [link=file:///etc/passwd]x[/link]",
        "!!python/object/apply:os.system ['touch pwned']",
        "naïve – ünïcode 名前",
        "\ufeffbom",
        "nul\0byte",
        "NaN",
    )


# JSON


def odd_values(outside: str) -> tuple[Any, ...]:
    """Values that stand where others were expected."""
    deep: Any = []
    for _ in range(200):
        deep = [deep]
    numbers = (0, 1, -1, 7, 10**30, -(10**30), 1 << 63, 0.5, -0.0, 1e308, float("nan"), float("inf"), 2**31)
    return (None, True, False, *numbers, [], {}, [1, 2, 3], ["a"], {"a": 1}, deep, *hostile_texts(outside))


def damaged_json(content: Any, chance: Random, outside: str) -> tuple[Any, str]:
    """A copy of `content` with one to three entries replaced, removed, renamed, repeated or exchanged."""
    said = []
    result = copy.deepcopy(content)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        result, what = _damage_entry(result, chance, outside)
        said.append(what)
    return result, ", ".join(said)


def _damage_entry(content: Any, chance: Random, outside: str) -> tuple[Any, str]:
    places = list(_places(content, ()))
    if not places:
        return chance.choice(odd_values(outside)), "another value in its place"
    where = chance.choice(places)
    parent, key = _at(content, where[:-1]), where[-1]
    name = ".".join(map(str, where))
    action = chance.choice(("replace", "replace", "replace", "replace", "remove", "rename", "repeat", "exchange"))
    if action == "remove":
        del parent[key]
    elif action == "rename" and isinstance(parent, dict):
        parent[chance.choice(hostile_texts(outside))] = parent.pop(key)
    elif action == "repeat" and isinstance(parent, list):
        parent.insert(int(key), copy.deepcopy(parent[key]))
    elif action == "exchange":
        parent[key] = copy.deepcopy(_at(content, chance.choice(places)))
    else:
        value = chance.choice(odd_values(outside))
        parent[key] = copy.deepcopy(value)
        return content, f"{name} = {ascii(value)[:60]}"
    return content, f"{name} {action}d"


def _places(content: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Paths of all entries, of long lists only the first few."""
    keys = (
        list(content) if isinstance(content, dict) else range(min(len(content), 6)) if isinstance(content, list) else ()
    )
    for key in keys:
        yield (*path, key)
        yield from _places(content[key], (*path, key))


def _at(content: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        content = content[key]
    return content


def damaged_json_text(text: str, chance: Random, outside: str) -> Damaged:
    """JSON with wrong entries, or its bytes damaged."""
    if chance.random() < 0.25:
        return damaged(text.encode(), chance)
    content, what = damaged_json(json.loads(text), chance, outside)
    return json.dumps(content, indent=2).encode("utf-8", "surrogatepass"), what
