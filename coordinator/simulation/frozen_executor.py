"""A pass for a head in closed form, of which every row is computed once, whoever holds it and whenever it is asked for.

Such a pass runs primal programs alone, and between two rounds of slices it runs them on equal values: in all rounds of
a visit, and over seeds and partitions where no slice is trained. What each block gave is pooled and kept; the head, its
losses and the sums are computed anew, for they depend on the round.
"""

from __future__ import annotations

from coordinator.simulation.kept_prefixes import DevicePrefixes
from edge_runtime.engines.engine import Engine
from edge_runtime.execution.executor import Executor
from edge_runtime.memory.plan import WeightsMode
from edge_runtime.package.prepared import PreparedPackage


class FrozenExecutor(Executor):
    """Programs of a manifest that has ``head_blocks``, all of whose segments are the prefix.

    Args:
        prepared: the package, prepared for this machine.
        engine: engine that loads the programs.
        weights: whether weights stay in memory or pass through it.
        prefixes: store of what the blocks gave; it must be turned to the slices' values before each use.
    """

    def __init__(
        self, prepared: PreparedPackage, engine: Engine, weights: WeightsMode, prefixes: DevicePrefixes
    ) -> None:
        super().__init__(prepared, engine, (), weights, prefixes)
        self.first_trained = len(prepared.manifest.segments_run)
