"""Connections as people read them: client, Service, endpoint with its pod and node.

Conntrack reports a new connection with the addresses on both of its sides. A `Directory` knows
whose they are: it is filled with the lines of `services` and the tables of `endpoints`, so it is
the same whether they come from manifests or from a running agent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec

from rules.counts import FrontendCounts
from rules.endpoint_report import EndpointTable
from rules.frontends import Kind
from rules.lookup import Destination, claim_met
from rules.objects import PROTOCOL_NAMES, Address, Name, address_text
from rules.service_report import ServiceLine, port_text
from rules.state import State
from rules.target import Target, address_of, port_of, target_text


class NewConnection(NamedTuple):
    """A connection that conntrack has just confirmed. Address and port are packed as in a Target.

    `client` sent the first packet to `destination`. `endpoint` answers it, and sees `seen_as` as
    the client; they are the same as destination and client where nothing is translated.
    """

    protocol: int
    client: Target
    destination: Target
    endpoint: Target
    seen_as: Target

    @property
    def translated(self) -> bool:
        """Whether it was sent to another address than the one that the client asked for."""
        return self.endpoint != self.destination


class Flow(msgspec.Struct, frozen=True):
    """A connection through a Service.

    `time` is seconds since the epoch. `service` is namespace/name and `port` the Service port; both
    are "" for a translation of another program. `pod` and `node` are "" where the slices do not
    name them. `masqueraded`: the endpoint sees an address of the node as the client.
    """

    time: float
    protocol: str
    client: str
    destination: str
    service: str
    port: str
    endpoint: str
    pod: str
    node: str
    masqueraded: bool


class Lost(msgspec.Struct, frozen=True):
    """So many events were lost, because they arrived faster than they were read."""

    lost: int


class Unanswered(msgspec.Struct, frozen=True):
    """Packets to an address that this node refused or dropped ("refused", "dropped") since the
    record before.

    `time` is seconds since the epoch. `reason` is one of those in rules.counts. `destination` is an
    address and port, a node port, or for `unknown_port` an address; for `unallocated`, where no
    Service has the address, it is "ip" or "ip6", and `service` and `port` are "".
    """

    time: float
    outcome: str
    destination: str
    service: str
    port: str
    reason: str
    packets: int


class Counting:
    """What was refused and dropped between two readings of the counters."""

    def __init__(self, counts: Iterable[FrontendCounts]) -> None:
        self._before = dict(_packets(counts))

    def since(self, counts: Iterable[FrontendCounts], seconds: float) -> Iterator[Unanswered]:
        """What was added since the last reading, at this time. A count that is lower than before
        has begun again."""
        now = dict(_packets(counts))
        for key, packets in now.items():
            before = self._before.get(key, 0)
            if added := packets - before if packets >= before else packets:
                outcome, destination, service, port, reason = key
                yield Unanswered(seconds, outcome, destination, service, port, reason, added)
        self._before = now


def _packets(
    counts: Iterable[FrontendCounts],
) -> Iterator[tuple[tuple[str, str, str, str, str], int]]:
    """Packets by outcome, destination, Service, port and reason."""
    for one in counts:
        service = f"{one.namespace}/{one.service}" if one.service else ""
        for outcome, reasons in (("refused", one.refused), ("dropped", one.dropped)):
            for reason, packets in reasons.items():
                yield (outcome, one.frontend, service, one.port, reason), packets


class Owner(NamedTuple):
    """The Service that has an address, and its port as `services` shows it."""

    service: str
    port: str


class Directory:
    """Who has which address. `lines` are those of `services`; a Service's endpoints are added when
    a connection to it is met first."""

    def __init__(self, lines: Iterable[ServiceLine]) -> None:
        self._owners: dict[str, Owner] = {}
        for line in lines:
            owner = Owner(f"{line.namespace}/{line.name}", line.port)
            for frontend in line.frontends:
                if frontend.holder:
                    continue
                of_family = frontend.kind == Kind.NODE_PORT.value
                key = f"{frontend.address} {line.family}" if of_family else frontend.address
                self._owners[key] = owner
        self._endpoints: dict[str, dict[str, tuple[str, str]]] = {}

    def owner(self, connection: NewConnection) -> Owner | None:
        """The Service through which a connection goes; None if it is none of the directory's."""
        protocol = PROTOCOL_NAMES[connection.protocol]
        found = self._owners.get(f"{target_text(connection.destination)}/{protocol}")
        if found or not connection.translated:
            return found
        family = 4 if len(address_of(connection.destination)) == 4 else 6
        port = port_of(connection.destination)
        return self._owners.get(f"node port {port}/{protocol} {family}")

    def knows_endpoints(self, service: str) -> bool:
        """Whether the Service's endpoints have been added."""
        return service in self._endpoints

    def add_endpoints(self, service: str, table: EndpointTable | None) -> None:
        """Adds the endpoints of a Service; None if it no longer exists."""
        ports = table.ports if table else ()
        self._endpoints[service] = {
            row.address: (row.pod, row.node) for port in ports for row in port.rows
        }

    def flow(self, connection: NewConnection, owner: Owner, seconds: float) -> Flow:
        """The connection through a Service, at this time."""
        known = self._endpoints.get(owner.service, {})
        where = known.get(address_text(address_of(connection.endpoint)), ("", ""))
        return _flow(connection, owner, where, seconds)


class StateDirectory:
    """Who has which address, by a State that has been stepped."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._endpoints: dict[Name, dict[Address, tuple[str, str]]] = {}

    def flow(self, connection: NewConnection, seconds: float) -> Flow | None:
        """The connection at this time; None if it goes through no Service."""
        state = self._state
        address, port = address_of(connection.destination), port_of(connection.destination)
        where = Destination(address, connection.protocol, port)
        claim = claim_met(where, state.is_node_port_address, state.installed)
        name = state.holder(claim) if claim else None
        if claim is None or name is None:
            return None
        service_port = state.installed[claim].wanted.frontend.service_port
        owner = Owner(str(name), port_text(service_port))
        found = self._places(name).get(address_of(connection.endpoint), ("", ""))
        return _flow(connection, owner, found, seconds)

    def _places(self, name: Name) -> dict[Address, tuple[str, str]]:
        """Pod and node of each endpoint of a Service."""
        if name not in self._endpoints:
            self._endpoints[name] = {
                endpoint.address: (endpoint.pod, endpoint.node)
                for piece in self._state.slices_of(name)
                for endpoint in piece.endpoints
            }
        return self._endpoints[name]


def _flow(connection: NewConnection, owner: Owner, where: tuple[str, str], seconds: float) -> Flow:
    pod, node = where
    return Flow(
        seconds,
        PROTOCOL_NAMES[connection.protocol],
        target_text(connection.client),
        target_text(connection.destination),
        owner.service,
        owner.port,
        target_text(connection.endpoint),
        pod,
        node,
        address_of(connection.seen_as) != address_of(connection.client),
    )
