"""Which claim a packet meets: the one answer, for explanations, flows and remembered clients.

The rules look a packet up by address, protocol and port first, and where the address is one at
which node ports answer, by protocol and port alone (`rules.tables`).
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import NamedTuple

from rules.frontends import FAMILY_OF_LENGTH, destination_key
from rules.objects import Address
from rules.program import Claim
from rules.tables import SETS
from rules.target import PORT_LENGTH, port_of
from rules.text import Key


class Destination(NamedTuple):
    """Where a packet is sent: a packed address, an IP protocol number and a port."""

    address: Address
    protocol: int
    port: int

    @classmethod
    def of(cls, key: Key) -> Destination:
        """Reads a key of address, protocol and port (`frontends.destination_key`); the address of
        a node port's key is empty."""
        return cls(key[: -2 * PORT_LENGTH], key[-2 * PORT_LENGTH], port_of(key))

    @property
    def family(self) -> int:
        """4 or 6. Raises KeyError without an address."""
        return FAMILY_OF_LENGTH[len(self.address)]


NodePortAddress = Callable[[Address], bool]
"""Whether node ports answer at an address."""


def claims_at(where: Destination, node_port_address: NodePortAddress) -> tuple[Claim, ...]:
    """The claims by which a packet is looked up, in the order of the rules."""
    sets = SETS[where.family]
    by_address = Claim(sets.service_ips, destination_key(*where))
    if not node_port_address(where.address):
        return (by_address,)
    return by_address, node_port_claim(where)


def node_port_claim(where: Destination) -> Claim:
    """The claim of a node port at the destination's protocol and port."""
    key = destination_key(b"", where.protocol, where.port)
    return Claim(SETS[where.family].service_nodeports, key)


def claim_met(
    where: Destination, node_port_address: NodePortAddress, installed: Container[Claim]
) -> Claim | None:
    """The claim that answers a packet, of those that are installed."""
    found = (c for c in claims_at(where, node_port_address) if c in installed)
    return next(found, None)
