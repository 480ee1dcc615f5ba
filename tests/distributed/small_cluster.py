"""A real Ray cluster in one machine: a head that computes nothing, and nodes with one core each."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

needs_ray = [
    pytest.mark.ray,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="ray is not installed (pip install 'spach-deploy[ray]')"
    ),
]

_STORE_BYTES = 150 << 20


def add_node(cluster: Any, store_bytes: int = _STORE_BYTES) -> Any:
    return cluster.add_node(num_cpus=1, object_store_memory=store_bytes)


@contextlib.contextmanager
def cluster_of(nodes: int) -> Iterator[Any]:
    """A cluster that ends with the block."""
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": _STORE_BYTES}
    cluster = importlib.import_module("ray.cluster_utils").Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(nodes):
            add_node(cluster)
        yield cluster
    finally:
        cluster.shutdown()
