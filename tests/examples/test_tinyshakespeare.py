"""The Shakespeare demonstration's data and run, without training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coordinator.config import read_run_config
from edge_runtime.data.rows import load_rows
from edge_runtime.protocol.signing import generate_key
from examples.fleet import complete_run_config
from examples.tinyshakespeare.prepare import DEV_ROWS, HERE, prepare


def speakers() -> dict[str, list[str]]:
    """The shipped passages of each speaker."""
    found: dict[str, list[str]] = {}
    for line in (HERE / "lines.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["speaker"], []).append(row["text"])
    return found


def texts(path: Path) -> list[str]:
    """Rows as a device reads them."""
    return [row.text for row in load_rows(path, ())]


def test_a_device_holds_the_words_of_its_speakers(tmp_path) -> None:
    """Ten devices hold one speaker each; what is held out is no device's, and nothing is lost."""
    split = prepare(tmp_path / "data")
    dev = texts(split.dev)
    for passages, path in zip(speakers().values(), split.devices, strict=True):
        held = texts(path)
        assert len(held) == len(passages) - DEV_ROWS
        assert sorted(held + [text for text in dev if text in passages and text not in held]) == sorted(
            passages
        )
    assert len(dev) == DEV_ROWS * len(split.devices)


def test_speakers_are_shared_among_fewer_devices(tmp_path) -> None:
    """Three devices hold all that ten held, and the same seed gives the same files."""
    few, many, again = (prepare(tmp_path / name, n) for name, n in (("few", 3), ("many", 10), ("again", 3)))
    held = [sorted(text for path in split.devices for text in texts(path)) for split in (few, many)]
    assert held[0] == held[1]
    assert few.dev.read_bytes() == many.dev.read_bytes()
    assert [p.read_bytes() for p in few.devices] == [p.read_bytes() for p in again.devices]


def test_more_devices_than_speakers_are_refused(tmp_path) -> None:
    """A fleet in which some device would hold nothing is refused with the largest that works."""
    with pytest.raises(SystemExit, match="for 1 to 10 devices"):
        prepare(tmp_path / "data", 11)


def test_the_run_is_one_that_a_coordinator_takes(tmp_path) -> None:
    """The completed run.toml is a valid configuration for a language model, with this fleet's numbers in it."""
    key = generate_key().public_key
    path = complete_run_config(
        HERE / "run.toml", tmp_path, tmp_path / "package", key, tmp_path / "dev.jsonl", devices=7, rounds=2
    )
    config = read_run_config(path)
    assert (config.min_devices, config.rounds, config.train_head) == (7, 2, False)
    assert config.evaluation is not None
    assert config.evaluation.data == str(tmp_path / "dev.jsonl")
    assert config.package == str(tmp_path / "package")
    assert config.publisher_key == key
