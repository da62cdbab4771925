"""The state folder: database, blobs, results that wait for their round, and the coordinator's key.

coordinator.db   everything but bytes
blobs/           what devices may fetch: package files and slice values
incoming/        bodies of requests on their way, without names
private/         results of open rounds, and optimiser state; never served
uploads/         results that have come in part
packages/        packages as folders of links into blobs/, for the evaluation worker
task.key         Ed25519 key that signs tasks
admin.token      the operator's bearer token
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from coordinator.storage.blob_store import BlobStore
from coordinator.storage.database import Storage
from coordinator.storage.upload_store import UploadStore
from edge_runtime.durable import make_private_folder
from edge_runtime.package.block_head import with_block_head
from edge_runtime.package.manifest import Manifest, parse_manifest
from edge_runtime.protocol.messages import Blocks, Pooling
from edge_runtime.protocol.signing import PrivateKey, generate_key
from edge_runtime.trouble import unusable

DATABASE = "coordinator.db"
TASK_KEY = "task.key"
#: Folder for bodies of requests on their way; its files have no names, so nothing stays of a killed process.
INCOMING = "incoming"


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
    """

    folder: Path
    storage: Storage
    blobs: BlobStore
    private_blobs: BlobStore
    uploads: UploadStore
    key: PrivateKey
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


def open_stores(folder: Path, *, durable: bool = True) -> Stores:
    """Open a state folder, made and filled on first use.

    Args:
        folder: folder to open.
        durable: whether what is stored survives a power cut; if not, it still survives the end of the process.

    Raises:
        ConfigError: it cannot be created, read or written.
        ResourceError: not now, that is: the disk is full, or another process holds the database locked.
    """
    try:
        make_private_folder(folder)
        key_path = folder / TASK_KEY
        if not key_path.exists():
            generate_key().save(key_path)
        (folder / INCOMING).mkdir(exist_ok=True, mode=0o700)
        return Stores(
            folder=folder,
            storage=Storage(folder / DATABASE, durable=durable),
            blobs=BlobStore(folder / "blobs", durable=durable),
            private_blobs=BlobStore(folder / "private", durable=durable),
            uploads=UploadStore(folder / "uploads"),
            key=PrivateKey.load(key_path),
        )
    except OSError as error:
        raise unusable(f"the state folder {folder}", error) from error
