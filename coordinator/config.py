"""A run's configuration: one frozen struct, read from TOML (command line) or JSON (admin API)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from edge_runtime.config_file import read_struct, read_toml
from edge_runtime.errors import ConfigError
from edge_runtime.package.manifest import Arithmetic
from edge_runtime.protocol.messages import (
    END,
    Count,
    Directions,
    Identifier,
    LocalOptimizer,
    PositiveCount,
    PublicKey,
    Rate,
    Seed,
    TrainingSettings,
)
from edge_runtime.training.methods import check_method

Fraction = Annotated[float, Meta(ge=0, lt=1)]
Wait = Annotated[float, Meta(gt=0, le=1e6)]
#: Devices obey no longer window.
Poll = Annotated[float, Meta(ge=0, le=6 * 3600)]
#: What a place waits for its device where the configuration does not say, and devices ask often.
LEAST_SELECTION_S = 60.0
#: Ways to choose rows, explained in :mod:`coordinator.aggregation.rows`.
RowChoice = Literal["norm", "topk", "uniform"]
#: Devices of which reports of a run with privacy or secure aggregation show figures at least.
PRIVATE_GROUP = 5
#: Devices of a round.
Slots = Annotated[int, Meta(ge=1, le=10_000)]

#: What is about training slices, as it is where none are trained: in a visit, and in a run that is one.
WITHOUT_SLICES: dict[str, Any] = {
    "slices": "none",
    "update": "forward",
    "directions": "one_slice",
    "draws": 1,
    "candidates": 1,
    "report": "weights",
    "jvp_limit": None,
    "split": "whole",
    "lora_aggregation": "factors",
    "rank_mode": "fixed",
    "exits": (),
    "sketch_size": 0,
    "sketch_entries": 0,
    "row_choice": "norm",
    "row_refresh": 0,
    "grow_at": (),
}


class ServerOptimizerConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The server's step on an averaged delta; its formulas stand in :mod:`coordinator.aggregation.server_optimizers`.

    Attributes:
        name: rule of the step: ``"sgd"`` (FedAvg at rate 1), ``"momentum"``, ``"adagrad"``, ``"yogi"`` or ``"adam"``
            (FedAdagrad, FedYogi, FedAdam).
        rate: learning rate; ``"auto"``, for the slices alone, sets it from the slope and curvature of the loss along
            the last step, which devices measure by one more draw: forward mode, a classification, whole slices.
        beta1: share of the running mean of changes that a round keeps; ``sgd`` does not read it.
        beta2: share of the running mean of squared changes that a round keeps; ``yogi`` and ``adam`` read it.
        tau: constant beside the root of the squared changes; ``adagrad``, ``yogi`` and ``adam`` read it.
    """

    name: Literal["sgd", "momentum", "adagrad", "yogi", "adam"] = "sgd"
    rate: Rate | Literal["auto"] = 1.0
    beta1: Fraction = 0.9
    beta2: Fraction = 0.99
    tau: Annotated[float, Meta(gt=0, le=1e3)] = 1e-3

    @property
    def number(self) -> float:
        """The rate; one that sets itself must have been put in its place."""
        if self.rate == "auto":
            raise ValueError("a rate that sets itself is no number before a round has set it")
        return self.rate


class ServerOptimizers(Struct, frozen=True, forbid_unknown_fields=True):
    """One optimiser for the slices, one for the head: their changes differ in kind and size.

    Attributes:
        slices: optimiser of the slices.
        head: optimiser of the head.
    """

    slices: ServerOptimizerConfig = ServerOptimizerConfig()
    head: ServerOptimizerConfig = ServerOptimizerConfig()


class GroupConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Rows of one kind, such as a language, and the devices that hold rows of that kind.

    Attributes:
        name: name of the group.
        data: file of the group's development rows, on the coordinator's machine.
        devices: names of its devices, with ``*`` for any characters; none for a group of which no device takes part.
    """

    name: Identifier
    data: Annotated[str, Meta(min_length=1, max_length=4096)]
    devices: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=200)], ...], Meta(max_length=1000)
    ] = ()


class EvaluationConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """How the coordinator evaluates the global model on its own development rows.

    Attributes:
        data: file of the development rows, on the coordinator's machine, in the form of a device's data.
        every_rounds: number of committed rounds from one evaluation to the next; the values that the run starts from
            and those it ends with are always evaluated.
        threads: number of threads of the inference engine.
        arithmetic: arithmetic in which the coordinator runs the package: ``"row_int8"``, ``"block_int8"``,
            ``"block_int4"`` or ``"float"``, if the package has it; unset: the best there, measured once for each
            package.
        groups: further rows by group: the run's summary then tells how robust it is over groups whose devices took part
            and over others. For classification.
    """

    data: Annotated[str, Meta(min_length=1, max_length=4096)]
    every_rounds: PositiveCount = 1
    threads: Annotated[int, Meta(ge=1, le=1024)] = 1
    arithmetic: Arithmetic | None = None
    groups: Annotated[tuple[GroupConfig, ...], Meta(max_length=64)] = ()


class PrivacyConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Differential privacy of what a run learns; its formulas stand in docs/privacy.md.

    Attributes:
        where: who adds noise: ``"server"``, which then sees each change as it is and adds noise to their sum, or
            ``"device"``, each to its own change, before it leaves, which takes far more noise.
        clip_norm: largest Euclidean norm of a device's contribution, to which a longer one is scaled down; of a head in
            closed form a row adds at most 1 to that norm.
        noise_multiplier: standard deviation of the noise over ``clip_norm``; unset: the least for ``epsilon``.
        epsilon: largest ε of the whole run, from which the noise is found; give it or ``noise_multiplier``.
        delta: δ to which ε belongs; below one over the number of devices.
        unit: what ε is of: all rows of a device, ``"device"``, or each single ``"row"``, for one visit for a head in
            closed form, with the noise added by the server.
        most_rounds: number of rounds and visits in which a device may take part, of which ε is counted; 0 for all.
        noise_seed: seed of the server's noise, for simulations: whoever knows it can take the noise off, so the daemon
            refuses it.
    """

    where: Literal["server", "device"] = "server"
    clip_norm: Rate = 1.0
    noise_multiplier: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    epsilon: Annotated[float, Meta(gt=0, le=1e3)] | None = None
    delta: Annotated[float, Meta(gt=0, lt=1)] = 1e-5
    unit: Literal["device", "row"] = "device"
    most_rounds: Count = 0
    noise_seed: Seed | None = None

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on each number of a sum, or of a device's own contribution."""
        sensitivity = 1.0 if self.unit == "row" else self.clip_norm
        return (self.noise_multiplier or 0.0) * sensitivity


class RunConfig(TrainingSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything an operator decides about a run; how devices train stands in :class:`TrainingSettings`.

    Four of those settings, which a task always states, may be left out of a configuration. ``directions`` is then
    ``one_slice``, the least noisy kind, while a task without it was sent by a coordinator that knew only
    ``per_example``.

    Attributes:
        name: name of the run; its id is this name with a random ending.
        package: folder of the package to train, on the coordinator's machine.
        publisher_key: public key that must have signed the package.
        rounds: number of committed rounds after which the run has finished; 0 only for one visit to each device, with
            ``head = "closed_form"`` and ``slices = "none"``.
        devices_per_round: number of devices that a round asks; where fewer can serve, it opens with those.
        min_devices: number of devices that must have checked in before the first round. Set it to the whole fleet, and
            equal seeds ask equal devices.
        min_results: number of results that a round needs to be committed; at most ``devices_per_round`` and
            ``min_devices``.
        selection_timeout_s: time in which a selected device must check in; then another is asked in its place. At least
            ``poll_max_s``; unset: 60 seconds, or four times ``poll_max_s`` where that is more.
        deadline_s: time for a task, counted from when its device got it; then another is asked in its place.
        late_grace_s: time after its deadline in which a result is still taken, if its round is open and no other device
            works on its place or has filled it.
        alive_every_s: time from one sign of life to the next of a device that works on a task; one that sent any and
            then misses three loses its place, before its deadline. Devices that know no such signs have until that.
        poll_min_s: shortest time after which a device without work checks in again.
        poll_max_s: longest such time, at least ``poll_min_s``; each device draws its own between the two.
        max_abandoned: number of rounds abandoned in a row at which the run fails.
        slices: slices to train: ``"all"`` of the package, ``"none"`` (the head alone), or those listed by name.
        local_optimizer: step that a device makes of its gradients.
        server_optimizer: step that the coordinator makes of a round's averaged change.
        evaluation: evaluation of the global model by the coordinator; unset: none.
        seen_window_s: time since its last check-in after which a device is not asked any more, at least ``poll_max_s``;
            unset: a device is asked until it is overdue by more than ``selection_timeout_s``.
        split: assignment of the slices: ``"whole"`` gives every device of a round all of them, ``"cyclic"`` deals them
            out among the devices, one further each round.
        head_split: whether ``split = "cyclic"`` deals the head out like a slice; false gives it to every device.
        head_warm_up_rounds: number of rounds, the first ones, that train the head alone.
        lora_aggregation: mean of plain LoRA's factors A and B: ``"factors"`` averages each by itself, ``"frozen_a"``
            trains B alone, ``"product_svd"`` averages their product and factors it again (the slices' server optimiser
            must be ``"sgd"`` at rate 1).
        normalise_steps: whether each change is divided by its local steps before the mean is taken, as FedNova does.
        average_from_round: number of the round, from 0, at which a mean over the rounds' values starts (SWA), which
            evaluations and ``fetch-slices`` use; below ``rounds``; unset: they use the last values.
        gate_variance: largest variance between two halves of what came in, in the square of the changes' unit, at
            which a round moves the values; above it, its results wait for those of the next round (FwdLLM's gate).
            Needs slices and ``min_results`` of at least 2; unset: every round moves them.
        rate_decay: course of the server's rates over the run: ``"none"``, or ``"linear"`` down to zero.
        patience: number of evaluations without a better one after which training stops, and the best values stand; by
            accuracy, or by loss for a language model. Needs ``evaluation``; 0 trains all rounds.
        visit: moment at which every device is asked once for the sums of ``head = "closed_form"``: ``"last"``, after
            the rounds; ``"first"``, before them, and the head is trained further by its gradient; or
            ``"first_and_last"``. With ``rounds = 0`` there is one visit and nothing else.
        ridge: ridge of ``head = "closed_form"``, relative to the number of rows; unset: chosen by generalised
            cross-validation.
        continue_from: id of an earlier run whose sums one visit goes on from: devices hand in what has changed since,
            and labels that the package has more, behind the earlier ones, begin without rows; unset: all rows of each
            device.
        norm_limit: number of times that a change may exceed the median of its round, in any slice, by the root mean
            square of its entries for each local step; a larger one is left out of the mean, and its device named. A
            slice that fewer than three devices trained may be a hundred times that beyond what it was before. Where
            devices are not trusted, take 30, or a ``robust_mean``.
        max_left_out: number of a device's results left out at which the run sets it aside.
        robust_mean: mean over a round's changes: ``"none"`` weighs them by examples as they are, ``"clipped"`` scales
            those above the median down to it first, ``"trimmed"`` and ``"median"`` take each entry's trimmed mean or
            median over the devices, each counting the same, with all changes of a round in memory.
        trim_share: share of the devices that ``robust_mean = "trimmed"`` leaves out at either end, at least one.
        beside_others: whether the run goes on at the same time as others that say so too; each has its share of the
            devices, and a device trains one task at a time. If not, it waits until no other run is active, and others
            wait for it.
        enough_results: number of results at which a round closes without waiting for the others, whose devices are
            told so; at least ``min_results``. With more ``devices_per_round`` than that, a round asks more devices
            than it needs; unset: it waits for all of them, or for its deadline.
        buffer_size: number of results at which the values move, without waiting for devices that are still at work
            (FedBuff): ``devices_per_round`` of them train at any time, and get a new task as soon as they are done;
            ``rounds`` counts these steps. Each change is scaled by 1/sqrt(1 + the steps made since its device got its
            values). At least ``min_results``; unset: rounds that wait for their devices.
        max_staleness: number of such steps after which a result is not taken any more, and its device told so.
        row_choice: choice of the rows that slices of ``--slice rows`` train: ``"norm"`` draws them in proportion to the
            norm of their change so far, ``"topk"`` takes those of the largest, ``"uniform"`` draws any.
        row_refresh: number of rounds after which other rows are chosen; 0 trains the first choice to the end.
        grow_at: numbers of committed rounds, ascending and below ``rounds``, at which the slices of more blocks join:
            the run begins with those of the last blocks, and each time as many more are trained. Empty: all from the
            start.
        privacy: differential privacy of what the run learns; unset: none.
        secure_aggregation: whether devices mask their contributions, so that the coordinator sees only their sum; needs
            ``min_results`` of at least 3.
        secure_range: largest size of a number of a masked contribution; larger ones are cut to it. Smaller ranges are
            finer. With ``privacy`` the range follows from ``clip_norm``.
        least_group: number of devices below which figures of a group of devices are not shown in reports; unset: 5 with
            ``privacy`` or ``secure_aggregation``, else 1, which shows all.
    """

    name: Annotated[str, Meta(pattern=f"^[A-Za-z0-9][A-Za-z0-9._-]{{0,63}}{END}")]
    package: Annotated[str, Meta(min_length=1, max_length=4096)]
    publisher_key: PublicKey
    rounds: Annotated[int, Meta(ge=0, le=1_000_000)]
    devices_per_round: Slots
    train_head: bool = True
    draws: PositiveCount = 1
    sequence_limit: PositiveCount = 128
    directions: Directions = "one_slice"
    min_devices: Slots = 1
    min_results: Slots = 1
    selection_timeout_s: Wait | None = None
    deadline_s: Wait = 3600.0
    late_grace_s: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    alive_every_s: Annotated[float, Meta(ge=1, le=3600)] = 60.0
    poll_min_s: Poll = 5.0
    poll_max_s: Poll = 15.0
    max_abandoned: Annotated[int, Meta(ge=1, le=1000)] = 3
    slices: Literal["all", "none"] | tuple[Identifier, ...] = "all"
    local_optimizer: LocalOptimizer = LocalOptimizer()
    server_optimizer: ServerOptimizers = ServerOptimizers()
    evaluation: EvaluationConfig | None = None
    seen_window_s: Wait | None = None
    split: Literal["cyclic", "whole"] = "whole"
    head_split: bool = False
    head_warm_up_rounds: Count = 0
    lora_aggregation: Literal["factors", "frozen_a", "product_svd"] = "factors"
    normalise_steps: bool = False
    average_from_round: Count | None = None
    gate_variance: Rate | None = None
    rate_decay: Literal["none", "linear"] = "none"
    patience: Count = 0
    visit: Literal["first", "last", "first_and_last"] = "last"
    ridge: Rate | None = None
    continue_from: Identifier | None = None
    norm_limit: Annotated[float, Meta(ge=1, le=1e9)] = 1000.0
    max_left_out: Annotated[int, Meta(ge=1, le=1_000_000)] = 3
    robust_mean: Literal["none", "clipped", "trimmed", "median"] = "none"
    trim_share: Annotated[float, Meta(gt=0, lt=0.5)] = 0.1
    beside_others: bool = False
    enough_results: Slots | None = None
    buffer_size: Slots | None = None
    max_staleness: Annotated[int, Meta(ge=0, le=1000)] = 10
    row_choice: RowChoice = "norm"
    row_refresh: Count = 0
    grow_at: Annotated[tuple[PositiveCount, ...], Meta(max_length=256)] = ()
    privacy: PrivacyConfig | None = None
    secure_aggregation: bool = False
    secure_range: Annotated[float, Meta(gt=0, le=1e6)] = 8.0
    least_group: Annotated[int, Meta(ge=1, le=10_000)] | None = None

    @property
    def hides_contributions(self) -> bool:
        """Whether devices add noise to their contributions, or mask them."""
        return self.secure_aggregation or (self.privacy is not None and self.privacy.where == "device")

    @property
    def shown_group(self) -> int:
        """Number of devices of which a report shows figures at least."""
        if self.least_group is not None:
            return self.least_group
        return PRIVATE_GROUP if self.secure_aggregation or self.privacy is not None else 1

    @property
    def selection_s(self) -> float:
        """How long a place waits for its device: as configured, or else long enough for any device that is there."""
        if self.selection_timeout_s is not None:
            return self.selection_timeout_s
        return max(LEAST_SELECTION_S, 4 * self.poll_max_s)


def read_run_config(path: Path) -> RunConfig:
    """Read ``run.toml``; relative paths in it start at its own folder.

    Raises:
        ConfigError: unreadable, not TOML, an unknown key, or a value out of range; names file and key.
    """
    table = read_toml(path)
    try:
        config = run_config(table)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    folder = path.absolute().parent
    evaluation = config.evaluation
    if evaluation is not None:
        groups = tuple(
            msgspec.structs.replace(group, data=str(folder / group.data)) for group in evaluation.groups
        )
        evaluation = msgspec.structs.replace(evaluation, data=str(folder / evaluation.data), groups=groups)
    return msgspec.structs.replace(config, package=str(folder / config.package), evaluation=evaluation)


def one_visit(config: RunConfig) -> RunConfig:
    """A configuration's run that only visits each device once, for a head in closed form.

    Name, package, features, fleet, times and evaluation stay, the last after every round; what is about training slices
    is put out of force.

    Raises:
        ConfigError: the configuration is for a package without a head.
    """
    if not config.train_head:
        raise ConfigError(
            "--one-visit solves for the head, and train_head = false says that there is none to train"
        )
    evaluation = config.evaluation
    if evaluation is not None:
        evaluation = msgspec.structs.replace(evaluation, every_rounds=1)
    return msgspec.structs.replace(
        config,
        evaluation=evaluation,
        **WITHOUT_SLICES,
        head="closed_form",
        rounds=0,
        patience=0,
        visit="last",
        head_split=False,
        head_warm_up_rounds=0,
        average_from_round=None,
        gate_variance=None,
    )


def run_config(table: dict[str, Any]) -> RunConfig:
    """Check a configuration that was read from TOML or JSON; :class:`ConfigError` names the key."""
    config = read_struct(table, RunConfig)
    _check_together(config)
    _check_server_methods(config)
    _check_visits(config)
    _check_privacy(config)
    _check_secure_aggregation(config)
    return config


def _check_together(config: RunConfig) -> None:
    """What no single field can show."""
    if config.min_results > config.devices_per_round:
        raise ConfigError(
            f"min_results = {config.min_results} exceeds devices_per_round = {config.devices_per_round}; "
            "no round could ever commit"
        )
    if config.min_results > config.min_devices:
        raise ConfigError(
            f"min_results = {config.min_results} exceeds min_devices = {config.min_devices}; "
            "the first round could start with too few devices to commit"
        )
    if config.enough_results is not None and not (
        config.min_results <= config.enough_results <= config.devices_per_round
    ):
        raise ConfigError(
            f"enough_results = {config.enough_results} must lie between min_results = {config.min_results} and "
            f"devices_per_round = {config.devices_per_round}"
        )
    if config.poll_min_s > config.poll_max_s:
        raise ConfigError(f"poll_min_s = {config.poll_min_s} exceeds poll_max_s = {config.poll_max_s}")
    if config.selection_timeout_s is not None and config.selection_timeout_s < config.poll_max_s:
        raise ConfigError(
            f"selection_timeout_s = {config.selection_timeout_s} is below poll_max_s = {config.poll_max_s}: a device "
            "would lose its place before it asks again; raise the one or lower the other"
        )
    if config.seen_window_s is not None and config.seen_window_s < config.poll_max_s:
        raise ConfigError(
            f"seen_window_s = {config.seen_window_s} is below poll_max_s = {config.poll_max_s}: a device would count "
            "as gone while it waits as it was told; raise the one or lower the other"
        )
    check_method(config)
    if config.update == "best" and config.local_optimizer.name in ("adamw", "sgc"):
        raise ConfigError(
            'update = "best" averages estimates with exact gradients, and local_optimizer = '
            f'"{config.local_optimizer.name}" normalises each by itself; take "accumulate" or "sgd"'
        )
    _check_sketches(config)
    _check_growth(config)
    if config.update == "best" and config.lora_aggregation == "product_svd":
        raise ConfigError(
            'update = "best" weighs each tensor by its variance, and lora_aggregation = "product_svd" mixes two: take '
            '"factors" or "frozen_a"'
        )
    if config.slices in ("none", ()) and not config.train_head:
        raise ConfigError('slices = "none" and train_head = false leave nothing to train')
    if not isinstance(config.slices, str) and len(set(config.slices)) != len(config.slices):
        raise ConfigError("slices names one slice twice")


def _check_growth(config: RunConfig) -> None:
    """Rounds at which a run grows, and what needs all slices from the start."""
    grow_at = list(config.grow_at)
    if not grow_at:
        return
    if grow_at != sorted(set(grow_at)):
        raise ConfigError(f"grow_at = {grow_at} must name rounds once and in order")
    if grow_at[-1] >= config.rounds:
        raise ConfigError(
            f"grow_at = {grow_at}: round {grow_at[-1]} is past the last of rounds = {config.rounds} (from 0); what "
            f"joins then is never trained, so take at most {config.rounds - 1}"
        )
    if grow_at[0] <= config.head_warm_up_rounds:
        raise ConfigError(
            f"grow_at = {grow_at} adds slices while head_warm_up_rounds = {config.head_warm_up_rounds} trains none: "
            f"take {config.head_warm_up_rounds + 1} or more"
        )
    for setting, used, why in (
        ('slices = "none"', config.slices in ("none", ()), "leaves none that could join"),
        (f"exits = {list(config.exits)}", bool(config.exits), "needs slices before the first of them"),
        (
            f"gate_variance = {config.gate_variance}",
            config.gate_variance is not None,
            "holds back what was measured of fewer slices",
        ),
    ):
        if used:
            raise ConfigError(f"grow_at = {grow_at} lets slices join, and {setting} {why}: leave one out")


def _check_sketches(config: RunConfig) -> None:
    """Where sketches go, and what cannot look into one."""
    used = config.report == "sketch" or config.local_optimizer.name == "sgc"
    if config.sketch_size and not used:
        raise ConfigError(
            f'sketch_size = {config.sketch_size} belongs to report = "sketch" or local_optimizer "sgc": set one, or '
            "leave it out"
        )
    if config.local_optimizer.name == "sgc" and not config.sketch_size and config.slices not in ("none", ()):
        raise ConfigError('local_optimizer "sgc" keeps sketches: set sketch_size and sketch_entries')
    if config.report != "sketch":
        return
    if config.robust_mean in ("trimmed", "median"):
        raise ConfigError(
            f'robust_mean = "{config.robust_mean}" takes each number\'s centre over the devices, and those of report = '
            '"sketch" mix a slice\'s: take "none" or "clipped"'
        )
    if config.lora_aggregation == "product_svd":
        raise ConfigError(
            'lora_aggregation = "product_svd" multiplies each device\'s factors, and report = "sketch" hides them: '
            'take "factors" or "frozen_a"'
        )


def _check_visits(config: RunConfig) -> None:
    """What a head in closed form goes with."""
    closed, none = config.head == "closed_form", config.slices in ("none", ())
    if config.continue_from is not None and (not closed or config.rounds):
        raise ConfigError(
            f'continue_from = "{config.continue_from}" goes on from the sums of a head in closed form, in one visit: '
            "give --one-visit, or leave it out"
        )
    if not closed:
        if config.rounds == 0:
            raise ConfigError('rounds = 0 trains nothing: set rounds, or head = "closed_form" for one visit')
        if config.ridge is not None or config.visit != "last":
            key = "ridge" if config.ridge is not None else "visit"
            raise ConfigError(f'{key} belongs to head = "closed_form", not to "{config.head}": leave it out')
        return
    if none and config.rounds:
        raise ConfigError(
            f'rounds = {config.rounds} would train slices, and slices = "none" leaves none: set rounds = 0 for one '
            "visit to each device"
        )
    if not none and not config.rounds:
        raise ConfigError(
            'rounds = 0 makes one visit to each device and trains no slice: set slices = "none", or rounds'
        )
    if config.average_from_round is not None:
        raise ConfigError(
            "average_from_round would mix heads from before and after a visit: leave it out under "
            'head = "closed_form"'
        )


def _check_server_methods(config: RunConfig) -> None:
    """What the server's options cannot be together."""
    if config.head_warm_up_rounds and not config.train_head:
        raise ConfigError(
            f"head_warm_up_rounds = {config.head_warm_up_rounds} trains a head that train_head = false leaves alone"
        )
    if config.head_split and not config.train_head:
        raise ConfigError("head_split = true deals a head that train_head = false leaves alone")
    if config.head_split and config.split == "whole":
        raise ConfigError(
            'head_split = true deals the head to one place, split = "whole" gives it to all: choose one'
        )
    _check_own_rate(config)
    slices = config.server_optimizer.slices
    if config.lora_aggregation == "product_svd" and (slices.name, slices.rate) != ("sgd", 1.0):
        raise ConfigError(
            f'lora_aggregation = "product_svd" sets the factors: server_optimizer.slices = "{slices.name}" at rate '
            f'{slices.number:g} would step on factors whose basis turns; use "sgd" at rate 1'
        )
    if config.gate_variance is not None and config.min_results < 2:
        raise ConfigError(
            f"gate_variance compares two halves of a round, min_results = {config.min_results} gives one: set 2"
        )
    if config.gate_variance is not None and config.slices in ("none", ()):
        raise ConfigError('gate_variance compares slices, and slices = "none" trains none')
    _check_robust_mean(config)
    _check_buffer(config)
    if config.row_refresh >= config.rounds > 0:
        raise ConfigError(
            f"row_refresh = {config.row_refresh} never comes within rounds = {config.rounds}: take fewer, or 0 to keep "
            "the first rows"
        )
    if config.patience and config.evaluation is None:
        raise ConfigError(
            f"patience = {config.patience} counts evaluations, and there are none: add a table [evaluation], or leave "
            "patience out"
        )
    if config.patience and config.average_from_round is not None:
        raise ConfigError(
            "patience hands over the values of one round, average_from_round their mean: leave one out"
        )
    if config.average_from_round is not None and config.average_from_round >= config.rounds:
        raise ConfigError(
            f"average_from_round = {config.average_from_round} is past the last of rounds = {config.rounds} (from 0)"
        )


def _check_buffer(config: RunConfig) -> None:
    """What steps without waiting do not go with."""
    if config.buffer_size is None:
        return
    if config.buffer_size < config.min_results:
        raise ConfigError(
            f"buffer_size = {config.buffer_size} is below min_results = {config.min_results}: no step could be made"
        )
    for key, used, why in (
        (
            "enough_results",
            config.enough_results is not None,
            "closes a round that waits: buffer_size does that",
        ),
        ("gate_variance", config.gate_variance is not None, "compares two halves of a round of one time"),
        (
            'lora_aggregation = "product_svd"',
            config.lora_aggregation == "product_svd",
            "needs factors of one time",
        ),
        ('head = "closed_form"', config.head == "closed_form", "visits each device once, and waits for it"),
    ):
        if used:
            raise ConfigError(f"buffer_size lets results of several rounds in, {key} {why}: leave one out")


def _check_own_rate(config: RunConfig) -> None:
    """A rate that sets itself needs each device's loss along the server's last step."""
    if config.server_optimizer.head.rate == "auto":
        raise ConfigError(
            "server_optimizer.head.rate = \"auto\": only the slices' rate sets itself; give the head's a number"
        )
    if config.server_optimizer.slices.rate != "auto":
        return
    for key, used, why, instead in (
        (f'update = "{config.update}"', config.update != "forward", "runs no draw along it", '"forward"'),
        (
            f'loss = "{config.loss}"',
            config.loss != "cross_entropy",
            "has another curvature",
            '"cross_entropy"',
        ),
        (f'head = "{config.head}"', config.head == "perturbed", "moves the head beside it", '"exact"'),
        (
            f'directions = "{config.directions}"',
            config.directions == "filtered",
            "compares with another",
            '"dealt"',
        ),
        (
            f'rank_mode = "{config.rank_mode}"',
            config.rank_mode != "fixed",
            "gives devices parts of it",
            '"fixed"',
        ),
        (f"exits = {list(config.exits)}", bool(config.exits), "lead past parts of it", "none"),
        (
            f"buffer_size = {config.buffer_size}",
            config.buffer_size is not None,
            "lets in what was measured along others",
            "none",
        ),
        (f'split = "{config.split}"', config.split != "whole", "gives devices parts of it", '"whole"'),
        ('slices = "none"', config.slices in ("none", ()), "has no step", "some"),
        (
            f'robust_mean = "{config.robust_mean}"',
            config.robust_mean != "none",
            "does not cover what devices measure",
            '"none"',
        ),
        (
            f'lora_aggregation = "{config.lora_aggregation}"',
            config.lora_aggregation == "product_svd",
            "sets the factors without a rate",
            '"factors"',
        ),
    ):
        if used:
            raise ConfigError(
                f'server_optimizer.slices.rate = "auto" measures the loss along the last step, and {key} {why}; take '
                f"{instead}, or give the rate a number"
            )


def _check_robust_mean(config: RunConfig) -> None:
    """An entry's centre over the devices knows neither halves of a round nor weights."""
    if config.robust_mean not in ("trimmed", "median"):
        return
    for key, used, why in (
        ("gate_variance", config.gate_variance is not None, "compares two halves of a round"),
        ("normalise_steps", config.normalise_steps, "weighs by local steps"),
        ('lora_aggregation = "product_svd"', config.lora_aggregation == "product_svd", "averages products"),
    ):
        if used:
            raise ConfigError(
                f'robust_mean = "{config.robust_mean}" takes each entry\'s centre over the devices, {key} {why}: '
                'leave one out, or use robust_mean = "clipped"'
            )


#: Where a sum must be of so many that none of its parts shows.
LEAST_MASKED = 3


def most_participations(config: RunConfig) -> int:
    """In how many rounds and visits a device may take part, of which ε is counted."""
    visits = 0 if config.head != "closed_form" else 2 if config.visit == "first_and_last" else 1
    every = config.rounds + visits
    most = config.privacy.most_rounds if config.privacy is not None else 0
    return min(most, every) if most else every


def _check_privacy(config: RunConfig) -> None:
    """What bounds one device's part in a sum does not go with what depends on all of them, or weighs them."""
    privacy = config.privacy
    if privacy is None:
        return
    if (privacy.epsilon is None) == (privacy.noise_multiplier is None):
        raise ConfigError(
            "privacy needs an epsilon, from which the noise is found, or a noise_multiplier: give one of them"
        )
    if privacy.unit == "row" and (config.head != "closed_form" or config.rounds or privacy.where != "server"):
        raise ConfigError(
            'privacy.unit = "row" is for one visit for a head in closed form, with noise by the server: set head = '
            '"closed_form", rounds = 0 and slices = "none", or take unit = "device"'
        )
    needed, most = config.rounds * config.devices_per_round, privacy.most_rounds * config.min_devices
    if privacy.most_rounds and most < needed:
        raise ConfigError(
            f"privacy.most_rounds = {privacy.most_rounds} lets {config.min_devices} devices take part {most} times, "
            f"and the rounds need {needed}; raise it, or min_devices, or lower rounds"
        )
    _refuse_with(_bounds_no_part(config), "privacy bounds what one device can change")


def _check_secure_aggregation(config: RunConfig) -> None:
    """What looks at single contributions does not go with a sum of which nobody sees the parts."""
    if not config.secure_aggregation:
        return
    if config.min_results < LEAST_MASKED:
        raise ConfigError(
            f"secure_aggregation hides each contribution in a sum of {LEAST_MASKED} or more: min_results = "
            f"{config.min_results} must be {LEAST_MASKED} at least"
        )
    if config.report == "scalars" and config.local_optimizer.name == "adamw":
        raise ConfigError(
            'secure_aggregation replays the sum of all scalars, and local_optimizer = "adamw" is not linear in them: '
            'take "accumulate" or "sgd"'
        )
    _refuse_with(_bounds_no_part(config), "secure_aggregation shows no contribution by itself")


def _bounds_no_part(config: RunConfig) -> tuple[tuple[str, bool, str], ...]:
    """Settings that weigh or compare single contributions, whether they are used, and why."""
    return (
        (f"norm_limit = {config.norm_limit:g}", config.norm_limit != 1000.0, "compares them with each other"),
        (
            f'robust_mean = "{config.robust_mean}"',
            config.robust_mean != "none",
            "compares them with each other",
        ),
        ("gate_variance", config.gate_variance is not None, "compares two halves of them"),
        ("buffer_size", config.buffer_size is not None, "scales each by its age"),
        ("normalise_steps", config.normalise_steps, "divides each by its steps"),
        ('update = "best"', config.update == "best", "weighs each by its variance"),
        (
            'lora_aggregation = "product_svd"',
            config.lora_aggregation == "product_svd",
            "multiplies the factors of each",
        ),
        (f'rank_mode = "{config.rank_mode}"', config.rank_mode != "fixed", "has them of unlike shapes"),
        (f"exits = {list(config.exits)}", bool(config.exits), "has them of unlike slices"),
        (f'split = "{config.split}"', config.split != "whole", "has them of unlike slices"),
        (
            'server_optimizer.slices.rate = "auto"',
            config.server_optimizer.slices.rate == "auto",
            "needs the loss of each",
        ),
        ("continue_from", config.continue_from is not None, "takes off what each handed in before"),
    )


def _refuse_with(settings: tuple[tuple[str, bool, str], ...], what: str) -> None:
    for key, used, why in settings:
        if used:
            raise ConfigError(f"{what}, and {key} {why}: leave one out")
