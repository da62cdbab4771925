"""Rows of the audit log."""

from __future__ import annotations

from coordinator.storage import audit_rows
from tests.coordinator.conftest import World


def test_strangers_push_nobody_out(world: World) -> None:
    """Acts of users stay, whatever strangers try; of strangers the newest stay."""
    with world.stores.storage.transaction() as connection:
        for number in range(5):
            audit_rows.begin(connection, at_s=0, who="ann", act="stop a run", subject=str(number))
            audit_rows.begin(connection, at_s=0, who="", act="sign in", subject=str(number))
        audit_rows.forget_strangers(connection, kept=2)
        left = audit_rows.newest(connection, before=1 << 62, limit=100)
        assert [row.subject for row in left if row.who] == ["4", "3", "2", "1", "0"]
        assert [row.subject for row in left if not row.who] == ["4", "3"]
        assert [row.audit_id for row in audit_rows.newest(connection, before=left[0].audit_id, limit=1)] == [
            left[1].audit_id
        ]


def test_an_act_that_was_cut_off_says_so(world: World) -> None:
    """An act stands as begun until its end is known."""
    with world.stores.storage.transaction() as connection:
        audit_id = audit_rows.begin(connection, at_s=1, who="ann", act="stop a run", subject="r")
        (row,) = audit_rows.newest(connection, before=1 << 62, limit=9)
        assert row.outcome == "begun"
        audit_rows.end(connection, audit_id, outcome="done", detail="x")
        (row,) = audit_rows.newest(connection, before=1 << 62, limit=9)
        assert (row.outcome, row.detail) == ("done", "x")
