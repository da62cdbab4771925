import base64
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from edge_runtime.agent import transport as transport_module
from edge_runtime.agent.client import Client
from edge_runtime.agent.transport import HttpTransport, Request, Transport
from edge_runtime.errors import ProtocolError, UnreachableError
from edge_runtime.protocol.signing import generate_key

BLOB = bytes(range(256)) * 1000
ETAG = '"' + "b" * 64 + '"'


class Handler(BaseHTTPRequestHandler):
    """A file server with ranges, and a path for each way to misbehave."""

    protocol_version = "HTTP/1.1"
    seen: list[tuple[str, str, dict[str, str]]]

    def do_GET(self) -> None:
        self.seen.append((self.command, self.path, dict(self.headers)))
        getattr(self, "serve_" + self.path.rsplit("/", 1)[-1][:6])()

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200, body)

    def serve_bbbbbb(self) -> None:
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        if start and self.headers.get("If-Range") == ETAG:
            where = f"bytes {start}-{len(BLOB) - 1}/{len(BLOB)}"
            self.answer(206, BLOB[start:], ETag=ETAG, **{"Content-Range": where})
        else:
            self.answer(200, BLOB, ETag=ETAG)

    def serve_wrong(self) -> None:
        self.answer(206, BLOB, **{"Content-Range": f"bytes 5-{len(BLOB) - 1}/{len(BLOB)}"})

    def serve_break(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BLOB)))
        self.end_headers()
        self.wfile.write(BLOB[:1000])
        self.close_connection = True

    def serve_endles(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        try:
            while True:
                self.wfile.write(BLOB)
        except OSError:
            return

    def serve_gzip(self) -> None:
        self.answer(200, b"\x1f\x8b not unpacked", **{"Content-Encoding": "gzip"})

    def serve_moved(self) -> None:
        self.answer(307, b"", Location="/elsewhere")

    def serve_late(self) -> None:
        self.answer(503, b"busy", **{"Retry-After": "7"})

    def serve_cccccc(self) -> None:
        self.answer(416, b"")

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Stay silent."""


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """A server on a free port of this machine."""
    Handler.seen = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def transport(server: ThreadingHTTPServer) -> Iterator[HttpTransport]:
    """A transport to that server."""
    transport = HttpTransport(f"http://127.0.0.1:{server.server_port}")
    yield transport
    transport.close()


def client(transport: Transport) -> Client:
    return Client(transport, generate_key(), "d-1")


def test_a_body_goes_there_and_back(transport) -> None:
    """What is sent arrives byte for byte, and header names come back in lower case."""
    answer = transport.send(Request("PUT", "/echo", BLOB, max_bytes=len(BLOB)))
    assert (answer.status, answer.body) == (200, BLOB)
    assert answer.headers["content-length"] == str(len(BLOB))


def test_an_address_of_ipv6_is_reached() -> None:
    """A coordinator at ``http://[::1]:port`` answers like one at an address of IPv4."""

    class Server6(ThreadingHTTPServer):
        address_family = socket.AF_INET6
        daemon_threads = True

    try:
        server = Server6(("::1", 0), Handler)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            way = HttpTransport(f"http://[::1]:{server.server_port}")
            assert way.send(Request("PUT", "/there", b"and back")).body == b"and back"
            way.close()
        finally:
            server.shutdown()
            thread.join()


def test_a_blob_is_written_to_its_sink(transport, tmp_path) -> None:
    """A download goes to the file, not to memory, and asks for no compression."""
    client(transport).fetch_blob("b" * 64, tmp_path / "part", max_bytes=len(BLOB))
    assert (tmp_path / "part").read_bytes() == BLOB
    assert Handler.seen[0][2]["Accept-Encoding"] == "identity"


def test_a_download_continues_where_it_broke_off(transport, tmp_path) -> None:
    """The rest is asked for by Range, under the condition that the blob is the same."""
    (tmp_path / "part").write_bytes(BLOB[:777])
    client(transport).fetch_blob("b" * 64, tmp_path / "part", max_bytes=len(BLOB))
    assert (tmp_path / "part").read_bytes() == BLOB
    assert Handler.seen[0][2]["Range"] == "bytes=777-"
    assert Handler.seen[0][2]["If-Range"] == ETAG


def test_a_server_that_ignores_the_range_replaces_the_file(transport, tmp_path) -> None:
    """A 200 in answer to a Range, as when the ETag differs, is the whole blob."""
    (tmp_path / "part").write_bytes(b"something else")
    request = Request(
        "GET",
        "/bbbbbb",
        headers={"Range": "bytes=14-", "If-Range": '"old"'},
        max_bytes=1 << 20,
        sink=tmp_path / "part",
    )
    assert transport.send(request).status == 200
    assert (tmp_path / "part").read_bytes() == BLOB


def test_a_continuation_at_another_place_is_refused(transport, tmp_path) -> None:
    """A 206 that does not start where the file ends would corrupt it."""
    (tmp_path / "part").write_bytes(b"beginning")
    with pytest.raises(ProtocolError, match="byte 9"):
        transport.send(Request("GET", "/wrong", max_bytes=1 << 20, sink=tmp_path / "part"))
    assert (tmp_path / "part").read_bytes() == b"beginning"


def test_a_finished_part_that_cannot_be_continued_starts_over(transport, tmp_path) -> None:
    """A 416 removes the part, so that the next attempt begins at zero."""
    (tmp_path / "part").write_bytes(b"too much")
    with pytest.raises(UnreachableError, match="starts over"):
        client(transport).fetch_blob("c" * 64, tmp_path / "part", max_bytes=1 << 20)
    assert not (tmp_path / "part").exists()


def test_an_answer_that_breaks_off_keeps_what_came(transport, tmp_path) -> None:
    """A connection lost in mid-body is an UnreachableError, and the file keeps its beginning."""
    with pytest.raises(UnreachableError):
        transport.send(Request("GET", "/break", max_bytes=1 << 20, sink=tmp_path / "part"))
    assert (tmp_path / "part").read_bytes() == BLOB[:1000]


@pytest.mark.parametrize("to_file", [False, True])
def test_the_byte_cap_is_enforced_while_reading(transport, tmp_path, to_file: bool) -> None:
    """An answer without an end is cut at its cap, on its way to memory or to a file."""
    sink = tmp_path / "part" if to_file else None
    with pytest.raises(ProtocolError, match="100000 bytes"):
        transport.send(Request("GET", "/endles", max_bytes=100_000, sink=sink))
    assert sink is None or sink.stat().st_size <= 100_000


def test_the_cap_counts_what_the_file_holds_already(transport, tmp_path) -> None:
    """A continued download may not grow the file over the cap."""
    (tmp_path / "part").write_bytes(BLOB[:777])
    with pytest.raises(ProtocolError):
        client(transport).fetch_blob("b" * 64, tmp_path / "part", max_bytes=len(BLOB) - 1)


def test_redirects_are_not_followed(transport) -> None:
    """A redirect is handed back, and its target is never asked."""
    assert transport.send(Request("GET", "/moved")).status == 307
    assert [path for _, path, _ in Handler.seen] == ["/moved"]


def test_nothing_is_decompressed(transport) -> None:
    """An answer that claims to be compressed is handed over as it came."""
    assert transport.send(Request("GET", "/gzip")).body == b"\x1f\x8b not unpacked"


def test_error_answers_do_not_touch_the_sink(transport, tmp_path) -> None:
    """The body of an error goes to the response, and its headers say when to come back."""
    (tmp_path / "part").write_bytes(b"beginning")
    answer = transport.send(Request("GET", "/late", sink=tmp_path / "part"))
    assert (answer.status, answer.body, answer.headers["retry-after"]) == (503, b"busy", "7")
    assert (tmp_path / "part").read_bytes() == b"beginning"


def test_nobody_there_is_unreachable_with_the_address() -> None:
    """A refused connection names the address and what to check."""
    transport = HttpTransport("http://127.0.0.1:9")
    with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:9.*check the address"):
        transport.send(Request("GET", "/"))
    transport.close()


def test_a_certificate_that_cannot_be_verified_is_refused(server) -> None:
    """Speaking TLS to something that does not is an UnreachableError, never plain text."""
    transport = HttpTransport(f"https://127.0.0.1:{server.server_port}")
    with pytest.raises(UnreachableError):
        transport.send(Request("GET", "/bbbbbb"))
    transport.close()
    assert Handler.seen == []


def test_the_environments_proxy_is_used_for_other_machines(server, monkeypatch) -> None:
    """A request to another host goes through http_proxy, unless no_proxy exempts it."""
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "exempt.invalid")
    transport = HttpTransport("http://coordinator.invalid")
    assert transport.send(Request("GET", "/moved")).status == 307
    assert Handler.seen[0][1] == "http://coordinator.invalid/moved"
    transport.close()
    direct = HttpTransport("http://exempt.invalid")
    with pytest.raises(UnreachableError):
        direct.send(Request("GET", "/moved"))
    direct.close()


def test_a_proxys_user_and_password_are_decoded(server, monkeypatch) -> None:
    """What is percent-encoded in a proxy's address reaches the proxy as it was meant; a network may need no proxy."""
    monkeypatch.setenv("http_proxy", f"http://us%40er:p%3Ass%2Fword@127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "192.0.2.0/24")
    transport = HttpTransport("http://elsewhere.invalid")
    transport.send(Request("GET", "/moved"))
    transport.close()
    expected = base64.b64encode(b"us@er:p:ss/word").decode()
    assert Handler.seen[-1][2]["proxy-authorization"] == f"Basic {expected}"
    assert transport_module._proxy_for("http://192.0.2.9:80") is None
    assert transport_module._proxy_for("http://198.51.100.9:80") is not None
