"""The sums that a device has handed in for heads in closed form, kept so that a later run can take them off again.

::

    sums/SHA256         sums as they were handed in
    sums/NAME.record    which of them stand together, and which rows are in them (edge_runtime.training.handed_in)

The coordinator names the sums of a device that stand in those which a run goes on from. A result may be lost on its way
or not be counted, so what stood before is kept beside what would stand after.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from edge_runtime.durable import write_durably
from edge_runtime.errors import DataError
from edge_runtime.protocol.messages import MAX_RESULT_BYTES
from edge_runtime.training.handed_in import WAY_OUT, Record

SUFFIX = ".record"
#: Records that are kept, the newest, and their size together with the sums that they name: at least what a task named,
#: and what came of it.
MOST_RECORDS, MOST_KEPT_BYTES = 4, MAX_RESULT_BYTES


class HandedInSums:
    """What is kept of earlier visits.

    Args:
        folder: folder of the sums and records, created on first use.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def record_path(self, parts: Sequence[str]) -> Path:
        """File of the record of these sums.

        Raises:
            DataError: there is none, or sums that it names are missing.
        """
        path = self._record(parts)
        if not path.is_file() or not all((self._folder / part).is_file() for part in parts):
            raise DataError(
                f"this device has no record of the {len(parts)} sums that it handed in before, as the task names them; "
                f"{WAY_OUT}"
            )
        return path

    def sizes(self, parts: Sequence[str]) -> list[int]:
        """Size of each of these sums, in bytes."""
        return [(self._folder / part).stat().st_size for part in parts]

    def read(self, parts: Sequence[str]) -> tuple[bytes, ...]:
        """These sums, as they were handed in.

        Raises:
            DataError: one was damaged on the disk.
        """
        found = tuple((self._folder / part).read_bytes() for part in parts)
        for part, data in zip(parts, found, strict=True):
            if hashlib.sha256(data).hexdigest() != part:
                raise DataError(
                    f"sums that this device handed in are damaged: {self._folder / part}; {WAY_OUT}"
                )
        return found

    def keep(self, kept: Sequence[str], added: bytes, rows: bytes, before: Sequence[str]) -> None:
        """Keep what stands once a result is counted.

        Args:
            kept: digests of the sums that stand further on.
            added: sums that are added to them; empty if none are.
            rows: digests of the rows that are in all of these.
            before: digests of the sums that the task named, whose record stays.
        """
        self._folder.mkdir(mode=0o700, exist_ok=True)
        parts = tuple(kept)
        if added:
            sha256 = hashlib.sha256(added).hexdigest()
            write_durably(self._folder / sha256, added, mode=0o600)
            parts = (*parts, sha256)
        path = self._record(parts)
        write_durably(path, Record(parts, rows).encode(), mode=0o600)
        self._forget({path, self._record(before)})

    def _record(self, parts: Sequence[str]) -> Path:
        return self._folder / f"{hashlib.sha256(''.join(parts).encode()).hexdigest()}{SUFFIX}"

    def _forget(self, wanted: set[Path]) -> None:
        """Remove old records, and sums that no record names any more."""
        newest_first = sorted(self._folder.glob(f"*{SUFFIX}"), key=lambda path: -path.stat().st_mtime_ns)
        named: set[str] = set()
        number = size = 0
        for path in sorted(newest_first, key=lambda path: path not in wanted):
            try:
                parts = set(Record.decode(path.read_bytes()).parts)
                more = path.stat().st_size + sum(self.sizes(sorted(parts - named)))
            except (DataError, FileNotFoundError):  # of no use any more
                path.unlink()
                continue
            if path not in wanted and (number >= MOST_RECORDS or size + more > MOST_KEPT_BYTES):
                path.unlink()
                continue
            named |= parts
            number, size = number + 1, size + more
        for path in self._folder.iterdir():
            if path.suffix != SUFFIX and path.name not in named:
                path.unlink()
