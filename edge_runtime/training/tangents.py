"""Directions for forward gradients: reproducible on any machine, never stored.

Entries are Rademacher, ±1 with equal chance: E[v vᵀ] = I as for normal entries, but the estimate has a smaller variance
and an entry takes one random bit. To compare with published methods they may be standard normal instead. Words come
from Philox (:mod:`edge_runtime.training.philox`).

* key (128 bits): the first 16 bytes of SHA-256 over ``"edge tangents 1"``, run seed, round, slot and slice name;
* counter (4 × 64 bits): (block, draw, example, step); blocks count from 1;
* signs: bit j of word w is entry 64·w + j; a set bit is +1;
* normal: words 2p and 2p + 1 make entries 2p and 2p + 1 (:func:`normals`).

Kinds of directions:

* ``per_example``: every example and draw has its own;
* ``one_slice``: the same, but each moves one slice alone, by ±√S of S slices; draws and examples take the slices in
  turn, from one drawn anew in each step. E[v vᵀ] = I still holds, but a slice's error is S·d_s/(K·B) times its own
  squared gradient: a slice of small gradients is not drowned in the noise of others;
* ``dealt``: one slice a draw too, but a slice's directions are dealt from decks, without replacement over draws,
  examples, steps and devices (:func:`_dealt`);
* ``shared``: a draw has one direction for the whole batch (drawn as example 0);
* ``orthogonal``: shared, and the draws of a step are rows of a randomly signed Hadamard matrix of order n, the smallest
  power of two ≥ d. Its columns are orthogonal, so n draws give Σ v vᵀ = n·I: the exact gradient;
* ``gaussian``: shared, with standard normal entries, as Spry is published (arXiv 2405.15551);
* ``filtered``: of normal candidates, those nearest to a reference (:mod:`edge_runtime.training.filtered_directions`);
  candidate c is drawn as draw c.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_runtime.package.manifest import SliceSpec
from edge_runtime.package.slices import FloatArray, Values, shapes
from edge_runtime.protocol.messages import PER_EXAMPLE, Task
from edge_runtime.training.filtered_directions import draw_filtered
from edge_runtime.training.philox import BLOCK, MANY_BLOCKS, Words, words_at

_DOMAIN = b"edge tangents 1"
#: Number of which all normal entries are whole multiples.
GRAIN = 2.0**-12
#: Numbers of Hadamard rows that are made at a time.
ROW_NUMBERS = 1 << 16


@dataclass(frozen=True)
class Entries:
    """How a direction's entries are made of random words.

    Attributes:
        words: function from a number of entries to the number of words that they take.
        make: function from words (..., n) and a number of entries to float32 entries (..., count).
    """

    words: Callable[[int], int]
    make: Callable[[Words, int], FloatArray]


def philox_key(seed: int, round_number: int, slot: int, slice_name: str) -> Words:
    """The 128-bit key of a slice, as two words."""
    packed = struct.pack("<QQQ", seed, round_number, slot) + slice_name.encode()
    key: Words = np.frombuffer(hashlib.sha256(_DOMAIN + packed).digest()[:16], dtype="<u8").astype(np.uint64)
    return key


def random_words(key: Words, step: int, example: int, draw: int, count: int) -> Words:
    """``count`` random 64-bit words of one (step, example, draw)."""
    words: Words = words_at(key[None], step, [example], [draw], count)[0, 0, 0]
    return words


def signs(words: Words, count: int) -> FloatArray:
    """±1 from the first ``count`` bits of the last axis of ``words``."""
    octets = np.ascontiguousarray(words, dtype="<u8").view(np.uint8)
    bits = np.unpackbits(octets, axis=-1, bitorder="little", count=count)
    return bits.astype(np.float32) * 2 - 1


def normals(words: Words, count: int) -> FloatArray:
    """The first ``count`` standard normal numbers of the last axis of ``words``, by Box and Muller's transform.

    Words (a, b) make u = (a's upper 53 bits + 1)/2⁵³ and w = (b's upper 53 bits)/2⁵³, and √(-2 ln u)·cos 2πw and
    √(-2 ln u)·sin 2πw. Both are rounded to multiples of 2⁻¹²: the last bits of a C library's logarithm and sine may
    differ from CPU to CPU, and show only where they straddle half a multiple, about once in 10¹² numbers.
    """
    upper = (words >> np.uint64(11)).astype(np.float64)
    radius = np.sqrt(-2.0 * np.log((upper[..., 0::2] + 1.0) * 2.0**-53))
    angle = upper[..., 1::2] * (2.0 * np.pi * 2.0**-53)
    made = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    flat = made.reshape(*words.shape[:-1], words.shape[-1])[..., :count]
    return (np.rint(flat / GRAIN) * GRAIN).astype(np.float32)


SIGNS = Entries(lambda count: -(-count // 64), signs)
NORMALS = Entries(lambda count: count + count % 2, normals)


def draw_tangents(
    task: Task,
    specs: Sequence[SliceSpec],
    step: int,
    examples: Sequence[int],
    reference: Values | None = None,
) -> dict[str, FloatArray]:
    """All tangents of one step.

    Args:
        task: task with seed, round, slot, number K of draws and kind of directions.
        specs: slices whose gradient is estimated.
        step: number of the local step.
        examples: positions of the B examples in the step's batch.
        reference: values that ``filtered`` directions are compared with; None if there are none yet.

    Returns:
        Tangents by flat name: (K, B, *s) for a slice tensor of shape (1, *s), and (K, B, *shape) for a tensor of the
        head, which is not repeated over examples.

    Raises:
        SliceError: the reference lacks a tensor of ``specs``, or has it in another shape.
    """
    if not specs:
        return {}
    if task.directions == "dealt":
        return split(_dealt(task, specs, step, examples), specs)
    if task.directions in PER_EXAMPLE:
        flat = draw_flat(task, specs, step, examples, range(task.draws), SIGNS)
        if task.directions == "one_slice":
            flat *= _turns(task, specs, step, examples)
        return split(flat, specs)
    if task.directions == "orthogonal":
        flat = _orthogonal(task, specs, step)
    elif task.directions == "filtered":

        def candidate(number: int) -> FloatArray:
            drawn: FloatArray = draw_flat(task, specs, step, [0], [number], NORMALS)[0, 0]
            return drawn

        flat = draw_filtered(candidate, specs, task.draws, task.candidates, reference, GRAIN)
    else:
        entries = SIGNS if task.directions == "shared" else NORMALS
        flat = draw_flat(task, specs, step, [0], range(task.draws), entries)
    return split(flat.repeat(len(examples), axis=1), specs)


def _turns(task: Task, specs: Sequence[SliceSpec], step: int, examples: Sequence[int]) -> FloatArray:
    """(K, B, d) factors: √S on the entries of the slice whose turn it is, 0 on those of the other slices.

    Draw k of example i moves slice (start + i·K + k) mod S, so an example's draws take different slices.
    """
    key = philox_key(task.seed, task.round, task.direction_slot, "/".join(spec.name for spec in specs))
    start = int(random_words(key, step, 0, 0, 1)[0] % np.uint64(len(specs)))
    places = np.arange(task.draws)[:, None] + np.asarray(examples) * task.draws
    owners = np.repeat(np.arange(len(specs)), [spec.dimensions for spec in specs])
    mine: FloatArray = ((start + places)[:, :, None] % len(specs) == owners).astype(np.float32)
    mine *= np.float32(len(specs) ** 0.5)
    return mine


def _dealt(task: Task, specs: Sequence[SliceSpec], step: int, examples: Sequence[int]) -> FloatArray:
    """Dealt directions (K, B, d), each ±√S on one of S slices and 0 on the others.

    A deck of a slice of d_s entries is the n rows of a Hadamard matrix, n the smallest power of two ≥ d_s, in a random
    order; of its columns the first d_s are kept, each under a random sign. So a row is ±1 with E[r rᵀ] = I, and over a
    whole deck Σ r rᵀ = n·I: n draws of a slice give the mean gradient of examples that agree, without error.

    The turns of a round are numbered: ((slot·steps + step)·batch size + example)·K + draw. Turn t moves slice
    (t·stride + start) mod S, with a random start, by row (t div S) mod n of deck (t div S) div n. So a device goes on
    where the one in the slot before it ends. Turns that a device leaves out, for it has few rows, are rows that nobody
    deals. The stride (:func:`stride_over`) spreads an example's few draws evenly over the model, so that about as many
    of each example's have begun in a segment, and examples that run together skip as much as they would alone.

    Keys name no slot (0 in its place): that of the start is of "deck/" and all slice names, that of a deck of "deck/"
    and its slice. The deck's number stands in the counter in place of the example, and in that of the draw 0 for the
    start, 1 for signs, 2 for the order.
    """
    count = len(specs)
    key = philox_key(task.seed, task.round, 0, "deck/" + "/".join(spec.name for spec in specs))
    start = int(random_words(key, 0, 0, 0, 1)[0]) % count
    first = (task.direction_slot * task.steps + step) * task.batch_size * task.draws
    turns = (first % count + np.asarray(examples) * task.draws + np.arange(task.draws)[:, None]).ravel()
    owners, visits = (turns * stride_over(count) + start) % count, turns // count
    ends = np.cumsum([0, *(spec.dimensions for spec in specs)])
    flat = np.zeros((len(turns), ends[-1]), dtype=np.float32)
    alike: dict[int, list[int]] = {}
    for index, spec in enumerate(specs):
        alike.setdefault(spec.dimensions, []).append(index)
    for size, members in alike.items():
        keys = np.stack([philox_key(task.seed, task.round, 0, f"deck/{specs[i].name}") for i in members])
        mine = np.flatnonzero(np.isin(owners, members))
        decks = np.searchsorted(members, owners[mine])
        together = max(1, ROW_NUMBERS // size)
        for begin in range(0, len(mine), together):
            some = slice(begin, begin + together)
            entries = ends[owners[mine[some]]][:, None] + np.arange(size)
            rows = _cards(keys, size, decks[some], first // count, visits[mine[some]])
            flat[mine[some][:, None], entries] = rows
    flat *= np.float32(count**0.5)
    return flat.reshape(task.draws, len(examples), -1)


def _cards(
    keys: Words, size: int, members: NDArray[np.int64], first: int, visits: NDArray[np.int64]
) -> FloatArray:
    """Rows (V, d_s) of the decks of slices of ``size`` entries.

    Args:
        keys: (M, 2) key of each slice.
        size: number d_s of entries.
        members: (V,) which of the slices each row is of.
        first: number that is added to all visits.
        visits: (V,) numbers of the visits, of which each takes the next row of its slice.
    """
    order = 1 << (size - 1).bit_length()
    decks, places = np.divmod(first % order + visits, order)
    named, decks = np.unique(decks, return_inverse=True)
    numbers = [(first // order + int(deck)) % (1 << 64) for deck in named]
    column_signs = signs(words_at(keys, 0, numbers, [1], -(-size // 64))[:, 0], size)
    orders = np.argsort(words_at(keys, 0, numbers, [2], order)[:, 0], axis=-1, kind="stable")
    rows: FloatArray = hadamard_rows(orders[members, decks, places], size)
    return rows * column_signs[members, decks]


def stride_over(count: int) -> int:
    """The smallest stride from count/φ on that meets all of ``count`` slices, φ the golden ratio; below ``count``."""
    stride = count * 618034 // 1000000
    while math.gcd(stride, count) != 1:
        stride += 1
    return stride


def draw_flat(
    task: Task,
    specs: Sequence[SliceSpec],
    step: int,
    examples: Sequence[int],
    draws: Sequence[int],
    entries: Entries,
) -> FloatArray:
    """Independent directions (K, B, d) of the given draws and examples, all slices side by side."""
    ends = np.cumsum([0, *(spec.dimensions for spec in specs)])
    flat = np.empty((len(draws), len(examples), ends[-1]), dtype=np.float32)
    alike: dict[int, list[int]] = {}
    for index, spec in enumerate(specs):
        alike.setdefault(spec.dimensions, []).append(index)
    for size, members in alike.items():
        keys = np.stack(
            [philox_key(task.seed, task.round, task.direction_slot, specs[i].name) for i in members]
        )
        count = entries.words(size)
        # Draw by draw where there are many words: they would take more memory than the directions.
        together = 1 if count >= BLOCK * MANY_BLOCKS else len(draws)
        for first in range(0, len(draws), together):
            some = slice(first, first + together)
            made = entries.make(words_at(keys, step, examples, draws[some], count), size)
            for row, index in enumerate(members):
                flat[some, :, ends[index] : ends[index + 1]] = made[row]
    return flat


def split(flat: FloatArray, specs: Sequence[SliceSpec]) -> dict[str, FloatArray]:
    """Cut directions (K, B, d) into the tensors of the slices, in their order.

    Returns:
        Tangents by flat name: (K, B, *s) for a slice tensor of shape (1, *s), and (K, B, *shape) for a tensor of the
        head.
    """
    result: dict[str, FloatArray] = {}
    start = 0
    for spec in specs:
        for name, shape in shapes([spec]).items():
            count = int(np.prod(shape))
            part = flat[:, :, start : start + count]
            own = shape if spec.kind == "head" else shape[1:]
            result[name] = np.ascontiguousarray(part.reshape(*flat.shape[:2], *own))
            start += count
    return result


def hadamard_rows(rows: NDArray[np.int64], columns: int) -> FloatArray:
    """Rows of the Sylvester–Hadamard matrix: entry (i, j) is (-1)^(number of common bits of i and j)."""
    common = rows[:, None] & np.arange(columns)[None, :]
    parity = np.zeros_like(common)
    while common.any():
        parity ^= common & 1
        common >>= 1
    return (1 - 2 * parity).astype(np.float32)


def _orthogonal(task: Task, specs: Sequence[SliceSpec], step: int) -> FloatArray:
    """Orthogonal directions (K, 1, d)."""
    size = sum(spec.dimensions for spec in specs)
    order = 1 << max(size - 1, 0).bit_length()
    key = philox_key(task.seed, task.round, task.direction_slot, "/".join(spec.name for spec in specs))
    made = []
    for cycle in range(-(-task.draws // order)):
        # Each full set of rows gets its own column signs and row order.
        column_signs = signs(random_words(key, step, 0, 2 * cycle, -(-size // 64)), size)
        row_order = np.argsort(random_words(key, step, 0, 2 * cycle + 1, order), kind="stable")
        wanted = row_order[: task.draws - cycle * order]
        made.append(hadamard_rows(wanted, size) * column_signs)
    return np.concatenate(made)[:, None, :]
