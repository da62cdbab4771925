"""State that lies elsewhere: what coordinators must agree on, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.storage.stores import Places, open_stores
from edge_runtime.errors import ConfigError, ResourceError
from tests.coordinator.storage.servers import (
    PostgresServer,
    needs_postgres,
    shared_postgres,
)


@pytest.fixture
def server() -> PostgresServer:
    """A PostgreSQL server."""
    return shared_postgres()


@needs_postgres
def test_coordinators_of_one_database_have_one_key_and_one_store(
    server: PostgresServer, tmp_path: Path
) -> None:
    """A second coordinator without the first's key, with another, or with other blobs does not start, and says why."""
    places = Places(server.fresh("agree"))
    first = open_stores(tmp_path / "first", places=places)
    with pytest.raises(ConfigError, match=r"task.key is missing.*copy task.key and admin.token"):
        open_stores(tmp_path / "second", places=places)
    open_stores(tmp_path / "alone").storage.close()
    (tmp_path / "third").mkdir()
    (tmp_path / "third" / "task.key").write_bytes((tmp_path / "alone" / "task.key").read_bytes())
    with pytest.raises(ConfigError, match="is not the key that all coordinators"):
        open_stores(tmp_path / "third", places=places)
    (tmp_path / "fourth").mkdir()
    (tmp_path / "fourth" / "task.key").write_bytes((tmp_path / "first" / "task.key").read_bytes())
    with pytest.raises(ConfigError, match=r"not those of this database; give all.*--blobs"):
        open_stores(tmp_path / "fourth", places=places)
    again = open_stores(tmp_path / "first", places=places)
    assert again.key.public_key == first.key.public_key
    for stores in (first, again):
        stores.storage.close()


@needs_postgres
def test_secrets_in_urls_are_refused_and_never_told(server: PostgresServer, tmp_path: Path) -> None:
    """A password or a key in a URL is refused with the way out, and no message repeats it; a server that is not there
    is trouble that passes."""
    for places, words in (
        (Places("postgresql://edge:hunter2@localhost/fleet"), "PGPASSFILE"),
        (Places("postgresql://edge@/fleet?password=hunter2"), "PGPASSFILE"),
        (Places("postgresql://edge@/fleet?hunter2=1"), "write postgresql://"),
        (Places("mysql://edge:hunter2@localhost/fleet"), "write postgresql://"),
        (Places(blobs="s3://key:hunter2@bucket/x"), "AWS_SHARED_CREDENTIALS_FILE"),
        (Places(blobs="s3://bucket/x?hunter2=1"), "write s3://"),
        (Places(blobs="https://hunter2/x"), "write s3://"),
    ):
        with pytest.raises(ConfigError, match=words) as refused:
            open_stores(tmp_path / "state", places=places)
        if "?hunter2" not in str(places.blobs):
            assert "hunter2" not in str(refused.value)
        assert "\n" not in str(refused.value)
    with pytest.raises(
        ResourceError, match=r"cannot use the database now: the database: .*wait and start again"
    ):
        open_stores(tmp_path / "state", places=Places(server.url("nowhere")))
