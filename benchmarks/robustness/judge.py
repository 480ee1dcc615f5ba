"""What was wrong about the way a command ended."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from benchmarks.robustness.box import CANARY, Box, Tree, is_allowed, is_folder_of_torch
from benchmarks.robustness.case import Case
from benchmarks.robustness.forks import Outcome
from spach_deploy.bundle.store import MANIFEST, Bundle
from spach_deploy.common.errors import SpachError

CODES = range(4)
LONGEST_S, MOST_BYTES = 40.0, 4 << 30
_BUG = "This is a bug of spach-deploy"
_WARNING = re.compile(r"\.py:\d+: \w*Warning")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]")
_DRAFT = re.compile(r"(\.partial-|\.tmp$|^\.report\.)")


def judge(case: Case, outcome: Outcome, box: Box, before: Tree) -> list[str]:
    """What was wrong, a sentence each; nothing where all is well."""
    found = [*_ending(case, outcome), *_words(outcome), *_files(box, before, outcome), *_bundles(box, before)]
    if not found and outcome.code == 0 and case.check is not None and (problem := case.check(box)):
        found.append(f"result: {problem}")
    return found


def _ending(case: Case, outcome: Outcome) -> Iterator[str]:
    if outcome.timed_out:
        yield f"hang: it did not end in {outcome.seconds:.0f} s"
    elif outcome.code < 0:
        yield f"crash: signal {-outcome.code}"
    elif outcome.code not in CODES:
        yield f"exit code: {outcome.code}"
    elif outcome.code == 0 and case.must_refuse:
        yield "accepted: exit code 0 for an input that is wrong"
    if outcome.left:
        yield f"processes: {len(outcome.left)} were left"
    if not outcome.timed_out and outcome.seconds > LONGEST_S:
        yield f"slow: {outcome.seconds:.0f} s"
    if outcome.peak_bytes > MOST_BYTES:
        yield f"memory: {outcome.peak_bytes / 1e9:.1f} GB"


def _words(outcome: Outcome) -> Iterator[str]:
    text = f"{outcome.stdout}\n{outcome.stderr}"
    if "Traceback (most recent call last)" in text:
        yield f"traceback: {_last_line(outcome.stderr)}"
    if _BUG in text:
        yield f"unexplained: {text[text.index(_BUG) :].splitlines()[0][:300]}"
    elif outcome.code == 2 and not outcome.stdout.strip() and "Error: " not in outcome.stderr:
        yield "wordless: exit code 2 without an error"
    if warned := _WARNING.search(outcome.stderr):
        yield f"warning: {outcome.stderr[warned.start() :].splitlines()[0][:200]}"
    if control := _CONTROL.search(text):
        yield f"control characters: {text[max(control.start() - 60, 0) : control.end() + 20]!r}"


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:300]


def _files(box: Box, before: Tree, outcome: Outcome) -> Iterator[str]:
    after = box.tree()
    changed = [path for path in sorted({*before, *after}) if before.get(path) != after.get(path)]
    changed = [path for path in changed if not (after.get(path) == "folder" and is_folder_of_torch(path))]
    for path in changed:
        if Path(path).name == CANARY:
            yield f"executed: {path} was written by code in the input"
        elif not is_allowed(path):
            yield f"outside: {path} was {'removed' if path not in after else 'written'}"
        elif path.startswith("temporary/") or _DRAFT.search(Path(path).name):
            yield f"leftover: {path}"
    for event in outcome.events:
        yield f"audit: {event}"


def _bundles(box: Box, before: Tree) -> Iterator[str]:
    """Bundles among the results must be whole, unless they were found as they are."""
    after = box.tree()
    for folder in ("out", "build"):
        for manifest in sorted((box.work / folder).rglob(MANIFEST)):
            if _unchanged(manifest.parent.relative_to(box.root), before, after):
                continue
            if "schema_version" not in manifest.read_text(encoding="utf-8", errors="replace"):
                continue  # what spach-package wrote
            try:
                Bundle.open(manifest.parent)
            except SpachError as error:
                yield f"half-written: {error}"


def _unchanged(folder: Path, before: Tree, after: Tree) -> bool:
    prefix = f"{folder}/"

    def below(tree: Tree) -> Tree:
        return {path: what for path, what in tree.items() if path.startswith(prefix)}

    return below(before) == below(after)
