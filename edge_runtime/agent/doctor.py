"""``edge-runtime doctor``: what is wrong with this machine and this device, and the cure, a line each.

A FAIL keeps the device from serving. A WARN costs speed, or a protection that the operator may count on.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal

from msgspec import Struct

from edge_runtime.agent.check import check_device
from edge_runtime.agent.conditions import Conditions
from edge_runtime.agent.config import DeviceConfig, load_config
from edge_runtime.agent.eligibility import Gate
from edge_runtime.agent.host import Host
from edge_runtime.agent.store import Store
from edge_runtime.agent.transport import HttpTransport, Transport
from edge_runtime.errors import DeviceError, EdgeError
from edge_runtime.memory.enforcement import MemoryLimit, make_memory_limit, remove_memory_limit

Level = Literal["OK", "WARN", "FAIL"]
#: Where Raspberry Pi OS has the kernel's command line.
PI_COMMAND_LINE = "/boot/firmware/cmdline.txt"
MEMORY_WORDS = "cgroup_enable=memory cgroup_memory=1"
#: Instruction sets with dot products of 8-bit numbers, by the kernel's names.
DOT_PRODUCTS = {
    "amx_int8": "AMX",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX VNNI",
    "i8mm": "i8mm",
    "asimddp": "dotprod",
}
#: From here on boards slow their clocks down.
HOT_CELSIUS = 80.0
#: No device runs this program before it was written.
EARLIEST_S = 1_767_225_600.0
#: Sizes of a trial control group, and how long another program may take to tell its version.
TRIAL_BYTES, VERSION_TIMEOUT_S = 64 << 20, 5.0
#: Names of ``device_class`` by how a board's model begins; the first that fits counts.
BOARDS = {
    "Raspberry Pi 5": "raspberry-pi-5",
    "Raspberry Pi 4": "raspberry-pi-4",
    "Raspberry Pi Zero 2": "raspberry-pi-zero-2-w",
    "NVIDIA Jetson AGX Thor": "jetson-agx-thor",
    "NVIDIA Jetson AGX Orin": "jetson-agx-orin",
    "NVIDIA Jetson Orin NX": "jetson-orin-nx",
    "NVIDIA Jetson Orin Nano": "jetson-orin-nano",
    "NVIDIA Jetson Xavier NX": "jetson-xavier-nx",
    "NVIDIA Jetson Nano": "jetson-nano",
}


class Diagnosis(Struct, frozen=True):
    """One line of the doctor.

    Attributes:
        name: what was looked at.
        level: OK, WARN or FAIL.
        detail: what was found.
        cure: what to do; empty where all is well.
        exit_code: exit code of a FAIL, that of its error's class.
    """

    name: str
    level: Level
    detail: str
    cure: str = ""
    exit_code: int = 0

    @property
    def line(self) -> str:
        """The diagnosis in words."""
        return f"{self.level:<4} {self.name}: {self.detail}" + (f"; {self.cure}" if self.cure else "")


def examine(
    config_path: Path,
    host: Host | None = None,
    *,
    transport: Callable[[str], Transport] = HttpTransport,
    memory_limit: Callable[[int], MemoryLimit] = make_memory_limit,
) -> Iterator[Diagnosis]:
    """Look at the machine, then at the device as it is configured. Nothing is changed, and nothing stops the rest.

    Args:
        config_path: the device's configuration.
        host: the machine; None takes this one.
        transport: function that makes the way to a coordinator's address.
        memory_limit: function that makes a trial memory limit.
    """
    host = host or Host()
    yield board(host)
    yield memory_cgroup(host, memory_limit)
    yield Diagnosis(
        "page size", "OK", f"{os.sysconf('SC_PAGESIZE') >> 10} KiB; weight files are mapped whole"
    )
    yield processor(host)
    yield swap(host)
    yield temperature(host)
    yield clock(host, time.time())
    yield from gpu_wheel()
    yield systemd(host)
    try:
        config = load_config(config_path)
    except EdgeError as error:
        yield _failed("config", error)
        return
    yield Diagnosis("config", "OK", str(config_path))
    yield from _device(config, host, transport)


def _device(config: DeviceConfig, host: Host, transport: Callable[[str], Transport]) -> Iterator[Diagnosis]:
    yield tls(config)
    try:
        store = Store(config.state_folder, disk_quota_bytes=config.disk_quota)
        yield state_folder(config)
        yield eligibility(config, host)
    except EdgeError as error:
        yield _failed("state folder", error)
        return
    for found in check_device(config, store, transport(config.coordinator_url)):
        if found.error is None:
            yield Diagnosis(found.name, "OK", found.detail)
        else:
            yield _failed(found.name, found.error)


def _failed(name: str, error: EdgeError) -> Diagnosis:
    return Diagnosis(name, "FAIL", str(error), exit_code=error.exit_code)


def board(host: Host) -> Diagnosis:
    """Which board this is, and the class of device that its like have."""
    found = host.board
    kind = next((name for start, name in BOARDS.items() if found.startswith(start)), "")
    if kind:
        return Diagnosis("board", "OK", f'{found}; device_class = "{kind}"')
    return Diagnosis("board", "OK", f"{found or 'not named by its firmware'} ({platform.machine()})")


def memory_cgroup(host: Host, memory_limit: Callable[[int], MemoryLimit]) -> Diagnosis:
    """Whether the kernel can hold a worker to its cap."""
    if host.memory_cgroup_disabled:
        place = PI_COMMAND_LINE if host.exists(PI_COMMAND_LINE.lstrip("/")) else "the kernel's command line"
        return Diagnosis(
            "memory cgroup",
            "WARN",
            "the kernel runs without memory control groups (cgroup_disable=memory), and drops limits silently",
            f"append {MEMORY_WORDS} to the one line of {place}, and restart",
        )
    limit = memory_limit(TRIAL_BYTES)
    try:
        if limit.group is not None:
            return Diagnosis("memory cgroup", "OK", f"{limit.enforced_by} holds workers to the cap")
        return Diagnosis(
            "memory cgroup",
            "WARN",
            f"{limit.note}; the cap is held by {limit.enforced_by}, which misses some of a worker's memory",
            "run the agent by its systemd unit, which delegates a group to it",
        )
    finally:
        remove_memory_limit(limit)


def processor(host: Host) -> Diagnosis:
    """Which instruction sets there are for int8, and what they favour."""
    found = [words for name, words in DOT_PRODUCTS.items() if name in host.cpu_features]
    if found:
        return Diagnosis(
            "processor", "OK", f"{', '.join(found)}: favours int8 arithmetic (row_int8, block_int8)"
        )
    return Diagnosis(
        "processor",
        "WARN",
        "no dot products of 8-bit numbers: float arithmetic may be as fast as int8",
        "leave arithmetic unset, so that preparing a package measures which is best",
    )


def swap(host: Host) -> Diagnosis:
    """Whether memory is swapped, and to where."""
    disks = [path for path in host.swaps if "zram" not in path]
    if disks:
        return Diagnosis(
            "swap",
            "WARN",
            f"{', '.join(disks)}: what the kernel swaps wears flash out, and makes steps slow without a reason to see",
            "swap to zram, or set MemorySwapMax=0 in the unit",
        )
    return Diagnosis("swap", "OK", "zram, compressed in memory" if host.swaps else "none")


def temperature(host: Host) -> Diagnosis:
    """The hottest sensor."""
    found = max(host.temperatures(), key=lambda each: each[1], default=None)
    if found is None:
        return Diagnosis("temperature", "OK", "no sensor")
    name, celsius = found
    if celsius < HOT_CELSIUS:
        return Diagnosis("temperature", "OK", f"{celsius:.0f} °C ({name})")
    return Diagnosis(
        "temperature",
        "WARN",
        f"{celsius:.0f} °C ({name}), where boards slow down",
        "give it air or a heat sink, or lower threads",
    )


def clock(host: Host, now_s: float) -> Diagnosis:
    """Whether the clock can be right; the coordinator's clock is compared later."""
    if now_s < EARLIEST_S:
        return Diagnosis(
            "time",
            "FAIL",
            f"the clock says {time.strftime('%Y-%m-%d', time.gmtime(now_s))}, before this program was written",
            "set it, and keep it right: timedatectl set-ntp true",
            DeviceError.exit_code,
        )
    if host.exists("run/systemd/system") and not host.exists("run/systemd/timesync/synchronized"):
        return Diagnosis(
            "time",
            "WARN",
            "systemd-timesyncd has not set the clock since the start",
            "timedatectl set-ntp true, unless another program keeps it",
        )
    return Diagnosis("time", "OK", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now_s)))


def gpu_wheel() -> Iterator[Diagnosis]:
    """A package of ONNX Runtime for GPUs, which this project does not use and which gets in the way."""
    try:
        version = metadata.version("onnxruntime-gpu")
    except metadata.PackageNotFoundError:
        return
    yield Diagnosis(
        "gpu wheel",
        "WARN",
        f"onnxruntime-gpu {version} is installed: this program runs on CPUs, and the wheel for arm64 holds no code for "
        "Jetson's GPUs",
        "pip uninstall onnxruntime-gpu, then install onnxruntime again",
    )


def systemd(host: Host) -> Diagnosis:
    """The version of systemd, if it runs here."""
    program = shutil.which("systemctl")
    if not host.exists("run/systemd/system") or program is None:
        return Diagnosis("systemd", "OK", "not running here; something else must start the agent")
    try:
        done = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=VERSION_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return Diagnosis("systemd", "WARN", "systemctl does not answer", "look at the system's journal")
    return Diagnosis("systemd", "OK", done.stdout.splitlines()[0] if done.stdout else "version not told")


def tls(config: DeviceConfig) -> Diagnosis:
    """Whether results travel under TLS."""
    if config.coordinator_url.startswith("https://"):
        return Diagnosis("tls", "OK", config.coordinator_url)
    if config.allow_insecure_http:
        return Diagnosis(
            "tls",
            "WARN",
            f"{config.coordinator_url} is plain http: whoever is between can read what the slices have learned",
            "serve with --tls-cert and --tls-key, then remove allow_insecure_http",
        )
    return Diagnosis("tls", "OK", f"{config.coordinator_url}, within this machine")


def state_folder(config: DeviceConfig) -> Diagnosis:
    """Whether the state folder can be written by whoever asks."""
    if os.access(config.state_folder, os.W_OK):
        return Diagnosis("state folder", "OK", str(config.state_folder))
    return Diagnosis(
        "state folder",
        "FAIL",
        f"{config.state_folder} cannot be written by this user",
        "give it to the agent's user, mount it for writing, or ask as that user",
        DeviceError.exit_code,
    )


def eligibility(config: DeviceConfig, host: Host) -> Diagnosis:
    """Whether the device may work now, by what its operator asks; rows are for the line about data."""
    asked = config.eligibility
    gate = Gate(asked, Conditions(host, config.state_folder))
    reason = gate.reason(rows=asked.least_rows, needed_bytes=config.cap)
    if reason is not None:
        return Diagnosis(
            "eligibility",
            "WARN",
            f"takes no task now: {reason}",
            "wait, or change [eligibility] of device.toml",
        )
    if gate.unknown:
        return Diagnosis(
            "eligibility",
            "WARN",
            f"this machine does not tell: {', '.join(gate.unknown)}",
            "what it does not tell keeps it from nothing; remove the key, or install what tells it",
        )
    return Diagnosis("eligibility", "OK", "may work now")
