"""Blobs in an S3-compatible storage, which any number of coordinators share, behind a cache on this machine's disk.

What is stored is in the storage first, and then in the cache; what is asked for comes from the cache, or is fetched
into it and compared with its sha256. A storage that answers with errors, slowly or with other bytes is trouble that
passes; only an object that is gone is damage.
"""

from __future__ import annotations

import configparser
import hashlib
import os
import re
import secrets
import threading
from collections.abc import Callable, Collection, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import obstore
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import S3Store

from coordinator.storage.blob_store import BlobStore
from coordinator.storage.trouble import StoreAwayError, away
from edge_runtime.durable import TEMPORARY_SUFFIX
from edge_runtime.errors import ConfigError, DigestError, ResourceError
from edge_runtime.package.package import sha256_of

#: How long to wait for a connection, for the next bytes, and for all tries of a request together.
CONNECT_TIMEOUT = timedelta(seconds=5)
SILENCE = timedelta(seconds=10)
MOST_RETRYING = timedelta(seconds=10)
MOST_RETRIES = 2
#: How long a signed address serves; a download that breaks off asks for a new one.
ADDRESS_VALID = timedelta(minutes=15)
#: Most bytes of the cache, and after how many new ones it is looked at.
MOST_CACHED_BYTES = 10 << 30
TRIM_EVERY_BYTES = 256 << 20
CHUNK_BYTES = 1 << 20
#: What a URL may say beside bucket and prefix.
OPTIONS = ("endpoint", "region")
WHERE = "the S3 storage"
#: What the client raises where an object is not there, and where anything else is wrong.
GONE = (NotFoundError, FileNotFoundError)
FAILED = (BaseError, OSError)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PREFIX = re.compile(r"([A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*)?")


class S3BlobStore:
    """Blobs under a prefix of a bucket.

    Args:
        objects: the bucket, at the prefix.
        kind: folder below the prefix.
        cache: blobs on this machine's disk, which are all in the bucket.
    """

    is_remote = True

    def __init__(self, objects: S3Store, kind: str, cache: BlobStore) -> None:
        self._objects = objects
        self._kind = kind
        self._cache = cache
        self._added_bytes = 0
        self._fetching = threading.Lock()

    def put(self, data: bytes) -> str:
        """Store bytes and return their sha256; storing them again changes nothing."""
        sha256 = hashlib.sha256(data).hexdigest()
        self._upload(self._key(sha256), data)
        self._cache.put(data)
        self._trim(len(data))
        return sha256

    def put_file(self, source: Path, sha256: str) -> None:
        """Copy a file in under its known digest.

        Raises:
            DigestError: the copy does not match ``sha256``.
        """
        self._cache.put_file(source, sha256)
        path = self._cache.find(sha256)
        if path is None:  # trimmed at once: the cache is smaller than this file
            raise StoreAwayError(f"{WHERE}: no room to keep {source} on the way there")
        key, size = self._key(sha256), path.stat().st_size
        if self._size(key) != size:
            self._upload(key, path)
        self._trim(size)

    def link_file(self, source: Path, sha256: str) -> None:
        """The same: nothing can be linked into another machine."""
        self.put_file(source, sha256)

    def find(self, sha256: str) -> Path | None:
        """Where the blob lies on this machine, once it was fetched, or None if there is none."""
        path = self.here(sha256)
        if path is not None:
            return path
        with self._fetching:
            path = self.here(sha256)
            return path if path is not None else self._fetch(sha256)

    def here(self, sha256: str) -> Path | None:
        """Where the blob lies on this machine, or None if it would have to be fetched."""
        path = self._cache.find(sha256)
        if path is not None:
            os.utime(path)  # it was used
        return path

    def get(self, sha256: str) -> bytes:
        """The bytes of a small blob.

        Raises:
            DigestError: the blob is missing.
            StoreAwayError: it cannot be had now.
        """
        path = self.find(sha256)
        if path is None:
            raise DigestError(f"blob {sha256} is missing from {WHERE}; restore it from a backup")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() == sha256:
            return data
        self._cache.discard(sha256)  # this machine's copy is damaged
        with self._fetching:
            path = self._fetch(sha256)
        if path is None:
            raise DigestError(f"blob {sha256} is missing from {WHERE}; restore it from a backup")
        return path.read_bytes()

    def discard(self, sha256: str) -> None:
        """Remove a blob if it is there; what cannot be removed now is found by the next sweep."""
        self._cache.discard(sha256)
        try:
            obstore.delete(self._objects, self._key(sha256))
        except GONE:
            pass
        except FAILED as error:
            raise _told(error) from error

    def sweep(self, needed: Callable[[], Collection[str]], *, before_s: float) -> int:
        """Remove what is not needed, and return how many objects went.

        Args:
            needed: function that tells the digests that are, asked after the objects were listed.
            before_s: an object that was written after this moment, in seconds since 1970, stays.
        """
        old = [sha256 for sha256, written_s in self._listed() if written_s < before_s]
        keep = needed()
        gone = [sha256 for sha256 in old if sha256 not in keep]
        for sha256 in gone:
            self.discard(sha256)
        return len(gone)

    def digests(self) -> Iterator[str]:
        """Digests of all blobs."""
        return (sha256 for sha256, _ in self._listed())

    def address(self, sha256: str) -> str:
        """A URL at which whoever has it can fetch a blob for a while; :class:`DigestError` for no digest."""
        try:
            return str(obstore.sign(self._objects, "GET", self._key(sha256), ADDRESS_VALID))
        except FAILED as error:
            raise _told(error) from error

    def _size(self, key: str) -> int | None:
        try:
            return int(obstore.head(self._objects, key)["size"])
        except GONE:
            return None
        except FAILED as error:
            raise _told(error) from error

    def _upload(self, key: str, what: bytes | Path) -> None:
        try:
            obstore.put(self._objects, key, what)
        except FAILED as error:
            raise _told(error) from error

    def _fetch(self, sha256: str) -> Path | None:
        """Fetch a blob into the cache: once more where other bytes came."""
        for _ in range(2):
            temporary = self._cache.folder / f".{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"
            try:
                answer = obstore.get(self._objects, self._key(sha256))
                with temporary.open("wb") as file:
                    for chunk in answer.stream(min_chunk_size=CHUNK_BYTES):
                        file.write(chunk)
                if sha256_of(temporary) == sha256:
                    size = temporary.stat().st_size
                    path = self._cache.adopt(temporary, sha256)
                    self._trim(size)
                    return path
            except GONE as error:
                if getattr(error, "errno", None) is not None:
                    raise  # of this machine's disk
                return None
            except FAILED as error:
                raise _told(error) from error
            finally:
                temporary.unlink(missing_ok=True)
        raise StoreAwayError(f"{WHERE}: the object {self._key(sha256)} has other bytes than its name says")

    def _listed(self) -> Iterator[tuple[str, float]]:
        try:
            for page in obstore.list(self._objects, prefix=self._kind):
                for entry in page:
                    yield str(entry["path"]).rpartition("/")[2], entry["last_modified"].timestamp()
        except FAILED as error:
            raise _told(error) from error

    def _trim(self, added_bytes: int) -> None:
        self._added_bytes += added_bytes
        if self._added_bytes > TRIM_EVERY_BYTES:
            self._added_bytes = 0
            self._cache.trim(MOST_CACHED_BYTES)

    def _key(self, sha256: str) -> str:
        return f"{self._kind}/{self._cache.place(sha256)}"


def _told(error: Exception) -> Exception:
    """Trouble of the storage, in the first line of the client's words; of this machine's disk as it is."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return away(WHERE, Exception(str(error).partition("\n")[0]))


def open_bucket(url: str) -> S3Store:
    """The bucket at ``s3://BUCKET/PREFIX?endpoint=URL&region=NAME``, which must answer.

    Keys come from ``AWS_ACCESS_KEY_ID`` and ``AWS_SECRET_ACCESS_KEY``, or from the file that
    ``AWS_SHARED_CREDENTIALS_FILE`` names, or from where a cloud's machines find theirs.

    Raises:
        ConfigError: the URL is malformed, or the file is.
        ResourceError: the bucket does not answer now.
    """
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    unknown = sorted(set(options) - set(OPTIONS))
    prefix = parts.path.strip("/")
    if parts.username or parts.password:
        raise ConfigError(
            "--blobs holds credentials, which every user of this machine can read; put them into AWS_ACCESS_KEY_ID and"
            " AWS_SECRET_ACCESS_KEY, or a file named by AWS_SHARED_CREDENTIALS_FILE"
        )
    if (
        parts.scheme != "s3"
        or not _BUCKET.fullmatch(parts.netloc)
        or not _PREFIX.fullmatch(prefix)
        or unknown
    ):
        what = f"does not know {unknown[0]}" if unknown else "is no URL of a bucket"
        raise ConfigError(f"--blobs {what}; write s3://BUCKET/PREFIX?endpoint=https://HOST&region=NAME")
    keys: dict[str, Any] = _keys_of(os.environ.get("AWS_SHARED_CREDENTIALS_FILE"))
    if endpoint := options.get("endpoint"):
        keys["endpoint"] = endpoint
    try:
        store = S3Store(
            parts.netloc,
            prefix=prefix or None,
            region=options.get("region", os.environ.get("AWS_REGION", "us-east-1")),
            virtual_hosted_style_request="endpoint" not in options,
            client_options={
                "allow_http": (endpoint or "").startswith("http://"),
                "connect_timeout": CONNECT_TIMEOUT,
                "read_timeout": SILENCE,
                "timeout": timedelta(hours=1),  # of a whole package; silence ends it sooner
            },
            retry_config={"max_retries": MOST_RETRIES, "retry_timeout": MOST_RETRYING},
            **keys,
        )
        next(iter(obstore.list(store, chunk_size=1)), None)
    except FAILED as error:
        raise ResourceError(f"cannot use the bucket now: {_told(error)}; see to it, or wait") from error
    return store


def _keys_of(file: str | None) -> dict[str, Any]:
    """Keys from a file of credentials as AWS's own programs read it; nothing where none is named."""
    if file is None:
        return {}
    profile = os.environ.get("AWS_PROFILE", "default")
    parser = configparser.ConfigParser()
    try:
        parser.read_string(Path(file).read_text())
        section = parser[profile]
        return {name: section[f"aws_{name}"] for name in ("access_key_id", "secret_access_key")}
    except (OSError, KeyError, configparser.Error, UnicodeDecodeError) as error:
        raise ConfigError(
            f"AWS_SHARED_CREDENTIALS_FILE: {file} has no aws_access_key_id and aws_secret_access_key under [{profile}]"
        ) from error
