"""Shares of secrets."""

from __future__ import annotations

import itertools
import secrets

from edge_runtime.masking.shamir import PRIME, SHARE_BYTES, join, split


def test_any_threshold_of_shares_gives_the_secret_back() -> None:
    """Every choice of three of five does; two give another number."""
    secret = secrets.token_bytes(32)
    shares = split(secret, [1, 2, 5, 8, 13], 3)
    assert all(len(share) == SHARE_BYTES for share in shares.values())
    for places in itertools.combinations(shares, 3):
        assert join({place: shares[place] for place in places}) == secret
    for places in itertools.combinations(shares, 2):
        assert join({place: shares[place] for place in places}) != secret


def test_the_largest_and_least_secret_come_back() -> None:
    """Secrets are all of 32 bytes, leading zeros too."""
    for secret in (bytes(32), b"\xff" * 32, bytes(31) + b"\x01"):
        assert join(split(secret, [3, 4], 2)) == secret


def test_the_modulus_is_prime() -> None:
    """By Miller and Rabin's test, forty times."""
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for _ in range(40):
        value = pow(2 + secrets.randbelow(PRIME - 4), odd, PRIME)
        chain = [pow(value, 2**power, PRIME) for power in range(twos)]
        assert value == 1 or PRIME - 1 in chain
