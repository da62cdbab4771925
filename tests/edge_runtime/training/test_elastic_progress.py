"""Tasks on chosen entries, nested ranks and exits that are stopped after any step go on to the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.errors import WorkerError
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.package.slices import Values, encode_values
from edge_runtime.protocol.signing import generate_key
from edge_runtime.training.loop import train_locally
from edge_runtime.training.progress import Keeper
from edge_runtime.training.step import LocalWork
from edge_runtime.training.step_exit import step_exit
from edge_runtime.training.step_rank import step_rank
from tests.edge_runtime import exit_model, ranked_bigram
from tests.edge_runtime.local import work_of
from tests.edge_runtime.ranked_bigram import prepare_here
from tests.edge_runtime.training import test_step_exit, test_step_rank
from tests.export import tiny

STEPS, WORK = 4, "a" * 64


def stops_cost_no_bit(work: LocalWork, values: Values, folder: Path) -> Values:
    """The change of a task in one go, which must be that of the same task stopped after every step."""
    whole = train_locally(work, values)
    for step in range(1, STEPS):
        with pytest.raises(WorkerError, match=f"told to stop, and did before step {step}"):
            train_locally(work, values, keeper=Keeper(folder / "it", WORK, lambda: True))
    pieces = train_locally(work, values, keeper=Keeper(folder / "it", WORK, lambda: True))
    assert encode_values(pieces.delta) == encode_values(whole.delta)
    assert (pieces.examples, pieces.steps_applied) == (whole.examples, STEPS)
    return whole.delta


def test_chosen_entries(exported_sparse, tmp_path: Path) -> None:
    """A sparse slice's values and the head go on; some of each have moved."""
    prepared = prepare_here(exported_sparse.package, tmp_path / "prepared")
    values = tiny.flat(tiny.moved_slices(exported_sparse.reference))
    task = tiny.make_task(prepared.package, steps=STEPS)
    delta = stops_cost_no_bit(work_of(prepared, task), values, tmp_path)
    assert all(change.any() for name, change in delta.items() if not name.endswith("bias"))


@pytest.mark.parametrize("mode", ["dynamic", "dynamic_frozen"])
def test_nested_ranks(tmp_path: Path, mode: str) -> None:
    """A resumed step draws the rank that it would have drawn, though steps before it drew others."""
    (tmp_path / "model").mkdir()
    bigram = ranked_bigram.write_ranked_bigram(tmp_path / "model", generate_key())
    prepared = prepare_here(bigram.package, tmp_path / "prepared")
    task = test_step_rank.make_task(steps=STEPS, rank_mode=mode, draws=4)
    drawn = [step_rank(task, prepared.manifest.slices, step) for step in range(STEPS)]
    assert len({found.rank for found in drawn if found is not None}) > 1
    examples = test_step_rank.examples_of(bigram)
    stops_cost_no_bit(work_of(prepared, task, examples=examples), test_step_rank.moved_values(), tmp_path)


def test_exits(tmp_path: Path) -> None:
    """A resumed step leaves at the exit that it would have left at, though steps before it left at others."""
    (tmp_path / "model").mkdir()
    package = exit_model.write_exit_model(tmp_path / "model", generate_key())
    whole: PreparedPackage = prepare_here(package, tmp_path / "prepared")
    tasks = (test_step_exit.make_task(steps=STEPS, slot=slot) for slot in range(20))
    task = next(
        task for task in tasks if {step_exit(task, step) for step in range(STEPS)} == set(test_step_exit.BOTH)
    )
    seen = whole.with_head(task.features, task.pooling)
    work = work_of(seen, task, examples=test_step_exit.examples_of(whole))
    stops_cost_no_bit(work, exit_model.start_values(0.5), tmp_path)
