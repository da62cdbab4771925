"""Whether the noise of a run is known, safe and worth having: looked at before the run, and told with numbers."""

from __future__ import annotations

from msgspec.structs import replace

from coordinator.aggregation.accountant import epsilon_of, multiplier_for
from coordinator.aggregation.private_sum import DROWNED, noise_ratio
from coordinator.config import PrivacyConfig, RunConfig, most_participations
from edge_runtime.errors import ConfigError
from edge_runtime.package.manifest import Manifest
from edge_runtime.package.slices import shapes
from edge_runtime.protocol.messages import PER_EXAMPLE
from edge_runtime.training.feature_sums import form_of
from edge_runtime.training.protected import Layout


def with_noise(config: RunConfig, seen: Manifest, slices: tuple[str, ...], *, simulated: bool) -> RunConfig:
    """A configuration whose noise is known, and worth having.

    Args:
        config: configuration of the run.
        seen: manifest of its package, as the run sees it.
        slices: slices that it trains.
        simulated: whether the run is of a simulation, whose noise follows from its seed.

    Raises:
        ConfigError: ``dp-accounting`` is missing; the noise has a seed that somebody could know; or it is so large
            that nothing is learned. Has the numbers.
    """
    privacy = config.privacy
    if privacy is None:
        return config
    if simulated:
        privacy = replace(
            privacy, noise_seed=config.seed if privacy.noise_seed is None else privacy.noise_seed
        )
    elif privacy.noise_seed is not None:
        raise ConfigError(
            f"privacy.noise_seed = {privacy.noise_seed} would let whoever reads it take the noise off; leave it out: "
            "it is for simulations"
        )
    times = most_participations(config)
    if privacy.epsilon is not None:
        privacy = replace(privacy, noise_multiplier=multiplier_for(privacy, times))
    epsilon_of(privacy, times)  # raises here and not after the first round
    config = replace(config, privacy=privacy)
    _check_worth(config, privacy, seen, slices)
    return config


def describe(config: RunConfig, seen: Manifest, slices: tuple[str, ...]) -> str:
    """What a run's noise comes to, for people; empty without privacy."""
    privacy = config.privacy
    if privacy is None:
        return ""
    times = most_participations(config)
    ratios = _ratios(config, seen, slices)
    told = [f"{numbers} numbers, {one:.2g} times the contributions in a round" for numbers, one, _ in ratios]
    return (
        f"privacy by the {privacy.where}: noise {privacy.noise_multiplier:.3g} x clip_norm on {'; on '.join(told)}; "
        f"epsilon at the end at most {epsilon_of(privacy, times):.3g} at delta = {privacy.delta:g} for each "
        f"{privacy.unit}, by {times} participations, none of them counted as sampled"
    )


def _ratios(config: RunConfig, seen: Manifest, slices: tuple[str, ...]) -> list[tuple[int, float, float]]:
    """Of training, and of a visit: how many numbers, and noise over contributions in a round and in all."""
    found: list[tuple[int, float, float]] = []
    privacy, places = config.privacy, config.devices_per_round
    if privacy is None:
        return found
    if config.rounds:
        specs = [spec for spec in seen.slices if spec.name in slices]
        trains_head = config.train_head and (config.head != "closed_form" or config.visit != "last")
        heads = [spec for spec in seen.slices if spec.kind == "head" and trains_head]
        numbers = Layout(shapes([*specs, *heads])).length
        if config.report == "scalars" and privacy.where == "device":
            examples = config.batch_size if config.directions in PER_EXAMPLE else 1
            numbers = config.steps * config.draws * examples + Layout(shapes(heads)).length
        found.append((numbers, *noise_ratio(privacy, numbers, places, config.rounds)))
    if config.head == "closed_form":
        numbers = Layout({}, form_of(config, seen)).length
        together = min(places, config.min_devices)
        rounds = max(1, config.min_devices // places)
        found.append((numbers, *noise_ratio(privacy, numbers, together, rounds)))
    return found


def _check_worth(config: RunConfig, privacy: PrivacyConfig, seen: Manifest, slices: tuple[str, ...]) -> None:
    """A noise beside which the most that all devices together could say is nothing is refused."""
    for numbers, one, all_rounds in _ratios(config, seen, slices):
        if all_rounds > DROWNED:
            raise ConfigError(
                f"the noise drowns what is learned: on {numbers} numbers its norm is {one:.3g} times that of all "
                f"contributions at clip_norm = {privacy.clip_norm:g} in a round, and {all_rounds:.3g} times over the "
                f"run, where {DROWNED:g} is the most; ask more devices, train fewer numbers, or allow a larger epsilon"
            )
