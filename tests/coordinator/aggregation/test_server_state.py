"""What the server keeps: stored and restored, it goes on as if nothing had been."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save

from coordinator.aggregation.mean import Sum
from coordinator.aggregation.server_optimizers import Moments
from coordinator.aggregation.server_state import Average, ServerState
from edge_runtime.errors import DigestError


def random(*shape: int) -> np.ndarray:
    """Numbers that use all their bits."""
    return np.random.default_rng(shape).standard_normal(shape)


def full_state() -> ServerState:
    """A state with something in every part."""
    moments = {"a/b": Moments(random(2, 3), random(3, 2)), "c/d": Moments(random(1), random(2))}
    average = (
        Average().plus({"a/b": random(2, 3).astype(np.float32)}).plus({"a/b": np.ones((2, 3), np.float32)})
    )
    kept = ({"a/b": Sum(random(2, 3), 7, 21), "c/d": Sum(random(1), 3, 3)}, {"a/b": Sum(random(3), 0.1, 2)})
    return ServerState(moments, average, {"a/b": random(4).astype(np.float32)}, kept)


def test_bit_for_bit() -> None:
    """Encoded and decoded, a state has the very same bits, and the same bytes again."""
    data = full_state().encode()
    restored = ServerState.decode(data)
    assert restored.moments["a/b"].m.tobytes() == random(2, 3).tobytes()
    assert restored.moments["c/d"].v.tobytes() == random(2).tobytes()
    assert restored.average.rounds == 2
    assert restored.average.totals["a/b"].tobytes() == full_state().average.totals["a/b"].tobytes()
    assert restored.reference["a/b"].tobytes() == random(4).astype(np.float32).tobytes()
    (even, odd), (kept_even, kept_odd) = restored.kept, full_state().kept
    assert {name: (each.total.tobytes(), each.examples, each.steps) for name, each in even.items()} == {
        name: (each.total.tobytes(), each.examples, each.steps) for name, each in kept_even.items()
    }
    assert (odd["a/b"].examples, odd["a/b"].steps) == (kept_odd["a/b"].examples, kept_odd["a/b"].steps)
    assert restored.encode() == data


def test_nothing_is_a_state_too() -> None:
    """Before the first round there is nothing to keep, and that survives as well."""
    assert ServerState.decode(ServerState().encode()) == ServerState()


@pytest.mark.parametrize("data", [b"", b"junk" * 10, full_state().encode()[:-8]])
def test_other_bytes(data: bytes) -> None:
    """Bytes that are no state are refused with the reason."""
    with pytest.raises(DigestError, match="server state cannot be read"):
        ServerState.decode(data)


def test_a_state_of_moments_alone() -> None:
    """A state stored when the server kept nothing but moments is read: the rest is empty."""
    state = ServerState.decode(save({"m:a/b": random(2), "v:a/b": random(1)}))
    assert (state.average, state.reference, state.kept) == (Average(), {}, ({}, {}))
    assert state.moments["a/b"].v.tobytes() == random(1).tobytes()


def test_mean_of_rounds_by_hand() -> None:
    """Every round counts alike, in float64: (1 + 2 + 6) / 3 = 3."""
    average = Average()
    for value in (1, 2, 6):
        average = average.plus({"x": np.array([value], np.float32)})
    assert average.values["x"].tolist() == [3.0]
