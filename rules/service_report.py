"""One line for each Service port and family: what this node does with it, for `services`.

The lines are read from the programs that State has computed, so a list of all Services is linear in
their frontends and looks at no endpoint twice.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from rules.counts import PacketCounts, claim_counts
from rules.frontends import Frontend
from rules.objects import PROTOCOL_NAMES, Algorithm, Name, Service, ServicePort
from rules.program import Claim, Wanted
from rules.state import State

SERVED = "served"
REFUSED = "refused: no endpoints"
DROPPED = "dropped: no endpoints on this node"
NOT_PROXIED = "not proxied"


class FrontendLine(msgspec.Struct, frozen=True):
    """One address of a Service port. `holder` names the Service that has the address if it is
    another one, else "". `connections`, `refused`, `dropped` are None without counters."""

    address: str
    kind: str
    state: str
    holder: str = ""
    connections: int | None = None
    refused: int | None = None
    dropped: int | None = None


class ServiceLine(msgspec.Struct, frozen=True):
    """One Service port in one family (4 or 6; 0 where the Service is not proxied).

    `used` counts the endpoints in the list of its first frontend, `total` all usable addresses in
    its EndpointSlices. `state` is that of its first frontend.
    """

    namespace: str
    name: str
    port: str
    protocol: str
    family: int
    internal_policy: str
    external_policy: str
    affinity_seconds: int
    used: int
    total: int
    state: str
    frontends: tuple[FrontendLine, ...]
    algorithm: str = Algorithm.RANDOM.value


def services(
    state: State, namespace: str = "", counts: PacketCounts | None = None
) -> list[ServiceLine]:
    """The lines of all Services, or of one namespace's, ordered by name. `state` has been
    stepped."""
    names = sorted(n for n in state.services if not namespace or n.namespace == namespace)
    return [line for name in names for line in service_lines(state, name, counts)]


def service_lines(
    state: State, name: Name, counts: PacketCounts | None = None
) -> Iterator[ServiceLine]:
    """The lines of one Service."""
    service = state.services[name]
    program = state.programs.get(name)
    if program is None or not program.wanted:
        yield from _not_proxied(service)
        return
    groups: dict[tuple[int, int, int, str], list[tuple[Claim, Wanted]]] = {}
    for claim, wanted in program.wanted.items():
        port = wanted.frontend.service_port
        key = (wanted.frontend.family, port.port, port.protocol, port.name)
        groups.setdefault(key, []).append((claim, wanted))
    totals = _totals(state, name)
    random = service.balancing.algorithm is Algorithm.RANDOM
    for (family, _, protocol, port_name), members in groups.items():
        lines = tuple(
            _frontend_line(state, name, claim, wanted, counts) for claim, wanted in members
        )
        first = members[0][1]
        yield ServiceLine(
            name.namespace,
            name.name,
            port_text(first.frontend.service_port),
            PROTOCOL_NAMES[protocol],
            family,
            _policy(local=service.internal_local),
            _policy(local=service.external_local),
            service.affinity_seconds,
            len(first.endpoints) if random else len(set(first.endpoints)),
            totals.get((family, port_name, protocol), 0),
            lines[0].state,
            lines,
            service.balancing.algorithm.value,
        )


def port_text(port: ServicePort) -> str:
    """A Service port as the reports show it: `80 (http)`."""
    return f"{port.port} ({port.name})" if port.name else str(port.port)


def _not_proxied(service: Service) -> Iterator[ServiceLine]:
    for port in service.ports:
        yield ServiceLine(
            service.name.namespace,
            service.name.name,
            port_text(port),
            PROTOCOL_NAMES[port.protocol],
            0,
            _policy(local=service.internal_local),
            _policy(local=service.external_local),
            service.affinity_seconds,
            0,
            0,
            NOT_PROXIED,
            (),
        )


def _totals(state: State, name: Name) -> dict[tuple[int, str, int], int]:
    """Addresses by family, port name and protocol."""
    found: dict[tuple[int, str, int], set[bytes]] = {}
    for piece in state.slices_of(name):
        for port in piece.ports:
            of_port = found.setdefault((piece.family, port.name, port.protocol), set())
            of_port.update(endpoint.address for endpoint in piece.endpoints)
    return {key: len(addresses) for key, addresses in found.items()}


def _frontend_line(
    state: State, name: Name, claim: Claim, wanted: Wanted, counts: PacketCounts | None
) -> FrontendLine:
    frontend: Frontend = wanted.frontend
    holder = state.holder(claim)
    if holder != name:
        return FrontendLine(
            str(frontend), frontend.kind.value, "another Service has it", str(holder or "")
        )
    line = FrontendLine(str(frontend), frontend.kind.value, answer(wanted))
    if counts is None or claim not in state.installed:
        return line
    found = claim_counts(state, name, claim, counts)
    return msgspec.structs.replace(
        line,
        connections=found.connections,
        refused=sum(found.refused.values()),
        dropped=sum(found.dropped.values()),
    )


def answer(wanted: Wanted) -> str:
    """What a client outside this node meets at the frontend."""
    names = {owner.name for owner, _, _ in wanted.elements}
    if any(name.startswith("reject-") for name in names):
        return REFUSED
    return DROPPED if any(name.startswith("drop-") for name in names) else SERVED


def _policy(*, local: bool) -> str:
    return "Local" if local else "Cluster"
