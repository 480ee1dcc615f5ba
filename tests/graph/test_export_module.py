"""Any module becomes a graph with names by module and a free batch; what cannot be traced says where."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from spach_deploy.blocks.replace import replace_known
from spach_deploy.common.errors import CertificateError, ModelError
from spach_deploy.graph import export
from spach_deploy.graph.certificate import certify
from spach_deploy.graph.editing import owner
from spach_deploy.graph.export import export_module
from spach_deploy.graph.levels import described, levels
from spach_deploy.models.own_module import flattened
from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner, saved_graph
from tests.own_models import Branching, ClassToken, PlainNet, TwoHeads, TwoInputs

IMAGE = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
VECTOR = torch.rand(5, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("model", "inputs", "outputs"),
    [
        (PlainNet(), {"x": IMAGE}, ["y"]),
        (TwoHeads(), {"image": IMAGE}, ["classes", "angle"]),
        (TwoInputs(), {"image": IMAGE, "vector": VECTOR}, ["joined", "shares"]),
        (ClassToken(), {"x": IMAGE}, ["y"]),
    ],
)
def test_a_graph_computes_what_the_module_computes_at_any_batch(
    model: nn.Module, inputs: dict[str, Tensor], outputs: list[str]
) -> None:
    graph = export_module(model.eval(), inputs, outputs)
    assert [value.name for value in graph.graph.inputs] == list(inputs)
    assert [value.name for value in graph.graph.outputs] == outputs
    with saved_graph(graph) as path, OnnxRuntimeRunner(path) as runner:
        for batch in (1, 2, 5):
            feeds = {name: tensor[:batch] for name, tensor in inputs.items()}
            found = runner.run({name: tensor.numpy() for name, tensor in feeds.items()})
            with torch.inference_mode():
                expected = flattened(model(*feeds.values()))
            for value, wanted in zip(found.values(), expected, strict=True):
                np.testing.assert_allclose(value, wanted.numpy(), atol=1e-5)


def test_a_graph_that_mixes_images_up_is_not_right() -> None:
    class Straight(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3))

    class Mixed(Straight):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).flip(0)

    graph = export_module(Straight().eval(), {"x": IMAGE}, ["y"])
    feeds = export._random({"x": IMAGE}, 2)
    assert export._is_right(graph, Straight(), feeds)
    assert not export._is_right(graph, Mixed(), feeds)


def test_nodes_are_named_by_the_users_modules() -> None:
    graph = export_module(TwoHeads().eval(), {"image": IMAGE}, ["classes", "angle"])
    paths = {path for path, _ in TwoHeads().named_modules()} | {"model"}
    assert {owner(node.name or "") for node in graph.graph} <= paths
    assert isinstance(graph, ir.Model)


def test_what_cannot_be_traced_is_named_with_its_line(capfd: pytest.CaptureFixture[str]) -> None:
    wrapped = nn.Sequential(nn.Identity(), Branching()).eval()
    with pytest.raises(ModelError) as caught:
        export_module(wrapped, {"x": IMAGE}, ["y"])
    assert re.search(r"cannot trace 1 \(Branching\.forward, .*own_models\.py:\d+\)", caught.value.message)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_what_is_no_tensor_among_the_outputs_is_refused() -> None:
    with pytest.raises(ModelError, match="returns int, and a graph returns tensors"):
        flattened({"y": IMAGE, "count": 3})


def test_levels_say_what_is_known_and_how_much_of_the_arithmetic_it_is() -> None:
    model = TwoHeads().eval()
    static, replaced = replace_known(model, (IMAGE,))
    graph = export_module(static, {"image": IMAGE}, ["classes", "angle"])
    found = levels(graph, model, [change.module for change in replaced.changes])
    assert found["known"].modules == ("blocks.0.mix", "blocks.0.mlp", "blocks.1.mix", "blocks.1.mlp")
    assert {"patches", "classes", "angle", "norm"} <= set(found["plain"].modules)
    assert found["unknown"].modules == ("blocks.0", "blocks.1", "model")
    tokens, dim, hidden = 4, 16, 32
    attention = tokens * dim * 4 * dim + 2 * tokens * tokens * dim
    known = 2 * (attention + 2 * tokens * dim * hidden)
    plain = tokens * dim * 3 * 64 + dim * 8
    assert found["known"].macs == pytest.approx(known / (known + plain))
    assert described(found).startswith("4 known (58 % of the arithmetic), 8 plain (42 %), 3 unknown (0 %")


def test_a_graph_that_computes_shapes_is_certified_as_the_users_own_alone() -> None:
    graph = export_module(ClassToken().eval(), {"x": IMAGE}, ["y"])
    paths = [path for path, _ in ClassToken().named_modules()]
    with pytest.raises(CertificateError, match="shape arithmetic: Shape at"):
        certify(graph, paths)
    assert certify(graph, paths, is_own=True).broken[0].startswith("shape arithmetic: Shape at")
    plain = export_module(PlainNet().eval(), {"x": IMAGE}, ["y"])
    assert certify(plain, [path for path, _ in PlainNet().named_modules()], is_own=True).broken == ()
