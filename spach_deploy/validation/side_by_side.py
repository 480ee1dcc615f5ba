"""Compare two bundles: each with PyTorch by its own tolerances, both with each other, and what differs between them.

`as_text` gives the comparison as a table for the terminal.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from spach_deploy._version import __version__
from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.outputs import model_outputs, roles_of
from spach_deploy.bundle.schema import KernelsEntry, Manifest, TensorInfo
from spach_deploy.bundle.store import GOLDEN, Bundle
from spach_deploy.common.errors import UsageError, printable
from spach_deploy.common.text import Escaped, noun, rendered
from spach_deploy.options.specs import Role, size_in_words
from spach_deploy.validation.accuracy import ImagePredictions, notable_predictions
from spach_deploy.validation.compare import OutputComparison, compare_outputs
from spach_deploy.validation.result import REPORT_VERSION, Provenance, Validation
from spach_deploy.validation.table import DEMO_WARNING, WIDTH
from spach_deploy.validation.target import ValidationRequest, validate_target

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Fact:
    """A fact about both bundles, in words; "" where one has none."""

    name: str
    first: str
    second: str

    @property
    def differs(self) -> bool:
        """Whether the bundles differ in it."""
        return self.first != self.second


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two bundles, and its validation against PyTorch."""

    bundle: Bundle
    validation: Validation

    @property
    def output(self) -> TensorInfo:
        """The output that is compared: the first that the model computes, of a classifier its logits."""
        return model_outputs(self.bundle.manifest.outputs)[0]

    @property
    def values(self) -> np.ndarray[Any, Any] | None:
        """That output of its first run."""
        return self.validation.evidence[0].outputs.get(self.output.name) if self.validation.evidence else None

    @property
    def bound(self) -> float:
        """The relative L2 that this output may have against PyTorch."""
        return self.validation.evidence[0].bounds.outputs[self.output.name].rel_l2


@dataclasses.dataclass(frozen=True)
class SideBySide:
    """Two bundles compared.

    `direct`: the second's logits (without them: first output) against the first's, None without common images.
    `answers`: images on which they differ, or nearly. `layers`: modules whose precision differs. `allowed`: relative L2
    between them that both bounds together allow, None where their weights differ.
    """

    first: Side
    second: Side
    facts: tuple[Fact, ...]
    layers: tuple[Fact, ...]
    direct: OutputComparison | None
    answers: tuple[ImagePredictions, ...]
    allowed: float | None
    notes: tuple[str, ...]
    run: Provenance | None = None

    @property
    def findings(self) -> tuple[str, ...]:
        """Everything that is wrong."""
        found = [f"{side.bundle.path}: {text}" for side in self.sides for text in side.validation.all_findings]
        if self.direct is not None and self.allowed is not None and not self.direct.rel_l2_worst <= self.allowed:
            worst = f"{self.direct.rel_l2_worst:.2e} in {self.direct.worst_name or self.direct.worst_image}"
            found.append(f"They differ from each other by {worst}; both bounds together allow {self.allowed:.2e}.")
        return tuple(found)

    @property
    def sides(self) -> tuple[Side, Side]:
        """Both sides."""
        return self.first, self.second

    @property
    def passed(self) -> bool:
        """Whether both agree with PyTorch and, as far as that implies it, with each other."""
        return not self.findings and all(side.validation.passed for side in self.sides)

    @property
    def exit_code(self) -> int:
        """0 both agree; 1 one does not; 3 they agree as far as this machine can tell."""
        return max(side.validation.exit_code for side in self.sides) if self.passed else 1

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "report_version": REPORT_VERSION,
            "kind": "side by side",
            "spach_deploy": __version__,
            "passed": self.passed,
            "exit_code": self.exit_code,
            "findings": list(self.findings),
            "notes": list(self.notes),
            "facts": [dataclasses.asdict(fact) for fact in self.facts],
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "direct": None if self.direct is None else self.direct.to_dict(),
            "allowed": self.allowed,
            "answers": [answer.to_dict() for answer in self.answers],
            "first": self.first.validation.to_dict(),
            "second": self.second.validation.to_dict(),
            "run": None if self.run is None else self.run.to_dict(),
        }


def compare_bundles(first: ValidationRequest, second: ValidationRequest, say: Say) -> SideBySide:
    """Validate both bundles and compare them. The requests differ only in their targets.

    Raises UsageError where they cannot be compared: no bundles, other classes, other image sizes.
    """
    bundles = [_bundle(request.target) for request in (first, second)]
    _check_comparable(*bundles)
    say(f"Validating {bundles[0].path}.")
    validations = [validate_target(first, say)]
    say(f"Validating {bundles[1].path}.")
    validations.append(validate_target(second, say))
    sides = [Side(bundle, validation) for bundle, validation in zip(bundles, validations, strict=True)]
    return _compared(sides[0], sides[1], is_on_images=first.images is not None)


def _bundle(target: Path) -> Bundle:
    if not target.is_dir():
        raise UsageError(f"{target} is no bundle's directory.", "Two bundles are compared as a whole.")
    return Bundle.open(target, verify=False)


def _check_comparable(first: Bundle, second: Bundle) -> None:
    for what in (_classes, _images):
        theirs = [what(bundle.manifest) for bundle in (first, second)]
        if theirs[0] != theirs[1]:
            raise UsageError(
                f"{first.path} has {theirs[0]} and {second.path} has {theirs[1]}.",
                "Only answers to the same question can be compared.",
            )


def _classes(manifest: Manifest) -> str:
    return f"{manifest.model.num_classes} {noun(manifest.model.num_classes, 'class')}"


def _images(manifest: Manifest) -> str:
    size = size_in_words(manifest.model.image_size)
    channels = manifest.preprocessing.channels
    return f"images of {size} pixels" + (f" and {channels} channels" if channels != 3 else "")


def _compared(first: Side, second: Side, *, is_on_images: bool) -> SideBySide:
    notes: list[str] = []
    is_same = first.bundle.manifest.model.weights_sha256 == second.bundle.manifest.model.weights_sha256
    if not is_same:
        notes.append("Their weights differ, so their answers may too; each is held to its own reference.")
    direct: OutputComparison | None = None
    answers: tuple[ImagePredictions, ...] = ()
    if not is_on_images and not _has_same_images(first.bundle, second.bundle):
        notes.append("Their golden images differ: give --images to compare their answers with each other.")
    elif not _have_alike(first, second):
        notes.append("There are no two sets of logits to compare with each other.")
    else:
        direct, answers = _compared_directly(first, second)
    return SideBySide(
        first=first,
        second=second,
        facts=tuple(_facts(first, second)),
        layers=tuple(_layers(first.bundle, second.bundle)),
        direct=direct,
        answers=answers,
        allowed=first.bound + second.bound if is_same and direct is not None else None,
        notes=tuple(notes),
    )


def _have_alike(first: Side, second: Side) -> bool:
    """Whether both gave an output of one role and shape."""
    values = first.values, second.values
    return (
        values[0] is not None
        and values[1] is not None
        and ((first.output.role, values[0].shape) == (second.output.role, values[1].shape))
    )


def _compared_directly(first: Side, second: Side) -> tuple[OutputComparison | None, tuple[ImagePredictions, ...]]:
    """The second's output against the first's, and of logits the images on which they differ, or nearly."""
    ours, theirs, names = first.values, second.values, first.validation.eval_set.names
    assert ours is not None
    assert theirs is not None
    name = first.output.name
    roles = roles_of([first.output])
    compared = compare_outputs({name: ours}, {name: theirs}, image_names=names, roles=roles)
    answers = notable_predictions(ours, theirs, names) if first.output.role is Role.LOGITS else ()
    return next(iter(compared.outputs), None), answers


def _has_same_images(first: Bundle, second: Bundle) -> bool:
    """Whether both golden packs have the same images: by name, and by pixels where these can be compared."""
    packs = [Golden.load(bundle.path / GOLDEN) for bundle in (first, second)]
    if packs[0].names != packs[1].names:
        return False
    mine, theirs = packs[0], packs[1]
    if mine.others.keys() != theirs.others.keys():
        return False
    pairs = [(mine.input, theirs.input), *((array, theirs.others[name]) for name, array in mine.others.items())]
    return all(_is_same(*pair) for pair in pairs)


def _is_same(mine: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> bool:
    """Whether two inputs are the same; one in uint8 cannot be told from one that is normalized."""
    if mine.dtype == theirs.dtype:
        return bool(np.array_equal(mine, theirs))
    kinds = {mine.dtype.kind, theirs.dtype.kind}
    return "u" in kinds or bool(np.allclose(mine.astype(np.float32), theirs.astype(np.float32), atol=1e-2))


# What differs


def _facts(first: Side, second: Side) -> Iterator[Fact]:
    for name, words in _FACTS.items():
        values = [words(side.bundle.manifest) for side in (first, second)]
        if any(values):
            yield Fact(name, values[0], values[1])


def _megabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:,.1f} MB"


def _kernels(manifest: Manifest) -> KernelsEntry:
    return manifest.engine.kernels or KernelsEntry()


def _moved(manifest: Manifest) -> str:
    moved = _kernels(manifest).bytes_moved
    return "" if moved is None else f"{moved / 1e6:,.0f} MB"


_FACTS: dict[str, Callable[[Manifest], str]] = {
    "model": lambda manifest: manifest.model.name,
    "weights": lambda manifest: f"{manifest.model.origin} {manifest.model.weights_sha256[:12]}",
    "precision": lambda manifest: manifest.precision.asked.value,
    "rest": lambda manifest: _told(manifest.precision.rest and manifest.precision.rest.value),
    "engine": lambda manifest: f"{manifest.engine.flavour.value} {manifest.engine.version}".strip(),
    "GPUs": lambda manifest: ", ".join(manifest.engine.gpus),
    "batch": lambda manifest: str(manifest.batch),
    "input and output": lambda manifest: manifest.output_options.io_dtype.value,
    "plan": lambda manifest: _megabytes(manifest.engine.bytes),
    "kernels": lambda manifest: _told(_kernels(manifest).total),
    "fused attentions": lambda manifest: _told(_kernels(manifest).fused_attentions),
    "moved at batch 8": _moved,
    "graph nodes": lambda manifest: _told(manifest.graph.certificate.nodes),
    "exported": lambda manifest: manifest.created,
    "by": lambda manifest: ", ".join(f"{name} {version}" for name, version in _tools(manifest)),
}


def _told(value: object) -> str:
    return "" if value is None else str(value)


def _tools(manifest: Manifest) -> list[tuple[str, str]]:
    wanted = ("spach-deploy", "spach_deploy", "torch", "onnxruntime", "tensorrt-rtx", "tensorrt")
    return [(name, manifest.tools[name]) for name in wanted if manifest.tools.get(name)]


def _layers(first: Bundle, second: Bundle) -> Iterator[Fact]:
    """Modules whose weights have another precision in one of the two."""
    mine, theirs = (_precisions(bundle.manifest) for bundle in (first, second))
    for module in {**mine, **theirs}:
        fact = Fact(module, mine.get(module, ""), theirs.get(module, ""))
        if fact.differs and fact.first and fact.second:
            yield fact


def _precisions(manifest: Manifest) -> dict[str, str]:
    return {layer.module: layer.asked for layer in manifest.precision.layers}


_SHOWN = 6
Row = tuple[str, str, str]


def as_text(compared: SideBySide, *, width: int = WIDTH, color: bool = False) -> Escaped:
    """The whole table as text, without a newline at its end. `color`: with terminal colours."""
    return rendered(_parts(compared, width), width=width, color=color)


def _parts(compared: SideBySide, width: int) -> Iterator[RenderableType]:
    from rich.text import Text

    if any(side.validation.header.is_demo for side in compared.sides):
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
    """The figures of each bundle against PyTorch."""
    columns = [_figures(side) for side in compared.sides]
    for name in columns[0]:
        yield name, columns[0][name], columns[1].get(name, "")


def _figures(side: Side) -> dict[str, str]:
    validation = side.validation
    run = validation.evidence[0] if validation.evidence else None
    output = next((entry for entry in run.comparison.outputs if entry.name == side.output.name), None) if run else None
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
        found["images that flip"] = f"{len(output.scores.flips)} of {len(validation.eval_set)}"
    if validation.accuracy is not None:
        measured = validation.accuracy.measured
        found["top-1 accuracy"] = f"{measured.top1_candidate:.2%} ({measured.top1_reference:.2%} in PyTorch)"
    return found


def _direct(compared: SideBySide) -> Iterator[str]:
    """The two bundles against each other, and the layers in which they differ."""
    direct = compared.direct
    if direct is not None:
        allowed = "" if compared.allowed is None else f" of {compared.allowed:.2e} that both bounds allow"
        flips = direct.scores.flips if direct.scores is not None else ()
        changed = "" if direct.scores is None else f"; {len(flips)} of {direct.shape[0]} images change class"
        error = f"relative L2 {direct.rel_l2_worst:.2e}{allowed}, cosine {direct.cosine_worst:.8f}"
        yield f"Second against first: {error}{changed}."
        for flip in flips[:_SHOWN]:
            name = flip.name or f"image {flip.image}"
            yield f"  {name}: {flip.reference_class} to {flip.candidate_class}, margin {flip.reference_margin:.2e}"
    if compared.layers:
        shown = ", ".join(f"{layer.name} {layer.first} / {layer.second}" for layer in compared.layers[:3])
        more = f" and {len(compared.layers) - 3} more" if len(compared.layers) > 3 else ""
        yield f"{len(compared.layers)} layers are of another precision: {shown}{more}."
