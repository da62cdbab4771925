"""Slice tensors of fewer ranks than a program takes: widened with zeros and scaled, see edge_runtime.package.ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_runtime.package.manifest import Manifest
from edge_runtime.package.ranked_values import widened
from edge_runtime.package.ranks import fed_shape, rank_axes, scaled_tensor
from edge_runtime.package.slices import FloatArray, key


@dataclass(frozen=True)
class RankedInput:
    """How a program takes a tensor that may be cut.

    Attributes:
        axis: axis of its ranks, counted from the last.
        side: number of ranks that the program takes.
        carries_scale: whether the tensor makes up for the program's scale, which is that of all ranks.
    """

    axis: int
    side: int
    carries_scale: bool

    def fed(self, array: FloatArray) -> FloatArray:
        """A value (1, *s), or tangent (K, b, *s), as the program takes it."""
        held = array.shape[self.axis]
        if held == self.side:
            return array
        wide = widened(array, array.ndim + self.axis, self.side)
        return wide * np.float32(self.side / held) if self.carries_scale else wide

    def taken(self, bar: FloatArray, held: int) -> FloatArray:
        """The gradient of a tensor of so many ranks, of the gradient of what the program took."""
        if held == self.side:
            return bar
        first = np.take(bar, range(held), axis=self.axis)
        return first * np.float32(self.side / held) if self.carries_scale else first


def ranked_inputs(manifest: Manifest) -> dict[str, RankedInput]:
    """Those of a package's slice tensors that may be cut, by flat name."""
    found = {}
    for spec in manifest.slices:
        for tensor in spec.tensors:
            axis = rank_axes(spec).get(tensor.name)
            if axis is not None:
                shape = fed_shape(tensor)
                scales = tensor.name == scaled_tensor(spec)
                found[key(spec.name, tensor.name)] = RankedInput(axis - len(shape), shape[axis], scales)
    return found
