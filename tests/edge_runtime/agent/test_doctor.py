"""The doctor: each fault of a machine by its line and cure, and the device's own checks after them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from edge_runtime.agent import doctor
from edge_runtime.agent.config import load_config
from edge_runtime.agent.doctor import Diagnosis, examine
from edge_runtime.agent.host import Host
from edge_runtime.agent.transport import Request, Response
from edge_runtime.cli import main
from edge_runtime.errors import UnreachableError
from edge_runtime.memory.enforcement import MemoryLimit
from tests.edge_runtime.agent.test_host import machine

NO_GROUP = MemoryLimit("rlimit", 64 << 20, note="no memory control group (cgroup_v2: no such file)")
CONFIG = """
coordinator_url = "http://127.0.0.1:9"
state_folder = "state"
data = "data.csv"
device_name = "a"
device_class = "b"
publisher_key = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
cap = "256M"
enrolment_token = "one-time-token-0001"
"""


class Silence:
    """A coordinator that does not answer."""

    def send(self, request: Request) -> Response:
        raise UnreachableError(f"nobody answers {request.path}")


def test_a_raspberry_pi_without_memory_groups_is_told_the_words_and_the_file(tmp_path: Path) -> None:
    """The line names what to append to which file; another board is told of its kernel's command line."""
    files = {"proc/cmdline": "cgroup_disable=memory rootwait"}
    found = doctor.memory_cgroup(machine(tmp_path / "other", files), lambda _: NO_GROUP)
    assert found.level == "WARN"
    assert "the kernel's command line" in found.cure
    pi = machine(tmp_path / "pi", {**files, "boot/firmware/cmdline.txt": "rootwait\n"})
    found = doctor.memory_cgroup(pi, lambda _: NO_GROUP)
    assert found.line == (
        "WARN memory cgroup: the kernel runs without memory control groups (cgroup_disable=memory), and drops "
        "limits silently; append cgroup_enable=memory cgroup_memory=1 to the one line of "
        "/boot/firmware/cmdline.txt, and restart"
    )


def test_a_cap_that_is_held_by_rlimit_is_told_with_the_reason(tmp_path: Path) -> None:
    """Where the kernel could and this user may not, the cure is the unit."""
    found = doctor.memory_cgroup(Host(tmp_path), lambda _: NO_GROUP)
    assert (found.level, "no such file" in found.detail, "systemd unit" in found.cure) == ("WARN", True, True)


@pytest.mark.parametrize(
    ("features", "level", "word"),
    [
        ("flags: avx2 avx_vnni", "OK", "AVX VNNI"),
        ("flags: amx_int8 avx512_vnni", "OK", "AMX"),
        ("Features: fp asimd asimddp", "OK", "dotprod"),
        ("Features: asimddp i8mm", "OK", "i8mm"),
        ("flags: sse2", "WARN", "float"),
    ],
)
def test_instruction_sets_tell_the_arithmetic(tmp_path: Path, features: str, level: str, word: str) -> None:
    """Dot products of 8-bit numbers favour int8; without them preparing decides."""
    found = doctor.processor(machine(tmp_path, {"proc/cpuinfo": features}))
    assert (found.level, word in found.detail) == (level, True)


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("Raspberry Pi 5 Model B Rev 1.0", "raspberry-pi-5"),
        ("Raspberry Pi 4 Model B Rev 1.5", "raspberry-pi-4"),
        ("Raspberry Pi Zero 2 W Rev 1.0", "raspberry-pi-zero-2-w"),
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit", "jetson-orin-nano"),
        ("NVIDIA Jetson Orin NX Developer Kit", "jetson-orin-nx"),
    ],
)
def test_a_board_is_told_its_class(tmp_path: Path, model: str, kind: str) -> None:
    """So that devices of one kind are called alike; an unknown board is told by its own name."""
    assert (
        f'device_class = "{kind}"'
        in doctor.board(machine(tmp_path, {"proc/device-tree/model": model})).detail
    )
    assert doctor.board(Host(tmp_path / "none")).level == "OK"


def test_swap_heat_and_clock_have_their_cures(tmp_path: Path) -> None:
    """Swap on flash, a hot board, and a clock that nobody set."""
    host = machine(
        tmp_path,
        {
            "proc/swaps": "Filename Type Size\n/var/swap file 1 0 -2\n",
            "sys/class/thermal/thermal_zone0/temp": "84000\n",
            "run/systemd/system/placeholder": "",
        },
    )
    assert doctor.swap(host).level == doctor.temperature(host).level == "WARN"
    assert doctor.clock(host, 1_800_000_000.0).level == "WARN"
    assert doctor.clock(Host(tmp_path / "none"), 1_800_000_000.0).level == "OK"
    dead = doctor.clock(host, 0.0)
    assert (dead.level, dead.exit_code, "1970-01-01" in dead.detail) == ("FAIL", 10, True)
    zram = machine(tmp_path / "zram", {"proc/swaps": "Filename Type\n/dev/zram0 partition\n"})
    assert doctor.swap(zram) == Diagnosis("swap", "OK", "zram, compressed in memory")


@pytest.mark.parametrize(
    ("lines", "level", "told"),
    [
        ("", "OK", "may work now"),
        ("highest_celsius = 40.0", "WARN", "takes no task now: too_hot"),
        ("highest_memory_pressure_percent = 5.0", "WARN", "this machine does not tell: memory pressure"),
        ("least_rows = 1000", "OK", "may work now"),
    ],
)
def test_eligibility_is_a_line(tmp_path: Path, lines: str, level: str, told: str) -> None:
    """The reason that keeps the device from work now, or what nobody can tell; rows have a line of their own."""
    (tmp_path / "device.toml").write_text(f"{CONFIG}[eligibility]\n{lines}\n")
    (tmp_path / "state").mkdir()
    host = machine(tmp_path / "machine", {"sys/class/thermal/thermal_zone0/temp": "50000"})
    found = doctor.eligibility(load_config(tmp_path / "device.toml"), host)
    assert (found.level, found.detail) == (level, told)


def test_nothing_stops_the_rest(tmp_path: Path) -> None:
    """A machine that tells nothing, bad rows, a silent coordinator: every line is there, and the first fault's code."""
    (tmp_path / "device.toml").write_text(CONFIG)
    (tmp_path / "data.csv").write_text("body,label\nconfidential,x\n")
    found = list(
        examine(
            tmp_path / "device.toml",
            Host(tmp_path / "empty"),
            transport=lambda _: Silence(),
            memory_limit=lambda _: NO_GROUP,
        )
    )
    by_name = {each.name: each for each in found}
    assert by_name["config"].level == by_name["state folder"].level == by_name["tls"].level == "OK"
    assert by_name["data"].level == "FAIL"
    assert "rename the column 'body' to 'text'" in by_name["data"].detail
    assert "confidential" not in by_name["data"].line
    assert by_name["coordinator"].exit_code == UnreachableError.exit_code
    assert next(each.exit_code for each in found if each.level == "FAIL") == 12


def test_plain_http_to_others_is_told(tmp_path: Path) -> None:
    """With allow_insecure_http the line says what can be read."""
    text = CONFIG.replace("127.0.0.1", "192.0.2.7") + "allow_insecure_http = true\n"
    (tmp_path / "device.toml").write_text(text)
    found = examine(
        tmp_path / "device.toml",
        Host(tmp_path),
        transport=lambda _: Silence(),
        memory_limit=lambda _: NO_GROUP,
    )
    assert next(each for each in found if each.name == "tls").level == "WARN"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_only_read_is_a_fault(tmp_path: Path) -> None:
    """A state folder on a file system that is mounted read-only keeps the device from serving."""
    (tmp_path / "device.toml").write_text(CONFIG)
    (tmp_path / "state").mkdir(mode=0o500)
    found = examine(
        tmp_path / "device.toml",
        Host(tmp_path),
        transport=lambda _: Silence(),
        memory_limit=lambda _: NO_GROUP,
    )
    assert next(each for each in found if each.name == "state folder").level == "FAIL"


def test_the_command_prints_lines_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both tell the same, and the exit code is that of the first FAIL."""
    missing = str(tmp_path / "none.toml")
    assert main(["doctor", "--config", missing]) == 11
    lines = capsys.readouterr().out.splitlines()
    assert main(["doctor", "--config", missing, "--json"]) == 11
    found = json.loads(capsys.readouterr().out)
    assert [line[:4].rstrip() for line in lines] == [each["level"] for each in found]
    assert found[-1]["name"] == "config"
