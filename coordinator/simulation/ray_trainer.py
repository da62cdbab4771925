"""Training on a Ray cluster: actors with a bench each. Ray is imported here alone, and only if it is asked for.

What comes back is what this process would have computed, and it is asked for in the same order, so a simulation ends
with the same bytes wherever its tasks ran, on machines of one CPU type.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coordinator.simulation.labelled_rows import LabelledRows
from coordinator.simulation.trainers import Pending
from coordinator.simulation.workbench import BenchSettings, Job, Workbench
from edge_runtime.errors import ConfigError, EdgeError, WorkerError
from edge_runtime.worker.jobs import Failure, describe_failure, rebuild_error

#: Seconds within which a cluster's head must answer.
CONNECT_S = 3.0


class RemoteBench:
    """A bench in an actor.

    Args:
        settings: settings of the bench.
        train: rows that devices share.
        dev: rows of evaluations.
    """

    def __init__(self, settings: BenchSettings, train: LabelledRows, dev: LabelledRows) -> None:
        self._bench = Workbench(settings, train, dev)

    def train(self, job: Job) -> bytes | Failure:
        """The encoded result of a task, or a description of why there is none: not every error can be pickled."""
        try:
            return self._bench.train(job)
        except EdgeError as error:
            return describe_failure(error)


class RayTrainer:
    """Hands tasks to whichever actor has least to do.

    Args:
        ray: the library Ray.
        actors: handles on the actors.
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
                answer: bytes | Failure = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[-1]
                raise WorkerError(f"training on Ray failed: {reason}; start the command again") from error
            if isinstance(answer, Failure):
                raise rebuild_error(answer)
            return answer

        return result


@contextmanager
def ray_trainer(
    address: str, settings: BenchSettings, train: LabelledRows, dev: LabelledRows
) -> Iterator[RayTrainer]:
    """Actors on a cluster, as many as it has cores for; they end with the block.

    Args:
        address: address of the cluster's head; "auto" is the one on this machine.
        settings: settings of each actor's bench; the folders must be there on every machine of the cluster.
        train: rows that devices share.
        dev: rows of evaluations.

    Raises:
        ConfigError: Ray is not installed, or no cluster runs at the address.
    """
    ray = _connect(address)
    try:
        cores = int(ray.cluster_resources().get("CPU", 1))
        shared_train, shared_dev = ray.put(train), ray.put(dev)
        remote = ray.remote(RemoteBench).options(num_cpus=settings.threads)
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
    found = _find(address)
    missing = f"no Ray cluster runs at {address}; start one on this machine: ray start --head"
    if not _answers(found):
        raise ConfigError(missing)
    try:
        ray.init(address=found, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(missing) from error
    return ray


def _find(address: str) -> str:
    """The head's ``host:port``; for "auto", what ``ray start`` left on this machine, empty if nothing."""
    if address != "auto":
        return address
    if known := os.environ.get("RAY_ADDRESS"):
        return known
    try:
        return (Path(tempfile.gettempdir()) / "ray" / "ray_current_cluster").read_text("ascii").strip()
    except OSError:
        return ""


def _answers(address: str) -> bool:
    """Whether anybody listens there: Ray itself would ask a head that is gone for minutes."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=CONNECT_S):
            return True
    except (OSError, ValueError):
        return False
