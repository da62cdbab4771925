"""The wheelhouse: one file from which a device without a package index installs, and that is always the same."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from devices.packaging.wheelhouse import pack
from devices.packaging.wheels import Target
from tests.devices.packaging.test_deb import EPOCH, write_wheel


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheelhouse of two small wheels."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(EPOCH))
    wheels = [write_wheel(tmp_path, name) for name in ("edge_runtime", "numpy")]
    digest = hashlib.sha256(wheels[1].read_bytes()).hexdigest()
    (tmp_path / "pins.txt").write_text(f"# made\nnumpy==1.0 \\\n    --hash=sha256:{digest}\n")
    made = [
        pack(Target("arm64", "3.11"), wheels, tmp_path / out, tmp_path / "pins.txt") for out in ("a", "b")
    ]
    assert made[0].read_bytes() == made[1].read_bytes()
    return made[0]


def test_a_device_installs_from_the_file_alone(packed: Path, tmp_path: Path) -> None:
    """The words at the head of its list install every wheel, by hash and without an index."""
    with tarfile.open(packed) as archive:
        archive.extractall(tmp_path / "device", filter="data")
    (folder,) = (tmp_path / "device").iterdir()
    assert folder.name == "edge-runtime-1.0-arm64-python3.11"
    line = next(
        line for line in (folder / "device.txt").read_text().splitlines() if "bin/pip install" in line
    )
    words = line.split("bin/pip ")[1].split()
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words, "--target", tmp_path / "installed"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "installed/edge_runtime/__init__.py").is_file()
    assert (tmp_path / "installed/numpy/__init__.py").is_file()


def test_a_wheelhouse_holds_wheels_list_and_bill(packed: Path) -> None:
    """All files are dated by the commit and belong to nobody in particular."""
    with tarfile.open(packed) as archive:
        entries = archive.getmembers()
    assert [entry.name.partition("/")[2] for entry in entries] == [
        "device.txt",
        "sbom.cdx.json",
        "wheels/edge_runtime-1.0-py3-none-any.whl",
        "wheels/numpy-1.0-py3-none-any.whl",
    ]
    assert {(entry.mtime, entry.mode, entry.uid) for entry in entries} == {(EPOCH, 0o644, 0)}
