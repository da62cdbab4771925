"""How bytes reach the coordinator and come back; what an answer means is decided by the caller.

``HttpTransport`` is the real one; tests put an in-memory coordinator behind the same protocol. Three rules hold for
every answer: it is read up to a byte cap and no further; redirects are handed back and never followed, because a
signature covers one path on one host; and nothing is decompressed.
"""

from __future__ import annotations

import os
import re
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

import urllib3
from msgspec import Struct, field
from urllib3.exceptions import HTTPError

from edge_runtime.errors import ProtocolError, UnreachableError
from edge_runtime.protocol.addresses import in_networks, is_loopback
from edge_runtime.protocol.connection_errors import why_no_answer
from edge_runtime.protocol.messages import MAX_CONTROL_BYTES

CONNECT_TIMEOUT_S = 15.0
#: Longest silence within an answer. Its whole length is not limited, since a slow line may take its time.
READ_TIMEOUT_S = 60.0
CHUNK_BYTES = 1 << 16

_CONTENT_RANGE_FORM = re.compile(r"bytes (?P<start>[0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)")


class Request(Struct, frozen=True):
    """One request.

    Attributes:
        method: HTTP method in capitals.
        path: path with its leading slash, without host and query.
        body: content; empty for GET.
        headers: header names and values.
        max_bytes: largest size of the answer's body; with ``sink``, of the whole file.
        sink: file that takes the body of a 200 (which replaces it) or a 206 (which continues it, and must start where
            it ends); other answers go to :attr:`Response.body`.
    """

    method: str
    path: str
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    max_bytes: int = MAX_CONTROL_BYTES
    sink: Path | None = None
    #: Whole address on another server, which is asked instead of the coordinator; encrypted wherever that is.
    url: str | None = None


class Response(Struct, frozen=True):
    """One answer.

    Attributes:
        status: HTTP status.
        headers: header names in lower case, and their values.
        body: content; empty where a sink took it.
    """

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


class Transport(Protocol):
    """Sends a request to the coordinator."""

    def send(self, request: Request) -> Response:
        """Send a request and return the answer, whatever its status.

        Raises:
            UnreachableError: no answer came, or it broke off; a sink keeps the bytes that had come.
            ProtocolError: the answer is longer than allowed, or does not continue the file where it ends.
        """
        ...


class HttpTransport:
    """HTTP/1.1 with TLS verification against the system's certificates, through the environment's proxy.

    ``http_proxy``, ``https_proxy`` and ``no_proxy`` are honoured, except for addresses of this machine. ``no_proxy``
    may name hosts, domains and networks (``10.0.0.0/8``); user and password in a proxy's address are percent-encoded.

    Args:
        base_url: address of the coordinator, ``https://host[:port]``.
        on_chunk: function that is called whenever bytes of a file have come.
    """

    def __init__(self, base_url: str, on_chunk: Callable[[], None] = lambda: None) -> None:
        self._on_chunk = on_chunk
        self._base_url = base_url.rstrip("/")
        self._scheme = self._base_url.partition("://")[0] + "://"
        timeout = urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=READ_TIMEOUT_S)
        proxy = _proxy_for(self._base_url)
        if proxy is None:
            self._pool: urllib3.PoolManager = urllib3.PoolManager(num_pools=1, timeout=timeout)
        else:
            self._pool = urllib3.ProxyManager(
                proxy, num_pools=1, timeout=timeout, proxy_headers=_proxy_headers(proxy)
            )

    def send(self, request: Request) -> Response:
        """See :meth:`Transport.send`."""
        if request.url is not None and not request.url.startswith(("https://", self._scheme)):
            raise UnreachableError(
                "the address elsewhere is not encrypted as the coordinator's is; it is not used"
            )
        try:
            answer = self._pool.request(
                request.method,
                request.url or self._base_url + request.path,
                body=request.body or None,
                headers={"Accept-Encoding": "identity", **request.headers},
                redirect=False,
                retries=False,
                preload_content=False,
                decode_content=False,
            )
            try:
                return _read(answer, request, self._on_chunk)
            except BaseException:
                answer.close()
                raise
            finally:
                answer.release_conn()
        except HTTPError as error:
            server = self._base_url if request.url is None else _server(request.url)
            raise UnreachableError(
                f"no usable answer from {server}: {why_no_answer(error, patience_s=READ_TIMEOUT_S)}; "
                "check the address, the network and the proxy with: edge-runtime check"
            ) from error

    def close(self) -> None:
        """Close idle connections."""
        self._pool.clear()


def _server(url: str) -> str:
    """Scheme and host of an address: a signed one is as good as a key, and is not told."""
    return "://".join(urlsplit(url)[:2])


def _read(answer: urllib3.BaseHTTPResponse, request: Request, on_chunk: Callable[[], None]) -> Response:
    headers = {name.lower(): value for name, value in answer.headers.items()}
    if request.sink is None or answer.status not in {200, 206}:
        limit_bytes = request.max_bytes if request.sink is None else MAX_CONTROL_BYTES
        return Response(answer.status, headers, b"".join(_bounded_chunks(answer, limit_bytes)))
    start = 0
    if answer.status == 206:
        start = _continuation(headers, request.sink)
    with request.sink.open("ab" if start else "wb") as file:
        for chunk in _bounded_chunks(answer, request.max_bytes - start):
            file.write(chunk)
            on_chunk()
    return Response(answer.status, headers)


def _bounded_chunks(answer: urllib3.BaseHTTPResponse, limit_bytes: int) -> Iterator[bytes]:
    total = 0
    for chunk in answer.stream(CHUNK_BYTES, decode_content=False):
        total += len(chunk)
        if total > limit_bytes:
            raise ProtocolError(
                f"the answer exceeds {limit_bytes} bytes, the most allowed here; it was dropped"
            )
        yield chunk


def _continuation(headers: Mapping[str, str], sink: Path) -> int:
    match = _CONTENT_RANGE_FORM.fullmatch(headers.get("content-range", ""))
    held_bytes = sink.stat().st_size if sink.exists() else 0
    if match is None or int(match["start"]) != held_bytes:
        raise ProtocolError(f"the answer does not continue at byte {held_bytes}, as was asked")
    return held_bytes


def _proxy_for(url: str) -> str | None:
    if not any(name.lower().endswith("_proxy") for name in os.environ):
        return None

    parts = urlsplit(url)
    host = parts.hostname or ""
    proxies = urllib.request.getproxies()
    if is_loopback(host) or urllib.request.proxy_bypass(host) or in_networks(host, proxies.get("no", "")):
        return None
    return proxies.get(parts.scheme) or proxies.get("all")


def _proxy_headers(proxy: str) -> dict[str, str]:
    parts = urlsplit(proxy)
    if parts.username is None:
        return {}
    user, password = unquote(parts.username), unquote(parts.password or "")
    return urllib3.make_headers(proxy_basic_auth=f"{user}:{password}")
