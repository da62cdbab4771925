"""Which rows a device has handed in sums of, so that a later run asks for what has changed alone.

A row is known by a digest of its token ids and label: rows of one digest add the same to any sums. Digests are keyed by
a secret of the device, so that a record tells nobody else which texts were there. Rows that have come since are added
by the sums of them alone. Where a row is gone, or was changed, what was handed in before is taken off as a whole, and
sums of all present rows stand in its place: the device keeps no text that its owner has removed. The sums before are
taken off as the very bytes that were added, so nothing but the rounding of a sum in double precision is left of them.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from edge_runtime.decoding import MALFORMED
from edge_runtime.errors import DataError
from edge_runtime.protocol.messages import MAX_RESULT_BYTES, MOST_PARTS, Digests

if TYPE_CHECKING:
    from edge_runtime.data.examples import Examples  # it needs numpy, and the agent reads records without

DIGEST_BYTES = 16
#: What a result holds beside sums, at most.
MESSAGE_BYTES = 1 << 20
#: Size that sums in one result may have together: those that are taken off, and those in their place.
MOST_SUMS_BYTES = MAX_RESULT_BYTES - MESSAGE_BYTES
#: What helps where a device does not know what it handed in.
WAY_OUT = "its rows from then stay in the sums; a run without continue_from asks all devices anew"


class Record(Struct, frozen=True):
    """What the sums of a device are of, after some run.

    Attributes:
        parts: digests of the sums, in the order in which they were handed in.
        rows: digests of the rows that are in them, one behind the other.
    """

    parts: Digests
    rows: bytes

    def encode(self) -> bytes:
        """MessagePack bytes."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Record:
        """The record from the bytes of :meth:`encode`.

        Raises:
            DataError: these are other bytes.
        """
        try:
            record = msgspec.msgpack.decode(data, type=cls)
        except MALFORMED as error:
            raise DataError(
                f"the record of what this device handed in cannot be read: {error}; {WAY_OUT}"
            ) from error
        if len(record.rows) % DIGEST_BYTES:
            raise DataError(f"the record of what this device handed in is cut short; {WAY_OUT}")
        return record


@dataclass(frozen=True)
class Since:
    """What has changed since a device handed in sums.

    Attributes:
        positions: positions of the rows whose sums are handed in.
        stands: whether the sums before stand; if not, they are taken off, and ``positions`` are all rows.
    """

    positions: tuple[int, ...]
    stands: bool


def row_digests(examples: Examples, key: bytes) -> list[bytes]:
    """Digest of each row, of :data:`DIGEST_BYTES`.

    Args:
        examples: the device's rows, with labels.
        key: the device's secret.
    """
    labels = examples.labels or [0] * len(examples.ids)
    return [
        hashlib.blake2b(array("q", [label, *ids]).tobytes(), digest_size=DIGEST_BYTES, key=key).digest()
        for ids, label in zip(examples.ids, labels, strict=True)
    ]


def since(record: Record | None, now: Sequence[bytes]) -> Since:
    """What a device must hand in.

    Args:
        record: what its sums are of; None if it has handed in none.
        now: digest of each present row.
    """
    everything = Since(tuple(range(len(now))), stands=False)
    if record is None:
        return everything
    before = Counter(
        record.rows[start : start + DIGEST_BYTES] for start in range(0, len(record.rows), DIGEST_BYTES)
    )
    added = []
    for position, digest in enumerate(now):
        if before[digest] > 0:
            before[digest] -= 1
        else:
            added.append(position)
    if before.total():
        return everything
    return Since(tuple(added), stands=True)


def must_begin_anew(parts: int, parts_bytes: int, added_bytes: int, whole_bytes: int) -> bool:
    """Whether one more part would leave no room to ever take all parts off in one result, with others in their place.

    Args:
        parts: number of parts so far.
        parts_bytes: size of these.
        added_bytes: size of the part to come, at most.
        whole_bytes: size of the sums of any number of rows, at most.
    """
    return parts >= MOST_PARTS or parts_bytes + added_bytes + whole_bytes > MOST_SUMS_BYTES
