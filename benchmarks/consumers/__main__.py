"""Who can read our graphs: loads, right, or the error of each runtime for each graph. Writes graph/consumers.json.

    python -m benchmarks.consumers                      # all: 72 graphs, 14 runtimes, half an hour on two cores
    python -m benchmarks.consumers --cache build/consumers --only OpenCV    # of other runtimes, what was known stays
    python -m benchmarks.consumers --page               # docs/runtimes.md alone, from what is known

Each runtime comes from PyPI or npm into an environment of its own (3 GB together), and runs each bundle's golden images
on one thread, one image at a time and all at once. An answer is right where every image's relative L2 to the bundle's
reference is within its tolerance for the graph. Needs Python 3.11 or 3.12 (ONNX Runtime 1.17 has no wheel for later
ones), node and npm.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.consumers.graphs import Case, bundle, cases
from benchmarks.consumers.page import PAGE, page
from benchmarks.consumers.runtimes import RUNTIMES, Answer, Question, Runtime, answers, reason
from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.outputs import LOGITS
from spach_deploy.bundle.store import GOLDEN, GRAPH, Bundle
from spach_deploy.common.metrics import relative_l2
from spach_deploy.graph.runtimes import CONSUMERS, GraphNeeds

ABOUT = (
    "What runtimes made of small graphs of every family on a CPU, written by benchmarks/consumers. A graph's `allowed`"
    " is its tolerance, relative L2 of the worst image; an answer is that relative L2, or the runtime's words."
)


def entry(case: Case, made: Bundle) -> dict[str, Any]:
    """A graph, as consumers.json has it."""
    needs = GraphNeeds.of(made.file(GRAPH))
    assert needs is not None
    return {
        "family": case.stack,
        "form": case.form,
        "precision": case.precision,
        "opset": needs.opset,
        "ir": needs.ir,
        "formats": sorted(needs.formats),
        "bfloat16": sorted(needs.bfloat16),
        "operators": sorted(needs.operators),
        "allowed": _short(made.manifest.validation.tolerances.graph.outputs[LOGITS].rel_l2),
    }


def question(made: Bundle) -> Question:
    """The bundle's graph and golden images, for a client."""
    images = Golden.load(made.file(GOLDEN)).input
    file = made.path.parent / f"{made.path.name}.images"
    images.astype(np.float32).tofile(file)
    return {"graph": str(made.file(GRAPH)), "images": str(file), "shape": images.shape}


def judged(made: Bundle, found: Iterable[Answer]) -> str | float:
    """Of all runs of a bundle's graph: the error's words, or the worst relative L2 of any image."""
    errors = []
    reference = Golden.load(made.file(GOLDEN)).outputs[LOGITS]
    for answer in found:
        if "error" in answer:
            words = reason(str(answer["error"]))
            return words if answer["batch"] == 1 else f"at {answer['batch']} images at once: {words}"
        logits = np.array(answer["logits"], np.float32)  # null, of JavaScript, is NaN
        if logits.shape != reference.shape or not np.isfinite(logits).all():
            return f"its answer has the shape {logits.shape}, or numbers that are not finite"
        errors += [relative_l2(own, right) for own, right in zip(logits, reference, strict=True)]
    return _short(max(errors))


def _short(number: float) -> float:
    return float(f"{number:.2g}")


def tried(runtime: Runtime, made: dict[str, Bundle], cache: Path) -> dict[str, Any]:
    """A runtime, as consumers.json has it."""
    found = answers(runtime.command(cache), [question(own) for own in made.values()])
    told = {
        name: judged(own, [line for line in found if line["graph"] == str(own.file(GRAPH))])
        for name, own in made.items()
    }
    return {"name": runtime.name, "package": runtime.package, "version": runtime.version, "answers": told}


def written(content: dict[str, Any]) -> None:
    """Save consumers.json: a line for each graph, so that a change can be read; and the page."""
    lines = [f' "{name}": {json.dumps(content[name])},' for name in ("about", "read")]
    graphs = [f'  "{name}": {json.dumps(own)}' for name, own in content["graphs"].items()]
    lines += [' "graphs": {', ",\n".join(graphs), " },", ' "runtimes": [']
    runtimes = []
    for own in content["runtimes"]:
        head = json.dumps({key: value for key, value in own.items() if key != "answers"})[:-1]
        told = [f'   "{name}": {json.dumps(answer)}' for name, answer in own["answers"].items()]
        runtimes.append(f'  {head}, "answers": {{\n' + ",\n".join(told) + "\n  }}")
    CONSUMERS.write_text("\n".join(["{", *lines, ",\n".join(runtimes), " ]", "}", ""]), encoding="utf-8")
    PAGE.write_text(page(content), encoding="utf-8")


def measured(cache: Path, only: Sequence[str], known: dict[str, Any]) -> dict[str, Any]:
    """The content of consumers.json: of runtimes that are not asked for, what was `known`."""
    made = {}
    for case in cases():
        print(case.folder, flush=True)
        made[case.folder] = bundle(case, cache / "bundles")
    graphs = {case.folder: entry(case, made[case.folder]) for case in cases()}
    before = {(own["name"], own["version"]): own for own in known.get("runtimes", ())}
    runtimes = []
    for runtime in RUNTIMES:
        print(runtime, flush=True)
        is_asked = not only or runtime.name in only
        found = tried(runtime, made, cache) if is_asked else before.get((runtime.name, runtime.version))
        runtimes += [found] if found is not None else []
    today = datetime.datetime.now(datetime.timezone.utc).date()
    return {"about": ABOUT, "read": str(today), "graphs": graphs, "runtimes": runtimes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep bundles and environments there")
    parser.add_argument("--only", nargs="+", default=(), metavar="RUNTIME", choices=sorted({r.name for r in RUNTIMES}))
    parser.add_argument("--page", action="store_true", help="only write docs/runtimes.md from graph/consumers.json")
    arguments = parser.parse_args()
    known = json.loads(CONSUMERS.read_text(encoding="utf-8")) if CONSUMERS.exists() else {}
    if arguments.page:
        PAGE.write_text(page(known), encoding="utf-8")
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        cache = (arguments.cache or Path(temporary)).resolve()
        cache.mkdir(parents=True, exist_ok=True)
        written(measured(cache, arguments.only, known))


if __name__ == "__main__":
    main()
