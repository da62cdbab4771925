"""Sums for a head in closed form: both forms say the same, add up, and are checked against their rows."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import SliceError
from edge_runtime.package.block_head import with_block_head
from edge_runtime.training.feature_sums import (
    COUNTS,
    LINEAR,
    ROWS,
    FeatureSums,
    SumsBuilder,
    SumsForm,
    decode_sums,
    encode_sums,
    sums_bytes,
)
from tests.edge_runtime.packages import make_manifest

BLOCKS, SIZE, LABELS = 3, 8, 4


@pytest.fixture(scope="module")
def manifest():
    return seen_manifest()


def seen_manifest():
    """A manifest with four labels and hidden states of eight numbers, whose head reads three outputs."""
    raw = make_manifest()
    base = msgspec.structs.replace(raw.base, hidden_size=SIZE)
    labels = tuple("abcd")
    segments = (*raw.segments[:1] * BLOCKS, raw.segments[-1])
    wide = msgspec.structs.replace(raw, base=base, labels=labels, segments=segments)
    return with_block_head(wide, range(BLOCKS), "mean")


def form(manifest, dtype: str = "float32") -> SumsForm:
    """The form of sums of that manifest's features."""
    width = BLOCKS * manifest.base.hidden_size
    return SumsForm(width, manifest.base.hidden_size, width, len(manifest.labels), dtype)


def features_of(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features of root mean square 1 in each block, and labels, of which the last class has no row."""
    random = np.random.default_rng(seed)
    raw = random.standard_normal((rows, BLOCKS, SIZE)) + 0.3
    raw /= np.sqrt((raw * raw).mean(axis=2, keepdims=True))
    return raw.reshape(rows, -1).astype(np.float32), random.integers(0, LABELS - 1, rows)


def built(features: np.ndarray, labels: np.ndarray, parts: int = 3, dtype: str = "float32") -> bytes:
    builder = SumsBuilder(BLOCKS * SIZE, SIZE, labels)
    for part in np.array_split(np.arange(len(labels)), parts):
        builder.add(features[part], labels[part])
    return encode_sums(builder.encoded(dtype))


def directly(features: np.ndarray, labels: np.ndarray) -> FeatureSums:
    """The same sums, written down as the formulas have them."""
    f = features.astype(np.float64)
    one_hot = np.eye(LABELS)[labels]
    beside = np.concatenate([np.ones((len(f), 1)), one_hot], axis=1)
    return FeatureSums(len(f), f.T @ f, f.T @ beside, one_hot.sum(axis=0))


@pytest.mark.parametrize("rows", [1, 3, 7, 8, 9, 60])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float16", 2e-2)])
def test_both_forms_are_the_sums(manifest, rows: int, dtype: str, tolerance: float) -> None:
    """Few rows travel rotated, many as Gram blocks; either gives the sums of the formulas."""
    features, labels = features_of(rows)
    got, wanted = (
        decode_sums(built(features, labels, dtype=dtype), form(manifest, dtype)),
        directly(features, labels),
    )
    assert got.rows == rows
    np.testing.assert_array_equal(got.counts, wanted.counts)
    np.testing.assert_allclose(got.gram, wanted.gram, atol=tolerance * rows)
    np.testing.assert_allclose(got.linear, wanted.linear, atol=tolerance * rows)


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.integers(1, 40), min_size=2, max_size=6))
def test_sums_of_devices_are_the_sums_of_all_rows(rows: list[int]) -> None:
    """However rows are shared out, and whatever form each part takes, the parts add up to the whole."""
    manifest = seen_manifest()
    features, labels = features_of(sum(rows), seed=len(rows))
    ends = np.cumsum(rows)
    total = FeatureSums.nothing(BLOCKS * SIZE, LABELS)
    for end, count in zip(ends, rows, strict=True):
        part = slice(end - count, end)
        total = total.plus(decode_sums(built(features[part], labels[part]), form(manifest)))
    wanted = directly(features, labels)
    np.testing.assert_allclose(total.gram, wanted.gram, atol=1e-3 * total.rows)
    np.testing.assert_allclose(total.linear, wanted.linear, atol=1e-3 * total.rows)


def test_rows_can_be_added_and_taken_away_again(manifest) -> None:
    """An update with new rows and a downdate by old ones leave the sums of the rows that remain."""
    features, labels = features_of(30)
    both = decode_sums(built(features, labels), form(manifest))
    first = decode_sums(built(features[:6], labels[:6]), form(manifest))
    rest, wanted = both.minus(first), directly(features[6:], labels[6:])
    assert rest.rows == 24
    np.testing.assert_allclose(rest.gram, wanted.gram, atol=1e-3)
    np.testing.assert_allclose(rest.linear, wanted.linear, atol=1e-3)


def test_what_is_added_and_taken_off_again_leaves_what_was_there(manifest) -> None:
    """The same bytes added and taken off leave the sums as they were, but for the last bits of double precision."""
    features, labels = features_of(60)
    whole = decode_sums(built(features, labels, dtype="float16"), form(manifest, "float16"))
    part = decode_sums(built(features[:9], labels[:9], dtype="float16"), form(manifest, "float16"))
    again = whole.plus(part).minus(part)
    assert again.rows == whole.rows
    np.testing.assert_array_equal(again.counts, whole.counts)
    np.testing.assert_allclose(again.gram, whole.gram, rtol=0, atol=1e-12 * np.abs(whole.gram).max())
    np.testing.assert_allclose(again.linear, whole.linear, rtol=0, atol=1e-12 * np.abs(whole.gram).max())


def test_sums_need_no_more_bytes_than_are_planned_for(manifest) -> None:
    """The sizes by which room is kept to take sums off are never below those that travel, in either form."""
    for dtype in ("float32", "float16"):
        wanted = form(manifest, dtype)
        for rows in (1, 7, 8, 60):
            size = len(built(*features_of(rows), dtype=dtype))
            assert size <= wanted.most_bytes(rows) <= wanted.whole_bytes


def test_few_rows_are_fewer_bytes(manifest) -> None:
    """The form for few rows is shorter than the Gram blocks, and half precision halves both."""
    few, many = features_of(4), features_of(40)
    assert len(built(*few)) < len(built(*many)) / 4
    for features, labels in (few, many):
        assert len(built(features, labels, dtype="float16")) < 0.6 * len(built(features, labels)) + 300


def test_more_rows_need_more_memory_until_sums_take_over() -> None:
    """The plan's memory grows with the rows, and stays where Gram blocks are kept instead."""
    sizes = [sums_bytes(rows, 2688, 384, 50) for rows in (10, 100, 800, 900, 5000)]
    assert sizes[0] < sizes[1] < sizes[2]
    assert sizes[3] == sizes[4]


def tampered(name: str, change) -> bytes:
    from safetensors.numpy import load

    many = name != ROWS
    tensors = load(built(*features_of(40 if many else 4)))
    tensors[name] = change(tensors[name])
    return encode_sums(tensors)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (COUNTS, lambda a: a + np.float32(0.5), "whole numbers"),
        (COUNTS, lambda a: a + np.arange(len(a), dtype=np.float32), "counts of the classes"),
        (LINEAR, lambda a: a * np.float32(100), "exceeds what their squares allow"),
        (LINEAR, lambda a: a * np.float32(np.nan), "not finite"),
        (LINEAR, lambda a: a[:, :1], "expected float32"),
        ("sums/gram_0_0", lambda a: a * np.float32(50), "squares of the features"),
        ("sums/gram_0_0", lambda a: a + np.triu(np.full_like(a, 0.5), 1), "not symmetric"),
        ("sums/gram_0_1", lambda a: a * np.float32(50), "product of two features"),
        ("sums/gram_0_1", lambda a: a.astype(np.float16), "expected float32"),
        ("sums/classes", lambda a: a[::-1].copy(), "once and in order"),
        ("sums/classes", lambda a: a + np.float32(7), "once and in order"),
        ("sums/other", lambda a: a, "unknown tensor"),
        (ROWS, lambda a: a[:-1], "make no rows"),
        (ROWS, lambda a: a * np.float32(3), "count"),
        (ROWS, lambda a: a + np.float32(np.inf), "not finite"),
    ],
)
def test_sums_that_cannot_be_are_refused_by_name(manifest, name: str, change, says: str) -> None:
    """Sums that are not symmetric, not finite, of other shapes, or larger than their rows allow are refused."""
    data = tampered(name, change) if name != "sums/other" else extra()
    with pytest.raises(SliceError, match=says):
        decode_sums(data, form(manifest))


def extra() -> bytes:
    from safetensors.numpy import load

    return encode_sums(load(built(*features_of(40))) | {"sums/other": np.zeros(3, np.float32)})


@given(st.binary(max_size=300))
def test_no_bytes_do_more_than_be_refused(data: bytes) -> None:
    """Bytes that are no sums are refused with one kind of error."""
    with pytest.raises(SliceError):
        decode_sums(data, form(seen_manifest()))
