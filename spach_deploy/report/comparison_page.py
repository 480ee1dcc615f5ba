"""The page that compares two bundles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spach_deploy.common.files import Destination
from spach_deploy.report.content import general, pictures_of, scientific
from spach_deploy.report.page import check_own_page, fill
from spach_deploy.validation.result import write_whole
from spach_deploy.validation.side_by_side import figures

if TYPE_CHECKING:
    from spach_deploy.validation.side_by_side import Side, SideBySide


def write_page_of_two(compared: SideBySide, destination: Destination) -> None:
    """Make the page and write it in one step.

    Raises MissingPackageError without jinja2, UsageError where it cannot be written or another's page is there.
    """
    check_own_page(destination.path)
    write_whole(destination, page_of_two(compared))


def page_of_two(compared: SideBySide) -> str:
    """The page as text."""
    names = [side.bundle.path.name or str(side.bundle.path) for side in compared.sides]
    return fill(
        "two.html.jinja",
        title=f"{names[0]} and {names[1]}",
        names=names,
        paths=[str(side.bundle.path) for side in compared.sides],
        state=_state(compared),
        heading=_heading(compared),
        reason=_reason(compared),
        is_demo=any(side.validation.header.is_demo for side in compared.sides),
        findings=compared.findings,
        notes=compared.notes,
        facts=[{"name": f.name, "values": (f.first, f.second), "differs": f.differs} for f in compared.facts],
        figures=list(figures(compared)),
        levels=[side.validation.level_sentence() for side in compared.sides],
        layers=compared.layers,
        answers=_answers(compared),
        flips=bool(compared.answers and compared.answers[0].flipped),
        run=None if compared.run is None else compared.run.to_dict(),
    )


def _state(compared: SideBySide) -> str:
    if not compared.passed:
        return "bad"
    return "partial" if any(side.validation.missing_engine_run for side in compared.sides) else "good"


def _heading(compared: SideBySide) -> str:
    if compared.passed:
        return "Both agree with PyTorch in FP32"
    wrong = [side.bundle.path.name for side in compared.sides if not side.validation.passed]
    return f"{' and '.join(wrong)} does not agree with PyTorch" if wrong else "They disagree with each other"


def _reason(compared: SideBySide) -> str:
    direct = compared.direct
    if direct is None:
        return "They were not compared with each other."
    allowed = "" if compared.allowed is None else f", of {scientific(compared.allowed)} that both bounds together allow"
    flips = len(direct.scores.flips) if direct.scores is not None else 0
    verb = "differ" if direct.name == "logits" else "differs"
    differ = f"The second's {direct.name} {verb} from the first's by a relative L2 of"
    changed = "" if direct.scores is None else f"; {flips} of {direct.shape[0]} images change class between them"
    return f"{differ} {scientific(direct.rel_l2_worst)}{allowed}{changed}."


def _answers(compared: SideBySide) -> list[dict[str, Any]]:
    """Images on which the bundles differ, or nearly, with both sets of best classes."""
    pictures = _pictures(compared.first, [answer.image for answer in compared.answers])
    return [
        {
            "name": answer.name or f"image {answer.image}",
            "picture": pictures.get(answer.image),
            "flipped": answer.flipped,
            "margins": (general(answer.reference_margin), general(answer.candidate_margin)),
            "best": [
                [(ranked.index, f"{ranked.score:.3f}") for ranked in side]
                for side in (answer.reference, answer.candidate)
            ],
        }
        for answer in compared.answers
    ]


def _pictures(side: Side, wanted: list[int]) -> dict[int, str]:
    return pictures_of(side.validation.eval_set.inputs, side.bundle.manifest.preprocessing, wanted)
