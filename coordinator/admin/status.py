"""``edge-coordinator status``: is all well, and if not what to do, on one screen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal

from msgspec import Struct

from coordinator.admin.choice import OPEN
from coordinator.monitoring.readiness import Readiness
from coordinator.rounds.summary import DeviceSummary, RunSummary
from edge_runtime.figures import plural, share

Level = Literal["OK", "WARN", "FAIL"]
#: Names that a line holds at most.
MOST_NAMES = 5
#: Share of the fleet from which on silence is the coordinator's or the network's, and no longer single devices'.
MUCH_SILENCE = 0.5


class StatusLine(Struct, frozen=True):
    """One finding.

    Attributes:
        level: OK, WARN or FAIL.
        about: what it is of: coordinator, devices, or a run's id.
        found: what was found.
        cure: what to do; empty where all is well.
    """

    level: Level
    about: str
    found: str
    cure: str = ""


def status_lines(
    ready: Readiness, devices: Sequence[DeviceSummary], runs: Sequence[RunSummary]
) -> list[StatusLine]:
    """All findings: the coordinator, its devices, its runs.

    Args:
        ready: what stands in the way of its work.
        devices: all devices that ever enrolled.
        runs: runs that have not ended, with their rounds, and the newest of the others.
    """
    return [_of_coordinator(ready), *_of_devices(devices), *_of_runs(runs)]


def worst(lines: Sequence[StatusLine]) -> Level:
    """The worst level of all."""
    order: tuple[Level, ...] = ("FAIL", "WARN", "OK")
    return next(level for level in order if level == "OK" or any(line.level == level for line in lines))


def text_of(lines: Sequence[StatusLine]) -> str:
    """The findings as text, the cure under what it is for."""
    words = {
        "OK": "all is well",
        "WARN": "it works, and something wants a look",
        "FAIL": "something stands in the way",
    }
    told = [words[worst(lines)]]
    for line in lines:
        told.append(f"{line.level:<4}  {line.about}: {line.found}")
        if line.cure:
            told.append(f"      -> {line.cure}")
    return "\n".join(told)


def _of_coordinator(ready: Readiness) -> StatusLine:
    if ready.reasons:
        cure = "its log tells more; once the cause is gone it goes on by itself"
        return StatusLine("FAIL", "coordinator", "; ".join(ready.reasons), cure)
    return StatusLine("OK", "coordinator", "it serves and can work")


def _of_devices(devices: Sequence[DeviceSummary]) -> Iterator[StatusLine]:
    enrolled = [device for device in devices if device.state != "revoked"]
    if not enrolled:
        cure = "make a token for each with: edge-coordinator token"
        yield StatusLine("WARN", "devices", "none is enrolled", cure)
        return
    counts = Counter(device.state for device in enrolled)
    told = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    yield StatusLine("OK", "devices", f"{plural(len(enrolled), 'device')}: {told}")
    silent = counts["silent"] / len(enrolled)
    if silent >= MUCH_SILENCE:
        cure = "look at the network and at the address that device.toml names, before single devices"
        yield StatusLine("FAIL", "devices", f"{share(silent)} of them are silent", cure)
    elif silent:
        cure = "on the device: edge-runtime doctor"
        yield StatusLine("WARN", "devices", f"silent: {_names(enrolled, 'silent')}", cure)
    if counts["set aside"]:
        cure = "edge-coordinator run show says why; then: edge-coordinator device resume NAME"
        yield StatusLine("WARN", "devices", f"set aside: {_names(enrolled, 'set aside')}", cure)
    if counts["cap too small"]:
        cure = "raise cap in device.toml, or run with a smaller batch_size, sequence_limit or package"
        yield StatusLine("WARN", "devices", f"cap too small: {_names(enrolled, 'cap too small')}", cure)
    if counts["not eligible"] == len(enrolled):
        reasons = ", ".join(sorted({device.reason for device in enrolled}))
        cure = "[eligibility] of device.toml says when a device works"
        yield StatusLine("WARN", "devices", f"none may work now: {reasons}", cure)


def _names(devices: Sequence[DeviceSummary], state: str) -> str:
    names = [device.name for device in devices if device.state == state]
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def _of_runs(runs: Sequence[RunSummary]) -> Iterator[StatusLine]:
    going_on = [run for run in runs if run.state in OPEN]
    if not going_on:
        cure = "" if runs else "edge-coordinator run new writes a run.toml"
        yield StatusLine("OK", "runs", "none goes on", cure)
    for run in going_on:
        yield _of_open(run)
    ended = [run for run in runs if run.state not in OPEN]
    if ended and ended[-1].state == "failed":
        run = ended[-1]
        cure = f"edge-coordinator run show {run.run_id}"
        yield StatusLine("WARN", run.run_id, f"the newest run that ended has failed: {run.reason}", cure)


def _of_open(run: RunSummary) -> StatusLine:
    done = f"{run.state}, {run.rounds_committed} of {run.rounds_wanted} rounds"
    if run.paused:
        cure = f"edge-coordinator run resume {run.run_id}"
        return StatusLine("WARN", run.run_id, f"{done}; paused", cure)
    closed = [entry for entry in run.counting if entry.state in ("committed", "abandoned")]
    if closed and closed[-1].state == "abandoned":
        cure = f"edge-coordinator run show {run.run_id}; fewer min_results, or a longer deadline_s"
        last = closed[-1]
        return StatusLine(
            "WARN", run.run_id, f"{done}; round {last.round} was abandoned: {last.reason}", cure
        )
    measured = [entry.accuracy for entry in run.counting if entry.accuracy is not None]
    at = f"; accuracy {share(measured[-1])}" if measured else ""
    return StatusLine("OK", run.run_id, f"{done}{at}")
