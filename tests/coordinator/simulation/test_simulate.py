"""Whole arms: schedules, drop-outs, deadlines, resumption, divergence, against the daemon's own parts."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from coordinator.aggregation.mean import Contribution, apply_deltas, mean_delta
from coordinator.rounds.runs import trained_slices
from coordinator.simulation.config import read_simulation_config
from coordinator.simulation.fleet import Fleet
from coordinator.simulation.labelled_rows import read_labelled_rows
from coordinator.simulation.partition import partition
from edge_runtime.errors import ConfigError
from edge_runtime.memory.meter import Meter
from edge_runtime.package.package import Package
from edge_runtime.package.slices import decode_values, encode_values
from edge_runtime.protocol.messages import Task
from edge_runtime.worker.jobs import TrainJob
from edge_runtime.worker.main import train
from tests.coordinator.simulation.conftest import Workshop, timeless

DROPS = {"dropout": {"rate": 0.3}}
#: Steps with every second result of four devices that are of very unlike speed.
BUFFERED = {"devices_per_round": 4, "buffer_size": 2, "max_staleness": 3}
UNLIKE = {"overhead_s": 0.0, "seconds_per_example": 0.5, "spread": "exponential"}


def database(workshop: Workshop, name: str = "out/state/ours-seed0") -> sqlite3.Connection:
    """An arm's database, read as it lies."""
    connection = sqlite3.connect(workshop.folder / name / "coordinator.db")
    connection.row_factory = sqlite3.Row
    return connection


def test_one_seed_gives_one_schedule_and_one_result(workshop: Workshop) -> None:
    """Two fresh simulations of a seed agree in every field but the time on the wall; another seed differs."""
    (first,) = workshop.simulate("a", **DROPS)
    (again,) = workshop.simulate("b", **DROPS)
    (other,) = workshop.simulate("c", **DROPS, seeds=[1])
    assert timeless(first) == timeless(again)
    assert first.status == "finished"
    assert first.rounds == 6
    assert [point.round for point in first.points] == [-1, 1, 3, 5]
    assert other.schedule_sha256 != first.schedule_sha256
    assert other.values_sha256 != first.values_sha256


def test_arms_of_a_seed_meet_the_same_devices(workshop: Workshop) -> None:
    """Arms whose slots are equal have one schedule, drop-outs included, though they take different times."""
    arms = [
        {"name": "one", "package": "bigram"},
        {"name": "four", "package": "bigram", "run": {"draws": 4}},
    ]
    one, four = workshop.simulate(**DROPS, arms=arms)
    assert one.schedule_sha256 == four.schedule_sha256
    assert one.values_sha256 != four.values_sha256
    assert four.points[-1].forward_passes == one.points[-1].forward_passes / 2 * 5
    assert four.points[-1].virtual_s > one.points[-1].virtual_s


def test_values_are_those_of_workers_and_the_mean(workshop: Workshop, tmp_path: Path) -> None:
    """The simulation ends with the bytes that the worker's own training, the mean and the server's step give."""
    (record,) = workshop.simulate(run={"rounds": 3, "draws": 2})
    packages = next((workshop.folder / "out" / "packages").glob("[0-9a-f]*"))
    config = read_simulation_config(workshop.folder / "sim.toml")
    run = config.run_of(config.arms[0], 0, "A" * 43 + "=")
    rows = (workshop.folder / "train.jsonl").read_text().splitlines(keepends=True)
    shares = partition(read_labelled_rows(workshop.folder / "train.jsonl"), config.data, 8, 0)
    fleet = Fleet(shares, config.speed, config.dropout, 0)
    with database(workshop) as connection:
        tasks = connection.execute(
            "SELECT round, task, name FROM tasks JOIN devices USING (device_id) WHERE state = 'counted'"
            " ORDER BY round, slot"
        ).fetchall()
    package = Package.open_unsigned(packages)
    manifest = package.manifest
    values = decode_values(package.path(manifest.initial_state).read_bytes(), manifest.slices)
    moments: dict[str, Any] = {}
    assert trained_slices(run, manifest)
    for number in range(3):
        contributions = []
        for row in (row for row in tasks if row["round"] == number):
            data, state, delta = (tmp_path / name for name in ("rows.jsonl", "state", "delta"))
            data.write_text("".join(rows[index] for index in fleet.devices[row["name"]].rows))
            state.write_bytes(encode_values(values))
            task = msgspec.json.decode(row["task"], type=Task)
            job = TrainJob(
                package_folder=str(packages),
                package_sha256=package.sha256,
                prepared_folder=str(workshop.folder / "out" / "prepared" / package.sha256),
                state_path=str(state),
                data_path=str(data),
                delta_path=str(delta),
                task=task,
                cap_bytes=1 << 40,  # this process has imported far more than a worker
            )
            outcome = train(job, Meter())
            specs = [manifest.slice_named(name) for name in task.slices]
            contributions.append(Contribution(outcome.examples, decode_values(delta.read_bytes(), specs)))
        assert len(contributions) == 3
        values, moments = apply_deltas(
            values,
            moments,
            mean_delta(contributions),
            head=frozenset(),
            optimizers=run.server_optimizer,
        )
    stored = workshop.folder / "out/state/ours-seed0/blobs" / record.values_sha256[:2] / record.values_sha256
    assert stored.read_bytes() == encode_values(values)


def test_devices_that_drop_out_are_replaced_in_virtual_time(workshop: Workshop) -> None:
    """Slots of silent devices go to others once the deadline has passed on the simulated clock alone."""
    started = time.monotonic()
    (record,) = workshop.simulate(**DROPS, run={"deadline_s": 3000.0})
    assert time.monotonic() - started < 60
    with database(workshop) as connection:
        tasks = connection.execute("SELECT * FROM tasks ORDER BY round, slot, attempt").fetchall()
    late = [task for task in tasks if task["reason"] == "late"]
    assert late
    assert record.points[-1].virtual_s > 3000
    for task in late:
        after = [t for t in tasks if (t["round"], t["slot"]) == (task["round"], task["slot"])]
        assert len(after) > 1
        assert task["device_id"] not in {t["device_id"] for t in after if t is not task}


def test_slow_devices_miss_the_deadline_and_are_refused(workshop: Workshop) -> None:
    """A result after the deadline is not counted; the round closes with those that came in time."""
    speed = {"overhead_s": 0.0, "seconds_per_example": 1.0, "spread": "exponential"}
    (record,) = workshop.simulate(speed=speed, run={"deadline_s": 16.0, "rounds": 3, "max_abandoned": 100})
    with database(workshop) as connection:
        late = connection.execute("SELECT count(*) FROM tasks WHERE reason = 'late'").fetchone()[0]
        lost = connection.execute(
            "SELECT count(*) FROM results JOIN tasks USING (task_id) WHERE state != 'counted'"
        ).fetchone()[0]
    assert (record.status, record.rounds) == ("finished", 3)
    assert late > 0
    assert lost == 0


def test_a_buffered_arm_does_not_wait_for_the_slow(workshop: Workshop) -> None:
    """Results enter later rounds than their task's; weights and scalars end in the same bytes, again and again."""
    (waiting,) = workshop.simulate("waiting", speed=UNLIKE, run={"devices_per_round": 4})
    (first,) = workshop.simulate("a", speed=UNLIKE, run=BUFFERED)
    with database(workshop, "a/state/ours-seed0") as connection:
        ages = connection.execute("SELECT entered - round FROM results JOIN tasks USING (task_id)").fetchall()
    assert 0 < max(age for (age,) in ages) <= BUFFERED["max_staleness"]
    assert first.points[-1].virtual_s < waiting.points[-1].virtual_s
    (again,) = workshop.simulate("b", speed=UNLIKE, run=BUFFERED)
    (scalars,) = workshop.simulate("c", speed=UNLIKE, run={**BUFFERED, "report": "scalars"})
    assert timeless(again) == timeless(first)
    assert scalars.values_sha256 == first.values_sha256


@pytest.mark.parametrize("run", [{}, {**BUFFERED, "report": "scalars"}], ids=["waiting", "buffered"])
def test_a_simulation_that_is_killed_ends_as_if_it_had_not_been(
    workshop: Workshop, run: dict[str, Any]
) -> None:
    """After kill -9 at many moments the same command ends with the same record, field by field."""
    path = workshop.write(**DROPS, run={"rounds": 25, **run})
    (whole,) = workshop.simulate("whole", path=path)
    command = [
        sys.executable, "-m", "coordinator.cli", "simulate", str(path),
        "--output", str(workshop.folder / "cut"), "--threads", "1",
    ]  # fmt: skip
    root = Path(__file__).parents[3]
    clock = workshop.folder / "cut/state/ours-seed0/coordinator.db-wal"
    kills = 0
    for pause_s in (0.01, 0.05, 0.12, 0.2, 0.3):
        with subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and not clock.exists():
                time.sleep(0.005)
            time.sleep(pause_s)
            process.kill()
            kills += process.wait() == -signal.SIGKILL
    assert kills >= 2
    (cut,) = workshop.simulate("cut", path=path)
    assert timeless(cut) == timeless(whole)
    assert cut.points[-1].wall_s > 0


def test_an_arm_that_has_ended_is_not_simulated_again(workshop: Workshop) -> None:
    """The same command again changes nothing; another configuration into the same folder is refused by name."""
    (first,) = workshop.simulate()
    record = workshop.folder / "out/arms/ours-seed0.json"
    written = record.stat().st_mtime_ns
    assert workshop.simulate() == [first]
    assert record.stat().st_mtime_ns == written
    with pytest.raises(ConfigError, match=r"ours-seed0.* is of another configuration"):
        workshop.simulate(run={"steps": 3})


def test_an_arm_that_diverges_is_reported_and_others_go_on(workshop: Workshop) -> None:
    """Values that run away end their arm as diverged, with the round and the loss; the next arm finishes."""
    wild = {"local_optimizer": {"slice_rate": 1e5}}
    arms = [
        {"name": "wild", "package": "bigram", "run": wild},
        {"name": "ours", "package": "bigram"},
    ]
    first, second = workshop.simulate(arms=arms)
    assert (first.status, first.round) == ("diverged", 1)
    assert "evaluation loss" in first.reason
    assert second.status == "finished"
    (workshop.folder / "out/arms/wild-seed0.json").unlink()
    assert timeless(workshop.simulate(arms=arms)[0]) == timeless(first)  # its state folder says so too


def test_an_arm_that_overflows_is_reported_as_diverged(workshop: Workshop) -> None:
    """Changes beyond float32 are refused by the coordinator, and the arm ends as diverged in that round."""
    rates = {"local_optimizer": {"slice_rate": 1e6, "name": "sgd"}, "steps": 40, "max_abandoned": 1}
    (record,) = workshop.simulate(run=rates)
    assert record.status == "diverged"
    assert record.round in (-1, 0, 1)


def test_an_error_in_one_arm_leaves_the_others_alone(workshop: Workshop) -> None:
    """An arm that the coordinator gives up is failed with its words and tried again the next time."""
    # Nobody is fast enough for a deadline of a tenth of a second.
    arms = [
        {"name": "hasty", "package": "bigram", "run": {"deadline_s": 0.1}},
        {"name": "ours", "package": "bigram"},
    ]
    hasty, ours = workshop.simulate(arms=arms)
    assert (hasty.status, ours.status) == ("failed", "finished")
    assert "rounds abandoned in a row" in hasty.reason
    assert workshop.simulate(arms=arms)[0].status == "failed"


def test_results_do_not_depend_on_where_the_sums_were_kept(workshop: Workshop) -> None:
    """Bytes up are those of the encoded results and check-ins; bytes down hold state and task of every slot."""
    (record,) = workshop.simulate()
    with database(workshop) as connection:
        up, down = connection.execute("SELECT sum(bytes_up), sum(bytes_down) FROM rounds").fetchone()
        task_bytes = connection.execute("SELECT sum(length(task)) FROM tasks").fetchone()[0]
    assert (record.points[-1].bytes_up, record.points[-1].bytes_down) == (up, down)
    state_bytes = len(encode_values({"block_0.mix/core": np.zeros((1, 6, 6), np.float32)}))
    assert down > task_bytes + record.tasks * state_bytes
    assert up > record.results * state_bytes
