"""A graph held against its record: what differs is named, whether or not the numbers would show it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import numpy as np
import pytest
from onnx import ModelProto, TensorProto

from spach_deploy.common.errors import PrecisionError
from spach_deploy.graph.passes.linear_as_matmul import linear_as_matmul
from spach_deploy.options.specs import Precision
from spach_deploy.quantization import qdq as insert
from spach_deploy.quantization.fake_quantization import corrected_bias
from spach_deploy.quantization.formats import FP8, INT8, EightBitFormat
from spach_deploy.quantization.plan import QuantizationPlan, Scaling
from spach_deploy.quantization.scales import Method
from tests.protos import (
    apply_to_graph,
    audit,
    correct_biases,
    in_place,
    initializers,
    insert_qdq,
    mark_sites,
    quantize_graph,
    quantize_typed,
)
from tests.quantization import faults
from tests.quantization.faults import Float64
from tests.quantization.small_models import canonical, inputs, plan, quantized

ATTENTION = "blocks.1.spatial_func"
FC1 = "blocks.0.channel_func.fc1"
INPUT = "blocks.0.channel_func/Reshape"
QUANTIZE = ("*.spatial_func",)

Fault = Callable[[ModelProto], None]

both = pytest.mark.parametrize("form", [INT8, FP8], ids=["int8", "fp8"])


def record(form: EightBitFormat = INT8, method: Method = Method.MAX) -> QuantizationPlan:
    return plan("trans", form, QUANTIZE, method)


def findings(fault: Fault, form: EightBitFormat = INT8, made: QuantizationPlan | None = None) -> tuple[str, ...]:
    model = quantized("trans", form, QUANTIZE, Precision.FP16)
    fault(model)
    return audit(model, record(form) if made is None else made)


@pytest.mark.parametrize("rest", [Precision.FP32, Precision.FP16, Precision.BF16])
@pytest.mark.parametrize("kind", ["hybrid", "mlp_shared"])
@both
def test_nothing_is_found_in_a_graph_as_it_was_made(kind: str, form: EightBitFormat, rest: Precision) -> None:
    asked = ("*.spatial_func*", "head")
    assert audit(quantized(kind, form, asked, rest), plan(kind, form, asked, half=rest.is_half)) == ()


def input_scale(factor: float) -> Fault:
    return lambda model: faults.scale_input(model, INPUT, factor)


def no_pair(stem: str) -> Fault:
    return lambda model: faults.remove_pair(model, stem)


def weight_scales(change: Callable[[faults.Float64], faults.Float64]) -> Fault:
    return lambda model: faults.scale_weights(model, FC1, change)


def without_third(scales: faults.Float64) -> faults.Float64:
    scales = scales.copy()
    scales[3] = 0
    return scales


FAULTS: dict[str, tuple[Fault, str]] = {
    "an input's scale doubled": (input_scale(2), f"{FC1}: input: scale .*, .* in the record .2 times"),
    "an input's scale halved": (input_scale(0.5), f"{FC1}: input: scale .*0.5 times"),
    "an input's scale off by a hundredth": (input_scale(1.01), f"{FC1}: input: scale"),
    "an input's scale zero": (input_scale(0), f"{FC1}: input: scale 0, "),
    "an input's scale not a number": (input_scale(np.nan), f"{FC1}: input: scale nan"),
    "an input's scale negative": (input_scale(-1), f"{FC1}: input: scale -"),
    "the scale of v doubled": (
        lambda model: faults.scale_input(model, f"{ATTENTION}/Split.2", 2),
        f"{ATTENTION}: v: scale",
    ),
    "a weight scale zero": (weight_scales(without_third), f"{FC1}: weights: scale 0, channel 3, "),
    "two channels' scales exchanged": (
        weight_scales(faults.swapped(2, 7)),
        f"{FC1}: weights: scale .* channel 2, .*; 2 channels in all",
    ),
    "weight scales per tensor": (
        lambda model: faults.one_scale(model, FC1),
        f"{FC1}: weights: one scale in the graph, 32",
    ),
    "no pair on an input": (no_pair(INPUT), f"{FC1}: no pair before its input"),
    "no pair on a weight": (no_pair(f"{FC1}/weight"), f"{FC1}: no pair before its weights"),
    "no pair on q": (no_pair(f"{ATTENTION}/Split.0"), f"{ATTENTION}: no pair before its q"),
    "no pair on k": (no_pair(f"{ATTENTION}/Transpose_2"), f"{ATTENTION}: no pair before its k"),
    "no pair on the softmax": (no_pair(f"{ATTENTION}/Softmax/to_fp16"), f"{ATTENTION}: no pair before its softmax"),
    "no pair on v": (no_pair(f"{ATTENTION}/Split.2"), f"{ATTENTION}: no pair before its v"),
    "a weight that its scale clips": (
        lambda model: faults.scale_largest(model, FC1, 1.05),
        f"{FC1}: the scale of output channel 0 fits weights up to .*; they reach",
    ),
    "a zero point that is not 0": (
        lambda model: faults.set_zero_point(model, INPUT, 3),
        f"{FC1}: the zero point of its input is not 0",
    ),
    "a pair that nobody planned": (
        lambda model: faults.add_pair(model, "blocks.0/Add"),
        "stray/quantize belongs to no layer of the record",
    ),
    "scales along another axis": (
        lambda model: faults.set_axis(model, f"{FC1}/weight", 1),
        f"{FC1}: the scales of its weights belong to another axis",
    ),
    "a scale that is computed": (
        lambda model: faults.compute_scale(model, INPUT),
        f"{FC1}: the scale of its input is no constant",
    ),
    "a node that is gone": (
        lambda model: faults.rename_node(model, f"{FC1}/Gemm", "gemm"),
        f"{FC1}: the graph has no node {FC1}/Gemm",
    ),
}


@pytest.mark.parametrize(("fault", "sentence"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named(fault: Fault, sentence: str) -> None:
    found = findings(fault)
    assert any(re.search(sentence, finding) for finding in found), found


@both
def test_the_same_in_fp8(form: EightBitFormat) -> None:
    for name in ("an input's scale doubled", "two channels' scales exchanged", "no pair on v"):
        assert findings(FAULTS[name][0], form)


def test_eight_bits_of_the_other_format_are_found() -> None:
    model = quantized("trans", INT8, QUANTIZE, Precision.FP16)
    initializers(model.graph)[f"{INPUT}/zero"].data_type = TensorProto.FLOAT8E4M3FN
    assert any(f"{FC1}: the pair of its input is not int8" in finding for finding in audit(model, record()))


def test_of_many_findings_the_first_are_shown_and_the_others_counted() -> None:
    def everywhere(model: ModelProto) -> None:
        for site in record().sites:
            if site.weight:
                faults.scale_input(model, site.tensors[0].tensor, 2)

    found = findings(everywhere)
    weighted = sum(bool(site.weight) for site in record().sites)
    assert len(found) == 6
    assert found[-1] == f"and {weighted - 5} more differences"


def test_pairs_without_names_are_found_all_the_same() -> None:
    def nameless(model: ModelProto) -> None:
        faults.add_pair(model, "blocks.0/Add")
        for node in model.graph.node:
            node.name = f"{FC1}/weight/quantize" if node.name.startswith("stray") else node.name

    assert findings(nameless)


# The record changed along with the graph: what its own figures contradict


def test_a_scale_beyond_what_was_seen_is_found_in_the_record_itself() -> None:
    made = faults.with_scale(record(), FC1, 2)
    found = findings(lambda model: faults.scale_input(model, INPUT, 2), made=made)
    assert [FC1 in finding and "where the largest that was seen is" in finding for finding in found] == [True]


def test_a_scale_that_clips_is_found_where_nothing_was_to_be_clipped() -> None:
    found = findings(lambda model: faults.scale_input(model, INPUT, 0.5), made=faults.with_scale(record(), FC1, 0.5))
    assert [FC1 in finding and "its record clips at" in finding for finding in found] == [True]


def test_other_methods_may_clip() -> None:
    made = record(method=Method.ENTROPY)
    model = quantized("trans", INT8, QUANTIZE, Precision.FP16, method=Method.ENTROPY)
    assert audit(model, made) == ()
    faults.scale_input(model, INPUT, 0.5)
    assert audit(model, faults.with_scale(made, FC1, 0.5)) == ()  # it may have been: only numbers can tell
    faults.scale_input(model, INPUT, 32)
    assert audit(model, faults.with_scale(made, FC1, 16))


@pytest.mark.parametrize("fault", ["per tensor", "exchanged", "of another model"])
def test_weight_scales_are_checked_by_the_weights_themselves(fault: str) -> None:
    scales = np.array(faults.site(record(), FC1).weight_scales)
    changed = {
        "per tensor": scales.max(keepdims=True) * 0.7,
        "exchanged": faults.swapped(2, 7)(scales),
        "of another model": scales[::-1],
    }[fault]
    made = faults.with_site(record(), FC1, weight_scales=tuple(changed.tolist()))

    def along(model: ModelProto) -> None:
        if fault == "per tensor":
            faults.one_scale(model, FC1)
        faults.scale_weights(model, FC1, lambda _: changed if len(changed) > 1 else changed[0])

    assert any("fits weights up to" in finding for finding in findings(along, made=made))


def test_a_record_for_another_number_of_channels_is_a_finding() -> None:
    made = faults.with_site(record(), FC1, weight_scales=(0.1, 0.2), correction=(0.0, 0.0))
    assert any(
        "32 scales in the graph, 2 scales in the record" in finding for finding in findings(lambda _: None, made=made)
    )


def test_a_zero_scale_in_the_record_is_a_finding() -> None:
    for module, changes in ((FC1, {"weight_scales": (0.0,) * 32}), (FC1, {"correction": ()})):
        made = faults.with_site(record(), module, **changes)
        assert bool(findings(lambda _: None, made=made)) == ("weight_scales" in changes)
    assert findings(lambda model: faults.scale_input(model, INPUT, 0), made=faults.with_scale(record(), FC1, 0))


# Numbers at the edge of a type are no faults


@pytest.mark.parametrize("rest", [Precision.FP32, Precision.FP16])
@pytest.mark.parametrize("small", [2.0**-10, 2.0**-11, 2.0**-11.5, 2.0**-17, 2.0**-22])
def test_layers_with_tiny_numbers_are_found_right_or_left_in_float(small: float, rest: Precision) -> None:
    """FP16 holds small scales coarsely: as coarsely, they are what was planned."""
    model = canonical("conv")
    weight = initializers(model.graph)[f"{FC1}.weight"]
    values = faults.values(model, weight.name) * small
    faults.set_values(model, weight.name, values)
    made = quantize_graph(model, [inputs()], Scaling(INT8, Method.MAX, half=rest.is_half), rest=rest, equalize=False)
    assert audit(made.model, made.plan) == ()


# What a layer adds


def corrected(change: Callable[[Float64, Float64], Float64]) -> Fault:
    """Biases of every layer as `change` makes them from what they were and from their corrections."""

    def plant(model: ModelProto) -> None:
        for site in record().sites:
            if site.correction:
                bias, correction = np.array(site.bias or np.zeros(len(site.correction))), np.array(site.correction)
                faults.set_values(model, corrected_bias(site), change(bias, correction))

    return plant


CORRECTIONS: dict[str, Callable[[Float64, Float64], Float64]] = {
    "dropped": lambda bias, correction: bias,
    "doubled": lambda bias, correction: bias + 2 * correction,
    "of the wrong sign": lambda bias, correction: bias - correction,
    "on reversed channels": lambda bias, correction: bias + correction[::-1],
    "alone": lambda bias, correction: correction,
}


def test_a_bias_that_is_not_corrected_as_recorded_is_found() -> None:
    model = quantized("trans", INT8, QUANTIZE, Precision.FP16)
    for name, change in CORRECTIONS.items():
        corrected(change)(model)
        found = audit(model, record())
        assert len(found) == 6, name
        assert all(re.search("its bias is .* in channel .*; the record has .* and a correction", f) for f in found[:5])


def test_a_correction_without_a_bias_is_found() -> None:
    def forget(model: ModelProto) -> None:
        del next(node for node in model.graph.node if node.name == f"{FC1}/Gemm").input[2]

    assert any(f"{FC1}: it has no bias to hold its correction" in finding for finding in findings(forget))


def test_records_of_versions_that_kept_no_biases_are_read_and_audited() -> None:
    content = record().to_dict()
    for entry in content["sites"]:
        del entry["bias"]
    made = QuantizationPlan.from_dict(content, "old")
    assert findings(lambda model: None, made=made) == ()
    assert findings(FAULTS["an input's scale doubled"][0], made=made)


# What writes the graph is wrong itself


def for_cpu() -> tuple[ModelProto, QuantizationPlan]:
    """A graph in its form for CPUs, and its record."""
    model, made = canonical("trans"), plan("trans", INT8, half=False)
    apply_to_graph(model, made.equalized)
    mark_sites(model, made)
    assert in_place(linear_as_matmul, model)
    correct_biases(model, made)
    return insert_qdq(model, made), made


def test_another_middle_of_unsigned_numbers_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert audit(*for_cpu()) == ()
    monkeypatch.setattr(insert, "MIDDLE", 127)
    assert any("the zero point of its weights is not 128" in finding for finding in audit(*for_cpu()))


def test_another_operand_that_is_unsigned_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(insert, "unsigned_operand", lambda site, node, plan: insert.Operand.INPUT)
    assert any("the pair of its input is not int8" in finding for finding in audit(*for_cpu()))


def test_another_limit_of_a_format_is_found() -> None:
    made = dataclasses.replace(record(), form=dataclasses.replace(INT8, limit=128.0))
    model = quantized("trans", INT8, QUANTIZE, Precision.FP16)
    for site in made.sites:  # as if scales had been set for it
        made = faults.with_site(made, site.module, weight_scales=tuple(s * 127 / 128 for s in site.weight_scales))
        if site.weight_scales:
            faults.scale_weights(model, site.module, lambda scales: scales * 127 / 128)
    assert any("fits weights up to" in finding for finding in audit(model, made))


def test_an_export_whose_biases_were_not_corrected_is_refused() -> None:
    model, made = canonical("trans"), plan("trans", INT8, half=False)
    apply_to_graph(model, made.equalized)
    with pytest.raises(PrecisionError, match=r"not what was planned: .* its bias is"):
        quantize_typed(model, made)
