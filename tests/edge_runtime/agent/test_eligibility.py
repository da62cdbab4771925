"""Whether the device may work: each condition, cooling down, and hours across midnight."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.agent.conditions import Conditions
from edge_runtime.agent.config import DeviceConfig, load_config
from edge_runtime.agent.eligibility import Eligibility, Gate, Reason, is_within
from edge_runtime.agent.host import Host
from edge_runtime.errors import ConfigError
from tests.edge_runtime.agent.test_config import write
from tests.edge_runtime.agent.test_host import machine


def load(folder: Path, lines: str) -> DeviceConfig:
    """A configuration that ends with these lines."""
    path = write(folder)
    path.write_text(path.read_text() + lines)
    return load_config(path)


SUPPLY = "sys/class/power_supply/BAT0"
BATTERY = {f"{SUPPLY}/type": "Battery", f"{SUPPLY}/status": "Discharging", f"{SUPPLY}/capacity": "30"}


@dataclass
class Place:
    """A machine whose files and clock a test sets."""

    root: Path
    at: str = "12:00"
    files: dict[str, str] = field(default_factory=dict)

    def gate(self, **settings: Any) -> Gate:
        """A gate on this machine."""
        machine(self.root, self.files)
        conditions = Conditions(Host(self.root), self.root, "/no/busctl")
        return Gate(Eligibility(**settings), conditions, lambda: time.strptime(self.at, "%H:%M"))

    def reason(self, rows: int = 10, needed_bytes: int = 1 << 20, **settings: Any) -> Reason | None:
        """What a gate says here."""
        return self.gate(**settings).reason(rows=rows, needed_bytes=needed_bytes)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A machine."""
    return Place(tmp_path)


def test_nothing_is_asked_by_default(tmp_path: Path) -> None:
    """Without settings a device always may work, and nothing of the machine is looked at."""
    gate = Gate(Eligibility(), None)  # type: ignore[arg-type] # to look at it would raise
    assert gate.reason(rows=0, needed_bytes=1 << 50) is None
    assert gate.reason_to_stop() is None


@pytest.mark.parametrize(
    ("settings", "files", "reason"),
    [
        ({"mains_only": True}, BATTERY, "on_battery"),
        ({"mains_only": True}, {}, None),
        ({"least_battery_percent": 31.0}, BATTERY, "battery_low"),
        ({"least_battery_percent": 30.0}, BATTERY, None),
        ({"least_battery_percent": 30.0}, {}, None),
        ({"highest_load_per_core": 0.001}, {"proc/loadavg": "900.0 1 1 1/1 1"}, "load"),
        ({"highest_load_per_core": 1000.0}, {"proc/loadavg": "0.5 1 1 1/1 1"}, None),
        (
            {"highest_memory_pressure_percent": 5.0},
            {"proc/pressure/memory": "some avg10=0 avg60=5.01 avg300=0 total=0"},
            "memory_pressure",
        ),
        ({"needs_free_memory": True}, {"proc/meminfo": "MemAvailable: 1023 kB"}, "little_memory"),
        ({"needs_free_memory": True}, {"proc/meminfo": "MemAvailable: 1024 kB"}, None),
        ({"least_free_disk": 1 << 50}, {}, "little_disk"),
        ({"least_rows": 11}, {}, "few_rows"),
        ({"least_rows": 10}, {}, None),
        ({"hours": ("22:00-06:00",)}, {}, "outside_hours"),
    ],
)
def test_each_condition(place: Place, settings: dict[str, Any], files: dict[str, str], reason: str) -> None:
    """At its limit the device may work; beyond it the reason has its code."""
    place.files = files
    assert place.reason(**settings) == reason


def test_what_is_not_told_keeps_nobody_from_work(place: Place) -> None:
    """A machine without sensor, PSI and NetworkManager may work, and the gate names what it lacks."""
    gate = place.gate(highest_celsius=1.0, highest_memory_pressure_percent=0.0, unmetered_only=True)
    assert gate.reason(rows=1, needed_bytes=1) is None
    assert gate.unknown == ["memory pressure", "metered network", "temperature"]


def test_a_device_that_was_too_hot_cools_down_before_it_works_again(place: Place) -> None:
    """Above 75 it stops, and works again only at 65 or less: between the two what was before goes on."""
    place.files = {"sys/class/thermal/thermal_zone0/temp": "70000"}
    gate = place.gate(highest_celsius=75.0)
    said = []
    for celsius in (70, 75, 76, 74, 66, 65, 74, 75, 80):
        machine(place.root, {"sys/class/thermal/thermal_zone0/temp": str(celsius * 1000)})
        said.append(gate.reason(rows=1, needed_bytes=1))
        assert gate.reason_to_stop() == said[-1]
    assert said == [None, None, "too_hot", "too_hot", "too_hot", None, None, None, "too_hot"]


def test_the_operator_may_say_how_far_it_cools_down(place: Place) -> None:
    """``resume_celsius`` is the other end of the hysteresis."""
    gate = place.gate(highest_celsius=75.0, resume_celsius=74.0)
    said = []
    for celsius in (76, 75, 74):
        machine(place.root, {"sys/class/thermal/thermal_zone0/temp": str(celsius * 1000)})
        said.append(gate.reason(rows=1, needed_bytes=1))
    assert said == ["too_hot", "too_hot", None]


@pytest.mark.parametrize(
    ("hours", "within", "without"),
    [
        ("22:00-06:00", ["22:00", "23:59", "00:00", "05:59"], ["21:59", "06:00", "12:00"]),
        ("09:30-17:00", ["09:30", "16:59"], ["09:29", "17:00", "00:00"]),
        ("00:00-00:01", ["00:00"], ["00:01", "23:59"]),
        ("23:59-00:00", ["23:59"], ["00:00", "23:58"]),
    ],
)
def test_hours(place: Place, hours: str, within: list[str], without: list[str]) -> None:
    """The first minute is within, the last is not; hours that end before they begin go over midnight."""
    for place.at in (*within, *without):
        minute = 60 * int(place.at[:2]) + int(place.at[3:])
        assert is_within(hours, minute) == (place.at in within)
        assert place.reason(hours=(hours,)) == (None if place.at in within else "outside_hours")


def test_any_of_several_hours_will_do(place: Place) -> None:
    """Lunch or night."""
    said = []
    for place.at in ("12:30", "02:00", "15:00"):
        said.append(place.reason(hours=("12:00-13:00", "22:00-06:00")))
    assert said == [None, None, "outside_hours"]


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        ("highest_celcius = 75", "did you mean 'highest_celsius'?"),
        ("highest_celsius = 500", "eligibility.highest_celsius is 500, it must be a number"),
        ("resume_celsius = 60", "highest_celsius is not set"),
        ("highest_celsius = 70\nresume_celsius = 71", "highest_celsius is 70"),
        ('hours = ["22:00-22:00"]', "leave hours out for the whole day"),
        ('hours = ["25:00-26:00"]', 'write times of day as "22:00-06:00"'),
        ('least_free_disk = "much"', "eligibility.least_free_disk: 'much' is not a size"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, lines: str, named: str) -> None:
    """Each names the key and what it must be."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, f"[eligibility]\n{lines}\n")
    assert named in str(caught.value)


def test_sizes_have_units(tmp_path: Path) -> None:
    """``least_free_disk`` is written like every other size."""
    assert load(tmp_path, '[eligibility]\nleast_free_disk = "1G"\n').eligibility.least_free_disk == 1 << 30
