"""Whether what came in agrees enough to move the values: FwdLLM's gate (Xu et al. 2024, USENIX ATC).

FwdLLM asks the same round for more until the variance of the mean gradients of two halves of it, in one tensor chosen
beforehand, falls below a limit (0.1 or 0.2 there). Here all trained slice tensors are looked at: their directions are
random, and no one tensor is trained in every round of a cyclic split.
"""

from __future__ import annotations

import math
from collections.abc import Container

import numpy as np

from coordinator.aggregation.mean import Sums


def disagreement(even: Sums, odd: Sums, heads: Container[str]) -> float | None:
    """Variance between the mean deltas of two halves of a round.

    For one tensor of n entries that both halves trained, with mean deltas a and b, it is the mean over its entries of
    the sample variance of two numbers: sum (a - b)^2 / (2 n). For the round it is the mean over these tensors. The head
    is left out: its gradient is exact, and its size would drown the slices.

    Args:
        even: sums of what the even slots sent.
        odd: sums of what the odd slots sent.
        heads: flat names of the head's tensors.

    Returns:
        the variance, in the square of the deltas' unit; infinite if no tensor was trained by both halves; None if no
        slice was trained at all.
    """
    trained = [name for name in {**even, **odd} if name not in heads]
    if not trained:
        return None
    both = [name for name in sorted(trained) if name in even and name in odd]
    if not both:
        return math.inf
    variances = [np.square(even[name].mean - odd[name].mean).mean() / 2 for name in both]
    return float(np.mean(variances))
