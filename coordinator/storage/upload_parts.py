"""Results on their way in parts, in the database: whichever process a part comes to, it finds the others.

The same as :class:`coordinator.storage.upload_store.UploadStore`, whose words hold here too. A part is kept in the
transaction that took it in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection

from coordinator.storage.connection import Connection
from coordinator.storage.postgres import PostgresStorage


class UploadParts:
    """Begun uploads as rows of ``upload_parts``.

    Args:
        storage: database; what is called within a transaction of its thread belongs to that.
    """

    def __init__(self, storage: PostgresStorage) -> None:
        self._storage = storage

    def received_bytes(self, task_id: str, sha256: str) -> int:
        """How many bytes of a result are here."""
        with self._storage.joined() as connection:
            return _received_bytes(connection, task_id, sha256)

    def append(self, task_id: str, sha256: str, data: bytes) -> int:
        """Add bytes to a result, and return how many are here now. What was begun of another of the task goes."""
        with self._storage.joined() as connection:
            connection.execute(
                "DELETE FROM upload_parts WHERE task_id = ? AND sha256 != ?", (task_id, sha256)
            )
            before = _received_bytes(connection, task_id, sha256)
            connection.execute(
                "INSERT INTO upload_parts VALUES (?, ?, ?, ?)", (task_id, sha256, before, data)
            )
        return before + len(data)

    def whole(self, task_id: str, sha256: str) -> bytes | None:
        """A result whose bytes are all here; None, and no byte is kept, if they are not those of its sha256."""
        with self._storage.joined() as connection:
            rows = connection.execute(
                "SELECT data FROM upload_parts WHERE task_id = ? AND sha256 = ? ORDER BY first_byte",
                (task_id, sha256),
            ).fetchall()
        data = b"".join(row["data"] for row in rows)
        if hashlib.sha256(data).hexdigest() == sha256:
            return data
        self.discard(task_id)
        return None

    def discard(self, task_id: str) -> None:
        """Forget what came of a task's result."""
        with self._storage.joined() as connection:
            connection.execute("DELETE FROM upload_parts WHERE task_id = ?", (task_id,))

    def sweep(self, wanted: Callable[[], Collection[str]]) -> int:
        """Remove what came of results that nobody waits for any more, and return how many parts went.

        Args:
            wanted: function that tells the ids of the tasks that are waited for, asked after the parts were listed.
        """
        with self._storage.joined() as connection:
            begun = {str(row[0]) for row in connection.execute("SELECT DISTINCT task_id FROM upload_parts")}
        gone = begun - set(wanted())
        with self._storage.joined() as connection:
            return sum(
                connection.execute("DELETE FROM upload_parts WHERE task_id = ?", (task_id,)).rowcount
                for task_id in sorted(gone)
            )


def _received_bytes(connection: Connection, task_id: str, sha256: str) -> int:
    row = connection.execute(
        "SELECT first_byte + length(data) FROM upload_parts WHERE task_id = ? AND sha256 = ?"
        " ORDER BY first_byte DESC LIMIT 1",
        (task_id, sha256),
    ).fetchone()
    return 0 if row is None else int(row[0])
