"""The publisher's folder of the end-to-end tests, and one coordinator that is shown every fault."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.end_to_end.harness import Fleet
from tests.end_to_end.workshop import Workshop, open_workshop


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """The publisher's folder, made once and shared with the end-to-end tests."""
    return open_workshop(tmp_path_factory.getbasetemp() / "workshop")


@pytest.fixture(scope="session")
def site(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A running coordinator with a run of one place that waits for its device."""
    with Fleet(tmp_path_factory.mktemp("site") / "fleet", workshop.package()) as fleet:
        fleet.create_run(devices_per_round=1, min_devices=1, min_results=1, rounds=1)
        yield fleet
