"""The systemd units: what they start exists, and they start it again exactly where waiting helps."""

from __future__ import annotations

import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from coordinator.cli import build_parser as coordinator_parser
from edge_runtime.agent.service_manager import SIGNS_IN_A_PERIOD
from edge_runtime.agent.transport import CONNECT_TIMEOUT_S, READ_TIMEOUT_S
from edge_runtime.cli import build_parser as runtime_parser
from edge_runtime.errors import (
    ConfigError,
    DataError,
    DeviceError,
    EdgeError,
    RefusedError,
    ResourceError,
    SignatureError,
    UnreachableError,
)

UNITS = Path(__file__).parents[3] / "devices/systemd"
#: Exit codes of argparse and of errors that only a person can cure, by unit.
LEFT_DOWN = {
    "edge-runtime.service": {2, ConfigError.exit_code, RefusedError.exit_code, SignatureError.exit_code},
    "edge-coordinator.service": {2, ConfigError.exit_code},
}
#: Errors that pass: each unit starts its program again.
STARTED_AGAIN = (ResourceError, UnreachableError, DataError, DeviceError, EdgeError)


def settings(name: str) -> dict[str, list[str]]:
    """The settings of a unit, each with all the values that it is given."""
    found = defaultdict(list)
    for line in (UNITS / name).read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith(("#", ";")):
            found[key.strip()].append(value.strip())
    return found


@pytest.mark.parametrize("name", LEFT_DOWN)
def test_a_unit_starts_again_where_waiting_helps(name: str) -> None:
    """A unit leaves its program down for the exit codes that a person must cure, and for no other."""
    unit = settings(name)
    assert unit["Restart"] == ["on-failure"]
    left_down = {int(code) for code in " ".join(unit["RestartPreventExitStatus"]).split()}
    assert left_down == LEFT_DOWN[name]
    assert not left_down & {error.exit_code for error in STARTED_AGAIN}


@pytest.mark.parametrize("name", LEFT_DOWN)
def test_a_unit_is_closed_to_others(name: str) -> None:
    """What a unit's program writes is for its user alone, and it gains no rights."""
    unit = settings(name)
    assert unit["StateDirectoryMode"] == ["0700"]
    assert unit["UMask"] == ["0077"]
    assert unit["NoNewPrivileges"] == ["yes"]
    assert unit["ProtectSystem"] == ["strict"]


def test_the_agent_is_watched() -> None:
    """systemd waits for the agent's word, and its watchdog outlasts what the agent may wait for without a sign."""
    unit = settings("edge-runtime.service")
    assert (unit["Type"], unit["NotifyAccess"]) == (["notify"], ["main"])
    assert int(unit["WatchdogSec"][0]) > SIGNS_IN_A_PERIOD * (CONNECT_TIMEOUT_S + READ_TIMEOUT_S)


def test_the_agents_memory_is_bounded_as_a_whole() -> None:
    """Beside the worker's cap there is a limit for the whole service, which the agent may divide, and no swap."""
    unit = settings("edge-runtime.service")
    assert unit["MemoryMax"] == ["75%"]
    assert unit["MemorySwapMax"] == ["0"]
    assert unit["Delegate"] == ["memory"]
    assert "ProtectControlGroups" not in unit  # would forbid to divide it


def test_the_commands_of_units_are_commands() -> None:
    """The line that a unit starts is one that the program's command line takes."""
    for name, parser in (
        ("edge-runtime.service", runtime_parser()),
        ("edge-coordinator.service", coordinator_parser()),
    ):
        words = settings(name)["ExecStart"][0].split()
        assert words[:2] == ["/usr/bin/env", name.removesuffix(".service")]
        parser.parse_args([word for word in words[2:] if word != "$OPTIONS"])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("name", LEFT_DOWN)
def test_systemd_takes_a_unit(name: str, tmp_path: Path) -> None:
    """systemd reads a unit without a complaint."""
    copy = tmp_path / name
    copy.write_text((UNITS / name).read_text())
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, check=False
    )
    assert [line for line in verified.stderr.splitlines() if name in line] == []
    assert verified.returncode == 0, verified.stderr
