"""The state folder: database, blobs, results that wait for their round, and the coordinator's key.

Database and blobs may be elsewhere, by URL, and then several coordinators with a state folder each share them. What
stays here are the two secrets, which no database is given: every one of these coordinators must have the same.

coordinator.db   everything but bytes
blobs/           what devices may fetch: package files and slice values
incoming/        bodies of requests on their way, without names
private/         results of open rounds, and optimiser state; never served
uploads/         results that have come in part
packages/        packages as folders of links into blobs/, for the evaluation worker
task.key         Ed25519 key that signs tasks
admin.token      the operator's bearer token
fetched/         copies of blobs that are in a bucket
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from coordinator.storage import shared_rows
from coordinator.storage.blob_store import Blobs, BlobStore
from coordinator.storage.connection import Database
from coordinator.storage.database import Storage
from coordinator.storage.trouble import StoreAwayError
from coordinator.storage.upload_store import Uploads, UploadStore
from edge_runtime.durable import make_private_folder
from edge_runtime.errors import ConfigError, ResourceError
from edge_runtime.package.block_head import with_block_head
from edge_runtime.package.manifest import Manifest, parse_manifest
from edge_runtime.protocol.messages import Blocks, Pooling
from edge_runtime.protocol.signing import PrivateKey, generate_key
from edge_runtime.trouble import unusable

if TYPE_CHECKING:
    from coordinator.storage.postgres import PostgresStorage

DATABASE = "coordinator.db"
TASK_KEY = "task.key"
#: Folder for bodies of requests on their way; its files have no names, so nothing stays of a killed process.
INCOMING = "incoming"
#: Folders of blobs that are served, and of those that never are.
BLOBS = "blobs"
PRIVATE = "private"
#: File that the running coordinator holds locked.
LOCK = "lock"
#: Folder for copies of blobs that are in a bucket.
FETCHED = "fetched"


#: Names in ``shared``: the public half of the key that signs tasks, and a blob that only the shared store has.
SIGNER = "task_signer"
BLOBS_MARK = "blobs_mark"


@dataclass(frozen=True)
class Places:
    """Where state lies that is not in the state folder.

    Attributes:
        database: ``postgresql://`` URL; None is a file of SQLite in the state folder.
        blobs: ``s3://`` URL; None is a folder in the state folder.
        secrets: folder of task.key and admin.token; None is the state folder.
        direct: whether devices may fetch blobs from the bucket itself, by signed addresses.
    """

    database: str | None = None
    blobs: str | None = None
    secrets: Path | None = None
    direct: bool = False


@dataclass(frozen=True)
class Stores:
    """Handles on the state folder.

    Attributes:
        folder: state folder.
        storage: database.
        blobs: blobs that devices may fetch.
        private_blobs: blobs that are never served.
        uploads: results that have come in part.
        key: key that signs tasks.
        sign_address: function that gives an address at which a device may fetch a blob itself, by the blob's digest;
            None where all blobs come from here.
    """

    folder: Path
    storage: Database
    blobs: Blobs
    private_blobs: Blobs
    uploads: Uploads
    key: PrivateKey
    sign_address: Callable[[str], str] | None = None
    #: The least memory that any slot of a round needs, for the round that was asked about last.
    least_required_bytes: dict[tuple[str, int | None, int, int], int] = field(default_factory=dict)
    #: Digest of the values that devices of a rank are given, by that of all values and by rank, for the last round.
    values_at_rank: dict[tuple[str, int], str] = field(default_factory=dict)
    #: Manifests that were parsed before, by digest, blocks, pooling and exits.
    _manifests: dict[tuple[str, Blocks, Pooling, Blocks], Manifest] = field(default_factory=dict)

    def manifest(
        self, package_sha256: str, blocks: Blocks = (), pooling: Pooling = "package", exits: Blocks = ()
    ) -> Manifest:
        """A package's manifest, parsed once; with blocks, as a run sees it whose head reads these, or has exits."""
        seen = (package_sha256, blocks, pooling, exits)
        if seen not in self._manifests:
            manifest = parse_manifest(self.blobs.get(package_sha256))
            self._manifests[seen] = with_block_head(manifest, blocks, pooling, exits)
        return self._manifests[seen]


def open_stores(folder: Path, *, durable: bool = True, places: Places | None = None) -> Stores:
    """Open a state folder, made and filled on first use.

    Args:
        folder: folder to open.
        durable: whether what is stored survives a power cut; if not, it still survives the end of the process.
        places: where state lies that is not in the folder.

    Raises:
        ConfigError: it cannot be created, read or written; or other coordinators of the database have another key or
            other blobs.
        ResourceError: not now, that is: the disk is full, another process holds the database locked, or a server does
            not answer.
    """
    places = places or Places()
    if places.direct and places.blobs is None:
        raise ConfigError("--direct-blobs sends devices to a bucket, and there is none: give --blobs s3://…")
    try:
        make_private_folder(folder)
        if places.secrets is not None:
            make_private_folder(places.secrets)
        (folder / INCOMING).mkdir(exist_ok=True, mode=0o700)
        blobs, private_blobs = open_blobs(folder, places.blobs, durable=durable)
        storage, uploads = _open_database(folder, places.database, durable=durable)
        try:
            key_path = (places.secrets or folder) / TASK_KEY
            if places.database is None:
                key = _own_key(key_path)
            else:
                key = _agreed_key(storage, key_path)
                _agree_on_blobs(storage, blobs)
        except BaseException:
            storage.close()
            raise
        return Stores(
            folder, storage, blobs, private_blobs, uploads, key, blobs.address if places.direct else None
        )
    except StoreAwayError as error:
        raise ResourceError(
            f"cannot use the state now: {error}; see to it, or wait and start again"
        ) from error
    except OSError as error:
        raise unusable(f"the state folder {folder}", error) from error


def _open_database(folder: Path, url: str | None, *, durable: bool) -> tuple[Database, Uploads]:
    if url is None:
        return Storage(folder / DATABASE, durable=durable), UploadStore(folder / "uploads")
    storage = open_server(url)  # first: it tells whether the library is there
    from coordinator.storage.upload_parts import UploadParts  # noqa: PLC0415 - with an extra

    return storage, UploadParts(storage)


def open_server(url: str) -> PostgresStorage:
    """A database on a server, with the tables of this version.

    Raises:
        ConfigError: the URL is malformed, the library is missing, or the database is of a newer version.
        ResourceError: the server does not answer now.
    """
    if not url.startswith(("postgresql://", "postgres://")):
        raise ConfigError("--database is no URL of PostgreSQL; write postgresql://USER@HOST/DATABASE")
    try:
        from coordinator.storage.postgres import PostgresStorage  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigError(
            f"--database needs psycopg ({error}); install it with: pip install 'edge-runtime[postgresql]'"
        ) from error
    return PostgresStorage(url)


def open_blobs(folder: Path, url: str | None, *, durable: bool) -> tuple[Blobs, Blobs]:
    """Blobs that are served, and those that never are.

    Raises:
        ConfigError: the URL is malformed, or the library is missing.
        ResourceError: the bucket does not answer now.
    """
    if url is None:
        return BlobStore(folder / BLOBS, durable=durable), BlobStore(folder / PRIVATE, durable=durable)
    try:
        from coordinator.storage.s3_store import S3BlobStore, open_bucket  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigError(
            f"--blobs needs obstore ({error}); install it with: pip install 'edge-runtime[s3]'"
        ) from error
    bucket = open_bucket(url)
    (folder / FETCHED).mkdir(exist_ok=True, mode=0o700)
    served, private = (
        S3BlobStore(bucket, kind, BlobStore(folder / FETCHED / kind, durable=False))
        for kind in (BLOBS, PRIVATE)
    )
    return served, private


def _own_key(path: Path) -> PrivateKey:
    if not path.exists():
        generate_key().save(path)
    return PrivateKey.load(path)


def _agreed_key(storage: Database, path: Path) -> PrivateKey:
    """The key that all coordinators of a database sign with; the first makes it, and its public half is kept there."""
    way_out = "copy task.key and admin.token from another's state folder, or give all --secrets DIR with them"
    with storage.transaction() as connection:
        if shared_rows.find(connection, SIGNER) is not None and not path.exists():
            raise ConfigError(
                f"{path} is missing, with which all coordinators of this database sign; {way_out}"
            )
        key = _own_key(path)
        if shared_rows.agree(connection, SIGNER, key.public_key) != key.public_key:
            raise ConfigError(
                f"{path} is not the key that all coordinators of this database sign with; {way_out}"
            )
    return key


def _agree_on_blobs(storage: Database, blobs: Blobs) -> None:
    """Make sure that this coordinator has the blobs of the others, by one that the first has left there."""
    with storage.reading() as connection:
        mark = shared_rows.find(connection, BLOBS_MARK)
    if mark is None:
        left = blobs.put(f"blobs of one database {secrets.token_hex(16)}\n".encode())
        with storage.transaction() as connection:
            mark = shared_rows.agree(connection, BLOBS_MARK, left)
    if blobs.find(mark) is None:
        raise ConfigError(
            "the blobs here are not those of this database; give all its coordinators the same --blobs"
        )
