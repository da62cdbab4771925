"""A round's server step as one pure function: the daemon and the simulation both call :func:`move`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from coordinator.aggregation import Contribution, apply_changes, mean_change
from coordinator.config import RunConfig
from coordinator.server_state import ServerState
from edge_runtime.package import SliceSpec
from edge_runtime.slices import Values, shapes


@dataclass(frozen=True)
class Moved:
    """What a round comes to.

    Attributes:
        values: from which training goes on. state: what the server keeps beside them.
    """

    values: Values
    state: ServerState


def move(
    values: Values,
    state: ServerState,
    contributions: Iterable[Contribution],
    *,
    config: RunConfig,
    specs: Sequence[SliceSpec],
) -> Moved:
    """From a round's contributions to the values of the next.

    Args:
        values: of all slices, as the round's tasks came with them; not modified.
        state: as the round before left it; not modified.
        contributions: in the order of their places; consumed one at a time.
        config: of the run. specs: all slices of its package.

    Returns:
        values that may be infinite if a change was enormous: the caller checks.
    """
    # 1. Contributions are summed, 2. and averaged.
    changes = mean_change(contributions)
    # 3. The server's optimisers step.
    heads = frozenset(shapes(spec for spec in specs if spec.kind == "head"))
    new_values, moments = apply_changes(
        values, state.moments, changes, head=heads, optimizers=config.server_optimizer
    )
    return Moved(new_values, ServerState(moments))
