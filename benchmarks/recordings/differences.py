"""How two recordings differ, in lines to read."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping

from benchmarks.recordings.readings import flattened
from benchmarks.recordings.recorder import Recording

MOST = 12
"""Lines shown of differences of one sort."""

_IGNORED = ("seconds",)
_BESIDE = ("order of nodes", "value_info", "doc strings")


def differences(old: Recording, new: Recording) -> Iterator[str]:
    """What of one case differs; nothing where the two are equal."""
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if key in _IGNORED or before == after:
            continue
        if key in ("stdout", "stderr"):
            yield from _lines(key, before or [], after or [])
        elif key == "graphs":
            for name in sorted({*(before or {}), *(after or {})}):
                yield from _graph(name, (before or {}).get(name), (after or {}).get(name))
        elif isinstance(before or after, Mapping):
            yield from _tree(key, before or {}, after or {})
        else:
            yield f"{key}: {before} -> {after}"


def _lines(name: str, before: list[str], after: list[str]) -> Iterator[str]:
    found = difflib.unified_diff(before, after, lineterm="", n=0)
    yield from (f"{name} {line}" for line in found if not line.startswith(("---", "+++", "@@")))


def _tree(name: str, before: Mapping[str, object], after: Mapping[str, object]) -> Iterator[str]:
    """Keys that came, went or changed their value; items of one list are told once."""
    old, new = dict(flattened(before)), dict(flattened(after))
    told: dict[str, list[str]] = {}
    for path in sorted({*old, *new}):
        if path in old and path in new and old[path] == new[path]:
            continue
        collapsed = re.sub(r"(?<=/)\d+(?=/|$)", "[]", path)
        told.setdefault(collapsed, []).append(_change(old, new, path))
    for collapsed, changes in told.items():
        more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
        yield f"{name} {collapsed}: {changes[0]}{more}"


def _change(old: Mapping[str, object], new: Mapping[str, object], path: str) -> str:
    if path not in old:
        return f"new, {new[path]!r}"
    if path not in new:
        return f"gone, was {old[path]!r}"
    before, after = str(old[path]), str(new[path])
    if "\n" in before + after:
        return "\n    ".join(["text differs", *_lines("", before.splitlines(), after.splitlines())])
    return f"{old[path]!r} -> {new[path]!r}"


def _graph(name: str, before: Recording | None, after: Recording | None) -> Iterator[str]:
    if before is None or after is None:
        yield f"graph {name}: {'new' if before is None else 'gone'}"
        return
    same = before.get("digest") == after.get("digest")
    if before.get("sha256") != after.get("sha256"):
        yield f"graph {name}: other bytes" + (", of the same nodes, initializers and interface" if same else "")
    yield from (f"graph {name}: other {key}" for key in _BESIDE if before.get(key) != after.get(key))
    for key in ("versions", "inputs", "outputs", "metadata"):
        if before.get(key) != after.get(key):
            yield f"graph {name} {key}: {before.get(key)} -> {after.get(key)}"
    yield from _few(f"graph {name} node", _set_changes(before["nodes"], after["nodes"]))
    yield from _initializers(f"graph {name}", before["initializers"], after["initializers"])


def _set_changes(before: list[str], after: list[str]) -> list[str]:
    old, new = set(before), set(after)
    return [f"- {line}" for line in before if line not in new] + [f"+ {line}" for line in after if line not in old]


def _initializers(name: str, before: Mapping[str, str], after: Mapping[str, str]) -> Iterator[str]:
    gone = [f"- {key} {before[key]}" for key in before if key not in after]
    came = [f"+ {key} {after[key]}" for key in after if key not in before]
    yield from _few(f"{name} initializer", gone + came)
    changed = [key for key in before if key in after and before[key] != after[key]]
    if changed and len(before[changed[0]].split("] ")) == 1:
        yield from _few(f"{name} initializer", [f"{key} {before[key]} -> {after[key]}" for key in changed])
    elif changed:
        most = max(_moved(before[key], after[key]) for key in changed)
        names = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
        yield f"{name}: {len(changed)} of {len(before)} initializers differ ({names}), means by up to {most:.1e}"


def _moved(before: str, after: str) -> float:
    """The relative change of the mean of a tensor's absolute values; infinite where dtype or shape changed."""
    (kind, _, old), (other, _, new) = (text.rsplit(" ", 2) for text in (before, after))
    if kind != other:
        return float("inf")
    return abs(float(new) - float(old)) / max(abs(float(old)), 1e-30)


def _few(name: str, lines: Iterable[str]) -> Iterator[str]:
    lines = list(lines)
    yield from (f"{name} {line}" for line in lines[:MOST])
    if len(lines) > MOST:
        yield f"{name}: {len(lines) - MOST} more lines of this sort"


def compared(old: Mapping[str, Recording], new: Mapping[str, Recording]) -> dict[str, list[str]]:
    """What differs, by case; cases of the old recordings that were not run again are left out."""
    found = {name: list(differences(old[name], new[name])) for name in new if name in old}
    found |= {name: ["not recorded before"] for name in new if name not in old}
    return {name: lines for name, lines in found.items() if lines}
