"""A run on a causal language model: what is asked of it, and what operators see. The evaluations are real workers."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import sqlite3
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console

from coordinator.admin.report import columns, headline, text_table, write_report
from coordinator.admin.watch import table
from coordinator.rounds import evaluation
from coordinator.rounds.summary import RunSummary
from coordinator.storage import migrations
from coordinator.storage.database import apply_migrations
from edge_runtime.data.batches import Tokenizer, make_batch
from edge_runtime.data.rows import Row
from edge_runtime.package.slices import encode_values
from tests.coordinator.conftest import World
from tests.edge_runtime.bigram import CORE, HIDDEN, Bigram, write_bigram

TEXTS = ("the cat sat", "the dog ran home", "home sat the dog the cat")
CHANGE = np.random.default_rng(1).normal(0, 0.2, (1, HIDDEN, HIDDEN)).astype(np.float32)


@pytest.fixture
def bigram(world: World) -> Bigram:
    """The coordinator's package is the hand-written language model; rows for evaluation lie beside it."""
    made = write_bigram(world.folder / "bigram", world.publisher)
    world.package = made.package.folder
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (world.folder / "dev.jsonl").write_text(rows)
    return made


def finished_run(world: World) -> RunSummary:
    """A run of one round whose one device moves the slice by ``CHANGE``, evaluated before and after."""
    (device,) = world.fleet("a")
    world.create_run(
        rounds=1,
        devices_per_round=1,
        min_devices=1,
        train_head=False,
        evaluation={"data": str(world.folder / "dev.jsonl"), "arithmetic": "float"},
    )
    world.play()
    task = device.task()
    assert task is not None
    assert not task.train_head
    data = encode_values({CORE: CHANGE})
    result = device.result(task, change=data, change_sha256=hashlib.sha256(data).hexdigest())
    assert device.deliver(result).json() == {"status": "counted"}
    world.play()
    while (waiting := evaluation.next_evaluation(world.stores)) is not None:
        outcome = asyncio.run(evaluation.evaluate(waiting))
        with world.stores.storage.transaction() as connection:
            evaluation.store_evaluation(connection, waiting, outcome, now_s=world.clock.now_s)
    return msgspec.convert(world.run(), RunSummary)


def loss_and_accuracy(bigram: Bigram, core: np.ndarray) -> tuple[float, float]:
    """Over all predicted tokens of the rows, by the closed form."""
    tokenizer = Tokenizer(bigram.package.path("tokenizer.json"), 16)
    batch = make_batch(tokenizer.encode([Row(text) for text in TEXTS]), None, pad_token_id=0)
    loss, right = bigram.loss(batch, core)
    return float((loss * batch.predicted).sum() / batch.predicted.sum()), float(
        right.sum() / batch.predicted.sum()
    )


def test_a_run_is_judged_by_perplexity(world: World, bigram: Bigram) -> None:
    """Before and after the round, a run tells loss over tokens, next-token accuracy and the exponential of the loss."""
    run = finished_run(world)
    assert (run.state, run.task) == ("finished", "causal_lm")
    before, accuracy_before = loss_and_accuracy(bigram, np.zeros((HIDDEN, HIDDEN)))
    after, accuracy_after = loss_and_accuracy(bigram, CHANGE[0])
    (only,) = run.rounds
    assert run.initial_perplexity == pytest.approx(math.exp(before), rel=1e-5)
    assert only.perplexity == pytest.approx(math.exp(after), rel=1e-5)
    assert (run.initial_accuracy, only.accuracy) == pytest.approx((accuracy_before, accuracy_after))
    assert only.perplexity != run.initial_perplexity


def test_operators_see_perplexity_in_the_place_of_accuracy(
    world: World, bigram: Bigram, tmp_path: Path
) -> None:
    """Watch, listing and report show the perplexity of each round; nowhere is there a column of accuracy."""
    run = finished_run(world)
    assert columns(run)[1] == "perplexity"
    shown = f"{run.rounds[0].perplexity:.3f}"
    console = Console(record=True, width=160)
    with console.capture() as capture:
        console.print(table(run, rows=5))
    for text in (capture.get(), text_table(run)):
        assert "perplexity" in text
        assert shown in text
        assert "accuracy" not in text
    assert headline(run).endswith(f"1 of 1 rounds, from {run.initial_perplexity:.3f} perplexity")
    write_report(run, [], tmp_path / "report")
    assert shown in (tmp_path / "report" / "report.txt").read_text()
    assert "perplexity" in (tmp_path / "report" / "curve.svg").read_text()
    document = json.loads((tmp_path / "report" / "report.json").read_text())["run"]
    assert document["rounds"][0]["perplexity"] == run.rounds[0].perplexity


def test_a_head_cannot_be_asked_for(world: World, bigram: Bigram) -> None:
    """A run that would train the head of a package without one is refused with what to change; nothing is stored."""
    before = world.dump()
    answer = world.admin("POST", "/v1/admin/runs", world.config(train_head=True))
    assert answer.status_code == 422
    assert "set train_head = false" in answer.json()["message"]
    assert world.dump() == before


def test_a_loss_beyond_numbers_has_no_perplexity(world: World, bigram: Bigram) -> None:
    """A perplexity that no float can hold is left out; the loss is still told."""
    run = finished_run(world)
    with world.stores.storage.transaction() as connection:
        connection.execute("UPDATE evaluations SET mean_loss = 1e4")
    (only,) = msgspec.convert(world.run(), RunSummary).rounds
    assert (only.perplexity, only.loss) == (None, 1e4)
    assert run.rounds[0].perplexity is not None


def test_evaluations_of_an_older_database_are_of_rows() -> None:
    """An evaluation that was stored before tokens were counted is kept, and is no mean over tokens."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    earlier, migrations_all = (migrations.create_devices, migrations.create_runs), migrations.ALL
    assert migrations_all[:2] == earlier
    for step in earlier:
        step(connection)
    connection.execute("CREATE TABLE migrations (name TEXT PRIMARY KEY, applied_s REAL NOT NULL)")
    connection.executemany("INSERT INTO migrations VALUES (?, 0)", [(step.__name__,) for step in earlier])
    connection.execute(
        "INSERT INTO evaluations (run_id, round, values_sha256, state, rows, accuracy, mean_loss)"
        " VALUES ('r', 0, 'x', 'done', 5, 0.5, 1.0)"
    )
    assert "count_evaluated_tokens" in apply_migrations(connection)
    assert connection.execute("SELECT rows, accuracy, tokens FROM evaluations").fetchone() == (5, 0.5, 0)
    connection.close()
