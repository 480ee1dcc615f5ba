"""What was compared with what, and every figure of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from spach_deploy.models.hyperparameters import lines, read_section
from spach_deploy.report.content import Json, ReportContent
from spach_deploy.report.formats import count, percent, plural, scientific, sentence
from spach_deploy.report.sections.verdict import flips_of
from spach_deploy.validation.runs import and_listed

Row = tuple[str, str, str, str]


def view(content: ReportContent) -> dict[str, Any]:
    """Facts by name, and a table per run and output."""
    return {"facts": list(_facts(content)), "runs": [_run(item) for item in content.evidence]}


def _facts(content: ReportContent) -> Iterator[tuple[str, str]]:
    report, model = content.report, content.section("model")
    yield "Candidate", sentence(str(content.first.get("ran", "nothing ran")))
    yield "Reference", sentence(str(report["reference"]))
    yield "Model", ", ".join(_model(report, model))
    yield "Weights", _weights(report, model)
    if settings := lines(read_section(report.get("hyperparameters"))):
        yield "Not in the weights", sentence("; ".join(settings))
    images = report["images"]
    yield "Images", f"{plural(images['count'], 'image')}: {images['description']}."
    batches = sorted(set(content.first.get("batches", ())))
    if batches:
        yield "Batches", " ".join(filter(None, (f"Sizes {and_listed(batches)}.", content.first.get("left_out"))))
    derivation = content.first.get("tolerances", {}).get("derivation", {})
    if derivation:
        yield "Tolerance", sentence(str(derivation["sentence"]))


def _model(report: Json, model: Json) -> Iterator[str]:
    yield str(report["model"])
    yield str(report["precision"]).upper()
    if model:
        yield f"{model['image_size']} px"
        yield f"{count(model['num_classes'])} classes"


def _weights(report: Json, model: Json) -> str:
    if report.get("is_demo"):
        return "Demo weights, made up and not trained: the comparison is as strict, the answers mean nothing."
    return f"From {model.get('checkpoint') or 'a checkpoint'} ({model.get('weights', 'model')})."


def _run(item: Json) -> dict[str, Any]:
    comparison, bounds = item["comparison"], item["tolerances"]["outputs"]
    outputs = [
        {
            "name": output["name"],
            "form": f"{output['dtype']} {' × '.join(map(str, output['shape']))}",
            "rows": list(_rows(output, bounds.get(output["name"]) or {})),
        }
        for output in comparison["outputs"]
    ]
    return {
        "ran": sentence(str(item["ran"])),
        "passed": bool(item["passed"]),
        "outputs": outputs,
        "indices": [_index(index) for index in comparison["indices"]],
        "problems": list(comparison["problems"]),
    }


def _rows(output: Json, bounds: Json) -> Iterator[Row]:
    """Figure, measured, allowed, and where or what that is."""
    worst = str(output["worst_name"] or f"image {output['worst_image']}")
    yield "Relative L2, worst image", scientific(output["rel_l2_worst"]), scientific(bounds.get("rel_l2")), worst
    yield "Relative L2, all images", scientific(output["rel_l2"]), "", ""
    yield "Largest absolute error", scientific(output["max_abs"]), _optional(bounds.get("max_abs"), ".2e"), ""
    yield "Mean absolute error", scientific(output["mean_abs"]), "", ""
    cosine = _optional(bounds.get("cosine_min"), ".8f")
    yield "Cosine, worst image", f"{float(output['cosine_worst']):.8f}", cosine, ""
    yield "Signal to noise", f"{float(output['snr_db']):.1f} dB", "", ""
    if output.get("scores"):
        yield from _scores(output, bounds)


def _scores(output: Json, bounds: Json) -> Iterator[Row]:
    scores = output["scores"]
    yield "Top-1 agreement", percent(scores["top1_agreement"]), "", ""
    if scores["top5_agreement"] is not None:
        yield "Top-5 agreement", percent(scores["top5_agreement"]), "", ""
    yield "KL divergence, mean", f"{float(scores['kl_mean']):.1e} nat", "", ""
    yield "KL divergence, worst", f"{float(scores['kl_worst']):.1e} nat", "", ""
    changed = f"{len(flips_of(output))} of {output['shape'][0]}"
    yield "Images that change class", changed, _optional(bounds.get("flip_margin"), ".2e"), "allowed up to this margin"


def _index(index: Json) -> dict[str, Any]:
    return {
        "name": index["name"],
        "form": f"{index['dtype']} {' × '.join(map(str, index['shape']))}",
        "agreement": percent(index["agreement"]),
        "ranks": index["ranks"],
        "differences": len(index["differences"]),
    }


def _optional(value: Any, form: str) -> str:
    return "" if value is None else format(float(value), form)
