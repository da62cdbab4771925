"""Why there was no answer, in words: what urllib3 raises names its own objects, and users meet hosts and ports."""

from __future__ import annotations

import os
import socket
import ssl
from http.client import BadStatusLine, IncompleteRead, RemoteDisconnected

from urllib3.exceptions import (
    HTTPError,
    LocationValueError,
    NewConnectionError,
    ProxyError,
    SSLError,
    TimeoutError,  # noqa: A004 - urllib3's own
)


def why_no_answer(error: HTTPError, *, patience_s: float | None = None) -> str:
    """Words for what went wrong between this machine and a server, and for what to look at.

    Args:
        error: what urllib3 raised.
        patience_s: longest silence that was waited for, if that is known.
    """
    if isinstance(error, ProxyError):
        cause = error.original_error
        inner = why_no_answer(cause) if isinstance(cause, HTTPError) else _system_words(cause)
        return f"the proxy of the environment cannot be used ({inner}); correct https_proxy or http_proxy"
    if isinstance(error, LocationValueError):
        return "the address is no URL; write it as https://host:port"
    if isinstance(error, NewConnectionError):
        return _system_words(error.__cause__)
    if isinstance(error, TimeoutError):
        waited = "" if patience_s is None else f" within {patience_s:.0f} s"
        return f"nothing came{waited}; check host and port, and firewalls on the way"
    causes = (*error.args, error.__cause__)
    if isinstance(error, SSLError):
        return _tls_words(next((cause for cause in causes if isinstance(cause, ssl.SSLError)), None))
    return _broken_words(next((cause for cause in causes if isinstance(cause, Exception)), None))


def _system_words(error: BaseException | None) -> str:
    """What the operating system said about a connection that could not be made."""
    if isinstance(error, ConnectionRefusedError):
        return "the connection was refused: nothing listens there, so check host and port, and that it runs"
    if isinstance(error, socket.gaierror):
        return "no such host name is known; check its spelling, and name resolution on this machine"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{os.strerror(error.errno).lower()}; check host, port and network"
    return "the connection could not be made; check host, port and network"


def _tls_words(error: ssl.SSLError | None) -> str:
    """What was wrong with a TLS handshake."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"its certificate is not accepted: {error.verify_message.rstrip('.')}; use a name that the certificate "
            "has, and trust who issued it"
        )
    if error is not None and error.reason in {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"}:
        return "it does not speak TLS; use http:// if it is meant to be plain, or another port"
    if error is None:  # urllib3 compares fingerprints itself
        return "it shows another certificate than the coordinator's own; is that address another server's?"
    reason = "" if error.reason is None else f" ({error.reason.replace('_', ' ').lower()})"
    return f"TLS failed{reason}; check that https:// and the port are right"


def _broken_words(error: Exception | None) -> str:
    """What happened to a connection that had been made."""
    if isinstance(error, IncompleteRead):
        return "the answer broke off; try again"
    if isinstance(error, RemoteDisconnected | ConnectionError):
        return "the connection was closed without an answer; use https:// if it speaks TLS, else try again"
    if isinstance(error, BadStatusLine):
        return "what answers there is no web server; check the port, and use https:// if it speaks TLS"
    if isinstance(error, OSError):
        return _system_words(error)
    return "the answer cannot be read; check that host and port are the coordinator's"
