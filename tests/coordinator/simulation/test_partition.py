"""Partitions: disjoint, of the right sizes, a function of the seed, and as mixed as alpha says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.simulation.config import DataConfig
from coordinator.simulation.labelled_rows import LabelledRows
from coordinator.simulation.partition import Share, partition
from edge_runtime.errors import ConfigError


def rows_of(labels: list[str] | None, owners: list[str] | None = None) -> LabelledRows:
    """Rows with these labels."""
    count = len(labels or owners or [])
    return LabelledRows(
        Path("train.jsonl"),
        tuple(f"text {number}" for number in range(count)),
        None if labels is None else tuple(labels),
        None if owners is None else tuple(owners),
        "0" * 64,
    )


def shared(kind: str, alpha: float | None = None, rows_per_device: int = 0) -> DataConfig:
    """A data table."""
    return DataConfig("t", "d", kind, alpha, rows_per_device)  # type: ignore[arg-type]


def unevenness(shares: list[Share], labels: list[str]) -> float:
    """How far devices' class mixes lie from the whole's, as mean total variation."""
    names = sorted(set(labels))
    whole = np.array([labels.count(name) / len(labels) for name in names])
    mixes = [np.array([sum(labels[i] == n for i in share) / len(share) for n in names]) for share in shares]
    return float(np.mean([np.abs(mix - whole).sum() / 2 for mix in mixes]))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 62),
    devices=st.integers(1, 12),
    each=st.integers(1, 9),
    classes=st.integers(2, 5),
    alpha=st.sampled_from([1e-3, 0.1, 1.0, 100.0]),
    kind=st.sampled_from(["iid", "dirichlet"]),
    spare=st.integers(0, 20),
)
def test_shares_are_disjoint_and_of_the_size_asked_for(
    seed: int, devices: int, each: int, classes: int, alpha: float, kind: str, spare: int
) -> None:
    """Every device gets its number of rows, no row twice, and the same again for the same seed."""
    count = max(devices * each + spare, classes)
    labels = [f"class {number % classes}" for number in range(count)]
    config = shared(kind, alpha if kind == "dirichlet" else None, each)
    shares = partition(rows_of(labels), config, devices, seed)
    held = [row for share in shares for row in share]
    assert [len(share) for share in shares] == [each] * devices
    assert len(set(held)) == len(held)
    assert set(held) <= set(range(count))
    assert shares == partition(rows_of(labels), config, devices, seed)


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
def test_zero_rows_a_device_share_out_everything(kind: str) -> None:
    """All rows go somewhere, and sizes differ by one at most."""
    labels = ["a", "b", "c"] * 11
    shares = partition(rows_of(labels), shared(kind, 1.0 if kind == "dirichlet" else None), 7, 3)
    assert sorted(row for share in shares for row in share) == list(range(33))
    assert {len(share) for share in shares} == {4, 5}


def test_a_larger_alpha_mixes_more_evenly() -> None:
    """Devices' class mixes come nearer to the whole's as alpha grows, averaged over seeds."""
    labels = [f"class {number % 4}" for number in range(4000)]
    found = []
    for alpha in (0.05, 0.5, 5.0, 500.0):
        means = [
            unevenness(partition(rows_of(labels), shared("dirichlet", alpha, 30), 20, seed), labels)
            for seed in range(5)
        ]
        found.append(float(np.mean(means)))
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.5
    assert found[-1] < 0.2


def test_other_seeds_share_otherwise() -> None:
    """Two seeds deal different rows."""
    labels = ["a", "b"] * 50
    first, second = (partition(rows_of(labels), shared("iid", None, 5), 4, seed) for seed in (0, 1))
    assert first != second


def test_owners_are_devices_the_largest_first() -> None:
    """Natural partitions keep each owner's rows together, take the largest owners, and ignore the seed."""
    owners = ["x"] * 2 + ["y"] * 5 + ["z"] * 3 + ["x"] * 1
    shares = partition(rows_of(None, owners), shared("natural"), 2, 0)
    assert [Counter(owners[row] for row in share) for share in shares] == [{"y": 5}, {"x": 3}]
    assert shares == partition(rows_of(None, owners), shared("natural"), 2, 9)


@pytest.mark.parametrize(
    ("labels", "owners", "config", "devices", "said"),
    [
        (["a"] * 9, None, shared("dirichlet", 1.0, 1), 2, "one label.*add rows of other labels"),
        (["a", "b"] * 5, None, shared("iid", None, 4), 3, "asks for 12 rows.*has 10; lower"),
        (["a", "b"], None, shared("iid"), 3, "2 rows for fleet.devices = 3.*lower fleet.devices"),
        (None, ["x", "x"], shared("dirichlet", 1.0), 1, "no labels to mix; use"),
        (["a", "b"], None, shared("natural"), 1, 'no "owner"'),
        (None, ["x", "y"], shared("natural"), 3, "2 owners for fleet.devices = 3; lower"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(
    labels: list[str] | None, owners: list[str] | None, config: DataConfig, devices: int, said: str
) -> None:
    """Each impossible partition ends in one line that says what is missing and what to do."""
    with pytest.raises(ConfigError, match=said) as caught:
        partition(rows_of(labels, owners), config, devices, 0)
    assert "\n" not in str(caught.value)
