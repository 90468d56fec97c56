"""What one Service wants in the kernel.

A Service is programmed from nothing but itself, its slices and this node's name, zone and options,
so the cost of a change depends on the size of the Service, not of the cluster; and that size is
bounded (MAX_ELEMENTS, MAX_FRONTENDS). The result has two parts:
`Wanted`, one per frontend, whose elements all belong to that frontend's key; and `shared`
elements, which several Services may want and which therefore are counted.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import msgspec

from rules.frontends import FAMILY_OF_LENGTH, Frontend, Kind, frontend_count, frontends
from rules.language import Set
from rules.objects import (
    PROTOCOL_NAMES,
    RANDOM_CHOICE,
    TCP,
    UDP,
    Address,
    Algorithm,
    Balancing,
    Endpoint,
    EndpointSlice,
    Service,
)
from rules.problems import (
    ALL_DRAINED,
    API_SERVER_ADDRESS,
    TOO_MANY_ELEMENTS,
    TOO_MANY_ENDPOINTS,
    WEIGHTS_ROUNDED,
    listed,
)
from rules.selection import (
    NodeLocation,
    Selection,
    candidates,
    cluster_list,
    local_list,
    serving,
)
from rules.shares import most_slots, needed, slots_for
from rules.slots import MAX_ENDPOINTS
from rules.tables import CLUSTER, MASQUERADE, PLAIN, SETS, remember
from rules.target import Target, address_of
from rules.text import Key, Value
from rules.weights import weigher

_T = TypeVar("_T")

SetElement = tuple[Set, Key, Value]
"""An element with the set it belongs to."""


MAX_ELEMENTS = 1 << 18
"""So many elements one Service may have in the kernel, 262,144: four full lists of endpoints, or
10,000 endpoints at 26 addresses and ports. What is beyond is not served, by whole frontends in the
order of `frontends.frontends`: the first that does not fit, and all behind it."""

MAX_FRONTENDS = 8192
"""So many addresses and ports of one Service are served, in the same order."""

_NONE: frozenset[Any] = frozenset()  # Python makes a new one, of 216 bytes, each time it is asked


class Surroundings(NamedTuple):
    """What a Service's program depends on besides the Service: the node and the options.

    `tells_pods` holds the families in which the rules identify pods of this node. `external_ips`
    says whether external IPs are served at all. `api_servers` are the addresses and TCP ports of
    the API server. `counters` says whether packets are counted.
    """

    place: NodeLocation
    node_addresses: tuple[Address, ...] = ()
    masquerade_all: bool = False
    tells_pods: frozenset[int] = frozenset()
    external_ips: bool = True
    api_servers: frozenset[tuple[Address, int]] = frozenset()
    counters: bool = False


class Claim(NamedTuple):
    """The key in a verdict map by which a frontend is known. Its Set compares by identity."""

    verdicts: Set
    key: Key


class Wanted(msgspec.Struct, frozen=True, gc=False):
    """What one frontend wants.

    `endpoints` get slots under the claim's key, `inside` likewise in a map of their own, if it is
    not None; a weighted endpoint is there several times. `hashed` lists are tables, in which the
    position is meant (`rules.shares`). `style` and `sticky` pick the chain together with the width,
    which is found when the slots are. `elements` are all others. `serving` are the targets to which
    earlier flows may lead (`rules.stale_flows`); it is empty unless the protocol is UDP.
    """

    frontend: Frontend
    style: str
    sticky: bool
    endpoints: tuple[Target, ...]
    inside: tuple[Target, ...] | None
    elements: frozenset[SetElement]
    serving: frozenset[Target] = _NONE
    hashed: bool = False

    @property
    def size(self) -> int:
        """How many elements the frontend has in the kernel."""
        inside = 0 if self.inside is None else 1 + min(len(self.inside), MAX_ENDPOINTS)
        return 1 + min(len(self.endpoints), MAX_ENDPOINTS) + inside + len(self.elements)


class Program(msgspec.Struct, frozen=True, gc=False):
    """What one Service wants. `shared` has no element twice. `created` is the Service's.
    `problems` are codes and texts of `rules.problems`.

    It needs rules that exist only while a Service does: `affinity` holds (family, seconds) of its
    session affinity, `guarded` the families in which loadBalancerSourceRanges guard an address,
    `hashed` those of a Service that asks for source-hash, `by_endpoint` those of one whose
    connections are counted by endpoint.
    """

    wanted: dict[Claim, Wanted]
    shared: tuple[SetElement, ...]
    affinity: frozenset[tuple[int, int]] = _NONE
    guarded: frozenset[int] = _NONE
    created: str = ""
    problems: tuple[tuple[str, str], ...] = ()
    hashed: frozenset[int] = _NONE
    by_endpoint: frozenset[int] = _NONE


NOTHING = Program({}, ())


class PortLists(NamedTuple):
    """The endpoints of one Service port in one family, and what this node uses of them.

    `serving` is empty unless the protocol is UDP; `weights` is empty under RANDOM. The lists are
    without the endpoints of weight 0.
    """

    found: dict[Target, Endpoint]
    cluster: Selection
    local: Selection
    serving: frozenset[Target] = _NONE
    weights: Mapping[Target, int] = {}

    @property
    def most(self) -> int:
        """The endpoints of the longer list."""
        return max(len(self.cluster.targets), len(self.local.targets))


def port_lists(
    frontend: Frontend,
    slices: Iterable[EndpointSlice],
    place: NodeLocation,
    balancing: Balancing = RANDOM_CHOICE,
) -> PortLists:
    """Both lists of the Service port that the frontend belongs to."""
    port = frontend.service_port
    found = usable = candidates(slices, frontend.family, port.name, port.protocol)
    weights: Mapping[Target, int] = {}
    if balancing.algorithm is not Algorithm.RANDOM:
        weight = weigher(balancing)
        weights = {target: weight(endpoint) for target, endpoint in found.items()}
        # before hints are looked at: clients in a drained zone go to other zones
        usable = {target: endpoint for target, endpoint in found.items() if weights[target]}
    return PortLists(
        found,
        cluster_list(usable, place),
        local_list(usable, place),
        serving(found) if port.protocol == UDP else _NONE,
        weights,
    )


def program(service: Service, slices: Iterable[EndpointSlice], around: Surroundings) -> Program:
    """What the Service wants, given its slices in a stable order."""
    slices = tuple(slices)
    lists: dict[tuple[int, str, int], PortLists] = {}
    wanted: dict[Claim, Wanted] = {}
    shared: dict[SetElement, None] = {}
    affinity: set[tuple[int, int]] = set()
    guarded: set[int] = set()
    refused: list[str] = []
    size, excess = 0, False
    if service.proxied:  # also without a usable port: an unknown port of a cluster IP is rejected
        for address in service.cluster_ips:
            shared[SETS[FAMILY_OF_LENGTH[len(address)]].cluster_ips, address, None] = None
    for frontend in frontends(service, external_ips=around.external_ips):
        claim = claim_of(frontend)
        if claim in wanted:
            continue
        if _is_api_server(frontend, around):
            refused.append(str(frontend))
            continue
        port = frontend.service_port
        lists_key = (frontend.family, port.name, port.protocol)
        if lists_key not in lists:
            lists[lists_key] = port_lists(frontend, slices, around.place, service.balancing)
        item = _wanted(service, frontend, lists[lists_key], around)
        size += item.size
        excess = size > MAX_ELEMENTS or len(wanted) == MAX_FRONTENDS
        if excess:
            break
        wanted[claim] = item
        if service.affinity_seconds:
            affinity.add((frontend.family, service.affinity_seconds))
            if frontend.address:
                shared[SETS[frontend.family].sticky_addresses, frontend.address, None] = None
        if _is_guarded(service, frontend):
            guarded.add(frontend.family)
    for (family, _, _), of_port in lists.items():
        shared.update(dict.fromkeys(_hairpins(family, of_port, around.place.node)))
    problems: tuple[tuple[str, str], ...] = ()
    if refused or excess or any(lists_.most > MAX_ENDPOINTS for lists_ in lists.values()):
        left_out = _excess(service, around, len(wanted), excess=excess)
        problems = (*_refusals(refused), *left_out, *_cuts(lists))
    random = service.balancing.algorithm is Algorithm.RANDOM
    problems = problems if random else (*problems, *_weight_problems(service, lists, around.place))
    return Program(
        wanted,
        tuple(shared),
        _frozen(affinity),
        _frozen(guarded),
        service.created,
        problems,
        _NONE if random else _hashed(service, wanted),
        _families(wanted) if service.endpoint_counters and around.counters else _NONE,
    )


def _is_api_server(frontend: Frontend, around: Surroundings) -> bool:
    """Whether an external address would take over the API server's."""
    return (
        bool(around.api_servers)
        and frontend.external
        and frontend.protocol == TCP
        and (frontend.address, frontend.port) in around.api_servers
    )


def _refusals(refused: list[str]) -> Iterator[tuple[str, str]]:
    if refused:
        yield (
            API_SERVER_ADDRESS,
            f"not served, because the API server is there: {listed(refused)}; remove the address "
            "from the Service's externalIPs or its load balancer",
        )


def _excess(
    service: Service, around: Surroundings, served: int, *, excess: bool
) -> Iterator[tuple[str, str]]:
    if excess:
        count = frontend_count(service, external_ips=around.external_ips)
        yield (
            TOO_MANY_ELEMENTS,
            f"{count - served} of {count} addresses and ports "
            f"are not served: a Service may have {MAX_FRONTENDS} of them and {MAX_ELEMENTS} "
            "elements; cluster IPs are served first, then node ports, load balancer IPs, external "
            "IPs; split the Service",
        )


def _cuts(lists: Mapping[tuple[int, str, int], PortLists]) -> Iterator[tuple[str, str]]:
    most = max((found.most for found in lists.values()), default=0)
    if most > MAX_ENDPOINTS:
        yield (
            TOO_MANY_ENDPOINTS,
            f"a port has {most} endpoints and {MAX_ENDPOINTS} of them are used, those of the "
            "EndpointSlices with the first names; split the Service",
        )


def _hashed(service: Service, wanted: Iterable[Claim]) -> frozenset[int]:
    """The families that need the chains of source-hash."""
    if service.balancing.algorithm is not Algorithm.SOURCE_HASH:
        return _NONE
    return _families(wanted)


def _families(wanted: Iterable[Claim]) -> frozenset[int]:
    return frozenset(claim.verdicts.family for claim in wanted)


def _weight_problems(
    service: Service, lists: Mapping[tuple[int, str, int], PortLists], place: NodeLocation
) -> Iterator[tuple[str, str]]:
    yield from _drained(lists, place)
    if service.balancing.algorithm is Algorithm.WEIGHTED:
        yield from _rounded(lists)


def _drained(
    lists: Mapping[tuple[int, str, int], PortLists], place: NodeLocation
) -> Iterator[tuple[str, str]]:
    drained = [
        _port_text(key)
        for key, found in lists.items()
        if not found.cluster.targets and cluster_list(found.found, place).targets
    ]
    if drained:
        yield (
            ALL_DRAINED,
            f"new connections are refused, because all endpoints have weight 0: {listed(drained)}; "
            "raise a weight, or remove the annotations",
        )


def _rounded(lists: Mapping[tuple[int, str, int], PortLists]) -> Iterator[tuple[str, str]]:
    rounded = []
    for key, found in lists.items():
        for selection in (found.cluster, found.local):
            weights = [found.weights[target] for target in selection.targets]
            if weights and needed(weights) > (most := most_slots(len(weights))):
                rounded.append(f"{_port_text(key)} ({needed(weights)} slots, at most {most})")
                break
    if rounded:
        yield (
            WEIGHTS_ROUNDED,
            f"weights are rounded, each endpoint to at least one slot: {listed(rounded)}; "
            "use smaller weights",
        )


def _port_text(key: tuple[int, str, int]) -> str:
    family, name, protocol = key
    return f"{name or 'unnamed'}/{PROTOCOL_NAMES[protocol]} IPv{family}"


def _frozen(items: Collection[_T]) -> frozenset[_T]:
    return frozenset(items) if items else _NONE


def claim_of(frontend: Frontend) -> Claim:
    """The claim by which a frontend is known."""
    sets = SETS[frontend.family]
    verdicts = sets.service_ips if frontend.address else sets.service_nodeports
    return Claim(verdicts, frontend.key)


def _hairpins(family: int, lists: PortLists, node: str) -> Iterator[SetElement]:
    """(address, address) of each used endpoint on this node, so that it can reach itself."""
    here = [target for target, endpoint in lists.found.items() if endpoint.node == node]
    if not here:
        return
    hairpins, used = SETS[family].hairpins, {*lists.cluster.targets, *lists.local.targets}
    for target in here:
        if target in used:
            address = address_of(target)
            yield hairpins, address + address, None


def _wanted(service: Service, frontend: Frontend, lists: PortLists, around: Surroundings) -> Wanted:
    elements = [*_answer(frontend, lists), *_guard(service, frontend, around)]
    if service.affinity_seconds:
        elements.append(_remembered(service, frontend))
    if service.endpoint_counters and around.counters:
        elements.append(_counted_by_endpoint(frontend))
    selection = lists.local if frontend.local else lists.cluster
    endpoints, inside = selection.targets, None
    if frontend.external and frontend.local:
        inside = lists.cluster.targets
    algorithm = service.balancing.algorithm
    if algorithm is not Algorithm.RANDOM:
        endpoints = _in_slots(algorithm, endpoints, lists)
        inside = None if inside is None else _in_slots(algorithm, inside, lists)
    return Wanted(
        frontend,
        _style(frontend, around),
        bool(service.affinity_seconds),
        endpoints,
        inside,
        _frozen(elements),
        lists.serving,
        algorithm is Algorithm.SOURCE_HASH,
    )


def _in_slots(
    algorithm: Algorithm, targets: tuple[Target, ...], lists: PortLists
) -> tuple[Target, ...]:
    """What slots shall hold. The same object for all frontends of a port (`diff.Shared`)."""
    return slots_for(algorithm, targets, tuple([lists.weights[target] for target in targets]))


def _style(frontend: Frontend, around: Surroundings) -> str:
    if frontend.external:
        return PLAIN if frontend.local else MASQUERADE
    if around.masquerade_all:
        return MASQUERADE
    return CLUSTER if frontend.family in around.tells_pods else PLAIN


def _answer(frontend: Frontend, lists: PortLists) -> Iterator[SetElement]:
    """The answer where a list is empty: reject if there is no endpoint anywhere, else drop."""
    sets = SETS[frontend.family]
    if not lists.cluster.targets:
        yield (sets.reject_ips if frontend.address else sets.reject_nodeports), frontend.key, None
    elif frontend.local and not lists.local.targets:
        yield (sets.drop_ips if frontend.address else sets.drop_nodeports), frontend.key, None


def _guard(service: Service, frontend: Frontend, around: Surroundings) -> Iterator[SetElement]:
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
    for owner in (sets.guarded, sets.outside_ranges, sets.outside_ranges_known):
        yield owner, frontend.key, None
    for network in ranges:
        low, high = network.network_address.packed, network.broadcast_address.packed
        yield sets.source_ranges, frontend.key + low, frontend.key + high


def _is_guarded(service: Service, frontend: Frontend) -> bool:
    return bool(service.source_ranges) and frontend.kind is Kind.LOAD_BALANCER_IP


def _remembered(service: Service, frontend: Frontend) -> SetElement:
    sets = SETS[frontend.family]
    owner = sets.sticky_ips if frontend.address else sets.sticky_nodeports
    return owner, frontend.key, remember(service.affinity_seconds)


def _counted_by_endpoint(frontend: Frontend) -> SetElement:
    sets = SETS[frontend.family]
    owner = sets.counted_frontends if frontend.address else sets.counted_nodeports
    return owner, frontend.key, None


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
