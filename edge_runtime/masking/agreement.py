"""Keys that two devices agree on through a coordinator that carries only public halves.

X25519 (RFC 7748) and HKDF with SHA-256 (RFC 5869) give one key for the mask of each pair, and one for each direction in
which shares are sealed with ChaCha20-Poly1305 (RFC 8439). All keys are of one task, so each seals once. A device signs
its public halves with the key that it enrolled with.
"""

from __future__ import annotations

import base64

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from edge_runtime.errors import ProtocolError
from edge_runtime.protocol.messages import MaskingKeys
from edge_runtime.protocol.signing import PrivateKey, verify

#: Each key seals one message, so its nonce may be the same.
NONCE = bytes(12)


def new_secret() -> bytes:
    """A private key: 32 bytes."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public_half(secret: bytes) -> str:
    """The public half of a private key, in base64."""
    return base64.b64encode(
        X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()
    ).decode()


def sign_keys(identity: PrivateKey, task_id: str, mask_key: str, share_key: str) -> MaskingKeys:
    """The public keys of a task, signed by its device."""
    return MaskingKeys(mask_key, share_key, identity.sign(_statement(task_id, mask_key, share_key)))


def check_keys(identity: str, task_id: str, keys: MaskingKeys) -> None:
    """Check that the device of this enrolled key signed the keys of its task.

    Raises:
        SignatureError: it did not.
    """
    statement = _statement(task_id, keys.mask_key, keys.share_key)
    verify(identity, statement, keys.signature, what=f"the masking keys of task {task_id}")


def mask_seed(secret: bytes, public: str, one_slot: int, other_slot: int) -> bytes:
    """The seed of the mask that two devices share: the same from either side.

    Raises:
        ProtocolError: the public key is none.
    """
    low, high = sorted((one_slot, other_slot))
    return _derived(secret, public, f"edge mask 1 {low} {high}")


def seal(secret: bytes, public: str, from_slot: int, to_slot: int, data: bytes) -> bytes:
    """Data sealed by one device for another."""
    key = _derived(secret, public, f"edge shares 1 {from_slot} {to_slot}")
    return ChaCha20Poly1305(key).encrypt(NONCE, data, None)


def unseal(secret: bytes, public: str, from_slot: int, to_slot: int, sealed: bytes) -> bytes:
    """What another device sealed for this one.

    Raises:
        ProtocolError: it was not sealed so.
    """
    key = _derived(secret, public, f"edge shares 1 {from_slot} {to_slot}")
    try:
        return ChaCha20Poly1305(key).decrypt(NONCE, sealed, None)
    except InvalidTag as error:
        raise ProtocolError(
            f"shares of slot {from_slot} were not sealed for slot {to_slot}; the next round begins anew"
        ) from error


def _derived(secret: bytes, public: str, label: str) -> bytes:
    try:
        other = X25519PublicKey.from_public_bytes(base64.b64decode(public))
        shared = X25519PrivateKey.from_private_bytes(secret).exchange(other)
    except ValueError as error:
        raise ProtocolError(f"a masking key is no X25519 key: {error}") from error
    return HKDF(SHA256(), 32, salt=None, info=label.encode()).derive(shared)


def _statement(task_id: str, mask_key: str, share_key: str) -> bytes:
    return f"edge masking keys 1\n{task_id}\n{mask_key}\n{share_key}".encode()
