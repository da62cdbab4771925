"""Users and acts as plain text, and passwords from files."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.admin.users import act_table, read_password, user_table
from coordinator.api.admin_api import Act, UserSummary
from edge_runtime.errors import ConfigError


def test_tables_say_what_there_is_not() -> None:
    """Without a user or an act, a line says so; else there is a line for each."""
    assert "user add" in user_table([])
    assert act_table([]) == "nobody has done anything yet"
    assert user_table([UserSummary("ann", "viewer", "token", 0.0)]).splitlines()[1] == (
        "ann   viewer  token        1970-01-01 00:00:00 UTC"
    )
    assert "(a stranger)" in act_table([Act(1, 0.0, "", "sign in", "ann", "wrong_secret", "")])


def test_a_password_is_the_first_line(tmp_path: Path) -> None:
    """What follows the first line is not read; a file that is no text is refused by name."""
    path = tmp_path / "p"
    path.write_bytes(b"secret words\r\nmore\n")
    assert read_password(path) == "secret words"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not text"):
        read_password(path)
