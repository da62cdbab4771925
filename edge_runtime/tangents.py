"""Directions for forward gradients: reproducible on any machine, never stored.

Entries are Rademacher, ±1 with equal chance: E[v vᵀ] = I as for a Gaussian, smaller variance of the
estimate, one random bit each. Bits come from Philox 4x64-10 (Salmon et al. 2011, "Parallel random numbers:
as easy as 1, 2, 3"), a counter-based generator made of integer operations only, so every CPU draws the same.

* key (128 bits): the first 16 bytes of SHA-256 over ``"edge tangents 1"``, run seed, round, slot and slice name;
* counter (4 × 64 bits): (block, draw, example, step); numpy's generator starts at block 1;
* bit j of word w is entry 64·w + j; a set bit is +1.

Three kinds of directions:

* ``per_example``: every example and draw has its own;
* ``shared``: a draw has one direction for the whole batch (drawn as example 0);
* ``orthogonal``: shared, and the draws of a step are rows of a randomly signed Hadamard matrix of order n, the
  smallest power of two ≥ d. Its columns are orthogonal, so n draws give Σ v vᵀ = n·I: the exact gradient.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_runtime.messages import Directions, Task
from edge_runtime.package import SliceSpec
from edge_runtime.slices import FloatArray, shapes

#: Kinds of which each example has its own; the others share a draw's direction over the batch.
PER_EXAMPLE: tuple[Directions, ...] = ("per_example",)
_DOMAIN = b"edge tangents 1"


def philox_key(seed: int, round_number: int, slot: int, slice_name: str) -> NDArray[np.uint64]:
    """The 128-bit key as two words."""
    packed = struct.pack("<QQQ", seed, round_number, slot) + slice_name.encode()
    return np.frombuffer(hashlib.sha256(_DOMAIN + packed).digest()[:16], dtype="<u8").astype(np.uint64)


def random_words(
    key: NDArray[np.uint64], step: int, example: int, draw: int, count: int
) -> NDArray[np.uint64]:
    """``count`` random 64-bit words for one (step, example, draw)."""
    return np.random.Philox(key=key, counter=[0, draw, example, step]).random_raw(count)


def signs(words: NDArray[np.uint64], count: int) -> NDArray[np.float32]:
    """The first ``count`` bits of ``words`` as ±1."""
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little", count=count)
    return bits.astype(np.float32) * 2 - 1


def draw_tangents(
    task: Task, specs: Sequence[SliceSpec], step: int, examples: Sequence[int]
) -> dict[str, FloatArray]:
    """All tangents of one step.

    Args:
        task: gives seed, round, slot, draws K and the kind of directions.
        specs: the slices the task trains, head excluded.
        step: number of the local step.
        examples: positions of the examples in the step's batch, B of them.

    Returns:
        For each flat tensor name of shape (1, *s) an array (K, B, *s).
    """
    if task.directions == "orthogonal":
        return _orthogonal(task, specs, step, len(examples))
    result: dict[str, FloatArray] = {}
    for spec in specs:
        key = philox_key(task.seed, task.round, task.slot, spec.name)
        size = spec.dimensions
        words = -(-size // 64)
        flat = np.empty((task.draws, len(examples), size), dtype=np.float32)
        for draw in range(task.draws):
            if task.directions == "shared":
                flat[draw, :] = signs(random_words(key, step, 0, draw, words), size)
                continue
            for position, example in enumerate(examples):
                flat[draw, position] = signs(random_words(key, step, example, draw, words), size)
        result.update(_split(flat, spec))
    return result


def hadamard_rows(rows: NDArray[np.int64], columns: int) -> FloatArray:
    """Rows of the Sylvester–Hadamard matrix: entry (i, j) is -1 to the number of common bits of i and j."""
    common = rows[:, None] & np.arange(columns)[None, :]
    parity = np.zeros_like(common)
    while common.any():
        parity ^= common & 1
        common >>= 1
    return (1 - 2 * parity).astype(np.float32)


def _orthogonal(task: Task, specs: Sequence[SliceSpec], step: int, batch: int) -> dict[str, FloatArray]:
    size = sum(spec.dimensions for spec in specs)
    order = 1 << max(size - 1, 0).bit_length()
    key = philox_key(task.seed, task.round, task.slot, "/".join(spec.name for spec in specs))
    cycles = -(-task.draws // order)
    made = []
    for cycle in range(cycles):
        # Each full set of rows gets its own column signs and row order.
        column_signs = signs(random_words(key, step, 0, 2 * cycle, -(-size // 64)), size)
        row_order = np.argsort(random_words(key, step, 0, 2 * cycle + 1, order), kind="stable")
        made.append(hadamard_rows(row_order, size) * column_signs)
    flat = np.concatenate(made)[: task.draws, None, :].repeat(batch, axis=1)
    result: dict[str, FloatArray] = {}
    start = 0
    for spec in specs:
        result.update(_split(flat[:, :, start : start + spec.dimensions], spec))
        start += spec.dimensions
    return result


def _split(flat: FloatArray, spec: SliceSpec) -> dict[str, FloatArray]:
    """Cut the entries of a slice into its tensors, in order."""
    result: dict[str, FloatArray] = {}
    start = 0
    for name, shape in shapes([spec]).items():
        count = int(np.prod(shape))
        part = flat[:, :, start : start + count]
        result[name] = np.ascontiguousarray(part.reshape(*flat.shape[:2], *shape[1:]))
        start += count
    return result
