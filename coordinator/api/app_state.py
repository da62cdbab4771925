"""What all requests share, and the one thread on which they meet the database, off the event loop.

Whatever waits when that thread gets to it becomes one transaction, each piece of work in a savepoint of its own. So the
disk is flushed once for all of them, and the more requests there are, the less each costs.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from coordinator.api.attempts import Attempts
from coordinator.api.changes import Changes
from coordinator.api.kept import Kept
from coordinator.api.traffic import Traffic
from coordinator.clock import StepWatch
from coordinator.monitoring.metrics import Metrics
from coordinator.monitoring.tracing import tracing_from_environment
from coordinator.refusals import UnavailableError
from coordinator.storage.connection import Connection
from coordinator.storage.database import savepoint
from coordinator.storage.stores import Stores

T = TypeVar("T")
Clock = Callable[[], float]

#: Most pieces of work in one transaction, and most that may wait.
BATCH = 256
MOST_WAITING = 10_000


@dataclass(frozen=True)
class _Piece:
    """Work that waits for the database, and whoever waits for it."""

    work: Callable[[Connection], Any]
    writes: bool
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]


#: A piece of work, what came of it, and what it raised.
_End = tuple[_Piece, Any, Exception | None]


def _end_all(ends: list[_End]) -> None:
    """Tell whoever waits for pieces of work, if anybody still does; on the event loop's thread."""
    for piece, result, error in ends:
        if piece.future.done():
            continue
        if error is None:
            piece.future.set_result(result)
        else:
            piece.future.set_exception(error)


class AppState:
    """What every request handler needs.

    Args:
        stores: handles on the state folder.
        admin_token: the operator's bearer token.
        metrics_token: token that reads figures and nothing else.
        clock: seconds since 1970, in time that does not jump.
        wall: seconds since 1970 by the machine's clock.
    """

    def __init__(
        self, stores: Stores, admin_token: str, metrics_token: str, clock: Clock, wall: Clock
    ) -> None:
        self.stores = stores
        self.admin_token = admin_token
        self.metrics_token = metrics_token
        self.clock = clock
        self.wall = wall
        #: Handles for what one of several coordinators alone does, which must claim them first.
        self.leading = replace(stores, storage=stores.storage.leader())
        #: The claim whose beginning was looked after, and whose turn it is to look.
        self.looked_after = 0
        self.claiming = asyncio.Lock()
        self.steps = StepWatch(clock, wall)
        self.traffic = Traffic()
        self.metrics = Metrics()
        self.tracing = tracing_from_environment()
        #: Names of loops behind the API that have ended by an error.
        self.ended_loops: list[str] = []
        #: Set when something happened that may move the open round.
        self.wake = asyncio.Event()
        #: Held while a body is parsed that is too large to be parsed beside others.
        self.large_body = asyncio.Lock()
        #: Held while a password is hashed, which takes 32 MiB.
        self.hashing = asyncio.Lock()
        self.attempts = Attempts()
        self.changes = Changes()
        self.fleet = Kept()
        self._waiting: deque[_Piece] = deque()
        #: Whether the database's thread was asked to look at what waits, and has not looked yet.
        self._asked = False
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="database")

    def note_aggregation(self, run_id: str, number: int, seconds: float) -> None:
        """Tell monitoring how long the aggregation of a round took, which ends now."""
        self.metrics.note_aggregation(seconds)
        self.tracing.ended("aggregation", seconds, {"edge.run_id": run_id, "edge.round": number})

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Run ``work``, off the event loop; what it writes takes effect whole or not at all, before this returns.

        Raises:
            UnavailableError: ``trouble``, too much waits already.
        """
        return await self._queue(work, writes=True)

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Run ``work`` on a consistent view, off the event loop; it writes nothing."""
        return await self._queue(work, writes=False)

    @property
    def waiting(self) -> int:
        """Number of pieces of work that wait for the database."""
        return len(self._waiting)

    def close(self) -> None:
        """End the thread; what waits is done first."""
        self._executor.shutdown()
        self.tracing.close()

    async def _queue(self, work: Callable[[Connection], T], *, writes: bool) -> T:
        if len(self._waiting) >= MOST_WAITING:
            raise UnavailableError(
                "trouble", f"{MOST_WAITING} requests wait for the database; try again later"
            )
        loop = asyncio.get_running_loop()
        piece = _Piece(work, writes, loop, loop.create_future())
        self._waiting.append(piece)
        if not self._asked:
            self._asked = True
            self._executor.submit(self._work_off)
        result: T = await piece.future
        return result

    def _work_off(self) -> None:
        """Do what waits, so many pieces in a transaction; on the database's thread."""
        self._asked = False  # first: what comes from now on asks again
        while pieces := [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]:
            try:
                with self.metrics.transaction():
                    ends = self._transact(pieces)
            except Exception as error:  # noqa: BLE001 - it is raised again for each of them
                ends = [(piece, None, error) for piece in pieces]
            for loop in {piece.loop for piece in pieces}:
                loop.call_soon_threadsafe(_end_all, [end for end in ends if end[0].loop is loop])

    def _transact(self, pieces: list[_Piece]) -> list[_End]:
        storage = self.stores.storage
        if len(pieces) == 1:
            piece = pieces[0]
            with storage.transaction() if piece.writes else storage.reading() as connection:
                return [(piece, piece.work(connection), None)]
        writes = any(piece.writes for piece in pieces)
        with storage.transaction() if writes else storage.reading() as connection:
            return [self._attempt(connection, piece) for piece in pieces]

    @staticmethod
    def _attempt(connection: Connection, piece: _Piece) -> _End:
        """One of several pieces of work in a transaction; what it raises is its own affair."""
        try:
            with savepoint(connection):
                return piece, piece.work(connection), None
        except Exception as error:
            if not connection.in_transaction:  # the disk is full, or so: SQLite has undone all of them
                raise
            return piece, None, error
