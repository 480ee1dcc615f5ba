"""Calibration on a Ray cluster: parts of the set as tasks, which Ray does again elsewhere when a node dies."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from onnx import ModelProto

from spach_deploy.data.readers import ImageSource
from spach_deploy.distributed.cluster import check_address, connected
from spach_deploy.distributed.executor import RayExecutor
from spach_deploy.options.specs import Preprocessing
from spach_deploy.quantization.calibration import CalibrationSettings, CollectedStatistics
from spach_deploy.quantization.shards import collect_in_parts
from spach_deploy.quantization.statistics import TensorRequest

_BASE_BYTES = 700e6
"""Memory of a task beside its graph: Python, ONNX Runtime, one image's activations, statistics."""

_COPIES = 3
"""Of the graph in a task: as it came, read, and in ONNX Runtime."""


def collect_on_cluster(
    address: str,
    model: ModelProto,
    wanted: Sequence[TensorRequest],
    source: ImageSource,
    preprocessing: Preprocessing,
    run: CalibrationSettings,
) -> CollectedStatistics:
    """What `calibrate.collect` gives, from the nodes of the cluster at `address`.

    Raises MissingPackageError without ray, UnavailableError where no cluster answers, and what `collect` raises.
    """
    check_address(address)
    run = dataclasses.replace(run, threads=1)  # a task has one core
    with connected(address) as ray:
        executor = RayExecutor(ray, _BASE_BYTES + _COPIES * model.ByteSize())
        return collect_in_parts(model, wanted, source, preprocessing, run, executor)
