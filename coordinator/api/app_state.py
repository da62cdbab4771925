"""What all requests share, and the one thread on which they meet the database, off the event loop."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from coordinator.api.traffic import Traffic
from coordinator.storage.stores import Stores

T = TypeVar("T")
Clock = Callable[[], float]


class AppState:
    """What every request handler needs.

    Args:
        stores: handles on the state folder.
        admin_token: the operator's bearer token.
        clock: function that tells the seconds since 1970.
    """

    def __init__(self, stores: Stores, admin_token: str, clock: Clock = time.time) -> None:
        self.stores = stores
        self.admin_token = admin_token
        self.clock = clock
        self.traffic = Traffic()
        #: Set when something happened that may move the open round.
        self.wake = asyncio.Event()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="database")

    async def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run ``work`` in one transaction, off the event loop; it takes effect whole or not at all."""

        def transact() -> T:
            with self.stores.storage.transaction() as connection:
                return work(connection)

        return await asyncio.get_running_loop().run_in_executor(self._executor, transact)

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run ``work`` on a consistent view, off the event loop; it writes nothing."""

        def view() -> T:
            with self.stores.storage.reading() as connection:
                return work(connection)

        return await asyncio.get_running_loop().run_in_executor(self._executor, view)

    def close(self) -> None:
        """End the thread; transactions under way are finished first."""
        self._executor.shutdown()
