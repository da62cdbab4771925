"""Sketches: exact at seven numbers for each that is found, linear, and equal on every machine."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from msgspec.structs import replace

from edge_runtime.errors import SliceError
from edge_runtime.package.manifest import SliceSpec, TensorSpec
from edge_runtime.package.slices import encode_values
from edge_runtime.training.sketch import (
    Sketch,
    decode_sketches,
    largest,
    projection,
    projection_bytes,
    sketch_of,
    sketched,
)
from tests.edge_runtime.golden.tangents import TASK


def sparse(dimensions: int, entries: int, seed: int) -> np.ndarray:
    """Numbers of which some are normal and the others zero."""
    chance = np.random.default_rng(seed)
    numbers = np.zeros(dimensions)
    numbers[chance.choice(dimensions, entries, replace=False)] = chance.standard_normal(entries)
    return numbers


@pytest.mark.parametrize(("size", "least", "most"), [(30, 0, 2), (70, 20, 20)])
def test_seven_numbers_for_each_suffice(size: int, least: int, most: int) -> None:
    """Of 512 numbers ten are found exactly in 70 in all of 20 trials, and in 30 in hardly any."""
    exact = 0
    for seed in range(20):
        numbers, sketch = sparse(512, 10, seed), Sketch(size, 10, seed)
        exact += np.allclose(sketch.found(sketch.of(numbers), 512), numbers, atol=1e-9)
    assert least <= exact <= most


def test_the_mean_of_sketches_is_the_sketch_of_the_mean() -> None:
    """Changes with the same ten places: their mean is found in the mean of what devices send, as float32."""
    places, chance, sketch = np.arange(0, 500, 50), np.random.default_rng(0), Sketch(70, 10, 3)
    changes = np.zeros((6, 500), np.float32)
    changes[:, places] = chance.standard_normal((6, 10))
    mean = np.mean([sketch.of(change).astype(np.float32) for change in changes], axis=0)
    np.testing.assert_allclose(sketch.found(mean, 500), changes.mean(0), atol=1e-5)


def test_chunks_find_what_the_whole_finds() -> None:
    """Numbers that lie in one chunk are found alike by a sketch of the chunk and by one of everything."""
    sketch, chunk = Sketch(70, 10, 5), sparse(128, 8, 2)
    whole = np.concatenate([np.zeros(256), chunk, np.zeros(128)])
    parts = [sketch.found(sketch.of(part), 128) for part in np.split(whole, 4)]
    np.testing.assert_allclose(np.concatenate(parts), sketch.found(sketch.of(whole), 512), atol=1e-9)


def test_a_full_sketch_loses_nothing() -> None:
    """With as many numbers as there are, any numbers are found; zeros and repeated sketches come to zeros."""
    numbers = np.random.default_rng(8).standard_normal(24)
    full = Sketch(24, 24, 1)
    np.testing.assert_allclose(full.found(full.of(numbers), 24), numbers, atol=1e-6)
    assert not full.found(np.zeros(24), 24).any()


def test_the_largest_stay() -> None:
    """Magnitude decides, of equals the first; zeros are never among them."""
    assert largest(np.array([1.0, -3.0, 0.0, 2.0, -2.0]), 3).tolist() == [1, 3, 4]
    assert largest(np.array([1.0, -1.0, 1.0]), 2).tolist() == [0, 1]
    assert largest(np.array([0.0, 5.0, 0.0]), 2).tolist() == [1]


def test_projections_are_equal_on_every_machine() -> None:
    """Entries recorded here: standard normal, in whole multiples of 2^-12, by seed and size alone."""
    made = projection(7, 70, 100)
    assert made[0, :4].tolist() == GOLDEN
    assert (made * 4096 == np.rint(made * 4096)).all()
    assert abs(made.mean()) < 0.03
    assert made.std() == pytest.approx(1, abs=0.03)
    assert not np.array_equal(projection(8, 70, 100), made)
    sketch = Sketch(70, 10, 7)
    numbers = (np.arange(100) % 13 - 6).astype(np.float32)
    found = sketch.found(sketch.of(numbers).astype(np.float32), 100)
    assert hashlib.sha256(found.tobytes()).hexdigest()[:16] == GOLDEN_FOUND


#: By this module itself; bits must not change, for devices and coordinator need not be of one release.
GOLDEN = [-1.181884765625, -0.173583984375, -0.28857421875, 0.5283203125]
GOLDEN_FOUND = "ffb38b674b98b5e3"

SPECS = tuple(
    SliceSpec(name, "lora", (1,), name, (TensorSpec("A", (1, 2, 60), "a"), TensorSpec("B", (1, 50, 2), "b")))
    for name in ("s0", "s1")
)
SKETCHED = replace(
    TASK, slices=("s0", "s1"), train_head=False, report="sketch", sketch_size=14, sketch_entries=2
)


def test_a_report_has_a_sketch_of_each_slice() -> None:
    """A slice's tensors side by side become one sketch; decoding gives the same, and other shapes are refused."""
    delta = {
        f"{spec.name}/{tensor.name}": np.random.default_rng(1)
        .standard_normal(tensor.shape)
        .astype(np.float32)
        for spec in SPECS
        for tensor in spec.tensors
    }
    sketch = sketch_of(SKETCHED)
    report = sketched(delta, SPECS, sketch)
    assert {name: array.shape for name, array in report.items()} == {"s0/sketch": (14,), "s1/sketch": (14,)}
    flat = np.concatenate([delta["s0/A"].ravel(), delta["s0/B"].ravel()])
    np.testing.assert_array_equal(report["s0/sketch"], sketch.of(flat).astype(np.float32))
    again = decode_sketches(encode_values(report), SKETCHED, SPECS)
    assert {name: array.tobytes() for name, array in again.items()} == {
        name: array.tobytes() for name, array in report.items()
    }
    for change, message in (
        ({"s0/sketch": np.zeros(15, np.float32)}, "s0/sketch is float32"),
        ({"s0/A": np.zeros((1, 2, 60), np.float32)}, "unknown slice tensor s0/A"),
        ({"s1/sketch": np.full(14, np.inf, np.float32)}, "not finite"),
    ):
        with pytest.raises(SliceError, match=message):
            decode_sketches(encode_values({**report, **change}), SKETCHED, SPECS)


def test_slices_of_one_size_share_a_projection() -> None:
    """Memory is that of one projection for each size, and none without sketches."""
    assert projection_bytes(SKETCHED, SPECS) == projection_bytes(SKETCHED, SPECS[:1]) >= 14 * 220 * 4
    assert projection_bytes(TASK, SPECS) == 0
    assert sketch_of(TASK) is None
