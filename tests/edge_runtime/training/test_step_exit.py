from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from edge_runtime.data.batches import Row, Tokenizer
from edge_runtime.data.examples import Examples
from edge_runtime.engines.onnxruntime_engine import OnnxEngine
from edge_runtime.errors import ConfigError
from edge_runtime.execution.executor import Executor
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.protocol.messages import LocalOptimizer, Task
from edge_runtime.protocol.signing import generate_key
from edge_runtime.training.loop import Trained
from edge_runtime.training.methods import check_method, check_task
from edge_runtime.training.replay import replay
from edge_runtime.training.step_exit import step_exit, within
from tests.edge_runtime.exit_model import CORES, FIRST, SECOND, start_values, write_exit_model
from tests.edge_runtime.golden.tangents import TASK
from tests.edge_runtime.local import both_reports, train
from tests.edge_runtime.ranked_bigram import prepare_here

TEXTS = ("the cat sat home", "the dog ran", "cat sat", "the dog sat home")
BOTH = (1, 2)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedPackage:
    package = write_exit_model(tmp_path_factory.mktemp("exits"), generate_key())
    return prepare_here(package, tmp_path_factory.mktemp("prepared") / "it")


def examples_of(prepared: PreparedPackage) -> Examples:
    tokenizer = Tokenizer(prepared.package.path("tokenizer.json"), 16)
    return Examples(tokenizer.encode([Row(text) for text in TEXTS]), [0, 1, 0, 1], 0, 16)


def make_task(**changes: object) -> Task:
    settings = {
        "slices": (FIRST, SECOND),
        "train_head": True,
        "steps": 1,
        "batch_size": 4,
        "draws": 3,
        "sequence_limit": 16,
        "directions": "one_slice",
        "optimizer": LocalOptimizer("accumulate", 1.0, 1.0),
        "exits": BOTH,
        "features": (2,),
        **changes,
    }
    return replace(TASK, **settings)


def trained(prepared: PreparedPackage, task: Task) -> Trained:
    seen = prepared.with_head(task.features, task.pooling)
    return train(seen, task, start_values(0.5), examples=examples_of(prepared))


def slot_that_leaves_at(block: int) -> int:
    return next(slot for slot in range(20) if step_exit(make_task(slot=slot), 0) == block)


@pytest.mark.parametrize("block", BOTH)
def test_an_exit_is_the_model_cut_off_behind_its_block(prepared: PreparedPackage, block: int) -> None:
    """Leaving behind a block gives, bit for bit, what a model does whose head reads that block, and runs no other."""
    batch = examples_of(prepared).batch(range(len(TEXTS)))
    deep = Executor(prepared.with_head((2,), "package"), OnnxEngine())
    ran: list[int] = []
    deep.observe = lambda _: ran.append(1)
    deep.leave_at(block)
    found = deep.sweep(start_values(0.5), [batch])
    assert len(ran) == 1 + block
    own = Executor(prepared.with_head((block,), "package"), OnnxEngine())
    expected = own.sweep(start_values(0.5), [batch])
    assert found.logits.tobytes() == expected.logits.tobytes()
    assert found.loss.tobytes() == expected.loss.tobytes()


def test_a_shallow_step_leaves_later_slices_alone_and_runs_less(prepared: PreparedPackage) -> None:
    """A step to the first exit is that of a device that has no other; one to the second moves both slices."""
    shallow = trained(prepared, make_task(slot=slot_that_leaves_at(1))).delta
    assert not shallow[CORES[1]].any()
    alone = make_task(slot=slot_that_leaves_at(1), slices=(FIRST,), exits=(1,), features=(1,))
    only = trained(prepared, alone).delta
    for name in (CORES[0], "head/weight", "head/bias"):
        assert shallow[name].any()
        assert shallow[name].tobytes() == only[name].tobytes()
    deep = trained(prepared, make_task(slot=slot_that_leaves_at(2))).delta
    assert deep[CORES[0]].any()
    assert deep[CORES[1]].any()


def test_with_the_last_exit_alone_it_is_ordinary_training(prepared: PreparedPackage) -> None:
    """A run whose only exit is the last block ends in the bits of one whose head reads that block."""
    exits = trained(prepared, make_task(steps=3, exits=(2,))).delta
    plain = trained(prepared, make_task(steps=3, exits=())).delta
    assert {name: array.tobytes() for name, array in exits.items()} == {
        name: array.tobytes() for name, array in plain.items()
    }


def test_exits_are_drawn_evenly_and_scalars_are_replayed(prepared: PreparedPackage) -> None:
    """Each exit comes about as often, slots draw their own, and a report of scalars makes the same bits again."""
    task = make_task(steps=400)
    drawn = [step_exit(task, number) for number in range(400)]
    assert drawn.count(1) == pytest.approx(200, abs=45)
    assert drawn != [step_exit(replace(task, slot=5), number) for number in range(400)]
    task = make_task(steps=6)
    seen = prepared.with_head((2,), "package")
    weights, scalars = both_reports(seen, task, start_values(0.5), examples=examples_of(prepared))
    made = replay(task, seen.manifest.slices, start_values(0.5), scalars.delta)
    for name in CORES:
        assert weights.delta[name].any()
        assert weights.delta[name].tobytes() == made[name].tobytes()
    reached = [len(within(task, seen.manifest.slices, number)) for number in range(6)]
    assert sorted(set(reached)) == [2, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exits": (2, 1)}, "once and in order, from 1"),
        ({"exits": (0, 1), "features": ()}, "once and in order, from 1"),
        ({"features": (0, 2)}, "leave features out"),
        ({"update": "backprop", "draws": 1}, '"forward" or "zero_order"'),
        ({"head": "closed_form"}, "leave exits out"),
        ({"directions": "filtered"}, "take other directions"),
    ],
)
def test_what_exits_do_not_go_with_is_refused(changes: dict[str, Any], message: str) -> None:
    """Exits out of order, and settings that would compare or solve over unlike exits, are one clear line each."""
    with pytest.raises(ConfigError, match=message):
        check_method(make_task(**changes))


def test_an_exit_that_is_not_there_is_refused(prepared: PreparedPackage) -> None:
    """An exit behind the last block is refused with the blocks that there are, and one before all slices too."""
    with pytest.raises(ConfigError, match=r"from 0 \(the embedding's output\) to 2"):
        check_task(make_task(exits=(1, 3), features=(3,)), prepared.manifest)
    with pytest.raises(ConfigError, match="no slice lies before block 1, the first of exits"):
        check_task(make_task(slices=(SECOND,)), prepared.manifest)
