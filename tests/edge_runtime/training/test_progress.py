"""A task that is stopped after any step goes on from there, and comes to the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_runtime.errors import WorkerError
from edge_runtime.package.slices import Values, encode_values, shapes
from edge_runtime.protocol.messages import LocalOptimizer
from edge_runtime.training import feature_sums
from edge_runtime.training.gather_sums import gather_sums
from edge_runtime.training.line import LINE
from edge_runtime.training.loop import train_locally
from edge_runtime.training.progress import WRITE_EVERY_S, Keeper, Progress
from edge_runtime.worker.session import TaskSession
from tests.edge_runtime.local import examples_of, work_of
from tests.export import tiny

WORK, OTHER = "a" * 64, "b" * 64


class Signals:
    """Says to stop after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.fixture(scope="module")
def values(exported) -> Values:
    """Slice and head values away from zero."""
    return tiny.flat(tiny.moved_slices(exported.reference))


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": LocalOptimizer("sgd", 0.1, 0.1), "directions": "dealt", "draws": 2},
        {"optimizer": LocalOptimizer("accumulate", 0.1, 0.1), "report": "scalars"},
        {"optimizer": LocalOptimizer("adamw", 0.01, 0.01), "update": "backprop"},
        {"optimizer": LocalOptimizer("sgd", 0.1, 0.1), "reference": "1" * 64},
        {
            "optimizer": LocalOptimizer("sgc", 0.01, 0.01),
            "report": "sketch",
            "sketch_size": 14,
            "sketch_entries": 2,
        },
    ],
    ids=["sgd", "scalars", "adamw", "line", "sketch"],
)
def test_each_stop_costs_no_bit(prepared_in, values, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Five steps in one go, and stopped after every single one, give one and the same change and counts."""
    prepared = prepared_in["row_int8"]
    task = tiny.make_task(prepared.package, steps=5, **settings)
    line = {name: np.full_like(array, 0.01) for name, array in values.items()} if task.reference else None
    work, path = work_of(prepared, task, reference=line), tmp_path / "task.progress"
    whole = train_locally(work, values)
    assert (LINE in whole.delta) == (task.reference is not None)
    for _ in range(4):
        with pytest.raises(WorkerError, match="told to stop"):
            train_locally(work, values, keeper=Keeper(path, WORK, Signals(0)))
    pieces = train_locally(work, values, keeper=Keeper(path, WORK, Signals(0)))
    assert encode_values(pieces.delta) == encode_values(whole.delta)
    assert (pieces.examples, pieces.steps_applied, pieces.loss_sum) == (
        *(whole.examples, whole.steps_applied),
        whole.loss_sum,
    )


@pytest.mark.parametrize("few", [1 / 3, 0.0], ids=["rows", "grams"])
def test_a_pass_for_sums_goes_on_too(prepared_in, values, tmp_path: Path, monkeypatch, few: float) -> None:
    """The sums over groups of rows, kept in either form, are the same however often the pass was stopped."""
    monkeypatch.setattr(feature_sums, "FEW_ROWS", few)
    blocks = (0, 1)
    prepared = prepared_in["float"].with_head(blocks, "mean")
    head = {name: np.zeros(shape, np.float32) for name, shape in shapes([prepared.manifest.head]).items()}
    task = tiny.make_task(
        prepared.package, slices=(), head="closed_form", features=blocks, pooling="mean", batch_size=2
    )
    work, start = work_of(prepared, task), {**values, **head}
    whole = gather_sums(work, start)
    path = tmp_path / "task.progress"
    with pytest.raises(WorkerError):
        gather_sums(work, start, keeper=Keeper(path, WORK, Signals(0)))
    with pytest.raises(WorkerError):
        gather_sums(work, start, keeper=Keeper(path, WORK, Signals(1)))
    pieces = gather_sums(work, start, keeper=Keeper(path, WORK, Signals(9)))
    assert encode_values(pieces.delta) == encode_values(whole.delta)
    assert (pieces.examples, pieces.loss_sum) == (whole.examples, whole.loss_sum)


def test_rows_that_changed_are_other_work(prepared_in, values) -> None:
    """A task whose rows, labels, settings or plan differ from before begins anew, since its bits would differ."""
    prepared = prepared_in["float"]
    task = tiny.make_task(prepared.package)
    examples = examples_of(prepared)

    def digest(task=task, examples=examples, *how: object) -> str:
        return TaskSession.open(task, prepared.manifest, values, examples).digest(*how)

    fewer = replace(examples, ids=examples.ids[:-1], labels=examples.labels[:-1])
    other_labels = replace(examples, labels=[*examples.labels[:-1], (examples.labels[-1] + 1) % 3])
    moved = replace(examples, ids=[*examples.ids[1:], examples.ids[0]])
    digests = {
        digest(),
        digest(examples=fewer),
        digest(examples=other_labels),
        digest(examples=moved),
        digest(msgspec.structs.replace(task, steps=task.steps + 1)),
        digest(task, examples, "row_int8"),
    }
    assert len(digests) == 6
    assert digest() == digest(tiny.make_task(prepared.package), examples_of(prepared))


def progress(number: int = 3) -> Progress:
    """Some progress."""
    return Progress(number, (0, 2), 8, 0.1 + 0.2, {"delta/a": np.arange(3, dtype=np.float32)})


def test_what_is_kept_comes_back_whole(tmp_path: Path) -> None:
    """Numbers and tensors come back bit by bit, for the same work alone."""
    path = tmp_path / "task.progress"
    with pytest.raises(WorkerError, match="before step 3"):
        Keeper(path, WORK, lambda: True).after_step(progress)
    found = Keeper(path, WORK, lambda: False).before()
    assert found is not None
    assert (found.number, found.applied, found.seen, found.loss_sum) == (3, (0, 2), 8, 0.1 + 0.2)
    assert found.tensors["delta/a"].tobytes() == np.arange(3, dtype=np.float32).tobytes()
    assert Keeper(path, OTHER, lambda: False).before() is None


def test_it_is_kept_from_time_to_time(tmp_path: Path) -> None:
    """Once a minute, for a power cut or a kill; the larger it is, the less often, for the flash's sake."""
    path, now = tmp_path / "task.progress", [0.0]
    keeper = Keeper(path, WORK, lambda: False, lambda: now[0])
    large = {"delta/a": np.zeros(1 << 20, np.float32)}
    written = []
    for now[0] in (WRITE_EVERY_S - 1, WRITE_EVERY_S, 2 * WRITE_EVERY_S, 5 * WRITE_EVERY_S, 6 * WRITE_EVERY_S):
        path.unlink(missing_ok=True)
        keeper.after_step(lambda: Progress(1, (0,), 8, 0.5, large))
        written.append(path.exists())
    assert written == [False, True, False, False, True]
    now[0] += 100 * WRITE_EVERY_S
    path.unlink()
    keeper.after_step(progress, from_time_to_time=False)
    assert not path.exists()


@pytest.mark.parametrize("data", [b"", b"nonsense", b"\x86\xa4work\xa1x", b"\xc1" * 100])
def test_a_file_that_cannot_be_read_begins_the_task_anew(tmp_path: Path, data: bytes) -> None:
    """Damage costs the progress and nothing else."""
    path = tmp_path / "task.progress"
    path.write_bytes(data)
    assert Keeper(path, WORK, lambda: False).before() is None


def test_a_full_disk_does_not_end_the_task(tmp_path: Path) -> None:
    """Where the file cannot be written the steps go on, and a stop is still a stop."""
    now = [0.0]
    keeper = Keeper(tmp_path / "nowhere" / "task.progress", WORK, lambda: False, lambda: now[0])
    now[0] = WRITE_EVERY_S
    keeper.after_step(progress)
    with pytest.raises(WorkerError, match="told to stop"):
        Keeper(tmp_path / "nowhere" / "task.progress", WORK, lambda: True).after_step(progress)
