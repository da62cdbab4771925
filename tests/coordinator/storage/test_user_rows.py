"""Rows of users and sessions."""

from __future__ import annotations

from coordinator.storage import user_rows
from coordinator.storage.user_rows import SessionRow, UserRow
from tests.coordinator.conftest import World


def test_users_are_kept_by_name(world: World) -> None:
    """A name is taken once, a user is found by name and by token, and goes with its sessions."""
    ann = UserRow("ann", "viewer", None, "t" * 64, 1.0)
    session = SessionRow("ann", "c", "w", 5.0)
    with world.stores.storage.transaction() as connection:
        assert user_rows.add(connection, ann)
        assert not user_rows.add(connection, UserRow("ann", "admin", "p", None, 2.0))
        assert user_rows.find(connection, "ann") == ann == user_rows.find_by_token(connection, "t" * 64)
        user_rows.add_session(connection, "s", session)
        user_rows.forget_sessions(connection, 5.0)
        assert user_rows.find_session(connection, "s") == session
        assert user_rows.remove(connection, "ann")
        assert not user_rows.remove(connection, "ann")
        assert user_rows.find_session(connection, "s") is None
        assert user_rows.all_users(connection) == []
