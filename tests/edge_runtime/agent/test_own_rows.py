"""Rows of a function are counted in a worker: the process that asks never imports the module."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edge_runtime.agent.config import DeviceConfig, load_config
from edge_runtime.agent.own_rows import check_own_rows, count_own_rows
from edge_runtime.errors import ConfigError, DataError, OutOfMemoryError
from edge_runtime.worker.jobs import CountJob, Job
from edge_runtime.worker.process import RunningWorker, start_worker
from tests.edge_runtime.agent.test_config import write


def config(folder: Path, function: str, cap: str = '"512M"') -> DeviceConfig:
    """A device whose rows a function gives."""
    (folder / "rows_of_a_board.py").write_text(
        "def read(path):\n"
        "    for number in range(5):\n"
        "        yield {'text': f'row {number}', 'label': number, 'at': 1}\n"
        "def greedy(path):\n"
        "    yield {'text': 'x' * (1 << 31)}\n"
    )
    return load_config(
        write(
            folder,
            data=f'"{folder}"',
            data_function=f'"rows_of_a_board:{function}"',
            function_folder='"."',
            evaluation_share="0.4",
            cap=cap,
        )
    )


def test_a_function_is_called_in_a_worker(tmp_path: Path) -> None:
    """Counts come back, for each part; the module is not loaded here, and the job has the cap."""
    jobs: list[Job] = []

    def launch(job: Job) -> RunningWorker:
        jobs.append(job)
        return start_worker(job)

    device, key = config(tmp_path, "read"), b"k" * 32
    parts = [count_own_rows(device, part, key, launch) for part in ("train", "evaluation")]
    assert sum(parts) == 5
    assert all(isinstance(job, CountJob) and job.cap_bytes == device.cap for job in jobs)
    found = check_own_rows(device)
    assert (found.rows, found.labelled, found.numbered, found.unused_columns) == (5, True, True, 1)
    assert "rows_of_a_board" not in sys.modules


def test_a_function_is_held_to_the_cap(tmp_path: Path) -> None:
    """One that takes more memory than the cap fails in its worker, and nowhere else."""
    with pytest.raises(OutOfMemoryError):
        count_own_rows(config(tmp_path, "greedy"), "train", b"k" * 32)


def test_a_function_excludes_a_query(tmp_path: Path) -> None:
    """Rows come from one place."""
    with pytest.raises(ConfigError, match="set data_function or data_query, not both"):
        load_config(write(tmp_path, data_function='"a:b"', data_query='"SELECT 1"'))
    with pytest.raises(ConfigError, match="data_function"):
        load_config(write(tmp_path, data_function='"no function"'))


def test_a_function_that_fails_is_told(tmp_path: Path) -> None:
    """The worker's error arrives as it was raised."""
    with pytest.raises(DataError, match="cannot be found"):
        count_own_rows(config(tmp_path, "missing"), "train", b"k" * 32)
