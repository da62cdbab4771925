"""Addresses: what is this machine, and how programs on it reach a server."""

from __future__ import annotations

import pytest

from edge_runtime.protocol.addresses import in_networks, is_loopback, reachable_host


@pytest.mark.parametrize(
    ("host", "reached", "loopback"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("0.0.0.0", "127.0.0.1", False),  # noqa: S104 - all addresses, which is the point
        ("::", "[::1]", False),
        ("::1", "[::1]", True),
        ("192.0.2.1", "192.0.2.1", False),
        ("2001:db8::7", "[2001:db8::7]", False),
        ("::ffff:127.0.0.1", "[::ffff:7f00:1]", True),
        ("localhost", "localhost", True),
        ("coordinator.example", "coordinator.example", False),
    ],
)
def test_hosts(host: str, reached: str, loopback: bool) -> None:
    """All of a machine's addresses are reached by loopback, one of them by itself, and version 6 in brackets."""
    assert reachable_host(host) == reached
    assert is_loopback(host) == loopback


@pytest.mark.parametrize(
    ("host", "listed", "inside"),
    [
        ("10.1.2.3", "example.org, 10.0.0.0/8", True),
        ("10.1.2.3", "10.1.2.0/25,10.1.2.128/25", True),
        ("11.1.2.3", "10.0.0.0/8", False),
        ("10.1.2.3", "10.1.2.3", True),
        ("10.1.2.3", "10.1.2.3/8", True),
        ("fd00::7", "10.0.0.0/8, [fd00::]/8, fd00::/8", True),
        ("[fd00::7]", "fd00::/8", True),
        ("fd00::7", "0.0.0.0/0", False),
        ("coordinator.example", "0.0.0.0/0", False),
        ("10.1.2.3", "", False),
        ("10.1.2.3", "*,/,10.0.0.0/99,.example", False),
    ],
)
def test_networks_that_need_no_proxy(host: str, listed: str, inside: bool) -> None:
    """An address is looked up in the networks of a list, of its own kind alone; names are in none."""
    assert in_networks(host, listed) == inside
