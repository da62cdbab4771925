"""Losses that are functions of each example's cross-entropy, applied to the outputs of a sweep.

The partially Huberised cross-entropy (Menon et al., ICLR 2020, "Can gradient clipping mitigate label noise?", section
5) is -log p of the label's probability p while p > 1/τ, and below that its tangent, a line in p. In the cross-entropy c
= -log p:

    φ(c) = c                       φ'(c) = 1            for c ≤ log τ
    φ(c) = 1 + log τ - τ·e^{-c}    φ'(c) = τ·e^{-c}     for c > log τ

An example whose label is all but impossible, perhaps a wrong label, pulls with a force that goes to zero. No program
changes: by the chain rule, an example's loss, directional derivatives and residual are mapped and scaled.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from edge_runtime.execution.executor import Sweep
from edge_runtime.package.slices import FloatArray
from edge_runtime.protocol.messages import Task


def phuber(cross_entropy: FloatArray, tau: float) -> tuple[FloatArray, FloatArray]:
    """Loss and slope, (B,) each, at cross-entropies (B,). Those up to log τ stay as they are to the last bit."""
    knot = math.log(tau)
    slope = np.minimum(1.0, tau * np.exp(-cross_entropy.astype(np.float64)))
    bent = 1.0 + knot - slope
    straight = cross_entropy <= knot
    loss = np.where(straight, cross_entropy, bent.astype(np.float32))
    return loss, np.where(straight, np.float32(1.0), slope.astype(np.float32))


def slopes(task: Task, cross_entropy: FloatArray) -> FloatArray | None:
    """(B,) factor by which the task's loss scales each example's gradient; None for cross-entropy itself."""
    return phuber(cross_entropy, task.phuber_tau)[1] if task.loss == "phuber" else None


def apply_loss(task: Task, sweep: Sweep) -> Sweep:
    """A sweep with the task's loss in place of cross-entropy, and derivatives and residual scaled to match."""
    if task.loss == "cross_entropy":
        return sweep
    loss, slope = phuber(sweep.loss, task.phuber_tau)
    return replace(
        sweep,
        loss=loss,
        jvps=None if sweep.jvps is None else sweep.jvps * slope,
        residual=None if sweep.residual is None else sweep.residual * slope[:, None],
    )
