"""What the machine says of its power, heat, load, memory, disk and network at this moment; None where it does not."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.agent.host import Host

#: NetworkManager's property, and its values for yes and no; 0 is unknown, and the others are guesses of either
#: (NMMetered in NetworkManager's D-Bus interface).
NETWORK_MANAGER = (
    *("org.freedesktop.NetworkManager", "/org/freedesktop/NetworkManager"),
    *("org.freedesktop.NetworkManager", "Metered"),
)
METERED, UNMETERED = frozenset({1, 3}), frozenset({2, 4})
BUSCTL_TIMEOUT_S = 5.0
#: Kinds of supplies that are no battery (Documentation/ABI/testing/sysfs-class-power).
OUTSIDE_POWER = frozenset({"Mains", "USB", "Wireless"})
#: What a battery that is not emptied says of itself.
NOT_EMPTIED = frozenset({"Charging", "Full", "Not charging"})


@dataclass(frozen=True)
class Conditions:
    """The machine's conditions, each looked at when it is asked for.

    Attributes:
        host: the machine's own files.
        state_folder: folder on the disk that counts.
        busctl: program that asks the system's D-Bus.
    """

    host: Host
    state_folder: Path
    busctl: str = "busctl"

    @property
    def on_mains(self) -> bool:
        """Whether power comes from outside. A machine that knows of no battery has no other."""
        batteries = self._supplies({"Battery"})
        outside = self._supplies(OUTSIDE_POWER)
        if not batteries:
            return True
        if outside:
            return any(self.host.text(f"{supply}/online") == "1" for supply in outside)
        return all(self.host.text(f"{supply}/status") in NOT_EMPTIED for supply in batteries)

    @property
    def battery_percent(self) -> float | None:
        """Charge of the battery, the emptiest of several; None without one."""
        charges = [self.host.text(f"{supply}/capacity") for supply in self._supplies({"Battery"})]
        return min((float(charge) for charge in charges if charge.isdigit()), default=None)

    @property
    def celsius(self) -> float | None:
        """Degrees of the hottest sensor."""
        return max((celsius for _, celsius in self.host.temperatures()), default=None)

    @property
    def load_per_core(self) -> float | None:
        """Average number of running processes in the last minute, for each core that this process may use."""
        load = _number(self.host.text("proc/loadavg").partition(" ")[0])
        return None if load is None else load / len(os.sched_getaffinity(0))

    @property
    def memory_pressure_percent(self) -> float | None:
        """Share of the last minute in which some process waited for memory (PSI)."""
        for line in self.host.text("proc/pressure/memory").splitlines():
            kind, *fields = line.split()
            if kind == "some":
                found = dict(field.split("=", 1) for field in fields if "=" in field)
                return _number(found.get("avg60", ""))
        return None

    @property
    def free_memory_bytes(self) -> int | None:
        """Memory that a program can take without swapping, by the kernel's estimate."""
        for line in self.host.text("proc/meminfo").splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable" and value.split()[:1] and value.split()[0].isdigit():
                return int(value.split()[0]) << 10
        return None

    @property
    def free_disk_bytes(self) -> int:
        """Space on the disk of the state folder."""
        return shutil.disk_usage(self.state_folder).free

    @property
    def metered(self) -> bool | None:
        """Whether NetworkManager calls the network metered, or guesses so; None where there is no NetworkManager."""
        program = shutil.which(self.busctl)
        if program is None:
            return None
        command = (program, "--system", "get-property", *NETWORK_MANAGER)
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=BUSCTL_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        kind, _, value = done.stdout.strip().partition(" ")  # "u 4"
        if done.returncode != 0 or kind != "u" or not value.isdigit():
            return None
        return True if int(value) in METERED else False if int(value) in UNMETERED else None

    def _supplies(self, kinds: frozenset[str] | set[str]) -> list[str]:
        """Folders of the machine's own power supplies of some kinds; those of a mouse or a pen do not count."""
        folder = "sys/class/power_supply"
        return [
            f"{folder}/{name}"
            for name in self.host.names(folder)
            if self.host.text(f"{folder}/{name}/type") in kinds
            and self.host.text(f"{folder}/{name}/scope") != "Device"
        ]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
