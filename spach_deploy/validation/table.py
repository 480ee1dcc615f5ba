"""A validation as a table for the terminal, 80 columns wide."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from spach_deploy.common.errors import printable
from spach_deploy.common.text import Escaped, rendered
from spach_deploy.models.hyperparameters import lines
from spach_deploy.validation.accuracy import Accuracy, PairedAccuracy
from spach_deploy.validation.compare import IndexComparison, OutputComparison, ScoreComparison
from spach_deploy.validation.result import Validation
from spach_deploy.validation.runs import RunResult, and_listed
from spach_deploy.validation.verdict import Tolerance

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

WIDTH = 80
_FLIPS_SHOWN = 5
Row = tuple[str, str, str, str]

_NOT_RECORDED = "(an earlier version exported it; what its weights do not show was taken as published)"
DEMO_WARNING = "DEMO WEIGHTS, not trained: the numbers below compare arithmetic, the answers mean nothing."


def as_text(validation: Validation, *, width: int = WIDTH, color: bool = False) -> Escaped:
    """The whole table as text, without a newline at its end. `color`: with terminal colours."""
    return rendered(_parts(validation, width), width=width, color=color)


def _parts(validation: Validation, width: int) -> Iterator[RenderableType]:
    from rich.text import Text

    if validation.header.is_demo:
        yield Text(DEMO_WARNING, style="bold yellow")
        yield ""
    yield from _head(validation, width)
    for position, item in enumerate(validation.evidence):
        yield from _evidence(item, width, in_full=position == 0 or (validation.evidence[0].passed and not item.passed))
    if validation.accuracy is not None:
        yield from _accuracy(validation.accuracy, width)
    if validation.bisection is not None:
        yield ""
        yield Text("Bisection", style="bold")
        yield from (Text(_wrapped(f"- {line}", width, 2)) for line in validation.bisection.lines())
    yield ""
    findings = _findings(validation)
    for finding in findings:
        yield Text(_wrapped(f"x {finding}", width, 2), style="red")
    for note in validation.notes:
        yield Text(_wrapped(f"- {note}", width, 2))
    if findings or validation.notes:
        yield ""
    yield _verdict(validation)
    yield Text(_wrapped(validation.level_sentence(), width, 0))
    if sentence := validation.header.answers_sentence:
        yield Text(_wrapped(sentence, width, 0))


def _findings(validation: Validation) -> tuple[str, ...]:
    """Findings to show: of later runs only where the first has none, since they repeat it with other figures. The
    report has all.
    """
    if not validation.evidence or validation.evidence[0].passed:
        return validation.all_findings
    dropped = validation.accuracy.findings if validation.accuracy else ()
    other = (validation.other_model,) if validation.other_model else ()
    return (*validation.findings, *other, *validation.evidence[0].verdict.findings, *dropped)


def _verdict(validation: Validation) -> Text:
    from rich.text import Text

    if validation.other_model and dataclasses.replace(validation, other_model="").agreed:
        return Text("AGREED with PyTorch in FP32, but NOT WITH YOUR ANSWERS.", style="bold red")
    if not validation.agreed:
        return Text("DID NOT AGREE with PyTorch in FP32.", style="bold red")
    if not validation.passed:
        return Text("AGREED with PyTorch in FP32, but LOST MORE ACCURACY than --max-drop allows.", style="bold red")
    yours = " and with your answers" if validation.header.answers is not None else ""
    return Text(f"AGREED with PyTorch in FP32{yours}.", style="bold green")


def _head(validation: Validation, width: int) -> Iterator[RenderableType]:
    from rich.text import Text

    header, eval_set = validation.header, validation.eval_set
    unseen = [] if header.is_demo else lines(header.settings) or [_NOT_RECORDED]
    facts = [
        ("target", header.target),
        ("model", f"{header.model}, {header.precision}"),
        *(("", line) for line in unseen),
        ("images", f"{len(eval_set)}: {eval_set.images}"),
        ("reference", eval_set.reference),
    ]
    for name, value in facts:
        yield Text(_wrapped(f"{name:<11}{value}", width, 11))


def _evidence(item: RunResult, width: int, *, in_full: bool) -> Iterator[RenderableType]:
    """A run's figures: a table for each output, or only a line for each where a second run tells nothing new."""
    from rich.text import Text

    yield ""
    batches = f", batches of {and_listed(sorted(set(item.batches)))}" if item.batches else ""
    yield Text(_wrapped(f"{item.ran[0].upper()}{item.ran[1:]}{batches}", width, 2), style="bold")
    if item.left_out:
        yield Text(_wrapped(item.left_out, width, 0))
    if not in_full:
        yield from (
            Text(printable(_line(output, item.bounds.outputs[output.name]))) for output in item.comparison.outputs
        )
        return
    for output in item.comparison.outputs:
        yield _output_table(output, item.bounds.outputs.get(output.name), width)
    for index in item.comparison.indices:
        yield _table(f"{index.name} {index.dtype} {_shape(index.shape)}", _index_rows(index), width)
    follow = len(item.bounds.outputs) > 1 + len(item.bounds.others)
    others = " Other outputs: what follows from the logits' largest error." if follow else ""
    yield Text(_wrapped(f"Allowed: {item.bounds.sentence}.{others}", width, 9))
    for name, derivation in item.bounds.others.items():
        yield Text(_wrapped(f"Allowed of {name}: {derivation['sentence']}.", width, 9))


def _line(output: OutputComparison, allowed: Tolerance) -> str:
    flips = f", {len(output.scores.flips)} change class" if output.scores is not None else ""
    return f" {output.name:<14} relative L2 {output.rel_l2_worst:.2e} of {allowed.rel_l2:.2e} allowed{flips}"


def _output_table(output: OutputComparison, tolerance: Tolerance | None, width: int) -> Table:
    return _table(f"{output.name} {output.dtype} {_shape(output.shape)}", _output_rows(output, tolerance), width)


def _shape(extents: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in extents)


_FIRST_COLUMN = 30


def _table(title: str, rows: Iterable[Row], width: int) -> Table:
    """A table; where the last column has no room, its text stands below the row."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    is_narrow = width < WIDTH
    table = Table(box=SIMPLE_HEAD, pad_edge=True, show_edge=False, header_style="bold")
    table.add_column(
        printable(title),
        no_wrap=not is_narrow and len(title) <= _FIRST_COLUMN,
        overflow="fold",
        width=None if is_narrow else _FIRST_COLUMN,
    )
    table.add_column("measured", justify="right", no_wrap=True, width=11)
    table.add_column("allowed", justify="right", no_wrap=True, width=11)
    if not is_narrow:
        table.add_column("where", overflow="ellipsis", no_wrap=True, width=18 + width - WIDTH)
    for *cells, where in rows:
        table.add_row(*cells, *([] if is_narrow else [printable(where)]))
        if is_narrow and where:
            table.add_row(f"  {printable(where)}")
    return table


def _output_rows(output: OutputComparison, tolerance: Tolerance | None) -> Iterator[Row]:
    worst = output.worst_name or f"image {output.worst_image}"
    allowed = tolerance or Tolerance(0.0)
    yield "relative L2, worst image", f"{output.rel_l2_worst:.2e}", f"{allowed.rel_l2:.2e}", worst
    yield "relative L2, all images", f"{output.rel_l2:.2e}", "", ""
    yield "max absolute error", f"{output.max_abs:.2e}", _number(allowed.max_abs, ".2e"), ""
    yield "mean absolute error", f"{output.mean_abs:.2e}", "", ""
    yield "cosine, worst image", f"{output.cosine_worst:.8f}", _number(allowed.cosine_min, ".8f"), ""
    yield "signal to noise", f"{output.snr_db:.1f} dB", "", ""
    if output.scores is not None:
        yield from _score_rows(output.scores, allowed, output.shape[0])


def _score_rows(scores: ScoreComparison, allowed: Tolerance, images: int) -> Iterator[Row]:
    yield "top-1 agreement", f"{scores.top1_agreement:.2%}", "", ""
    if scores.top5_agreement is not None:
        yield "top-5 agreement", f"{scores.top5_agreement:.2%}", "", ""
    yield "KL divergence, mean", f"{scores.kl_mean:.1e} nat", "", ""
    yield "KL divergence, worst", f"{scores.kl_worst:.1e} nat", "", ""
    changed = f"{len(scores.flips)} of {images}"
    yield "images that change class", changed, f"{allowed.flip_margin:.2e}", "up to this margin"
    for flip in scores.flips[:_FLIPS_SHOWN]:
        name = flip.name or f"image {flip.image}"
        classes = f"  {flip.reference_class} to {flip.candidate_class}, margin"
        yield classes, f"{flip.reference_margin:.2e}", "", name
    if len(scores.flips) > _FLIPS_SHOWN:
        yield f"  and {len(scores.flips) - _FLIPS_SHOWN} more", "", "", ""


def _index_rows(index: IndexComparison) -> Iterator[Row]:
    yield "equal", f"{index.agreement:.2%}", "ties only", f"ranks {index.ranks}" if index.ranks else ""
    for difference in index.differences[:_FLIPS_SHOWN]:
        gap = "no tie" if difference.gap is None else f"gap {difference.gap:.1e}"
        name = difference.name or f"image {difference.image}"
        yield f"  rank {difference.rank}: {difference.candidate} for {difference.reference}", gap, "", name
    if len(index.differences) > _FLIPS_SHOWN:
        yield f"  and {len(index.differences) - _FLIPS_SHOWN} more", "", "", ""


def _accuracy(accuracy: Accuracy, width: int) -> Iterator[RenderableType]:
    """Top-1 and top-5 of both models, and the conclusions."""
    from rich.text import Text

    measured = accuracy.measured
    yield ""
    yield Text(_wrapped(f"Accuracy of: {accuracy.ran}, with labels from {accuracy.labels}", width, 2), style="bold")
    table = _accuracy_table(measured.images, is_narrow=width < WIDTH)
    for name, reference, candidate, drop, interval in _accuracy_rows(measured):
        limits = f"{interval[0]:.2f} to {interval[1]:.2f}"
        table.add_row(name, f"{reference:.2%}", f"{candidate:.2%}", f"{drop:.2f}", limits)
    yield table
    for sentence in accuracy.sentences:
        yield Text(_wrapped(f"- {sentence}", width, 2))


def _accuracy_rows(measured: PairedAccuracy) -> Iterator[tuple[str, float, float, float, tuple[float, float]]]:
    top1 = measured.top1_reference, measured.top1_candidate
    yield "top-1", *top1, measured.drop_points, measured.interval
    top5 = measured.top5_reference, measured.top5_candidate, measured.top5_drop_points, measured.top5_interval
    reference, candidate, drop, interval = top5
    if reference is not None and candidate is not None and drop is not None and interval is not None:
        yield "top-5", reference, candidate, drop, interval


def _accuracy_table(images: int, *, is_narrow: bool) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=True, show_edge=False, header_style="bold")
    table.add_column(f"{images:,} labelled images", no_wrap=not is_narrow, width=None if is_narrow else 24)
    for name, usual in (("PyTorch", 9), ("candidate", 9), ("drop", 7), ("95 % interval", 18)):
        table.add_column(name, justify="right", no_wrap=True, width=None if is_narrow else usual)
    return table


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _wrapped(text: str, width: int, indent: int) -> str:
    return textwrap.fill(
        printable(text), width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
