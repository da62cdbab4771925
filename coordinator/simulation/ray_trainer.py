"""Training on a Ray cluster: actors with a bench each. Ray is imported here alone, and only if it is asked for.

What comes back is what this process would have computed, and it is asked for in the same order, so a simulation ends
with the same bytes wherever its tasks ran, on machines of one CPU type.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from coordinator.simulation.labelled_rows import LabelledRows
from coordinator.simulation.trainers import Pending
from coordinator.simulation.workbench import BenchSettings, Job, Workbench
from edge_runtime.errors import ConfigError, EdgeError, WorkerError


class RayTrainer:
    """Hands tasks to whichever actor has least to do.

    Args:
        ray: the library. actors: handles on them.
    """

    def __init__(self, ray: Any, actors: list[Any]) -> None:
        self._ray, self._actors = ray, actors
        self._waiting = [0] * len(actors)

    def submit(self, job: Job) -> Pending:
        """See :class:`coordinator.simulation.trainers.Trainer`; training begins at once."""
        number = self._waiting.index(min(self._waiting))
        self._waiting[number] += 1
        reference = self._actors[number].train.remote(job)

        def result() -> bytes:
            self._waiting[number] -= 1
            try:
                body: bytes = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, EdgeError):
                    raise error.cause from error
                raise
            except self._ray.exceptions.RayError as error:
                first = str(error).strip().splitlines()[0]
                raise WorkerError(f"a Ray actor was lost: {first}; start the command again") from error
            return body

        return result


@contextmanager
def ray_trainer(
    address: str, settings: BenchSettings, train: LabelledRows, dev: LabelledRows
) -> Iterator[RayTrainer]:
    """Actors on a cluster, as many as it has cores for; they end with the block.

    Args:
        address: of the cluster's head; "auto" is the one on this machine.
        settings: of each actor's bench; the folders must be there on every machine of the cluster.
        train, dev: the rows.

    Raises:
        ConfigError: Ray is not installed, or no cluster runs at the address.
    """
    ray = _connect(address)
    try:
        cores = int(ray.cluster_resources().get("CPU", 1))
        shared_train, shared_dev = ray.put(train), ray.put(dev)
        remote = ray.remote(Workbench).options(num_cpus=settings.threads)
        count = max(1, cores // settings.threads)
        yield RayTrainer(ray, [remote.remote(settings, shared_train, shared_dev) for _ in range(count)])
    finally:
        ray.shutdown()


def _connect(address: str) -> Any:
    # Ray reports its use to its makers unless told not to; a simulation tells nobody.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray  # noqa: PLC0415 - an extra, and slow to import
    except ImportError as error:
        raise ConfigError(
            "--ray needs Ray, which is not installed: pip install 'edge-runtime[ray]'"
        ) from error
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"no Ray cluster runs at {address}; start one on this machine: ray start --head"
        ) from error
    return ray
