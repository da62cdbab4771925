"""A bundle for somebody who helps: what is wrong is in it, and no token, key, query or row."""

from __future__ import annotations

import gzip
import json
import tarfile
from pathlib import Path

import pytest

from edge_runtime.agent.doctor import Diagnosis
from edge_runtime.agent.host import Host
from edge_runtime.agent.store import Identity, Store
from edge_runtime.agent.support_bundle import write_support_bundle
from edge_runtime.cli import main
from tests.edge_runtime.agent.test_doctor import CONFIG
from tests.edge_runtime.packages import write_prepared

QUERY = "SELECT body AS text FROM mail WHERE owner = 'periwinkle'"
FOUND = [Diagnosis("swap", "WARN", "/var/swap", "swap to zram")]


def parts_of(path: Path) -> dict[str, object]:
    """Content of each file of a bundle."""
    with tarfile.open(path) as bundle:
        return {
            member.name.removeprefix("edge-runtime-support/"): json.load(bundle.extractfile(member))
            for member in bundle.getmembers()
        }


def test_a_bundle_tells_the_state_and_no_secret(tmp_path: Path) -> None:
    """Diagnoses, versions, configuration, status and what preparing measured; nothing that opens a door or is a row."""
    config, output = tmp_path / "device.toml", tmp_path / "bundle.tar.gz"
    config.write_text(f'{CONFIG}data_query = "{QUERY}"\n')
    (tmp_path / "data.csv").write_text("text,label\nzebrafish,x\n")
    store = Store(tmp_path / "state", disk_quota_bytes=1 << 30)
    store.save_identity(Identity("d-1", "A" * 43 + "="))
    store.key()
    store.split_key()
    write_prepared(tmp_path / "state/prepared" / ("a" * 64), "a" * 64)
    write_support_bundle(config, output, FOUND, Host(tmp_path))
    parts = parts_of(output)
    assert sorted(parts) == [
        *("config.json", "doctor.json", "prepared/" + "a" * 64 + ".json"),
        *("status.json", "versions.json"),
    ]
    assert parts["doctor.json"][0]["cure"] == "swap to zram"
    assert parts["status.json"]["device_id"] == "d-1"
    assert parts["config.json"]["enrolment_token"] == "set, and not told"
    assert parts["versions.json"]["libraries"]["onnxruntime"]
    whole = gzip.decompress(output.read_bytes())
    secrets = [(tmp_path / "state" / name).read_bytes() for name in ("device.key", "split.key")]
    for secret in (b"one-time-token", b"periwinkle", b"zebrafish", *secrets):
        assert secret not in whole
    assert output.stat().st_mode & 0o777 == 0o600


def test_a_broken_configuration_is_part_of_the_bundle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command writes what it can, names the file, and ends with 0: the bundle is what was asked for."""
    config, output = tmp_path / "device.toml", tmp_path / "bundle.tar.gz"
    config.write_text(CONFIG.replace('cap = "256M"', "cap = 256"))
    assert main(["support-bundle", "--config", str(config), "--output", str(output)]) == 0
    assert str(output) in capsys.readouterr().out
    parts = parts_of(output)
    assert 'did you mean "256M"?' in parts["error.json"]["message"]
    assert parts["doctor.json"][-1]["level"] == "FAIL"
