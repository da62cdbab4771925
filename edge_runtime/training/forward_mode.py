"""Forward mode: directional derivatives from dual programs, and the estimate made of them.

A step is :meth:`ForwardMode.step`, readable top to bottom.

A direction that moves one late slice is zero in all segments before it, and so is the hidden state's tangent: nothing
need be computed of it there. So each example's draws run in the order in which they begin, and a segment runs those
that have begun (:meth:`edge_runtime.execution.executor.Executor.sweep`). The derivatives are then put back in the order
of the draws, so that the estimate's sums are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from edge_runtime.data.batches import IntArray
from edge_runtime.errors import PackageError
from edge_runtime.execution.executor import Sweep
from edge_runtime.package.manifest import SliceSpec
from edge_runtime.package.slices import HEAD_PREFIX, FloatArray, Values, shapes
from edge_runtime.protocol.messages import PER_EXAMPLE
from edge_runtime.training.gradient import clamped, estimate, head_jvps, shared_jvps
from edge_runtime.training.line import along_line
from edge_runtime.training.losses import apply_loss
from edge_runtime.training.methods import measures_line
from edge_runtime.training.step import LocalWork, MicroBatches, Step, finite, head_parts, with_exact_head
from edge_runtime.training.step_exit import within
from edge_runtime.training.step_rank import step_rank
from edge_runtime.training.tangents import draw_tangents


class ForwardMode:
    """Estimates the gradient by forward mode; see :class:`edge_runtime.training.step.Estimator`."""

    def __init__(self, work: LocalWork) -> None:
        self._work = work

    def step(self, number: int, values: Values, rows: IntArray) -> Step | None:
        """See :meth:`edge_runtime.training.step.Estimator.step`."""
        work, task, executor = self._work, self._work.task, self._work.executor
        # 1. Group examples of like length; an example keeps its position in the batch as part of its tangent's key.
        parts = work.micro_batches(rows)
        # 2. Draw a direction per draw and example, or one for all examples.
        shared = task.directions not in PER_EXAMPLE
        keyed = [0] if shared else range(len(rows))
        ranks = step_rank(task, executor.manifest.slices, number)
        moved = within(task, work.estimated_slices, number)
        moved = moved if ranks is None else ranks.moved(moved)
        tangents = draw_tangents(task, moved, number, keyed, work.reference)
        begins = _begins(tangents, moved, len(executor.manifest.segments))
        turn = np.argsort(begins, axis=0, kind="stable")
        # 3. Sweeps through the segments give loss and directional derivatives of each example, some draws at a time.
        together = work.choice.draws_at_a_time if executor.first_trained is not None else task.draws
        order = [position for group in parts.positions for position in group]
        jvps = []
        for first in range(0, task.draws, together):
            chosen = turn[first : first + together]
            by_part = [_of_examples(tangents, chosen, group, shared) for group in parts.positions]
            if ranks is not None:
                by_part = [ranks.placed(part) for part in by_part]
            waiting = np.take_along_axis(begins, chosen, axis=0)
            begun = [
                _begun(waiting if shared else waiting[:, group], len(executor.manifest.segments))
                for group in parts.positions
            ]
            sweep = apply_loss(task, executor.sweep(values, parts.batches, by_part, parts.rows, begun))
            if not finite(sweep):
                return None
            jvps.append(_jvps(sweep, _of_head(tangents, chosen), order))
        # 4. Forward gradient of the slices, made of few numbers in the order of the batch; exact gradient of the head.
        scalars = np.concatenate(jvps)
        scalars = _taken(scalars, np.argsort(turn, axis=0))
        if not np.isfinite(scalars).all():
            return None
        scalars = clamped(shared_jvps(scalars) if shared else scalars, task.jvp_limit)
        step = with_exact_head(work, estimate(scalars, tangents), sweep, scalars)
        # 5. One more sweep along the line that the task came with.
        if not measures_line(task):
            return step
        line = self._along_line(values, parts)
        return None if line is None else replace(step, line=line)

    def _along_line(self, values: Values, parts: MicroBatches) -> tuple[float, float] | None:
        """Slope and curvature of the loss along the task's line; None if something is not finite."""
        work, line = self._work, self._work.reference or {}
        tangents = [
            {name: np.repeat(line[name][None], len(group), axis=1) for name in shapes(work.estimated_slices)}
            for group in parts.positions
        ]
        sweep = work.executor.sweep(values, parts.batches, tangents, parts.rows)
        if not finite(sweep) or sweep.jvps is None:
            return None
        return along_line(sweep.jvps[0], sweep.loss)


def _begins(tangents: Values, specs: Sequence[SliceSpec], segments: int) -> IntArray:
    """(K, b) index of the first segment in which each direction moves a slice; ``segments`` where only a head moves."""
    found = [(name, spec) for spec in specs for name in shapes([spec])]
    first = np.full(next(iter(tangents.values())).shape[:2], segments)
    for name, spec in found:
        if spec.kind != "head":
            moves = tangents[name].reshape(*first.shape, -1).any(axis=-1)
            first = np.where(moves, np.minimum(first, spec.segment), first)
    return first


def _begun(begins: IntArray, segments: int) -> list[int]:
    """For each segment, the number of leading draws of which some example's has begun; draws come as they begin."""
    return [int((begins <= index).any(axis=1).sum()) for index in range(segments)]


def _taken(array: FloatArray, turn: IntArray) -> FloatArray:
    """Draws (k, b, ...) of an array (K, b, ...), each example's by its own numbers (k, b)."""
    taken: FloatArray = np.take_along_axis(array, turn.reshape(*turn.shape, *[1] * (array.ndim - 2)), axis=0)
    return taken


def _of_examples(tangents: Values, chosen: IntArray, group: Sequence[int], shared: bool) -> Values:
    """The slices' tangents (k, b, *s) of the chosen draws for one micro-batch; the head's are used elsewhere.

    Args:
        tangents: tangents (K, B, *s) of all draws, or (K, 1, *s) of shared ones, by flat name.
        chosen: numbers (k, B) or (k, 1) of each example's draws.
        group: positions of the micro-batch's examples in the batch.
        shared: whether the batch shares its directions.
    """
    columns = [0] * len(group) if shared else list(group)
    return {
        name: tangent[chosen[:, columns], columns]
        for name, tangent in tangents.items()
        if not name.startswith(HEAD_PREFIX)
    }


def _of_head(tangents: Values, chosen: IntArray) -> Values:
    """A perturbed head's tangents (k, b, *shape) of the chosen draws; empty where the head is not perturbed."""
    return {
        name: _taken(tangent, chosen) for name, tangent in tangents.items() if name.startswith(HEAD_PREFIX)
    }


def _jvps(sweep: Sweep, heads: Values, order: Sequence[int]) -> FloatArray:
    """Directional derivatives (k, B) in the order of the batch, those along a perturbed head's tangents included.

    Args:
        sweep: outputs of a sweep.
        heads: a perturbed head's tangents of the sweep's draws, by flat name.
        order: position in the batch of each of the sweep's examples.
    """
    positions = np.argsort(order)
    jvps = None if sweep.jvps is None else sweep.jvps[:, positions]
    if heads:
        residual, features = head_parts(sweep)
        moved = head_jvps(residual[positions], features[positions], heads)
        jvps = moved if jvps is None else jvps + moved
    if jvps is None:
        raise PackageError("the package's programs do not give directional derivatives")
    return jvps
