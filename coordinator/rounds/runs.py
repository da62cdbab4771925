"""Runs: created from a configuration and a package, taking turns, stopped by the operator."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import msgspec
import numpy as np
from msgspec.structs import replace

from coordinator.aggregation.accountant import epsilon_of
from coordinator.aggregation.growth import check_growth, grown_slices
from coordinator.config import WITHOUT_SLICES, EvaluationConfig, RunConfig, most_participations
from coordinator.events import record
from coordinator.refusals import ConflictError, NotFoundError
from coordinator.rounds.assignment import deal
from coordinator.rounds.continuing import check_continues, go_on
from coordinator.rounds.memory_requirements import required_bytes
from coordinator.rounds.noise_check import describe, with_noise
from coordinator.rounds.row_slices import check_rows, trains_rows, with_first_rows
from coordinator.storage import evaluation_rows, masking_rows, privacy_rows, round_rows, run_rows, task_rows
from coordinator.storage.connection import Connection
from coordinator.storage.privacy_rows import SpentRow
from coordinator.storage.run_rows import RunRow
from coordinator.storage.stores import Stores
from edge_runtime.data.rows import load_rows
from edge_runtime.errors import ConfigError, DataError, PackageError, SignatureError
from edge_runtime.package.block_head import default_blocks, with_block_head
from edge_runtime.package.manifest import MANIFEST, SIGNATURE, Manifest
from edge_runtime.package.package import Package
from edge_runtime.package.slices import Values, decode_values, encode_values, shapes
from edge_runtime.slices.kinds import KINDS
from edge_runtime.training.methods import check_features, check_loss, check_rank_mode, check_sketches

ACTIVE = ("running", "evaluating")
#: Phases of a run. In a visit every device is asked once, for the sums of a head in closed form.
TRAINING, FIRST_VISIT, LAST_VISIT = "training", "first_visit", "last_visit"


def first_phase(config: RunConfig) -> str:
    """The phase that a run begins with."""
    if config.head != "closed_form" or (config.rounds and config.visit == "last"):
        return TRAINING
    return FIRST_VISIT if config.rounds else LAST_VISIT


def expected_rounds(config: RunConfig, devices: int) -> int:
    """Number of rounds of a run with so many devices; a visit takes as many as it needs to ask each once."""
    visits = (
        0 if config.head != "closed_form" else 1 + (config.visit == "first_and_last" and config.rounds > 0)
    )
    return config.rounds + visits * -(-devices // config.devices_per_round)


def in_phase(config: RunConfig, phase: str) -> RunConfig:
    """A configuration as tasks of a phase have it.

    In a visit they gather sums and train nothing. Between visits a head in closed form learns by its exact gradient.
    """
    if config.head != "closed_form":
        return config
    if phase == TRAINING:
        return replace(config, head="exact")
    return replace(config, **WITHOUT_SLICES, steps=1, epochs=0)


@dataclass(frozen=True)
class Run:
    """A run as the database has it at one moment, with its configuration and manifest.

    Attributes:
        run_id: id of the run.
        config: configuration of the run.
        manifest: manifest of its package, as the run sees it.
        package_sha256: digest of the manifest.
        package_signature: the publisher's signature of the manifest.
        state: queued, running, evaluating, finished, failed or stopped.
        values_sha256: slice values that training goes on from.
        optimizer_sha256: server state beside the values; None before the first commit.
        next_round: number of the next round to open.
        committed: number of committed rounds.
        abandoned_in_a_row: number of rounds that were abandoned since the last commit.
        average_sha256: mean of the values after several rounds; None while there is none.
        reference_sha256: deltas that the next round's directions are compared with; None if they are not.
        phase: training, first_visit or last_visit.
        rounds_done: number of committed rounds, those of visits among them, which ``committed`` does not count.
        delta_sizes: sizes that deltas had in the last committed round that trained a slice, by slice.
        paused: whether the operator paused it.
    """

    run_id: str
    config: RunConfig
    manifest: Manifest
    package_sha256: str
    package_signature: str
    state: str
    values_sha256: str
    optimizer_sha256: str | None
    next_round: int
    committed: int
    abandoned_in_a_row: int
    average_sha256: str | None
    reference_sha256: str | None
    phase: str
    rounds_done: int
    delta_sizes: Mapping[str, float]
    paused: bool

    @property
    def visiting(self) -> bool:
        """Whether every device is being asked once for its sums."""
        return self.phase != TRAINING

    @property
    def is_buffered(self) -> bool:
        """Whether its rounds wait for so many results, and not for their devices."""
        return self.config.buffer_size is not None

    @property
    def in_last_visit(self) -> bool:
        """Whether its sums, if it has any, are those of its last visit, from which another run may go on."""
        return self.phase == LAST_VISIT

    @property
    def settings(self) -> RunConfig:
        """The configuration as tasks of the present phase have it."""
        return in_phase(self.config, self.phase)

    @property
    def head_name(self) -> str:
        """Name of the head's slice.

        Raises:
            PackageError: the package has no head.
        """
        if self.manifest.head is None:
            raise PackageError(f"package {self.manifest.name} has no head")
        return self.manifest.head.name

    @property
    def least_results(self) -> int:
        """Number of results that a round needs; in a visit any is taken: a lost device is asked only once more."""
        return 1 if self.visiting else self.config.min_results

    @property
    def result_sha256(self) -> str:
        """The values that are evaluated and handed over: the mean once there is one, until then the current ones."""
        return self.average_sha256 or self.values_sha256

    @property
    def slices(self) -> tuple[str, ...]:
        """Names of the slices the run trains by forward mode, in the package's order, without the head."""
        return trained_slices(self.config, self.manifest)

    def deal(self, slots: int) -> list[tuple[str, ...]]:
        """What each of so many slots of the next round trains, the head's name included where it is trained.

        While the head warms up, and in visits, every slot trains the head alone. The deal moves on with every round,
        through the warm-up too.
        """
        head = self.manifest.head
        if head is not None and (self.visiting or self.committed < self.config.head_warm_up_rounds):
            return [(head.name,)] * slots
        own = [self.manifest.slice_named(name) for name in self.slices]
        return deal(
            grown_slices(self.config.grow_at, own, self.committed),
            [head.name] if head is not None and self.config.train_head else [],
            slots,
            self.next_round,
            split=self.config.split,
            head_split=self.config.head_split,
        )


def trained_slices(config: RunConfig, manifest: Manifest) -> tuple[str, ...]:
    """Names of the slices that a configuration trains, in the package's order, without the head.

    Raises:
        ConfigError: the package has no such slice, or it is the head; or the slices' rate is to set itself, and the
            package is for language modelling.
    """
    if config.server_optimizer.slices.rate == "auto" and manifest.head is None:
        raise ConfigError(
            f'server_optimizer.slices.rate = "auto" takes the curvature of a classification\'s loss, and package '
            f"{manifest.name} is for language modelling; give the rate a number"
        )
    available = tuple(spec.name for spec in manifest.slices if spec.kind != "head")
    if config.slices == "all":
        return available
    if config.slices == "none":
        return ()
    if unknown := sorted(set(config.slices) - set(available)):
        raise ConfigError(
            f"slices names {unknown[0]!r}; package {manifest.name} has {', '.join(available) or 'none'}"
            " (the head is switched by train_head)"
        )
    return tuple(name for name in available if name in config.slices)


def with_features(config: RunConfig, manifest: Manifest) -> tuple[RunConfig, Manifest]:
    """A configuration with the blocks that its head reads, chosen if it must have some, and the manifest as it sees it.

    Raises:
        ConfigError: the package has no such blocks, or no head.
    """
    if config.head == "closed_form" and not config.features and manifest.head is not None:
        config = replace(config, features=default_blocks(manifest))
    if config.exits:
        config = replace(config, features=config.exits[-1:])
    return config, with_block_head(manifest, config.features, config.pooling, config.exits)


def create_run(stores: Stores, config: RunConfig, *, now_s: float, read_data: bool = True) -> str:
    """Verify and import the package, then queue the run; returns its id. Nothing changes if this raises.

    Args:
        stores: handles on the state folder.
        config: configuration of the run.
        now_s: the present moment.
        read_data: whether the rows for evaluations are read; a simulation has rows in a form of its own, and reads them
            itself.

    Raises:
        ConfigError: configuration and package do not fit together, or the package or the evaluation data is missing.
        DataError: a row of the evaluation data does not fit the package.
        ArtefactError: the package is malformed, damaged or not signed by ``publisher_key``.
    """
    # 1. Verify; what takes longest comes last.
    package = _open_package(config)
    slices = trained_slices(config, package.manifest)
    if config.train_head and package.manifest.head is None:
        raise ConfigError(
            f"train_head is true, and package {package.manifest.name} has no head to train: it is for language "
            "modelling; set train_head = false"
        )
    if not slices and not config.train_head:
        raise ConfigError(
            f"package {package.manifest.name} has no slice but the head, and train_head is false"
        )
    check_slices(config, package.manifest, slices)
    earlier = None
    if config.continue_from is not None:
        earlier = _earlier(stores, config.continue_from)
        config = replace(config, features=config.features or earlier.config.features)
    config, seen = with_features(config, package.manifest)
    check_features(config, package.manifest, slices)
    config = with_noise(config, seen, slices, simulated=not read_data)
    phase = first_phase(config)
    # Raises if the package cannot train as asked.
    required_bytes(seen, in_phase(config, phase), () if phase != TRAINING else slices)
    check_loss(config, package.manifest)
    if earlier is not None:
        check_continues(earlier, config, seen)
    if config.evaluation is not None:
        _check_evaluation(config.evaluation, package.manifest, read_data=read_data)
    package.verify_files()
    # 2. Import, every file under its sha256.
    for name, entry in package.manifest.files.items():
        stores.blobs.put_file(package.path(name), entry.sha256)
    stores.blobs.put_file(package.folder / MANIFEST, package.sha256)
    signature = (package.folder / SIGNATURE).read_text("ascii").strip()
    values_sha256 = package.manifest.files[package.manifest.initial_state].sha256
    if config.features or trains_rows(package.manifest, slices):
        values_sha256 = stores.blobs.put(initial_values(stores, package.manifest, seen, config))
    else:
        decode_values(stores.blobs.get(values_sha256), package.manifest.slices)
    state_sha256 = None
    if earlier is not None:
        values_sha256, state_sha256 = go_on(stores, earlier, seen)
    # 3. Queue.
    run_id = f"{config.name}-{secrets.token_hex(3)}"
    with stores.storage.transaction() as connection:
        run_rows.add(
            connection,
            run_id,
            config=msgspec.json.encode(config).decode(),
            package_sha256=package.sha256,
            package_signature=signature,
            values_sha256=values_sha256,
            created_s=now_s,
            phase=phase,
            optimizer_sha256=state_sha256,
        )
        goes_on = "" if earlier is None else f", goes on from the sums of run {earlier.run_id}"
        if config.privacy is not None:
            times = most_participations(config)
            epsilon = epsilon_of(config.privacy, times)
            privacy_rows.add(connection, SpentRow(run_id, privacy_rows.AT_END, times, epsilon))
        private = describe(config, seen, slices)
        message = f"package {package.manifest.name}{goes_on}{'; ' if private else ''}{private}"
        record(connection, now_s, "run_created", message, run_id=run_id)
    return run_id


def initial_values(stores: Stores, manifest: Manifest, seen: Manifest, config: RunConfig) -> bytes:
    """The values that a run starts from, as safetensors bytes.

    Args:
        stores: handles on the state folder, with the package's files among the blobs.
        manifest: the package's manifest, as it is in its file.
        seen: the manifest as the run sees it.
        config: configuration of the run.
    """
    values = decode_values(stores.blobs.get(manifest.files[manifest.initial_state].sha256), manifest.slices)
    if seen.head_blocks:
        values = _with_new_head(values, seen)
    return encode_values(with_first_rows(values, manifest, config), seen)


def _earlier(stores: Stores, run_id: str) -> Run:
    """The run that another goes on from.

    Raises:
        ConfigError: there is none.
    """
    try:
        with stores.storage.reading() as connection:
            return find_run(stores, connection, run_id)
    except NotFoundError as error:
        raise ConfigError(f"continue_from: {error.message}") from error


def _with_new_head(values: Values, seen: Manifest) -> Values:
    """A package's initial values with a head over several blocks in place of its own, which starts at zero."""
    head = [spec for spec in seen.slices if spec.kind == "head"]
    zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes(head).items()}
    return {name: zeros[name] if name in zeros else values[name] for name in shapes(seen.slices)}


def _open_package(config: RunConfig) -> Package:
    """The package that a configuration names, verified up to its manifest."""
    folder = Path(config.package)
    if not folder.is_dir():
        raise ConfigError(
            f"package names {folder}, which is no folder on the coordinator's machine; relative paths start at the "
            "folder of the run's file"
        )
    try:
        return Package.open(folder, config.publisher_key)
    except SignatureError as error:
        raise SignatureError(
            f"the signature of package {folder} was not made over its manifest by publisher_key = "
            f"{config.publisher_key}; set publisher_key to what edge-export key printed for it, or fetch or export the "
            "package again"
        ) from error


def _check_evaluation(evaluation: EvaluationConfig, manifest: Manifest, *, read_data: bool) -> None:
    """What evaluations would fail for, round after round: the rows, the engine, the arithmetic."""
    data = Path(evaluation.data)
    if not data.is_file():
        raise ConfigError(f"evaluation.data names {data}, which is no file here")
    offered = manifest.for_engine("onnxruntime").arithmetics
    if evaluation.arithmetic is not None and evaluation.arithmetic not in offered:
        raise ConfigError(
            f'evaluation.arithmetic = "{evaluation.arithmetic}" is not in package {manifest.name}, which has '
            f"{', '.join(offered)}; leave it out, or take one of these"
        )
    if evaluation.groups and manifest.task != "classification":
        raise ConfigError(
            "evaluation.groups compares accuracies of a classifier; leave it out for a language model"
        )
    files = {"evaluation.data": data}
    for group in evaluation.groups:
        key = f"evaluation.groups, {group.name}: data"
        if key in files:
            raise ConfigError(
                f"evaluation.groups has two groups named {group.name}; give each a name of its own"
            )
        if not Path(group.data).is_file():
            raise ConfigError(f"{key} names {group.data}, which is no file here")
        files[key] = Path(group.data)
    for key, path in files.items() if read_data else ():
        try:
            load_rows(path, manifest.labels)
        except DataError as error:
            raise DataError(f"{key} does not fit package {manifest.name}: {error}") from error


def _check_lora(config: RunConfig, manifest: Manifest, slices: tuple[str, ...]) -> None:
    """Only plain LoRA has an A and a B that could be averaged in another way than tensor by tensor."""
    if config.lora_aggregation == "factors":
        return
    for spec in map(manifest.slice_named, slices):
        if KINDS[spec.kind].pair is None:
            raise ConfigError(
                f'lora_aggregation = "{config.lora_aggregation}" needs plain LoRA, slice {spec.name} of package '
                f"{manifest.name} is {spec.kind}: export it with --slice lora, or leave lora_aggregation at "
                '"factors"'
            )


def active_runs(stores: Stores, connection: Connection) -> list[Run]:
    """Runs that are training or await their last evaluation, oldest first."""
    return [run_of(stores, row) for row in run_rows.active(connection)]


def starts_now(connection: Connection, queued: RunRow) -> bool:
    """Whether a run that is next in the queue need not wait for another."""
    rows = run_rows.active(connection)
    return not rows or all(_goes_beside_others(row) for row in (queued, *rows))


def _goes_beside_others(row: RunRow) -> bool:
    return config_of(row.config).beside_others


@lru_cache(maxsize=64)  # every check-in asks
def config_of(text: str) -> RunConfig:
    """A configuration from the JSON that a row of ``runs`` has of it."""
    return msgspec.json.decode(text, type=RunConfig)


def check_slices(config: RunConfig, manifest: Manifest, slices: tuple[str, ...]) -> None:
    """Check what a run asks of its slices: how they are cut, chosen, sketched, averaged, and when they join.

    Raises:
        ConfigError: they are of another kind, or settings exclude each other.
    """
    _check_lora(config, manifest, slices)
    _check_split(config)
    _check_ranks(config, manifest, slices)
    check_rows(config, manifest, slices)
    frozen_a = config.lora_aggregation == "frozen_a"
    check_sketches(config, config.local_optimizer, manifest, slices, freeze_a=frozen_a)
    check_growth(config, [manifest.slice_named(name) for name in slices])


def _check_split(config: RunConfig) -> None:
    """Check that a place's slices are all, where a device may reach some of them alone.

    Raises:
        ConfigError: they are dealt out.
    """
    if config.exits and config.split != "whole":
        raise ConfigError(
            f'exits let a device train the slices that it reaches, and split = "{config.split}" deals them out; '
            'take split = "whole"'
        )


def _check_ranks(config: RunConfig, manifest: Manifest, slices: tuple[str, ...]) -> None:
    """Check that slices can be held in part and averaged rank by rank, where a run asks for that.

    Raises:
        ConfigError: a slice's rank is fixed, or a setting does not go with unlike ranks.
    """
    if config.rank_mode == "fixed":
        return
    check_rank_mode(config, manifest, slices, config.local_optimizer)
    if config.robust_mean in ("trimmed", "median"):
        raise ConfigError(
            f'rank_mode = "{config.rank_mode}" gives devices slices of unlike ranks, of which robust_mean = '
            f'"{config.robust_mean}" finds no centre; take "none" or "clipped"'
        )
    if config.lora_aggregation == "product_svd":
        raise ConfigError(
            f'rank_mode = "{config.rank_mode}" averages each rank over the devices that held it, and lora_aggregation '
            '= "product_svd" averages their product; leave lora_aggregation at "factors"'
        )


def find_run(stores: Stores, connection: Connection, run_id: str) -> Run:
    """A run by id, or the newest for ``latest``; :class:`NotFoundError` ``unknown_run`` if there is none."""
    row = run_rows.find_newest(connection) if run_id == "latest" else run_rows.find(connection, run_id)
    if row is None and run_id == "latest":
        raise NotFoundError(
            "unknown_run", "there is no run yet; create one with: edge-coordinator run create run.toml"
        )
    if row is None:
        raise NotFoundError("unknown_run", f"no run {run_id}; list them with: edge-coordinator run list")
    return run_of(stores, row)


def run_of(stores: Stores, row: RunRow) -> Run:
    """A row of ``runs`` with its configuration and manifest parsed."""
    config = config_of(row.config)
    return Run(
        run_id=row.run_id,
        config=config,
        manifest=stores.manifest(row.package_sha256, config.features, config.pooling, config.exits),
        package_sha256=row.package_sha256,
        package_signature=row.package_signature,
        state=row.state,
        values_sha256=row.values_sha256,
        optimizer_sha256=row.optimizer_sha256,
        next_round=row.next_round,
        committed=row.committed,
        abandoned_in_a_row=row.abandoned_in_a_row,
        average_sha256=row.average_sha256,
        reference_sha256=row.reference_sha256,
        phase=row.phase,
        rounds_done=row.rounds_done,
        delta_sizes=msgspec.json.decode(row.delta_sizes, type=dict[str, float]),
        paused=row.paused_s is not None,
    )


def end_run(connection: Connection, run_id: str, state: str, reason: str, *, now_s: float) -> None:
    """End a run: its open round is abandoned, its open tasks lapse, its pending evaluations are dropped."""
    run_rows.end(connection, run_id, state=state, reason=reason, finished_s=now_s)
    round_rows.abandon_open(connection, run_id, reason=reason, closed_s=now_s)
    task_rows.lapse_open_of_run(connection, run_id)
    evaluation_rows.drop_pending(connection, run_id)
    masking_rows.forget(connection, run_id)
    record(connection, now_s, f"run_{state}", reason, run_id=run_id)


def reason_of_end(phase: str) -> str:
    """Why a run that ended in a phase has finished."""
    return "all rounds committed" if phase == TRAINING else "every device was asked once"


def stop_run(stores: Stores, connection: Connection, run_id: str, *, now_s: float) -> Run:
    """Stop a run at the operator's word; one that has ended already stays as it is. Returns it as it was before.

    Raises:
        NotFoundError: ``unknown_run``.
    """
    run = find_run(stores, connection, run_id)
    if run.state in ("queued", *ACTIVE):
        end_run(connection, run.run_id, "stopped", "stopped by the operator", now_s=now_s)
    return run


def pause_run(stores: Stores, connection: Connection, run_id: str, *, paused: bool, now_s: float) -> Run:
    """Pause a run at the operator's word, or let it go on. Returns it as it was before.

    A paused run opens no round and asks no device; what devices work on already is taken, and closes the open round.
    Asking for what is so already changes nothing.

    Raises:
        NotFoundError: ``unknown_run``.
        ConflictError: ``run_ended``.
    """
    run = find_run(stores, connection, run_id)
    if run.state not in ("queued", *ACTIVE):
        raise ConflictError("run_ended", f"run {run.run_id} has ended ({run.state}); create a new one")
    if run.paused != paused:
        run_rows.set_paused(connection, run.run_id, now_s if paused else None)
        code = "run_paused" if paused else "run_resumed"
        record(connection, now_s, code, "by the operator", run_id=run.run_id)
    return run
