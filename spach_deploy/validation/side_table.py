"""Two bundles side by side as a table that a person can read, at 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from spach_deploy.errors import printable
from spach_deploy.text import Escaped, rendered
from spach_deploy.validation.reference import LOGITS
from spach_deploy.validation.side_by_side import Side, SideBySide
from spach_deploy.validation.table import DEMO_WARNING, WIDTH

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_SHOWN = 6
Row = tuple[str, str, str]


def as_text(compared: SideBySide, *, width: int = WIDTH, color: bool = False) -> Escaped:
    """The whole table as text, without a newline at its end. `color`: with terminal colours."""
    return rendered(_parts(compared, width), width=width, color=color)


def _parts(compared: SideBySide, width: int) -> Iterator[RenderableType]:
    from rich.text import Text

    if any(side.validation.subject.is_demo for side in compared.sides):
        yield Text(DEMO_WARNING, style="bold yellow")
        yield ""
    yield _table("", [_row(fact.name, fact.first, fact.second) for fact in compared.facts], compared)
    yield ""
    yield _table("against PyTorch", list(figures(compared)), compared)
    yield ""
    yield from (Text(textwrap.fill(line, width, subsequent_indent="  ")) for line in _direct(compared))
    for finding in compared.findings:
        yield Text(textwrap.fill(f"x {finding}", width, subsequent_indent="  "), style="red")
    for note in compared.notes:
        yield Text(textwrap.fill(f"- {note}", width, subsequent_indent="  "))
    yield ""
    yield _verdict(compared)


def _verdict(compared: SideBySide) -> RenderableType:
    from rich.text import Text

    if not compared.passed:
        return Text("DO NOT BOTH AGREE with PyTorch in FP32.", style="bold red")
    missing = any(side.validation.missing_engine_run for side in compared.sides)
    level = " Level of evidence: graph, a plan did not run here." if missing else ""
    return Text(f"BOTH AGREE with PyTorch in FP32.{level}", style="bold green")


def _row(name: str, first: str, second: str) -> Row:
    return f"{name} *" if first != second else name, first, second


def _table(title: str, rows: list[Row], compared: SideBySide) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=True, show_edge=False, header_style="bold")
    table.add_column(title, no_wrap=True, width=20)
    for side in compared.sides:
        table.add_column(printable(side.bundle.path.name or str(side.bundle.path)), width=26, overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    return table


def figures(compared: SideBySide) -> Iterator[Row]:
    """Each one's figures against PyTorch."""
    columns = [_figures(side) for side in compared.sides]
    for name in columns[0]:
        yield name, columns[0][name], columns[1].get(name, "")


def _figures(side: Side) -> dict[str, str]:
    validation = side.validation
    run = validation.evidence[0] if validation.evidence else None
    output = next((entry for entry in run.comparison.outputs if entry.name == LOGITS), None) if run else None
    found = {
        "agrees": "yes" if validation.passed else "no",
        "ran": "nothing" if run is None else run.level.value,
        "relative L2, worst": "" if output is None else f"{output.rel_l2_worst:.2e} of {side.bound:.2e}",
        "cosine, worst": "" if output is None else f"{output.cosine_worst:.8f}",
        "top-1 agreement": "",
        "images that flip": "",
    }
    if output is not None and output.scores is not None:
        found["top-1 agreement"] = f"{output.scores.top1_agreement:.2%}"
        found["images that flip"] = f"{len(output.scores.flips)} of {len(validation.trial)}"
    if validation.accuracy is not None:
        measured = validation.accuracy.measured
        found["top-1 accuracy"] = f"{measured.top1_candidate:.2%} ({measured.top1_reference:.2%} in PyTorch)"
    return found


def _direct(compared: SideBySide) -> Iterator[str]:
    """One against the other, and where their layers differ."""
    direct = compared.direct
    if direct is not None:
        allowed = "" if compared.allowed is None else f" of {compared.allowed:.2e} that both bounds allow"
        flips = direct.scores.flips if direct.scores is not None else ()
        yield (
            f"Second against first: relative L2 {direct.rel_l2_worst:.2e}{allowed}, cosine {direct.cosine_worst:.8f};"
            f" {len(flips)} of {direct.shape[0]} images change class."
        )
        for flip in flips[:_SHOWN]:
            name = flip.name or f"image {flip.image}"
            yield f"  {name}: {flip.reference_class} to {flip.candidate_class}, margin {flip.reference_margin:.2e}"
    if compared.layers:
        shown = ", ".join(f"{layer.name} {layer.first} / {layer.second}" for layer in compared.layers[:3])
        more = f" and {len(compared.layers) - 3} more" if len(compared.layers) > 3 else ""
        yield f"{len(compared.layers)} layers are of another precision: {shown}{more}."
