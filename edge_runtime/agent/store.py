"""The device's state folder: what must survive a restart.

::

    lock                held by the running agent
    device.key          the device's private key (mode 0600)
    split.key           which rows are for evaluation (mode 0600)
    identity.json       the device's id and the coordinator's pinned key
    pending.result      a result that the coordinator has not acknowledged yet
    task.progress       how far a task had come when its worker was stopped
    release.json        which release the device uses, and which it has decided about
    release/            the values of that release
    masking.part        secrets of a masked contribution, see edge_runtime.agent.masked_round
    masking.vector      the contribution
    sums/               sums that were handed in for heads in closed form, see edge_runtime.agent.handed_in
    blobs/, packages/   downloads, see edge_runtime.agent.blob_cache
    work/               one task's scratch files, emptied at start

Every file is written beside its place, flushed and renamed, so a power cut leaves the old or the new one. One that
cannot be read all the same is set aside, with ``.damaged`` after its name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec
from msgspec import Struct

from edge_runtime.agent.blob_cache import BlobCache, PackageShelf
from edge_runtime.agent.handed_in import HandedInSums
from edge_runtime.decoding import MALFORMED
from edge_runtime.durable import (
    TEMPORARY_SUFFIX,
    make_private_folder,
    rename_durably,
    sync_folder,
    write_durably,
)
from edge_runtime.errors import ConfigError
from edge_runtime.folder_lock import claim_folder
from edge_runtime.log import warn
from edge_runtime.protocol.messages import Count, Identifier, PublicKey, Release
from edge_runtime.protocol.signing import PrivateKey, generate_key
from edge_runtime.trouble import unusable

KEY = "device.key"
IDENTITY = "identity.json"
PENDING = "pending.result"
PROGRESS = "task.progress"
PREPARED = "prepared"
#: Ending of the name of a file that could not be read any more.
DAMAGED_SUFFIX = ".damaged"
SPLIT_KEY, SPLIT_KEY_BYTES = "split.key", 32
RELEASE, RELEASE_VALUES = "release.json", "release"
SUMS = "sums"

RecordT = TypeVar("RecordT", bound=Struct)


class Identity(Struct, frozen=True):
    """Who the device is, and whose tasks it takes.

    Attributes:
        device_id: the id that the coordinator gave it.
        coordinator_public_key: public key that must have signed its tasks.
    """

    device_id: Identifier
    coordinator_public_key: PublicKey


class TakenRelease(Struct, frozen=True):
    """A release as a device found it.

    Attributes:
        release: the release.
        accuracy: share of right predictions on the device's own rows; None if it has none.
        mean_loss: mean cross-entropy there; None if it has none.
        rows: number of these rows.
    """

    release: Release
    accuracy: float | None = None
    mean_loss: float | None = None
    rows: Count = 0


class ReleaseState(Struct, frozen=True):
    """Where a device stands with releases.

    Attributes:
        decided: number of the newest release that it has taken or refused; 0 if there was none.
        current: the release in use; None before the first.
        setup: what the device was set up with when it could not use the newest one; empty if that was decided for good.
    """

    decided: Count = 0
    current: TakenRelease | None = None
    setup: str = ""

    def decided_with(self, setup: str) -> int:
        """Number of the newest release that need not be told of to a device that is set up so."""
        if self.setup in ("", setup):
            return self.decided
        return 0 if self.current is None else self.current.release.number


class ReleaseFiles:
    """The release in use. One file names it, so that every reader sees one release whole, before a switch or after it.

    Args:
        folder: path of the state folder.
        packages: the laid-out packages, of which the current release's is kept.
    """

    def __init__(self, folder: Path, packages: PackageShelf) -> None:
        self._folder = folder
        self._packages = packages
        self.keep_package()

    def keep_package(self) -> None:
        """Have the current release's package stay as it is; of a release that cannot be read nothing is known."""
        try:
            current = self.state().current
        except ConfigError:
            current = None
        self._packages.kept = frozenset() if current is None else frozenset({current.release.package})

    def state(self) -> ReleaseState:
        """Where the device stands.

        Raises:
            ConfigError: the file is there but cannot be read.
        """
        cure = "the agent sets it aside when it starts, and takes the next release anew"
        return _read(self._folder / RELEASE, ReleaseState, cure) or ReleaseState()

    def values_path(self, taken: TakenRelease) -> Path:
        """Path of a release's values."""
        return self._folder / RELEASE_VALUES / f"{taken.release.values}.safetensors"

    def switch_to(self, taken: TakenRelease, values: Path) -> None:
        """Make a release the current one: first its values are on the disk, then the name is changed.

        Args:
            taken: the release.
            values: file with its values, verified.
        """
        place, before = self.values_path(taken), self.state().current
        kept = {place} if before is None else {place, self.values_path(before)}
        place.parent.mkdir(mode=0o700, exist_ok=True)
        if not place.exists():
            write_durably(place, values.read_bytes(), mode=0o600)
        write_durably(
            self._folder / RELEASE, msgspec.json.encode(ReleaseState(taken.release.number, taken)), mode=0o600
        )
        self._packages.kept = frozenset({taken.release.package})
        for other in place.parent.iterdir():
            if other not in kept:  # whoever has just read the old name still finds its values
                other.unlink()

    def refuse(self, number: int, setup: str = "") -> None:
        """Remember that a release is not used; the current one stays.

        Args:
            number: number of the release.
            setup: what the device is set up with, if another setup could use the release.
        """
        state = msgspec.structs.replace(self.state(), decided=number, setup=setup)
        write_durably(self._folder / RELEASE, msgspec.json.encode(state), mode=0o600)


class Store:
    """The state folder. Any process may read; one that writes must hold :meth:`locked`.

    Attributes:
        folder: path of the state folder.
        blobs: downloads.
        packages: the packages in use.
        releases: the release in use.
        sums: sums that were handed in before.
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
            self.releases = ReleaseFiles(folder, self.packages)
            self.sums = HandedInSums(folder / SUMS)
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

    def split_key(self) -> bytes:
        """The key by which the device tells rows for evaluation from rows to train on, made on first use.

        Raises:
            ConfigError: the file is there but cannot be read, or cannot be written.
        """
        path = self.folder / SPLIT_KEY
        try:
            if not path.exists():
                write_durably(path, os.urandom(SPLIT_KEY_BYTES), mode=0o600)
            key = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"cannot use {path}: {error.strerror}") from error
        if len(key) != SPLIT_KEY_BYTES:
            raise ConfigError(
                f"{path} has {len(key)} bytes, not {SPLIT_KEY_BYTES}; remove it, and rows are split anew"
            )
        return key

    def has_key(self) -> bool:
        """Whether the device's key has been made."""
        return (self.folder / KEY).exists()

    def identity(self) -> Identity | None:
        """The identity that the device got when it enrolled; None before that.

        Raises:
            ConfigError: the file is there but cannot be read.
        """
        cure = "have the device revoked, set a new token, and run: edge-runtime enrol"
        return _read(self.folder / IDENTITY, Identity, cure)

    def set_identity_aside(self) -> Path | None:
        """Put an identity that cannot be read beside its place, for somebody to look at; None if it can be read."""
        try:
            self.identity()
        except ConfigError:
            return self._set_aside(IDENTITY)
        return None

    def _set_aside(self, name: str) -> Path:
        """Rename a damaged file, so that it is neither used nor lost."""
        place = self.folder / f"{name}{DAMAGED_SUFFIX}"
        rename_durably(self.folder / name, place)
        return place

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

    def set_pending_aside(self) -> Path:
        """Put a result that cannot be read beside its place."""
        return self._set_aside(PENDING)

    def drop_pending(self) -> None:
        """Forget the pending result."""
        (self.folder / PENDING).unlink(missing_ok=True)
        sync_folder(self.folder)

    @property
    def progress_path(self) -> Path:
        """File in which a worker keeps how far its task has come."""
        return self.folder / PROGRESS

    def drop_progress(self) -> None:
        """Forget how far a task had come, because it has ended. A file that stays harms nobody."""
        with suppress(OSError):
            self.progress_path.unlink(missing_ok=True)

    def prepared_folder(self, package_sha256: str) -> Path:
        """Path of a package as prepared for this machine.

        Folders that were prepared from other packages are removed, but for that of the current release.
        """
        parent = self.folder / PREPARED
        parent.mkdir(mode=0o700, exist_ok=True)
        for other in parent.iterdir():
            if other.name != package_sha256 and other.name not in self.packages.kept:
                shutil.rmtree(other, ignore_errors=True)
        return parent / package_sha256

    def prepared_place(self, package_sha256: str) -> Path:
        """Path of a package as prepared for this machine, if it is; nothing is made or removed."""
        return self.folder / PREPARED / package_sha256

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
            except BaseException:
                file.close()
                raise
        except OSError as error:
            raise unusable(f"state_folder {self.folder}", error) from error
        return file

    def _clean(self) -> None:
        self.new_work_folder()
        try:
            self.releases.state()
        except ConfigError as error:
            warn("set_aside", path=self._set_aside(RELEASE), error=error)
        for folder in (
            self.folder,
            *(self.folder / name for name in ("blobs", "packages", RELEASE_VALUES, SUMS)),
        ):
            for path in folder.glob(f"*{TEMPORARY_SUFFIX}"):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def _read(path: Path, kind: type[RecordT], cure: str) -> RecordT | None:
    """A record of the state folder; None if there is no such file.

    Raises:
        ConfigError: the file is there but cannot be read; says what to do.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (OSError, *MALFORMED) as error:
        raise ConfigError(f"cannot read {path}: {error}; {cure}") from error
