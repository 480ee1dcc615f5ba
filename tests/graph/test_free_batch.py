from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from spach_deploy.common.errors import CertificateError
from spach_deploy.graph.free_batch import free_batch


def reshaping(shape: list[int]) -> ModelProto:
    value = helper.make_tensor_value_info
    constant = numpy_helper.from_array(np.array(shape, np.int64), "shape")
    node = helper.make_node("Reshape", ["x", "shape"], ["y"], name="blocks.0/Reshape")
    inputs, outputs = [value("x", TensorProto.FLOAT, [3, 4])], [value("y", TensorProto.FLOAT, [3, 2, 2])]
    return helper.make_model(helper.make_graph([node], "g", inputs, outputs, [constant]))


@pytest.mark.parametrize(
    ("traced", "freed"), [([3, 2, 2], [-1, 2, 2]), ([6, 2], [-1, 2]), ([-1, 4], [-1, 4]), ([0, -1], [0, -1])]
)
def test_the_batch_becomes_symbolic(traced: list[int], freed: list[int]) -> None:
    model = reshaping(traced)
    free_batch(model, 3, "batch")
    assert numpy_helper.to_array(model.graph.initializer[0]).tolist() == freed
    assert {v.type.tensor_type.shape.dim[0].dim_param for v in (*model.graph.input, *model.graph.output)} == {"batch"}


@pytest.mark.parametrize("shape", [[4, 3], [3, -1]])
def test_a_reshape_that_hides_the_batch_is_refused(shape: list[int]) -> None:
    with pytest.raises(CertificateError, match=r"blocks\.0/Reshape reshapes to"):
        free_batch(reshaping(shape), 3, "batch")
