"""Secrets shared so that any ``threshold`` shares give one back, and fewer say nothing.

Shamir 1979, "How to share a secret". Arithmetic is modulo a prime above 2^256, so 32 bytes are a secret and 33 bytes a
share.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping

PRIME = 2**256 + 297
SECRET_BYTES, SHARE_BYTES = 32, 33


def split(secret: bytes, places: Collection[int], threshold: int) -> dict[int, bytes]:
    """A share for each place.

    Args:
        secret: 32 bytes.
        places: where the polynomial is taken, each above 0 and once.
        threshold: number of shares that give the secret back.
    """
    coefficients = [
        int.from_bytes(secret, "big"),
        *(secrets.randbelow(PRIME) for _ in range(threshold - 1)),
    ]
    shares = {}
    for place in places:
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * place + coefficient) % PRIME
        shares[place] = value.to_bytes(SHARE_BYTES, "big")
    return shares


def join(shares: Mapping[int, bytes]) -> bytes | None:
    """The secret of as many shares as its threshold, by place; None if they are no shares of one secret."""
    secret = 0
    for place, share in shares.items():
        above, below = 1, 1
        for other in shares:
            if other != place:
                above = above * other % PRIME
                below = below * (other - place) % PRIME
        secret = (secret + int.from_bytes(share, "big") * above * pow(below, -1, PRIME)) % PRIME
    return secret.to_bytes(SHARE_BYTES, "big")[1:] if secret < 2**256 else None
