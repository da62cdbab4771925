"""Which rows each simulated device holds: disjoint, and a function of the seed alone, so that all arms see the same."""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from coordinator.simulation.config import DataConfig
from coordinator.simulation.labelled_rows import LabelledRows
from edge_runtime.errors import ConfigError

#: Keeps this draw apart from others by the same seed.
_STREAM = 0x5041_5254
#: Rows of one device, as indices into the data file.
Share = tuple[int, ...]


def partition(rows: LabelledRows, config: DataConfig, devices: int, seed: int) -> list[Share]:
    """The rows of each device.

    Args:
        rows: rows of the whole data file.
        config: way in which they are shared out.
        devices: number of devices.
        seed: seed of the simulation.

    Raises:
        ConfigError: there are too few rows, owners or classes for what is asked; says which and what to do.
    """
    if config.partition == "natural":
        return _by_owner(rows, devices)
    sizes = _sizes(rows, config, devices)
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, _STREAM])))
    if config.partition == "iid":
        order = generator.permutation(len(rows.texts))
        ends = np.cumsum(sizes)
        return [tuple(order[end - size : end].tolist()) for size, end in zip(sizes, ends, strict=True)]
    if config.alpha is None:
        raise ConfigError('data.alpha is missing; partition = "dirichlet" needs it')
    return _by_dirichlet(rows, config.alpha, sizes, generator)


def _sizes(rows: LabelledRows, config: DataConfig, devices: int) -> list[int]:
    """How many rows each device gets; shared out evenly, sizes differ by one at most."""
    there = len(rows.texts)
    if config.rows_per_device == 0:
        if there < devices:
            raise ConfigError(
                f"data.train has {there} rows for fleet.devices = {devices}, and every device needs one; "
                "lower fleet.devices"
            )
        return [there // devices + (device < there % devices) for device in range(devices)]
    asked = config.rows_per_device * devices
    if asked > there:
        raise ConfigError(
            f"data.rows_per_device = {config.rows_per_device} for fleet.devices = {devices} asks for {asked} rows and "
            f"data.train has {there}; lower one of them (at most {there // devices} rows a device), or set "
            "rows_per_device = 0 to share out what is there"
        )
    return [config.rows_per_device] * devices


def _by_dirichlet(
    rows: LabelledRows, alpha: float, sizes: list[int], generator: np.random.Generator
) -> list[Share]:
    """Each device draws a mix of classes and takes its rows from their pools until these run out."""
    if rows.labels is None:
        raise ConfigError('data.train has no labels to mix; use partition = "iid" or "natural"')
    classes = sorted(set(rows.labels))
    if len(classes) == 1:
        raise ConfigError(
            f'all {len(rows.labels)} rows of data.train have one label, and partition = "dirichlet" mixes several; '
            'add rows of other labels, or use partition = "iid"'
        )
    number = {label: index for index, label in enumerate(classes)}
    of_row = np.array([number[label] for label in rows.labels])
    pools = [generator.permutation(np.flatnonzero(of_row == index)) for index in range(len(classes))]
    left = np.array([len(pool) for pool in pools])
    shares = []
    for size in sizes:
        mix = generator.dirichlet(np.full(len(classes), alpha))
        taken = _counts(mix, size, left, generator)
        rows_of_device: list[int] = []
        for pool, rest, count in zip(pools, left, taken, strict=True):
            rows_of_device += pool[rest - count : rest].tolist()
        left = left - taken
        shares.append(tuple(rows_of_device))
    return shares


def _counts(
    mix: NDArray[np.float64], size: int, left: NDArray[np.int64], generator: np.random.Generator
) -> NDArray[np.int64]:
    """How many rows of each class make ``size`` together, none more than are left."""
    taken = np.zeros_like(left)
    while (missing := size - int(taken.sum())) > 0:
        weights = np.where(left > taken, mix, 0.0)
        if weights.sum() <= 0:  # the mix has no weight on any class that is left
            weights = (left - taken).astype(np.float64)
        drawn = generator.multinomial(missing, weights / weights.sum())
        taken = np.minimum(taken + drawn, left)
    return taken


def _by_owner(rows: LabelledRows, devices: int) -> list[Share]:
    """One device for each of the owners with most rows, the largest first; equal ones in the order of their names."""
    if rows.owners is None:
        raise ConfigError(
            'data.train has no "owner", which partition = "natural" goes by; add it or use another'
        )
    counts = Counter(rows.owners)
    if len(counts) < devices:
        raise ConfigError(
            f"data.train has {len(counts)} owners for fleet.devices = {devices}; lower fleet.devices to {len(counts)}"
        )
    largest = sorted(counts, key=lambda owner: (-counts[owner], owner))[:devices]
    held: dict[str, list[int]] = {owner: [] for owner in largest}
    for index, owner in enumerate(rows.owners):
        if owner in held:
            held[owner].append(index)
    return [tuple(held[owner]) for owner in largest]
