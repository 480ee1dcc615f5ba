"""Models with a forward of their own: one block of each kind is traced, and the graph is the one of the whole model."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from spach_deploy.blocks import rewrite
from spach_deploy.blocks.replace import replace_known
from spach_deploy.bundle.outputs import chosen_outputs
from spach_deploy.common.errors import CertificateError
from spach_deploy.graph import export
from spach_deploy.graph.block_prototype import with_stand_ins
from spach_deploy.graph.editing import name_of, owner
from spach_deploy.graph.export import export_canonical
from spach_deploy.models.demo import load_demo_weights
from spach_deploy.models.registry import create_model
from spach_deploy.models.shiftvit import ShiftBlock
from spach_deploy.options.specs import OutputSpec, Role
from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner, saved_graph
from tests.blocks.test_families import FAMILIES, SIZE, each, model_of
from tests.static_models import relative_l2

FED = {"input": torch.rand(3, 3, *SIZE, generator=torch.Generator().manual_seed(0))}


def check(graph: ir.Model, model: nn.Module) -> None:
    with saved_graph(graph) as path, OnnxRuntimeRunner(path) as runner, torch.inference_mode():
        (found,) = runner.run({"input": FED["input"].numpy()}).values()
        assert relative_l2(found, model(FED["input"]).numpy()) < 2e-6


def nodes_of(model: ir.Model) -> list[tuple[Any, ...]]:
    """Each node: operator, attributes, and what it reads, as positions of the tensors and bytes of the constants."""
    where: dict[ir.Value | None, str] = {value: f"input {name_of(value)}" for value in model.graph.inputs}
    found = []
    for index, node in enumerate(model.graph):
        read = []
        for value in node.inputs:
            constant = None if value is None else value.const_value
            read.append(where.get(value) if constant is None else (tuple(constant.shape), constant.tobytes()))
        found.append((node.op_type, sorted((name, str(a.value)) for name, a in node.attributes.items()), read))
        where |= {value: f"{index} {position}" for position, value in enumerate(node.outputs)}
    return [*found, tuple(where[value] for value in model.graph.outputs)]


@each
def test_the_graph_is_that_of_the_whole_model(family: str) -> None:
    """Of the maps too, which a stage's last block makes."""
    model = create_model(FAMILIES[family]).eval()
    load_demo_weights(model)
    model.outputs = chosen_outputs(OutputSpec(outputs=(Role.FEATURES, Role.LOGITS)), 5, model.stage_shapes)
    static, names = rewrite(model).model, [tensor.name for tensor in model.outputs]
    whole, repeated = (traced(static, FED, names) for traced in (export._whole, export._repeated))
    assert [value.name for value in repeated.graph.outputs] == names
    assert nodes_of(repeated) == nodes_of(whole)
    known, nodes = {path for path, _ in model.named_modules()} | {"model"}, [name_of(node) for node in repeated.graph]
    assert {owner(name) for name in nodes} <= known
    assert len({*nodes}) == len(nodes)
    assert {node.domain for node in repeated.graph} == {""}
    assert [*repeated.opset_imports] == [""]


@each
def test_special_weights_are_not_taken_for_those_of_all_blocks(family: str) -> None:
    model = create_model(FAMILIES[family]).eval()  # zeros, ones, equal tensors
    last = {"smlpnet": "token_mix.2.0.conv_merge.BN", "shiftvit": "layers.1.blocks.1.norm2"}[family]
    nn.init.normal_(model.get_parameter(f"{last}.bias"), generator=torch.Generator().manual_seed(0))
    check(export_canonical(rewrite(model).model, SIZE), model)


@each
def test_blocks_that_differ_in_weights_alone_are_alike(family: str) -> None:
    repeats = with_stand_ins(rewrite(model_of(family)).model).repeats
    assert (
        repeats
        == {
            "smlpnet": {
                "token_mix.1": ("token_mix.1", "token_mix.2"),
                "channel_mix.1": ("channel_mix.1", "channel_mix.2"),
            },
            "shiftvit": {"layers.1.blocks.0": ("layers.1.blocks.0", "layers.1.blocks.1")},
        }[family]
    )


class Shifting(nn.Module):
    """Shift blocks of the user's own order: `blocks` run one after the other, `order` says which."""

    def __init__(self, *divisions: int, order: tuple[int, ...], pool: bool = False) -> None:
        super().__init__()
        architecture = FAMILIES["shiftvit"]
        self.blocks = nn.ModuleList(ShiftBlock(architecture.replace(divisions=n), 32) for n in divisions)
        self.embed, self.order, self.pool = nn.Conv2d(3, 32, 8, 8), order, pool

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for index in self.order:
            x = self.blocks[index](x)
            x = nn.functional.avg_pool2d(x, 2) if self.pool else x
        return x.mean((2, 3))


def test_blocks_on_images_of_different_sizes_are_traced_each() -> None:
    model = Shifting(8, 8, order=(0, 1), pool=True).eval()
    static, _ = replace_known(model, tuple(FED.values()))
    assert with_stand_ins(static).repeats
    with pytest.raises(CertificateError, match="images of different sizes"):
        export._repeated(static, FED, ["y"])
    check(export.export_module(static, FED, ["y"]), model)


def test_a_block_that_runs_twice_is_not_repeated() -> None:
    static, _ = replace_known(Shifting(8, 8, order=(0, 1, 0)).eval(), tuple(FED.values()))
    with pytest.raises(CertificateError, match="runs twice"):
        export._repeated(static, FED, ["y"])


def test_blocks_with_other_shifts_are_not_alike() -> None:
    model = Shifting(8, 4, 8, order=(0, 1, 2)).eval()
    static, _ = replace_known(model, tuple(FED.values()))
    assert with_stand_ins(static).repeats == {"blocks.0": ("blocks.0", "blocks.2")}
