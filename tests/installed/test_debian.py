"""The Debian package in a real system: systemd starts, watches, upgrades and stops it, and purging leaves nothing.

``make test-deb`` runs this. The system is Debian's own, booted in a container; its network is this machine's, on which
a real coordinator runs.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.harness import Fleet, to_toml
from tests.end_to_end.workshop import Exported
from tests.installed.roots import ROOT, Machine, debian, overlay, why_no_mounts

REASON = why_no_mounts() or (
    None if shutil.which("systemd-nspawn") else "needs systemd-nspawn, of systemd-container"
)
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.slow]
#: What a Debian with a login has at any rate; its lists of packages are old, so nothing else can be fetched.
PACKAGES = ("systemd", "systemd-sysv", "dbus", "python3", "ca-certificates", "adduser")
STATE, CONFIG = "/var/lib/edge-runtime", "/etc/edge-runtime/device.toml"
#: Where the system itself writes at any time, and where apt and dpkg remember what was installed once.
ELSEWHERE = (
    "/proc",
    "/sys",
    "/dev",
    "/run",
    "*/tmp",
    "/var/log",
    "/var/cache",
    "/var/lib/dpkg",
    "/var/lib/apt",
)


@pytest.fixture(scope="module")
def package() -> Path:
    (found,) = (ROOT / "build/deb").glob("edge-runtime_*+py3.11_amd64.deb")
    return found


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("machine")
    with overlay(debian("amd64", PACKAGES), folder / "layers") as root:
        machine = Machine(root, folder / "console.log")
        try:
            yield machine
        finally:
            machine.close()


@pytest.fixture(scope="module")
def fleet(exported, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    package = Exported(exported.package.folder, exported.key.public_key)
    with Fleet(tmp_path_factory.mktemp("fleet") / "fleet", package) as fleet:
        fleet.create_run(rounds=100, devices_per_round=1, min_devices=1, min_results=1, steps=1, batch_size=4)
        yield fleet


@pytest.fixture(scope="module")
def files_before(machine: Machine) -> set[str]:
    return files(machine)


def files(machine: Machine) -> set[str]:
    """Every file, folder and link of the system."""
    skipped = " -o ".join(f"-path '{folder}'" for folder in ELSEWHERE)
    return set(machine("sh", "-c", f"find / \\( {skipped} \\) -prune -o -print").stdout.splitlines())


def write_rows(path: Path) -> None:
    """Eight rows with the labels of the small model."""
    from tests.export import tiny

    rows = [{"text": text, "label": tiny.LABELS[row % 3]} for row, text in enumerate(tiny.SENTENCES)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def accepted(fleet: Fleet) -> int:
    ((count,),) = fleet.query("SELECT count(*) FROM results")
    return int(str(count))


def install(machine: Machine, package: Path) -> str:
    """``apt install ./PACKAGE``; returns what it said."""
    shutil.copy(package, machine.root / "root" / package.name)
    done = machine("apt-get", "install", "--yes", f"/root/{package.name}")
    (machine.root / "root" / package.name).unlink()
    return done.stdout + done.stderr


def test_three_commands_lead_to_an_accepted_result(
    machine: Machine, fleet: Fleet, package: Path, files_before: set[str]
) -> None:
    """Install, fill in the configuration, start: systemd waits for the agent's word, and a result is accepted."""
    begun_s = time.monotonic()
    said = install(machine, package)
    assert "systemctl enable --now edge-runtime" in said
    assert machine("systemctl", "is-enabled", "edge-runtime", check=False).stdout.strip() == "disabled"
    installed_s = time.monotonic()
    config = machine.root / CONFIG.lstrip("/")
    assert machine("stat", "-c", "%a %U %G", CONFIG).stdout.split() == ["640", "root", "edge-runtime"]
    settings = {
        "coordinator_url": fleet.url,
        "publisher_key": fleet.package.publisher_key,
        "enrolment_token": fleet.admin.create_token(),
        "device_name": "board-1",
        "device_class": "generic",
        "data": "/srv/rows.jsonl",
        "state_folder": STATE,
        "cap": "512M",
        "arithmetic": "float",
    }
    config.write_text(to_toml(settings))
    write_rows(machine.root / "srv/rows.jsonl")
    machine("systemctl", "enable", "--now", "edge-runtime")
    assert machine.show("ActiveState", "StatusErrno")["ActiveState"] == "active"
    fleet.wait("an accepted result", lambda: accepted(fleet) >= 1)
    print(
        f"\ninstalled in {installed_s - begun_s:.0f} s, first accepted result after {time.monotonic() - begun_s:.0f} s,"
        " without the time that a person takes to type"
    )


def test_the_service_is_closed(machine: Machine) -> None:
    """The agent runs as its own user under the limits of its unit, and systemd rates it as little exposed."""
    shown = machine.show("User", "MemoryMax", "MemorySwapMax", "WatchdogUSec", "Type", "MainPID")
    assert (shown["User"], shown["Type"], shown["WatchdogUSec"]) == ("edge-runtime", "notify", "10min")
    memory = 1024 * int(Path("/proc/meminfo").read_text().split()[1])
    assert int(shown["MemoryMax"]) == pytest.approx(0.75 * memory, rel=0.01)
    status = machine("cat", f"/proc/{shown['MainPID']}/status").stdout
    assert "NoNewPrivs:\t1" in status
    assert "CapEff:\t0000000000000000" in status
    rated = machine("systemd-analyze", "security", "--no-pager", "edge-runtime", check=False).stdout
    print(f"\n{rated.splitlines()[-1].strip()}")
    assert float(rated.splitlines()[-1].split("edge-runtime.service:")[1].split()[0]) < 4.0


def test_doctor_finds_nothing_that_keeps_the_device_from_serving(machine: Machine) -> None:
    """Asked as the agent's user, the doctor has no FAIL but that the folder is in use, if that."""
    said = machine("runuser", "-u", "edge-runtime", "--", "edge-runtime", "doctor", check=False).stdout
    assert "OK   config" in said
    assert "FAIL" not in said, said


def test_an_upgrade_goes_on_where_the_agent_stood(
    machine: Machine, fleet: Fleet, package: Path, tmp_path: Path
) -> None:
    """The next version replaces files while no agent runs, keeps the configuration, and starts it with its identity."""
    before = machine.show("MainPID")["MainPID"]
    identity = machine("cat", f"{STATE}/identity.json").stdout
    config = machine("cat", CONFIG).stdout
    newer = repacked(package, tmp_path, "9.9+py3.11")
    install(machine, newer)
    assert machine("dpkg-query", "-W", "-f", "${Version}", "edge-runtime").stdout == "9.9+py3.11"
    shown = machine.show("MainPID", "ActiveState")
    assert shown["ActiveState"] == "active"
    assert shown["MainPID"] not in {"0", before}
    assert machine("cat", f"{STATE}/identity.json").stdout == identity
    assert machine("cat", CONFIG).stdout == config
    count = accepted(fleet)
    fleet.wait("a result of the new version", lambda: accepted(fleet) > count)


def repacked(package: Path, folder: Path, version: str) -> Path:
    """The same package under another version, quickly packed."""
    root, made = folder / "repacked", folder / "newer.deb"
    subprocess.run(["dpkg-deb", "--raw-extract", package, root], check=True)
    control = root / "DEBIAN/control"
    lines = control.read_text().splitlines(keepends=True)
    control.write_text(
        "".join(f"Version: {version}\n" if each.startswith("Version:") else each for each in lines)
    )
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-Znone", "--build", root, made], check=True, capture_output=True
    )
    return made


def test_an_agent_that_hangs_is_started_again(machine: Machine) -> None:
    """One that feeds the watchdog no more is killed and started again by systemd."""
    drop_in = "/run/systemd/system/edge-runtime.service.d"
    machine("mkdir", "-p", drop_in)
    text = "[Service]\\nWatchdogSec=4\\nTimeoutAbortSec=1\\nRestartSec=1\\n"
    machine("sh", "-c", f"printf '{text}' >{drop_in}/short.conf && systemctl daemon-reload")
    machine("systemctl", "restart", "edge-runtime")
    time.sleep(9)  # more than two periods, which an agent that lives outlasts
    alive = machine.show("NRestarts", "ActiveState", "MainPID")
    assert (alive["NRestarts"], alive["ActiveState"]) == ("0", "active")
    machine("kill", "-STOP", alive["MainPID"])
    deadline = time.monotonic() + 60
    while machine.show("NRestarts", "ActiveState") != {"NRestarts": "1", "ActiveState": "active"}:
        assert time.monotonic() < deadline, machine("journalctl", "-u", "edge-runtime", "--no-pager").stdout[
            -3000:
        ]
        time.sleep(0.5)
    assert machine.show("MainPID")["MainPID"] != alive["MainPID"]
    machine("sh", "-c", f"rm -r {drop_in} && systemctl daemon-reload")


def test_a_wrong_configuration_leaves_the_service_down(machine: Machine) -> None:
    """What only a person can cure is not tried again and again; the journal has the line that says what it is."""
    config = machine.root / CONFIG.lstrip("/")
    right = config.read_text()
    config.write_text(right + "caps = 1\n")
    machine("systemctl", "restart", "edge-runtime", check=False)
    assert machine.show("ActiveState", "NRestarts", "ExecMainStatus") == {
        "ActiveState": "failed",
        "NRestarts": "0",
        "ExecMainStatus": "11",
    }
    assert "caps" in machine("journalctl", "-u", "edge-runtime", "--no-pager").stdout
    config.write_text(right)
    machine("systemctl", "reset-failed", "edge-runtime")
    machine("systemctl", "start", "edge-runtime")


def test_removing_keeps_what_purging_takes(machine: Machine, files_before: set[str]) -> None:
    """Removed, configuration and key stay; purged, no file is left, no unit, no user."""
    machine("apt-get", "remove", "--yes", "edge-runtime")
    assert machine("test", "-e", CONFIG, check=False).returncode == 0
    assert machine("test", "-e", f"{STATE}/identity.json", check=False).returncode == 0
    assert machine("test", "-e", "/opt/edge-runtime", check=False).returncode != 0
    assert machine("pgrep", "-u", "edge-runtime", check=False).returncode != 0
    machine("apt-get", "purge", "--yes", "edge-runtime")
    left = files(machine) - files_before
    # The person's own rows, and the copies that passwd and its like keep of their files.
    assert {path for path in left if not path.endswith("-")} == {"/srv/rows.jsonl"}
    assert machine("getent", "passwd", "edge-runtime", check=False).returncode != 0
    assert machine("getent", "group", "edge-runtime", check=False).returncode != 0
    assert machine("systemctl", "cat", "edge-runtime", check=False).returncode != 0
