"""Which devices a round may ask now, and which of them are expected to answer soon.

Each check-in is answered with a window in which the device asks again, so a device that is still there is heard of by
the end of it. One that is overdue is asked after all others, and not at all once it is overdue for longer than its
place would wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.rounds.protection import needs_protection
from coordinator.rounds.runs import Run
from coordinator.rounds.selection import SelectableDevice, draw_order
from coordinator.storage import device_rows, privacy_rows, protecting_rows, task_rows
from coordinator.storage.connection import Connection
from coordinator.storage.device_rows import SeenDevice

#: How far beyond its window a device still counts as live: busy devices and outages make check-ins late, and whom a
#: round asks must not hang on a second, or equal seeds would end in different bits.
SLACK_S = 30.0
#: How often a visit asks a device that fell out.
TIMES_ASKED = 2
#: What a check-in may take on its way.
WAY_S = 2.0
#: The longest that a place waits for a device because of the window that it was told.
MOST_PATIENCE_S = 120.0


def askable(connection: Connection, run: Run, now_s: float) -> list[SeenDevice]:
    """Devices that a round may ask: they are there, and the run has not set them aside.

    Where the configuration has ``seen_window_s``, a device is there for so long after its last check-in. In a visit
    every device is asked once, and once more if it fell out. With privacy none is asked that has had its rounds, and
    none that does not know how to protect what it contributes.
    """
    flat_s = run.config.seen_window_s
    asked = (
        task_rows.asked_in_phase(connection, run.run_id, run.phase, times=TIMES_ASKED)
        if run.visiting
        else set()
    )
    privacy = run.config.privacy
    used_up = (
        privacy_rows.used_up(connection, run.run_id, privacy.most_rounds)
        if privacy is not None and privacy.most_rounds
        else set()
    )
    protecting = protecting_rows.all_devices(connection) if needs_protection(run) else None
    return [
        device
        for device in device_rows.not_set_aside(connection, run.run_id)
        if device.device_id not in asked
        and device.device_id not in used_up
        and (protecting is None or device.device_id in protecting)
        and (
            now_s - device.seen_s <= flat_s
            if flat_s is not None
            else now_s - device.expected_s <= run.config.selection_s
        )
    ]


def is_live(device: SeenDevice, now_s: float) -> bool:
    """Whether a device is within the window that it was told at its last check-in."""
    return now_s <= device.expected_s + SLACK_S


def order_of_asking(
    devices: Sequence[SeenDevice], seed: int, round_number: int, now_s: float
) -> list[SelectableDevice]:
    """The round's draw of these devices, those that are overdue behind the others."""
    live = {device.device_id for device in devices if is_live(device, now_s)}
    selectable = [SelectableDevice(device.device_id, device.name, device.cap_bytes) for device in devices]
    drawn = draw_order(selectable, seed, round_number)
    return sorted(drawn, key=lambda device: device.device_id not in live)


def patience_s(device: SeenDevice, selection_s: float, now_s: float) -> float:
    """How long a place waits for a device: ``selection_s``, or until the window is over that it was told."""
    told_s = min(device.expected_s - now_s, MOST_PATIENCE_S)
    return max(selection_s, told_s + WAY_S)
