"""Which of a device's rows a job sums up, and the note of them that the device keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edge_runtime.data.examples import Examples
from edge_runtime.durable import write_durably
from edge_runtime.errors import WorkerError
from edge_runtime.package.manifest import Manifest
from edge_runtime.training.feature_sums import form_of
from edge_runtime.training.handed_in import Record, must_begin_anew, row_digests, since
from edge_runtime.worker.jobs import TrainJob


class RowsToSum:
    """All rows; or where sums were handed in before, those that have come since.

    Args:
        job: the job; one that gathers no sums passes over all rows, and nothing is noted.
        manifest: the package's manifest, as the run sees it.
        examples: all rows of the device.

    Raises:
        DataError: the record of what was handed in is damaged.
        WorkerError: the record cannot be read.

    Attributes:
        examples: the rows to pass over.
        stands: whether sums that were handed in before stand.
    """

    def __init__(self, job: TrainJob, manifest: Manifest, examples: Examples) -> None:
        self.examples, self.stands = examples, True
        self._path, self._before, self._entered = job.rows_path, b"", list[bytes]()
        if not job.rows_path:
            return
        digests = row_digests(examples, bytes.fromhex(job.row_key))
        record = _record(job)
        changed = since(record, digests)
        if record is not None and job.handed_in is not None and changed.stands and changed.positions:
            form = form_of(job.task, manifest)
            added_bytes = form.most_bytes(len(changed.positions))
            if must_begin_anew(len(record.parts), job.handed_in.bytes, added_bytes, form.whole_bytes):
                changed = since(None, digests)
        self.stands = changed.stands
        self._before = record.rows if record is not None and changed.stands else b""
        self._digests = [digests[position] for position in changed.positions]
        self.examples = _chosen(examples, changed.positions)

    def enter(self, positions: Sequence[int]) -> None:
        """Note rows that entered the sums, by their positions among :attr:`examples`."""
        if self._path:
            self._entered += [self._digests[position] for position in positions]

    def write(self) -> None:
        """Write the digests of all rows that are in the device's sums once the result counts."""
        if self._path:
            write_durably(Path(self._path), self._before + b"".join(self._entered))


def _chosen(examples: Examples, positions: Sequence[int]) -> Examples:
    labels = examples.labels
    return replace(
        examples,
        ids=[examples.ids[position] for position in positions],
        labels=None if labels is None else [labels[position] for position in positions],
    )


def _record(job: TrainJob) -> Record | None:
    if job.handed_in is None:
        return None
    try:
        return Record.decode(Path(job.handed_in.record_path).read_bytes())
    except OSError as error:
        raise WorkerError(f"cannot read the record {job.handed_in.record_path}: {error.strerror}") from error
