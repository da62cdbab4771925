"""Users: passwords, tokens, roles, sessions and how they end."""

from __future__ import annotations

import pytest

from coordinator import accounts
from coordinator.accounts import Principal
from coordinator.refusals import ConflictError, NotFoundError, UnauthenticatedError
from tests.coordinator.conftest import World

ADMIN = "the state folder's token"


def test_a_password_is_known_and_not_kept() -> None:
    """What is kept holds neither the password nor another one's salt, and knows the password alone."""
    kept = accounts.hash_password("correct horse battery")
    assert "correct" not in kept
    assert kept != accounts.hash_password("correct horse battery")
    assert accounts.is_password("correct horse battery", kept)
    assert not accounts.is_password("correct horse batterx", kept)


def test_scrypt_is_that_of_the_standard() -> None:
    """The second test vector of RFC 7914, section 12, is what a kept password of these parameters is compared with."""
    digest = (
        "fdbabe1c9d3472007856e7190d01e9fe7c6ad7cbc8237830e77376634b373162"
        "2eaf30d92e22a3886ff109279d9830dac727afb94a83ee6d8360cbdfa2cc0640"
    )
    assert accounts.is_password("password", f"scrypt$1024$8$16${b'NaCl'.hex()}${digest}")


@pytest.mark.parametrize(
    ("role", "may"), [("viewer", (1, 0, 0)), ("operator", (1, 1, 0)), ("admin", (1, 1, 1))]
)
def test_each_role_may_what_those_before_it_may(role: accounts.Role, may: tuple[int, ...]) -> None:
    """A viewer looks, an operator also acts, an admin does everything."""
    assert tuple(Principal("x", role).may(each) for each in accounts.ROLES) == tuple(map(bool, may))


def test_a_token_names_its_user(world: World) -> None:
    """A user's token and that of the state folder are told apart, and no other is anybody's."""
    with world.stores.storage.transaction() as connection:
        token = accounts.add_user(connection, "ann", "operator", None, now_s=0)
        assert token is not None
        assert accounts.check_bearer(connection, f"Bearer {token}", ADMIN) == Principal("ann", "operator")
        assert accounts.check_bearer(connection, f"Bearer {ADMIN}", ADMIN).role == "admin"
        for wrong in ("", "Bearer ", f"Basic {token}", f"Bearer {token}x", token):
            with pytest.raises(UnauthenticatedError, match=r"admin\.token"):
                accounts.check_bearer(connection, wrong, ADMIN)
        assert token not in "".join(world.stores.storage.dump())
        with pytest.raises(ConflictError, match="remove it or choose another"):
            accounts.add_user(connection, "ann", "viewer", None, now_s=0)
        with pytest.raises(NotFoundError, match="user list"):
            accounts.remove_user(connection, "bob")


def test_a_session_ends_with_its_time_its_user_or_its_secret(world: World) -> None:
    """A session is over after its time, when its user is removed, or when what it was opened with changes."""
    kept = accounts.hash_password("long enough for all")
    with world.stores.storage.transaction() as connection:
        accounts.add_user(connection, "ann", "viewer", kept, now_s=0)
        cookie = accounts.open_session(connection, "ann", kept, now_s=0)

        def name_at(now_s: float, cookie: str = cookie, token: str = ADMIN) -> str | None:
            found = accounts.find_session(connection, cookie, token, now_s=now_s)
            return None if found is None else found.principal.name

        assert name_at(accounts.SESSION_S) == "ann"
        assert name_at(accounts.SESSION_S + 1) is None
        assert name_at(0, cookie + "x") is None
        by_token = accounts.open_session(connection, "admin.token", ADMIN, now_s=0)
        assert name_at(0, by_token) == "admin.token"
        assert name_at(0, by_token, "another token") is None
        connection.execute("UPDATE users SET password = ?", (accounts.nobodys_password(),))
        assert name_at(0) is None
        accounts.remove_user(connection, "ann")
        assert name_at(0) is None
        accounts.end_session(connection, by_token)
        assert name_at(0, by_token) is None


def test_names_and_passwords_are_bounded() -> None:
    """A name that a page could not show, and a password that could be guessed, are told what they lack."""
    assert accounts.name_fault("ann.b-c_d@e") is None
    for name in ("", ".a", "a b", "a/b", "a" * 65, "ä"):
        assert accounts.name_fault(name) is not None
    assert accounts.password_fault("x" * 12) is None
    assert "this one has 11" in (accounts.password_fault("x" * 11) or "")
