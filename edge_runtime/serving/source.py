"""Which model a command uses: a package folder with values, or the device's current release."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from edge_runtime.agent.config import DeviceConfig
from edge_runtime.agent.store import Store
from edge_runtime.engines.names import EngineName
from edge_runtime.errors import ConfigError
from edge_runtime.package.block_head import MAX_HEADER_BYTES, exits_of, head_of, with_block_head
from edge_runtime.package.manifest import Arithmetic
from edge_runtime.package.package import Package
from edge_runtime.package.prepared import prepared_beside
from edge_runtime.protocol.messages import Blocks, Pooling
from edge_runtime.worker.inference_jobs import InferenceJob
from edge_runtime.worker.jobs import PrepareJob
from edge_runtime.worker.process import ensure_prepared


@dataclass(frozen=True)
class Model:
    """A model to use, with everything that a worker needs to load it.

    Attributes:
        package: the package, its signature verified.
        state_path: file with the values of all slices.
        prepared_folder: place of the package as prepared for this machine.
        cap_bytes: memory that the worker may take.
        threads: number of threads of the engine; 0 takes as many as there are cores this process may use.
        engine: name of the engine.
        arithmetic: arithmetic to prepare for; None measures which is best.
        features: numbers of the blocks that the head reads; empty for the package's own features.
        pooling: way to make one vector of a text's hidden states, for ``features``.
        exits: blocks behind which texts may leave the model; empty runs all that ``features`` needs.
        confidence: least probability of a label at which a text leaves before the last of them.
    """

    package: Package
    state_path: Path
    prepared_folder: Path
    cap_bytes: int
    threads: int = 0
    engine: EngineName = "onnxruntime"
    arithmetic: Arithmetic | None = None
    features: Blocks = ()
    pooling: Pooling = "package"
    exits: Blocks = ()
    confidence: float = 1.0

    @property
    def engine_threads(self) -> int:
        """Threads of the engine, at least one."""
        return self.threads or len(os.sched_getaffinity(0))

    def prepare(self) -> None:
        """Have a worker prepare the package for this machine, unless that was done before and still holds.

        Raises:
            EdgeError: it cannot be prepared.
        """
        ensure_prepared(
            PrepareJob(
                package_folder=str(self.package.folder),
                package_sha256=self.package.sha256,
                prepared_folder=str(self.prepared_folder),
                cap_bytes=self.cap_bytes,
                threads=self.engine_threads,
                arithmetic=self.arithmetic,
                engine=self.engine,
            )
        )

    def job(self, sequence_limit: int = 0) -> InferenceJob:
        """The job of a worker that loads the model.

        Args:
            sequence_limit: largest number of tokens of a text; 0 takes the package's.
        """
        return InferenceJob(
            package_folder=str(self.package.folder),
            package_sha256=self.package.sha256,
            prepared_folder=str(self.prepared_folder),
            state_path=str(self.state_path),
            cap_bytes=self.cap_bytes,
            threads=self.engine_threads,
            engine=self.engine,
            sequence_limit=sequence_limit,
            features=self.features,
            pooling=self.pooling,
            exits=self.exits,
            confidence=self.confidence,
        )

    def at_depth(self, depth: str, confidence: float) -> Model:
        """The model with a depth: the number of an exit, or ``auto`` for all that fit, left when a label is sure.

        Args:
            depth: the number or ``auto``.
            confidence: least probability of a label at which a text leaves before the last exit.

        Raises:
            ConfigError: the values were not trained with exits, or not with this one.
        """
        with self.state_path.open("rb") as file:
            exits = exits_of(file.read(8 + MAX_HEADER_BYTES))
        if not exits:
            raise ConfigError(
                f"the values {self.state_path} were trained without exits, so --depth has none to choose; leave it "
                "out, or train a run with exits"
            )
        if depth == "auto":
            return replace(self, exits=exits, confidence=confidence)
        if depth not in map(str, exits):
            raise ConfigError(
                f"--depth is {depth}, and these values have the exits {', '.join(map(str, exits))}; take one, or auto"
            )
        return replace(self, features=(int(depth),), exits=(int(depth),))


def model_of_release(config: DeviceConfig) -> tuple[Model, str]:
    """The model of the release that a device's agent has made the current one, and the release's number.

    Nothing is written, so it may run beside the agent.

    Raises:
        ConfigError: the device has taken no release yet.
        ArtefactError: the package in the state folder cannot be read.
    """
    store = Store(config.state_folder, disk_quota_bytes=config.disk_quota)
    taken = store.releases.state().current
    if taken is None:
        raise ConfigError(
            f"this device has taken no release yet ({config.state_folder}); its coordinator's operator publishes one "
            "with edge-coordinator release publish, and edge-runtime run fetches it; or name --package"
        )
    folder = store.packages.folder_of(taken.release.package)
    package = Package.open(folder, config.publisher_key).for_engine(config.engine)
    model = Model(
        package,
        store.releases.values_path(taken),
        store.prepared_place(taken.release.package),
        config.cap,
        config.threads,
        config.engine,
        config.arithmetic,
        taken.release.features,
        taken.release.pooling,
    )
    return model, str(taken.release.number)


def model_of_folder(
    folder: Path,
    slices: Path | None,
    publisher_key: str,
    cap_bytes: int,
    threads: int,
    engine: EngineName,
    prepared_folder: Path | None,
) -> Model:
    """The model of a package folder.

    Args:
        folder: path of the package folder; all its files are verified.
        slices: file with the values of all slices, which says what their head reads; None takes those that the package
            starts from.
        publisher_key: public key that must have signed the package.
        cap_bytes: memory that the worker may take.
        threads: number of threads of the engine; 0 takes all.
        engine: name of the engine.
        prepared_folder: place of the prepared package; None takes what lies beside the package.

    Raises:
        ConfigError: the file of values is not there, or the package has no such blocks as its head reads.
        SliceError: the file is none of slice values.
        ArtefactError: the package cannot be read or is not signed by the key.
    """
    package = Package.open(folder, publisher_key)
    package.verify_files()
    narrowed = package.for_engine(engine)
    state_path = narrowed.path(narrowed.manifest.initial_state) if slices is None else slices
    if not state_path.is_file():
        raise ConfigError(
            f"there are no slice values {state_path}; edge-coordinator run fetch-slices writes such a file"
        )
    with state_path.open("rb") as file:
        features, pooling = head_of(file.read(8 + MAX_HEADER_BYTES))
    with_block_head(narrowed.manifest, features, pooling)  # refuses blocks that there are not
    place = prepared_folder or prepared_beside(folder)
    return Model(narrowed, state_path, place, cap_bytes, threads, engine, features=features, pooling=pooling)
