"""The Debian package, built of small wheels that stand for the pinned ones: what it holds, and that it stays so."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from zipfile import ZipFile, ZipInfo

import pytest

from devices.packaging.deb import SCRIPTS, build
from devices.packaging.wheels import Target

pytestmark = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="there is no dpkg-deb here")
TARGET = Target("arm64", "3.11")
EPOCH = 1_790_000_000
FILES = {
    "edge_runtime": {"edge_runtime/__init__.py": "", "coordinator/__init__.py": "", "export/cli.py": ""},
    "numpy": {
        "numpy/__init__.py": "",
        "numpy/core.cpython-311-aarch64-linux-gnu.so": "machine code",
        "numpy.libs/libblas-1.so": "more of it",
    },
}


def write_wheel(folder: Path, name: str, hour: int = 0, licence: str = "License-Expression: MIT") -> Path:
    """A wheel of one of FILES."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    told = f"Metadata-Version: 2.4\nName: {name.replace('_', '-')}\nVersion: 1.0\n{licence}\n"
    folder = f"{name}-1.0.dist-info"
    contents = {
        **FILES[name],
        f"{folder}/METADATA": told,
        f"{folder}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    contents[f"{folder}/RECORD"] = "".join(f"{each},,\n" for each in (*contents, f"{folder}/RECORD"))
    with ZipFile(path, "w") as archive:
        for inside, text in contents.items():
            archive.writestr(ZipInfo(inside, (2020, 1, 1, hour, 0, 0)), text)
    return path


def build_in(folder: Path, umask: int, hour: int = 0) -> Path:
    """The package, built in a folder by a process with its own mask of modes."""
    folder.mkdir()
    before = os.umask(umask)
    try:
        wheels = [write_wheel(folder, name, hour) for name in FILES]
        return build(TARGET, wheels, folder / "out", compression="none")
    finally:
        os.umask(before)


@pytest.fixture
def epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(EPOCH))


def unpacked(package: Path, folder: Path) -> Path:
    subprocess.run(["dpkg-deb", "--raw-extract", package, folder], check=True)
    return folder


def test_two_builds_have_the_same_bytes(tmp_path: Path, epoch: None) -> None:
    """Neither the place of a build, nor its time, nor the mask of modes shows in the package."""
    first = build_in(tmp_path / "a", 0o022)
    second = build_in(tmp_path / "somewhere-else", 0o077, hour=7)
    wheels = [tmp_path / "a" / "numpy-1.0-py3-none-any.whl", second.parents[1] / "numpy-1.0-py3-none-any.whl"]
    assert wheels[0].read_bytes() != wheels[1].read_bytes()
    assert first.name == second.name == "edge-runtime_1.0+py3.11_arm64.deb"
    difference = _differing(unpacked(first, tmp_path / "x"), unpacked(second, tmp_path / "y"))
    # The bill names the wheels' digests, and these wheels were made at two hours.
    assert difference == {"usr/share/doc/edge-runtime/sbom.cdx.json"}
    third = build_in(tmp_path / "c", 0o077)
    assert third.read_bytes() == first.read_bytes()


def _differing(one: Path, other: Path) -> set[str]:
    names = {str(p.relative_to(top)) for top in (one, other) for p in top.rglob("*") if p.is_file()}
    return {name for name in names if (one / name).read_bytes() != (other / name).read_bytes()}


def test_what_a_package_holds(tmp_path: Path, epoch: None) -> None:
    """Root owns everything; the runtime and its libraries are there, and neither exporter nor coordinator."""
    package = build_in(tmp_path / "a", 0o027)
    listed = subprocess.run(
        ["dpkg-deb", "--contents", package], capture_output=True, text=True, check=True
    ).stdout
    assert {line.split()[1] for line in listed.splitlines()} == {"root/root"}
    root = unpacked(package, tmp_path / "x")
    packages = root / "opt/edge-runtime/lib/python3.11/site-packages"
    assert sorted(path.name for path in packages.iterdir()) == [
        "edge_runtime",
        "numpy",
        "numpy-1.0.dist-info",
        "numpy.libs",
    ]
    assert (packages / "numpy/core.cpython-311-aarch64-linux-gnu.so").stat().st_mode & 0o777 == 0o755
    assert (root / "etc/edge-runtime/device.toml").stat().st_mode & 0o777 == 0o640
    assert (root / "usr/lib/systemd/system/edge-runtime.service").is_file()
    assert (root / "opt/edge-runtime/bin/python3").readlink() == Path("/usr/bin/python3.11")
    assert (root / "DEBIAN/conffiles").read_text() == "/etc/edge-runtime/device.toml\n"


def test_a_package_tells_what_it_needs(tmp_path: Path, epoch: None) -> None:
    """It depends on the very Python that its wheels were built for, and upgrades to that of the next system."""
    package = build_in(tmp_path / "a", 0o022)
    told = subprocess.run(["dpkg-deb", "--field", package], capture_output=True, text=True, check=True).stdout
    fields = dict(line.split(": ", 1) for line in told.splitlines() if ": " in line and line[0] != " ")
    assert fields["Architecture"] == "arm64"
    assert {"python3.11", "python3 (>= 3.11~)", "python3 (<< 3.12~)"} <= set(fields["Depends"].split(", "))
    newer = ["dpkg", "--compare-versions", "1.0+py3.13", "gt", fields["Version"]]
    assert subprocess.run(newer, check=False).returncode == 0


def test_a_bill_of_materials_is_in_the_package(tmp_path: Path, epoch: None) -> None:
    """It names each wheel with digest and licence, and below it the shared libraries that the wheel carries."""
    root = unpacked(build_in(tmp_path / "a", 0o022), tmp_path / "x")
    bill = json.loads((root / "usr/share/doc/edge-runtime/sbom.cdx.json").read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert bill["metadata"]["component"]["name"] == "edge-runtime"
    (numpy,) = bill["components"]
    assert (numpy["purl"], numpy["licenses"]) == ("pkg:pypi/numpy@1.0", [{"expression": "MIT"}])
    assert [each["name"] for each in numpy["components"]] == ["libblas-1.so"]
    assert bill["dependencies"][0]["dependsOn"] == [numpy["bom-ref"]]


def test_a_licence_that_nobody_knows_stops_the_build(tmp_path: Path, epoch: None) -> None:
    """A wheel that does not tell its licence in known words is named, rather than listed without one."""
    wheels = [
        write_wheel(tmp_path, "edge_runtime"),
        write_wheel(tmp_path, "numpy", licence="License: see the file"),
    ]
    with pytest.raises(ValueError, match=r"numpy 1\.0 states its licence as 'see the file'"):
        build(TARGET, wheels, tmp_path / "out", compression="none")


@pytest.mark.parametrize("script", ["postinst", "prerm", "postrm"])
def test_maintainer_scripts_are_shell(script: str) -> None:
    """A POSIX shell reads each script, and each ends at the first command that fails."""
    assert subprocess.run(["sh", "-n", SCRIPTS / script], check=False).returncode == 0
    assert "\nset -e\n" in (SCRIPTS / script).read_text()
