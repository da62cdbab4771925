"""A token that cannot be used: one line with the cure, a stable exit code, and nothing lost."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from edge_runtime.protocol.signing import generate_key
from tests.end_to_end.harness import Fleet, command, to_toml


def enrol(folder: Path, site: Fleet, token: str, name: str):
    """``edge-runtime enrol`` of a new device with a token."""
    folder.mkdir(exist_ok=True)
    (folder / "device.toml").write_text(
        to_toml(
            {
                "coordinator_url": site.url,
                "state_folder": "state",
                "train": False,
                "device_name": name,
                "device_class": "test",
                "publisher_key": generate_key().public_key,
                "enrolment_token": token,
                "cap": "256M",
            }
        )
    )
    return command("edge_runtime.cli", "enrol", "--config", folder / "device.toml")


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("wrong", "refused (unknown_token): no such enrolment token; ask the operator for one"),
        ("used", "refused (token_used): the enrolment token was used before; ask the operator for a new one"),
        (
            "expired",
            "refused (token_expired): the enrolment token has expired; ask the operator for a new one",
        ),
    ],
)
def test_a_token_that_cannot_be_used(site: Fleet, tmp_path: Path, kind: str, told: str) -> None:
    """The device ends with code 22; with a good token the same folder and key enrol."""
    token = (
        "no-such-token-at-all-0001"
        if kind == "wrong"
        else site.admin.create_token(0.01 if kind == "expired" else 600)
    )
    if kind == "used":
        assert enrol(tmp_path / "first", site, token, f"first-{kind}").returncode == 0
    time.sleep(0.1)
    done = enrol(tmp_path / "device", site, token, f"second-{kind}")
    assert (done.returncode, done.stderr.strip().splitlines()[-1]) == (22, f"error: {told}")
    key = (tmp_path / "device/state/device.key").read_bytes()
    assert not (tmp_path / "device/state/identity.json").exists()
    assert enrol(tmp_path / "device", site, site.admin.create_token(), f"second-{kind}").returncode == 0
    assert (tmp_path / "device/state/device.key").read_bytes() == key
