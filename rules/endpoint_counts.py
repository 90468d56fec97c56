"""New connections by endpoint, of the Services that ask for it (`sliceproxy.io/endpoint-counters`).

The kernel has an element for each frontend and endpoint (`endpoint-counters` in `rules.tables`),
with a counter. It makes the element with the first connection, and forgets it after a day without
one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import msgspec

from rules.counts import PacketCounts
from rules.endpoint_report import EndpointTable, PortTable, Row
from rules.language import ADDRESS_LENGTH
from rules.objects import PROTOCOL_NAMES, Name, ServicePort, parse_address
from rules.program import Claim
from rules.state import State
from rules.tables import SETS
from rules.target import Target, target_of
from rules.text import Key


def is_counted(state: State, table: EndpointTable) -> bool:
    """Whether the connections of the table's Service are counted by endpoint."""
    program = state.programs.get(_name(table))
    return bool(program and program.by_endpoint)


def with_connections(state: State, table: EndpointTable, counts: PacketCounts) -> EndpointTable:
    """The table of a counted Service with the connections to each endpoint, at all its frontends.

    `counts` are those of the sets `endpoint-counters`.
    """
    name = _name(table)
    found: Counter[tuple[int, str, int, Target]] = Counter()
    for owner, of_keys in counts.items():
        for key, count in of_keys.items():
            if port := _port(state, name, owner.family, key):
                target = key[ADDRESS_LENGTH[owner.family] + 8 :]
                protocol = PROTOCOL_NAMES[port.protocol]
                found[owner.family, protocol, port.port, target] += count.packets

    def rows(port: PortTable) -> Iterator[Row]:
        for row in port.rows:
            target = target_of(parse_address(row.address), row.port)
            number = found[port.family, port.protocol, port.port, target]
            yield msgspec.structs.replace(row, connections=number if row.counts else None)

    ports = tuple(msgspec.structs.replace(p, rows=tuple(rows(p))) for p in table.ports)
    return msgspec.structs.replace(table, ports=ports)


def _name(table: EndpointTable) -> Name:
    namespace, _, name = table.service.partition("/")
    return Name(namespace, name)


def _port(state: State, name: Name, family: int, key: Key) -> ServicePort | None:
    """The port of this Service at whose frontend an element counts; None for another Service's.

    Node ports are counted at the address that was asked, which no frontend has.
    """
    sets, length = SETS[family], ADDRESS_LENGTH[family]
    claim = Claim(sets.service_ips, key[: length + 8])
    if state.holder(claim) is None:
        claim = Claim(sets.service_nodeports, key[length : length + 8])
    if state.holder(claim) != name:
        return None
    return state.programs[name].wanted[claim].frontend.service_port
