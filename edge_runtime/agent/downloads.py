"""Blobs and packages on their way from the coordinator to the state folder: resumed, verified, within their limits."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from pathlib import Path

from edge_runtime.agent import decisions
from edge_runtime.agent.client import Client
from edge_runtime.agent.config import DeviceConfig
from edge_runtime.agent.store import Store
from edge_runtime.errors import ProtocolError, UnreachableError
from edge_runtime.package.manifest import MAX_MANIFEST_BYTES, Manifest
from edge_runtime.package.package import Package
from edge_runtime.protocol.messages import MAX_RESULT_BYTES

#: Pause before a download that broke off is continued.
RESUME_PAUSE_S = 1.0


class Downloads:
    """What one device fetches.

    Args:
        config: the device's configuration.
        store: the device's state folder.
        client: signed calls to the coordinator.
        sleep: function through which all waiting goes, in seconds.
    """

    def __init__(
        self, config: DeviceConfig, store: Store, client: Client, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._config = config
        self._store = store
        self._client = client
        self._sleep = sleep

    def package(
        self,
        package_sha256: str,
        signature: str,
        values: Collection[str],
        admit: Callable[[Manifest], None],
    ) -> tuple[Package, list[Path], int]:
        """Download a package and files of values, as far as they are not here yet, and lay the package out.

        Args:
            package_sha256: digest that names the package.
            signature: the publisher's signature of its manifest.
            values: digests of the files of values.
            admit: function that raises if the device must not download the package; asked before anything but the
                manifest is.

        Returns:
            The package; the files of values, in their order; and how many bytes of the package were missing.

        Raises:
            UnreachableError: the coordinator does not answer; what came is kept.
            EdgeError: the package is not the publisher's, or does not fit the device's limits.
        """
        blobs = self._store.blobs
        manifest_data = self.blob(package_sha256, MAX_MANIFEST_BYTES).read_bytes()
        manifest = decisions.open_manifest(
            manifest_data, package_sha256, signature, self._config.publisher_key
        )
        manifest = manifest.for_engine(self._config.engine)  # only its programs are downloaded
        admit(manifest)
        sizes = {entry.sha256: entry.bytes for entry in manifest.files.values()}
        missing_bytes = sum(size - blobs.held_bytes(sha256) for sha256, size in sizes.items())
        keep = {package_sha256, *sizes, *values}
        self._store.packages.clear_except(package_sha256)
        blobs.make_room(max(0, missing_bytes), keep)
        for sha256, size in sizes.items():
            self.blob(sha256, size)
        most_bytes = min(self._config.max_blob_bytes, MAX_RESULT_BYTES)
        paths = [self.blob(sha256, most_bytes) for sha256 in values]
        blobs.make_room(0, keep)
        package = self._store.packages.lay_out(manifest_data, manifest, signature, self._config.publisher_key)
        return package, paths, missing_bytes

    def blob(self, sha256: str, max_bytes: int) -> Path:
        """Path of a blob, downloaded unless it is here.

        A download that breaks off is continued as long as more bytes come.
        """
        blobs = self._store.blobs
        while not blobs.has(sha256):
            before_bytes = blobs.held_bytes(sha256)
            try:
                if before_bytes < max_bytes or before_bytes == 0:
                    self._client.fetch_blob(sha256, blobs.part(sha256), max_bytes=max_bytes)
            except UnreachableError:
                if blobs.held_bytes(sha256) <= before_bytes:
                    raise
                self._sleep(RESUME_PAUSE_S)
            except ProtocolError:
                blobs.part(sha256).unlink(missing_ok=True)
                raise
            else:
                blobs.accept(sha256)
        return blobs.open_path(sha256)
