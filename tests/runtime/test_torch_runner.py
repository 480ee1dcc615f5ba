from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spach_deploy.common.errors import MismatchError
from spach_deploy.runtime import Runner, TensorSpec
from spach_deploy.runtime.torch_runner import TorchRunner

INPUTS = {"images": TensorSpec("float32", (None, 4))}


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.drop(self.fc(x))
        return y


def x(batch: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal((batch, 4)).astype(np.float32)


def test_runs_any_batch_and_knows_its_outputs() -> None:
    model = Tiny().eval()
    with TorchRunner(model, INPUTS, max_batch=3) as runner:
        checked: Runner = runner
        assert checked.output_specs == {"logits": TensorSpec("float32", (None, 2))}
        outputs = checked.run({"images": x(7)})
    np.testing.assert_allclose(outputs["logits"], model(torch.from_numpy(x(7))).detach().numpy(), rtol=1e-6)


def test_float64_is_computed_in_float64_and_leaves_the_model_alone() -> None:
    model = Tiny().eval()
    with TorchRunner(model, INPUTS, dtype="float64") as runner:
        logits = runner.run({"images": x(2)})["logits"]
    weight, bias = model.fc.weight.detach().numpy(), model.fc.bias.detach().numpy()
    assert weight.dtype == np.float32
    expected = x(2).astype(np.float64) @ weight.T.astype(np.float64) + bias
    np.testing.assert_allclose(logits, expected, rtol=1e-14)


def test_a_model_in_training_mode_is_evaluated_and_stays_in_training_mode() -> None:
    model = Tiny().train()
    with TorchRunner(model, INPUTS) as runner:
        first, second = (runner.run({"images": x(2)})["logits"] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert model.training


def test_several_outputs_take_their_names_in_order() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x.argmax(1)

    with TorchRunner(Two().eval(), INPUTS, output_names=("values", "best")) as runner:
        assert list(runner.run({"images": x(3)})) == ["values", "best"]
        assert runner.output_specs["best"] == TensorSpec("int64", (None,))


def test_wrong_feeds_are_refused() -> None:
    with TorchRunner(Tiny(), INPUTS) as runner, pytest.raises(MismatchError, match="PyTorch"):
        runner.run({"images": x(2).astype(np.float64)})
