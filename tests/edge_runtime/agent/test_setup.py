"""The digest of what a device is set up with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from msgspec.structs import replace

from edge_runtime.agent.config import DeviceConfig
from edge_runtime.agent.setup import setup_of
from edge_runtime.protocol.messages import CheckInRequest, decode, encode


@pytest.fixture
def config(tmp_path: Path) -> DeviceConfig:
    """A device's configuration, with rows."""
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n')
    return DeviceConfig(
        coordinator_url="http://localhost",
        state_folder=tmp_path / "state",
        data=tmp_path / "data.jsonl",
        device_name="board",
        device_class="generic",
        publisher_key="A" * 43 + "=",
        cap=1 << 28,
    )


def test_what_an_operator_would_change_changes_it(config: DeviceConfig) -> None:
    """Another publisher key, cap, engine or data file gives another digest; nothing changed gives the same."""
    same = setup_of(config, "onnxruntime 1")
    assert setup_of(config, "onnxruntime 1") == same
    found = {same, setup_of(config, "onnxruntime 2"), setup_of(replace(config, cap=1 << 29), "onnxruntime 1")}
    found.add(setup_of(replace(config, publisher_key="B" * 43 + "="), "onnxruntime 1"))
    config.data.write_text('{"text": "b", "label": "x"}\n')
    found.add(setup_of(config, "onnxruntime 1"))
    os.utime(config.data, ns=(1, 1))
    found.add(setup_of(config, "onnxruntime 1"))
    assert len(found) == 6


def test_a_token_says_nothing(config: DeviceConfig) -> None:
    """A token that was used up and removed is no change, and the digest fits its message."""
    digest = setup_of(config, "onnxruntime 1")
    assert setup_of(replace(config, enrolment_token="one-time-token-0001"), "onnxruntime 1") == digest
    request = CheckInRequest("1", 1, 1, 1, setup=digest)
    assert decode(encode(request), CheckInRequest) == request
