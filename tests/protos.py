"""Functions on `onnx_ir` models for tests that have messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import onnx_ir as ir
from onnx import ModelProto

from spach_deploy.graph.editing import as_proto

R = TypeVar("R")


def in_place(function: Callable[..., R], proto: ModelProto, *arguments: Any) -> R:
    """Let `function`, which changes a model in place, change `proto`; what it returned."""
    model = ir.from_proto(proto)
    result = function(model, *arguments)
    proto.CopyFrom(as_proto(model))
    return result
