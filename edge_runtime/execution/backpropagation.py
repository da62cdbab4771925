"""The exact gradient, by checkpointed backpropagation over the same programs, package and weights.

The forward sweep runs the primal programs segment by segment and keeps each trained segment's input (Chen et al. 2016,
arXiv 1604.06174, section 3); the backward sweep runs the adjoint programs in reverse order, each of which computes its
segment again and passes the cotangent on. The head's adjoint starts it, so the head runs once. Every weight of a
segment behind the first trained slice is therefore read twice a step, where forward mode reads it once.

It is the baseline that forward mode is measured against (docs/decisions/0014-backpropagation.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import numpy as np

from edge_runtime.data.batches import Batch
from edge_runtime.engines.engine import Engine
from edge_runtime.errors import PackageError
from edge_runtime.execution.activation_store import ActivationStore
from edge_runtime.execution.executor import BAR, HIDDEN, Executor, Flow, Stage, Sweep, swept
from edge_runtime.execution.prefix_cache import ExampleStore
from edge_runtime.memory.plan import WeightsMode, adjoint_program, first_segment
from edge_runtime.package.manifest import Program
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.package.slices import FloatArray, Values


class Backpropagation(Executor):
    """Runs sweeps forwards and back.

    Args:
        prepared, engine, weights, cache: as of :class:`edge_runtime.execution.executor.Executor`.
        trained: names of the slices whose gradient is wanted, at least one beside the head.
        spill_folder: layer inputs wait in a file there; None keeps them in memory.

    Raises:
        PackageError: no slice is trained, or the package has no adjoint programs in its arithmetic.
    """

    def __init__(
        self,
        prepared: PreparedPackage,
        engine: Engine,
        trained: Sequence[str],
        weights: WeightsMode = "resident",
        cache: ExampleStore | None = None,
        spill_folder: Path | None = None,
    ) -> None:
        first = first_segment(prepared.manifest, tuple(trained))
        if first is None:
            raise PackageError("backpropagation needs a slice beside the head to train")
        count = len(prepared.manifest.segments)
        self._trained = frozenset(trained)
        self._first = first
        arithmetic = prepared.prepared.arithmetic
        adjoints = [
            prepared.manifest.programs[adjoint_program(prepared.manifest, index, arithmetic)]
            for index in range(first, count)
        ]
        self._back = tuple(adjoints)
        self._kept: ActivationStore | None = None
        super().__init__(prepared, engine, trained, weights, cache)
        self._adjoints = [
            self._adjoint_stage(index, adjoints[index - first], adjoints[: index - first])
            for index in reversed(range(first, count))
        ]
        self._spill_folder = spill_folder

    def gradient(
        self,
        values: Values,
        micro_batches: Sequence[Batch],
        rows: Sequence[Sequence[int]] | None = None,
        slopes: Callable[[FloatArray], FloatArray | None] = lambda cross_entropy: None,
    ) -> tuple[Sweep, Values]:
        """Losses of a batch, and the gradient of their mean.

        Args:
            values, micro_batches, rows: as of :meth:`Executor.sweep`.
            slopes: of a loss that is a function of each example's cross-entropy, (b,) at (b,); None for
                cross-entropy itself. Examples do not mix on the way back, so their cotangents are scaled at its start.

        Returns:
            The sweep without directional derivatives; and for every trained slice tensor, by flat name, its gradient
            (1, *s).
        """
        flows = self._begin(values, micro_batches, rows)
        with ActivationStore(self._spill_folder) as kept:
            self._kept = kept
            blocks = self._stages[self._first : -1]
            for stage, following in zip_longest(blocks, blocks[1:], fillvalue=self._stages[-1]):
                kept.push([flow[HIDDEN] for flow in flows])
                self._run_stage(stage, flows, values, None, following)
            sweep, gradient = self._backwards(flows, values, kept, slopes)
            self._kept = None
        return sweep, {name: (bar / len(sweep.loss)).astype(np.float32) for name, bar in gradient.items()}

    def _backwards(
        self,
        flows: list[Flow],
        values: Values,
        kept: ActivationStore,
        slopes: Callable[[FloatArray], FloatArray | None],
    ) -> tuple[Sweep, Values]:
        """The backward sweep; gradients are sums over the batch."""
        head, *blocks = self._adjoints
        self._run_stage(head, flows, values, None, blocks[0])
        for flow in flows:
            slope = slopes(flow["loss"])
            if slope is not None:
                flow[HIDDEN + BAR] = flow[HIDDEN + BAR] * slope[:, None, None]
        sweep = swept(flows)
        gradient: Values = {}
        for stage, following in zip_longest(blocks, blocks[1:]):
            for flow, hidden in zip(flows, kept.pop(), strict=True):
                flow[HIDDEN] = hidden
            self._run_stage(stage, flows, values, None, following)
            for flow in flows:
                for name, flat in stage.slice_inputs.items():
                    bar = flow.pop(name + BAR)
                    if flat.rpartition("/")[0] in self._trained:
                        gradient[flat] = gradient[flat] + bar if flat in gradient else bar
        return sweep, gradient

    def _stage(self, index: int, program: Program, later: Sequence[Program]) -> Stage:
        """As of the executor; what a forward stage leaves must also serve the whole backward sweep."""
        return super()._stage(index, program, (*later, *self._back))

    def _adjoint_stage(self, index: int, program: Program, later: Sequence[Program]) -> Stage:
        """Each adjoint gets its own segment's input back; the one that follows must not be held meanwhile."""
        stage = super()._stage(index, program, later)
        return replace(stage, needed_later=stage.needed_later - {HIDDEN})

    def _waiting(self, flows: Sequence[Flow]) -> Sequence[Flow]:
        arrays = self._kept.arrays if self._kept is not None else []
        return [*flows, {str(number): array for number, array in enumerate(arrays)}]

    def _program_of(self, index: int) -> Program:
        return self.manifest.programs[self.manifest.segments[index].primal]
