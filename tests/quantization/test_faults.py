"""spach-validate against quantized bundles into which a fault was planted.

The manifest's hashes are brought up to date each time, so that the check itself has to find it. First the graph alone
is changed, and the record of quantization tells; then the record is changed along with it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from onnx import ModelProto

from spach_deploy.blocks import rewrite
from spach_deploy.bundle.store import GRAPH, QUANTIZATION
from spach_deploy.cli.validate import main
from spach_deploy.graph.editing import as_proto
from spach_deploy.graph.export import export_canonical
from spach_deploy.models.demo import load_demo_weights
from spach_deploy.models.spach import Spach
from spach_deploy.options.specs import Precision
from spach_deploy.quantization.formats import INT8
from spach_deploy.quantization.plan import QuantizationPlan, Scaling, read_plan, write_plan
from spach_deploy.quantization.scales import Method
from spach_deploy.quantization.sites import Selection
from tests import small_bundles, static_models
from tests.protos import Collector, candidates, plan_from_statistics
from tests.quantization import faults, small_quantized
from tests.quantization.small_models import inputs
from tests.quantization.small_quantized import ATTENTION

pytestmark = pytest.mark.usefixtures("small_model_registered")

FC1, FIRST = "layer2.1.channel_func.fc1", "layer1.0.channel_func.fc1"
INPUT = "layer2.1.channel_func/Reshape"
QUANTIZED_ATTENTION = ("Split.0", "Transpose_2", "Softmax/to_fp16", "Split.2")

Plant = Callable[[ModelProto], None]
Change = Callable[[QuantizationPlan], QuantizationPlan]


@functools.cache
def record() -> QuantizationPlan:
    return read_plan(small_quantized.bundle(Precision.INT8) / QUANTIZATION)


def weighted() -> Iterable[str]:
    return [site.module for site in record().sites if site.weight]


def stem(tensor: str) -> str:
    return f"{tensor}/to_fp16" if tensor.endswith("Softmax") else tensor


def seal(directory: Path) -> None:
    """Hashes as if the bundle had been exported so."""
    manifest = small_bundles.read_manifest(directory)
    for name in (GRAPH, QUANTIZATION):
        content = (directory / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    small_bundles.write_manifest(directory, manifest)


class Outcome:
    """What spach-validate said: its exit code, findings, whether the numbers agreed, how far the logits are off."""

    def __init__(self, directory: Path) -> None:
        result = CliRunner().invoke(main, [str(directory), "--json"])
        assert "Traceback" not in result.output
        report: dict[str, Any] = json.loads(result.stdout)
        self.code = result.exit_code
        self.findings: list[str] = [f for f in report["findings"] if f.startswith("Quantization: ")]
        self.numbers_agree = all(entry["passed"] for entry in report["evidence"])
        self.rel_l2 = max(entry["comparison"]["outputs"][0]["rel_l2"] for entry in report["evidence"])


def validated(folder: Path, plant: Plant, change: Change | None = None) -> Outcome:
    bundle = small_bundles.copy(small_quantized.bundle(Precision.INT8), folder / "bundle")
    model = small_bundles.load_graph(bundle)
    plant(model)
    small_bundles.save_graph(model, bundle)
    if change is not None:
        write_plan(change(record()), bundle / QUANTIZATION)
    seal(bundle)
    return Outcome(bundle)


# Faults, and the record changed along with each


def scale(factor: float) -> Plant:
    return lambda model: faults.scale_input(model, INPUT, factor)


def recorded(factor: float) -> Change:
    return lambda plan: faults.with_scale(plan, FC1, factor)


def one_scale(factor: float, module: str = FC1) -> tuple[Plant, Change]:
    """With what was seen in the record, too."""
    return (
        lambda model: faults.scale_input(model, faults.site(record(), module).tensors[0].tensor, factor),
        lambda plan: faults.with_scale(plan, module, factor, largest=True),
    )


def all_scales(factor: float) -> tuple[Plant, Change]:
    def plant(model: ModelProto) -> None:
        for module in weighted():
            faults.scale_input(model, faults.site(record(), module).tensors[0].tensor, factor)

    def change(plan: QuantizationPlan) -> QuantizationPlan:
        for module in weighted():
            plan = faults.with_scale(plan, module, factor, largest=True)
        return plan

    return plant, change


def one_weight_scale_zero(model: ModelProto) -> None:
    def change(scales: faults.Float64) -> faults.Float64:
        scales = scales.copy()
        scales[5] = 0
        return scales

    faults.scale_weights(model, FC1, change)


def swap(model: ModelProto) -> None:
    faults.scale_weights(model, FC1, faults.swapped(2, 7))


def swap_recorded(plan: QuantizationPlan) -> QuantizationPlan:
    scales = faults.swapped(2, 7)(np.array(faults.site(plan, FC1).weight_scales))
    return faults.with_site(plan, FC1, weight_scales=tuple(scales.tolist()))


def per_tensor(model: ModelProto) -> None:
    faults.one_scale(model, FC1)


def per_tensor_recorded(plan: QuantizationPlan) -> QuantizationPlan:
    return faults.with_site(plan, FC1, weight_scales=(max(faults.site(plan, FC1).weight_scales),))


def no_pair(*stems: str) -> Plant:
    def plant(model: ModelProto) -> None:
        for entry in stems:
            faults.remove_pair(model, entry)

    return plant


def no_attention_pair(name: str) -> Plant:
    return no_pair(f"{ATTENTION}/{name}")


def shifted(steps: float, modules: Callable[[], Iterable[str]] = lambda: (FC1,)) -> Plant:
    def plant(model: ModelProto) -> None:
        for module in modules():
            faults.shift_weights(model, module, steps)

    return plant


@functools.cache
def of_another_model() -> QuantizationPlan:
    """The record that a model of the same architecture with other weights would have."""
    model = Spach(static_models.ARCHITECTURES["hybrid"]).eval()
    load_demo_weights(model)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data *= torch.exp2(2 * torch.rand(parameter.shape, generator=generator) - 1)
    graph = as_proto(export_canonical(rewrite(model, (), ()).model, small_bundles.SIZE))
    scaling = Scaling(INT8, Method.MAX)
    chosen = candidates(graph, Selection(quantize=(ATTENTION,)), scaling)
    collector = Collector(graph, chosen.wanted, histograms=False, threads=1)
    collector.run({"input": inputs(16)})
    return plan_from_statistics(graph, chosen, collector.statistics, scaling)


def its_input_scales(model: ModelProto) -> None:
    for site in of_another_model().sites:
        for tensor in site.tensors:
            for name in faults.scales_of(model, stem(tensor.tensor)):
                faults.set_values(model, name, np.array(tensor.scale))


def its_scales(model: ModelProto) -> None:
    its_input_scales(model)
    for site in of_another_model().sites:
        if site.weight:
            faults.scale_weights(model, site.module, lambda _, site=site: np.array(site.weight_scales))  # type: ignore[misc]


def its_input_scales_recorded(plan: QuantizationPlan) -> QuantizationPlan:
    for site in of_another_model().sites:
        plan = faults.with_site(plan, site.module, tensors=site.tensors)
    return plan


@functools.cache
def as_exported() -> Outcome:
    return Outcome(small_quantized.bundle(Precision.INT8))


def test_the_bundle_as_it_was_exported_passes(tmp_path: Path) -> None:
    rewritten = validated(tmp_path, lambda model: None, lambda plan: plan)
    for outcome in (as_exported(), rewritten):
        assert (outcome.code, outcome.findings) == (0, [])


# The graph alone is changed


IN_THE_GRAPH: dict[str, tuple[Plant, str]] = {
    "an input's scale twice as large": (scale(2), f"{FC1}: input: scale"),
    "an input's scale half as large": (scale(0.5), f"{FC1}: input: scale"),
    "the scale of v twice as large": (
        lambda model: faults.scale_input(model, f"{ATTENTION}/Split.2", 2),
        f"{ATTENTION}: v: scale",
    ),
    "an input's scale zero": (scale(0), f"{FC1}: input: scale 0,"),
    "a weight's scale zero": (one_weight_scale_zero, f"{FC1}: weights: scale 0, channel 5"),
    "weight scales per tensor": (per_tensor, f"{FC1}: weights: one scale in the graph"),
    "two channels' scales exchanged": (swap, f"{FC1}: weights: scale"),
    "no pair on q": (no_attention_pair("Split.0"), f"{ATTENTION}: no pair before its q"),
    "no pair on k": (no_attention_pair("Transpose_2"), f"{ATTENTION}: no pair before its k"),
    "no pair on v": (no_attention_pair("Split.2"), f"{ATTENTION}: no pair before its v"),
    "no pair on a weight": (no_pair(f"{FC1}/weight"), f"{FC1}: no pair before its weights"),
    "no pair on an input": (no_pair(INPUT), f"{FC1}: no pair before its input"),
    "input scales of another model": (its_input_scales, f"{FIRST}: input: scale"),
    "all scales of another model": (its_scales, f"{FIRST}: input: scale"),
    "weights moved by one step": (shifted(1), f"{FC1}: the scale of output channel"),
    "weights moved by three steps": (shifted(3), f"{FC1}: the scale of output channel"),
}


@pytest.mark.parametrize(("plant", "finding"), IN_THE_GRAPH.values(), ids=IN_THE_GRAPH)
def test_a_fault_in_the_graph_is_rejected_and_named(plant: Plant, finding: str, tmp_path: Path) -> None:
    outcome = validated(tmp_path, plant)
    assert outcome.code == 1
    assert finding in outcome.findings[0]


def test_the_record_of_another_model_is_rejected(tmp_path: Path) -> None:
    outcome = validated(tmp_path, lambda model: None, lambda plan: of_another_model())
    assert outcome.code == 1
    assert outcome.findings


# The record is changed along


CONTRADICTED: dict[str, tuple[Plant, Change]] = {
    "an input's scale twice as large": (scale(2), recorded(2)),
    "an input's scale half as large": (scale(0.5), recorded(0.5)),
    "an input's scale zero": (scale(0), recorded(0)),
    "two channels' scales exchanged": (swap, swap_recorded),
    "all scales of another model": (its_scales, lambda plan: of_another_model()),
}


@pytest.mark.parametrize(("plant", "change"), CONTRADICTED.values(), ids=CONTRADICTED)
def test_a_record_that_was_changed_along_contradicts_itself_or_the_weights(
    plant: Plant, change: Change, tmp_path: Path
) -> None:
    outcome = validated(tmp_path, plant, change)
    assert outcome.code == 1
    assert outcome.findings


SEEN_IN_NUMBERS: dict[str, tuple[Plant, Change | None]] = {
    "a scale half as large, and what was seen": one_scale(0.5, FIRST),
    "every scale half as large, and what was seen": all_scales(0.5),
    "a scale zero, and what was seen": one_scale(0),
    "every weight moved by a step": (shifted(1, weighted), None),
}


@pytest.mark.parametrize(("plant", "change"), SEEN_IN_NUMBERS.values(), ids=SEEN_IN_NUMBERS)
def test_what_the_record_cannot_contradict_is_seen_in_the_numbers(
    plant: Plant, change: Change | None, tmp_path: Path
) -> None:
    outcome = validated(tmp_path, plant, change)
    assert outcome.code == 1
    assert not outcome.numbers_agree


UNSEEN: dict[str, tuple[Plant, Change]] = {
    "a scale twice as large, and what was seen": one_scale(2),
    "every scale twice as large, and what was seen": all_scales(2),
    "weight scales per tensor": (per_tensor, per_tensor_recorded),
    "a layer in half": (no_pair(INPUT, f"{FC1}/weight"), lambda plan: faults.without_site(plan, FC1)),
    "an attention in half": (
        no_pair(*(f"{ATTENTION}/{name}" for name in QUANTIZED_ATTENTION)),
        lambda plan: faults.without_site(plan, ATTENTION),
    ),
    "input scales of another model": (its_input_scales, its_input_scales_recorded),
}


@pytest.mark.parametrize(("plant", "change"), UNSEEN.values(), ids=UNSEEN)
def test_a_consistent_other_quantization_passes_where_it_is_as_near_to_fp32(
    plant: Plant, change: Change, tmp_path: Path
) -> None:
    """These are other quantizations of the same model, not wrong ones: their logits are no further off by half."""
    outcome = validated(tmp_path, plant, change)
    assert outcome.code == 0
    assert outcome.rel_l2 < 1.5 * as_exported().rel_l2
