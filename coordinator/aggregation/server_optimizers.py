"""The server's step on an averaged delta: FedAvg, momentum, FedAdagrad, FedYogi, FedAdam.

Reddi et al. 2021, "Adaptive Federated Optimization" (arXiv:2003.00295), Algorithm 2. With the averaged delta D::

    m = beta1 m + (1 - beta1) D                          (momentum, adagrad, yogi, adam)
    v = v + D^2                                          (adagrad)
    v = v - (1 - beta2) D^2 sign(v - D^2)                (yogi)
    v = beta2 v + (1 - beta2) D^2                        (adam)
    x = x + rate m / (sqrt(v) + tau)

m starts at 0 and v at tau^2; there is no bias correction. ``sgd`` is x + rate D (rate 1: FedAvg) and
``momentum`` x + rate m. All arithmetic is float64; x is rounded to float32 once a round, because that is what
travels, so a restart from the stored values continues bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordinator.config import ServerOptimizerConfig
from edge_runtime.package.slices import FloatArray

DoubleArray = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Optimiser state of one tensor.

    Attributes:
        m: running mean of the deltas, in the tensor's shape.
        v: accumulated squared deltas, in the tensor's shape.
    """

    m: DoubleArray
    v: DoubleArray

    @classmethod
    def initial(cls, shape: tuple[int, ...], config: ServerOptimizerConfig) -> Moments:
        """The state before the first step: m = 0, v = tau^2."""
        return cls(np.zeros(shape), np.full(shape, config.tau**2))


def step(
    x: FloatArray, delta: DoubleArray, moments: Moments, config: ServerOptimizerConfig
) -> tuple[FloatArray, Moments]:
    """One step on one tensor.

    Args:
        x: current values, float32.
        delta: averaged delta D, in the same shape.
        moments: optimiser state that the step before left.
        config: rule of the step, with its constants.

    Returns:
        new values in float32, which may be infinite if ``delta`` was enormous (the caller checks), and new state.
    """
    m, v = moments.m, moments.v
    if config.name == "sgd":
        return _moved(x, config.number * delta), moments
    m = config.beta1 * m + (1 - config.beta1) * delta
    if config.name == "momentum":
        return _moved(x, config.number * m), Moments(m, v)
    squared = delta * delta
    if config.name == "adagrad":
        v = v + squared
    elif config.name == "yogi":
        v = v - (1 - config.beta2) * squared * np.sign(v - squared)
    else:
        v = config.beta2 * v + (1 - config.beta2) * squared
    return _moved(x, config.number * m / (np.sqrt(v) + config.tau)), Moments(m, v)


def _moved(x: FloatArray, by: DoubleArray) -> FloatArray:
    with np.errstate(over="ignore"):
        return (x.astype(np.float64) + by).astype(np.float32)
