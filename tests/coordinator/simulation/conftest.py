"""Configurations on the hand-written language model, and the sweeps that run them."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from coordinator.simulation.config import read_simulation_config
from coordinator.simulation.record import Record
from coordinator.simulation.report.progress import Lines
from coordinator.simulation.sweep import Options, make_plan, sweep
from edge_runtime.protocol.signing import generate_key
from tests.edge_runtime.bigram import WORDS, write_bigram

BASE: dict[str, Any] = {
    "name": "tiny",
    "seeds": [0],
    "fleet": {"devices": 8, "cap": "512M", "arithmetic": "float"},
    "data": {"train": "train.jsonl", "dev": "dev.jsonl", "partition": "iid", "rows_per_device": 8},
    "run": {
        "rounds": 6,
        "devices_per_round": 3,
        "steps": 2,
        "batch_size": 4,
        "train_head": False,
        "deadline_s": 60.0,
        "server_optimizer": {"slices": {"name": "sgd", "rate": 0.1}},
        "evaluation": {"every_rounds": 2},
    },
    "arms": [{"name": "ours", "package": "bigram"}],
}


def toml(table: dict[str, Any], where: str = "") -> str:
    """A table as TOML; lists of tables and tables within tables included."""
    plain, nested = [], []
    for key, value in table.items():
        path = f"{where}.{key}" if where else key
        if isinstance(value, dict):
            nested.append(f"[{path}]\n{toml(value, path)}")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            nested += [f"[[{path}]]\n{toml(entry, path)}" for entry in value]
        else:
            plain.append(f"{key} = {json.dumps(value)}\n")
    return "".join(plain) + "".join(nested)


class Workshop:
    """A folder with package, rows and configuration files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bigram").mkdir()
        write_bigram(folder / "bigram", generate_key())
        chance = random.Random(0)
        for name, count in (("train", 120), ("dev", 12)):
            texts = [" ".join(chance.choices(WORDS[2:], k=chance.randint(2, 9))) for _ in range(count)]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))

    def write(self, **changes: Any) -> Path:
        """A configuration file; ``changes`` replace whole tables, ``run`` and ``fleet`` key by key."""
        table = {**BASE, **changes}
        for key in ("run", "fleet", "data"):
            table[key] = {**BASE[key], **changes.get(key, {})}
            table[key] = {name: value for name, value in table[key].items() if value is not None}
        path = self.folder / "sim.toml"
        path.write_text(toml(table))
        return path

    def simulate(self, output: str = "out", *, path: Path | None = None, **changes: Any) -> list[Record]:
        """Simulate a configuration; the records of all its arms."""
        config = read_simulation_config(path or self.write(**changes))
        options = Options(self.folder / output, threads=1)
        return sweep(make_plan(config, options), Lines(io.StringIO()))


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    """A fresh folder."""
    return Workshop(tmp_path)


def timeless(record: Record) -> Record:
    """A record without what a clock on the wall had a part in."""
    replace = msgspec.structs.replace
    return replace(record, points=tuple(replace(point, wall_s=0.0) for point in record.points))
