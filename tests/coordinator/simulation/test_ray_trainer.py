"""Training on a Ray cluster of this machine, against training in process."""

from __future__ import annotations

import builtins
import io
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.cli import main
from coordinator.simulation.config import read_simulation_config
from coordinator.simulation.record import Record
from coordinator.simulation.report.progress import Lines
from coordinator.simulation.sweep import Options, make_plan, sweep
from edge_runtime.errors import ConfigError
from tests.coordinator.simulation.conftest import Workshop, timeless

ROOT = Path(__file__).parents[3]
SCRIPT = "ray.scripts.scripts"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a head with two cores on this machine; it is gone after the test."""
    pytest.importorskip("ray")
    port = free_port()
    command = [
        sys.executable, "-m", SCRIPT, "start", "--head", "--block", f"--port={port}", "--num-cpus=2",
        "--include-dashboard=false", "--disable-usage-stats", f"--dashboard-agent-listen-port={free_port()}",
        "--node-ip-address=127.0.0.1", "--object-store-memory=100000000",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as head:
        try:
            assert head.stdout is not None
            for line in head.stdout:
                if "Ray runtime started" in line:
                    break
            else:
                pytest.fail("the head did not start")
            yield f"127.0.0.1:{port}"
        finally:
            head.terminate()
            try:
                head.wait(20)
            except subprocess.TimeoutExpired:
                head.kill()


def simulate(workshop: Workshop, output: str, ray: str | None, **changes: Any) -> list[Record]:
    """A sweep, on a cluster if there is an address."""
    config = read_simulation_config(workshop.write(**changes))
    options = Options(workshop.folder / output, threads=1, ray=ray)
    return sweep(make_plan(config, options), Lines(io.StringIO()))


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.*:FutureWarning", "ignore:.*:DeprecationWarning", "ignore:.*:ResourceWarning"
)
def test_a_cluster_gives_the_same_bytes(cluster: str, workshop: Workshop) -> None:
    """Arms trained by Ray's actors end with the records of arms trained here."""
    arms = [
        {"name": "ours", "package": "bigram"},
        {"name": "more", "package": "bigram", "run": {"batch_size": 8, "draws": 5}},
    ]
    changes: dict[str, Any] = {"arms": arms, "dropout": {"rate": 0.2}}
    here = simulate(workshop, "here", None, **changes)
    there = simulate(workshop, "there", cluster, **changes)
    assert [timeless(record) for record in there] == [timeless(record) for record in here]
    assert [record.status for record in here] == ["finished", "finished"]


def test_without_ray_the_message_says_how_to_install_it(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine without Ray is told the install command in one line, and nothing is written."""
    real = builtins.__import__

    def without_ray(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "ray":
            raise ImportError(name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without_ray)
    with pytest.raises(ConfigError, match=r"pip install 'edge-runtime\[ray\]'"):
        simulate(workshop, "out", "auto")
    assert main(["simulate", str(workshop.write()), "--output", str(workshop.folder / "out"), "--ray"]) == 11
    assert "pip install 'edge-runtime[ray]'" in capsys.readouterr().err
    assert not (workshop.folder / "out").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.*:FutureWarning", "ignore:.*:DeprecationWarning", "ignore:.*:ResourceWarning"
)
def test_without_a_cluster_the_message_says_how_to_start_one(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no cluster runs, or one that was killed, one line tells to start it, and nothing is written."""
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no Ray cluster runs at auto; .*ray start --head"):
        simulate(workshop, "out", "auto")
    gone = f"127.0.0.1:{free_port()}"
    with pytest.raises(ConfigError, match=f"no Ray cluster runs at {gone}"):
        simulate(workshop, "out", gone)
    assert not (workshop.folder / "out").exists()
