"""Addresses: whether a host is this machine, and how this machine is reached."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this very machine."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def reachable_host(host: str) -> str:
    """The host part of a URL by which programs on this machine reach a server that listens on ``host``.

    An address that stands for all of the machine's own is nobody's address: loopback of the same kind takes its place.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.is_unspecified:
        address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
    return f"[{address}]" if address.version == 6 else str(address)


def in_networks(host: str, listed: str) -> bool:
    """Whether an address lies in one of the networks of a list as ``no_proxy`` has them, separated by commas.

    A host name is in none, and entries that are no networks are for others to judge.
    """
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    for entry in listed.split(","):
        try:
            network = ipaddress.ip_network(entry.strip().strip("[]"), strict=False)
        except ValueError:
            continue
        if address.version == network.version and address in network:
            return True
    return False
