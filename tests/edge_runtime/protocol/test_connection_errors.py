"""What people are told where there was no answer: words about hosts, ports and certificates, never Python's objects."""

from __future__ import annotations

import datetime
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import urllib3
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, ProxyError

from edge_runtime.protocol.connection_errors import why_no_answer

REPRS = ("HTTPConnection", "Error(", "Errno", "<", "_ssl", "('")


def said(url: str, **options: object) -> str:
    """The words for a request to ``url`` that must fail."""
    pool = urllib3.PoolManager(timeout=0.5, retries=False, **options)  # type: ignore[arg-type]
    with pool, pytest.raises(HTTPError) as caught:
        pool.request("GET", url)
    return why_no_answer(caught.value, patience_s=0.5)


@contextmanager
def listener(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A port whose one connection is answered as told."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            answer(connection)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield server.getsockname()[1]
    finally:
        thread.join()
        server.close()


def closes(connection: socket.socket) -> None:
    """Hang up after the request."""
    connection.recv(4096)


def speaks_otherwise(connection: socket.socket) -> None:
    """Answer in another protocol."""
    connection.recv(4096)
    connection.sendall(b"220 mail.example ready\r\n\r\n")


def breaks_off(connection: socket.socket) -> None:
    """Promise more bytes than come."""
    connection.recv(4096)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc")


def hangs(connection: socket.socket) -> None:
    """Say nothing until the other side has gone."""
    connection.recv(4096)
    connection.recv(4096)


ANSWERS = {
    "closed": (closes, "the connection was closed without an answer"),
    "another protocol": (speaks_otherwise, "what answers there is no web server"),
    "broken off": (breaks_off, "the answer broke off"),
    "silence": (hangs, "nothing came within 0 s"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_what_answers_strangely_is_described(case: str) -> None:
    """A connection that was made and gave no answer is told by what it did."""
    answer, words = ANSWERS[case]
    with listener(answer) as port:
        found = said(f"http://127.0.0.1:{port}/")
    assert words in found
    assert not [part for part in REPRS if part in found]


def test_what_cannot_be_reached_is_described() -> None:
    """Refused connections, unknown names and addresses that are no URLs each have words of their own."""
    free = socket.create_server(("127.0.0.1", 0))
    port = free.getsockname()[1]
    free.close()
    found = [
        said(f"http://127.0.0.1:{port}/"),
        said("http://no-such-host.invalid/"),
        said("https://127.0.0.1:99999/"),
    ]
    for text, words in zip(found, ["nothing listens there", "no such host name", "no URL"], strict=True):
        assert words in text
        assert not [part for part in REPRS if part in text]


def test_a_dead_proxy_is_told_apart_from_a_dead_server() -> None:
    """Where the environment's proxy cannot be reached, that is what is said."""
    refused = NewConnectionError(None, "x")  # type: ignore[arg-type]
    refused.__cause__ = ConnectionRefusedError(111, "Connection refused")
    found = why_no_answer(ProxyError("Unable to connect to proxy", refused))
    assert found.startswith("the proxy of the environment cannot be used (the connection was refused")


@pytest.mark.parametrize(
    "error", [HTTPError("odd"), ConnectTimeoutError("slow"), HTTPError(OSError(113, "x"))]
)
def test_there_are_words_for_everything(error: HTTPError) -> None:
    """Whatever comes has words, without Python's objects in them."""
    found = why_no_answer(error)
    assert found
    assert not [part for part in REPRS if part in found]


def test_certificates_are_told_in_words(tmp_path: Path) -> None:
    """A certificate that nobody trusts, one of another name, and a server without TLS are told apart."""
    certificate, key = write_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def shake_hands(connection: socket.socket) -> None:
        try:
            context.wrap_socket(connection, server_side=True).close()
        except OSError:
            connection.close()

    with listener(shake_hands) as port:
        untrusted = said(f"https://127.0.0.1:{port}/")
    with listener(shake_hands) as port:
        misnamed = said(f"https://127.0.0.1:{port}/", ca_certs=str(certificate))
    with listener(speaks_otherwise) as port:
        plain = said(f"https://127.0.0.1:{port}/")
    assert "its certificate is not accepted: self-signed certificate" in untrusted
    assert "IP address mismatch, certificate is not valid for '127.0.0.1'" in misnamed
    assert "it does not speak TLS" in plain
    assert not [part for part in REPRS if any(part in text for text in (untrusted, misnamed, plain))]


def write_certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for the name ``coordinator.example``, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "coordinator.example")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("coordinator.example")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "tls.crt", folder / "tls.key"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return paths
