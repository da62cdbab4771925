"""``make wheelhouse``: everything that a device installs in one file, for a device that reaches no package index.

The file is a plain tar, sorted and dated by ``SOURCE_DATE_EPOCH``: the pinned wheels, the project's own, a list that
pins them all by hash, and their bill of materials.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from devices.packaging.pins import PINS
from devices.packaging.sbom import write_bill
from devices.packaging.wheels import MACHINES, PYTHONS, ROOT, Target, fetch, metadata

INSTALL = """\
# Everything that a device installs, from this folder alone:
#   python{python} -m venv /opt/edge-runtime
#   /opt/edge-runtime/bin/pip install --no-index --find-links wheels --no-deps --require-hashes -r device.txt
"""


def pack(target: Target, wheels: Sequence[Path], output: Path, pins: Path = PINS) -> Path:
    """Write the wheelhouse.

    Args:
        target: what it is for.
        wheels: its wheels, the project's own among them.
        output: folder that it goes to.
        pins: the list that the others were fetched by.

    Returns:
        Path of the tar file.

    Raises:
        KeyError: ``SOURCE_DATE_EPOCH`` is not set.
    """
    (own,) = (wheel for wheel in wheels if metadata(wheel)["Name"] == "edge-runtime")
    version = metadata(own)["Version"]
    digest = hashlib.sha256(own.read_bytes()).hexdigest()
    pinned = re.sub(r"\A(#[^\n]*\n)+", "", pins.read_text())
    listed = f"{INSTALL.format(python=target.python)}{pinned}edge-runtime=={version} --hash=sha256:{digest}\n"
    name = f"edge-runtime-{version}-{target.name}"
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".wheelhouse-") as folder:
        work = Path(folder)
        (work / "device.txt").write_text(listed)
        write_bill(wheels, work / "sbom.cdx.json")
        contents = {f"wheels/{wheel.name}": wheel for wheel in wheels}
        contents |= {each: work / each for each in ("device.txt", "sbom.cdx.json")}
        with tarfile.open(work / "made.tar", "w", format=tarfile.PAX_FORMAT) as archive:
            for inside, path in sorted(contents.items()):
                entry = tarfile.TarInfo(f"{name}/{inside}")
                entry.size, entry.mode, entry.mtime = (
                    path.stat().st_size,
                    0o644,
                    int(os.environ["SOURCE_DATE_EPOCH"]),
                )
                with path.open("rb") as file:
                    archive.addfile(entry, file)
        return (work / "made.tar").rename(output / f"{name}.tar")


def main() -> None:
    """Write the wheelhouses that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("architecture", nargs="+", choices=tuple(MACHINES), help="processors they are for")
    parser.add_argument("--python", choices=tuple(PYTHONS), default="3.11", help="the devices' Python")
    parser.add_argument("--output", type=Path, default=ROOT / "build/wheelhouse", help="folder they go to")
    arguments = parser.parse_args()
    if not os.environ.get("SOURCE_DATE_EPOCH", "").isdecimal():
        parser.error("set SOURCE_DATE_EPOCH to the time of the files, as make wheelhouse does")
    for architecture in arguments.architecture:
        target = Target(architecture, arguments.python)
        packed = pack(target, fetch(target, ROOT / "build/wheels" / target.name), arguments.output)
        sys.stdout.write(f"{packed}\n")


if __name__ == "__main__":
    main()
