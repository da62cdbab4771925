"""Keys that two devices agree on."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from edge_runtime.errors import ProtocolError, SignatureError
from edge_runtime.masking.agreement import (
    check_keys,
    mask_seed,
    new_secret,
    public_half,
    seal,
    sign_keys,
    unseal,
)
from edge_runtime.protocol.signing import generate_key


def test_both_sides_have_the_same_mask_and_others_have_none() -> None:
    """The seed is the same from either side, and another pair's, or of other slots, is another."""
    one, other, third = new_secret(), new_secret(), new_secret()
    seed = mask_seed(one, public_half(other), 3, 7)
    assert seed == mask_seed(other, public_half(one), 7, 3)
    assert seed != mask_seed(third, public_half(other), 3, 7)
    assert seed != mask_seed(one, public_half(other), 3, 8)


def test_sealed_shares_open_for_their_device_alone() -> None:
    """Another key, another direction and a changed byte are refused."""
    one, other = new_secret(), new_secret()
    sealed = seal(one, public_half(other), 1, 2, b"share")
    assert unseal(other, public_half(one), 1, 2, sealed) == b"share"
    for secret, slots, data in (
        (new_secret(), (1, 2), sealed),
        (other, (2, 1), sealed),
        (other, (1, 2), sealed[:-1] + bytes([sealed[-1] ^ 1])),
    ):
        with pytest.raises(ProtocolError, match="were not sealed for"):
            unseal(secret, public_half(one), *slots, data)


def test_keys_are_signed_for_one_task() -> None:
    """Keys that another device signed, or of another task, are refused; and so is what is no point of the curve."""
    identity = generate_key()
    keys = sign_keys(identity, "t-1", public_half(new_secret()), public_half(new_secret()))
    check_keys(identity.public_key, "t-1", keys)
    for wrong in (
        (generate_key().public_key, "t-1", keys),
        (identity.public_key, "t-2", keys),
        (identity.public_key, "t-1", replace(keys, mask_key=public_half(new_secret()))),
    ):
        with pytest.raises(SignatureError):
            check_keys(*wrong)
    with pytest.raises(ProtocolError, match="no X25519 key"):
        mask_seed(new_secret(), "A" * 43 + "=", 1, 2)
