"""What the exporter uses of ExecuTorch, imported without the libraries' notes about what else could be installed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings and no log lines below errors: standard error is for our own one line."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


with quiet():
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass

__all__ = [
    "ALL_PARTITIONER_CONFIGS",
    "EdgeCompileConfig",
    "ExecutorchBackendConfig",
    "MemoryPlanningPass",
    "XnnpackPartitioner",
    "quiet",
    "to_edge_transform_and_lower",
]
