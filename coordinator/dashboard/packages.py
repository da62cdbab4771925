"""Packages that were uploaded: verified as a whole before anything is kept, then offered to new runs."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from coordinator.storage.stores import INCOMING, Stores
from edge_runtime.errors import PackageError, SignatureError
from edge_runtime.package.manifest import MANIFEST, SIGNATURE, Manifest, parse_manifest
from edge_runtime.package.package import Package

#: Folder of the state folder with a folder for each uploaded package, named by its digest.
UPLOADED = "uploaded"
#: Holds the key that a package was verified with, beside it.
KEY_FILE = "publisher.key"
MOST_PACKAGES = 200


@dataclass(frozen=True)
class Uploaded:
    """A package that was uploaded.

    Attributes:
        sha256: digest of its manifest.
        folder: where it lies.
        publisher_key: public key that has signed it.
        manifest: its manifest.
        uploaded_s: moment when it came.
    """

    sha256: str
    folder: Path
    publisher_key: str
    manifest: Manifest
    uploaded_s: float

    @property
    def bytes(self) -> int:
        """Size of all its files."""
        return sum(entry.bytes for entry in self.manifest.files.values())

    @property
    def slices(self) -> int:
        """Number of its slices, without the head."""
        return sum(spec.kind != "head" for spec in self.manifest.slices)


def keep(stores: Stores, files: Mapping[str, Path], publisher_key: str) -> Uploaded:
    """Verify a package that was uploaded, and keep it; one that is here already is not kept twice.

    Args:
        stores: handles on the state folder.
        files: its files by the names that the browser gave them, with or without the folder's name before.
        publisher_key: public key that must have signed it.

    Raises:
        PackageError: a file is missing or too many, or malformed.
        SignatureError: the key has not signed it.
        DigestError: a file has other bytes than the manifest says.
    """
    named = _without_folder(files)
    if MANIFEST not in named or SIGNATURE not in named:
        raise PackageError(
            f"the upload has no {MANIFEST if MANIFEST not in named else SIGNATURE}; choose the folder that "
            "edge-export package wrote"
        )
    with tempfile.TemporaryDirectory(dir=stores.folder / INCOMING) as made:
        folder = Path(made) / "package"
        folder.mkdir()
        for name, path in named.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, target)
        try:
            package = Package.open(folder, publisher_key)
        except SignatureError as error:
            raise SignatureError(
                "the package was not signed by this publisher key; nothing was kept. Give the key that "
                "edge-export key printed, or export the package again"
            ) from error
        expected = {MANIFEST, SIGNATURE, *package.manifest.files}
        if extra := sorted(set(named) - expected):
            raise PackageError(
                f"the upload has a file {extra[0]} that the manifest does not list; leave it out"
            )
        package.verify_files()
        (folder / KEY_FILE).write_text(publisher_key + "\n")
        kept = stores.folder / UPLOADED / package.sha256
        kept.parent.mkdir(mode=0o700, exist_ok=True)
        if not kept.exists():
            folder.replace(kept)
        else:
            os.utime(kept, (time.time(), time.time()))
    return _read(kept)


def uploaded(stores: Stores) -> list[Uploaded]:
    """The packages that were uploaded, newest first."""
    folder = stores.folder / UPLOADED
    if not folder.is_dir():
        return []
    found = [_read(path) for path in folder.iterdir() if (path / MANIFEST).is_file()]
    return sorted(found, key=lambda each: -each.uploaded_s)[:MOST_PACKAGES]


def _read(folder: Path) -> Uploaded:
    return Uploaded(
        sha256=folder.name,
        folder=folder,
        publisher_key=(folder / KEY_FILE).read_text("ascii").strip(),
        manifest=parse_manifest((folder / MANIFEST).read_bytes()),
        uploaded_s=folder.stat().st_mtime,
    )


def _without_folder(files: Mapping[str, Path]) -> dict[str, Path]:
    """Files by their names within the package; names that lead elsewhere are refused."""
    found: dict[str, Path] = {}
    for name, path in files.items():
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if not parts or any(part in ("..", "/") for part in parts) or len(name) > 500 or "\0" in name:
            raise PackageError(f"the upload has a file {name[:100]!r} whose name leads out of the package")
        found["/".join(parts)] = path
    tops = {name.partition("/")[0] for name in found}
    if len(tops) == 1 and MANIFEST not in found:
        found = {name.partition("/")[2]: path for name, path in found.items() if "/" in name}
    return found
