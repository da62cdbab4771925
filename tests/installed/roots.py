"""Debian systems to install packages in: made once by debootstrap, and used through an overlay that is thrown away.

Everything is mounted in the mount namespace of the process that runs the tests, which ``make test-deb`` and ``make
test-arm64`` start by ``unshare --mount``: when it ends, nothing stays mounted.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build/roots"
SUITE = "bookworm"
#: The kernel's register of programs that are run by an interpreter, and its entry for arm64, as Debian ships it.
BINFMT = Path("/proc/sys/fs/binfmt_misc")
ARM64_RULE = Path("/usr/lib/binfmt.d/qemu-aarch64.conf")
QEMU = Path("/usr/bin/qemu-aarch64-static")
PATIENCE_S = 120.0


def debian(architecture: str, packages: tuple[str, ...]) -> Path:
    """The root folder of a fresh Debian with some packages, which must be left as it is.

    It comes from the mirror that ``DEBIAN_MIRROR`` names, or from that of this machine's own apt.
    """
    folder = CACHE / f"{SUITE}-{architecture}"
    if folder.exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    making = CACHE / f".making-{SUITE}-{architecture}"
    if making.exists():
        _require_unmounted(making)
        shutil.rmtree(making)
    words = [
        f"--arch={architecture}",
        "--variant=minbase",
        f"--include={','.join(packages)}",
        SUITE,
        making,
        mirror(),
    ]
    # In a namespace of its own, so that what debootstrap mounts does not outlive it, however it ends.
    subprocess.run(["unshare", "--mount", "--propagation", "private", "debootstrap", *words], check=True)
    making.rename(folder)
    return folder


def mirror() -> str:
    """Where Debian's archive is."""
    if named := os.environ.get("DEBIAN_MIRROR"):
        return named
    words = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Origin: Debian"]
    found = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    plain = [address for address in found if "security" not in address]
    if not plain:
        raise RuntimeError("this machine's apt knows no Debian archive; name one in DEBIAN_MIRROR")
    return plain[0]


def why_no_mounts() -> str | None:
    """Why no system can be mounted here; None if one can."""
    if os.geteuid() != 0:
        return "needs root: it mounts Debian systems"
    if shutil.which("debootstrap") is None:
        return "needs debootstrap"
    if "EDGE_OWN_MOUNTS" not in os.environ:
        return "runs in a mount namespace of its own: make test-deb or make test-arm64"
    return None


def why_no_arm64() -> str | None:
    """Why programs for arm64 cannot run here; None if they can, after the kernel was told how."""
    if os.uname().machine == "aarch64":
        return None
    if not QEMU.exists() or not ARM64_RULE.exists():
        return "needs qemu-user-static"
    if not (BINFMT / "register").exists():
        mounted = subprocess.run(
            ["mount", "-t", "binfmt_misc", "none", BINFMT], capture_output=True, check=False
        )
        if mounted.returncode != 0:
            return f"binfmt_misc cannot be mounted here: {mounted.stderr.decode().strip()}"
    if not (BINFMT / "qemu-aarch64").exists():
        try:
            (BINFMT / "register").write_bytes(_rule())
        except OSError as error:
            return f"the kernel takes no interpreter for arm64: {error.strerror}"
    return None


def _rule() -> bytes:
    """Debian's entry with the emulator itself as interpreter, opened now, so that it works inside other roots."""
    (line,) = (line for line in ARM64_RULE.read_text().splitlines() if line.startswith(":"))
    return f"{line.rsplit(':', 2)[0]}:{QEMU}:OCF".encode()


@contextmanager
def overlay(lower: Path, folder: Path) -> Iterator[Path]:
    """A root that begins as ``lower`` is; what is written goes to ``folder`` and is left there."""
    upper, work, merged = (folder / name for name in ("upper", "work", "root"))
    for each in (upper, work, merged):
        each.mkdir(parents=True)
    layers = f"lowerdir={lower},upperdir={upper},workdir={work}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, merged], check=True)
    try:
        yield merged
    finally:
        _require_unmounted(merged)
        subprocess.run(["umount", merged], check=True)
        shutil.rmtree(folder, ignore_errors=True)


def _require_unmounted(folder: Path) -> None:
    """Nothing may be removed below a mount point: it would be removed from what is mounted there."""
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):  # the last first
        if line.split()[1].startswith(f"{folder}/"):
            subprocess.run(["umount", line.split()[1]], check=True)


class Machine:
    """A Debian system with systemd as its first process, in a container on this machine's network.

    Args:
        root: its root folder.
        log: file for its console.
    """

    def __init__(self, root: Path, log: Path) -> None:
        self.root = root
        words = ["systemd-nspawn", "--directory", root, "--boot", "--register=no", "--keep-unit", "--quiet"]
        with log.open("wb") as console:
            self._container = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT
            )
        self._leader = ""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and self._container.poll() is None:
            children = (
                Path(f"/proc/{self._container.pid}/task/{self._container.pid}/children").read_text().split()
            )
            self._leader = children[0] if children else ""
            if (
                self._leader
                and self("systemctl", "is-system-running", check=False).stdout.strip() == "running"
            ):
                return
            time.sleep(0.2)
        self.close()
        raise AssertionError(f"systemd did not come up:\n{log.read_text()[-3000:]}")

    def __call__(self, *words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in the system, as root."""
        done = subprocess.run(
            ["nsenter", "--target", self._leader, "--all", *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            env={
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                "DEBIAN_FRONTEND": "noninteractive",
                "LC_ALL": "C.UTF-8",
            },
            stdin=subprocess.DEVNULL,
        )
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done

    def show(self, *properties: str) -> dict[str, str]:
        """Properties of the agent's unit."""
        words = [f"--property={','.join(properties)}"]
        lines = self("systemctl", "show", "edge-runtime.service", *words).stdout.splitlines()
        return dict(line.split("=", 1) for line in lines)

    def close(self) -> None:
        """Shut it down."""
        if self._container.poll() is None:
            if self._leader:
                os.kill(int(self._leader), signal.SIGRTMIN + 4)  # to systemd: power off
            try:
                self._container.wait(30)
            except subprocess.TimeoutExpired:
                self._container.terminate()
                self._container.wait()
