"""Learning under noise: loss of a small language model in a simulated fleet, by ε and by who adds the noise.

The model is the hand-written one of the tests, of which one matrix of 36 numbers is trained: what noise does to
learning hangs on the numbers that are trained, the devices of a round and the rounds, and these are simulated in
minutes.
"""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

from benchmarks.harness.result_file import Figure, figure
from coordinator.simulation.config import read_simulation_config
from coordinator.simulation.report.progress import Lines
from coordinator.simulation.sweep import Options, make_plan, sweep
from edge_runtime.protocol.signing import generate_key

DEVICES, PER_ROUND, ROUNDS, CLIP_NORM = 100, 25, 12, 0.5
SEEDS = (0,)
#: ε of each arm, and who adds the noise; no settings are no privacy.
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "server, eps 32": {"epsilon": 32.0},
    "server, eps 8": {"epsilon": 8.0},
    "server, eps 2": {"epsilon": 2.0},
    "server, eps 8, 4 rounds each": {"epsilon": 8.0, "most_rounds": 4},
    "device, eps 8": {"epsilon": 8.0, "where": "device"},
}


def measure(folder: Path) -> list[Figure]:
    """Dev loss after all rounds of each arm."""
    from tests.edge_runtime.bigram import WORDS, write_bigram

    (folder / "bigram").mkdir()
    write_bigram(folder / "bigram", generate_key())
    chance = random.Random(0)  # noqa: S311 - texts, no secrets
    # Each word is followed by the next of the list in four of five cases, so that there is something to learn.
    for name, count in (("train", 4000), ("dev", 200)):
        lines = []
        for _ in range(count):
            at = chance.randrange(2, len(WORDS))
            words = [WORDS[at]]
            for _ in range(chance.randint(3, 8)):
                follows = 2 + (at - 1) % (len(WORDS) - 2)
                at = follows if chance.random() < 0.8 else chance.randrange(2, len(WORDS))
                words.append(WORDS[at])
            lines.append(json.dumps({"text": " ".join(words)}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))
    (folder / "sim.toml").write_text(_configuration())
    config = read_simulation_config(folder / "sim.toml")
    records = sweep(make_plan(config, Options(folder / "out", threads=1)), Lines(io.StringIO()))
    rows = []
    starts = [record.points[0].loss for record in records if record.arm == "a0"]
    rows.append(figure("loss before training", "", [float(loss) for loss in starts if loss is not None]))
    for number, name in enumerate(ARMS):
        losses = [record.points[-1].loss for record in records if record.arm == f"a{number}"]
        rows.append(figure(f"loss: {name}", "", [float(loss) for loss in losses if loss is not None]))
    return rows


def conditions() -> dict[str, Any]:
    """What else is needed to measure the same again."""
    return {
        "devices": DEVICES,
        "devices a round": PER_ROUND,
        "rounds": ROUNDS,
        "rows a device": 20,
        "numbers": 36,
        "clip_norm": CLIP_NORM,
        "delta": 1e-3,
        "seeds": list(SEEDS),
    }


def _configuration() -> str:
    lines = [
        'name = "noise"',
        f"seeds = {list(SEEDS)}",
        "[fleet]",
        f"devices = {DEVICES}",
        'cap = "512M"',
        'arithmetic = "float"',
        "[data]",
        'train = "train.jsonl"',
        'dev = "dev.jsonl"',
        'partition = "iid"',
        "rows_per_device = 20",
        "[run]",
        f"rounds = {ROUNDS}",
        f"devices_per_round = {PER_ROUND}",
        f"min_devices = {DEVICES}",
        f"min_results = {PER_ROUND // 2}",
        "steps = 2",
        "batch_size = 8",
        "draws = 4",
        'directions = "per_example"',
        "train_head = false",
        "deadline_s = 600.0",
        f"evaluation = {{ every_rounds = {ROUNDS} }}",
        'server_optimizer = { slices = { name = "sgd", rate = 1.0 } }',
        'local_optimizer = { name = "accumulate", slice_rate = 0.5 }',
    ]
    for number, settings in enumerate(ARMS.values()):
        lines += ["[[arms]]", f'name = "a{number}"', 'package = "bigram"']
        if settings:
            privacy = {"delta": 1e-3, "clip_norm": CLIP_NORM, **settings}
            lines += [
                "[arms.run.privacy]",
                *(f"{key} = {json.dumps(value)}" for key, value in privacy.items()),
            ]
    return "\n".join(lines) + "\n"
