from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from spach_deploy.common.errors import CertificateError, UsageError
from spach_deploy.graph.certificate import certify
from spach_deploy.graph.interface import check_outputs
from spach_deploy.options.specs import OutputSpec
from tests.static_models import canonical_bytes, small_model

MODULES = [name for name, _ in small_model("conv").named_modules()]


def graph() -> ModelProto:
    return onnx.load_model_from_string(canonical_bytes("conv"))


def refused(model: ModelProto) -> str:
    with pytest.raises(CertificateError) as caught:
        certify(ir.from_proto(model), MODULES)
    return str(caught.value)


def test_shape_arithmetic_is_refused_by_name() -> None:
    model = graph()
    model.graph.node.append(helper.make_node("Shape", ["input"], ["s"], name="head/Shape"))
    model.graph.output.append(helper.make_tensor_value_info("s", TensorProto.INT64, [4]))
    assert "Shape at head/Shape" in refused(model)


def test_a_second_symbolic_dimension_is_refused() -> None:
    model = graph()
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    assert "more than one symbolic dimension: batch, height" in refused(model)


def test_an_unused_initializer_is_refused() -> None:
    model = graph()
    model.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "left_over"))
    assert "unused initializers: left_over" in refused(model)


def test_a_node_without_a_module_path_is_refused() -> None:
    model = graph()
    model.graph.node[3].name = "node_conv2d_7"
    assert "nodes without a module path: node_conv2d_7" in refused(model)


def test_all_broken_promises_are_listed_together() -> None:
    model = graph()
    model.graph.node[3].name = "node_conv2d_7"
    model.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "left_over"))
    message = refused(model)
    assert "left_over" in message
    assert "node_conv2d_7" in message


def test_more_answers_than_classes_are_refused() -> None:
    with pytest.raises(UsageError, match="--top-k 12 of 11 classes"):
        check_outputs(OutputSpec(top_k=12), 11)
