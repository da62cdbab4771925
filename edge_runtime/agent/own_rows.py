"""How many rows the device has. Files are counted here; a function of the operator's own is called in a worker."""

from __future__ import annotations

from collections.abc import Callable

from edge_runtime.agent.config import DeviceConfig
from edge_runtime.data.reading import Part
from edge_runtime.data.rows import RowsSummary, check_rows, count_rows
from edge_runtime.worker.jobs import CountJob, CountOutcome, Job
from edge_runtime.worker.process import RunningWorker, finish_worker, start_worker

#: Longest time in which a function gives all its rows to be counted.
COUNT_TIMEOUT_S = 600.0


def count_own_rows(
    config: DeviceConfig,
    part: Part,
    split_key: bytes,
    launch: Callable[[Job], RunningWorker] = start_worker,
) -> int:
    """Number of the device's rows of a part; 0 if it has no data.

    Args:
        config: the device's configuration.
        part: which rows.
        split_key: the device's key that decides which rows are for evaluation.
        launch: function that starts a worker.

    Raises:
        DataError: the data cannot be read.
        EdgeError: the worker failed.
    """
    if config.data is None:
        return 0
    if config.data_function is None:
        return count_rows(config.data, config.reading(part, split_key))
    return _in_worker(config, part, split_key, launch).rows


def check_own_rows(config: DeviceConfig) -> RowsSummary:
    """What all of the device's rows are like, each of them parsed.

    Raises:
        ConfigError: the configuration names no data.
        DataError: a row cannot be used, whatever the package is.
        EdgeError: the worker failed.
    """
    if config.data_function is None:
        return check_rows(config.training_data, config.reading("all", b""))
    found = _in_worker(config, "all", b"", start_worker)
    return RowsSummary(found.rows, found.labelled, found.numbered, found.unused_columns)


def _in_worker(
    config: DeviceConfig, part: Part, split_key: bytes, launch: Callable[[Job], RunningWorker]
) -> CountOutcome:
    job = CountJob(
        data_path=str(config.training_data), reading=config.reading(part, split_key), cap_bytes=config.cap
    )
    return finish_worker(launch(job), CountOutcome, COUNT_TIMEOUT_S)
