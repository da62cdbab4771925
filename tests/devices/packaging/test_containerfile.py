"""The container file: what it copies is what make deb makes, and what it starts runs without rights."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path

from devices.packaging import deb
from edge_runtime.cli import build_parser

FILE = Path(deb.__file__).with_name("Containerfile")


def instructions() -> list[tuple[str, str]]:
    """Instructions and their words, continued lines joined."""
    lines = FILE.read_text().replace("\\\n", " ").splitlines()
    return [tuple(line.split(None, 1)) for line in lines if line and not line.startswith("#")]


def test_the_agent_runs_as_its_user() -> None:
    """The last user is the agent's, and nothing is run after it."""
    names = [name for name, _ in instructions()]
    assert set(names) <= {"ARG", "FROM", "COPY", "RUN", "VOLUME", "USER", "ENTRYPOINT", "CMD"}
    assert dict(instructions())["USER"] == "edge-runtime"
    assert names[names.index("USER") :] == ["USER", "ENTRYPOINT", "CMD"]


def test_the_command_is_a_command() -> None:
    """What a container starts is the program of the package, with words that its command line takes."""
    told = dict(instructions())
    assert json.loads(told["ENTRYPOINT"]) == ["/usr/bin/edge-runtime"]
    build_parser().parse_args(json.loads(told["CMD"]))


def test_the_package_is_found() -> None:
    """The name that is copied is that of a package of make deb."""
    pattern = dict(instructions())["COPY"].split()[0].replace("${TARGETARCH}", "arm64")
    assert fnmatch.fnmatch("edge-runtime_0.1.0+py3.11_arm64.deb", pattern)
