"""Whether the network is metered, as busctl tells NetworkManager's word."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from edge_runtime.agent.conditions import Conditions
from edge_runtime.agent.host import Host


@pytest.mark.parametrize(
    ("prints", "code", "metered"),
    [
        *(("u 1", 0, True), ("u 2", 0, False), ("u 3", 0, True), ("u 4", 0, False)),
        *(("u 0", 0, None), ("s yes", 0, None), ("", 0, None), ("u 1", 1, None)),
    ],
)
def test_a_metered_network(tmp_path: Path, prints: str, code: int, metered: bool | None) -> None:
    """NetworkManager's answer as busctl prints it: yes, no, a guess of either, or unknown."""
    program = tmp_path / "busctl"
    program.write_text(
        "#!/bin/sh\n"
        'test "$*" = "--system get-property org.freedesktop.NetworkManager /org/freedesktop/NetworkManager '
        'org.freedesktop.NetworkManager Metered" || exit 9\n'
        f"echo '{prints}'\nexit {code}\n"
    )
    program.chmod(0o755)
    assert subprocess.run([program, "list"], check=False).returncode == 9
    assert Conditions(Host(tmp_path), tmp_path, str(program)).metered is metered
