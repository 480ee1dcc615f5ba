"""docs/runtimes.md, from what consumers.json holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spach_deploy.graph.runtimes import problem_of

PAGE = Path(__file__).parents[2] / "docs" / "runtimes.md"
_PRECISIONS = ("fp32", "fp16", "int8", "int8 in fp32", "bf16", "fp8")
_FORMS = ("cpu", "tensorrt")
_HEAD = """# Which runtimes read the graphs

Written by `benchmarks/consumers` from `spach_deploy/graph/consumers.json`, which `spach-doctor BUNDLE` and
`spach-package` read too. Small models of every family ({families})
were exported in every precision, with `--engine none` (*cpu*) and in the form for TensorRT (*tensorrt*), and
each runtime, from PyPI or npm, ran the bundles' golden images on a CPU, one at a time and all at once, on {read}.
*int8* keeps the rest in FP16, *int8 in fp32* is `--int8 --rest fp32`.

- **right**: of every family, every image within the bundle's tolerance for its graph.
- **refused**: of every family; the runtime's words are below.
- **5 of 6**: right for so many families; what happened to the others is below.

Of a graph with operators that none of these has (`--top-k`, many modules of your own), of other inputs
(`--io-dtype`) or of another `--opset` the table says nothing, and neither does the doctor: try it.
"""


def page(content: Mapping[str, Any]) -> str:
    """The page's text."""
    graphs, runtimes = content["graphs"], content["runtimes"]
    families = list(dict.fromkeys(own["family"] for own in graphs.values()))
    lines = [_HEAD.format(families=", ".join(families), read=content["read"])]
    headings = [(precision, form) for precision in _PRECISIONS for form in _FORMS]
    lines.append(f"| runtime | {' | '.join(f'{precision}, {form}' for precision, form in headings)} |")
    lines.append("|---" * (len(headings) + 1) + "|")
    for runtime in runtimes:
        cells = [_cell(graphs, runtime["answers"], *heading) for heading in headings]
        lines.append(f"| {_name(runtime)} | {' | '.join(cells)} |")
    lines += ["", "## What was not right", "", *_problems(graphs, runtimes)]
    lines += ["", "## Opset and IR version", "", *_versions(graphs)]
    return "\n".join([*lines, ""])


def _name(runtime: Mapping[str, Any]) -> str:
    return f"{runtime['name']} {runtime['version']}"


def _of(graphs: Mapping[str, Any], precision: str, form: str) -> list[str]:
    return [name for name, own in graphs.items() if (own["precision"], own["form"]) == (precision, form)]


def _cell(graphs: Mapping[str, Any], answers: Mapping[str, Any], precision: str, form: str) -> str:
    names = _of(graphs, precision, form)
    right = sum(not problem_of(answers[name], graphs[name]["allowed"]) for name in names)
    if right == len(names) > 0:
        return "right"
    is_refused = all(isinstance(answers[name], str) for name in names)
    return "refused" if not right and is_refused else f"{right} of {len(names)}"


def _problems(graphs: Mapping[str, Any], runtimes: list[dict[str, Any]]) -> Iterator[str]:
    for runtime in runtimes:
        by_words: dict[str, list[str]] = {}
        for name, answer in runtime["answers"].items():
            if problem := problem_of(answer, graphs[name]["allowed"]):
                by_words.setdefault(problem, []).append(name)
        for words, names in by_words.items():
            which = ", ".join(_shortened(graphs, names))
            yield f"- {_name(runtime)}, {which}: {words.replace('|', '/').replace('*', '')}"


def _shortened(graphs: Mapping[str, Any], names: list[str]) -> Iterator[str]:
    """The precisions of which all graphs are among `names`, then the other names."""
    whole = []
    for precision in _PRECISIONS:
        own = {name for name, entry in graphs.items() if entry["precision"] == precision}
        if own and own <= {*names}:
            whole.append(precision)
    yield from whole
    yield from sorted(name for name in names if graphs[name]["precision"] not in whole)


def _versions(graphs: Mapping[str, Any]) -> Iterator[str]:
    yield "| precision | opset | IR version |"
    yield "|---|--:|--:|"
    for precision in _PRECISIONS:
        found = {(own["opset"], own["ir"]) for own in graphs.values() if own["precision"] == precision}
        opsets, versions = (sorted({pair[index] for pair in found}) for index in (0, 1))
        yield f"| {precision} | {', '.join(map(str, opsets))} | {', '.join(map(str, versions))} |"
