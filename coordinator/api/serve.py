"""The application on a socket: plain HTTP on loopback, TLS elsewhere unless told otherwise."""

from __future__ import annotations

import errno
import gc
import hashlib
import logging
import os
import signal
import socket
import ssl
import threading
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

import uvicorn

from coordinator.api.app import create_app
from coordinator.api.connections import (
    ACCEPTED_AT_ONCE,
    BoundedProtocol,
    Connections,
    Listener,
    most_connections,
)
from coordinator.storage.stores import LOCK, Places
from edge_runtime.durable import make_private_folder, write_durably
from edge_runtime.errors import ConfigError
from edge_runtime.folder_lock import claim_folder
from edge_runtime.protocol.addresses import is_loopback, reachable_host
from edge_runtime.trouble import unusable

log = logging.getLogger("coordinator")

#: File in the state folder with the address of the running coordinator, for the command line.
ADDRESS = "url"
#: File in the state folder with the sha256 of the certificate that the running coordinator shows: on this machine it is
#: known by it, whatever names it has. Without TLS there is none.
CERTIFICATE = "certificate.sha256"
MAX_PORT = 65535
#: New objects from one search for garbage to the next. A request makes hundreds, nearly all without cycles.
GC_THRESHOLD = 20_000


@dataclass(frozen=True)
class ServeOptions:
    """Where and how to listen.

    Attributes:
        state: state folder.
        host: address to listen on.
        port: port to listen on; 0 takes any free one.
        tls_cert: certificate chain, PEM; None speaks plain HTTP.
        tls_key: private key of the certificate, PEM.
        insecure_http: whether plain HTTP may leave this machine.
        places: where state lies that is not in the folder.
    """

    state: Path
    host: str = "127.0.0.1"
    port: int = 8440
    tls_cert: Path | None = None
    tls_key: Path | None = None
    insecure_http: bool = False
    places: Places = field(default_factory=Places)

    @property
    def tls(self) -> bool:
        """Whether both halves of a certificate were given."""
        return self.tls_cert is not None and self.tls_key is not None


@dataclass
class CoordinatorServer:
    """A server bound to its address; :meth:`run` blocks until it is stopped.

    Attributes:
        url: address that clients on this machine use.
        state: state folder.
        server: server that serves the application.
        listener: socket that it listens on.
        lock: lock of the state folder, held until it is closed.
        crashed: whether a loop behind the API ended by an error that nobody foresaw.
    """

    url: str
    state: Path
    server: uvicorn.Server
    listener: socket.socket
    lock: BinaryIO
    crashed: bool = field(default=False)

    def run(self) -> None:
        """Serve until SIGINT, SIGTERM or :meth:`stop`."""
        log.info("serving url=%s state=%s", self.url, self.state)
        gc.freeze()  # what was imported stays for good, and need not be looked through again and again
        gc.set_threshold(GC_THRESHOLD)
        if threading.current_thread() is threading.main_thread():
            # uvicorn stops at SIGTERM, and then raises it again: without a handler that would end us on the spot.
            signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            self.server.run(sockets=[self.listener])
        finally:
            (self.state / ADDRESS).unlink(missing_ok=True)  # it would name nobody
            self.lock.close()

    def stop(self) -> None:
        """Ask the server to finish open requests and end; may be called from any thread."""
        self.server.should_exit = True


def bind(options: ServeOptions) -> CoordinatorServer:
    """Open the state folder and the port.

    Raises:
        ConfigError: the address is not loopback and there is neither TLS nor ``insecure_http``; only half a
            certificate is given; the port is taken; the state folder cannot be used, or another process uses it.
    """
    check_transport(options)
    lock = _claim(options.state)
    try:
        listener = _listen(options.host, options.port)
    except ConfigError:
        lock.close()
        raise
    crash_hook: list[CoordinatorServer] = []

    def on_crash() -> None:
        for server in crash_hook:
            server.crashed = True
            server.stop()

    try:
        app = create_app(options.state, places=options.places, on_crash=on_crash)
        config = uvicorn.Config(
            app,
            http=partial(BoundedProtocol, connections=Connections(most_connections())),  # type: ignore[arg-type]
            ws="none",
            loop="asyncio",  # whatever else is installed
            backlog=ACCEPTED_AT_ONCE,
            ssl_certfile=options.tls_cert,
            ssl_keyfile=options.tls_key,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="on",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=5,
        )
        config.load()
    except OSError as error:
        listener.close()
        lock.close()
        raise ConfigError(f"cannot read the TLS certificate or key: {error}") from error
    except BaseException:
        listener.close()
        lock.close()
        raise
    url = f"{'https' if options.tls else 'http'}://{reachable_host(options.host)}:{listener.getsockname()[1]}"
    _note_certificate(options)
    write_durably(options.state / ADDRESS, f"{url}\n".encode())
    server = CoordinatorServer(url, options.state, uvicorn.Server(config), listener, lock)
    crash_hook.append(server)
    return server


def _note_certificate(options: ServeOptions) -> None:
    """Write down which certificate the coordinator shows, for commands on this machine."""
    path = options.state / CERTIFICATE
    if options.tls_cert is None:
        path.unlink(missing_ok=True)
        return
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    first = options.tls_cert.read_text("ascii").partition(begin)[2].partition(end)[0]
    digest = hashlib.sha256(ssl.PEM_cert_to_DER_cert(f"{begin}{first}{end}")).hexdigest()
    write_durably(path, f"{digest}\n".encode())


def _claim(state: Path) -> BinaryIO:
    try:
        make_private_folder(state)
        return claim_folder(state / LOCK, what=f"the state folder {state}", who="edge-coordinator")
    except OSError as error:
        raise unusable(f"the state folder {state}", error) from error


def _listen(host: str, port: int) -> socket.socket:
    """A socket on an address of either kind; ``::`` takes IPv4 as well, where the system can."""
    if not 0 <= port <= MAX_PORT:
        raise ConfigError(f"--port {port} is no port; take one from 0 to {MAX_PORT}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise ConfigError(
            f"cannot listen on {host}: {error.strerror}; --host takes an address or a name of this machine"
        ) from error
    families = [family for family, *_ in found]
    family = socket.AF_INET if socket.AF_INET in families else families[0]
    both = host == "::" and socket.has_dualstack_ipv6()
    try:
        return Listener.of(socket.create_server((host, port), family=family, dualstack_ipv6=both))
    except OSError as error:
        way_out = "choose another --port"
        if error.errno == errno.EADDRNOTAVAIL:
            way_out = "--host takes an address of this machine, 0.0.0.0 for all of them"
        reason = os.strerror(error.errno or 0)
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}; {way_out}") from error


def check_transport(options: ServeOptions) -> None:
    """Refuse to speak plain HTTP to other machines unless the operator asked for it.

    Raises:
        ConfigError: says which options are missing.
    """
    if (options.tls_cert is None) != (options.tls_key is None):
        raise ConfigError("--tls-cert and --tls-key belong together; give both")
    if options.tls or is_loopback(options.host):
        return
    if not options.insecure_http:
        raise ConfigError(
            f"{options.host} is not loopback: give --tls-cert and --tls-key,"
            " or --insecure-http if something else encrypts the way (a VPN, a proxy)"
        )
    log.warning("insecure_http host=%s message='requests are signed but not encrypted'", options.host)
