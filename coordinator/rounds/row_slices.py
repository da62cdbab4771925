"""Runs that train rows: what they may ask for, and the rows that they begin with."""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.aggregation.rows import KIND, chosen_anew
from coordinator.config import RunConfig
from edge_runtime.errors import ConfigError
from edge_runtime.package.manifest import Manifest
from edge_runtime.package.slices import Values


def trains_rows(manifest: Manifest, slices: Sequence[str]) -> bool:
    """Whether some of the slices train rows."""
    return any(manifest.slice_named(name).kind == KIND for name in slices)


def check_rows(config: RunConfig, manifest: Manifest, slices: Sequence[str]) -> None:
    """Check what a run asks of its rows.

    Args:
        config: configuration of the run.
        manifest: manifest of the package.
        slices: names of the slices that it trains.

    Raises:
        ConfigError: the package has no rows, or what they change by would be compared with that of other rows.
    """
    if not trains_rows(manifest, slices):
        if config.row_refresh or config.row_choice != "norm":
            key = "row_refresh" if config.row_refresh else "row_choice"
            raise ConfigError(
                f"{key} chooses rows, and package {manifest.name} trains none: export it with --slice rows, or leave "
                f"{key} out"
            )
        return
    for key, used, instead in (
        ('directions = "filtered"', config.directions == "filtered", 'take "one_slice"'),
        (
            'server_optimizer.slices.rate = "auto"',
            config.server_optimizer.slices.rate == "auto",
            "give it a number",
        ),
        (f"buffer_size = {config.buffer_size}", config.buffer_size is not None, "leave it out"),
        (
            f"gate_variance = {config.gate_variance}",
            config.gate_variance is not None,
            "leave it out",
        ),
    ):
        if used and config.row_refresh:
            raise ConfigError(
                f"{key} compares a change with those of earlier rounds, and row_refresh = {config.row_refresh} chooses "
                f"other rows between them: {instead}, or set row_refresh = 0"
            )


def with_first_rows(values: Values, manifest: Manifest, config: RunConfig) -> Values:
    """A package's initial values with the rows that a run begins with."""
    chosen, _ = chosen_anew(
        values, {}, {}, manifest.slices, choice=config.row_choice, seed=config.seed, committed=0
    )
    return chosen
