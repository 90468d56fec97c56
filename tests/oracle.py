"""What the kernel must hold, computed from `semantics.md` alone.

This is the slow and obvious reading of the specification that tests hold the product against. It
knows nothing of the product's ways: no selection, no program, no difference. It takes decoded
records (`rules.objects`) and the names of sets, and nothing else.

Two functions make the same kind of thing, a `Picture`, and a test compares the two:

- `expected` paints it from the objects, in the order of the specification;
- `observed` reads it out of elements that were dumped from a kernel, and beside it the `Slots`
  and widths, about which a picture says nothing: the position of an endpoint in a list is free.
"""

from __future__ import annotations

import ipaddress
import math
import re
import struct
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from rules.diff import Elements
from rules.events import NodeAddresses
from rules.objects import (
    READY,
    SERVING,
    TCP,
    TERMINATING,
    Algorithm,
    Endpoint,
    EndpointSlice,
    Name,
    Node,
    Service,
    ServiceCIDR,
    ServicePort,
    WeightedEndpoint,
)
from rules.options import DetectLocalMode, Options

FAMILIES = (4, 6)


class Where(NamedTuple):
    """An address, protocol and port. The address of a node port is empty."""

    family: int
    address: bytes
    protocol: int
    port: int

    def __repr__(self) -> str:
        place = ipaddress.ip_address(self.address) if self.address else f"node port/{self.family}"
        return f"<{place} {self.protocol}/{self.port}>"


class Target(NamedTuple):
    """An endpoint's address and port."""

    address: bytes
    port: int

    def __repr__(self) -> str:
        return f"<{ipaddress.ip_address(self.address)} {self.port}>"


Ranges = tuple[tuple[int, int], ...]
"""Sets of addresses as inclusive ranges of numbers, ascending, apart by at least one address."""


class Behaviour(NamedTuple):
    """How one `Where` answers.

    `verdict` and `inside_verdict` are chain names without their width. `affinity` is in seconds,
    0 without. `empty` is "reject", "drop" or "". `sources` is None where everybody may come in.
    `shares` hold how many slots each endpoint has, where one has several.
    """

    verdict: str | None
    endpoints: frozenset[Target]
    inside_verdict: str | None = None
    inside: frozenset[Target] = frozenset()
    affinity: int = 0
    empty: str = ""
    sources: Ranges | None = None
    shares: frozenset[tuple[Target, int]] = frozenset()
    inside_shares: frozenset[tuple[Target, int]] = frozenset()


class Picture(NamedTuple):
    """Everything in the kernel that depends on objects, free of how it is laid out there.

    Addresses are packed; those of both families stand together. Ranges are by family.
    """

    frontends: dict[Where, Behaviour]
    cluster_ips: frozenset[bytes]
    node_port_ips: frozenset[bytes]
    hairpins: frozenset[bytes]
    service_cidrs: dict[int, Ranges]
    pod_cidrs: dict[int, Ranges]
    timeouts: dict[int, frozenset[int]]


class Objects(NamedTuple):
    """What a cluster and a node are like at one moment."""

    services: tuple[Service, ...] = ()
    slices: tuple[EndpointSlice, ...] = ()
    node: Node | None = None
    service_cidrs: tuple[ServiceCIDR, ...] = ()
    addresses: NodeAddresses = NodeAddresses(frozenset(), ())


def merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The same addresses in as few ranges as will do."""
    result: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if result and low <= result[-1][1] + 1:
            result[-1] = (result[-1][0], max(result[-1][1], high))
        else:
            result.append((low, high))
    return tuple(result)


def family_of(address: bytes) -> int:
    return 4 if len(address) == 4 else 6


# --- which endpoints ----------------------------------------------------------------------------


def serves_last(endpoint: Endpoint) -> bool:
    """Serving while it terminates: what is used if there is nothing better."""
    return bool(endpoint.conditions & SERVING and endpoint.conditions & TERMINATING)


def goodness(endpoint: Endpoint) -> int:
    return 2 if endpoint.conditions & READY else 1 if serves_last(endpoint) else 0


def endpoints_of(
    slices: Iterable[EndpointSlice], family: int, port: ServicePort
) -> dict[Target, Endpoint]:
    """Every endpoint of a Service port, once. Of several copies a ready one, else the one in the
    youngest slice; of slices of one age the better copy, then that in the slice named first."""
    copies: dict[Target, list[tuple[bool, str, int, Endpoint]]] = {}
    for piece in sorted(slices, key=lambda s: s.name):
        for name, protocol, number in piece.ports:
            if piece.family == family and (name, protocol) == (port.name, port.protocol):
                for endpoint in piece.endpoints:
                    good = goodness(endpoint)
                    copies.setdefault(Target(endpoint.address, number), []).append(
                        (good == 2, piece.created, good, endpoint)
                    )
    return {t: max(of_target, key=lambda copy: copy[:3])[3] for t, of_target in copies.items()}


def cluster_list(found: Mapping[Target, Endpoint], node: str, zone: str) -> frozenset[Target]:
    ready = {t: e for t, e in found.items() if e.conditions & READY}
    if not ready:
        return frozenset(t for t, e in found.items() if serves_last(e))
    for_node = frozenset(t for t, e in ready.items() if node in e.node_hints)
    if all(e.node_hints for e in ready.values()) and for_node:
        return for_node
    for_zone = frozenset(t for t, e in ready.items() if zone and zone in e.zone_hints)
    if all(e.zone_hints for e in ready.values()) and for_zone:
        return for_zone
    return frozenset(ready)


def local_list(found: Mapping[Target, Endpoint], node: str) -> frozenset[Target]:
    here = {t: e for t, e in found.items() if e.node == node}
    ready = frozenset(t for t, e in here.items() if e.conditions & READY)
    return ready or frozenset(t for t, e in here.items() if serves_last(e))


def weight_of(endpoint: Endpoint, service: Service) -> int:
    """The slice's weight, else the Service's, else the zone's, else 1."""
    if isinstance(endpoint, WeightedEndpoint):
        return endpoint.weight
    named = dict(service.balancing.weights)
    by_zone = dict(service.balancing.zone_weights)
    for weights, key in (
        (named, endpoint.pod),
        (named, endpoint.address),
        (by_zone, endpoint.zone),
    ):
        if key in weights:
            return weights[key]
    return 1


def usable_of(service: Service, found: Mapping[Target, Endpoint]) -> dict[Target, Endpoint]:
    """All but the drained ones, which have weight 0. Weights count where an algorithm is asked."""
    weighed = service.balancing.algorithm is not Algorithm.RANDOM
    return {t: e for t, e in found.items() if not weighed or weight_of(e, service)}


def shares_of(
    targets: frozenset[Target], found: Mapping[Target, Endpoint], service: Service
) -> frozenset[tuple[Target, int]]:
    """How many slots each endpoint has, by its weight; empty where each has one.

    Sums beyond 1,024 (or 8 for each endpoint) are rounded, which is the product's business.
    """
    if service.balancing.algorithm is not Algorithm.WEIGHTED or not targets:
        return frozenset()
    weights = {target: weight_of(found[target], service) for target in targets}
    common = math.gcd(*weights.values())
    shares = {target: weight // common for target, weight in weights.items()}
    assert sum(shares.values()) <= max(1024, 8 * len(shares)), "an example without rounding"
    return frozenset(shares.items()) if sum(shares.values()) > len(shares) else frozenset()


# --- what a Service means -----------------------------------------------------------------------


def is_ours(service: Service, options: Options) -> bool:
    """Services are selected by the name of their proxy alone, whatever else their labels say."""
    if options.proxy_name:
        return service.proxy_name == options.proxy_name
    return service.proxy_name is None


def primary_addresses(objects: Objects) -> dict[int, bytes]:
    """The node's own address per family: its Node's first, else what the routes say."""
    result: dict[int, bytes] = {}
    for address in (*(objects.node.addresses if objects.node else ()), *objects.addresses.primary):
        result.setdefault(family_of(address), address)
    return result


def node_port_addresses(objects: Objects, options: Options) -> frozenset[bytes]:
    primary = frozenset(primary_addresses(objects).values())
    return (primary if options.node_port_primary else frozenset()) | frozenset(
        address
        for address in objects.addresses.addresses or primary
        if any(ipaddress.ip_address(address) in n for n in options.node_port_networks)
    )


def pod_networks(objects: Objects, options: Options) -> tuple[ipaddress._BaseNetwork, ...]:
    if options.detect_local is DetectLocalMode.CLUSTER_CIDR:
        return options.cluster_cidrs
    if options.detect_local is DetectLocalMode.NODE_CIDR and objects.node:
        return objects.node.pod_cidrs
    return ()


def tells_pods(family: int, objects: Objects, options: Options) -> bool:
    """Whether packets from pods of this node can be identified."""
    if options.detect_local in (
        DetectLocalMode.BRIDGE_INTERFACE,
        DetectLocalMode.INTERFACE_NAME_PREFIX,
    ):
        return True
    return any(n.version == family for n in pod_networks(objects, options))


def ranges_of(networks: Iterable[ipaddress._BaseNetwork], family: int) -> Ranges:
    return merged(
        (int(n.network_address), int(n.broadcast_address)) for n in networks if n.version == family
    )


def source_ranges(service: Service, family: int, objects: Objects) -> Ranges | None:
    """Who may use the Service's load balancer IPs of this family; None for everybody."""
    if not service.source_ranges:
        return None
    allowed = ranges_of(service.source_ranges, family)
    own = primary_addresses(objects).get(family)
    if own and any(low <= int.from_bytes(own, "big") <= high for low, high in allowed):
        balancers = (a for a in service.load_balancer_ips if family_of(a) == family)
        numbers = [int.from_bytes(a, "big") for a in balancers]
        allowed = merged((*allowed, *((n, n) for n in numbers)))
    return allowed


def behaviours(
    service: Service, slices: tuple[EndpointSlice, ...], objects: Objects, options: Options
) -> dict[Where, tuple[bool, Behaviour]]:
    """How a Service would answer if it were alone, and whether at an external or load balancer IP.

    What is at the API server's address and port is refused. Its cluster IPs come before its load
    balancer IPs, these before its external IPs, and earlier ports before later ones."""
    zone = options.zone or (objects.node.zone if objects.node else "")
    api_servers = options.api_servers
    result: dict[Where, tuple[bool, Behaviour]] = {}

    def answers(where: Where, port: ServicePort, kind: str) -> None:
        external = kind != "cluster IP"
        local = service.external_local if external else service.internal_local
        found = usable_of(service, endpoints_of(slices, where.family, port))
        everywhere = cluster_list(found, options.node, zone)
        here = local_list(found, options.node)
        if not any(goodness(e) for e in found.values()):
            empty = "reject"
        elif local and not here:
            empty = "drop"
        else:
            empty = ""
        if external:
            style = "" if local else "masq-"
        elif options.masquerade_all:
            style = "masq-"
        else:
            style = "cluster-" if tells_pods(where.family, objects, options) else ""
        sticky = "sticky-" if service.affinity_seconds else ""
        node_port = "" if where.address else "nodeport-"
        two_lists = external and local
        how = "hash" if service.balancing.algorithm is Algorithm.SOURCE_HASH else "lb"
        guarded = kind == "load balancer IP"
        external_ip = external and bool(where.address)
        if external_ip and where.protocol == TCP and (where.address, where.port) in api_servers:
            return
        behaviour = Behaviour(
            verdict=f"{sticky}{style}{node_port}{how}",
            endpoints=here if local else everywhere,
            inside_verdict=f"{sticky}inside-{node_port}{how}" if two_lists else None,
            inside=everywhere if two_lists else frozenset(),
            affinity=service.affinity_seconds,
            empty=empty,
            sources=source_ranges(service, where.family, objects) if guarded else None,
            shares=shares_of(here if local else everywhere, found, service),
            inside_shares=shares_of(everywhere, found, service) if two_lists else frozenset(),
        )
        result.setdefault(where, (external_ip, behaviour))

    families = {family_of(a) for a in service.cluster_ips}
    for kind, addresses in (
        ("cluster IP", service.cluster_ips),
        ("load balancer IP", service.load_balancer_ips),
        ("external IP", service.external_ips if options.allow_external_ips else ()),
    ):
        for address in addresses:
            family = family_of(address)
            for port in service.ports:
                if family in families:  # others are no addresses of this Service
                    answers(Where(family, address, port.protocol, port.port), port, kind)
    for family in families:
        for port in service.ports:
            if port.node_port:
                answers(Where(family, b"", port.protocol, port.node_port), port, "node port")
    return result


def hairpins(
    service: Service, slices: tuple[EndpointSlice, ...], options: Options, zone: str
) -> Iterator[bytes]:
    """The addresses of endpoints on this node that the Service's lists hold."""
    for family in {family_of(a) for a in service.cluster_ips}:
        for port in service.ports:
            found = usable_of(service, endpoints_of(slices, family, port))
            for target in cluster_list(found, options.node, zone) | local_list(found, options.node):
                if found[target].node == options.node:
                    yield target.address


# --- the whole ----------------------------------------------------------------------------------


def slices_of(service: Service, objects: Objects) -> tuple[EndpointSlice, ...]:
    """Slices are selected by the label `headless` alone."""
    return tuple(s for s in objects.slices if s.service == service.name and not s.headless)


def proxied(objects: Objects, options: Options) -> list[Service]:
    """The Services to program, the older first, at one age by name."""
    ours = [s for s in objects.services if s.proxied and is_ours(s, options)]
    return sorted(ours, key=lambda s: (not s.created, s.created, s.name))


class Answer(NamedTuple):
    """Who answers at a `Where`, and how."""

    service: Name
    behaviour: Behaviour


def answers(objects: Objects, options: Options) -> dict[Where, Answer]:
    """Who answers where, and how.

    A cluster IP has precedence over every external address, one with endpoints over one without,
    the older Service over the younger. Where a node port answers, no external address does.
    """
    claims: dict[Where, list[tuple[bool, bool, Answer]]] = {}
    for service in proxied(objects, options):
        slices = slices_of(service, objects)
        for where, (external, behaviour) in behaviours(service, slices, objects, options).items():
            empty = external and behaviour.empty == "reject"
            claims.setdefault(where, []).append((external, empty, Answer(service.name, behaviour)))
    result: dict[Where, Answer] = {}
    for where, of_services in claims.items():
        external, _, answer = min(of_services, key=lambda c: c[:2])
        port = Where(where.family, b"", where.protocol, where.port)
        at_node = where.address in node_port_addresses(objects, options)
        if not (external and at_node and port in claims):
            result[where] = answer
    return result


def holders(objects: Objects, options: Options) -> dict[Where, Name]:
    """To whom each address belongs."""
    return {where: answer.service for where, answer in answers(objects, options).items()}


def expected(objects: Objects, options: Options) -> Picture:
    """What the kernel must hold."""
    zone = options.zone or (objects.node.zone if objects.node else "")
    frontends = {w: answer.behaviour for w, answer in answers(objects, options).items()}
    reaching_themselves: set[bytes] = set()
    timeouts: dict[int, set[int]] = {family: set() for family in FAMILIES}
    for service in proxied(objects, options):
        slices = slices_of(service, objects)
        for where, (_, behaviour) in behaviours(service, slices, objects, options).items():
            if behaviour.affinity:
                timeouts[where.family].add(behaviour.affinity)
        reaching_themselves.update(hairpins(service, slices, options, zone))
    services = proxied(objects, options)
    cidrs = [n for c in objects.service_cidrs for n in c.cidrs]
    pods = pod_networks(objects, options)
    return Picture(
        frontends,
        frozenset(a for s in services for a in s.cluster_ips),
        node_port_addresses(objects, options),
        frozenset(reaching_themselves),
        {family: ranges_of(cidrs, family) for family in FAMILIES},
        {family: ranges_of(pods, family) for family in FAMILIES},
        {family: frozenset(seconds) for family, seconds in timeouts.items()},
    )


# --- reading elements ---------------------------------------------------------------------------


class ListOf(NamedTuple):
    """One of the two lists of endpoints at a `Where`."""

    where: Where
    inside: bool


class Layout(NamedTuple):
    """Where things stand that a picture leaves open: the target in each slot, counted from the
    list's first, the width in each verdict, and which lists are looked up by a hash."""

    slots: dict[ListOf, dict[int, Target]]
    widths: dict[ListOf, int]
    hashed: set[ListOf]


Fields = dict[Where, dict[str, Any]]
"""What has been read of each Behaviour so far."""

_ADDRESS = {4: 4, 6: 16}
_VERDICT = re.compile(r"(.*(?:lb|hash))-(\d+)")
_SLOTS = re.compile(r"(inside-)?(nodeport-)?endpoints")
_REMEMBER = re.compile(r"remember-(\d+)")


def observed(elements: Elements, chains: Mapping[int, Iterable[str]]) -> tuple[Picture, Layout]:
    """What elements say, and where they stand. `chains` holds the chains' names by family."""
    sets = {(s.family, s.name): content for s, content in elements.items()}
    fields: Fields = {}
    layout = Layout({}, {}, set())
    for family in FAMILIES:
        for ending in ("ips", "nodeports"):
            _read_verdicts(sets, family, ending, fields, layout)
            _read_answers(sets, family, ending, fields)
        _read_sources(sets, family, fields)
        sticky = {key[: _ADDRESS[family]] for key in sets.get((family, "sticky-ips"), {})}
        assert sticky <= set(sets.get((family, "sticky-addresses"), {})), "forgetful addresses"
    for (family, name), content in sets.items():
        if found := _SLOTS.fullmatch(name):
            length = 0 if found[2] else _ADDRESS[family]
            _read_slots(content, family, length, bool(found[1]), layout)
    for (where, inside), slots in layout.slots.items():
        targets = Counter(slots.values())
        found = fields.setdefault(where, {})
        found["inside" if inside else "endpoints"] = frozenset(targets)
        if len(targets) < len(slots) and ListOf(where, inside) not in layout.hashed:
            found["inside_shares" if inside else "shares"] = frozenset(targets.items())

    def keys(name: str) -> Iterator[bytes]:
        return (key for family in FAMILIES for key in sets.get((family, name), {}))

    picture = Picture(
        {
            where: Behaviour(**{"verdict": None, "endpoints": frozenset(), **found})
            for where, found in fields.items()
        },
        frozenset(keys("cluster-ips")),
        frozenset(keys("nodeport-ips")),
        frozenset(map(_half, keys("hairpins"))),
        {family: _ranges(sets.get((family, "service-cidrs"), {})) for family in FAMILIES},
        {family: _ranges(sets.get((family, "pod-cidrs"), {})) for family in FAMILIES},
        {family: _timeouts(chains.get(family, ())) for family in FAMILIES},
    )
    return picture, layout


def where_of(family: int, length: int, key: bytes) -> Where:
    """Reads a key: `length` bytes of address, protocol, port, the latter padded to 4 bytes."""
    protocol, port = struct.unpack("!BxxxHxx", key[length:])
    return Where(family, key[:length], protocol, port)


def target_of(value: bytes) -> Target:
    """Reads an endpoint: address, then the port padded to 4 bytes."""
    return Target(value[:-4], int.from_bytes(value[-4:-2], "big"))


def _read_verdicts(sets: Mapping, family: int, ending: str, fields: Fields, layout: Layout) -> None:
    length = _ADDRESS[family] if ending == "ips" else 0
    for name, inside in (("service", False), ("inside", True)):
        for key, chain in sets.get((family, f"{name}-{ending}"), {}).items():
            where = where_of(family, length, key)
            style, width = _VERDICT.fullmatch(chain).groups()
            fields.setdefault(where, {})["inside_verdict" if inside else "verdict"] = style
            layout.widths[ListOf(where, inside)] = int(width)
            layout.slots.setdefault(ListOf(where, inside), {})
            if style.endswith("hash"):
                layout.hashed.add(ListOf(where, inside))


def _read_answers(sets: Mapping, family: int, ending: str, fields: Fields) -> None:
    length = _ADDRESS[family] if ending == "ips" else 0
    for key, chain in sets.get((family, f"sticky-{ending}"), {}).items():
        found = fields.setdefault(where_of(family, length, key), {})
        found["affinity"] = int(_REMEMBER.fullmatch(chain)[1])
    for answer in ("reject", "drop"):
        for key in sets.get((family, f"{answer}-{ending}"), {}):
            where = where_of(family, length, key)
            found = fields.setdefault(where, {})
            assert "empty" not in found, f"{where} is to be rejected and dropped"
            found["empty"] = answer


def _read_slots(content: Mapping, family: int, length: int, inside: bool, layout: Layout) -> None:
    for key, value in content.items():
        slot = int.from_bytes(key[-4:], sys.byteorder)
        slots = layout.slots.setdefault(ListOf(where_of(family, length, key[:-4]), inside), {})
        slots[slot] = target_of(value)


def _read_sources(sets: Mapping, family: int, fields: Fields) -> None:
    length = _ADDRESS[family]
    for key in sets.get((family, "guarded"), {}):
        fields.setdefault(where_of(family, length, key), {})["sources"] = ()
    for low, high in sets.get((family, "source-ranges"), {}).items():
        assert low[:-length] == high[:-length], "a range over several destinations"
        found = fields.setdefault(where_of(family, length, low[:-length]), {})
        assert "sources" in found, "ranges of a destination that is not guarded"
        ends = int.from_bytes(low[-length:], "big"), int.from_bytes(high[-length:], "big")
        found["sources"] = merged((*found["sources"], ends))


def _half(key: bytes) -> bytes:
    """The one address of which a hairpin's key is made."""
    half = len(key) // 2
    assert key[:half] == key[half:], "a hairpin leads from an address to itself"
    return key[:half]


def _ranges(content: Mapping[bytes, Any]) -> Ranges:
    return merged(
        (int.from_bytes(low, "big"), int.from_bytes(high, "big")) for low, high in content.items()
    )


def _timeouts(chains: Iterable[str]) -> frozenset[int]:
    return frozenset(int(found[1]) for chain in chains if (found := _REMEMBER.fullmatch(chain)))
