"""What was counted, by Service address: new connections, refusals and drops with their reasons.

A packet that finds a verdict is counted, then perhaps refused or dropped. Such packets are taken
off again, so `connections` are those that an endpoint was chosen for. What is refused or dropped is
counted in packets: a client that repeats its SYN is counted again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import msgspec

from rules.frontends import FAMILY_OF_LENGTH, Frontend
from rules.language import FAMILY_NAME, Set
from rules.netlink.counters import NO_PACKETS, Count
from rules.objects import Name, Service, address_text
from rules.program import Claim
from rules.state import State
from rules.tables import FAMILIES, SETS
from rules.text import Key

PacketCounts = Mapping[Set, Mapping[Key, Count]]

NO_ENDPOINTS = "no_endpoints"
UNKNOWN_PORT = "unknown_port"
NO_LOCAL_ENDPOINTS = "no_local_endpoints"
SOURCE_RANGES = "source_ranges"
UNALLOCATED = "unallocated"


class FrontendCounts(msgspec.Struct, frozen=True):
    """What was counted at one address and port since the element was made.

    Packets to unknown ports of a cluster IP have a record with the address alone and the port "";
    packets to addresses that no Service has one for each family, with no Service: `frontend` is
    "ip" or "ip6".
    """

    namespace: str
    service: str
    port: str
    frontend: str
    connections: int = 0
    refused: dict[str, int] = {}
    dropped: dict[str, int] = {}


class FrontendCounter:
    """Assigns counts to frontends, from reading to reading. The record of a frontend at which
    nothing has happened since is the same object, which is found, not made."""

    def __init__(self) -> None:
        self._known: dict[Claim, tuple[Frontend, Name, _Numbers, FrontendCounts]] = {}

    def read(self, state: State, counts: PacketCounts) -> Iterator[FrontendCounts]:
        """The counts of all frontends that Services have, then those without one."""
        known, self._known = self._known, {}
        columns = {
            verdicts: _columns(verdicts, counts)
            for sets in SETS.values()
            for verdicts in (sets.service_ips, sets.service_nodeports)
        }
        for claim, installed in state.installed.items():
            if name := state.holder(claim):
                frontend = installed.wanted.frontend
                numbers = _numbers(columns[claim.verdicts], claim.key)
                last = known.get(claim)
                if last is None or last[:3] != (frontend, name, numbers):
                    last = frontend, name, numbers, _record(name, frontend, numbers)
                self._known[claim] = last
                yield last[3]
        yield from _unknown_ports(state.services, counts)
        for family in FAMILIES:
            cidrs = counts.get(SETS[family].service_cidrs, {})
            if packets := sum(count.packets for count in cidrs.values()):
                family_name = FAMILY_NAME[family]
                yield FrontendCounts("", "", "", family_name, dropped={UNALLOCATED: packets})


def frontend_counts(state: State, counts: PacketCounts) -> Iterator[FrontendCounts]:
    """The counts of all frontends that Services have, then those without one."""
    return FrontendCounter().read(state, counts)


def claim_counts(state: State, name: Name, claim: Claim, counts: PacketCounts) -> FrontendCounts:
    """The counts of one frontend, which this Service has."""
    frontend = state.installed[claim].wanted.frontend
    return _record(name, frontend, _numbers(_columns(claim.verdicts, counts), claim.key))


_Columns = tuple[Mapping[Key, Count], ...]
"""Of service-, inside-, reject-, drop-, outside-ranges and outside-ranges-known, what their
elements counted."""
_Numbers = list[int]
"""The packets of a key in each of the columns."""


def _columns(verdicts: Set, counts: PacketCounts) -> _Columns:
    sets, nothing = SETS[verdicts.family], dict[Key, Count]()
    if verdicts is sets.service_ips:
        owners = (sets.service_ips, sets.inside_ips, sets.reject_ips, sets.drop_ips)
    else:
        owners = (
            *(sets.service_nodeports, sets.inside_nodeports),
            *(sets.reject_nodeports, sets.drop_nodeports),
        )
    outside = sets.outside_ranges, sets.outside_ranges_known
    return tuple(counts.get(owner, nothing) for owner in (*owners, *outside))


def _numbers(columns: _Columns, key: Key) -> _Numbers:
    return [column[key].packets if key in column else 0 for column in columns]


def _record(name: Name, frontend: Frontend, numbers: _Numbers) -> FrontendCounts:
    seen, inside, refused, dropped, outside, of_flows = numbers
    port = frontend.service_port
    return FrontendCounts(
        name.namespace,
        name.name,
        port.name or str(port.port),
        str(frontend),
        max(0, seen + inside - refused - dropped - outside),
        {NO_ENDPOINTS: refused} if refused else {},
        {
            reason: number
            for reason, number in (
                (NO_LOCAL_ENDPOINTS, dropped),
                (SOURCE_RANGES, outside + of_flows),
            )
            if number
        },
    )


def counted_keys(state: State, names: Iterable[Name]) -> dict[Set, list[Key]]:
    """The elements that count for the frontends of these Services: what `claim_counts` looks at."""
    found: dict[Set, list[Key]] = {}
    for name in names:
        for claim in _held(state, name):
            for owner in SETS[claim.verdicts.family].counted:
                if owner.key == claim.verdicts.key:
                    found.setdefault(owner, []).append(claim.key)
    return found


def service_counts(state: State, name: Name, counts: PacketCounts) -> Iterator[FrontendCounts]:
    """The counts of one Service, with those of unknown ports of its cluster IPs."""
    for claim in _held(state, name):
        yield claim_counts(state, name, claim, counts)
    if name in state.services:
        yield from _unknown_ports({name: state.services[name]}, counts)


def service_keys(state: State, name: Name) -> dict[Set, list[Key]]:
    """The elements that count for one Service: what `service_counts` looks at."""
    found = counted_keys(state, [name])
    for address in state.services[name].cluster_ips if name in state.services else ():
        owner = SETS[FAMILY_OF_LENGTH[len(address)]].cluster_ips
        found.setdefault(owner, []).append(address)
    return found


def _held(state: State, name: Name) -> Iterator[Claim]:
    """The frontends of a Service that no other Service has, as far as they are programmed."""
    program = state.programs.get(name)
    for claim in program.wanted if program else ():
        if state.holder(claim) == name and claim in state.installed:
            yield claim


def _unknown_ports(
    services: Mapping[Name, Service], counts: PacketCounts
) -> Iterator[FrontendCounts]:
    for name, service in services.items():
        for address in service.cluster_ips:
            owner = SETS[FAMILY_OF_LENGTH[len(address)]].cluster_ips
            packets = counts.get(owner, {}).get(address, NO_PACKETS).packets
            if packets:
                refused = {UNKNOWN_PORT: packets}
                where = address_text(address)
                yield FrontendCounts(name.namespace, name.name, "", where, refused=refused)


def by_service(
    found: Iterable[FrontendCounts],
) -> dict[tuple[str, str], tuple[int, int, int]]:
    """Connections, refused and dropped by namespace and name of the Service, summed."""
    sums: dict[tuple[str, str], tuple[int, int, int]] = {}
    for one in found:
        key = one.namespace, one.service
        connections, refused, dropped = sums.get(key, (0, 0, 0))
        sums[key] = (
            connections + one.connections,
            refused + sum(one.refused.values()),
            dropped + sum(one.dropped.values()),
        )
    return sums
