"""What a change from older values weighs in a buffered run.

FedBuff (Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous Aggregation", arXiv 2106.06639) moves the
values once so many changes are in, each of them scaled by s(t) = 1 / sqrt(1 + t), where t is the number of steps that
the server made since the device got its values. The weights of the mean stay as they are, so a buffer of stale changes
makes a shorter step. What is fresh keeps every bit.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from coordinator.aggregation.mean import Contribution


def discounted(contribution: Contribution, staleness: int) -> Contribution:
    """A contribution scaled for its age.

    Args:
        contribution: the contribution.
        staleness: server steps since its device got its values.
    """
    if staleness == 0:
        return contribution
    weight = 1 / math.sqrt(1 + staleness)
    delta = {name: array.astype(np.float64) * weight for name, array in contribution.delta.items()}
    return replace(contribution, delta=delta)
