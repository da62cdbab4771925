"""The gate: rounds whose halves disagree are kept until more has come in."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from coordinator.aggregation.mean import Contribution, Sum
from coordinator.aggregation.server_state import ServerState
from coordinator.aggregation.server_step import ServerUpdate, server_update
from coordinator.aggregation.variance_gate import disagreement
from coordinator.config import RunConfig, run_config
from edge_runtime.package.slices import Values, decode_values
from tests.coordinator.conftest import RUN, SPECS, World, slice_spec

HEAD = frozenset({"head/core"})
SPEC = slice_spec("s", 0, (1, 2))


def sums(**tensors: list[float]) -> dict[str, Sum]:
    """Sums over two examples of one step each; ``s_core`` stands for s/core."""
    return {name.replace("_", "/"): Sum(2 * np.array(mean), 2, 2) for name, mean in tensors.items()}


def test_variance_by_hand() -> None:
    """Half the mean squared difference of a tensor's means, averaged over tensors, without the head.

    s: ((1-3)^2 + (2-2)^2) / 2 / 2 = 1; t: (0-1)^2 / 2 = 0.5; mean 0.75. u was trained by one half only.
    """
    even = sums(s_core=[1, 2], t_core=[0], head_core=[100], u_core=[9])
    odd = sums(s_core=[3, 2], t_core=[1], head_core=[0])
    assert disagreement(even, odd, HEAD) == pytest.approx(0.75)


def test_nothing_to_compare() -> None:
    """Slices that no two halves share cannot agree yet; with no slice at all there is no question."""
    assert disagreement(sums(s_core=[1]), sums(t_core=[1]), HEAD) == math.inf
    assert disagreement(sums(s_core=[1]), {}, HEAD) == math.inf
    assert disagreement(sums(head_core=[1]), sums(head_core=[1]), HEAD) is None


def config(**changed: Any) -> RunConfig:
    """A gate at 0.1 unless it is changed."""
    options = {"gate_variance": 0.1, "min_results": 2, **changed}
    return run_config({**RUN, "package": "p", "publisher_key": "A" * 43 + "=", **options})


def play(state: ServerState, number: int, *deltas: float) -> ServerUpdate:
    """A round from values zero in which slot i sends one example's delta of both entries."""
    contributions = [
        Contribution(1, {"s/core": np.full((1, 2), delta, np.float32)}, slot=slot)
        for slot, delta in enumerate(deltas)
    ]
    values: Values = {"s/core": np.zeros((1, 2), np.float32)}
    return server_update(
        values, state, contributions, config=config(), specs=[SPEC], round_number=number, committed=number
    )


def test_kept_until_halves_agree() -> None:
    """A gated round moves nothing; once the means agree, the values move by the mean over everything kept.

    First round: means 1 and 2, variance 0.5. Second adds 2 and 1: means 1.5 and 1.5, variance 0; the mean is 1.5.
    """
    first = play(ServerState(), 0, 1.0, 2.0)
    assert first.gated_variance == pytest.approx(0.5)
    assert not first.values["s/core"].any()
    second = play(ServerState.decode(first.state.encode()), 1, 2.0, 1.0)
    assert second.gated_variance is None
    assert second.values["s/core"].tolist() == [[1.5, 1.5]]
    assert second.state.kept == ({}, {})


def test_a_round_that_agrees_moves_at_once() -> None:
    """Below the limit the gate changes nothing."""
    moved = play(ServerState(), 0, 1.0, 1.2)
    assert moved.gated_variance is None
    np.testing.assert_allclose(moved.values["s/core"], 1.1, rtol=1e-6)


def test_operators_see_gated_rounds(world: World) -> None:
    """A gated round counts as committed, is marked in summary and report, has an event, and leaves the values."""
    devices = world.fleet("a", "b")
    world.create_run(rounds=3, split="whole", gate_variance=1e-9, min_results=2)
    before = world.values()
    world.work(devices)
    world.work(devices)
    run = world.run()
    assert [(entry["state"], entry["gated"]) for entry in run["rounds"][:2]] == [("committed", True)] * 2
    assert run["rounds_committed"] == 2
    assert world.values() == before
    events = world.admin("GET", "/v1/admin/runs/latest/events").json()
    (message, _) = [event["message"] for event in events if event["code"] == "round_gated"]
    assert "exceeds gate_variance = 1e-09" in message
    states = list((world.folder / "state/private").rglob("*/*"))
    assert len(states) == 2  # the server's after each round, to which the run may be rolled back; no delta


def test_warm_up_is_not_gated(world: World) -> None:
    """Rounds that train the head alone have no slices to compare, and move."""
    devices = world.fleet("a", "b")
    world.create_run(rounds=2, head_warm_up_rounds=1, gate_variance=1e-9, min_results=2)
    world.work(devices)
    assert world.run()["rounds"][0]["gated"] is False
    assert decode_values(world.values(), SPECS)["head/core"].any()
