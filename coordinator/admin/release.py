"""``edge-coordinator release``: its options, and what it tells of a release."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import msgspec

from coordinator.api.admin_api import ReleaseRequest
from coordinator.rounds.summary import ReleaseSummary
from edge_runtime.errors import ConfigError
from edge_runtime.figures import duration, plural


def release_request(arguments: argparse.Namespace, run_id: str) -> ReleaseRequest:
    """What the options ask for.

    Raises:
        ConfigError: an option is out of its bounds; names it.
    """
    fields = {
        "run_id": run_id,
        "round": arguments.round,
        "lowest_accuracy": arguments.lowest_accuracy,
        "highest_loss": arguments.highest_loss,
        "each_round": arguments.each_round,
    }
    try:
        return msgspec.convert(fields, ReleaseRequest)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at `$.")
        raise ConfigError(f"--{place.rstrip('`').replace('_', '-')}: {problem}") from error


def release_line(release: ReleaseSummary) -> str:
    """One release in words."""
    limits = [
        f"{name} {value:g}"
        for name, value in (
            ("accuracy at least", release.lowest_accuracy),
            ("loss at most", release.highest_loss),
        )
        if value is not None
    ]
    bound = f"; {', '.join(limits)}" if limits else ""
    return f"release {release.number}: run {release.run_id} after round {release.round}{bound}"


def release_list(releases: Sequence[ReleaseSummary]) -> str:
    """All releases in words, oldest first."""
    if not releases:
        return "nothing was released; publish a run with: edge-coordinator release publish"
    now_s = time.time()
    return "\n".join(
        f"{release_line(release)}; {duration(max(0.0, now_s - release.published_s))} ago, decided on "
        f"{plural(release.devices, 'device')}"
        for release in releases
    )
