"""A run's scalars as TensorBoard reads them; its writer loads torch where there is one."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from coordinator import cli
from tests.coordinator.conftest import World


def scalars_of(path: Path) -> dict[tuple[str, int], float]:
    """Scalars of an event file, its records' lengths read by hand."""
    data, found, at = path.read_bytes(), {}, 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12 : at + 12 + length])
        for value in event.summary.value:
            if value.WhichOneof("value") == "simple_value":
                found[value.tag, event.step] = value.simple_value
        at += 12 + length + 4
    return found


def test_scalars_are_read_back_from_the_event_file(finished: World, tmp_path: Path) -> None:
    """What TensorBoard would plot is what the run's rounds say; a second time is refused."""
    assert cli.main(["run", "export", "--state", "s", "--tensorboard", str(tmp_path)]) == 0
    run = finished.run()
    (path,) = (tmp_path / run["run_id"]).glob("events.out.tfevents.*")
    found = scalars_of(path)
    for entry in run["rounds"]:
        assert found["devices/results", entry["round"] + 1] == entry["results"]
        assert found["devices/train_loss", entry["round"] + 1] == pytest.approx(entry["train_loss"])
        assert found["traffic/bytes_up", entry["round"] + 1] == entry["bytes_up"]
    assert cli.main(["run", "export", "--state", "s", "--tensorboard", str(tmp_path)]) == 11
