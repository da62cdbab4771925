"""Random projections of a row's features, for sums of fewer bytes: k numbers in place of D.

A subsampled randomised Hadamard transform (Ailon & Chazelle 2009, "The fast Johnson-Lindenstrauss transform and
approximate nearest neighbors"; Tropp 2011, arXiv 1011.1595): every feature gets a random sign, the whole is turned by
the orthogonal matrix H/√n of Sylvester and Hadamard, n the smallest power of two ≥ D, and k of the n results are kept,
drawn without replacement. No row grows by it, so sums of projections are held to the same bound as sums of features.
Nothing but the seed has to be known to make it again, and no matrix of D · k numbers is ever kept.

Signs and places come from Philox (:mod:`edge_runtime.training.philox`), under the key of :func:`philox_key` with the
run's seed, round and slot 0, and the name ``sums/``; step and example are 0, the draw is 0 for signs and 1 for places,
which are the first k of the n words in ascending order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_runtime.training.tangents import hadamard_rows, philox_key, random_words, signs


class Projection:
    """The projection of one run.

    Args:
        width: number D of a row's features.
        kept: number k of projections.
        seed: seed of the run.
    """

    def __init__(self, width: int, kept: int, seed: int) -> None:
        power = max(width - 1, 1).bit_length()
        # H is the Kronecker product of two smaller ones: turning the features is two products with these.
        self._left, self._right = (_hadamard(1 << (power // 2)), _hadamard(1 << (power - power // 2)))
        self._size, self._width = 1 << power, width
        key = philox_key(seed, 0, 0, "sums/")
        self._signs = signs(random_words(key, 0, 0, 0, -(-width // 64)), width)
        self._places = np.argsort(random_words(key, 0, 0, 1, self._size), kind="stable")[:kept]

    def of(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Projections (b, k) of features (b, D)."""
        padded = np.zeros((len(features), self._size), np.float32)
        padded[:, : self._width] = features * self._signs
        return self._turned(padded)[:, self._places]

    def back(self, weight: NDArray[np.float32]) -> NDArray[np.float32]:
        """The weight (C, D) on features that gives what a weight (C, k) gives on their projections."""
        spread = np.zeros((len(weight), self._size), np.float32)
        spread[:, self._places] = weight
        return self._turned(spread)[:, : self._width] * self._signs

    def _turned(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Rows (b, n) times H/√n."""
        square = rows.reshape(len(rows), len(self._left), len(self._right))
        turned: NDArray[np.float32] = np.matmul(np.matmul(self._left, square), self._right)
        return turned.reshape(rows.shape)


def _hadamard(order: int) -> NDArray[np.float32]:
    """The orthogonal H/√order."""
    matrix: NDArray[np.float32] = hadamard_rows(np.arange(order), order) / np.float32(order**0.5)
    return matrix
