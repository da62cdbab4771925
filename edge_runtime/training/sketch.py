"""Sketches: a slice's few largest numbers, projected to so many numbers whatever the slice's size, and found again.

Sparse Gradient Compression (SGC, arXiv 2502.00311): of d numbers g the s largest stay, top_s(g), and c = A·top_s(g) is
sent or kept, with a fixed A (k, d) of entries N(0, 1/k). Since A is linear, sketches may be added up and averaged.
Orthogonal matching pursuit finds the sparse numbers again: s times it takes the column of A that agrees best with what
is left, and fits all columns taken so far by least squares (Tropp & Gilbert 2007, "Signal Recovery From Random
Measurements Via Orthogonal Matching Pursuit"). Where k is below seven times s it often fails, so that is refused.

A slice is the paper's chunk: each has a sketch of its own, and slices of one size share one A. Device and coordinator
make the same A from the run's seed, row i by the words of (step 0, example 0, draw i) under the key of seed, round 0,
slot 0 and ``"sketch/"`` with d (:mod:`edge_runtime.training.tangents`).

Every sum is taken in a fixed order by elementwise operations, so that steps can be replayed to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from edge_runtime.package.manifest import SliceSpec, TensorSpec
from edge_runtime.package.slices import FloatArray, Values, decode_values, key, shapes
from edge_runtime.protocol.messages import Task, TrainingSettings
from edge_runtime.training.tangents import NORMALS, philox_key, random_words
from edge_runtime.training.trainable import estimated_slices, exact_heads

DoubleArray = NDArray[np.float64]
#: Name of a slice's sketch among the tensors of a report.
SKETCH = "sketch"
#: Share of a sketch's length below which what is left of it is rounding.
NOTHING = 1e-12


@dataclass(frozen=True)
class Sketch:
    """How slices are sketched.

    Attributes:
        size: number k of numbers of a sketch.
        entries: number s of numbers that a sketch stands for.
        seed: seed of the projection.
    """

    size: int
    entries: int
    seed: int

    def of(self, numbers: FloatArray | DoubleArray) -> DoubleArray:
        """The sketch (k,) of the largest of some numbers (d,)."""
        return project(self._projection(len(numbers)), numbers, largest(numbers, self.entries))

    def of_squares(self, numbers: FloatArray) -> DoubleArray:
        """The sketch (k,) of the squares of the largest of some numbers (d,)."""
        wide = numbers.astype(np.float64)
        return project(self._projection(len(numbers)), wide * wide, largest(numbers, self.entries))

    def found(self, sketch: FloatArray | DoubleArray, dimensions: int) -> DoubleArray:
        """The numbers (d,) that a sketch (k,) stands for: at most s of them are not zero."""
        pursuit = pursue(self._projection(dimensions), sketch, self.entries)
        numbers = np.zeros(dimensions)
        numbers[pursuit.support] = pursuit.fit(sketch)
        return numbers

    def both_found(
        self, first: FloatArray, second: FloatArray, dimensions: int
    ) -> tuple[NDArray[np.intp], DoubleArray, DoubleArray]:
        """Where the numbers of a first sketch are, and those of both sketches there."""
        pursuit = pursue(self._projection(dimensions), first, self.entries)
        return np.array(pursuit.support, np.intp), pursuit.fit(first), pursuit.fit(second)

    def _projection(self, dimensions: int) -> FloatArray:
        return projection(self.seed, self.size, dimensions)


def sketch_of(settings: TrainingSettings) -> Sketch | None:
    """The sketch that settings ask for; None if they ask for none."""
    return (
        Sketch(settings.sketch_size, settings.sketch_entries, settings.seed) if settings.sketch_size else None
    )


def sketched(delta: Mapping[str, FloatArray], specs: Sequence[SliceSpec], sketch: Sketch) -> Values:
    """A sketch of each slice in place of its tensors.

    Args:
        delta: changes by flat name.
        specs: slices, with those of their tensors alone that are sketched.
        sketch: how they are.
    """
    result = {name: array for name, array in delta.items() if name not in shapes(specs)}
    for spec in specs:
        flat = np.concatenate([delta[name].ravel() for name in shapes([spec])])
        result[key(spec.name, SKETCH)] = sketch.of(flat).astype(np.float32)
    return result


def sketch_spec(spec: SliceSpec, size: int) -> SliceSpec:
    """A slice whose one tensor is its sketch."""
    return replace(spec, tensors=(TensorSpec(SKETCH, (size,), SKETCH),))


def decode_sketches(data: bytes, task: Task, specs: Sequence[SliceSpec]) -> Values:
    """Parse and check a device's report of sketches.

    Args:
        data: safetensors bytes from outside.
        task: task of the report.
        specs: all slices of the package.

    Raises:
        SliceError: the bytes are not safetensors; or a sketch, or a tensor of a head with an exact gradient, is
            missing, unknown, of another shape or dtype, or not finite. Names it.
    """
    sketches = [sketch_spec(spec, task.sketch_size) for spec in estimated_slices(task, specs)]
    return decode_values(data, [*sketches, *exact_heads(task, specs)])


def projection_bytes(settings: TrainingSettings, specs: Sequence[SliceSpec]) -> int:
    """Memory of the projections of all slices, and of what a pursuit takes beside them; 0 without sketches."""
    sizes = {spec.dimensions for spec in specs if settings.sketch_size}
    return sum(settings.sketch_size * size * 4 for size in sizes) + 32 * max(sizes, default=0)


@lru_cache(maxsize=64)
def projection(seed: int, size: int, dimensions: int) -> FloatArray:
    """A·√k (k, d): standard normal entries, equal on every machine."""
    words = philox_key(seed, 0, 0, f"sketch/{dimensions}")
    made = np.empty((size, dimensions), np.float32)
    for row in range(size):
        made[row] = NORMALS.make(random_words(words, 0, 0, row, NORMALS.words(dimensions)), dimensions)
    made.setflags(write=False)
    return made


def largest(numbers: FloatArray | DoubleArray, count: int) -> NDArray[np.intp]:
    """Places of the numbers of largest magnitude, ascending; of equals the first, and none that are zero."""
    order = np.argsort(-np.abs(numbers), kind="stable")[:count]
    places: NDArray[np.intp] = np.sort(order[numbers[order] != 0])
    return places


def project(matrix: FloatArray, numbers: FloatArray | DoubleArray, places: NDArray[np.intp]) -> DoubleArray:
    """A·g for a g that is zero but at some places."""
    total = np.zeros(len(matrix))
    for place in places:
        total += matrix[:, place].astype(np.float64) * float(numbers[place])
    return total / math.sqrt(len(matrix))


@dataclass(frozen=True)
class Pursuit:
    """What orthogonal matching pursuit came to: columns taken, and a factorisation of them.

    Attributes:
        support: columns, in the order in which they were taken.
        basis: an orthonormal basis of them, each (k,).
        triangle: for each column its parts along the basis up to its own.
    """

    support: list[int]
    basis: list[DoubleArray]
    triangle: list[list[float]]

    def fit(self, sketch: FloatArray | DoubleArray) -> DoubleArray:
        """The numbers at the support whose projection comes closest to a sketch."""
        rest, along = sketch.astype(np.float64), []
        for unit in self.basis:
            along.append(_dot(unit, rest))
            rest = rest - along[-1] * unit
        numbers = np.zeros(len(self.support))
        for place in reversed(range(len(self.support))):
            for later in range(place + 1, len(self.support)):
                along[place] -= self.triangle[later][place] * numbers[later]
            numbers[place] = along[place] / self.triangle[place][place]
        return numbers


def pursue(matrix: FloatArray, sketch: FloatArray | DoubleArray, count: int) -> Pursuit:
    """Orthogonal matching pursuit.

    Args:
        matrix: A·√k, (k, d).
        sketch: sketch (k,).
        count: most columns to take.
    """
    found = Pursuit([], [], [])
    rest = sketch.astype(np.float64)
    enough = NOTHING * math.sqrt(_dot(rest, rest))
    while len(found.support) < min(count, *matrix.shape) and math.sqrt(_dot(rest, rest)) > enough:
        agreement = np.zeros(matrix.shape[1])
        for row, weight in zip(matrix, rest.tolist(), strict=True):
            agreement += row * weight
        agreement = np.abs(agreement)
        agreement[found.support] = -1
        column = int(agreement.argmax())
        own, parts = matrix[:, column].astype(np.float64) / math.sqrt(len(matrix)), []
        size = math.sqrt(_dot(own, own))
        for unit in found.basis:
            parts.append(_dot(unit, own))
            own = own - parts[-1] * unit
        length = math.sqrt(_dot(own, own))
        if length <= NOTHING * size:  # it lies in the others
            break
        found.support.append(column)
        found.basis.append(own / length)
        found.triangle.append([*parts, length])
        rest = rest - _dot(found.basis[-1], rest) * found.basis[-1]
    return found


def _dot(first: DoubleArray, second: DoubleArray) -> float:
    # A library's dot product would sum in an order of the CPU's own; a running sum has one order.
    return float(np.cumsum(first * second)[-1])
