"""The workshop, fleets that clean up after themselves, and one undisturbed run that others are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from coordinator.rounds.summary import RunSummary
from tests.end_to_end.harness import Fleet
from tests.end_to_end.recorder import Recorder
from tests.end_to_end.workshop import Exported, Workshop, open_workshop, rows, write_rows

#: Names of the devices, and a word in one row of each that occurs nowhere else.
SECRETS = {"ash": "zebrafish-4471", "birch": "periwinkle-0093", "cedar": "quicksand-8216"}


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """The publisher's folder, made once."""
    return open_workshop(tmp_path_factory.getbasetemp() / "workshop")


@pytest.fixture
def start_fleet(workshop: Workshop, tmp_path: Path) -> Iterator[Callable[..., Fleet]]:
    """Starts a coordinator with a run and three devices; keywords change the run's configuration."""
    with ExitStack() as stack:

        def start(*, package: Exported | None = None, **changes: object) -> Fleet:
            fleet = stack.enter_context(Fleet(tmp_path / "fleet", package or workshop.package()))
            fleet.create_run(**changes)
            add_devices(fleet)
            return fleet

        yield start


def device_rows(name: str) -> list[dict[str, str]]:
    """The rows of one of the three devices; the last one holds its secret."""
    start = 40 + 24 * list(SECRETS).index(name)
    return [
        *rows()[start : start + 24],
        {"text": f"where is my {SECRETS[name]} card", "label": "card_arrival"},
    ]


def add_devices(fleet: Fleet) -> None:
    """Start the three devices, each with rows of its own."""
    for name in SECRETS:
        fleet.add_device(name, device_rows(name))


@dataclass(frozen=True)
class Finished:
    """What a finished run left behind; ``folder`` is its fleet's."""

    folder: Path
    run: RunSummary
    slices: bytes
    watched: str
    exit_codes: dict[str, int]
    up: bytes
    down: bytes


@pytest.fixture(scope="session")
def undisturbed(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run of three rounds, operated by the commands of the tutorial; all its traffic is recorded."""
    folder = tmp_path_factory.mktemp("undisturbed")
    dev = write_rows(folder / "dev.jsonl", rows()[:40])
    with Fleet(folder, workshop.package(), audit=True) as fleet:
        with closing(Recorder(int(fleet.url.rpartition(":")[2]))) as recorder:
            fleet.device_url = recorder.url
            fleet.create_run(evaluation={"data": dev})
            add_devices(fleet)
            watched = fleet.operate("run", "watch").stdout
            run = fleet.wait_until_finished()
            for words in (("report",), ("fetch-slices",)):
                done = fleet.operate("run", *words, "--output", folder / words[0])
                assert done.returncode == 0, done.stderr
            exit_codes = {device.name: device.program.stop() for device in fleet.devices.values()}
        exit_codes["coordinator"] = fleet.coordinator.stop()
    return Finished(
        folder=folder,
        run=run,
        slices=(folder / "fetch-slices").read_bytes(),
        watched=watched,
        exit_codes=exit_codes,
        up=b"\n".join(recorder.up),
        down=b"\n".join(recorder.down),
    )
