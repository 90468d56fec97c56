"""`sliceproxy explain ADDRESS:PORT`: what happens to a connection to this address, and why.

The answer has two halves that are made independently and so check each other. What *should* be,
from the objects: which Service has the address, under which policy, with which endpoints. What
*is*, from the rules and the elements (`rules.trace`), for everybody who may ask: a pod of this
node, the node itself, a client outside. With the elements read from the kernel the second half
says what the kernel does, whatever the agent believes.

The answer is made of plain records, so `--output json` is `msgspec.json.encode(explanation)`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import NamedTuple

import msgspec

from rules.diff import Elements
from rules.endpoint_report import QuestionError, port_text
from rules.frontends import FAMILY_OF_LENGTH, Frontend, Kind
from rules.lookup import Destination, claim_met, node_port_claim
from rules.objects import (
    PROTOCOL_NAMES,
    PROTOCOLS,
    PROXY_NAME_LABEL,
    Address,
    Endpoint,
    Name,
    Network,
    Service,
    address_text,
)
from rules.program import Claim, port_lists
from rules.selection import Selection
from rules.state import State
from rules.tables import SETS, PodInterface
from rules.target import target_of, target_text
from rules.trace import (
    Branch,
    End,
    Packet,
    Step,
    Trace,
    UnknownChain,
    trace,
)


class EndpointList(msgspec.Struct, frozen=True):
    """The endpoints of a list, what they have in common, and which list it is."""

    name: str
    basis: str
    endpoints: tuple[str, ...]


class Answering(msgspec.Struct, frozen=True):
    """The Service port that has the address, and how it answers there.

    `inside` is the list for clients inside this node where it is another one. `algorithm` is
    "random", "source-hash" or "weighted"; `drained` counts endpoints of weight 0.
    `affinity_seconds` is 0 without session affinity. `source_ranges` are those that guard this
    very address. `lost_by` are Services that claim the address too (`rules.claims`).
    """

    service: str
    port: str
    kind: str
    policy: str
    list: EndpointList
    inside: EndpointList | None
    affinity_seconds: int
    source_ranges: tuple[str, ...]
    lost_by: tuple[str, ...]
    algorithm: str
    drained: int


class Lookup(msgspec.Struct, frozen=True):
    """A set or map, and its element that matched; "" where a rule asks that none does."""

    set: str
    element: str


class RuleStep(msgspec.Struct, frozen=True):
    """A rule that did something with the packet: `effect` says what, `comment` why."""

    chain: str
    rule: str
    matched: tuple[Lookup, ...]
    effect: str
    comment: str


class Reached(msgspec.Struct, frozen=True):
    """An endpoint that the connection may go to. `slot` is the first one that leads there, None if
    the client is remembered; `slots` counts them, so it is the endpoint's weight in a draw.

    `sees_node` is why the endpoint sees an address of the node instead of the client's: "mark",
    "hairpin", or "no".
    """

    endpoint: str
    slot: int | None
    sees_node: str
    slots: int = 0


class Asked(msgspec.Struct, frozen=True):
    """What one kind of client meets.

    `address` represents all clients of that kind, unless it was given. `outcomes` holds one word
    of `rules.trace.End`, more only if the elements are incomplete. `remembered_seconds` is 0
    where the client is not remembered.
    """

    who: str
    address: str
    outcomes: tuple[str, ...]
    endpoints: tuple[Reached, ...]
    remembered_seconds: int
    steps: tuple[RuleStep, ...]


class Explanation(msgspec.Struct, frozen=True):
    """The whole answer. `why_not` says why no Service has the address, where `answering` is None.

    `from_kernel` says whether the elements were read from the kernel.
    """

    target: str
    answering: Answering | None
    why_not: str
    asked: tuple[Asked, ...]
    notes: tuple[str, ...]
    from_kernel: bool


def explain(
    state: State,
    question: str,
    from_address: str | None = None,
    elements: Elements | None = None,
    interface: Callable[[Address], str] | None = None,
) -> Explanation:
    """What happens to connections to `question`.

    `state` has been stepped. `from_address` asks for one client only. `elements` are those read
    from the kernel; without them, those that the state computes. `interface` has the node's
    interface towards an address, "" if there is none; without it, where the rules identify pods by
    interface, endpoints on this node alone count as its pods. Raises QuestionError.
    """
    target = parse_destination(question)
    used = state.elements() if elements is None else elements
    claim = _claim(state, target, used)
    answering = _answering(state, claim) if claim else None
    if from_address is None:
        askers = list(_everybody(state, target, claim, used))
    else:
        askers = [_one(state, target, from_address, used, interface)]
    return Explanation(
        destination_text(target),
        answering,
        "" if answering else _why_not(state, target, used),
        tuple(_asked(state, target, asker, used) for asker in askers),
        (*_notes(state, target), *_notes_on(askers, state, from_address, interface)),
        elements is not None,
    )


def destination_text(where: Destination) -> str:
    """Address, port and protocol as people write them: 10.96.0.10:53/udp."""
    return f"{target_text(target_of(where.address, where.port))}/{PROTOCOL_NAMES[where.protocol]}"


def with_article(noun: str) -> str:
    """The noun behind its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


# --- the question -------------------------------------------------------------------------------

_TARGET = re.compile(
    r"(?:\[(?P<six>[^]]*)]|(?P<four>[^:\[\]/]*)):(?P<port>[0-9]{1,5})(?:/(?P<protocol>\w+))?"
)
_HOW = "write it like 10.96.0.10:80, 10.96.0.10:53/udp or [fd00::10]:80"


def parse_destination(text: str) -> Destination:
    """ADDRESS:PORT, an IPv6 address in brackets, with /udp or /sctp where it is not TCP.

    Raises QuestionError.
    """
    found = _TARGET.fullmatch(text.strip())
    if not found:
        raise QuestionError(f"{text!r} is not a valid ADDRESS:PORT; {_HOW}")
    address = parse_address(found["six"] or found["four"] or "", _HOW)
    protocol = PROTOCOLS.get((found["protocol"] or "tcp").upper(), 0)
    if not protocol:
        raise QuestionError(f"protocol {found['protocol']!r} is not one of tcp, udp and sctp")
    if not 1 <= int(found["port"]) <= 65535:
        raise QuestionError(f"{found['port']} is no port; ports are 1 to 65535")
    return Destination(address, protocol, int(found["port"]))


def parse_address(text: str, how: str = "write it like 10.0.0.1 or fd00::1") -> Address:
    """The packed address. Raises QuestionError."""
    try:
        return ipaddress.ip_address(text.partition("%")[0]).packed
    except ValueError:
        raise QuestionError(f"{text!r} is no IP address; {how}") from None


def _claim(state: State, target: Destination, elements: Elements) -> Claim | None:
    """The claim by which a Service has the address, in the order in which the rules look."""
    node_ports = elements.get(SETS[target.family].nodeport_ips, {})
    return claim_met(target, node_ports.__contains__, state.installed)


# --- what should be -----------------------------------------------------------------------------


def _answering(state: State, claim: Claim) -> Answering | None:
    holder = state.holder(claim)
    if holder is None:
        return None
    service = state.services[holder]
    frontend = state.programs[holder].wanted[claim].frontend
    place = state.surroundings().place
    lists = port_lists(frontend, state.slices_of(holder), place, service.balancing)
    both = frontend.external and frontend.local
    field = "externalTrafficPolicy" if frontend.external else "internalTrafficPolicy"
    return Answering(
        str(holder),
        port_text(frontend.service_port),
        frontend.kind.value,
        f"{field}: {'Local' if frontend.local else 'Cluster'}",
        _list("Local", lists.local) if frontend.local else _list("Cluster", lists.cluster),
        _list("Cluster", lists.cluster) if both else None,
        service.affinity_seconds,
        tuple(map(str, _guarding(service, frontend))),
        tuple(str(name) for name in state.claims.claimants(claim) if name != holder),
        service.balancing.algorithm.value,
        sum(not weight for weight in lists.weights.values()),
    )


def _list(name: str, selection: Selection) -> EndpointList:
    return EndpointList(name, selection.basis.value, tuple(map(target_text, selection.targets)))


def _guarding(service: Service, frontend: Frontend) -> tuple[Network, ...]:
    """The source ranges that guard this frontend."""
    if frontend.kind is not Kind.LOAD_BALANCER_IP:
        return ()
    return service.source_ranges


def _notes_on(
    askers: Iterable[_Asker],
    state: State,
    from_address: str | None,
    interface: Callable[[Address], str] | None,
) -> Iterator[str]:
    """That the interface towards a client is not known, where the rules look at it."""
    for asker in askers:
        pods = state.local.pods(FAMILY_OF_LENGTH[len(asker.address)])
        if from_address and not interface and asker.who != NODE and isinstance(pods, PodInterface):
            yield (
                "the rules identify pods by the interface at which their packets come in, which "
                f"only the agent looks up: {from_address} was taken for {asker.who}"
            )


def _notes(state: State, target: Destination) -> Iterator[str]:
    if target.family not in state.surroundings().tells_pods:
        mode = state.options.detect_local.value
        yield (
            f"pods of this node cannot be identified in IPv{target.family} "
            f"(detectLocalMode {mode}), so they are treated like clients outside"
        )


# --- why not ------------------------------------------------------------------------------------


def _why_not(state: State, target: Destination, elements: Elements) -> str:
    """The first reason that applies."""
    found = chain(
        _other_ports(state, target),
        _left_to_others(state, target),
        _unallocated(target, elements),
        _no_node_port(state, target, elements),
        _is_endpoint(state, target),
        (f"no Service has {address_text(target.address)}, and no ServiceCIDR holds it",),
    )
    return next(found)


def _with_address(services: Iterable[Service], address: Address) -> Iterator[tuple[Service, str]]:
    for service in services:
        for kind, addresses in (
            (Kind.CLUSTER_IP, service.cluster_ips),
            (Kind.LOAD_BALANCER_IP, service.load_balancer_ips),
            (Kind.EXTERNAL_IP, service.external_ips),
        ):
            if address in addresses:
                yield service, kind.value
                break


def _other_ports(state: State, target: Destination) -> Iterator[str]:
    ours = (state.services[name] for name in state.programs)
    port = f"{target.port}/{PROTOCOL_NAMES[target.protocol]}"
    for service, kind in _with_address(ours, target.address):
        has = ", ".join(map(port_text, service.ports)) or "none"
        yield (
            f"it is {with_article(kind)} of Service {service.name}, which has no port {port}; "
            f"its ports: {has}"
        )


def _left_to_others(state: State, target: Destination) -> Iterator[str]:
    others = (s for name, s in state.services.items() if name not in state.programs)
    for service, kind in _with_address(others, target.address):
        proxy = service.proxy_name
        reason = f"its label {PROXY_NAME_LABEL}={proxy}" if proxy else "its labels"
        yield (
            f"it is {with_article(kind)} of Service {service.name}, but {reason} leave it to "
            "another proxy"
        )


def _unallocated(target: Destination, elements: Elements) -> Iterator[str]:
    for low, high in elements.get(SETS[target.family].service_cidrs, {}).items():
        if isinstance(high, bytes) and low <= target.address <= high:
            yield "no Service has this cluster IP; it is in a ServiceCIDR, so it may get one later"


def _no_node_port(state: State, target: Destination, elements: Elements) -> Iterator[str]:
    sets = SETS[target.family]
    answering = [address_text(a) for a in sorted(elements.get(sets.nodeport_ips, {}))]
    port = f"{target.port}/{PROTOCOL_NAMES[target.protocol]}"
    claim = node_port_claim(target)
    if address_text(target.address) in answering:
        yield f"it is an address of this node, but no Service has node port {port}"
    elif holder := state.holder(claim):
        own = (
            target.address in state.local.own() or ipaddress.ip_address(target.address).is_loopback
        )
        at = ", ".join(answering) or "no address"
        if own:
            yield (
                f"Service {holder} has node port {port}, but node ports answer at {at} only "
                "(--nodeport-addresses), and never at loopback addresses"
            )


def _is_endpoint(state: State, target: Destination) -> Iterator[str]:
    for service, endpoint in _all_endpoints(state):
        if endpoint.address == target.address:
            yield (
                f"it is the address of an endpoint of Service {service}, which is reached there "
                "directly and needs no proxy"
            )


def _all_endpoints(state: State) -> Iterator[tuple[Name, Endpoint]]:
    for service, pieces in state.slices.items():
        for piece in pieces:
            for endpoint in piece.endpoints:
                yield service, endpoint


# --- who asks -----------------------------------------------------------------------------------

POD, NODE, OUTSIDE = "a pod of this node", "the node itself", "a client outside"
ADMITTED = "a client outside within the source ranges"

# documentation addresses (RFC 5737, RFC 3849), for clients whose address is not known
_SOMEWHERE = {
    4: [ipaddress.ip_address(a).packed for a in ("198.51.100.1", "192.0.2.1", "203.0.113.1")],
    6: [ipaddress.ip_address(f"2001:db8::{n}").packed for n in (1, 2, 3)],
}


class _Asker(NamedTuple):
    who: str
    address: Address
    interface: str = ""
    given: bool = False


def _one(
    state: State,
    target: Destination,
    text: str,
    elements: Elements,
    interface: Callable[[Address], str] | None,
) -> _Asker:
    """The asker that has this address."""
    address = parse_address(text, "write it like 10.244.1.7 or fd00::7")
    if len(address) != len(target.address):
        raise QuestionError(
            f"{text} cannot ask {destination_text(target)}: one is IPv4 and the other IPv6"
        )
    if address in state.local.own():
        return _Asker(NODE, address, given=True)
    by_interface = state.local.pods(target.family)
    if interface and isinstance(by_interface, PodInterface):
        name = interface(address)
        return _Asker(POD if by_interface.matches(name) else OUTSIDE, address, name, given=True)
    if _is_in_pod_networks(address, target.family, elements) or address in _local_endpoints(state):
        return _Asker(POD, address, state.options.interface, given=True)
    return _Asker(OUTSIDE, address, given=True)


def _is_in_pod_networks(address: Address, family: int, elements: Elements) -> bool:
    """Whether the address is in the networks that identify pods of this node."""
    networks = elements.get(SETS[family].pod_cidrs, {}).items()
    return any(isinstance(high, bytes) and low <= address <= high for low, high in networks)


def _endpoints_at(state: State, addresses: frozenset[Address]) -> set[Address]:
    """Which of these are addresses of endpoints. It looks at every endpoint of the cluster."""
    return {
        endpoint.address
        for pieces in state.slices.values()
        for piece in pieces
        for endpoint in piece.endpoints
        if endpoint.address in addresses
    }


def _local_endpoints(state: State) -> frozenset[Address]:
    """The endpoints on this node, of any Service."""
    node = state.options.node
    return frozenset(e.address for _, e in _all_endpoints(state) if e.node == node)


def _everybody(
    state: State, target: Destination, claim: Claim | None, elements: Elements
) -> Iterator[_Asker]:
    """An asker of each kind."""
    family = target.family
    yield _Asker(POD, _some_pod(state, family, elements), state.options.interface)
    yield _Asker(NODE, _node_address(state, target))
    ranges = _ranges(state, claim, family)
    yield _Asker(OUTSIDE, _outsider(state, family, ranges))
    ours = (state.local.own() | _local_endpoints(state)) if ranges else frozenset()
    for address in chain.from_iterable(map(_some_of, ranges)):
        if address not in ours and not _is_in_pod_networks(address, family, elements):
            yield _Asker(ADMITTED, address)
            return


def _ranges(state: State, claim: Claim | None, family: int) -> list[Network]:
    """The source ranges of one family that guard the claim."""
    holder = state.holder(claim) if claim else None
    if not claim or not holder:
        return []
    frontend = state.programs[holder].wanted[claim].frontend
    return [n for n in _guarding(state.services[holder], frontend) if n.version == family]


def _node_address(state: State, target: Destination) -> Address:
    """The address with which the node asks: for its own addresses, the one that is asked."""
    if target.address in state.local.own():
        return target.address
    for address in state.surroundings().node_addresses:
        if len(address) == len(target.address):
            return address
    return _SOMEWHERE[target.family][-1]


def _some_pod(state: State, family: int, elements: Elements) -> Address:
    """An address that a pod of this node could have, preferably one that no pod has."""
    cidrs = (*(state.node.pod_cidrs if state.node else ()), *state.options.cluster_cidrs)
    networks = [network for network in cidrs if network.version == family]
    some = list(chain.from_iterable(map(_some_of, networks)))
    taken = _endpoints_at(state, frozenset(some)) | state.local.own()
    free = [a for a in some if a not in taken]
    in_use = (a for a in free if _is_in_pod_networks(a, family, elements))
    return next(chain(in_use, free), _SOMEWHERE[family][0])


def _some_of(network: Network) -> Iterator[Address]:
    """A few addresses of a network, from its second one on if it has several."""
    count = min(network.num_addresses, 512)
    for number in range(1 if count > 1 else 0, count):
        yield network[number].packed


def _outsider(state: State, family: int, ranges: list[Network]) -> Address:
    """An address from outside, outside the ranges too if they leave one of ours out."""
    strangers = [
        a for a in _SOMEWHERE[family] if not any(ipaddress.ip_address(a) in n for n in ranges)
    ]
    return next((a for a in strangers if a not in state.local.own()), _SOMEWHERE[family][0])


# --- what is ------------------------------------------------------------------------------------


def _asked(state: State, target: Destination, asker: _Asker, elements: Elements) -> Asked:
    own = state.local.own() | ({asker.address} if asker.who == NODE else set())
    packet = Packet(
        asker.address,
        target.address,
        target.protocol,
        target.port,
        asker.interface,
        asker.who == NODE,
        own,
        any_client=not asker.given,
    )
    table = next(t for t in state.tables() if t.family == target.family)
    try:
        followed = trace(table, elements, packet)
    except UnknownChain as error:
        raise QuestionError(
            f"{error}: the kernel's rules are those of other options; use the agent's own"
        ) from None
    return _outcome(asker, followed)


def _outcome(asker: _Asker, followed: Trace) -> Asked:
    behind = dict.fromkeys(chain.from_iterable(branch.steps for branch in followed.branches))
    return Asked(
        asker.who,
        address_text(asker.address),
        tuple(dict.fromkeys(branch.end.value for branch in followed.branches)),
        tuple(_reached(branch) for branch in followed.branches if branch.end is End.SENT),
        max(branch.remembered for branch in followed.branches),
        tuple(_rule_step(step) for step in (*followed.steps, *behind)),
    )


def _reached(branch: Branch) -> Reached:
    return Reached(target_text(branch.target), branch.slot, branch.masquerade.value, branch.slots)


def _rule_step(step: Step) -> RuleStep:
    matched = tuple(Lookup(match.set, match.element) for match in step.matched)
    effect = f"{step.effect.value} {step.detail}".strip()
    return RuleStep(step.chain, step.rule, matched, effect, step.comment)
