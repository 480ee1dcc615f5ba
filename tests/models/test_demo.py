"""Demo weights: the same everywhere, and no branch of a model is idle with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spach_deploy.common.errors import ModelError, UsageError
from spach_deploy.models import Spach, create_model, load_demo_weights, load_model
from spach_deploy.models.checkpoint import weights_sha256
from spach_deploy.options.specs import ModelSpec, WeightSource

SMALL = ["conv_xxs", "mlp_xxs", "trans_xxs", "ms_conv_xxs", "ms_trans_xxs", "ms_mlp_xxs", "ms_hybrid_xs+"]


def test_the_note_is_in_plain_sight() -> None:
    loaded = load_model(ModelSpec(name="ms_trans_xxs", image_size=64, num_classes=5))
    assert loaded.origin == "demo"
    assert loaded.notes[0].startswith("demo weights")
    assert "not trained" in loaded.notes[0]
    assert (loaded.image_size, loaded.num_classes) == (64, 5)
    assert loaded.checkpoint_path is None
    assert loaded.checkpoint_sha256 is None


def test_values_depend_on_name_shape_and_seed_alone() -> None:
    first, again, other = (create_model("ms_trans_xxs", num_classes=5) for _ in range(3))
    for model, seed in ((first, 0), (again, 0), (other, 1)):
        load_demo_weights(model, seed)
    assert weights_sha256(first.state_dict()) == weights_sha256(again.state_dict())
    assert not any(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    wider = create_model("ms_trans_xxs", num_classes=9)
    load_demo_weights(wider)
    differing = [name for name, tensor in wider.state_dict().items() if not same(tensor, first.state_dict()[name])]
    assert differing == ["head.weight", "head.bias"]


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def test_values_are_pinned() -> None:
    """A report names demo weights by this hash: it must not move between versions and machines unseen."""
    assert load_model(ModelSpec(name="ms_trans_xxs")).weights_sha256.startswith("a3541292")


def test_ranges() -> None:
    state = load_model(ModelSpec(name="ms_hybrid_xs+")).model.state_dict()
    gammas = torch.cat([tensor.flatten() for name, tensor in state.items() if name.endswith("gamma_1")])
    assert gammas.min() >= 0.1
    assert gammas.max() <= 1.0
    assert (state["head.weight"] * 768**0.5).std() == pytest.approx(1, abs=0.01)
    assert state["norm2.weight"].mean() == pytest.approx(1, abs=0.02)
    assert state["head.bias"].std() == pytest.approx(0.1, abs=0.01)
    assert state["stem.proj.1.running_var"].min() >= 0.5
    assert state["stem.proj.1.num_batches_tracked"] == 0


@pytest.mark.parametrize("name", SMALL)
def test_every_tensor_matters(name: str) -> None:
    """Changing any tensor by its own size moves the answer, to first order, by a thousandth at least."""
    model = load_model(ModelSpec(name=name, image_size=64, num_classes=10)).model.requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    logits = model(torch.randn(2, 3, 64, 64, generator=generator))
    logits.backward(torch.randn(2, 10, generator=generator))
    shares = {
        name: float((parameter.grad.norm() * parameter.norm() / logits.norm()).detach())
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    assert len(shares) == len(list(model.parameters()))
    assert min(shares.values()) > 1e-3, min(shares, key=lambda name: shares[name])
    assert not torch.allclose(logits[0], logits[1], rtol=0.01)


def test_a_fresh_model_would_prove_nothing() -> None:
    with torch.no_grad():
        assert not create_model("ms_trans_xxs")(torch.ones(1, 3, 224, 224)).any()


@pytest.mark.parametrize("name", ["mlp_s_shared", "ms_mlp_s_shared"])
def test_shared_tensors_stay_shared(name: str) -> None:
    model = load_model(ModelSpec(name=name, num_classes=3)).model
    assert isinstance(model, Spach)
    stage = getattr(model, model.stage_names[-1])
    assert stage[-1].spatial_func is stage[-2].spatial_func


def test_no_name_and_no_checkpoint_is_an_error() -> None:
    with pytest.raises(ModelError, match="--model NAME, --checkpoint FILE"):
        load_model(ModelSpec())


def test_ema_of_demo_weights_is_an_error() -> None:
    with pytest.raises(UsageError, match="--checkpoint"):
        load_model(ModelSpec(name="ms_trans_xxs", weights=WeightSource.EMA))


def test_unknown_models_and_sizes_are_errors() -> None:
    with pytest.raises(ModelError, match="no model"):
        load_model(ModelSpec(name="ms_trans"))
    with pytest.raises(ModelError, match="too small"):
        load_model(ModelSpec(name="ms_trans_xxs", image_size=0))
    with pytest.raises(ModelError, match="classes -1 is not 0 to"):
        load_model(ModelSpec(name="ms_trans_xxs", num_classes=-1))
