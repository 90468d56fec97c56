"""What one Service wants in the kernel.

A Service is programmed from nothing but itself, its slices and where this node stands, so a change
costs what the Service is large and nothing of what the cluster is. The result has two parts:
`Wanted`, one per frontend, whose elements all belong to that frontend's key; and `shared`
elements, which several Services may want and which therefore are counted.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import msgspec

from rules.frontends import Frontend, Kind, frontends
from rules.language import Set
from rules.objects import UDP, Address, Endpoint, EndpointSlice, Service
from rules.selection import (
    NodeLocation,
    Selection,
    candidates,
    cluster_list,
    local_list,
    serving,
)
from rules.tables import CLUSTER, MASQUERADE, PLAIN, SETS, remember
from rules.target import Target, address_of
from rules.text import Key, Value

_T = TypeVar("_T")

Owned = tuple[Set, Key, Value]
"""An element with the set it belongs to."""


_NONE: frozenset[Any] = frozenset()  # Python makes a new one, of 216 bytes, each time it is asked


class Surroundings(NamedTuple):
    """What a Service's program depends on besides the Service: the node and the options.

    `tells_pods` holds the families in which pods of this node can be told from others;
    `external_ips` says whether external IPs are served at all.
    """

    place: NodeLocation
    node_addresses: tuple[Address, ...] = ()
    masquerade_all: bool = False
    tells_pods: frozenset[int] = frozenset()
    external_ips: bool = True


class Claim(NamedTuple):
    """The key in a verdict map by which a frontend is known. Its Set compares by identity."""

    verdicts: Set
    key: Key


class Wanted(msgspec.Struct, frozen=True):
    """What one frontend wants.

    `endpoints` get slots under the claim's key, `inside` likewise in a map of their own, if it is
    not None. `style` and `sticky` pick the chain together with the width, which is found when the
    slots are. `elements` are all others. `serving` tells where flows may lead that began earlier
    (`rules.conntrack`); it is empty unless the protocol is UDP.
    """

    frontend: Frontend
    style: str
    sticky: bool
    endpoints: tuple[Target, ...]
    inside: tuple[Target, ...] | None
    elements: frozenset[Owned]
    serving: frozenset[Target] = _NONE


class Program(msgspec.Struct, frozen=True):
    """What one Service wants. `shared` has no element twice.

    It needs rules that exist only while a Service does: `affinity` holds (family, seconds) of its
    session affinity, `guarded` the families in which loadBalancerSourceRanges guard an address.
    """

    wanted: dict[Claim, Wanted]
    shared: tuple[Owned, ...]
    affinity: frozenset[tuple[int, int]] = _NONE
    guarded: frozenset[int] = _NONE


NOTHING = Program({}, ())


class PortLists(NamedTuple):
    """The endpoints of one Service port in one family, and what this node uses of them.

    `serving` is empty unless the protocol is UDP.
    """

    found: dict[Target, Endpoint]
    cluster: Selection
    local: Selection
    serving: frozenset[Target] = _NONE


def port_lists(
    frontend: Frontend, slices: Iterable[EndpointSlice], place: NodeLocation
) -> PortLists:
    """Both lists of the Service port that the frontend belongs to."""
    port = frontend.service_port
    found = candidates(slices, frontend.family, port.name, port.protocol)
    return PortLists(
        found,
        cluster_list(found, place),
        local_list(found, place),
        serving(found) if port.protocol == UDP else _NONE,
    )


def program(service: Service, slices: Iterable[EndpointSlice], around: Surroundings) -> Program:
    """What the Service wants, given its slices in a stable order."""
    slices = tuple(slices)
    lists: dict[tuple[int, str, int], PortLists] = {}
    wanted: dict[Claim, Wanted] = {}
    shared: dict[Owned, None] = {}
    affinity: set[tuple[int, int]] = set()
    guarded: set[int] = set()
    for frontend in frontends(service, external_ips=around.external_ips):
        claim = claim_of(frontend)
        if claim in wanted:
            continue
        port = frontend.service_port
        lists_key = (frontend.family, port.name, port.protocol)
        if lists_key not in lists:
            lists[lists_key] = port_lists(frontend, slices, around.place)
        wanted[claim] = _wanted(service, frontend, lists[lists_key], around)
        if service.affinity_seconds:
            affinity.add((frontend.family, service.affinity_seconds))
            if frontend.address:
                shared[SETS[frontend.family].sticky_addresses, frontend.address, None] = None
        if _is_guarded(service, frontend):
            guarded.add(frontend.family)
        if frontend.kind is Kind.CLUSTER_IP:
            shared[SETS[frontend.family].cluster_ips, frontend.address, None] = None
    for (family, _, _), of_port in lists.items():
        shared.update(dict.fromkeys(_hairpins(family, of_port, around.place.node)))
    return Program(wanted, tuple(shared), _frozen(affinity), _frozen(guarded))


def _frozen(items: Collection[_T]) -> frozenset[_T]:
    return frozenset(items) if items else _NONE


def claim_of(frontend: Frontend) -> Claim:
    """The claim by which a frontend is known."""
    sets = SETS[frontend.family]
    verdicts = sets.service_ips if frontend.address else sets.service_nodeports
    return Claim(verdicts, frontend.key)


def _hairpins(family: int, lists: PortLists, node: str) -> Iterator[Owned]:
    """(address, address) of each used endpoint on this node, so that it can reach itself."""
    hairpins = SETS[family].hairpins
    for target in {*lists.cluster.targets, *lists.local.targets}:
        if lists.found[target].node == node:
            address = address_of(target)
            yield hairpins, address + address, None


def _wanted(service: Service, frontend: Frontend, lists: PortLists, around: Surroundings) -> Wanted:
    selection = lists.local if frontend.local else lists.cluster
    elements = [*_answer(frontend, lists), *_guard(service, frontend, around)]
    if service.affinity_seconds:
        elements.append(_remembered(service, frontend))
    return Wanted(
        frontend,
        _style(frontend, around),
        bool(service.affinity_seconds),
        selection.targets,
        lists.cluster.targets if frontend.external and frontend.local else None,
        _frozen(elements),
        lists.serving,
    )


def _style(frontend: Frontend, around: Surroundings) -> str:
    if frontend.external:
        return PLAIN if frontend.local else MASQUERADE
    if around.masquerade_all:
        return MASQUERADE
    return CLUSTER if frontend.family in around.tells_pods else PLAIN


def _answer(frontend: Frontend, lists: PortLists) -> Iterator[Owned]:
    """The answer where a list is empty: reject if there is no endpoint anywhere, else drop."""
    sets = SETS[frontend.family]
    if not lists.cluster.targets:
        yield (sets.reject_ips if frontend.address else sets.reject_nodeports), frontend.key, None
    elif frontend.local and not lists.local.targets:
        yield (sets.drop_ips if frontend.address else sets.drop_nodeports), frontend.key, None


def _guard(service: Service, frontend: Frontend, around: Surroundings) -> Iterator[Owned]:
    """loadBalancerSourceRanges, which guard load balancer IPs only.

    If the node itself may come in, packets that it sends from the load balancer's own address may
    too: some load balancers deliver with their address as an address of the node.
    """
    if not _is_guarded(service, frontend):
        return
    sets, length = SETS[frontend.family], len(frontend.address)
    ranges = [n for n in service.source_ranges if len(n.network_address.packed) == length]
    own = [a for a in around.node_addresses if len(a) == length]
    if any(ipaddress.ip_address(a) in n for a in own for n in ranges):
        balancers = (ipaddress.ip_address(a) for a in service.load_balancer_ips if len(a) == length)
        ranges += [ipaddress.ip_network(b) for b in balancers if not any(b in n for n in ranges)]
    yield sets.guarded, frontend.key, None
    for network in ranges:
        low, high = network.network_address.packed, network.broadcast_address.packed
        yield sets.source_ranges, frontend.key + low, frontend.key + high


def _is_guarded(service: Service, frontend: Frontend) -> bool:
    return bool(service.source_ranges) and frontend.kind is Kind.LOAD_BALANCER_IP


def _remembered(service: Service, frontend: Frontend) -> Owned:
    sets = SETS[frontend.family]
    owner = sets.sticky_ips if frontend.address else sets.sticky_nodeports
    return owner, frontend.key, remember(service.affinity_seconds)


def no_local_endpoints(program: Program) -> frozenset[tuple[int, str, str, int]]:
    """The ports of a Service with traffic policy Local for which this node has nothing, though
    there are endpoints elsewhere: family, policy, port name, protocol."""
    return frozenset(
        (
            wanted.frontend.family,
            "external" if wanted.frontend.external else "internal",
            wanted.frontend.service_port.name,
            wanted.frontend.protocol,
        )
        for wanted in program.wanted.values()
        if wanted.frontend.local
        and not wanted.endpoints
        and any(owner.name.startswith("drop-") for owner, _, _ in wanted.elements)
    )
