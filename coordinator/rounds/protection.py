"""What a run's tasks ask devices to do to their contributions before these leave them."""

from __future__ import annotations

from typing import Literal

from coordinator.rounds.runs import Run
from edge_runtime.protocol.messages import Protection

#: What an integer of masked sums stands for. Scaled so that a row adds at most 1 to their norm, they keep more digits
#: than features have, and 2^24 rows of a device are far from the largest integer.
SUMS_QUANTUM = 2.0**-30
#: Standard deviations of a device's own noise that the range of a masked contribution leaves room for.
NOISE_ROOM = 8.0


def protection_of(run: Run) -> Protection | None:
    """The protection of a run's tasks in its present phase; None if there is none."""
    config, privacy = run.config, run.config.privacy
    if privacy is None and not config.secure_aggregation:
        return None
    clip_norm = None if privacy is None or privacy.unit == "row" else privacy.clip_norm
    noise_std = privacy.noise_std if privacy is not None and privacy.where == "device" else 0.0
    if not config.secure_aggregation:
        return Protection(clip_norm, noise_std)
    bits: Literal[32, 64] = 64 if run.visiting else 32
    largest = ((1 << (bits - 1)) - 1) // config.devices_per_round
    reach = config.secure_range if clip_norm is None else clip_norm + NOISE_ROOM * noise_std
    quantum = SUMS_QUANTUM if run.visiting else reach / largest
    return Protection(clip_norm, noise_std, bits, quantum, largest)


def needs_protection(run: Run) -> bool:
    """Whether a device must know how to protect what it contributes."""
    return run.config.privacy is not None or run.config.secure_aggregation
