"""The user's own module: made by a factory, filled from a checkpoint, run once on an example."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from spach_deploy.blocks.base import double
from spach_deploy.common.errors import CheckpointError, ModelError, UsageError
from spach_deploy.common.machine import Memory
from spach_deploy.models.own_module import (
    OwnForward,
    check_batches,
    draws_weights,
    flattened,
    load,
    load_values,
    loaded_module,
    made_by,
    output_names,
    run_example,
)
from spach_deploy.options.specs import ModelSpec
from tests.own_models import HiddenByTry, HiddenFromExport, Locked, PlainNet, TwoHeads, TwoInputs

IMAGE = torch.rand(3, 3, 16, 16)


class NamedOutputs(NamedTuple):
    logits: torch.Tensor
    maps: list[torch.Tensor | None]


@dataclasses.dataclass
class DataOutputs:
    logits: torch.Tensor
    maps: list[torch.Tensor | None]


def test_a_factory_a_class_and_an_object_make_a_module() -> None:
    assert isinstance(made_by("tests.own_models:PlainNet")[0], PlainNet)
    assert isinstance(made_by("torch.nn:Identity")[0], nn.Identity)


def test_modules_of_the_current_directory_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_net.py").write_text("from torch import nn\n\ndef build():\n    return nn.Linear(2, 2)\n")
    monkeypatch.chdir(tmp_path)
    assert isinstance(made_by("users_net:build")[0], nn.Linear)


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("tests.own_models", "is not a factory"),
        ("no_such_package:build", "cannot be made: ModuleNotFoundError: No module named 'no_such_package'"),
        ("tests.own_models:Nothing", "cannot be made: AttributeError: .*has no attribute 'Nothing'"),
        ("torch.nn:Linear", "cannot be made: TypeError"),
        ("builtins:dict", "gave a dict, not an nn.Module"),
    ],
)
def test_what_cannot_be_made_is_one_sentence(factory: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        made_by(factory)
    assert "\n" not in str(caught.value)


def test_an_error_in_the_users_code_names_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_net.py").write_text("def build():\n    raise KeyError('weights')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"KeyError: 'weights' \(.*broken_net.py:2\)"):
        made_by("broken_net:build")


def test_a_checkpoint_has_to_fit_and_says_what_does_not() -> None:
    module, values = PlainNet(), dict(PlainNet().state_dict())
    load_values(module, values)
    assert torch.equal(module.head.weight, values["head.weight"])
    wrong = {**values, "head.weight": torch.zeros(2, 2), "neck.bias": torch.zeros(1)}
    del wrong["head.bias"]
    with pytest.raises(CheckpointError) as caught:
        load_values(module, wrong)
    assert "1 missing (head.bias); 1 not the module's (neck.bias); 1 of another shape (head.weight is [2, 2]" in str(
        caught.value
    )


def test_inputs_and_outputs_have_the_users_names() -> None:
    assert list(run_example(PlainNet().eval(), [IMAGE]).inputs) == ["input"]
    two = run_example(TwoInputs().eval(), [IMAGE, torch.rand(3, 4)])
    assert (list(two.inputs), list(two.outputs)) == (["image", "vector"], ["output_0", "output_1"])
    heads = run_example(TwoHeads().eval(), [IMAGE])
    assert {name: tuple(tensor.shape) for name, tensor in heads.outputs.items()} == {"classes": (1, 7), "angle": (1, 1)}
    assert output_names({"maps": (IMAGE, IMAGE), "vector": IMAGE}) == ["maps_0", "maps_1", "vector"]
    for kind in (NamedOutputs, DataOutputs):
        returned = kind(IMAGE, [IMAGE + 1, None])
        assert output_names(returned) == ["logits", "maps_0"]
        first, second = flattened(returned)
        assert first is returned.logits
        assert second is returned.maps[0]


def test_an_example_that_the_module_does_not_take_is_one_sentence() -> None:
    with pytest.raises(
        ModelError,
        match=r"an input of \(1, 4, 16, 16\): the model \(PlainNet.forward, .*own_models.py:\d+\) raises RuntimeError",
    ):
        run_example(PlainNet().eval(), [torch.rand(1, 4, 16, 16)])
    with pytest.raises(ModelError, match="no tensor with a batch first"):
        run_example(PlainNet().eval(), [torch.rand(3)])


class Drawing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) + torch.rand(1)


class Counting(nn.Module):
    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x.mean((2, 3)) + self.calls


class OfTheBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) - x.mean()


class Scalar(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean()


class OneImage(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(1, -1)[:, :4]


class Classes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)).argmax(1)


class InPlace(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(2).mean((2, 3))


class Listed(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = [list(parts)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts[0]:
            x = part(x)
        return x.mean((2, 3))


class Teaching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 1)
        self.teacher = [self.body, nn.Conv2d(3, 4, 1)]  # for training, out of the checkpoint

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps: torch.Tensor = self.body(x)
        return maps.mean((2, 3))


class Blurring(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = torch.ones(3, 1, 3, 3) / 9

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.kernel, groups=3).mean((2, 3))


class MakingTensors(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) @ torch.ones(3, 4)


class NotFinite(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) / 0


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (Drawing(), "again on the same input: it draws at random, or changes an attribute of itself"),
        (Counting(), "again on the same input: it changes its buffer calls"),
        (InPlace(), r"again on the same input: it changes its input\."),
        (NotFinite(), "has numbers that are not finite"),
        (OfTheBatch(), "depends on the other images of its batch"),
        (Scalar(), r"has the shape \(\) for one image and \(\) for 3, so it does not begin with the batch"),
        (OneImage(), "does not begin with the batch"),
        (Listed(nn.Conv2d(3, 4, 1)), r"parts keeps parts of the module in a list.*Keep them in an nn\.ModuleList"),
        (nn.Sequential(Listed(nn.Conv2d(3, 4, 1))), r"^0\.parts keeps"),
        (Classes(), "is int64, and a graph's outputs are floats"),
    ],
)
def test_what_is_no_function_of_each_image_by_itself_is_refused(module: nn.Module, said: str) -> None:
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(ModelError, match=said):
        run_example(module, [IMAGE])
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_parts_in_a_list_that_do_not_run_are_the_users_own_matter() -> None:
    assert [*run_example(Teaching().eval(), [IMAGE]).outputs] == ["output"]


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (Blurring(), r"not in FP64.*Blurring\.forward.*Make kernel, a tensor .*register_buffer"),
        (MakingTensors(), r"not in FP64.*in the type of its input"),
    ],
)
def test_a_module_of_fp32_alone_is_told_what_keeps_it_there(module: nn.Module, said: str) -> None:
    model = loaded_module(module, IMAGE, ModelSpec()).model
    with pytest.raises(ModelError, match=said):
        model(IMAGE.double())


def test_outputs_get_names_that_every_package_can_hold() -> None:
    assert output_names({"é ü/2": IMAGE, 3: IMAGE, "ok_1": IMAGE}) == ["output_____2", "output_3", "ok_1"]


def test_a_forward_that_raises_names_the_users_line() -> None:
    class Raising(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("no such thing")

    with pytest.raises(
        ModelError, match=r"the model \(Raising.forward, .*test_own_module.py:\d+\) raises ValueError: no such thing\."
    ):
        run_example(Raising(), [IMAGE])


@pytest.mark.parametrize("kind", [HiddenByTry, HiddenFromExport])
def test_a_branch_on_values_that_is_hidden_from_the_trace_is_noted_with_its_line(kind: type[nn.Module]) -> None:
    (note,) = run_example(kind().eval(), IMAGE).notes
    assert re.search(r"values of tensors into Python \(.*own_models.py:\d+\).*not in the graph", note)
    assert run_example(PlainNet().eval(), IMAGE).notes == ()


def test_what_cannot_be_copied_is_shared_and_the_rest_is_copied() -> None:
    model = Locked()
    copied = double(model)
    assert copied.lock is model.lock
    assert (copied.head.weight.dtype, model.head.weight.dtype) == (torch.float64, torch.float32)


class BranchOnBatch(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        means = x.mean((2, 3))
        return means * 2 if x.shape[0] > self.size else means


@pytest.mark.parametrize("size", [4, 16])
def test_a_module_that_branches_on_the_size_of_the_batch_is_refused(size: int) -> None:
    model = loaded_module(BranchOnBatch(size), IMAGE, ModelSpec(module="own:module")).model
    assert isinstance(model, OwnForward)
    assert list(check_batches(model, (1, size))) == []
    with pytest.raises(ModelError, match=rf"another in a batch of {size + 1} than alone"):
        list(check_batches(model, (1, size, size + 1)))


def test_a_batch_for_which_memory_does_not_suffice_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded_module(BranchOnBatch(4), IMAGE, ModelSpec(module="own:module")).model
    assert isinstance(model, OwnForward)
    monkeypatch.setattr("spach_deploy.models.own_module.find_memory", lambda: Memory(100, 100))
    assert list(check_batches(model, (1, 8))) == [
        "your module was not run in a batch of 8, which takes more memory than is free"
    ]


def test_a_factory_that_makes_another_number_of_weights_draws_them() -> None:
    loaded = load(ModelSpec(module="tests.own_models:Growing", image_size=32))
    assert draws_weights("tests.own_models:Growing", loaded)
