"""The wheels that a device installs, for a processor and a Python that need not be this machine's.

They are those that ``device.txt`` pins, by hash, and the project's own. pip fetches them from wherever it is configured
to, so neither a compiler for the device nor a device is needed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from email.message import Message
from email.parser import Parser
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile, ZipInfo

from msgspec import Struct

from devices.packaging.pins import PINS

ROOT = Path(__file__).parents[2]
#: Debian's name of a processor, and that of wheels.
MACHINES = {"arm64": "aarch64", "amd64": "x86_64"}
#: Python of a package, and where it is the system's own.
PYTHONS = {
    "3.11": "Debian 12, Raspberry Pi OS of 2023",
    "3.12": "Ubuntu 24.04, JetPack 7",
    "3.13": "Debian 13, Raspberry Pi OS of 2025",
}
#: What wheels may ask for of the C library is at most Debian 12's; the oldest wheels for arm64 ask for 2.17.
GLIBC_MINORS = range(36, 16, -1)


class Target(Struct, frozen=True):
    """What wheels are for.

    Attributes:
        architecture: Debian's name of the processor.
        python: version of Python, such as ``3.11``.
    """

    architecture: str
    python: str

    @property
    def name(self) -> str:
        """Name of a folder of such wheels."""
        return f"{self.architecture}-python{self.python}"


def fetch(target: Target, folder: Path) -> list[Path]:
    """Download the pinned wheels for a target, and make the project's own.

    Args:
        target: what they are for.
        folder: folder that they go to; wheels that are there are not fetched again.

    Returns:
        The wheels, sorted by name.

    Raises:
        subprocess.CalledProcessError: pip found no wheel with a pinned hash, or could not reach an index.
    """
    download(target, PINS, folder)
    for older in folder.glob("edge_runtime-*.whl"):
        older.unlink()
    shutil.rmtree(ROOT / "build/lib", ignore_errors=True)  # modules that are gone would come back from there
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT))
    (own,) = folder.glob("edge_runtime-*.whl")
    _settle(own)
    pinned = {name.partition("==")[0] for name in PINS.read_text().splitlines() if "==" in name}
    wheels = {metadata(path)["Name"]: path for path in sorted(folder.glob("*.whl"))}
    return [path for name, path in wheels.items() if name in pinned | {"edge-runtime"}]


def download(target: Target, requirements: Path, folder: Path) -> None:
    """Download wheels for a target.

    Args:
        target: what they are for.
        requirements: file that pins them, with hashes; what they depend on is not looked at.
        folder: folder that they go to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    machine, digits = MACHINES[target.architecture], target.python.replace(".", "")
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in GLIBC_MINORS] + [f"manylinux2014_{machine}"]
    abis = [f"cp{digits}", "abi3", "none"]
    _pip(
        *(
            "download",
            "--no-deps",
            "--require-hashes",
            "--only-binary",
            ":all:",
            "--requirement",
            str(requirements),
        ),
        *("--dest", str(folder), "--implementation", "cp", "--python-version", target.python),
        *(word for name in platforms for word in ("--platform", name)),
        *(word for name in abis for word in ("--abi", name)),
    )


def _settle(wheel: Path) -> None:
    """Write a wheel again so that its bytes depend on what is in it alone: not on modes of a checkout, nor on zlib."""
    with ZipFile(wheel) as archive:
        contents = [(entry, archive.read(entry)) for entry in archive.infolist()]
    with ZipFile(wheel, "w", ZIP_STORED) as archive:
        for entry, data in sorted(contents, key=lambda each: each[0].filename):
            settled = ZipInfo(entry.filename, entry.date_time)
            settled.external_attr = 0o100644 << 16
            archive.writestr(settled, data)


def metadata(wheel: Path) -> Message:
    """The METADATA of a wheel: name, version, licence, what it requires."""
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def unpack(wheel: Path, folder: Path, only: str = "") -> None:
    """Unpack a wheel as it is into a folder of packages, whatever processor it is for.

    Args:
        wheel: the wheel.
        folder: folder that its files go to.
        only: folder of the wheel that is taken alone; empty takes all.

    Raises:
        ValueError: the wheel has files for elsewhere, which this does not install.
    """
    with ZipFile(wheel) as archive:
        for entry in archive.infolist():
            top = entry.filename.partition("/")[0]
            if top.endswith(".data"):
                raise ValueError(f"{wheel.name} has {entry.filename} for outside of the packages' folder")
            if entry.is_dir() or (only and top != only):
                continue
            path = Path(archive.extract(entry, folder))
            path.chmod(0o755 if path.suffix == ".so" or ".so." in path.name else 0o644)


def _pip(*words: str) -> None:
    # Times within the project's wheel are those of SOURCE_DATE_EPOCH, which the caller has set.
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *words], check=True, env=os.environ)
