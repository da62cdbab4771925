"""Users and the audit log as the command line has them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from coordinator.api.admin_api import Act, UserSummary
from edge_runtime.errors import ConfigError

#: Longer files are no passwords.
MOST_BYTES = 4096


def read_password(path: Path) -> str:
    """The first line of a file.

    Raises:
        ConfigError: the file cannot be read, or is no such file.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES)
        return data.decode("utf-8").partition("\n")[0].rstrip("\r")
    except OSError as error:
        raise ConfigError(f"cannot read --password-file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--password-file {path} is not text; write the password into its first line"
        ) from error


def user_table(users: Sequence[UserSummary]) -> str:
    """Users as aligned plain text."""
    if not users:
        return "no user yet; add one with: edge-coordinator user add NAME --role viewer"
    return _aligned(
        ("name", "role", "signs in by", "added"),
        [(user.name, user.role, user.signs_in_by, _moment(user.created_s)) for user in users],
    )


def act_table(acts: Sequence[Act]) -> str:
    """Acts as aligned plain text, the newest first."""
    if not acts:
        return "nobody has done anything yet"
    return _aligned(
        ("when", "who", "act", "about", "outcome", "detail"),
        [
            (_moment(act.at_s), act.who or "(a stranger)", act.act, act.subject, act.outcome, act.detail)
            for act in acts
        ],
    )


def _aligned(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, *rows]
    widths = [max(len(cells[column]) for cells in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in lines
    )


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
