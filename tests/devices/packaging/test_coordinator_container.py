"""The coordinator's container file and its compose file: no container engine is needed to see that they fit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from coordinator.cli import build_parser

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "devices" / "packaging" / "coordinator"


def instructions() -> list[tuple[str, str]]:
    """Instructions and their words, continued lines joined."""
    lines = (FOLDER / "Containerfile").read_text().replace("\\\n", " ").splitlines()
    return [tuple(line.split(None, 1)) for line in lines if line and not line.startswith("#")]


def test_the_coordinator_runs_without_rights() -> None:
    """The last user is the coordinator's, nothing is run after it, and what is copied exists."""
    names = [name for name, _ in instructions()]
    assert names[names.index("USER") :] == ["USER", "ENTRYPOINT", "CMD"]
    told = dict(instructions())
    assert told["USER"] == "edge-coordinator"
    for name, words in instructions():
        if name == "COPY":
            assert all((ROOT / source).exists() for source in words.split()[:-1]), words


def test_its_command_is_a_command() -> None:
    """What the container starts is the program, with words that its command line takes, and the extras exist."""
    told = dict(instructions())
    assert json.loads(told["ENTRYPOINT"]) == ["edge-coordinator"]
    arguments = build_parser().parse_args(json.loads(told["CMD"]))
    assert str(arguments.state).startswith(told["VOLUME"])
    assert str(arguments.port) == told["EXPOSE"]
    extras = re.search(r"\[([a-z0-9,]+)\]", told["RUN"])
    assert extras is not None
    project = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras.group(1).split(","))


def test_three_coordinators_share_what_they_must() -> None:
    """The compose file's command is one too; all replicas have one database, bucket and secrets, and no state folder in
    common, and no password stands in it."""
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    service = compose["services"]["coordinator"]
    arguments = build_parser().parse_args(service["command"])
    assert service["deploy"]["replicas"] == 3
    assert arguments.database == "postgresql://edge@database/edge"
    assert "database" in compose["services"]
    assert arguments.blobs.startswith("${BLOBS:?")
    mounted = [volume.split(":")[1] for volume in service["volumes"]]
    assert str(arguments.secrets) in mounted
    assert not any(str(arguments.state).startswith(place) for place in mounted)
    assert (
        FOLDER / service["build"]["context"] / service["build"]["dockerfile"]
    ).resolve() == FOLDER / "Containerfile"
    assert {volume.partition(":")[0] for volume in service["volumes"] if not volume.startswith("/")} <= set(
        compose["volumes"]
    )
    assert set(service["secrets"]) | set(compose["services"]["database"]["secrets"]) == set(
        compose["secrets"]
    )
    command = compose["services"]["address"]["command"]
    assert command[command.index("--to") + 1] == f"coordinator:{arguments.port}"
