"""The state folder: database, blobs, results that wait for their round, and the coordinator's key.

coordinator.db   everything but bytes
blobs/           what devices may fetch: package files and slice values
private/         results of open rounds, and optimiser state; never served
packages/        packages as folders of links into blobs/, for the evaluation worker
task.key         Ed25519 key that signs tasks
admin.token      the operator's bearer token
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from coordinator.storage.blob_store import BlobStore
from coordinator.storage.database import Storage
from edge_runtime.errors import ConfigError
from edge_runtime.package.block_head import with_block_head
from edge_runtime.package.manifest import Manifest, parse_manifest
from edge_runtime.protocol.messages import Blocks, Pooling
from edge_runtime.protocol.signing import PrivateKey, generate_key

DATABASE = "coordinator.db"
TASK_KEY = "task.key"


@dataclass(frozen=True)
class Stores:
    """Handles on the state folder.

    Attributes:
        folder: state folder.
        storage: database.
        blobs: blobs that devices may fetch.
        private_blobs: blobs that are never served.
        key: key that signs tasks.
    """

    folder: Path
    storage: Storage
    blobs: BlobStore
    private_blobs: BlobStore
    key: PrivateKey
    #: Manifests that were parsed before, by digest, blocks and pooling.
    _manifests: dict[tuple[str, Blocks, Pooling], Manifest] = field(default_factory=dict)

    def manifest(self, package_sha256: str, blocks: Blocks = (), pooling: Pooling = "package") -> Manifest:
        """A package's manifest, parsed once; with blocks, as a run sees it whose head reads these."""
        seen = (package_sha256, blocks, pooling)
        if seen not in self._manifests:
            manifest = parse_manifest(self.blobs.get(package_sha256))
            self._manifests[seen] = with_block_head(manifest, blocks, pooling)
        return self._manifests[seen]


def open_stores(folder: Path, *, durable: bool = True) -> Stores:
    """Open a state folder, made and filled on first use.

    Args:
        folder: folder to open.
        durable: whether what is stored survives a power cut; if not, it still survives the end of the process.

    Raises:
        ConfigError: it cannot be created, read or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        key_path = folder / TASK_KEY
        if not key_path.exists():
            generate_key().save(key_path)
        return Stores(
            folder=folder,
            storage=Storage(folder / DATABASE, durable=durable),
            blobs=BlobStore(folder / "blobs", durable=durable),
            private_blobs=BlobStore(folder / "private", durable=durable),
            key=PrivateKey.load(key_path),
        )
    except OSError as error:
        raise ConfigError(f"cannot use the state folder {folder}: {error.strerror}") from error
