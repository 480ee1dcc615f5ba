"""What spach-validate --bisect finds: faults planted in every weighted module, and harmless variants.

    python -m benchmarks.bisect [--faults 360] [--variants 120] [--seed 0] [--processes 2]

Models with demo weights, one of each mixing type, in three forms each: the exported FP32 graph, the same in TensorRT's
form, and that in FP16. A fault's size is what it does to the logits, in noise floors of its graph; faults below one are
listed as undetectable. See tests/planted.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch

from benchmarks.results import record, table
from tests.planted.faults import Planned
from tests.planted.score import Score, VariantScore, chosen, chosen_variants, score, score_variant
from tests.planted.subjects import Subject, registered
from tests.planted.variants import Variant

FAULTS, VARIANTS = 360, 120
"""Of the whole run, which RESULTS.md tells of."""

_T = TypeVar("_T")

MODELS = ("trans_xxs", "ms_mlp_xxs", "ms_conv_xxs")
_SUBJECTS: list[Subject] = []
_FAULTS: list[tuple[Subject, Planned]] = []
_VARIANTS: list[tuple[Subject, Variant]] = []
"""Filled before the processes are forked, which share them and get numbers."""


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    _SUBJECTS.extend(registered(name) for name in MODELS)
    for subject in _SUBJECTS:
        print(subject.name, {form: f"{floor:.1e}" for form, floor in subject.floors.items()}, flush=True)
    share = arguments.faults // len(_SUBJECTS)
    _FAULTS.extend((subject, fault) for subject in _SUBJECTS for fault in chosen(subject, share, arguments.seed))
    _VARIANTS.extend(chosen_variants(_SUBJECTS, arguments.variants))
    start = time.perf_counter()
    with multiprocessing.get_context("fork").Pool(arguments.processes) as pool:
        count = len(_FAULTS)
        scores = [found for found in _progress(pool.imap(_fault, range(count)), count) if found is not None]
        count = len(_VARIANTS)
        harmless = list(_progress(pool.imap(_variant, range(count)), count))
    body = report(scores, harmless, time.perf_counter() - start)
    is_whole = arguments.faults >= FAULTS and arguments.variants >= VARIANTS
    command = "python -m benchmarks.bisect"
    record("Bisection of planted faults", command, body, ("torch", "onnxruntime"), is_whole=is_whole)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=FAULTS)
    parser.add_argument("--variants", type=int, default=VARIANTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    return parser.parse_args()


def _fault(number: int) -> Score | None:
    torch.set_num_threads(1)
    return score(*_FAULTS[number], seed=number)


def _variant(number: int) -> VariantScore:
    torch.set_num_threads(1)
    return score_variant(*_VARIANTS[number])


def _progress(results: Iterable[_T], total: int) -> Iterable[_T]:
    for number, result in enumerate(results, 1):
        if number % 20 == 0 or number == total:
            print(f"{number} of {total}", flush=True)
        yield result


# The report


def report(scores: Sequence[Score], harmless: Sequence[VariantScore], seconds: float) -> str:
    """The section's text."""
    above = [entry for entry in scores if entry.is_detectable]
    rejected = [entry for entry in above if entry.rejected]
    named = [entry for entry in rejected if entry.named]
    told = [entry for entry in rejected if entry.told]
    wrong = [entry for entry in harmless if entry.rejected]
    modules = len({(entry.model, entry.module) for entry in scores})
    parts = [
        f"{len(scores)} faults in {modules} modules of {', '.join(MODELS)}; {len(scores) - len(above)} are below the"
        " noise.",
        f"Rejected: **{_share(rejected, above)}** of those above the noise. Module named exactly:"
        f" **{_share(named, rejected)}** of the rejected. Kind told: {_share(told, rejected)}.",
        f"Harmless variants rejected: **{len(wrong)} of {len(harmless)}**.",
        f"A bisection takes {_median(scores):.1f} s (median); all of it {seconds:.0f} s.",
        table(("size, noise floors", "faults", "rejected", "named", "kind told"), _by(above, _bucket)),
        table(("kind", "faults", "rejected", "named", "kind told"), _by(above, lambda entry: entry.kind)),
        table(("form", "faults", "rejected", "named", "kind told"), _by(above, lambda entry: entry.form)),
        _listed("Not rejected", [entry for entry in above if not entry.rejected]),
        _listed("Rejected, another module named", [entry for entry in rejected if not entry.named]),
        "Harmless, but rejected:\n\n" + "\n".join(f"- {e.model}, {e.name}: {e.suspect}" for e in wrong)
        if wrong
        else "",
        _listed("Below the noise, undetectable", [entry for entry in scores if not entry.is_detectable]),
    ]
    return "\n\n".join(part for part in parts if part)


def _median(scores: Sequence[Score]) -> float:
    return statistics.median(entry.seconds for entry in scores)


def _share(part: Sequence[Score], whole: Sequence[Score]) -> str:
    return f"{len(part)} of {len(whole)} ({len(part) / max(len(whole), 1):.1%})"


def _bucket(entry: Score) -> str:
    bounds = (1, 3, 10, 100, 1000)
    low = max(bound for bound in bounds if entry.size >= bound)
    high = bounds[bounds.index(low) + 1] if low != bounds[-1] else None
    return f"{low} to {high}" if high else f"over {low}"


def _by(scores: Sequence[Score], key: Callable[[Score], str]) -> list[list[object]]:
    counts = Counter(key(entry) for entry in scores)
    order = sorted(counts, key=lambda name: [int(part) for part in name.split() if part.isdigit()] or [0])
    rows = []
    for name in order:
        group = [entry for entry in scores if key(entry) == name]
        rows.append(
            [name, len(group), *(sum(getattr(e, figure) for e in group) for figure in ("rejected", "named", "told"))]
        )
    return rows


def _listed(title: str, scores: Sequence[Score]) -> str:
    if not scores:
        return ""
    lines = [
        f"- {e.model} {e.form}, {e.what}: size {e.size:.1f}{f'; {e.suspect}' if e.suspect else ''}" for e in scores
    ]
    return f"{title}:\n\n" + "\n".join(lines)


if __name__ == "__main__":
    main()
