"""The device's state folder: what must survive a restart.

::

    lock                held by the running agent
    device.key          the device's private key (mode 0600)
    identity.json       the device's id and the coordinator's pinned key
    pending.result      a result that the coordinator has not acknowledged yet
    blobs/, packages/   downloads, see edge_runtime.agent.blob_cache
    work/               one task's scratch files, emptied at start

Every file is written beside its place, flushed and renamed, so a power cut leaves the old or the new one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec
from msgspec import Struct

from edge_runtime.agent.blob_cache import BlobCache, PackageShelf
from edge_runtime.decoding import MALFORMED
from edge_runtime.durable import TEMPORARY_SUFFIX, make_private_folder, sync_folder, write_durably
from edge_runtime.errors import ConfigError
from edge_runtime.folder_lock import claim_folder
from edge_runtime.protocol.messages import Identifier, PublicKey
from edge_runtime.protocol.signing import PrivateKey, generate_key
from edge_runtime.trouble import unusable

KEY = "device.key"
IDENTITY = "identity.json"
PENDING = "pending.result"
PREPARED = "prepared"


class Identity(Struct, frozen=True):
    """Who the device is, and whose tasks it takes.

    Attributes:
        device_id: the id that the coordinator gave it.
        coordinator_public_key: public key that must have signed its tasks.
    """

    device_id: Identifier
    coordinator_public_key: PublicKey


class Store:
    """The state folder. Any process may read; one that writes must hold :meth:`locked`.

    Attributes:
        folder: path of the state folder.
        blobs: downloads.
        packages: the package in use.
    """

    def __init__(self, folder: Path, *, disk_quota_bytes: int) -> None:
        """Create the folder (mode 0700) if there is none.

        Args:
            folder: path of the state folder.
            disk_quota_bytes: disk space that downloads may take.

        Raises:
            ConfigError: it cannot be created or entered.
        """
        self.folder = folder
        try:
            make_private_folder(folder)
            self._work = folder / "work"
            self.blobs = BlobCache(folder / "blobs", disk_quota_bytes)
            self.packages = PackageShelf(folder / "packages", self.blobs)
        except OSError as error:
            raise unusable(f"state_folder {folder}", error) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Claim the folder for this process, and remove half-written files of a process that was killed.

        Raises:
            ConfigError: another process holds it, or it cannot be written.
        """
        with self._claim():
            yield

    def key(self) -> PrivateKey:
        """The device's key, made on first use.

        Raises:
            ConfigError: the key file cannot be read or written.
        """
        path = self.folder / KEY
        if path.exists():
            return PrivateKey.load(path)
        key = generate_key()
        try:
            key.save(path)
        except OSError as error:
            raise unusable(f"the key file {path}", error) from error
        return key

    def has_key(self) -> bool:
        """Whether the device's key has been made."""
        return (self.folder / KEY).exists()

    def identity(self) -> Identity | None:
        """The identity that the device got when it enrolled; None before that.

        Raises:
            ConfigError: the file is there but cannot be read.
        """
        path = self.folder / IDENTITY
        try:
            return msgspec.json.decode(path.read_bytes(), type=Identity)
        except FileNotFoundError:
            return None
        except (OSError, *MALFORMED) as error:
            raise ConfigError(f"cannot read {path}: {error}; remove it and enrol again") from error

    def save_identity(self, identity: Identity) -> None:
        """Keep the identity for good."""
        write_durably(self.folder / IDENTITY, msgspec.json.encode(identity), mode=0o600)

    def pending(self) -> bytes | None:
        """The encoded result that waits for an acknowledgement, if there is one."""
        try:
            return (self.folder / PENDING).read_bytes()
        except FileNotFoundError:
            return None

    def keep_pending(self, data: bytes) -> None:
        """Keep an encoded result until :meth:`drop_pending`, across restarts."""
        write_durably(self.folder / PENDING, data, mode=0o600)

    def drop_pending(self) -> None:
        """Forget the pending result."""
        (self.folder / PENDING).unlink(missing_ok=True)
        sync_folder(self.folder)

    def prepared_folder(self, package_sha256: str) -> Path:
        """Path of a package as prepared for this machine.

        Folders that were prepared from other packages are removed.
        """
        parent = self.folder / PREPARED
        parent.mkdir(mode=0o700, exist_ok=True)
        for other in parent.iterdir():
            if other.name != package_sha256:
                shutil.rmtree(other, ignore_errors=True)
        return parent / package_sha256

    def new_work_folder(self) -> Path:
        """An empty folder for one task's scratch files."""
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir(mode=0o700)
        return self._work

    def _claim(self) -> BinaryIO:
        """The lock file, opened and locked. Closing it gives the folder up, and so does the end of the process."""
        try:
            file = claim_folder(self.folder / "lock", what=f"state_folder {self.folder}", who="edge-runtime")
            try:
                self._clean()
            except OSError:
                file.close()
                raise
        except OSError as error:
            raise unusable(f"state_folder {self.folder}", error) from error
        return file

    def _clean(self) -> None:
        self.new_work_folder()
        for folder in (self.folder, self.folder / "blobs", self.folder / "packages"):
            for path in folder.glob(f"*{TEMPORARY_SUFFIX}"):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
