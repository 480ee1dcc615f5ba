"""A Python-based backend of Triton that runs a version's graph in ONNX Runtime.

Placed as `onnxruntime` and as `tensorrt` it serves configurations as they are written, without the real backends. For
a plan it runs the model.onnx that a test puts beside it. It checks what real backends check of a request's tensors, and
keeps a record of the batches it was given: one line of sizes per call, in batches.txt beside the configuration.
"""

from __future__ import annotations

import importlib
import json
import os
from typing import Any

import numpy as np


class TritonPythonModel:
    """What Triton calls."""

    def initialize(self, args: dict[str, str]) -> None:
        self._triton: Any = importlib.import_module("triton_python_backend_utils")
        ort: Any = importlib.import_module("onnxruntime")
        config = json.loads(args["model_config"])
        self._names = [tensor["name"] for tensor in config["input"]]
        self._outputs = [tensor["name"] for tensor in config["output"]]
        self._is_batched = int(config["max_batch_size"]) > 0
        self._record = os.path.join(args["model_repository"], "batches.txt")
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        folder = os.path.join(args["model_repository"], args["model_version"])
        self._session = ort.InferenceSession(os.path.join(folder, "model.onnx"), options)

    def execute(self, requests: list[Any]) -> list[Any]:
        """All requests in one run, as a dynamic batch is meant; without a batch of its own, one by one."""
        groups = [requests] if self._is_batched else [[request] for request in requests]
        return [response for group in groups for response in self._run(group)]

    def _run(self, requests: list[Any]) -> list[Any]:
        get = self._triton.get_input_tensor_by_name
        feeds = [{name: get(request, name).as_numpy() for name in self._names} for request in requests]
        sizes = [len(feed[self._names[0]]) for feed in feeds]
        with open(self._record, "a", encoding="utf-8") as file:
            file.write(" ".join(map(str, sizes)) + "\n")
        joined = {name: np.concatenate([feed[name] for feed in feeds]) for name in self._names}
        results = dict(zip(self._outputs, self._session.run(self._outputs, joined), strict=True))
        ends = np.cumsum(sizes)
        return [self._response(results, end - size, end) for size, end in zip(sizes, ends, strict=True)]

    def _response(self, results: dict[str, Any], start: int, end: int) -> Any:
        tensors = [self._triton.Tensor(name, np.ascontiguousarray(array[start:end])) for name, array in results.items()]
        return self._triton.InferenceResponse(tensors)
