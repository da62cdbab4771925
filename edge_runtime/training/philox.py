"""Random words by address: Philox 4x64-10 over whole arrays of counters.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3 and table 2. Philox is made of integer
operations only, so every CPU draws the same. A tangent is a few words at each of many addresses, and making one of
numpy's generators for each (13 µs) took longer than the words. Here all addresses go through the ten rounds together.
Addresses with many words are left to numpy's own generator, which makes the same words faster once it is set up.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

#: Number of words in a block, and number of blocks of an address from which numpy's generator is as fast.
BLOCK = 4
MANY_BLOCKS = 64
_ROUNDS = 10
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B))
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def words_at(keys: Words, step: int, examples: Sequence[int], draws: Sequence[int], count: int) -> Words:
    """Words of every address, as numpy's generator with the counter (0, draw, example, step) gives them.

    Args:
        keys: (G, 2) key of each slice.
        step: number of the local step.
        examples: positions of the B examples in the step's batch.
        draws: numbers of the K draws.
        count: number of words of each address.

    Returns:
        (G, K, B, count) words by key, draw and example.
    """
    blocks = -(-count // BLOCK)
    if blocks >= MANY_BLOCKS:
        made = [
            np.random.Philox(key=key, counter=[0, draw, example, step]).random_raw(count)
            for key in keys
            for draw in draws
            for example in examples
        ]
        return np.stack(made).reshape(len(keys), len(draws), len(examples), count)
    counter = (
        np.arange(1, blocks + 1, dtype=np.uint64),
        np.asarray(draws, dtype=np.uint64)[:, None, None],
        np.asarray(examples, dtype=np.uint64)[:, None],
        np.uint64(step),
    )
    made_blocks = philox(counter, (keys[:, 0, None, None, None], keys[:, 1, None, None, None]))
    shape = (len(keys), len(draws), len(examples), blocks)
    words = np.stack([np.broadcast_to(word, shape) for word in made_blocks], axis=-1)
    return words.reshape(*shape[:3], blocks * BLOCK)[..., :count]


def philox(
    counter: tuple[Words, Words, Words, Words | np.uint64], key: tuple[Words, Words]
) -> tuple[Words, Words, Words, Words]:
    """One block for each counter and key; all of them are broadcast against each other."""
    c0, c1, c2, c3 = (np.asarray(word) for word in counter)
    k0, k1 = (np.asarray(word) for word in key)
    for _ in range(_ROUNDS):
        high0, low0 = _product(_MULTIPLIERS[0], c0)
        high1, low1 = _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _WEYL[0], k1 + _WEYL[1]
    return c0, c1, c2, c3


def _product(factor: int, words: Words) -> tuple[Words, Words]:
    """Upper and lower 64 bits of a product, by halves."""
    high, low = np.uint64(factor >> 32), np.uint64(factor & 0xFFFFFFFF)
    word_high, word_low = words >> _HALF, words & _LOW
    carried = high * word_low + ((low * word_low) >> _HALF)
    middle = low * word_high + (carried & _LOW)
    upper = high * word_high + (carried >> _HALF) + (middle >> _HALF)
    return upper, words * np.uint64(factor)
