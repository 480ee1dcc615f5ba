"""State dicts of small models with demo weights, and short ways to save and load them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spach_deploy.common.errors import UsageError
from spach_deploy.models import LoadedModel, load_model
from spach_deploy.options.specs import ModelSpec


@functools.cache
def _state(name: str, num_classes: int) -> dict[str, Tensor]:
    return load_model(ModelSpec(name=name, num_classes=num_classes)).model.state_dict()


def state(name: str = "ms_trans_xxs", num_classes: int = 10) -> dict[str, Tensor]:
    """A fresh dictionary. Tests share its tensors: replace them, do not write into them."""
    return dict(_state(name, num_classes))


def save(folder: Path, content: Any, name: str = "weights.pth", **options: Any) -> Path:
    """`content` as torch.save writes it."""
    path = folder / name
    torch.save(content, path, **options)
    return path


def load(path: Path, name: str | None = None, **options: Any) -> LoadedModel:
    """What is loaded for these options."""
    return load_model(ModelSpec(name=name, checkpoint=path, **options))


def refusal(path: Path, name: str | None = None, **options: Any) -> str:
    """The whole sentence of the refusal; fails when `path` is loaded."""
    with pytest.raises(UsageError) as caught:
        load(path, name, **options)
    assert caught.value.exit_code == 2
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    return str(caught.value)
