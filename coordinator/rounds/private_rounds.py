"""What differential privacy changes in a round: noise on what it gives, and ε that is counted."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable

from coordinator.aggregation.accountant import epsilon_of
from coordinator.aggregation.mean import Contribution
from coordinator.aggregation.private_sum import made_possible, private_mean, private_sums
from coordinator.config import PrivacyConfig, RunConfig
from coordinator.rounds.runs import Run
from coordinator.storage import privacy_rows
from coordinator.storage.privacy_rows import SpentRow
from coordinator.storage.stores import Stores
from edge_runtime.errors import ConfigError
from edge_runtime.package.slices import Values
from edge_runtime.training.feature_sums import FeatureSums, form_of
from edge_runtime.training.gaussian import DoubleArray, gaussian, on_grid


def adds_noise(config: RunConfig) -> bool:
    """Whether the server adds noise to a run's sums."""
    return config.privacy is not None and config.privacy.where == "server"


def noise_key(run: Run, number: int) -> bytes:
    """Key of the noise of a round: secret, and nowhere stored; of a simulation the seed's."""
    privacy = run.config.privacy
    if privacy is not None and privacy.noise_seed is not None:
        return hashlib.sha256(f"server noise {privacy.noise_seed} {number}".encode()).digest()
    return secrets.token_bytes(32)


def noised(run: Run, number: int, contributions: Iterable[Contribution], values: Values) -> Contribution:
    """The noised mean of a round."""
    return private_mean(
        contributions, _privacy(run.config), run.config.devices_per_round, noise_key(run, number), values
    )


def with_server_noise(run: Run, key: bytes, vector: DoubleArray) -> DoubleArray:
    """A sum of contributions, which devices have clipped, with the server's noise."""
    std = _privacy(run.config).noise_std
    return on_grid(vector + gaussian(key, "server", len(vector), std), std)


def noised_sums(run: Run, number: int, each: Iterable[FeatureSums]) -> FeatureSums:
    """The noised sums of a round of a visit."""
    form = form_of(run.config, run.manifest)
    return private_sums(each, form, _privacy(run.config), noise_key(run, number))


def possible(run: Run, sums: FeatureSums) -> FeatureSums:
    """Sums that a head can be solved from: those with noise are made such as some rows could have."""
    return sums if run.config.privacy is None else made_possible(sums)


def spent(stores: Stores, run: Run, number: int) -> SpentRow | None:
    """What a run has spent with this round; None without privacy."""
    if run.config.privacy is None:
        return None
    with stores.storage.reading() as connection:
        times = privacy_rows.most_participations(connection, run.run_id)
    return SpentRow(run.run_id, number, times, epsilon_of(run.config.privacy, times))


def _privacy(config: RunConfig) -> PrivacyConfig:
    if config.privacy is None:
        raise ConfigError("the run has no privacy")
    return config.privacy
