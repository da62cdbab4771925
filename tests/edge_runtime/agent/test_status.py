"""``edge-runtime status``: in words and as JSON, without keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_runtime.agent.store import Identity, Store, TakenRelease
from edge_runtime.cli import main
from edge_runtime.protocol.messages import Release
from tests.edge_runtime.agent.test_doctor import CONFIG

RELEASE = Release(
    number=4,
    run_id="run-9",
    round=2,
    package="a" * 64,
    package_signature="A" * 86 + "==",
    values="b" * 64,
    sequence_limit=16,
)


def test_identity_and_release_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before and after both; JSON has the same as the lines, and neither has a token or a key."""
    config = tmp_path / "device.toml"
    config.write_text(CONFIG)
    assert main(["status", "--config", str(config)]) == 0
    before = capsys.readouterr().out
    assert "enrolled     no" in before
    assert "release      none" in before
    store = Store(tmp_path / "state", disk_quota_bytes=1 << 30)
    store.save_identity(Identity("d-1", "A" * 43 + "="))
    (tmp_path / "values").write_bytes(b"values")
    store.releases.switch_to(TakenRelease(RELEASE, 0.75, 0.5, 8), tmp_path / "values")
    assert main(["status", "--config", str(config)]) == 0
    assert "release      4, of run run-9, accuracy 0.750 on the rows here" in capsys.readouterr().out
    assert main(["status", "--config", str(config), "--json"]) == 0
    text = capsys.readouterr().out
    found = json.loads(text)
    assert (found["device_id"], found["release"], found["release_accuracy"]) == ("d-1", 4, 0.75)
    assert "one-time-token" not in text
