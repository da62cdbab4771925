"""A simulation's configuration: one frozen struct read from TOML, and the run configuration of each arm."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from coordinator.config import Fraction, RunConfig, run_config
from edge_runtime.config_file import MAX_SIZE_BYTES, parse_bytes, parse_cap, read_struct, read_toml
from edge_runtime.errors import ConfigError
from edge_runtime.package.manifest import Arithmetic
from edge_runtime.protocol.messages import Seconds, Seed

#: Keys of a run that the simulation sets itself, and where their values come from.
SET_HERE = {
    "name": "from the arm's name and the seed",
    "package": "by the arm's own key package",
    "publisher_key": "by the simulation, which signs the packages it is given",
    "seed": "by seeds",
}
#: The same of a run's evaluation.
EVALUATION_SET_HERE = {"data": "by data.dev", "threads": "by --threads", "arithmetic": "by fleet.arithmetic"}
#: Keys that hold a number of bytes, which may be written with a unit: ``"512M"``.
_SIZES = ("cap", "prefix_cache")

#: Stands for a publisher's key where none is at hand.
NO_KEY = "A" * 43 + "="

ShortName = Annotated[str, Meta(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$(?!\\n)")]
FilePath = Annotated[str, Meta(min_length=1, max_length=4096)]


class FleetConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The simulated devices, all alike but for their data and speed.

    Attributes:
        devices: number of devices.
        cap: memory that each grants; a task that needs more is refused.
        arithmetic: arithmetic in which packages are run: ``"row_int8"``, ``"block_int8"``, ``"block_int4"`` or
            ``"float"``, if the package has it; unset: the best here, measured once for each package and output folder.
            Set it where simulations on other machines must agree.
        prefix_cache: memory that a process may fill with outputs of frozen segments; 0 keeps none.
        adjoints: share of the devices whose engine can run adjoint programs, for runs with ``update = "best"``; which
            they are is drawn by the seed.
        half_cap: share of the devices that grant half of ``cap``; which they are is drawn by the seed.
    """

    devices: Annotated[int, Meta(ge=1, le=10_000)]
    cap: Annotated[int, Meta(ge=1, le=MAX_SIZE_BYTES)]
    arithmetic: Arithmetic | None = None
    prefix_cache: Annotated[int, Meta(ge=0, le=MAX_SIZE_BYTES)] = 1 << 30
    adjoints: Annotated[float, Meta(ge=0, le=1)] = 1.0
    half_cap: Annotated[float, Meta(ge=0, le=1)] = 0.0


class DataConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Where the rows are, and how they are shared out to the devices.

    Attributes:
        train: file of the training rows, one JSON object a line: ``{"text": …, "label": …}``, and ``"owner"`` beside
            them for natural partitions.
        dev: file of the development rows, in the same form.
        partition: way to share the training rows out: ``"iid"`` at random, ``"dirichlet"`` with a mix of labels drawn
            for each device, ``"natural"`` one owner a device, those with most rows first.
        alpha: parameter of the Dirichlet distribution, smaller for more unequal mixes; ``"dirichlet"`` needs it, the
            others refuse it.
        rows_per_device: number of rows of each device; 0 shares all rows out evenly. ``"natural"`` leaves it at 0.
    """

    train: FilePath
    dev: FilePath
    partition: Literal["iid", "dirichlet", "natural"]
    alpha: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    rows_per_device: Annotated[int, Meta(ge=0, le=1_000_000)] = 0


class SpeedConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Virtual seconds of a task: overhead_s + examples × forward passes × seconds_per_example × the device's factor.

    Attributes:
        overhead_s: time that every task takes.
        seconds_per_example: time of one forward pass of one example on a device of factor 1.
        spread: distribution of the devices' factors, each drawn once with mean 1: ``"exponential"``,
            ``"lognormal"``, or ``"equal"`` for 1 throughout.
    """

    overhead_s: Seconds = 1.0
    seconds_per_example: Seconds = 0.01
    spread: Literal["equal", "exponential", "lognormal"] = "exponential"


class DropoutConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Devices that fall silent.

    Attributes:
        rate: chance that a device that got a task never answers.
    """

    rate: Fraction = 0.0


class ArmConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """One way to train, compared with the others.

    Attributes:
        name: name of the arm.
        package: folder of the package to train.
        kind: description for people, shown in the table.
        run: keys laid over those of ``[run]``, tables within them key by key.
    """

    name: ShortName
    package: FilePath
    kind: Annotated[str, Meta(max_length=80)] = ""
    run: dict[str, Any] = {}


class ComparisonConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Arms that the others are measured by.

    Attributes:
        head_only: name of the arm over which gains are counted; unset: no gains.
        reference: name of the arm of whose gain the others keep a share; unset: no shares.
    """

    head_only: ShortName | None = None
    reference: ShortName | None = None


class SimulationConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Everything an operator decides about a simulation; paths are absolute.

    Attributes:
        name: name of the simulation.
        seeds: seeds, each simulated with every arm.
        fleet: simulated devices.
        data: rows, and how devices come by theirs.
        arms: ways to train that are compared.
        run: keys of run.toml for all arms. The simulation itself sets ``name``, ``package``, ``publisher_key``,
            ``seed``, and ``data``, ``threads`` and ``arithmetic`` of the evaluation; ``min_devices`` is the whole fleet
            where it is left out.
        speed: virtual time that tasks take.
        dropout: devices that fall silent.
        comparison: arms that the others are measured by.
    """

    name: ShortName
    seeds: Annotated[tuple[Seed, ...], Meta(min_length=1, max_length=1000)]
    fleet: FleetConfig
    data: DataConfig
    arms: Annotated[tuple[ArmConfig, ...], Meta(min_length=1, max_length=100)]
    run: dict[str, Any] = {}
    speed: SpeedConfig = SpeedConfig()
    dropout: DropoutConfig = DropoutConfig()
    comparison: ComparisonConfig = ComparisonConfig()

    def arm_named(self, name: str) -> ArmConfig:
        """The arm of this name; :class:`ConfigError` if there is none."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise ConfigError(f"no arm is called {name!r}; there are {', '.join(arm.name for arm in self.arms)}")

    def run_of(self, arm: ArmConfig, seed: int, publisher_key: str) -> RunConfig:
        """The run that the coordinator is asked for, for an arm and a seed.

        Args:
            arm: configuration of the arm.
            seed: seed of the run.
            publisher_key: public key that signs the package.

        Raises:
            ConfigError: a key of the run is unknown, out of range or set by the simulation; names it.
        """
        table = merged(self.run, arm.run)
        evaluation = table.get("evaluation", {})
        _refuse(table, SET_HERE, "run")
        if not isinstance(evaluation, dict):
            raise ConfigError(f"run.evaluation is a {type(evaluation).__name__}, not a table")
        _refuse(evaluation, EVALUATION_SET_HERE, "run.evaluation")
        config = run_config(
            {
                "min_devices": self.fleet.devices,
                **table,
                "name": f"{arm.name}-seed{seed}",
                "package": arm.package,
                "publisher_key": publisher_key,
                "seed": seed,
                "evaluation": {"data": self.data.dev, **evaluation},
            }
        )
        if config.secure_aggregation:
            raise ConfigError(
                "run.secure_aggregation: masks cancel to the bit and change no curve; leave it out of a simulation"
            )
        for key in ("devices_per_round", "min_devices"):
            if getattr(config, key) > self.fleet.devices:
                raise ConfigError(
                    f"run.{key} = {getattr(config, key)} exceeds fleet.devices = {self.fleet.devices}; "
                    "no round could ever open as asked"
                )
        return config


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """A table with another laid over it: tables inside are merged in the same way, other values are replaced."""
    joined = dict(below)
    for key, value in above.items():
        inner = joined.get(key)
        joined[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return joined


def read_simulation_config(path: Path) -> SimulationConfig:
    """Read a simulation's TOML file; relative paths in it start at its own folder.

    Raises:
        ConfigError: unreadable, not TOML, or a key is missing, unknown or out of range; names file and key.
    """
    table = read_toml(path)
    try:
        fleet = table.get("fleet")
        if isinstance(fleet, dict):
            table["fleet"] = {**fleet, **{key: _size(key, fleet[key]) for key in _SIZES if key in fleet}}
        config = _absolute(read_struct(table, SimulationConfig), path.absolute().parent)
        _check_together(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return config


def _size(key: str, value: object) -> int:
    if not isinstance(value, str | int):
        raise ConfigError(f"fleet.{key} is a {type(value).__name__}, not a size")
    try:
        if key == "cap":
            return parse_cap(value)
        return 0 if key == "prefix_cache" and value == 0 else parse_bytes(value)
    except ConfigError as error:
        raise ConfigError(f"fleet.{key}: {error}") from error


def _absolute(config: SimulationConfig, folder: Path) -> SimulationConfig:
    replace = msgspec.structs.replace
    data = replace(config.data, train=str(folder / config.data.train), dev=str(folder / config.data.dev))
    arms = tuple(replace(arm, package=str(folder / arm.package)) for arm in config.arms)
    return replace(config, data=data, arms=arms)


def _check_together(config: SimulationConfig) -> None:
    """What no single field can show."""
    names = [arm.name for arm in config.arms]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"arms: two are called {twice[0]!r}; names must differ")
    if len(set(config.seeds)) != len(config.seeds):
        raise ConfigError("seeds names one seed twice")
    data = config.data
    if data.partition == "dirichlet" and data.alpha is None:
        raise ConfigError('data.alpha is missing; partition = "dirichlet" needs it, 1.0 for a middling mix')
    if data.partition != "dirichlet" and data.alpha is not None:
        raise ConfigError(
            f'data.alpha is read by partition = "dirichlet" alone, not {data.partition!r}; remove it'
        )
    if data.partition == "natural" and data.rows_per_device:
        raise ConfigError(
            'data.rows_per_device must be 0 for partition = "natural": devices keep their own rows'
        )
    for key in ("head_only", "reference"):
        named = getattr(config.comparison, key)
        if named is not None and named not in names:
            raise ConfigError(
                f"comparison.{key} names {named!r}, which is no arm; there are {', '.join(names)}"
            )
    for arm in config.arms:
        try:
            config.run_of(arm, config.seeds[0], NO_KEY)
        except ConfigError as error:
            raise ConfigError(f"arm {arm.name}: {error}") from error


def _refuse(table: dict[str, Any], reserved: dict[str, str], where: str) -> None:
    for key, how in reserved.items():
        if key in table:
            raise ConfigError(f"{where}.{key} is set {how}; remove it")
