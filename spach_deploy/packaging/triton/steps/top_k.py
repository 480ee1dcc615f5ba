"""Triton step of spach-deploy: logits -> the K best classes with probabilities and labels.

Among equal logits the lower index comes first, as in ONNX's TopK. Needs NumPy in the server's Python.
"""

from __future__ import annotations

import importlib
import json
import os
from typing import Any

import numpy as np
import numpy.typing as npt


def top_k(logits: npt.NDArray[Any], k: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Logits (B, classes) -> indices int64 (B, K) and softmax probabilities float32 (B, K), best first."""
    values = logits.astype(np.float64)
    exponentials = np.exp(values - values.max(axis=1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    indices = np.argsort(-values, axis=1, kind="stable")[:, :k]
    return indices.astype(np.int64), np.take_along_axis(probabilities, indices, axis=1).astype(np.float32)


class TritonPythonModel:
    """What Triton's Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read K and the labels."""
        self._triton: Any = importlib.import_module("triton_python_backend_utils")
        config = json.loads(args["model_config"])
        self._input = config["input"][0]["name"]
        self._k = int(config["parameters"]["top_k"]["string_value"])
        name = config["parameters"]["labels"]["string_value"]
        with open(os.path.join(args["model_repository"], name), encoding="utf-8-sig") as file:
            self._labels = np.array(file.read().splitlines(), dtype=np.object_)

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response per request."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        logits = self._triton.get_input_tensor_by_name(request, self._input).as_numpy()
        indices, probabilities = top_k(logits, self._k)
        labels = self._labels[indices]
        tensors = {"labels": labels, "probabilities": probabilities, "indices": indices}
        return self._triton.InferenceResponse([self._triton.Tensor(name, array) for name, array in tensors.items()])
