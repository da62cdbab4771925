"""What the exporter uses of ExecuTorch, imported without the libraries' notes about what else could be installed."""

from __future__ import annotations

from export.lowering.quiet import quiet

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
    "to_edge_transform_and_lower",
]
