from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from spach_deploy.common.errors import CertificateError
from spach_deploy.graph.editing import as_proto
from spach_deploy.graph.export import free_batch


def reshaping(shape: list[int]) -> ir.Model:
    value = helper.make_tensor_value_info
    constant = numpy_helper.from_array(np.array(shape, np.int64), "shape")
    node = helper.make_node("Reshape", ["x", "shape"], ["y"], name="blocks.0/Reshape")
    inputs, outputs = [value("x", TensorProto.FLOAT, [3, 4])], [value("y", TensorProto.FLOAT, [3, 2, 2])]
    return ir.from_proto(helper.make_model(helper.make_graph([node], "g", inputs, outputs, [constant])))


@pytest.mark.parametrize(
    ("traced", "freed"), [([3, 2, 2], [-1, 2, 2]), ([6, 2], [-1, 2]), ([-1, 4], [-1, 4]), ([0, -1], [0, -1])]
)
def test_the_batch_becomes_symbolic(traced: list[int], freed: list[int]) -> None:
    model = reshaping(traced)
    free_batch(model, 3, "batch")
    proto = as_proto(model)
    assert numpy_helper.to_array(proto.graph.initializer[0]).tolist() == freed
    assert {v.type.tensor_type.shape.dim[0].dim_param for v in (*proto.graph.input, *proto.graph.output)} == {"batch"}


@pytest.mark.parametrize("shape", [[4, 3], [3, -1]])
def test_a_reshape_that_hides_the_batch_is_refused(shape: list[int]) -> None:
    with pytest.raises(CertificateError, match=r"blocks\.0/Reshape reshapes to"):
        free_batch(reshaping(shape), 3, "batch")
