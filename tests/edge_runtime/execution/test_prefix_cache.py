"""The prefix cache: what it keeps, how much, and that it leaves nothing behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.execution import prefix_cache
from edge_runtime.execution.prefix_cache import PrefixCache


def arrays(seed: int, tokens: int = 3) -> dict[str, np.ndarray]:
    """What a prefix gives for an example: a hidden state and a mask."""
    generator = np.random.default_rng(seed)
    return {
        "hidden": generator.standard_normal((1, tokens, 8), dtype=np.float32),
        "mask": generator.integers(0, 2, (1, 1, tokens, tokens)),
    }


def bytes_of(made: dict[str, np.ndarray]) -> int:
    return sum(array.nbytes for array in made.values())


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    stored=st.lists(st.tuples(st.integers(0, 9), st.sampled_from([8, 16])), max_size=30),
    limit=st.integers(0, 4000),
)
def test_what_is_found_is_what_was_first_stored(tmp_path_factory, stored, limit: int) -> None:
    """An example gives the arrays it was first stored with, bit for bit, or nothing; the file keeps to its limit."""
    with PrefixCache(tmp_path_factory.getbasetemp(), limit) as cache:
        first = {}
        for number, example in enumerate(stored):
            made = arrays(number)
            fits = cache._used_bytes + bytes_of(made) <= limit
            if example not in first and fits:
                first[example] = made
            cache.store(example, made)
            assert cache._file.seek(0, 2) <= limit
        for example in [(row, tokens) for row in range(10) for tokens in (8, 16)]:
            found, wanted = cache.load(example), first.get(example)
            assert (found is None) == (wanted is None)
            if found is not None and wanted is not None:
                assert set(found) == set(wanted)
                for name, array in wanted.items():
                    assert found[name].dtype == array.dtype
                    assert np.array_equal(found[name], array)
        assert (cache.hits, cache.misses) == (len(first), 20 - len(first))


def test_a_row_padded_further_is_another_example(tmp_path) -> None:
    """What the prefix gives depends on the length, so a row is known by it as well."""
    with PrefixCache(tmp_path, 1 << 20) as cache:
        cache.store((3, 8), arrays(0, 8))
        assert cache.load((3, 16)) is None
        assert cache.load((4, 8)) is None
        assert cache.load((3, 8)) is not None


def test_parts_of_larger_arrays_are_kept(tmp_path) -> None:
    """A view that is not contiguous is stored as it reads."""
    whole = np.arange(48, dtype=np.float32).reshape(2, 4, 6)
    with PrefixCache(tmp_path, 1 << 20) as cache:
        cache.store((0, 8), {"hidden": whole[:, 1::2, ::3]})
        found = cache.load((0, 8))
    assert found is not None
    assert np.array_equal(found["hidden"], whole[:, 1::2, ::3])


def test_a_full_disk_keeps_what_was_kept(small_disk) -> None:
    """When the disk is full, later examples are not kept; earlier ones are still there, and nothing is raised."""
    with PrefixCache(small_disk, 1 << 20) as cache:
        for row in range(100):
            cache.store((row, 16), arrays(row, 16))
        found = [cache.load((row, 16)) for row in range(100)]
        kept = [each for each in found if each is not None]
        assert 0 < len(kept) < 40
        for row, each in enumerate(kept):
            assert np.array_equal(each["hidden"], arrays(row, 16)["hidden"])
        assert all(each is None for each in found[len(kept) :])


def test_a_disk_that_fails_keeps_nothing_more(tmp_path, monkeypatch) -> None:
    """A write that fails ends the storing, not the task."""

    def fail(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with PrefixCache(tmp_path, 1 << 20) as cache:
        cache.store((0, 8), arrays(0))
        monkeypatch.setattr(prefix_cache.os, "pwrite", fail)
        cache.store((1, 8), arrays(1))
        monkeypatch.undo()
        cache.store((2, 8), arrays(2))
        assert [cache.load((row, 8)) is not None for row in range(3)] == [True, False, False]


def test_a_write_cut_short_is_not_kept(tmp_path, monkeypatch) -> None:
    """An example of which only a part was written is a miss, and the next one takes its place."""
    with PrefixCache(tmp_path, 1 << 20) as cache:
        monkeypatch.setattr(prefix_cache.os, "pwrite", lambda *_: 5)
        cache.store((0, 8), arrays(0))
        monkeypatch.undo()
        assert cache.load((0, 8)) is None
        cache.store((1, 8), arrays(1))
        found = cache.load((1, 8))
    assert found is not None
    assert np.array_equal(found["hidden"], arrays(1)["hidden"])


def test_a_process_that_is_killed_leaves_no_file(tmp_path) -> None:
    """The file has no name: after ``kill -9`` the folder is empty, and so it is before."""
    program = """
import sys, time, numpy as np
from pathlib import Path
from edge_runtime.execution.prefix_cache import PrefixCache
cache = PrefixCache(Path(sys.argv[1]), 1 << 24)
cache.store((0, 8), {"hidden": np.ones((1, 1 << 20), np.float32)})
print("stored", flush=True)
time.sleep(60)
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "stored\n"
        assert list(tmp_path.iterdir()) == []
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []
