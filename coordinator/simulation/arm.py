"""One arm at one seed: its state folder, made on first use and gone on with afterwards.

``DIR/state/ARM-seedN`` is a coordinator's state folder. Beside the database lie ``arm.json``, which says what is
simulated there, ``wall.jsonl`` with the wall time of each evaluated round, and ``lock``.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec import Struct

from coordinator.auth import Device, create_token, enrol
from coordinator.config import RunConfig
from coordinator.rounds.runs import create_run, expected_rounds
from coordinator.simulation.config import NO_KEY, ArmConfig, SimulationConfig
from coordinator.simulation.fleet import Fleet
from coordinator.storage import device_rows
from coordinator.storage.stores import Stores, open_stores
from edge_runtime.decoding import MALFORMED
from edge_runtime.durable import write_durably
from edge_runtime.errors import ConfigError
from edge_runtime.package.package import Package
from edge_runtime.protocol.messages import EnrolRequest, Sha256

STATE, LOCK, IDENTITY, WALL = "state", "lock", "arm.json", "wall.jsonl"


class ArmIdentity(Struct, frozen=True):
    """What an arm's folder was made for.

    Attributes:
        fingerprint: digest of all that the arm's values depend on.
        run_id: id of the arm's run.
    """

    fingerprint: Sha256
    run_id: str


@dataclass(frozen=True)
class Arm:
    """An arm as it is simulated, with handles on its state folder.

    Attributes:
        config: configuration of the arm.
        seed: seed of the arm.
        run: configuration of the arm's run.
        run_id: id of the arm's run.
        fingerprint: digest of all that the arm's values depend on.
        folder: state folder.
        stores: handles on the state folder.
        fleet: simulated devices.
        devices: the same devices, as the coordinator knows them, by name.
        started_s: reading of the monotonic clock when this process began with the arm.
        earlier_wall_s: seconds that earlier processes spent on the arm.
    """

    config: ArmConfig
    seed: int
    run: RunConfig
    run_id: str
    fingerprint: str
    folder: Path
    stores: Stores
    fleet: Fleet
    devices: dict[str, Device]
    started_s: float
    earlier_wall_s: float

    @property
    def wall_s(self) -> float:
        """Seconds that all processes together have spent on this arm so far."""
        return self.earlier_wall_s + time.monotonic() - self.started_s

    @property
    def expected_rounds(self) -> int:
        """Number of rounds that the arm takes."""
        return expected_rounds(self.run, len(self.devices))

    def note_wall(self, round_number: int) -> None:
        """Write down the wall time of an evaluated round."""
        with (self.folder / WALL).open("a") as file:
            file.write(f"[{round_number}, {self.wall_s:.3f}]\n")

    def wall_of_rounds(self) -> dict[int, float]:
        """Wall seconds at which each round was evaluated; of a round that was evaluated twice, the later ones."""
        return dict(_read_wall(self.folder))


def label(arm: ArmConfig, seed: int) -> str:
    """Name of an arm's files."""
    return f"{arm.name}-seed{seed}"


def fingerprint_of(
    config: SimulationConfig, run: RunConfig, package_sha256: str, data: tuple[str, str]
) -> str:
    """A digest of all that an arm's values depend on.

    Args:
        config: configuration of the simulation.
        run: configuration of the arm's run, its seed included.
        package_sha256: digest of the package's manifest.
        data: digests of the training rows and of the dev rows.
    """
    plain = msgspec.structs.replace(run, package=package_sha256, publisher_key=NO_KEY, evaluation=None)
    every = run.evaluation.every_rounds if run.evaluation else 0
    fleet = msgspec.structs.replace(config.fleet, prefix_cache=0)
    shared = msgspec.structs.replace(config.data, train=data[0], dev=data[1])
    parts = (plain, every, fleet, shared, config.speed, config.dropout)
    return hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a folder against other processes.

    Args:
        folder: folder to hold, made if missing.
        wait: whether to wait until it is free.

    Raises:
        ConfigError: another process holds it, and this one does not wait.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise ConfigError(
                f"another process simulates in {folder}; wait for it, or choose other --arms or --seeds"
            ) from error
        yield
    finally:
        os.close(descriptor)


@contextmanager
def open_arm(
    folder: Path, config: ArmConfig, run: RunConfig, fleet: Fleet, fingerprint: str
) -> Iterator[Arm]:
    """Open an arm's state folder, whether it was begun or not.

    Args:
        folder: state folder of the arm.
        config: configuration of the arm.
        run: configuration of the arm's run.
        fleet: simulated devices.
        fingerprint: digest of all that the arm's values depend on.

    Raises:
        ConfigError: another process works on it, or it holds an arm of another configuration.
        ArtefactError: the package is malformed, damaged or not signed by the run's publisher.
    """
    with locked(folder):
        identity = _identity(folder)
        if identity is None:
            _clear(folder)
        elif identity.fingerprint != fingerprint:
            raise ConfigError(
                f"{folder} was begun with another configuration, package or data; remove it, or choose another --output"
            )
        stores = open_stores(folder, durable=False)
        try:
            if identity is None:
                identity = ArmIdentity(fingerprint, _begin(stores, run, fleet))
                write_durably(folder / IDENTITY, msgspec.json.encode(identity))
            wall = _read_wall(folder)
            yield Arm(
                config=config,
                seed=run.seed,
                run=run,
                run_id=identity.run_id,
                fingerprint=fingerprint,
                folder=folder,
                stores=stores,
                fleet=fleet,
                devices=_devices(stores),
                started_s=time.monotonic(),
                earlier_wall_s=wall[-1][1] if wall else 0.0,
            )
        finally:
            stores.storage.close()


def _begin(stores: Stores, run: RunConfig, fleet: Fleet) -> str:
    """Enrol the fleet and queue the run, at virtual time 0."""
    package = Package.open(Path(run.package), run.publisher_key)
    for name, entry in package.manifest.files.items():
        stores.blobs.link_file(package.path(name), entry.sha256)  # one copy serves all arms
    public_key = stores.key.public_key  # in-process devices sign nothing, so one key does for all
    with stores.storage.transaction() as connection:
        for name in fleet.devices:
            token = create_token(connection, valid_s=1.0, now_s=0.0)
            enrol(connection, EnrolRequest(token, name, "simulated", public_key), now_s=0.0)
    return create_run(stores, run, now_s=0.0, read_data=False)


def _devices(stores: Stores) -> dict[str, Device]:
    with stores.storage.reading() as connection:
        rows = device_rows.all_devices(connection)
    return {row["name"]: Device(row["device_id"], row["name"]) for row in rows}


def _identity(folder: Path) -> ArmIdentity | None:
    try:
        return msgspec.json.decode((folder / IDENTITY).read_bytes(), type=ArmIdentity)
    except (FileNotFoundError, *MALFORMED):
        return None


def _clear(folder: Path) -> None:
    """Remove what an arm left behind that was killed before it had begun."""
    for path in folder.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _read_wall(folder: Path) -> list[tuple[int, float]]:
    try:
        lines = (folder / WALL).read_text().splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            found.append(msgspec.json.decode(line, type=tuple[int, float]))
        except MALFORMED:  # the line at which the process was killed
            continue
    return found
