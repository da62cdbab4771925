"""Values with fewer ranks than a package has, and arrays widened again (:mod:`edge_runtime.package.ranks`)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from edge_runtime.package.manifest import SliceSpec
from edge_runtime.package.ranks import rank_axes
from edge_runtime.package.slices import FloatArray, Values, key


def cut(values: Values, specs: Iterable[SliceSpec]) -> Values:
    """Values with the first ranks alone of those tensors that ``specs`` hold in a lower rank; others as they are."""
    result = dict(values)
    for spec in specs:
        for tensor in spec.tensors:
            axis, name = rank_axes(spec).get(tensor.name), key(spec.name, tensor.name)
            if axis is not None and name in result and result[name].shape[axis] > tensor.shape[axis]:
                first = (slice(None),) * axis + (slice(tensor.shape[axis]),)
                result[name] = np.ascontiguousarray(result[name][first])
    return result


def widened(array: FloatArray, axis: int, side: int, place: int = 0) -> FloatArray:
    """An array with zeros around it along an axis, so long that its entries begin at ``place`` of ``side``."""
    if array.shape[axis] == side:
        return array
    around = [(0, 0)] * array.ndim
    around[axis] = (place, side - place - array.shape[axis])
    return np.pad(array, around)
