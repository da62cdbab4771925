"""Which share of the devices each of several runs may have at work, where they go on beside each other.

A device trains one task at a time. Each run is given the devices that its rounds need at least; what is left goes, one
by one, to the run that has fewest, until it has as many as a round of it asks: max-min fairness (Bertsekas and Gallager
1992, "Data Networks", section 6.5.2). Where there are too few for what all need at least, runs take turns: the one
whose last round opened longest ago opens the next as soon as enough devices are free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.rounds.presence import askable
from coordinator.rounds.runs import Run, active_runs
from coordinator.storage import round_rows
from coordinator.storage.connection import Connection
from coordinator.storage.stores import Stores


@dataclass(frozen=True)
class Claim:
    """What a run asks of the fleet.

    Attributes:
        run_id: id of the run.
        least: devices without which a round of it cannot commit.
        most: devices that a round of it asks.
        waits: whether it waits to open a round.
        is_lasting: whether it keeps its devices from round to round, and so must leave them to one that waits.
    """

    run_id: str
    least: int
    most: int
    waits: bool
    is_lasting: bool


def shares(claims: Sequence[Claim], devices: int) -> dict[str, int]:
    """The most devices that each run may have at work.

    Args:
        claims: claims of the runs, in the order in which they were created.
        devices: number of devices that are there.
    """
    given = {claim.run_id: min(claim.least, claim.most) for claim in claims}
    left = devices - sum(given.values())
    if left < 0:
        others_wait = {
            claim.run_id: any(other.waits for other in claims if other is not claim) for claim in claims
        }
        return {
            claim.run_id: 0 if claim.is_lasting and others_wait[claim.run_id] else given[claim.run_id]
            for claim in claims
        }
    for _ in range(left):
        wanting = [claim for claim in claims if given[claim.run_id] < claim.most]
        if not wanting:
            break
        given[min(wanting, key=lambda claim: given[claim.run_id]).run_id] += 1
    return given


def share_of(stores: Stores, connection: Connection, run: Run, now_s: float) -> int | None:
    """The most devices that a run may have at work at present; None if it has the fleet to itself."""
    runs = [each for each in active_runs(stores, connection) if each.state == "running" and not each.paused]
    if all(each.run_id == run.run_id for each in runs):
        return None
    claims, devices = [], set()
    for each in runs:
        there = {device.device_id for device in askable(connection, each, now_s)}
        devices |= there
        claims.append(
            Claim(
                each.run_id,
                least=each.least_results,
                most=min(each.config.devices_per_round, len(there)),
                waits=round_rows.find_open(connection, each.run_id) is None,
                is_lasting=each.is_buffered,
            )
        )
    return shares(claims, len(devices))[run.run_id]
