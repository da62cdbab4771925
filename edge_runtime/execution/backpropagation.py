"""The exact gradient, by checkpointed backpropagation over the same programs, package and weights.

The forward sweep runs the primal programs segment by segment and keeps each trained segment's input (Chen et al. 2016,
arXiv 1604.06174, section 3). The backward sweep runs the adjoint programs in reverse order; each computes its segment
again and passes the cotangent on. It starts with the head's adjoint, so the head runs once. Every weight of a segment
from the first trained slice on is therefore read twice a step, where forward mode reads it once.

This is the baseline that forward mode is measured against (docs/decisions/0014-backpropagation.md).
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
from edge_runtime.execution.executor import Executor, Stage, Sweep, swept
from edge_runtime.execution.flow import BAR, HIDDEN, Flow
from edge_runtime.execution.prefix_cache import ExampleStore
from edge_runtime.memory.plan import WeightsMode, adjoint_program, first_segment
from edge_runtime.package.manifest import Program
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.package.slices import FloatArray, Values


class Backpropagation(Executor):
    """Runs sweeps forwards and backwards.

    Args:
        prepared: the package, prepared for this machine.
        engine: engine that loads the programs.
        trained: names of the slices whose gradient is wanted, at least one of them not the head.
        weights: whether weights stay in memory or pass through it.
        cache: store for the outputs of the segments before the first trained slice; None computes them every time.
        spill_folder: folder of the file that keeps layer inputs for the backward sweep; None keeps them in memory.

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
        count = len(prepared.manifest.segments_run)
        self._trained = frozenset(trained)
        self._first = first
        arithmetic = prepared.prepared.arithmetic
        adjoints = [
            prepared.manifest.programs[adjoint_program(prepared.manifest, index, arithmetic)]
            for index in range(first, count)
        ]
        self._back = tuple(adjoints)
        self._layer_inputs: ActivationStore | None = None
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
            values: values of all slices, by flat name.
            micro_batches: the batch, cut into groups that are padded alike.
            rows: each micro-batch's rows among the device's examples, by which the prefix cache names them; None uses
                no cache.
            slopes: derivative φ'(c), (b,), of a loss φ of each example's cross-entropy c, (b,); it scales the examples'
                cotangents at the start of the backward sweep. None from it stands for cross-entropy itself.

        Returns:
            The sweep without directional derivatives; and the gradient of every trained slice tensor, (1, *s) by flat
            name.
        """
        flows = self._begin(values, micro_batches, rows)
        with ActivationStore(self._spill_folder) as layer_inputs:
            self._layer_inputs = layer_inputs
            blocks = self._stages[self._first :] if self._head else self._stages[self._first : -1]
            for stage, following in zip_longest(blocks, blocks[1:], fillvalue=self._adjoints[0]):
                layer_inputs.push([flow[HIDDEN] for flow in flows])
                self._run_stage(stage, flows, values, None, following)
            sweep, gradient = self._backwards(flows, values, layer_inputs, slopes)
            self._layer_inputs = None
        return sweep, {name: (bar / len(sweep.loss)).astype(np.float32) for name, bar in gradient.items()}

    def _backwards(
        self,
        flows: list[Flow],
        values: Values,
        layer_inputs: ActivationStore,
        slopes: Callable[[FloatArray], FloatArray | None],
    ) -> tuple[Sweep, Values]:
        """The backward sweep. Its gradients are sums over the batch."""
        blocks = self._adjoints
        if self._head is None:
            self._run_stage(blocks[0], flows, values, None, blocks[1])
            for flow in flows:
                slope = slopes(flow["loss"])
                if slope is not None:
                    flow[HIDDEN + BAR] = flow[HIDDEN + BAR] * slope[:, None, None]
            blocks = blocks[1:]
        else:
            for flow in flows:
                self._head.classify(flow, values)
                self._head.add_cotangents(flow, values, slopes(flow["loss"]))
        sweep = swept(flows)
        gradient: Values = {}
        for stage, following in zip_longest(blocks, blocks[1:]):
            for flow, hidden in zip(flows, layer_inputs.pop(), strict=True):
                flow[HIDDEN] = hidden
                if self._head is not None:
                    self._head.enter(stage.index, flow)
            self._run_stage(stage, flows, values, None, following)
            for flow in flows:
                moved = [name for name in stage.slice_inputs if name + BAR in stage.program.outputs]
                for name, flat in ((name, stage.slice_inputs[name]) for name in moved):
                    bar = flow.pop(name + BAR)
                    if flat in self._ranked:
                        bar = self._ranked[flat].taken(bar, values[flat].shape[self._ranked[flat].axis])
                    if flat.rpartition("/")[0] in self._trained:
                        gradient[flat] = gradient[flat] + bar if flat in gradient else bar
        return sweep, gradient

    def _stage(self, index: int, program: Program, later: Sequence[Program]) -> Stage:
        """The stage of a forward sweep. What it leaves must also serve the whole backward sweep."""
        return super()._stage(index, program, (*later, *self._back))

    def _adjoint_stage(self, index: int, program: Program, later: Sequence[Program]) -> Stage:
        """The stage of a backward sweep.

        Each gets the input of its own segment back, so it need not leave it to the next one.
        """
        stage = super()._stage(index, program, later)
        return replace(stage, needed_later=stage.needed_later - {HIDDEN})

    def _waiting(self, flows: Sequence[Flow]) -> Sequence[Flow]:
        arrays = self._layer_inputs.arrays if self._layer_inputs is not None else []
        return [*flows, {str(number): array for number, array in enumerate(arrays)}]

    def _program_of(self, index: int) -> Program:
        return self.manifest.programs[self.manifest.segments[index].primal]
