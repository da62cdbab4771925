"""A coordinator's state as it is after months: many devices, a long run, others beside it.

Rows are written as they would stand there, so that pages are measured on a full history without playing it.
"""

from __future__ import annotations

import math
from pathlib import Path
from random import Random

import msgspec

from benchmarks.coordinator.site import SMALL, Site
from coordinator.config import run_config
from coordinator.rounds.runs import create_run
from coordinator.storage.stores import open_stores
from edge_runtime.protocol.messages import MemoryReport

#: Classes of devices, with the share of the fleet and the cap of each in MiB.
CLASSES = (("pi-4", 0.42, 320), ("pi-5", 0.28, 512), ("orin-nano", 0.18, 900), ("pi-zero-2w", 0.12, 128))
TROUBLES = (
    ("device_late", "its deadline has passed"),
    ("task_refused", "needs 402 MiB, the cap is 320 MiB"),
    ("out_of_memory", "the worker met its cap of 128 MiB in phase step"),
    ("not_eligible", "on_battery"),
    ("device_silent", "chosen, but did not check in"),
    ("task_failed", "the data file has no rows"),
)
MIB = 1 << 20


def fill(
    folder: Path, *, devices: int, rounds: int, per_round: int, now_s: float, runs: int = 3
) -> list[str]:
    """Fill a state folder; the ids of its runs, the one with so many rounds last.

    Args:
        folder: folder of state and package, made here.
        devices: number of devices.
        rounds: number of rounds of the last run, which goes on.
        per_round: number of results of each round.
        now_s: the present moment.
        runs: number of runs; those before the last have a tenth of its rounds and have finished.
    """
    site = Site(folder, SMALL, devices)
    random = Random(7)  # noqa: S311 - made-up figures
    stores = open_stores(site.state)
    ids = []
    table = {
        "package": str(folder / "package"),
        "publisher_key": site.publisher.public_key,
        "seed": 7,
        "devices_per_round": per_round,
        "steps": 8,
        "batch_size": 8,
    }
    kinds = random.choices(CLASSES, [share for _, share, _ in CLASSES], k=devices)
    with stores.storage.transaction() as connection:
        connection.executemany(
            "UPDATE devices SET class = ?, cap_bytes = ?, floor_bytes = ?, example_count = ?,"
            " runtime_version = '0.1.0', seen_s = ?, expected_s = ?, not_eligible = ? WHERE device_id = ?",
            [
                (
                    *(kind, cap * MIB, 41 * MIB, random.randrange(50, 5000)),
                    now_s - random.random() * 60,
                    now_s + 300 if random.random() < 0.93 else now_s - 90_000,
                    "on_battery" if random.random() < 0.04 else "",
                    device_id,
                )
                for device_id, (kind, _, cap) in zip(site.ids, kinds, strict=True)
            ],
        )
    names = ("lora-baseline", "lora-adam", "assistant-v3")
    for index in range(runs):
        is_last = index == runs - 1
        count = rounds if is_last else max(2, rounds // 10)
        config = run_config(
            {
                **table,
                "name": names[index % 3],
                "rounds": count + (count // 4 if is_last else 0),
                "server_optimizer": {"slices": {"name": ("sgd", "adam", "adam")[index % 3], "rate": 0.5}},
            }
        )
        run_id = create_run(stores, config, now_s=now_s - (runs - index) * 86_400)
        ids.append(run_id)
        opened_s = now_s - count * 240.0 - (0 if is_last else 86_400 * (runs - index - 1))
        with stores.storage.transaction() as connection:
            state, ended = ("running", None) if is_last else ("finished", opened_s + count * 240)
            connection.execute(
                "UPDATE runs SET state = ?, started_s = ?, finished_s = ?, committed = ?, next_round = ?, reason = ?"
                " WHERE run_id = ?",
                (state, opened_s, ended, count, count, "" if is_last else "all rounds committed", run_id),
            )
            for number in range(count + is_last):
                _round(connection, random, run_id, number, count, per_round, site.ids, kinds, opened_s, index)
    with stores.storage.transaction() as connection:
        connection.executemany(
            "INSERT INTO events (at_s, run_id, round, device, code, message) VALUES (?, ?, ?, ?, ?, ?)",
            [
                (
                    now_s - 20 * (devices // 5 - number),
                    ids[-1],
                    min(rounds - 1, number * rounds // max(1, devices // 5)),
                    f"device-{random.randrange(devices):05d}",
                    *random.choices(TROUBLES, [9, 4, 2, 6, 3, 1])[0],
                )
                for number in range(devices // 5)
            ],
        )
    stores.storage.close()
    return ids


def _round(connection, random, run_id, number, count, per_round, ids, kinds, begun_s, index):  # type: ignore[no-untyped-def]
    """One round with its tasks, results and evaluation; the one after the last is open."""
    is_open = number == count
    opened_s = begun_s + number * 240
    connection.execute(
        "INSERT INTO rounds (run_id, round, state, opened_s, deadline_s, closed_s, values_sha256, bytes_up, bytes_down)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(run_id, number, "collecting" if is_open else "committed", opened_s, opened_s + 600),
            *(None if is_open else opened_s + 150 + 60 * random.random(), "0" * 64),
            *(per_round * 4200, per_round * 1_300_000),
        ),
    )
    done = number / max(1, count)
    loss = 0.35 + (0.9 - 0.08 * index) * math.exp(-5 * done)
    for slot, place in enumerate(random.sample(range(len(ids)), per_round)):
        task_id = f"{run_id}-r{number}-s{slot}-a0"
        working = is_open and slot % 3
        connection.execute(
            'INSERT INTO slots (run_id, round, slot, slices) VALUES (?, ?, ?, \'["block0.query", "head"]\')',
            (run_id, number, slot),
        )
        connection.execute(
            "INSERT INTO tasks (task_id, run_id, round, slot, attempt, device_id, state, reserved_s, due_s)"
            " VALUES (?, ?, ?, ?, 0, ?, ?, ?, ?)",
            (
                *(task_id, run_id, number, slot, ids[place]),
                *("working" if working else "counted", opened_s, opened_s + 600),
            ),
        )
        if working:
            continue
        cap = kinds[place][2] * MIB
        predicted = int(cap * (0.72 + 0.1 * random.random()))
        memory = MemoryReport(predicted, int(predicted * (0.94 + 0.07 * random.random())), cap)
        connection.execute(
            "INSERT INTO results (task_id, change_sha256, examples, steps_applied, steps_skipped, mean_loss, seconds,"
            " memory, received_s, change_bytes) VALUES (?, ?, 64, 8, 0, ?, ?, ?, ?, 4200)",
            (
                *(task_id, "0" * 64, loss * (0.9 + 0.2 * random.random()), 20 + 90 * random.random()),
                *(msgspec.json.encode(memory).decode(), opened_s + 120),
            ),
        )
    if not is_open and (number % 5 == 0 or count < 40):
        connection.execute(
            "INSERT INTO evaluations (run_id, round, values_sha256, state, rows, accuracy, mean_loss, seconds)"
            " VALUES (?, ?, ?, 'done', 2000, ?, ?, 4.0)",
            (
                run_id,
                number,
                "0" * 64,
                0.93 - 0.55 * math.exp(-4 * done) + 0.004 * random.random(),
                loss * 0.96,
            ),
        )
