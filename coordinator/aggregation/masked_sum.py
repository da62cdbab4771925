"""From masked contributions to their sum: whose masks are taken off by which shares.

The coordinator's side of :mod:`edge_runtime.masking.participant`: who is whose neighbour, and what is left once own
masks of those that contributed, and the masks that those that fell out left with their neighbours, are taken off.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ProtocolError
from edge_runtime.masking.agreement import mask_seed, public_half
from edge_runtime.masking.lanes import mask_bytes
from edge_runtime.masking.shamir import join

#: Most neighbours of a device; smaller rounds are all neighbours of each other. An even number.
DEGREE = 24
#: Share of those that hold shares of a secret which must reveal theirs.
THRESHOLD = 0.6


def neighbours(slots: Collection[int], label: str) -> dict[int, tuple[int, ...]]:
    """Who is whose neighbour: all, or the nearest on a ring in an order drawn from a label (a Harary graph).

    Args:
        slots: slots of the devices that take part.
        label: what the order is drawn from.
    """
    ring = sorted(slots, key=lambda slot: hashlib.sha256(f"{label} {slot}".encode()).digest())
    if len(ring) <= DEGREE + 1:
        return {slot: tuple(sorted(set(ring) - {slot})) for slot in ring}
    found = {}
    for place, slot in enumerate(ring):
        near = {ring[(place + step) % len(ring)] for step in range(-DEGREE // 2, DEGREE // 2 + 1)}
        found[slot] = tuple(sorted(near - {slot}))
    return found


def threshold_of(peers: int) -> int:
    """How many shares give a secret back of a device with so many neighbours: more than half of them and itself."""
    return math.ceil(THRESHOLD * (peers + 1))


def unmasked_sum(
    vectors: Iterable[tuple[int, bytes]],
    *,
    bits: int,
    count: int,
    contributed: Collection[int],
    masked_against: Mapping[int, Collection[int]],
    mask_keys: Mapping[int, str],
    thresholds: Mapping[int, int],
    revealed: Mapping[int, Mapping[int, bytes]],
) -> NDArray[np.int64]:
    """The sum of all contributions, as signed integers.

    Args:
        vectors: slot and masked integers of each that contributed; consumed one at a time.
        bits: bits of the integers.
        count: how many each has.
        contributed: slots of those that contributed.
        masked_against: neighbours that shared secrets, of each that did, whether it contributed or not.
        mask_keys: public mask keys by slot.
        thresholds: how many shares give a secret back, by slot.
        revealed: shares by the slot of the secret, and by the place of whoever revealed it.

    Raises:
        ProtocolError: shares of a secret are too few, or contradict the key that they are of.
    """
    kind = np.dtype(f"<u{bits // 8}")
    total = np.zeros(count, kind)
    for slot, data in vectors:
        total += np.frombuffer(data, kind)
        total -= _mask(_secret(slot, thresholds, revealed), count, bits)
    for slot in sorted(set(masked_against) - set(contributed)):
        left_with = [other for other in masked_against[slot] if other in contributed]
        if not left_with:
            continue
        secret = _secret(slot, thresholds, revealed)
        if public_half(secret) != mask_keys[slot]:
            raise ProtocolError(f"shares of slot {slot} do not give its mask key back")
        for other in left_with:
            mask = _mask(mask_seed(secret, mask_keys[other], slot, other), count, bits)
            total = total - mask if slot > other else total + mask
    return total.view(f"<i{bits // 8}").astype(np.int64)


def _secret(slot: int, thresholds: Mapping[int, int], revealed: Mapping[int, Mapping[int, bytes]]) -> bytes:
    shares = revealed.get(slot, {})
    if len(shares) < thresholds[slot]:
        raise ProtocolError(f"{len(shares)} of {thresholds[slot]} shares of slot {slot} were revealed")
    secret = join(dict(sorted(shares.items())[: thresholds[slot]]))
    if secret is None:
        raise ProtocolError(f"the shares of slot {slot} are of no secret")
    return secret


def _mask(seed: bytes, count: int, bits: int) -> NDArray[np.unsignedinteger]:
    lanes = np.frombuffer(mask_bytes(seed, count, bits), f"<u{bits // 8}")
    return lanes[::2]
