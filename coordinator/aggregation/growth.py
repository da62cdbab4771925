"""A run that grows: slices of more blocks are trained from chosen rounds on, and begin without changing the function.

Stagewise stacking (Reddi et al. 2023, "Efficient Training of Language Models using Few-Shot Learning", ICML) trains a
model of few layers, stacks copies of trained ones on it, and goes on; the optimiser's state is copied too. Here the
model stands and its slices grow, from the last block backwards: early rounds move few numbers, whose estimates have
little noise, and nothing is computed of a direction before the first block that has one.

A block that joins begins as the nearest that is trained, where that changes nothing: a pair of factors takes over A
while its B is zero, and other slices, which begin at zero, stay. The server's optimiser takes over the mean of squares,
which says how large changes are, and no momentum, which would pull the new block along another's way. The paper's
details were not at hand: this is a stand-in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from coordinator.aggregation.server_optimizers import Moments
from coordinator.config import RunConfig
from edge_runtime.errors import ConfigError
from edge_runtime.package.manifest import SliceSpec
from edge_runtime.package.slices import Values, key
from edge_runtime.slices.kinds import KINDS


def check_growth(config: RunConfig, specs: Sequence[SliceSpec]) -> None:
    """Check that each round of growth has a block that can join.

    Args:
        config: configuration of the run.
        specs: the slices that it trains, without the head.

    Raises:
        ConfigError: there are fewer blocks.
    """
    blocks = len({spec.segment for spec in specs})
    if config.grow_at and len(config.grow_at) >= blocks:
        raise ConfigError(
            f"grow_at = {list(config.grow_at)} adds blocks {len(config.grow_at)} times, and the run trains slices of "
            f"{blocks}: name at most {max(0, blocks - 1)} rounds"
        )


def grown_slices(grow_at: Sequence[int], specs: Sequence[SliceSpec], committed: int) -> tuple[str, ...]:
    """Names of the slices that are trained after so many committed rounds, in the package's order.

    The blocks with slices are dealt to the stages as evenly as can be: the last blocks first, and one more to the first
    stages.

    Args:
        grow_at: numbers of committed rounds at which blocks join.
        specs: the slices that the run trains in the end, without the head.
        committed: number of committed rounds.
    """
    if not grow_at:
        return tuple(spec.name for spec in specs)
    blocks = sorted({spec.segment for spec in specs}, reverse=True)
    stages = np.array_split(blocks, len(grow_at) + 1)
    reached = 1 + sum(committed >= number for number in grow_at)
    joined = {int(block) for stage in stages[:reached] for block in stage}
    return tuple(spec.name for spec in specs if spec.segment in joined)


def grown(
    values: Values,
    moments: Mapping[str, Moments],
    specs: Iterable[SliceSpec],
    config: RunConfig,
    committed: int,
) -> tuple[Values, dict[str, Moments]]:
    """Values and optimiser state after a round, with slices started that join in the next.

    Args:
        values: values by flat name.
        moments: the server's optimiser state by flat name.
        specs: all slices of the package.
        config: configuration of the run.
        committed: number of committed rounds, that one among them.
    """
    result, kept = dict(values), dict(moments)
    if committed not in config.grow_at:
        return result, kept
    own = [
        spec
        for spec in specs
        if spec.kind != "head" and (config.slices == "all" or spec.name in config.slices)
    ]
    before = set(grown_slices(config.grow_at, own, committed - 1))
    joining = set(grown_slices(config.grow_at, own, committed)) - before
    trained = [spec for spec in own if spec.name in before]
    for spec in (spec for spec in own if spec.name in joining and not KINDS[spec.kind].held):
        source = _nearest(spec, trained)
        if source is None:
            continue
        pair = KINDS[spec.kind].pair
        if pair is not None and not values[key(spec.name, pair[1])].any():
            result[key(spec.name, pair[0])] = values[key(source.name, pair[0])].copy()
        for tensor in spec.tensors:
            taken = kept.get(key(source.name, tensor.name))
            if taken is not None:
                kept[key(spec.name, tensor.name)] = Moments(np.zeros_like(taken.m), taken.v.copy())
    return result, kept


def _nearest(spec: SliceSpec, trained: Sequence[SliceSpec]) -> SliceSpec | None:
    """The trained slice of the nearest block that adapts the same layer there, with tensors of the same shapes."""
    alike = [
        other
        for other in trained
        if _layer(other) == _layer(spec)
        and [t.shape for t in other.tensors] == [t.shape for t in spec.tensors]
    ]
    return min(alike, key=lambda other: abs(other.segment - spec.segment), default=None)


def _layer(spec: SliceSpec) -> str:
    """What a slice's layer is called within its block."""
    return spec.target.rpartition(".")[2]
