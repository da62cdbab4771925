"""A draw costs nothing in segments before the first slice that it moves, and no bit of the gradient changes."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.execution.executor import Executor
from edge_runtime.memory.plan import ExecutionChoice
from edge_runtime.package.slices import Values, encode_values
from edge_runtime.protocol.messages import LocalOptimizer
from edge_runtime.training.forward_mode import ForwardMode
from tests.edge_runtime.local import train, work_of
from tests.export import tiny

ONCE = {"steps": 2, "batch_size": 6, "optimizer": LocalOptimizer("accumulate", 1.0, 1.0)}


@pytest.fixture(scope="module")
def values(exported) -> Values:
    """Slice and head values away from zero."""
    return tiny.flat(tiny.moved_slices(exported.reference))


def carry_everything(monkeypatch) -> None:
    """Every draw is carried from the first trained slice on, as if all of them began there."""
    sweep = Executor.sweep

    def whole(self, values, micro_batches, tangents=None, rows=None, begun=None):
        return sweep(self, values, micro_batches, tangents, rows)

    monkeypatch.setattr(Executor, "sweep", whole)


@pytest.mark.parametrize("arithmetic", ["float", "row_int8", "block_int8"])
@pytest.mark.parametrize(
    "settings",
    [
        {"directions": "one_slice", "draws": 1},
        {"directions": "one_slice", "draws": 5},
        {"directions": "dealt", "draws": 5},
        {"directions": "dealt", "draws": 3, "head": "perturbed"},
        {"directions": "shared", "draws": 3},
    ],
    ids=["one", "five", "dealt", "perturbed head", "shared"],
)
def test_the_gradient_is_the_unskipped_ones(
    prepared_in, float_prepared, values, monkeypatch, arithmetic: str, settings: dict
) -> None:
    """However examples and draws are grouped, and whatever the arithmetic, no bit shows what was skipped."""
    prepared = float_prepared if arithmetic == "float" else prepared_in[arithmetic]
    task = tiny.make_task(prepared.package, report="scalars", **{**ONCE, **settings})
    ways = [
        ExecutionChoice("resident", 6, 5),
        ExecutionChoice("streamed", 4, 2),
        ExecutionChoice("resident", 1, 1),
    ]
    skipped = [train(prepared, task, values, way).delta for way in ways]
    carry_everything(monkeypatch)
    for way, got in zip(ways, skipped, strict=True):
        assert encode_values(got) == encode_values(train(prepared, task, values, way).delta)


def test_what_is_not_run_is_counted(float_prepared, values) -> None:
    """Of 8 draws an example, those that move a slice of block 1 are not run in block 0, and every other is.

    Two slices lie in each block, so half of the draws begin in block 1. Carried are block 0, block 1 and the head.
    """
    task = tiny.make_task(float_prepared.package, directions="one_slice", draws=8, steps=1, batch_size=6)
    work = work_of(float_prepared, task)
    assert ForwardMode(work).step(0, values, np.arange(6)) is not None
    assert (work.executor.draws_run, work.executor.draws_skipped) == (6 * (4 + 8 + 8), 6 * 4)
    every = work_of(float_prepared, tiny.make_task(float_prepared.package, draws=8, steps=1, batch_size=6))
    assert ForwardMode(every).step(0, values, np.arange(6)) is not None
    assert (every.executor.draws_run, every.executor.draws_skipped) == (6 * 24, 0)


def test_an_example_whose_draws_all_begin_late_runs_the_primal_program(float_prepared, values) -> None:
    """With one draw an example and examples by themselves, block 0 carries tangents of half of the examples alone."""
    task = tiny.make_task(float_prepared.package, directions="one_slice", draws=1, steps=1, batch_size=8)
    work = work_of(float_prepared, task, ExecutionChoice("resident", 1, 1))
    assert ForwardMode(work).step(0, values, np.arange(8)) is not None
    assert (work.executor.draws_run, work.executor.draws_skipped) == (4 + 8 + 8, 4)
