"""Outputs of a classifier's graph, for tests that have logits and no model."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from spach_deploy.bundle.outputs import expected_outputs, graph_outputs
from spach_deploy.bundle.schema import TensorInfo
from spach_deploy.options.specs import OutputSpec, Role


def classifier(classes: int, spec: OutputSpec | None = None) -> tuple[TensorInfo, ...]:
    """The outputs of a graph with these classes."""
    logits = TensorInfo(name="logits", dtype="float32", shape=(None, classes), layout="NC", role=Role.LOGITS)
    return graph_outputs([logits], spec or OutputSpec())


def of_logits(logits: npt.NDArray[np.float32], spec: OutputSpec | None = None) -> dict[str, npt.NDArray[Any]]:
    """The expected outputs of such a graph."""
    return expected_outputs({"logits": logits}, classifier(logits.shape[1], spec))
