"""What the machine says of its conditions, read from a folder that stands for its root, and from a bus."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_runtime.agent.conditions import Conditions
from edge_runtime.agent.host import Host
from tests.edge_runtime.agent.test_host import machine

SUPPLY = "sys/class/power_supply"


def conditions(root: Path, files: dict[str, str] | None = None) -> Conditions:
    """The conditions of a machine with these files, and with no D-Bus."""
    return Conditions(machine(root, files or {}), root, str(root / "no-busctl"))


def battery(name: str = "BAT0", **said: str) -> dict[str, str]:
    """Files of a battery."""
    return {f"{SUPPLY}/{name}/{key}": value + "\n" for key, value in {"type": "Battery", **said}.items()}


@pytest.mark.parametrize(
    ("files", "on_mains", "percent"),
    [
        ({}, True, None),
        ({**battery(capacity="40", status="Discharging")}, False, 40),
        ({**battery(capacity="40", status="Charging")}, True, 40),
        (
            {
                **battery(capacity="40", status="Discharging"),
                **battery("BAT1", capacity="90", status="Full"),
            },
            False,
            40,
        ),
        (
            {
                **battery(capacity="99", status="Not charging"),
                f"{SUPPLY}/AC/type": "Mains\n",
                f"{SUPPLY}/AC/online": "0\n",
            },
            False,
            99,
        ),
        (
            {
                **battery(capacity="99", status="Discharging"),
                f"{SUPPLY}/AC/type": "Mains\n",
                f"{SUPPLY}/AC/online": "1\n",
            },
            True,
            99,
        ),
        ({**battery("hid-mouse", capacity="5", status="Discharging", scope="Device")}, True, None),
    ],
    ids=["board", "battery", "charging", "two", "unplugged", "plugged", "mouse"],
)
def test_power(tmp_path: Path, files: dict[str, str], on_mains: bool, percent: float | None) -> None:
    """A machine without a battery is on mains; a mouse's battery is not the machine's; the emptiest counts."""
    found = conditions(tmp_path, files)
    assert (found.on_mains, found.battery_percent) == (on_mains, percent)


def test_heat_load_pressure_and_memory(tmp_path: Path) -> None:
    """The hottest zone, the load for each core, the share that some process waited, and what can be taken."""
    found = conditions(
        tmp_path,
        {
            "sys/class/thermal/thermal_zone0/temp": "51000\n",
            "sys/class/thermal/thermal_zone1/temp": "62500\n",
            "proc/loadavg": "3.00 2.00 1.00 2/345 6789\n",
            "proc/pressure/memory": (
                "some avg10=1.00 avg60=12.50 avg300=0.10 total=1\nfull avg10=0.00 avg60=3.00 avg300=0.00 total=1\n"
            ),
            "proc/meminfo": "MemTotal:  4000 kB\nMemAvailable:  1024 kB\n",
        },
    )
    assert (found.celsius, found.memory_pressure_percent) == (62.5, 12.5)
    assert found.load_per_core == 3.0 / len(os.sched_getaffinity(0))
    assert found.free_memory_bytes == 1 << 20


def test_what_the_machine_does_not_tell_is_none(tmp_path: Path) -> None:
    """No sensor, no PSI in the kernel, no NetworkManager, or nonsense: None, and no error."""
    found = conditions(tmp_path, {"proc/pressure/memory": "nonsense\n", "proc/loadavg": "\n"})
    assert (found.celsius, found.memory_pressure_percent, found.load_per_core) == (None, None, None)
    assert (found.free_memory_bytes, found.metered) == (None, None)


def test_this_machine_tells_what_every_linux_tells() -> None:
    """The real files have load, free memory and free disk."""
    found = Conditions(Host(), Path("/"))
    assert found.load_per_core is not None
    assert found.load_per_core >= 0
    assert found.free_memory_bytes
    assert found.free_disk_bytes >= 0
