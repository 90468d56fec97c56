"""`sliceproxy endpoints NAMESPACE/NAME[:PORT]`: a Service's endpoints, and which are used here.

The slices of a Service are merged into one table per Service port and family. Every endpoint says
whether this node uses it and why, once for each traffic policy that the Service uses: an external
address under policy Local needs both lists, as clients inside the node get the cluster list. An
address that is in two slices is shown twice, with the copy that counts.

The answer is made of plain records, so `--output json` is `msgspec.json.encode(table)`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import msgspec

from rules.frontends import Frontend, frontends
from rules.objects import (
    PROTOCOL_NAMES,
    READY,
    SERVING,
    TERMINATING,
    Algorithm,
    Balancing,
    Endpoint,
    EndpointSlice,
    Name,
    Service,
    ServicePort,
    address_text,
)
from rules.program import MAX_FRONTENDS, PortLists, port_lists
from rules.selection import NodeLocation, Selection, reason
from rules.state import State
from rules.target import Target, target_of

DRAINED = "drained: its weight is 0"


class QuestionError(ValueError):
    """A question without an answer; the message is one line and gives the reason."""


class Use(msgspec.Struct, frozen=True):
    """Whether this node uses an endpoint under one traffic policy, and the reason."""

    used: bool
    reason: str


class Row(msgspec.Struct, frozen=True):
    """One endpoint as one slice has it.

    `counts` is false where another slice holds the same address in the better condition. `weight`
    is None where weights have no effect (`EndpointTable.algorithm` is "random").
    `cluster` and `local` are the traffic policies; None where the Service does not use one.
    `connections` counts new ones (`rules.endpoint_counts`); None where they are not counted.
    """

    address: str
    port: int
    ready: bool
    serving: bool
    terminating: bool
    node: str
    zone: str
    node_hints: tuple[str, ...]
    zone_hints: tuple[str, ...]
    pod: str
    slice: str
    counts: bool
    cluster: Use | None
    local: Use | None
    weight: int | None = None
    connections: int | None = None


class PortTable(msgspec.Struct, frozen=True):
    """The endpoints of one Service port in one family (4 or 6)."""

    name: str
    protocol: str
    port: int
    family: int
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


class EndpointTable(msgspec.Struct, frozen=True):
    """A Service's endpoints as seen from a node. `zone` is "" where the node has none. `algorithm`
    is "random", "source-hash" or "weighted"."""

    service: str
    node: str
    zone: str
    ports: tuple[PortTable, ...]
    notes: tuple[str, ...] = ()
    algorithm: str = Algorithm.RANDOM.value


def port_text(port: ServicePort) -> str:
    """A Service port as people write it: 80/tcp (http)."""
    text = f"{port.port}/{PROTOCOL_NAMES[port.protocol]}"
    return f"{text} ({port.name})" if port.name else text


# --- finding the Service ------------------------------------------------------------------------


def endpoints(state: State, name_text: str) -> EndpointTable:
    """The table of a Service, or of one of its ports (by name or number).

    `state` has been stepped. Raises QuestionError.
    """
    text, _, port = name_text.partition(":")
    service = _service(state, text)
    ports = _ports(service, port) if port else service.ports
    around = state.surroundings()
    slices = state.slices_of(service.name)
    return EndpointTable(
        str(service.name),
        around.place.node,
        around.place.zone,
        tuple(_port_tables(service, ports, slices, around.place, external_ips=around.external_ips)),
        tuple(_notes(state, service)),
        service.balancing.algorithm.value,
    )


def _service(state: State, text: str) -> Service:
    namespace, slash, name = text.partition("/")
    if not (namespace and slash and name):
        near = sorted(str(known) for known in state.services if known.name == text)
        hint = f"did you mean {' or '.join(near)}?" if near else "for instance default/web"
        raise QuestionError(f"{text!r}: write NAMESPACE/NAME, {hint}")
    if service := state.services.get(Name(namespace, name)):
        return service
    near = _near(state.services, namespace, name)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise QuestionError(f"there is no Service {text}{hint}")


def _near(known: Iterable[Name], namespace: str, name: str) -> list[str]:
    """Services that were perhaps meant: of the same name elsewhere, or of a like name."""
    same = sorted(str(k) for k in known if k.name == name)
    here = {k.name: str(k) for k in known if k.namespace == namespace}
    like = [here[n] for n in difflib.get_close_matches(name, here, n=3)]
    return [*like, *same][:3]


def _ports(service: Service, text: str) -> tuple[ServicePort, ...]:
    found = tuple(p for p in service.ports if text in (p.name, str(p.port)))
    if not found:
        has = ", ".join(map(port_text, service.ports)) or "none"
        raise QuestionError(f"Service {service.name} has no port {text}; its ports are: {has}")
    return found


def _notes(state: State, service: Service) -> Iterator[str]:
    if not service.proxied:
        yield "not proxied: it has no cluster IP, so nothing is programmed for it"
    elif service.name not in state.programs:
        yield "not proxied: its labels leave it to another proxy, or say that it is headless"
    if not state.slices_of(service.name):
        yield f"no EndpointSlice has the label kubernetes.io/service-name={service.name.name}"


# --- the rows -----------------------------------------------------------------------------------


class _Policy(NamedTuple):
    """A traffic policy's selection, with its targets ready to be looked up."""

    selection: Selection
    targets: frozenset[Target]

    @classmethod
    def of(cls, selection: Selection) -> _Policy:
        return cls(selection, frozenset(selection.targets))

    def use(self, endpoint: Endpoint, target: Target, place: NodeLocation) -> Use:
        if target in self.targets:
            return Use(True, self.selection.basis.value)
        # `reason` would look for the target among all of them, once for every row
        return Use(False, reason(endpoint, target, self.selection._replace(targets=()), place))


def _port_tables(
    service: Service,
    ports: Iterable[ServicePort],
    slices: list[EndpointSlice],
    place: NodeLocation,
    *,
    external_ips: bool,
) -> Iterator[PortTable]:
    # as many as are served: external IPs times ports may be a million
    of_port: dict[tuple[ServicePort, int], list[Frontend]] = {}
    for frontend in islice(frontends(service, external_ips=external_ips), MAX_FRONTENDS):
        of_port.setdefault((frontend.service_port, frontend.family), []).append(frontend)
    for port in ports:
        for family in (4, 6):
            if using := of_port.get((port, family)):
                yield _port_table(using, slices, place, service.balancing)


def _port_table(
    using: list[Frontend],
    slices: list[EndpointSlice],
    place: NodeLocation,
    balancing: Balancing,
) -> PortTable:
    """The table of one port in one family, whose frontends are `using`."""
    frontend = using[0]
    port, family = frontend.service_port, frontend.family
    lists = port_lists(frontend, slices, place, balancing)
    # external addresses under policy Local serve clients inside the node from the cluster list
    uses_cluster = any(not f.local or f.external for f in using)
    policies = (
        _Policy.of(lists.cluster) if uses_cluster else None,
        _Policy.of(lists.local) if any(f.local for f in using) else None,
    )
    rows: list[tuple[Endpoint, int, EndpointSlice]] = []
    counting: dict[Target, int] = {}  # which row
    notes = []
    for piece in slices:
        if piece.family != family:
            continue
        numbers = [
            number
            for name, protocol, number in piece.ports
            if (name, protocol) == (port.name, port.protocol)
        ]
        if not numbers:
            notes.append(
                f"slice {piece.name.name} has no port {_named(port)}, so it does not count"
            )
        for number in numbers:
            for endpoint in piece.endpoints:
                target = target_of(endpoint.address, number)
                if endpoint == lists.found[target]:
                    other = counting.setdefault(target, len(rows))
                    # of equal copies the one in the youngest slice, see `selection.candidates`
                    if other < len(rows) and piece.created > rows[other][2].created:
                        counting[target] = len(rows)
                rows.append((endpoint, number, piece))
    protocol = PROTOCOL_NAMES[port.protocol]
    counts = set(counting.values())
    found = [
        _row(row, lists, policies, place, counts=number in counts)
        for number, row in enumerate(rows)
    ]
    return PortTable(port.name, protocol, port.port, family, _sorted(found), tuple(notes))


def _named(port: ServicePort) -> str:
    protocol = PROTOCOL_NAMES[port.protocol]
    return f"named {port.name!r} ({protocol})" if port.name else f"without a name ({protocol})"


def _sorted(rows: list[Row]) -> tuple[Row, ...]:
    """Used ones first, else in the slices' order; copies of one address side by side."""
    used: set[tuple[str, int]] = set()
    first: dict[tuple[str, int], int] = {}
    for number, row in enumerate(rows):
        key = (row.address, row.port)
        first.setdefault(key, number)
        if any(use and use.used for use in (row.cluster, row.local)):
            used.add(key)

    def order(row: Row) -> tuple[bool, int, bool]:
        key = (row.address, row.port)
        return key not in used, first[key], not row.counts

    return tuple(sorted(rows, key=order))


def _row(
    item: tuple[Endpoint, int, EndpointSlice],
    lists: PortLists,
    policies: tuple[_Policy | None, _Policy | None],
    place: NodeLocation,
    *,
    counts: bool,
) -> Row:
    endpoint, port, piece = item
    target = target_of(endpoint.address, port)

    def use(policy: _Policy | None) -> Use | None:
        if policy is None:
            return None
        if not counts:
            return Use(False, "the copy in another slice counts")
        if lists.weights and not lists.weights[target]:
            return Use(False, DRAINED)
        return policy.use(endpoint, target, place)

    cluster, local = map(use, policies)
    return Row(
        address_text(endpoint.address),
        port,
        bool(endpoint.conditions & READY),
        bool(endpoint.conditions & SERVING),
        bool(endpoint.conditions & TERMINATING),
        endpoint.node,
        endpoint.zone,
        endpoint.node_hints,
        endpoint.zone_hints,
        endpoint.pod,
        piece.name.name,
        counts,
        cluster,
        local,
        lists.weights[target] if lists.weights and counts else None,
    )
