"""Sums of masks in lanes of a long integer, against numpy's."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.masking.lanes import mask_bytes, with_masks


@pytest.mark.parametrize("bits", [32, 64])
def test_lanes_add_as_numpy_does(bits: int) -> None:
    """Streams that are added and taken off come to what unsigned arrays come to, at the ends of the range too."""
    kind = np.dtype(f"<u{bits // 8}")
    generator = np.random.default_rng(bits)
    numbers = generator.integers(0, 2**bits, 1001, dtype=kind)
    numbers[:2] = 0, 2**bits - 1
    seeds = [bytes([number]) * 32 for number in range(9)]
    streams = [np.frombuffer(mask_bytes(seed, 1001, bits), kind)[::2] for seed in seeds]
    wanted = numbers.copy()
    for stream in streams[:4]:
        wanted += stream
    for stream in streams[4:]:
        wanted -= stream
    assert with_masks(numbers.tobytes(), bits, seeds[:4], seeds[4:]) == wanted.tobytes()
    assert with_masks(b"", bits, seeds[:1], []) == b""


def test_a_mask_hides_each_number() -> None:
    """The stream of a seed is spread over the whole range, and another seed's is another."""
    stream = np.frombuffer(mask_bytes(bytes(32), 10_000, 32), "<u4")[::2]
    assert abs(stream.mean() / 2**31 - 1) < 0.02
    assert (stream != np.frombuffer(mask_bytes(b"\x01" * 32, 10_000, 32), "<u4")[::2]).mean() > 0.999
