"""What the tables on schedules are made from: kinds of kernels, and the work of a node that ONNX Runtime ran."""

from __future__ import annotations

import pytest

from benchmarks.cost_model import work_of
from benchmarks.schedule import rule_of
from spach_deploy.engine.plan_facts import KernelFact, KernelWork


@pytest.mark.parametrize(
    ("kind", "layers", "what"),
    [
        ("gemm", ("layer1.0.channel_func.act/Gelu", "layer1.0.channel_func.fc1/Gemm"), "fc1, bias, GELU"),
        ("gemm", ("layer1.0/Add_2", "layer1.0.channel_func.fc2/Gemm"), "fc2, bias, residual"),
        (
            "pointwise",
            ("layer2.3.cpe_net.net.1/Conv/pad", "layer2.3.norm2/LayerNormalization"),
            "residual, depthwise, ",
        ),
        ("pointwise", ("layer2.4.norm1/LayerNormalization",), "LayerNorm"),
        ("convolution", ("layer2.0.net.1.0/Conv",), "downsampling's convolution"),
        ("move", ("layer3.0/Transpose",), "channels first"),
    ],
)
def test_a_kernel_is_named_by_the_nodes_in_it(kind: str, layers: tuple[str, ...], what: str) -> None:
    assert rule_of(KernelFact(kind, "name", layers, ())).what.startswith(what)


def test_the_work_of_a_node_follows_from_its_profile() -> None:
    def node(operator: str, read: list[list[int]], made: list[int]) -> KernelWork:
        shapes = [{"float": shape} for shape in read]
        return work_of({"op_name": operator, "input_type_shape": shapes, "output_type_shape": [{"float": made}]})

    assert node("Gemm", [[8, 16], [32, 16], [32]], [8, 32]) == KernelWork(4 * (128 + 512 + 32 + 256), 4096, "float")
    assert node("MatMul", [[2, 3, 8, 16], [2, 3, 16, 8]], [2, 3, 8, 8]).macs == 6 * 8 * 8 * 16
    assert node("Conv", [[1, 16, 8, 8], [16, 1, 3, 3]], [1, 16, 8, 8]).macs == 16 * 64 * 9
    assert node("Gelu", [[8, 32]], [8, 32]) == KernelWork(2048)
