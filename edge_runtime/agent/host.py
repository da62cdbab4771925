"""What this machine says of itself, in files of /proc, /sys and /run; tests have a folder of their own instead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: No file that is read here is longer; /proc/cpuinfo of 256 cores has some 400 kB.
MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class Host:
    """The machine's own files.

    Attributes:
        root: folder in which they lie.
    """

    root: Path = Path("/")

    def text(self, path: str) -> str:
        """Content of a file without trailing spaces and zero bytes; empty if it cannot be read."""
        try:
            with (self.root / path).open("rb") as file:
                return file.read(MAX_FILE_BYTES).decode("utf-8", "replace").rstrip("\0 \n\t")
        except OSError:
            return ""

    def names(self, folder: str) -> list[str]:
        """Names of a folder's entries, in order; none if it cannot be read."""
        try:
            return sorted(path.name for path in (self.root / folder).iterdir())
        except OSError:
            return []

    def exists(self, path: str) -> bool:
        """Whether there is such a file or folder."""
        return (self.root / path).exists()

    @property
    def board(self) -> str:
        """What the device tree, or else the firmware, calls the machine; empty where neither does."""
        return self.text("proc/device-tree/model") or self.text("sys/class/dmi/id/product_name")

    @property
    def cpu_features(self) -> frozenset[str]:
        """Instruction sets by the kernel's names, such as ``avx_vnni`` or ``asimddp``."""
        for line in self.text("proc/cpuinfo").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return frozenset(value.split())
        return frozenset()

    @property
    def memory_cgroup_disabled(self) -> bool:
        """Whether the kernel was started without memory control groups.

        Firmware may put a word on its line, of which the last counts; or the kernel leaves them out by itself, as older
        ones of the Raspberry Pi do, and says so in its list of controllers.
        """
        for line in self.text("proc/cgroups").splitlines():
            name, *_, enabled = line.split() or [""]
            if name == "memory" and enabled == "0":
                return True
        disabled = False
        for word in self.text("proc/cmdline").split():
            name, _, value = word.partition("=")
            if name in ("cgroup_disable", "cgroup_enable") and "memory" in value.split(","):
                disabled = name == "cgroup_disable"
        return disabled

    @property
    def swaps(self) -> list[str]:
        """Devices and files that memory is swapped to."""
        return [line.split()[0] for line in self.text("proc/swaps").splitlines()[1:] if line.split()]

    def temperatures(self) -> Iterator[tuple[str, float]]:
        """Name and degrees Celsius of each thermal zone that tells them."""
        folder = self.root / "sys/class/thermal"
        for zone in sorted(folder.glob("thermal_zone*")):
            text = self.text(f"sys/class/thermal/{zone.name}/temp")
            if text.removeprefix("-").isdigit():
                yield self.text(f"sys/class/thermal/{zone.name}/type") or zone.name, int(text) / 1000
