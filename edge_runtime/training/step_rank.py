"""DyLoRA's steps: each trains the first b of a device's ranks, b drawn anew (Valipour et al. 2023, EACL, section 3).

Under ``dynamic`` a step moves all of these b ranks; under ``dynamic_frozen`` the b-th alone, as the released training
does: ranks before it are used and stay, and a direction has a b-th of the entries. A device and whoever replays its
scalars draw the same b: uniform over 1 to the device's rank, from word 0 of (step, 0, 0) under the key of seed, round,
slot and ``"rank/"`` (:mod:`edge_runtime.training.tangents`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_runtime.package.manifest import SliceSpec
from edge_runtime.package.ranked_values import cut, widened
from edge_runtime.package.ranks import at_rank, rank_axes
from edge_runtime.package.slices import FloatArray, Values, key
from edge_runtime.protocol.messages import Task
from edge_runtime.training.tangents import philox_key, random_words


@dataclass(frozen=True)
class StepRank:
    """The ranks of one step.

    Attributes:
        rank: number b of ranks that are used.
        alone: whether the last of them is moved alone.
        specs: all slices, as the device holds them.
    """

    rank: int
    alone: bool
    specs: tuple[SliceSpec, ...]

    def moved(self, specs: Sequence[SliceSpec]) -> list[SliceSpec]:
        """Slices with those ranks alone that the step moves: what its directions are drawn for."""
        return [at_rank(spec, 1 if self.alone else self.rank) for spec in specs]

    def values(self, values: Values) -> Values:
        """Values of all slices at the step's rank."""
        return cut(values, [at_rank(spec, self.rank) for spec in self.specs])

    def placed(self, tangents: Values) -> Values:
        """Tangents of what is moved, (K, b, *s), as tangents of the values: zeros in ranks that stay."""
        return {name: self._widened(name, tangent, self.rank) for name, tangent in tangents.items()}

    def whole(self, gradient: Values, values: Values) -> Values:
        """A gradient of what is moved, as one of the device's values: zeros in all other ranks."""
        return {
            name: self._widened(name, slope, values[name].shape[self._axes[name]])
            if name in self._axes
            else slope
            for name, slope in gradient.items()
        }

    def narrowed(self, gradient: Values) -> Values:
        """A gradient of the step's values, as one of what is moved."""
        if not self.alone:
            return gradient
        return {
            name: np.take(slope, [self.rank - 1], axis=self._axes[name]) if name in self._axes else slope
            for name, slope in gradient.items()
        }

    @property
    def _axes(self) -> dict[str, int]:
        """The axis of ranks of each tensor that has one, from the last."""
        return {
            key(spec.name, tensor.name): rank_axes(spec)[tensor.name] - len(tensor.shape)
            for spec in self.specs
            for tensor in spec.tensors
            if tensor.name in rank_axes(spec)
        }

    def _widened(self, name: str, array: FloatArray, side: int) -> FloatArray:
        axis = self._axes.get(name)
        if axis is None:
            return array
        return widened(array, array.ndim + axis, side, self.rank - 1 if self.alone else 0)


def step_rank(task: Task, specs: Sequence[SliceSpec], number: int) -> StepRank | None:
    """The ranks of a step; None where a task trains all that its device holds.

    Args:
        task: settings of the training.
        specs: all slices, as the device holds them.
        number: number of the step.
    """
    if task.rank_mode == "fixed":
        return None
    held = min(
        tensor.shape[rank_axes(spec)[tensor.name]]
        for spec in specs
        for tensor in spec.tensors
        if tensor.name in rank_axes(spec)
    )
    key_of_ranks = philox_key(task.seed, task.round, task.slot, "rank/")
    drawn = int(random_words(key_of_ranks, number, 0, 0, 1)[0] % np.uint64(held))
    return StepRank(drawn + 1, task.rank_mode == "dynamic_frozen", tuple(specs))
