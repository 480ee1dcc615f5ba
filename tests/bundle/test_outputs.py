"""Which outputs can be asked of a model, under which names."""

from __future__ import annotations

import pytest

from spach_deploy.bundle.outputs import chosen_outputs
from spach_deploy.common.errors import UsageError
from spach_deploy.options.specs import FeatureLayout, OutputSpec, Role

STAGES = ((16, 8, 6), (32, 4, 3))
EVERY = (Role.FEATURES, Role.LOGITS, Role.EMBEDDING)


def described(spec: OutputSpec, classes: int = 7) -> dict[str, tuple[int | None, ...]]:
    return {tensor.name: tensor.shape for tensor in chosen_outputs(spec, classes, STAGES)}


def test_a_model_gives_its_logits_or_without_a_head_its_embedding() -> None:
    assert described(OutputSpec()) == {"logits": (None, 7)}
    assert described(OutputSpec(), classes=0) == {"embedding": (None, 32)}


def test_outputs_come_in_the_order_asked_for_under_the_names_asked_for() -> None:
    spec = OutputSpec(outputs=EVERY, names=("features2=deep", "logits=scores"))
    maps = {"features1": (None, 16, 8, 6), "deep": (None, 32, 4, 3)}
    assert list(described(spec).items()) == [*maps.items(), ("scores", (None, 7)), ("embedding", (None, 32))]
    tokens = OutputSpec(outputs=(Role.FEATURES,), feature_layout=FeatureLayout.TOKENS)
    assert described(tokens) == {"features1": (None, 48, 16), "features2": (None, 12, 32)}


def test_names_do_not_change_what_an_output_is() -> None:
    spec = OutputSpec(outputs=EVERY, names=("logits=embedding", "embedding=logits"))
    roles = {tensor.name: tensor.role for tensor in chosen_outputs(spec, 7, STAGES)}
    assert (roles["embedding"], roles["logits"]) == (Role.LOGITS, Role.EMBEDDING)


@pytest.mark.parametrize(
    ("spec", "classes", "reason"),
    [
        (OutputSpec(outputs=(Role.LOGITS,)), 0, "has no head"),
        (OutputSpec(top_k=3), 0, "--top-k is made of logits, and this graph gives embedding alone"),
        (OutputSpec(softmax=True, outputs=(Role.FEATURES,)), 7, "--softmax is made of logits"),
        (OutputSpec(names=("scores=x",)), 7, "there is no output scores"),
        (OutputSpec(names=("top_values=x",)), 7, "there is no output top_values"),
        (OutputSpec(names=("logits",)), 7, "cannot name an output"),
        (OutputSpec(names=("logits=a/b",)), 7, "cannot name an output"),
        (OutputSpec(names=("logits=input",)), 7, "cannot name an output"),
        (OutputSpec(softmax=True, names=("logits=probabilities",)), 7, "Two outputs would be called probabilities"),
    ],
)
def test_what_cannot_be_given_is_refused(spec: OutputSpec, classes: int, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        chosen_outputs(spec, classes, STAGES)
