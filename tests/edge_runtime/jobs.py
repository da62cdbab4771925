"""Jobs for a worker: one that names no real file, and the evaluation of what a training job trains from."""

from __future__ import annotations

from edge_runtime.worker.jobs import EvaluateJob, TrainJob

#: For workers that never open what the job names.
EVALUATE_JOB = EvaluateJob(
    package_folder="p",
    package_sha256="0" * 64,
    prepared_folder="q",
    state_path="s",
    data_path="d",
    sequence_limit=64,
    cap_bytes=1 << 30,
)


def evaluation_before(train: TrainJob, sequence_limit: int) -> EvaluateJob:
    """An evaluation on the same rows, of the values from which the job starts."""
    return EvaluateJob(
        train.package_folder,
        train.package_sha256,
        train.prepared_folder,
        train.state_path,
        train.data_path,
        sequence_limit,
        cap_bytes=1 << 30,
    )
