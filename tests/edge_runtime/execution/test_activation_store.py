"""Layer inputs kept for the backward sweep: what comes back, and what a disk may do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import DeviceError
from edge_runtime.execution import activation_store
from edge_runtime.execution.activation_store import ActivationStore


def group(seed: int, sizes: list[int]) -> list[np.ndarray]:
    """Hidden states of some micro-batches."""
    generator = np.random.default_rng(seed)
    return [generator.standard_normal((size, 3, 4), dtype=np.float32) for size in sizes]


@pytest.mark.parametrize("on_disk", [False, True])
@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data())
def test_what_was_pushed_last_comes_back_first(tmp_path_factory, on_disk: bool, data: st.DataObject) -> None:
    """However pushes and pops take turns, a pop gives the arrays of the last push that is left, bit for bit."""
    folder = tmp_path_factory.getbasetemp() if on_disk else None
    expected: list[list[np.ndarray]] = []
    with ActivationStore(folder) as store:
        for number, push in enumerate(data.draw(st.lists(st.booleans(), max_size=20))):
            if push:
                expected.append(group(number, data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))))
                store.push(expected[-1])
            elif expected:
                for got, wanted in zip(store.pop(), expected.pop(), strict=True):
                    assert np.array_equal(got, wanted)
        assert len(store.arrays) == (0 if on_disk else sum(map(len, expected)))


def test_the_file_is_a_stack_without_a_name(tmp_path) -> None:
    """Pass after pass the file grows no further than one pass, and the folder shows no file."""
    with ActivationStore(tmp_path) as store:
        for _ in range(3):
            for number in range(4):
                store.push(group(number, [2, 1]))
            assert list(tmp_path.iterdir()) == []
            assert store._file is not None
            assert store._file.seek(0, 2) == 4 * 3 * 3 * 4 * 4
            for _ in range(4):
                store.pop()


def test_a_full_disk_is_told_with_what_is_free(tmp_path: Path, monkeypatch) -> None:
    """A write that finds no space becomes one line that names the folder and what to do."""

    def fail(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(activation_store.os, "pwrite", fail)
    with (
        ActivationStore(tmp_path) as store,
        pytest.raises(DeviceError, match=r"No space left.*[MG]iB are free") as caught,
    ):
        store.push(group(0, [1]))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_lost_its_end_is_told(tmp_path: Path) -> None:
    """Inputs that cannot be read back are an error, never zeros."""
    with ActivationStore(tmp_path) as store:
        store.push(group(0, [2]))
        assert store._file is not None
        store._file.truncate(8)
        with pytest.raises(DeviceError, match="lost its end"):
            store.pop()
