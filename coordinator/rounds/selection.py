"""Which devices a round asks: a seeded order of device names, and a fit of devices to slots.

The draw is over names, which the operator gives, not over ids, which are random. So the same seed and the same names
ask the same devices in every repetition of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SelectableDevice:
    """A device that may be asked.

    Attributes:
        device_id: random id of the device.
        name: name that the operator gave it.
        cap_bytes: memory that it granted at its last check-in.
    """

    device_id: str
    name: str
    cap_bytes: int


def draw_order(
    devices: Iterable[SelectableDevice], seed: int, round_number: int, slot: int | None = None
) -> list[SelectableDevice]:
    """All devices in the random order of a round, or of one of its slots: those at the front are asked first.

    Every order of the same names is equally likely. The order depends on these numbers and the names only.
    """
    by_name = sorted(devices, key=lambda device: device.name)
    keys = [seed, round_number] if slot is None else [seed, round_number, slot]
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(keys)))
    return [by_name[int(index)] for index in generator.permutation(len(by_name))]


def fit(
    order: Sequence[SelectableDevice], slots: int, required_bytes: Callable[[int], int]
) -> dict[int, SelectableDevice]:
    """Give each slot the first device in ``order`` whose cap admits it.

    Slots that need most choose first, so no slot stays empty that some device could have served.

    Args:
        order: devices in the round's random order.
        slots: number of slots.
        required_bytes: function that predicts the peak of a slot's task.

    Returns:
        the device of each slot; a slot that no free device can serve is missing.
    """
    free = list(order)
    chosen: dict[int, SelectableDevice] = {}
    demanding_first = sorted(range(slots), key=lambda slot: (-required_bytes(slot), slot))
    for slot in demanding_first:
        for device in free:
            if required_bytes(slot) <= device.cap_bytes:
                chosen[slot] = device
                free.remove(device)
                break
    return dict(sorted(chosen.items()))


def substitute(
    order: Sequence[SelectableDevice],
    slot: int,
    *,
    busy: set[str],
    had_slot: set[str],
    failed: set[str],
    required_bytes: Callable[[int], int],
) -> SelectableDevice | None:
    """The next device for a slot whose device fell out.

    Args:
        order: devices in the round's random order.
        slot: number of the slot to fill.
        busy: ids of devices that hold a slot of the round, or whose result was counted.
        had_slot: ids of devices that had this very slot before: they never get it again.
        failed: ids of devices that lost another slot of the round: they are asked after all others.
        required_bytes: function that predicts the peak of a slot's task.

    Returns:
        the device; None if no device is left that could serve the slot.
    """
    for device in sorted(order, key=lambda device: device.device_id in failed):
        if device.device_id in busy or device.device_id in had_slot:
            continue
        if required_bytes(slot) <= device.cap_bytes:
            return device
    return None
