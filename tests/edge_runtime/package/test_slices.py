from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import save

from edge_runtime.errors import SliceError
from edge_runtime.package.manifest import SliceSpec, TensorSpec
from edge_runtime.package.slices import decode_values, encode_values, key, shapes

SPECS = (
    SliceSpec("b.query", "lora_xs", (0,), "query", (TensorSpec("core", (1, 2, 2), "core"),)),
    SliceSpec(
        "head", "head", (1,), "head", (TensorSpec("weight", (2, 3), "w"), TensorSpec("bias", (2,), "b"))
    ),
)
FINITE = st.floats(-(2.0**100), 2.0**100, width=32)
VALUES = st.fixed_dictionaries(
    {name: arrays(np.float32, shape, elements=FINITE) for name, shape in shapes(SPECS).items()}
)


def zeros() -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes(SPECS).items()}


def test_flat_names_follow_the_specification() -> None:
    """Names are slice/tensor, in the order of the manifest."""
    assert list(shapes(SPECS)) == ["b.query/core", "head/weight", "head/bias"]
    assert key("a", "b") == "a/b"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(values=VALUES)
def test_values_return_bit_for_bit(values: dict[str, np.ndarray]) -> None:
    """Encoded and decoded, values are the same bits in the specification's order."""
    back = decode_values(encode_values(values), SPECS)
    assert list(back) == list(shapes(SPECS))
    assert all(back[name].tobytes() == value.tobytes() for name, value in values.items())


@settings(max_examples=20, deadline=None, derandomize=True)
@given(values=VALUES, order=st.permutations(list(shapes(SPECS))))
def test_equal_values_give_equal_bytes(values: dict[str, np.ndarray], order: list[str]) -> None:
    """The bytes do not depend on the order of the mapping or on memory layout."""
    other = {name: np.asfortranarray(values[name]) for name in order}
    assert encode_values(other) == encode_values(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head/bias": None}, "head/bias is missing"),
        ({"x/core": np.zeros(1, np.float32)}, "unknown slice tensor x/core"),
        ({"head/bias": np.zeros(3, np.float32)}, r"head/bias is float32\(3,\), expected float32\(2,\)"),
        ({"head/bias": np.zeros((2, 1), np.float32)}, "head/bias"),
        ({"head/bias": np.zeros(2, np.float64)}, "head/bias is float64"),
        ({"head/bias": np.zeros(2, np.int32)}, "head/bias is int32"),
        (
            {"head/weight": np.full((2, 3), np.nan, np.float32)},
            "head/weight holds a value that is not finite",
        ),
        ({"b.query/core": np.full((1, 2, 2), -np.inf, np.float32)}, r"b\.query/core holds .* not finite"),
    ],
)
def test_values_that_do_not_fit_are_named(change: dict, message: str) -> None:
    """Missing, unknown, misshapen, mistyped or non-finite tensors are SliceErrors with the tensor's name."""
    values = {name: value for name, value in {**zeros(), **change}.items() if value is not None}
    with pytest.raises(SliceError, match=message):
        decode_values(save(values), SPECS)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.binary(max_size=200) | st.binary(max_size=64).map(lambda b: len(b).to_bytes(8, "little") + b))
def test_arbitrary_bytes_are_slice_errors(data: bytes) -> None:
    """Whatever the bytes, decoding ends in a SliceError."""
    with pytest.raises(SliceError):
        decode_values(data, SPECS)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(position=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_a_damaged_file_decodes_or_is_a_slice_error(position: int, byte: int) -> None:
    """One changed byte gives either values of the right shapes or a SliceError, nothing else."""
    data = bytearray(encode_values(zeros()))
    data[position % len(data)] = byte
    try:
        values = decode_values(bytes(data), SPECS)
    except SliceError:
        return
    assert {name: value.shape for name, value in values.items()} == shapes(SPECS)
