"""Where a connection is sent: an address and a port, packed as the kernel holds them.

A target is the data of an element of the endpoint maps: the address in network order (4 or 16
bytes), the port in network order (2 bytes), and 2 bytes of zeros, because every field of an
nftables concatenation fills whole 32-bit registers. So 8 bytes for IPv4 and 20 for IPv6.
"""

from __future__ import annotations

from functools import cache

from rules.objects import Address, address_text

Target = bytes

PORT_LENGTH = 4
"""Bytes of a packed port: 2 of the number and 2 of padding."""


@cache
def packed_port(port: int) -> bytes:
    """A port as it follows the address in a target, and the protocol in a key."""
    return port.to_bytes(2, "big") + b"\0\0"


def target_of(address: Address, port: int) -> Target:
    """The target of a packed address and a port."""
    return address + packed_port(port)


def address_of(target: Target) -> Address:
    """The packed address of a target."""
    return target[:-PORT_LENGTH]


def port_of(target: Target) -> int:
    """The port of a target."""
    return int.from_bytes(target[-PORT_LENGTH:-2], "big")


def target_text(target: Target) -> str:
    """Address and port as people write them: 10.0.0.1:8080, [fd00::1]:8080."""
    address = address_text(address_of(target))
    return f"[{address}]:{port_of(target)}" if ":" in address else f"{address}:{port_of(target)}"
