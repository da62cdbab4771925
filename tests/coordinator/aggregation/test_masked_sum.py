"""Who is whose neighbour; sums themselves are tested with the devices' side (tests/edge_runtime/masking)."""

from __future__ import annotations

import pytest

from coordinator.aggregation.masked_sum import DEGREE, neighbours, threshold_of, unmasked_sum
from edge_runtime.errors import ProtocolError
from edge_runtime.masking.agreement import new_secret, public_half
from edge_runtime.masking.shamir import split


def test_small_rounds_are_all_neighbours_and_large_ones_have_as_many_each() -> None:
    """Up to 25 devices know all others; of 100 each knows 24, both ways, and no device is cut off."""
    assert neighbours([4, 7, 9], "x") == {4: (7, 9), 7: (4, 9), 9: (4, 7)}
    near = neighbours(range(100), "x")
    assert {len(others) for others in near.values()} == {DEGREE}
    assert all(slot in near[other] for slot, others in near.items() for other in others)
    reached, todo = {0}, [0]
    while todo:
        fresh = set(near[todo.pop()]) - reached
        reached |= fresh
        todo += fresh
    assert len(reached) == 100
    assert near != neighbours(range(100), "y")


@pytest.mark.parametrize("peers", range(2, 60))
def test_a_threshold_is_more_than_half(peers: int) -> None:
    """No two sets of holders without a common member reach it, and all together do."""
    assert peers + 1 < 2 * threshold_of(peers) <= 2 * (peers + 1)


def test_shares_that_are_not_of_the_key_are_told() -> None:
    """A device that reveals something else spoils the round, not the sum."""
    secret, keys = new_secret(), {0: public_half(new_secret()), 1: public_half(new_secret())}
    with pytest.raises(ProtocolError, match="do not give its mask key back"):
        unmasked_sum(
            {0: bytes(4)}.items(),
            bits=32,
            count=1,
            contributed=[0],
            masked_against={0: [1], 1: [0]},
            mask_keys=keys,
            thresholds={0: 2, 1: 2},
            revealed={0: split(bytes(32), [1, 2], 2), 1: split(secret, [1, 2], 2)},
        )
