"""Addresses: what is this machine, and how programs on it reach a server."""

from __future__ import annotations

import pytest

from edge_runtime.protocol.addresses import is_loopback, reachable_host


@pytest.mark.parametrize(
    ("host", "reached", "loopback"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("0.0.0.0", "127.0.0.1", False),  # noqa: S104 - all addresses, which is the point
        ("::", "[::1]", False),
        ("::1", "[::1]", True),
        ("192.0.2.1", "192.0.2.1", False),
        ("2001:db8::7", "[2001:db8::7]", False),
        ("localhost", "localhost", True),
        ("coordinator.example", "coordinator.example", False),
    ],
)
def test_hosts(host: str, reached: str, loopback: bool) -> None:
    """All of a machine's addresses are reached by loopback, one of them by itself, and version 6 in brackets."""
    assert reachable_host(host) == reached
    assert is_loopback(host) == loopback
