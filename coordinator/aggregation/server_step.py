"""A round's server step as one pure function: the daemon and the simulation both call :func:`server_update`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from coordinator.aggregation import own_rate
from coordinator.aggregation.growth import grown
from coordinator.aggregation.low_rank import factor_deltas, with_products
from coordinator.aggregation.mean import Contribution, add, apply_deltas, means, merged
from coordinator.aggregation.ranks import by_rank, joined_ranks
from coordinator.aggregation.rows import chosen_anew, folded, measured
from coordinator.aggregation.server_state import ServerState
from coordinator.aggregation.sketches import found_again
from coordinator.aggregation.variance_gate import disagreement
from coordinator.config import RunConfig
from edge_runtime.package.manifest import SliceSpec
from edge_runtime.package.slices import Values, shapes


@dataclass(frozen=True)
class ServerUpdate:
    """What the server makes of a round.

    Attributes:
        values: slice values that training goes on from.
        state: server state beside the values.
        average: mean of the values over rounds, evaluated and handed over instead of them; None while there is none.
        reference: deltas of all slices that directions are compared with, or the last step, along which devices
            measure the loss; None if neither is asked for.
        gated_variance: variance for which the gate held everything back; None if it did not.
        flat: whether the slices' rate sets itself and stayed, for devices found the loss flat along the last step.
    """

    values: Values
    state: ServerState
    average: Values | None
    reference: Values | None
    gated_variance: float | None
    flat: bool = False


def server_update(
    values: Values,
    state: ServerState,
    contributions: Iterable[Contribution],
    *,
    config: RunConfig,
    specs: Sequence[SliceSpec],
    round_number: int,
    committed: int,
) -> ServerUpdate:
    """From a round's contributions to the values of the next round.

    Args:
        values: slice values that the round's tasks came with; not modified.
        state: server state that the round before left; not modified.
        contributions: contributions of the round, in the order of their slots; consumed one at a time.
        config: configuration of the run.
        specs: all slices of the run's package.
        round_number: number of the round, from 0.
        committed: number of rounds that were committed before.

    Returns:
        the update, whose values may be infinite if a delta was enormous: the caller checks.
    """
    heads = frozenset(shapes(spec for spec in specs if spec.kind == "head"))
    # 1. Contributions are summed, on top of what the gate kept; LoRA's factors by their product, if so asked.
    if config.lora_aggregation == "product_svd":
        contributions = with_products(contributions, values, specs)
    if config.rank_mode != "fixed":
        contributions = by_rank(contributions, specs)
    even, odd = dict(state.kept[0]), dict(state.kept[1])
    lines: list[tuple[int, tuple[float, float]]] = []
    for contribution in contributions:
        if contribution.line is not None:
            lines.append((contribution.examples, contribution.line))
        add(odd if config.gate_variance is not None and contribution.slot % 2 else even, contribution)
    # 2. The gate may hold them back: then nothing moves, and the next round adds to them.
    variance = disagreement(even, odd, heads)
    if config.gate_variance is not None and variance is not None and variance > config.gate_variance:
        return _outcome(values, replace(state, kept=(even, odd)), config, specs, gated_variance=variance)
    # 3. They are averaged.
    deltas = means(merged(even, odd))
    if config.report == "sketch":
        deltas = found_again(deltas, specs, config)
    deltas = joined_ranks(deltas, values, specs)
    deltas = factor_deltas(deltas, values, specs)
    # 4. The server's optimisers step, at rates that the run names or that the loss along the last step gives.
    sets_itself = config.server_optimizer.slices.rate == "auto"
    own, flat = own_rate.measured(state.own, lines) if sets_itself else (state.own, False)
    flat = flat and any(array.any() for array in state.reference.values())
    rate_share = 1 - committed / config.rounds if config.rate_decay == "linear" else 1.0
    new_values, moments = apply_deltas(
        values,
        state.moments,
        deltas,
        head=heads,
        optimizers=config.server_optimizer,
        rate_share=rate_share,
        slice_rate=own.rate if sets_itself else None,
    )
    # 5. Rows that are trained make room for others, and slices of more blocks join.
    scores = measured(state.row_scores, deltas, values, specs)
    after = new_values
    if config.row_refresh and (committed + 1) % config.row_refresh == 0:
        after, moments = chosen_anew(
            new_values,
            moments,
            scores,
            specs,
            choice=config.row_choice,
            seed=config.seed,
            committed=committed + 1,
        )
    after, moments = grown(after, moments, specs, config, committed + 1)
    # 6. The values enter their mean, and the mean deltas are what the next round's directions are compared with. A rate
    #    that sets itself is judged by the step that was just taken.
    average, reference = state.average, state.reference
    if config.average_from_round is not None and round_number >= config.average_from_round:
        average = average.plus(folded(new_values, specs))
    if config.directions == "filtered":
        with np.errstate(over="ignore"):
            reference = reference | {name: mean.astype(np.float32) for name, mean in deltas.items()}
    moved = {name: new_values[name] - values[name] for name in deltas if name not in heads}
    if sets_itself and moved:
        reference, own = reference | moved, own.stepped(rate_share)
    # Sums of an earlier visit were of features that have moved since: the new state has none.
    return replace(
        _outcome(
            after,
            ServerState(moments, average, reference, own=own, row_scores=scores),
            config,
            specs,
        ),
        flat=flat,
    )


def _outcome(
    values: Values,
    state: ServerState,
    config: RunConfig,
    specs: Sequence[SliceSpec],
    gated_variance: float | None = None,
) -> ServerUpdate:
    reference = None
    if state.reference and (config.directions == "filtered" or config.server_optimizer.slices.rate == "auto"):
        reference = _complete(state.reference, specs)
    average = state.average.values if state.average.rounds else None
    return ServerUpdate(values, state, average, reference, gated_variance)


def _complete(reference: Values, specs: Sequence[SliceSpec]) -> Values:
    """The reference of all slices: zeros for what nobody has trained yet."""
    return {name: reference.get(name, np.zeros(shape, np.float32)) for name, shape in shapes(specs).items()}
