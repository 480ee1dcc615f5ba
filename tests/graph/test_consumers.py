"""What runtimes made of graphs is one table: the page shows it, the doctor reads it, and advice on Triton agrees."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from benchmarks.consumers.graphs import FORMS, PRECISIONS, STACKS
from benchmarks.consumers.page import PAGE, page
from benchmarks.consumers.runtimes import RUNTIMES
from spach_deploy.bundle.store import GRAPH
from spach_deploy.graph.editing import as_proto
from spach_deploy.graph.passes.tokens_first import tokens_first
from spach_deploy.graph.runtimes import (
    CONSUMERS,
    WEIGHT_SPLIT,
    GraphNeeds,
    Reader,
    Trial,
    needs_of_entry,
    readers,
    reading,
    runtimes,
    version_numbers,
)
from spach_deploy.options.specs import Precision
from tests import small_bundles, static_models
from tests.quantization import small_quantized

CONTENT: dict[str, Any] = json.loads(CONSUMERS.read_text(encoding="utf-8"))
OLDEST_IN_IMAGES = (1, 18)


def needs(family: str, form: str, precision: str, **changed: Any) -> GraphNeeds:
    """Of a graph of the table, with some entries changed."""
    found = next(
        own
        for own in CONTENT["graphs"].values()
        if (own["family"], own["form"], own["precision"]) == (family, form, precision)
    )
    return needs_of_entry({**found, **changed})


def test_the_table_has_every_graph_and_every_runtime() -> None:
    entries = [(own["family"], own["form"], own["precision"]) for own in CONTENT["graphs"].values()]
    assert sorted(entries) == sorted((stack, form, kind) for stack in STACKS for form in FORMS for kind in PRECISIONS)
    asked = [(runtime.name, runtime.version) for runtime in RUNTIMES]
    assert [(own["name"], own["version"]) for own in CONTENT["runtimes"]] == asked
    assert all(own["answers"].keys() == CONTENT["graphs"].keys() for own in CONTENT["runtimes"])


def test_the_page_shows_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(CONTENT)


def test_what_is_said_of_tritons_images_is_what_their_onnx_runtime_did() -> None:
    known, seen = runtimes(), set()
    for reader in readers():
        row = known.onnxruntime(reader.version)
        if reader.name != "ONNX Runtime" or version_numbers(reader.version) < OLDEST_IN_IMAGES or row is None:
            continue
        for trial in reader.trials:
            by_versions = dataclasses.replace(row, tried=None)
            assert bool(by_versions.misfit(trial.needs, on_gpu=False)) == bool(trial.problem), (reader, trial)
            seen.add(bool(trial.problem))
    assert seen == {True, False}


def test_advice_on_onnx_runtime_goes_by_what_the_newest_release_before_it_made_of_graphs() -> None:
    row, asked = runtimes().onnxruntime("1.29.0"), needs("conv", "cpu", "fp16")
    assert row is not None
    assert row.tried is not None
    assert row.tried.version == "1.28.0"
    assert row.misfit(asked, on_gpu=False) == ""
    wrong = Reader("ONNX Runtime", "1.28.0", (Trial(asked, "no kernel for Gelu"),))
    worse = dataclasses.replace(row, tried=wrong)
    assert "ONNX Runtime 1.28.0 does not read such a graph on a CPU: no kernel" in worse.misfit(asked, on_gpu=False)
    assert worse.misfit(asked, on_gpu=True) == ""
    assert worse.misfit(asked.in_fp32(), on_gpu=False) == ""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", STACKS)
def test_fp32_fp16_and_int8_are_read_by_all_but_one(family: str, form: str) -> None:
    for precision in ("fp32", "fp16", "int8", "int8 in fp32"):
        asked = needs(family, form, precision)
        problems = {f"{reader.name} {reader.version}" for reader in readers() if reader.misfit(asked) != ""}
        assert problems == ({"OpenVINO 2024.6.0"} if precision == "int8" else set()), precision  # it has no FP16 scales


def test_a_graph_is_read_by_those_that_read_graphs_like_it() -> None:
    told = reading(needs("hybrid", "tensorrt", "fp8"))
    assert told.startswith("ONNX Runtime from 1.20, ")
    assert "; not OpenCV" in told
    assert reading(needs("conv", "cpu", "bf16")).startswith("no runtime that was tried, not ONNX Runtime")


@pytest.mark.parametrize(
    "changed",
    [
        {"opset": 17},
        {"ir": 8},
        {"formats": ["fp16", "FLOAT16 input"]},
        {"operators": ["Conv", "TopK"]},
        {"operators": []},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_of_a_graph_unlike_all_that_were_tried_nothing_is_said(changed: dict[str, Any]) -> None:
    assert reading(needs("conv", "cpu", "fp16"))
    assert reading(needs("conv", "cpu", "fp16", **changed)) == ""


@pytest.mark.parametrize(("precision", "formats"), [(Precision.FP32, set()), (Precision.FP16, {"fp16"})])
def test_formats_and_operators_are_read_from_a_graph(precision: Precision, formats: set[str]) -> None:
    found = GraphNeeds.of(small_bundles.bundle(precision) / GRAPH)
    assert found is not None
    assert found.formats == formats
    assert {"Conv", "Gemm", "Softmax"} <= found.operators


@pytest.mark.parametrize(("precision", "eight"), [(Precision.INT8, "int8"), (Precision.FP8, "fp8")])
def test_eight_bits_are_formats_too(precision: Precision, eight: str) -> None:
    found = GraphNeeds.of(small_quantized.bundle(precision) / GRAPH)
    assert found is not None
    assert found.formats == {eight, "fp16"}


def test_a_split_of_a_weight_is_no_graph_that_was_tried() -> None:
    model = ir.from_proto(onnx.load_from_string(static_models.canonical_bytes("trans")))
    tokens_first(model)
    found = GraphNeeds.of(as_proto(model).SerializeToString())
    assert found is not None
    assert WEIGHT_SPLIT in found.operators
    assert reading(found) == ""
