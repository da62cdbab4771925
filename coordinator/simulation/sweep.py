"""All arms at all seeds, one after another: :func:`sweep` checks everything before the first byte is written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from coordinator.config import RunConfig
from coordinator.rounds.memory_requirements import required_bytes
from coordinator.rounds.runs import (
    check_slices,
    first_phase,
    in_phase,
    trained_slices,
    with_features,
)
from coordinator.simulation.arm import STATE, Arm, fingerprint_of, label, open_arm
from coordinator.simulation.config import NO_KEY, ArmConfig, SimulationConfig
from coordinator.simulation.fleet import Fleet
from coordinator.simulation.labelled_rows import LabelledRows, read_labelled_rows
from coordinator.simulation.packages import PACKAGES, PREPARED, SimulationPackages, open_packages
from coordinator.simulation.partition import Share, partition
from coordinator.simulation.ray_trainer import ray_trainer
from coordinator.simulation.record import Record, failed, path_of, read_record, record_of, write_record
from coordinator.simulation.score_groups import score_groups
from coordinator.simulation.simulate import Simulation
from coordinator.simulation.trainers import HereTrainer, Trainer
from coordinator.simulation.workbench import BenchSettings, Workbench
from edge_runtime.engines.choice import threads_or_all
from edge_runtime.errors import CapExceededError, ConfigError, EdgeError, PackageError
from edge_runtime.figures import whole_size
from edge_runtime.package.manifest import Manifest
from edge_runtime.package.package import Package
from edge_runtime.training.methods import check_features


@dataclass(frozen=True)
class Options:
    """What the command line adds to the configuration.

    Attributes:
        output: output folder.
        arms: names of the arms to simulate; None takes all.
        seeds: seeds to simulate; None takes all.
        threads: threads of the inference engine; 0 takes one for each core.
        ray: address of a Ray cluster that trains; None trains in this process.
    """

    output: Path
    arms: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    threads: int = 0
    ray: str | None = None

    @property
    def engine_threads(self) -> int:
        """Threads of the inference engine, at least one."""
        return threads_or_all(self.threads)


def read_seeds(text: str) -> tuple[int, ...]:
    """Seeds from the command line's text, such as ``0,1,2``; :class:`ConfigError` if one is no number."""
    try:
        return tuple(int(seed) for seed in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--seeds {text} is not a list of numbers such as 0,1,2") from error


@dataclass(frozen=True)
class SweepPlan:
    """What is to be simulated, checked.

    Attributes:
        config: configuration of the simulation.
        options: options of the command line.
        arms: arms to simulate.
        seeds: seeds to simulate each arm at.
        train: rows that devices share.
        dev: rows of evaluations.
        shares: rows of each device, by seed.
    """

    config: SimulationConfig
    options: Options
    arms: tuple[ArmConfig, ...]
    seeds: tuple[int, ...]
    train: LabelledRows
    dev: LabelledRows
    shares: dict[int, list[Share]]

    @property
    def data_sha256(self) -> tuple[str, str]:
        """Digests of both data files."""
        return self.train.sha256, self.dev.sha256


class Progress(Protocol):
    """Is told of arms as they begin, get on and end."""

    def skip(self, record: Record) -> None:
        """An arm has ended before."""
        ...

    def begin(self, arm: Arm) -> None:
        """An arm begins, or goes on."""
        ...

    def report(self, arm: Arm) -> None:
        """Something may have happened in an arm; called often."""
        ...

    def end(self, record: Record) -> None:
        """An arm has ended."""
        ...


def sweep(plan: SweepPlan, progress: Progress) -> list[Record]:
    """Simulate what has no record yet; returns the records of all that was asked for.

    Raises:
        EdgeError: the output folder or a package cannot be used. What goes wrong within an arm is in its record.
    """
    options, fleet = plan.options, plan.config.fleet
    folder = options.output.absolute()
    settings = BenchSettings(folder / PACKAGES, folder / PREPARED, options.engine_threads, fleet.prefix_cache)
    # 1. Who trains; a cluster that is not there is told before anything is written.
    bench = Workbench(settings, plan.train, plan.dev)
    with trainer_for(plan, bench, settings) as trainer:
        # 2. Packages are copied and prepared once, whatever the number of arms and seeds.
        packages = open_packages(folder)
        opened = {
            arm.name: packages.take_in(Path(arm.package), fleet.arithmetic, fleet.cap, options.engine_threads)
            for arm in plan.arms
        }
        # 3. Seed by seed, so that arms can be compared early.
        return [
            simulate_arm(plan, arm, seed, opened[arm.name], packages, bench, trainer, progress)
            for seed in plan.seeds
            for arm in plan.arms
        ]


@contextmanager
def trainer_for(plan: SweepPlan, bench: Workbench, settings: BenchSettings) -> Iterator[Trainer]:
    """Who trains: this process, or a Ray cluster."""
    if plan.options.ray is None:
        yield HereTrainer(bench)
        return
    with ray_trainer(plan.options.ray, settings, plan.train, plan.dev) as trainer:
        yield trainer


def simulate_arm(
    plan: SweepPlan,
    config: ArmConfig,
    seed: int,
    package: Package,
    packages: SimulationPackages,
    bench: Workbench,
    trainer: Trainer,
    progress: Progress,
) -> Record:
    """Simulate one arm at one seed; an error becomes its record, for it must not stop the others.

    Args:
        plan: plan of the simulation.
        config: configuration of the arm.
        seed: seed of the arm.
        package: copy of the arm's package.
        packages: packages of the simulation.
        bench: bench that makes the evaluations.
        trainer: trainer that does the devices' tasks.
        progress: listener that is told how the arm gets on.

    Raises:
        ConfigError: another process works on it, or the folder holds an arm of another configuration.
    """
    options = plan.options
    run = run_for(plan, config, seed, package, packages)
    fingerprint = fingerprint_of(plan.config, run, package.sha256, plan.data_sha256)
    path = path_of(options.output, config.name, seed)
    folder = options.output / STATE / label(config, seed)
    # 1. What has ended stays as it is; what failed is tried again from the beginning.
    done = read_record(path)
    if done is not None and done.status == "failed":
        shutil.rmtree(folder, ignore_errors=True)
    elif done is not None:
        if done.fingerprint != fingerprint:
            raise ConfigError(
                f"{path} is of another configuration, package or data; "
                f"remove it and {folder}, or choose another --output"
            )
        progress.skip(done)
        return done
    # 2. The same devices and data for all arms of a seed.
    kinds = plan.config.fleet
    fleet = Fleet(
        plan.shares[seed], plan.config.speed, plan.config.dropout, seed, kinds.adjoints, kinds.half_cap
    )
    with open_arm(folder, config, run, fleet, fingerprint) as arm:
        progress.begin(arm)
        try:
            ending = Simulation(arm, bench, trainer, plan.config.fleet.cap).simulate(progress.report)
            finished = ending.status == "finished"
            found = score_groups(arm, bench, plan.train, plan.dev) if finished else None
            record = record_of(arm, ending, options.engine_threads, found)
        except EdgeError as error:
            record = failed(
                config.name, config.kind, seed, f"{type(error).__name__}: {error}", options.engine_threads
            )
    # 3. The record is the last thing written.
    write_record(options.output, record)
    progress.end(record)
    return record


def run_for(
    plan: SweepPlan, arm: ArmConfig, seed: int, package: Package, packages: SimulationPackages
) -> RunConfig:
    """The run of an arm, on the package's copy."""
    run = plan.config.run_of(arm, seed, packages.key.public_key)
    return msgspec.structs.replace(run, package=str(packages.copies / package.sha256))


def make_plan(config: SimulationConfig, options: Options) -> SweepPlan:
    """Check that all that is asked for can be simulated; writes nothing.

    Raises:
        ConfigError: an unknown arm or seed, a partition that cannot be had, a run that does not fit its package.
        DataError: a row cannot be used.
        ArtefactError: a package is malformed.
        CapExceededError: no device could do a task of an arm.
    """
    if options.threads < 0:
        raise ConfigError(f"--threads {options.threads} is less than 0; 0 takes one for each core")
    arms = config.arms if options.arms is None else tuple(config.arm_named(name) for name in options.arms)
    seeds = config.seeds if options.seeds is None else options.seeds
    if unknown := sorted(set(seeds) - set(config.seeds)):
        raise ConfigError(f"seed {unknown[0]} is not among seeds = {list(config.seeds)}")
    train, dev = read_labelled_rows(Path(config.data.train)), read_labelled_rows(Path(config.data.dev))
    shares = {seed: partition(train, config.data, config.fleet.devices, seed) for seed in seeds}
    for arm in arms:
        _check_arm(config, arm, train, dev)
    return SweepPlan(config, options, arms, tuple(seeds), train, dev, shares)


def _check_arm(config: SimulationConfig, arm: ArmConfig, train: LabelledRows, dev: LabelledRows) -> None:
    """What the coordinator would find out later."""
    run = config.run_of(arm, config.seeds[0], NO_KEY)
    manifest = Package.open_unsigned(Path(arm.package)).for_engine("onnxruntime").manifest
    slices = _slices(run, manifest, arm.name)
    for rows in (train, dev):
        rows.indexed(manifest.labels)
    try:
        run, seen = with_features(run, manifest)
        check_features(run, manifest, slices)
        check_slices(run, manifest, slices)
        settings = in_phase(run, first_phase(run))
        tasks: list[tuple[str, ...]] = [(name,) for name in slices] or [()]
        least = min(required_bytes(seen, settings, names) for names in tasks)
    except PackageError as error:
        raise PackageError(f"arm {arm.name}: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"arm {arm.name}: {error}") from error
    if least > config.fleet.cap:
        raise CapExceededError(
            f"arm {arm.name}: its smallest task needs {whole_size(least, up=True)} and "
            f"fleet.cap is {whole_size(config.fleet.cap)}; raise fleet.cap",
            required_bytes=least,
            cap_bytes=config.fleet.cap,
        )


def _slices(run: RunConfig, manifest: Manifest, arm: str) -> tuple[str, ...]:
    """The slices that an arm trains."""
    try:
        slices = trained_slices(run, manifest)
    except ConfigError as error:
        raise ConfigError(f"arm {arm}: {error}") from error
    if run.train_head and manifest.head is None:
        raise ConfigError(f"arm {arm}: package {manifest.name} has no head to train; set train_head = false")
    if not slices and not run.train_head:
        raise ConfigError(
            f"arm {arm}: package {manifest.name} has no slice but the head, and train_head is false"
        )
    return slices
