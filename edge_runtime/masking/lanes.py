"""Vectors of integers added modulo 2^32 or 2^64 without numpy, which an agent does not load: lanes of one long integer.

A number of w bytes stands in a lane of 2w bytes, so that as many as 2^(8w) of them add up without a carry into the next
lane. Adding long integers runs at the speed of memory.
"""

from __future__ import annotations

from collections.abc import Iterable

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms


def mask_bytes(seed: bytes, count: int, bits: int) -> bytes:
    """The stream of a seed, ChaCha20's (RFC 8439): lanes of twice the bits, of which the lower half is a number."""
    return (
        Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None).encryptor().update(bytes(count * bits // 4))
    )


def with_masks(numbers: bytes, bits: int, added: Iterable[bytes], taken_off: Iterable[bytes]) -> bytes:
    """Numbers with the streams of some seeds added and those of others taken off, modulo 2^bits.

    Args:
        numbers: little-endian integers of so many bits.
        bits: 32 or 64.
        added: seeds, fewer than 2^31 with those of ``taken_off``.
        taken_off: seeds.
    """
    width = bits // 8
    count = len(numbers) // width
    lower = int.from_bytes((b"\xff" * width + bytes(width)) * count, "little")
    whole = int.from_bytes(
        (bytes(width) + b"\x01" + bytes(width - 1)) * count, "little"
    )  # 2^bits in each lane
    spread = bytearray(2 * len(numbers))
    for place in range(width):
        spread[place :: 2 * width] = numbers[place::width]
    total = int.from_bytes(spread, "little")
    for seed in added:
        total += int.from_bytes(mask_bytes(seed, count, bits), "little") & lower
    for seed in taken_off:
        total += whole - (int.from_bytes(mask_bytes(seed, count, bits), "little") & lower)
    lanes = (total & lower).to_bytes(2 * len(numbers), "little")
    masked = bytearray(len(numbers))
    for place in range(width):
        masked[place::width] = lanes[place :: 2 * width]
    return bytes(masked)
