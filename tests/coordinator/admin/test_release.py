"""``edge-coordinator release``: what it asks for, and what it tells."""

from __future__ import annotations

import argparse

import pytest

from coordinator.admin.release import release_line, release_list, release_request
from coordinator.api.admin_api import ReleaseRequest
from coordinator.rounds.summary import ReleaseSummary
from edge_runtime.errors import ConfigError


def asked(**options: object) -> argparse.Namespace:
    """Options as the command line gives them."""
    nothing = {"round": None, "lowest_accuracy": None, "highest_loss": None, "each_round": False}
    return argparse.Namespace(**{**nothing, **options})


def test_options_become_a_request() -> None:
    """What is not given is not asked for."""
    assert release_request(asked(), "r-1") == ReleaseRequest("r-1")
    wanted = release_request(asked(round=3, lowest_accuracy=0.5, each_round=True), "r-1")
    assert wanted == ReleaseRequest("r-1", 3, 0.5, None, each_round=True)


@pytest.mark.parametrize(
    ("option", "value", "name"),
    [
        ("round", -1, "--round"),
        ("lowest_accuracy", 80.0, "--lowest-accuracy"),
        ("highest_loss", -0.1, "--highest-loss"),
    ],
)
def test_an_option_out_of_bounds_is_named(option: str, value: float, name: str) -> None:
    """A share written in per cent is told by its option and bound."""
    with pytest.raises(ConfigError, match=f"^{name}: Expected"):
        release_request(asked(**{option: value}), "r-1")


def test_a_release_is_told_in_one_line() -> None:
    """Number, run, round and limits; a list tells age and devices, too."""
    release = ReleaseSummary(4, "r-1", 9, "0" * 64, 0.8, 1.25, 0.0, 3)
    assert (
        release_line(release) == "release 4: run r-1 after round 9; accuracy at least 0.8, loss at most 1.25"
    )
    assert release_list([release]).endswith("ago, decided on 3 devices")
    assert "edge-coordinator release publish" in release_list([])
