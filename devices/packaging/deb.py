"""``make deb``: a Debian package of the runtime, for a processor that need not be this machine's.

The package holds a tree as ``python3 -m venv`` would make it, without pip, under ``/opt/edge-runtime``: the pinned
wheels, unpacked as their makers built them, and the runtime. It runs on the system's Python. Why it does not use
Debian's own packages of numpy and the rest: docs/decisions/0027-packaging.md.

Two builds of one commit have the same bytes: wheels are pinned by hash, and ``dpkg-deb`` sorts names, gives files to
root and takes their times from ``SOURCE_DATE_EPOCH``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from devices.packaging.sbom import write_bill
from devices.packaging.wheels import PYTHONS, ROOT, Target, fetch, metadata, unpack

NAME = "edge-runtime"
HOME = Path("opt/edge-runtime")
SCRIPTS = Path(__file__).with_name("debian")
UNIT = ROOT / "devices/systemd/edge-runtime.service"
CONFIG = ROOT / "devices/profiles/generic.toml"
#: What a wheel of this kind loads from the system, besides Python.
DEPENDS = ("adduser", "ca-certificates", "libc6 (>= 2.34)", "libgcc-s1", "libstdc++6")
COMMAND = """\
#!/{home}/bin/python3 -I
import sys
from edge_runtime.cli import main
sys.exit(main())
"""
CONTROL = """\
Package: {name}
Version: {version}
Architecture: {architecture}
Maintainer: Edge runtime's maintainers <maintainers@localhost>
Installed-Size: {kib}
Depends: {depends}
Section: science
Priority: optional
Description: fine-tunes language models on this device, under a memory cap
 An agent that asks a coordinator for work, trains small slices of a quantised
 language model in a process that the kernel holds to a memory cap, and hands in
 what was learned. It never sends rows. The model that a fleet has trained can be
 used on the device with edge-runtime predict and edge-runtime serve.
"""


def build(target: Target, wheels: Sequence[Path], output: Path, *, compression: str = "xz") -> Path:
    """Build the package.

    Args:
        target: what it is for.
        wheels: its wheels, the project's own among them.
        output: folder that it goes to.
        compression: how dpkg-deb compresses its files.

    Returns:
        Path of the package.

    Raises:
        KeyError: ``SOURCE_DATE_EPOCH`` is not set.
        subprocess.CalledProcessError: dpkg-deb failed.
    """
    epoch = int(os.environ["SOURCE_DATE_EPOCH"])
    version = (
        f"{next(metadata(w)['Version'] for w in wheels if metadata(w)['Name'] == NAME)}+py{target.python}"
    )
    output.mkdir(parents=True, exist_ok=True)
    package = output / f"{NAME}_{version}_{target.architecture}.deb"
    with tempfile.TemporaryDirectory(dir=output, prefix=".deb-") as name:
        root, made = Path(name) / "root", Path(name) / package.name
        root.mkdir()
        _lay_out(root, target, wheels)
        _add_control(root, target, version)
        for path in (root, *root.rglob("*")):
            if not path.is_symlink() and path.is_dir():
                path.chmod(0o755)
            os.utime(path, (epoch, epoch), follow_symlinks=False)
        # One thread: xz cuts its stream by the number of threads.
        words = [
            "--root-owner-group",
            "--uniform-compression",
            "--threads-max=1",
            f"-Z{compression}",
            "--build",
        ]
        subprocess.run(
            ["/usr/bin/dpkg-deb", *words, str(root), str(made)], check=True, stdout=subprocess.DEVNULL
        )
        made.rename(package)
    return package


def _lay_out(root: Path, target: Target, wheels: Sequence[Path]) -> None:
    """The files of the package."""
    packages = root / HOME / f"lib/python{target.python}/site-packages"
    for wheel in wheels:
        # Of the project's own wheel the runtime alone: a device neither exports nor coordinates.
        unpack(wheel, packages, "edge_runtime" if metadata(wheel)["Name"] == NAME else "")
    (root / HOME / "bin").mkdir()
    (root / HOME / "bin/python3").symlink_to(f"/usr/bin/python{target.python}")
    _write(
        root / HOME / "pyvenv.cfg",
        f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {target.python}\n",
    )
    _write(root / HOME / "bin/edge-runtime", COMMAND.format(home=HOME), 0o755)
    (root / "usr/bin").mkdir(parents=True)
    (root / "usr/bin/edge-runtime").symlink_to(f"/{HOME}/bin/edge-runtime")
    _write(root / "usr/lib/systemd/system/edge-runtime.service", UNIT.read_text())
    _write(root / "etc/edge-runtime/device.toml", CONFIG.read_text(), 0o640)
    documents = root / "usr/share/doc/edge-runtime"
    _write(documents / "copyright", _copyright())
    write_bill(wheels, documents / "sbom.cdx.json")


def _add_control(root: Path, target: Target, version: str) -> None:
    """The package's description and its maintainer scripts."""
    sizes = [path.lstat().st_size for path in root.rglob("*") if not path.is_dir() or path.is_symlink()]
    # As dpkg counts: each file in whole KiB, each folder as one.
    folders = sum(1 for path in root.rglob("*") if path.is_dir() and not path.is_symlink())
    kib = sum(-(-size // 1024) for size in sizes) + folders
    following = f"{target.python.partition('.')[0]}.{int(target.python.partition('.')[2]) + 1}"
    depends = (
        f"python{target.python}",
        f"python3 (>= {target.python}~)",
        f"python3 (<< {following}~)",
        *DEPENDS,
    )
    text = CONTROL.format(
        name=NAME,
        version=version,
        architecture=target.architecture,
        kib=kib,
        depends=", ".join(sorted(depends)),
    )
    _write(root / "DEBIAN/control", text)
    _write(root / "DEBIAN/conffiles", "/etc/edge-runtime/device.toml\n")
    for script in ("postinst", "prerm", "postrm"):
        _write(root / "DEBIAN" / script, (SCRIPTS / script).read_text(), 0o755)


def _copyright() -> str:
    return (
        "Edge runtime is under the Apache License, version 2.0:\n/usr/share/common-licenses/Apache-2.0 on Debian.\n"
        "The packages beside it have their licences in their .dist-info folders below\n/opt/edge-runtime/lib; "
        "sbom.cdx.json lists them all.\n"
    )


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def main() -> None:
    """Build the packages that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("architecture", nargs="+", choices=("arm64", "amd64"), help="processors to build for")
    parser.add_argument("--python", choices=tuple(PYTHONS), default="3.11", help="the devices' Python")
    parser.add_argument("--output", type=Path, default=ROOT / "build/deb", help="folder of the packages")
    arguments = parser.parse_args()
    if not Path("/usr/bin/dpkg-deb").exists():
        parser.error(
            "there is no dpkg-deb here; it is in Debian's package dpkg, and in most other distributions"
        )
    if not os.environ.get("SOURCE_DATE_EPOCH", "").isdecimal():
        parser.error("set SOURCE_DATE_EPOCH to the time of the files, as make deb does")
    for architecture in arguments.architecture:
        target = Target(architecture, arguments.python)
        package = build(target, fetch(target, ROOT / "build/wheels" / target.name), arguments.output)
        sys.stdout.write(f"{package}\n")


if __name__ == "__main__":
    main()
