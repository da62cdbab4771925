"""Gaussian noise from a secret key: ChaCha20's stream, and the Box-Muller transform (1958).

A generator made for simulations would let its later numbers be worked out from earlier ones. The last bits of a sum of
real numbers and noise tell of the numbers (Mironov 2012, "On significance of the least significant bits for
differential privacy"), so callers round what they give away to a grid that is coarse beside the noise: :func:`on_grid`.
"""

from __future__ import annotations

import hashlib

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

DoubleArray = NDArray[np.float64]
KEY_BYTES = 32
#: Steps of the grid in one standard deviation.
GRID_STEPS = 1024.0
#: Numbers that are drawn at a time, so that a long vector takes no more memory than itself.
PART = 1 << 16


def gaussian(key: bytes, label: str, count: int, std: float) -> DoubleArray:
    """So many independent normal numbers of mean 0, float64 (count,).

    Args:
        key: secret key of :data:`KEY_BYTES`.
        label: what they are for; each label of a key has numbers of its own.
        count: how many.
        std: standard deviation.
    """
    nonce = bytes(8) + hashlib.sha256(label.encode()).digest()[:8]  # the first half counts blocks
    stream = Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor()
    drawn = np.empty(count)
    for start in range(0, count, PART):
        wanted = min(PART, count - start)
        pairs = -(-wanted // 2)
        words = np.frombuffer(stream.update(bytes(16 * pairs)), "<u8")
        # 53 random bits each, in (0, 1]: the logarithm of none is infinite.
        uniform = ((words >> np.uint64(11)) + np.uint64(1)).astype(np.float64) * 2.0**-53
        radius, angle = std * np.sqrt(-2 * np.log(uniform[:pairs])), 2 * np.pi * uniform[pairs:]
        both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        drawn[start : start + wanted] = both[:wanted]
    return drawn


def on_grid(numbers: DoubleArray, std: float) -> DoubleArray:
    """Numbers with noise of this standard deviation, rounded to a grid of a 1024th of it."""
    step = 2.0 ** np.floor(np.log2(std / GRID_STEPS))
    rounded: DoubleArray = np.rint(numbers / step) * step
    return rounded
