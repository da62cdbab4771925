"""What nobody needs any more: results of rounds that are closed, files of processes that were killed, old events.

Deltas of committed rounds go at once; those of rounds that were abandoned or stopped, what a killed process left, and
server states that runs could have gone back to until they ended, are found here.
"""

from __future__ import annotations

import logging

from coordinator.rounds.results import TIMED_OUT
from coordinator.rounds.rollback import MOST_STATES
from coordinator.storage import checkpoint_rows, event_rows, result_rows, task_rows
from coordinator.storage.stores import Stores

log = logging.getLogger("coordinator")

#: Events that are kept, the newest of all runs together.
EVENTS_KEPT = 200_000
#: A file that no row names yet may belong to a transaction that is under way for this long.
GRACE_S = 3600.0


def clear_out(stores: Stores, wall_s: float) -> None:
    """Remove what nobody needs any more.

    Args:
        stores: handles on the state folder.
        wall_s: the present moment by the machine's clock, which dates files.
    """

    def needed() -> set[str]:
        with stores.storage.reading() as connection:
            return result_rows.needed_blobs(connection) | checkpoint_rows.needed_states(
                connection, most=MOST_STATES
            )

    def undecided() -> set[str]:
        with stores.storage.reading() as connection:
            return task_rows.undecided(connection, TIMED_OUT)

    files = stores.private_blobs.sweep(needed, before_s=wall_s - GRACE_S) + stores.uploads.sweep(undecided)
    with stores.storage.transaction() as connection:
        events = event_rows.forget_oldest(connection, kept=EVENTS_KEPT)
    if files or events:
        log.info("cleared_out files=%d events=%d", files, events)
