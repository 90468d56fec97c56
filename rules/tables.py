r"""The fixed part of the ruleset: one table per family, whose rules do not depend on Services.

A packet's path through it (`ip sliceproxy`, and the same for `ip6`):

    prerouting, nat -100            output, nat -100
      from a pod of this node:        inside
        inside                        service-ips, service-nodeports
      service-ips, service-nodeports
           |
    inside     external addresses under traffic policy Local, asked from inside this node: all
           |   endpoints, not only the local ones            (inside-ips, inside-nodeports)
           |
           |   the verdict found in one of these maps names a chain:
           |
    [sticky-][masq-|cluster-][inside-][nodeport-](lb|hash)-WIDTH
       |        |               |        |        lb: goes through draw-WIDTH, which draws a slot
       |        |               |        |        below WIDTH and sends the packet to the endpoint
       |        |               |        |        in it, until a slot is not empty; hash: the slot
       |        |               |        |        is that of the client's address (pick-WIDTH)
       |        |               |        slots of nodeport-endpoints, not of endpoints
       |        |               slots of inside-endpoints; masquerades what the node itself sends
       |        masq: marks for masquerading; cluster: unless the client is a pod of this node
       first looks whether this client has been here before   (affinity); where clients
       could not be remembered lately, goes on by the client's address (affinity-full,
       by-client-...lb-WIDTH)

    input, forward, output, filter 0: connections that have had no answer yet
      outside loadBalancerSourceRanges: drop   (guarded, source-ranges; counted in outside-ranges,
                                                outside-ranges-known)
      those that were not sent to an endpoint:
      no endpoints: reject or drop    (reject-ips, drop-ips)
      input: the same for node ports  (reject-nodeports, drop-nodeports)
      forward and output: a cluster IP at an unknown port: reject (cluster-ips);
                          a cluster IP without a Service: drop    (service-cidrs)

    postrouting and input, nat 100
      which endpoint a sticky client got: remember
                     (sticky-addresses, then sticky-ips; sticky-nodeports; into affinity)
      which endpoint a counted Service's client got: count-endpoints
                     (counted-frontends, counted-nodeports; into endpoint-counters)
      postrouting: a pod that reached itself (hairpins), and what is marked: masquerade

Why it is like this:

- nat chains see only the first packet of a connection, so everything a Service needs, down to
  remembering clients, is done there and in `ct state new` rules; a packet of an established
  connection meets one rule, which does not match.
- loadBalancerSourceRanges are the exception: a filter chain checks them on `ct state new`, where a
  one-way UDP flow is asked again with every packet. While no Service has ranges that costs nothing;
  with some, a first packet meets one look-up more (0.1 us), as it did in the nat chains.
- That first packet meets as few expressions as can be, each some 20 ns: what was sent to an
  endpoint is asked nothing more in the filter hooks, and rules that no Service asks for are absent.
- For each element that is added to a map the kernel walks all rules that read it (17 ns each, in
  `nft_add_set_elem`). So each width has one rule that draws, in a chain that others go through as
  often as they need: 32 rules read a map. With 374 of them 250,000 elements took the kernel 1.5 s
  longer.
- A verdict names everything that will happen to a packet, so a person reads it in one element.
- When the affinity map is full, `update` ends its rule. The next rule then turns a switch on: a set
  of one element that times out. While it is on, a new client gets the slot that a hash of its
  address names, so it stays without being remembered. Placing all clients so would take them to
  the same endpoint again after their timeout, which must end their affinity.
- Of the algorithms that a Service may ask for, `weighted` needs no rule: an endpoint is in several
  slots. The chains of `source-hash` exist only while a Service asks for it.
- Counters are on the elements (of the verdict maps and the sets that refuse or drop), not in rules:
  a look-up that hits counts, so no rule is added, and a count belongs to one address and port.
- Connections by endpoint are counted where clients are remembered, in a dynamic set of its own, and
  only while a Service asks for it: a slot is no endpoint, so counters of slots would have to move
  with endpoints. An element that has not been counted for a day vanishes, so no endpoint that was
  removed has to be cleaned up. When the set is full, `update` ends its rule, uncounted.
- The rules for session affinity exist only while a Service asks for it, also because nft 1.0.6
  aborts on *loading* the text of the IPv6 map (60 bytes of key and data), though it lists it.
- Clients are remembered in nat chains, just before masquerading, not behind DNAT in filter chains:
  no cost for established connections, and only connections that were let through count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

import msgspec

from rules.language import (
    Base,
    Chain,
    Concat,
    Fields,
    Final,
    FromInterface,
    GoBy,
    Goto,
    Hook,
    In,
    Is,
    IsProtocol,
    Jump,
    Mark,
    Marked,
    NotFromInterface,
    Predicate,
    Remember,
    Rule,
    Set,
    Statement,
    Table,
    Translate,
    Unmark,
    rule,
)
from rules.objects import SCTP, TCP, UDP
from rules.slots import DRAWS, HASH_DRAWS, HASH_WIDTHS, LADDER, MAX_ENDPOINTS, fewest

FAMILIES = (4, 6)
PROTOCOLS = (TCP, UDP, SCTP)
"""`ct original proto-dst` has a type only where the protocol is known: a rule for each."""

TABLE = "sliceproxy"
AFFINITY_SIZE = 65536  # clients remembered per family; the map is full of them at 65,536
ENDPOINT_COUNTERS_SIZE = 65536
"""So many pairs of a frontend and an endpoint are counted per family."""
ENDPOINT_COUNTERS_SECONDS = 24 * 3600
"""A pair is forgotten after so long without a new connection."""
FULL_SECONDS = 3600
"""For so long after a client could not be remembered, new ones are placed by their address."""
DEFAULT_MARK = 0x4000  # kube-proxy's bit 14
HASH_SEED = 1
"""The same on every node, so that a client has one endpoint wherever its packets come in."""


class FamilySets:
    """The sets of one family. A key that starts with the address is called a destination."""

    def __init__(self, family: int) -> None:
        fields = Fields.of(family)
        self.family = family
        self.fields = fields
        slot = fields.random(MAX_ENDPOINTS)
        destination = (fields.daddr, fields.protocol, fields.dport)
        port = (fields.protocol, fields.dport)
        target = (fields.daddr, fields.dport)

        def plain(name: str, key: Concat, comment: str) -> Set:
            return Set(family, name, key, comment=comment)

        def counted(name: str, key: Concat, comment: str) -> Set:
            return Set(family, name, key, comment=comment, counted=True)

        def verdicts(name: str, key: Concat, comment: str, *, counted: bool = False) -> Set:
            return Set(family, name, key, verdicts=True, comment=comment, counted=counted)

        self.service_ips = verdicts(
            "service-ips", destination, "who answers at an address", counted=True
        )
        self.service_nodeports = verdicts(
            "service-nodeports", port, "who answers at a node port", counted=True
        )
        self.inside_ips = verdicts(
            "inside-ips", destination, "the same, asked from inside", counted=True
        )
        self.inside_nodeports = verdicts(
            "inside-nodeports", port, "the same, asked from inside", counted=True
        )
        self.endpoints = Set(family, "endpoints", (*destination, slot), target)
        self.nodeport_endpoints = Set(family, "nodeport-endpoints", (*port, slot), target)
        self.inside_endpoints = Set(family, "inside-endpoints", (*destination, slot), target)
        self.inside_nodeport_endpoints = Set(
            family, "inside-nodeport-endpoints", (*port, slot), target
        )
        self.reject_ips = counted("reject-ips", destination, "no endpoints anywhere")
        self.drop_ips = counted("drop-ips", destination, "policy Local, and no endpoints here")
        self.reject_nodeports = counted("reject-nodeports", port, "no endpoints anywhere")
        self.drop_nodeports = counted("drop-nodeports", port, "policy Local, and no endpoints here")
        self.guarded = plain("guarded", destination, "has loadBalancerSourceRanges")
        self.outside_ranges = counted(
            "outside-ranges", destination, "new connections from outside the ranges"
        )
        self.outside_ranges_known = counted(
            "outside-ranges-known", destination, "flows that began before the ranges"
        )
        self.source_ranges = Set(
            family, "source-ranges", (*destination, fields.saddr), interval=True
        )
        self.cluster_ips = counted("cluster-ips", (fields.daddr,), "every cluster IP")
        self.nodeport_ips = plain("nodeport-ips", (fields.daddr,), "where node ports answer")
        self.service_cidrs = Set(
            family, "service-cidrs", (fields.daddr,), interval=True, counted=True
        )
        self.pod_cidrs = Set(family, "pod-cidrs", (fields.saddr,), interval=True)
        self.hairpins = plain("hairpins", (fields.saddr, fields.daddr), "endpoints on this node")
        # only while a Service asks for session affinity:
        self.affinity = Set(
            family,
            "affinity",
            (fields.saddr, *destination),
            target,
            dynamic=True,
            size=AFFINITY_SIZE,
        )
        self.affinity_full = Set(
            family,
            "affinity-full",
            (fields.direction,),
            dynamic=True,
            size=1,
            comment="a switch: clients could not be remembered",
        )
        self.sticky_ips = verdicts("sticky-ips", destination, "whose clients are remembered")
        self.sticky_nodeports = verdicts("sticky-nodeports", port, "whose clients are remembered")
        self.sticky_addresses = plain("sticky-addresses", (fields.daddr,), "those of sticky-ips")
        # only while a Service asks for counters of its endpoints:
        self.counted_frontends = plain(
            "counted-frontends", destination, "whose connections are counted by endpoint"
        )
        self.counted_nodeports = plain(
            "counted-nodeports", port, "whose connections are counted by endpoint"
        )
        self.endpoint_counters = Set(
            family,
            "endpoint-counters",
            (*destination, *target),
            dynamic=True,
            size=ENDPOINT_COUNTERS_SIZE,
            comment="new connections by frontend and endpoint",
            counted=True,
        )

    @property
    def always(self) -> tuple[Set, ...]:
        """The sets that every table has."""
        some = (*self.sticky, *self.by_endpoint)
        return tuple(s for s in vars(self).values() if isinstance(s, Set) and s not in some)

    def endpoint_map(self, *, node_port: bool, inside: bool) -> Set:
        """The map that has the endpoints of one sort of list in slots."""
        if inside:
            return self.inside_nodeport_endpoints if node_port else self.inside_endpoints
        return self.nodeport_endpoints if node_port else self.endpoints

    @property
    def counted(self) -> tuple[Set, ...]:
        """The sets that every table has whose elements have counters."""
        return tuple(s for s in self.always if s.counted)

    @property
    def sticky(self) -> tuple[Set, ...]:
        """The sets that a table has while a Service asks for session affinity."""
        return (
            self.affinity,
            self.affinity_full,
            self.sticky_ips,
            self.sticky_nodeports,
            self.sticky_addresses,
        )

    @property
    def by_endpoint(self) -> tuple[Set, ...]:
        """The sets that a table has while a Service asks for counters of its endpoints."""
        return (self.counted_frontends, self.counted_nodeports, self.endpoint_counters)


SETS = {family: FamilySets(family) for family in FAMILIES}


class PodInterface(msgspec.Struct, frozen=True):
    """Identifies this node's pods by ingress interface."""

    name: str
    prefix: bool

    def matches(self, interface: str) -> bool:
        """Whether packets that come in there are a pod's."""
        return interface.startswith(self.name) if self.prefix else interface == self.name


class Layout(msgspec.Struct, frozen=True):
    """What the rules of one family depend on; two equal layouts make equal tables.

    `pods` says how a pod of this node is identified: by the pod-cidrs set (True), by an interface,
    or not at all (None). `affinity` holds the timeouts in seconds that Services ask for, ascending;
    `guarded` says whether one has loadBalancerSourceRanges, `hashed` whether one asks for
    source-hash, `counters` whether packets are counted, `by_endpoint` whether a Service's
    connections are also counted by endpoint.
    """

    family: int
    mark: int = DEFAULT_MARK
    pods: bool | PodInterface | None = None
    affinity: tuple[int, ...] = ()
    guarded: bool = False
    counters: bool = False
    hashed: bool = False
    by_endpoint: bool = False


# bounded: each distinct session affinity timeout makes other tables, of 310 KiB
@lru_cache(maxsize=8)
def build(layout: Layout) -> Table:
    """The table of one family."""
    sets = SETS[layout.family]
    used = sets.always + (sets.sticky if layout.affinity else ())
    used += sets.by_endpoint if layout.by_endpoint else ()
    chains = (
        *_base_chains(layout, sets),
        *_shared_chains(sets),
        *(_counting_chains(sets) if layout.by_endpoint else ()),
        *_affinity_chains(layout, sets),
        *_balancers(layout, sets),
    )
    return Table(layout.family, TABLE, used, chains, layout.counters)


def _base_chains(layout: Layout, sets: FamilySets) -> Iterator[Chain]:
    f = sets.fields
    destination, port = (f.daddr, f.protocol, f.dport), (f.protocol, f.dport)
    answers = (
        rule(GoBy(destination, sets.service_ips)),
        rule(In((f.daddr,), sets.nodeport_ips), GoBy(port, sets.service_nodeports)),
    )
    from_pod = _from_pod(layout, sets)
    inside = (rule(from_pod, Jump("inside"), comment="a pod of this node"),) if from_pod else ()
    yield Chain("nat-prerouting", (*inside, *answers), Base("nat", Hook.PREROUTING, -100))
    yield Chain("nat-output", (rule(Jump("inside")), *answers), Base("nat", Hook.OUTPUT, -100))
    for hook, unanswered in (
        (Hook.INPUT, "unanswered-here"),
        (Hook.FORWARD, "unanswered"),
        (Hook.OUTPUT, "unanswered"),
    ):
        base, name = Base("filter", hook, 0), f"filter-{hook.value[0]}"
        if not layout.guarded:
            new = rule(Is(Predicate.NEW), Is(Predicate.UNTRANSLATED), Jump(unanswered))
            yield Chain(name, (new,), base)
            continue
        guarded = f"guarded-{hook.value[0]}"
        yield Chain(name, (rule(Is(Predicate.NEW), Jump(guarded)),), base)
        yield Chain(
            guarded, (rule(Jump("guard")), rule(Is(Predicate.UNTRANSLATED), Jump(unanswered)))
        )
    asked = (("count-endpoints", layout.by_endpoint), ("remember", layout.affinity))
    sent = tuple(rule(Is(Predicate.TRANSLATED), Jump(chain)) for chain, asks in asked if asks)
    if sent:
        yield Chain("nat-input", sent, Base("nat", Hook.INPUT, 100))
    yield Chain(
        "nat-postrouting",
        (
            *sent,
            rule(
                # few match, so this goes first; a node that asks itself may, untranslated
                In((f.saddr, f.daddr), sets.hairpins),
                Is(Predicate.TRANSLATED),
                Unmark(layout.mark),
                Final.MASQUERADE,
                comment="a pod that reached itself through a Service",
            ),
            rule(Marked(layout.mark), Goto("marked")),
        ),
        Base("nat", Hook.POSTROUTING, 100),
    )
    yield Chain("marked", (rule(Unmark(layout.mark)), rule(Final.MASQUERADE)))
    if layout.guarded:
        yield from _guard(sets)


def _guard(sets: FamilySets) -> Iterator[Chain]:
    """Drops what comes from outside loadBalancerSourceRanges.

    A filter chain asks every packet of a flow that has had no answer (`ct state new`); a nat chain
    asks the first one only, so a one-way UDP flow would outlive the ranges that let it in. By then
    the packet may have been translated: the destination is the connection's original one.

    Two sets have no other purpose than to count what is dropped: a nat chain has counted the first
    packet of a connection, and no other packet of a flow.
    """
    f = sets.fields
    at = (f.original_daddr, f.protocol, f.original_dport)
    known, why = "outside-ranges-known", "outside loadBalancerSourceRanges"
    yield Chain(
        "guard",
        tuple(
            rule(
                IsProtocol(protocol),
                In(at, sets.guarded),
                In((*at, f.saddr), sets.source_ranges, negated=True),
                Goto("outside-ranges"),
            )
            for protocol in PROTOCOLS
        ),
    )
    dropping, dropping_known = (
        tuple(
            rule(IsProtocol(protocol), In(at, owner), Final.DROP, comment=why)
            for protocol in PROTOCOLS
        )
        for owner in (sets.outside_ranges, sets.outside_ranges_known)
    )
    drop = rule(Final.DROP, comment=why)
    yield Chain("outside-ranges", (rule(Is(Predicate.KNOWN), Goto(known)), *dropping, drop))
    yield Chain(known, (*dropping_known, drop))


def _from_pod(layout: Layout, sets: FamilySets) -> Statement | None:
    if isinstance(layout.pods, PodInterface):
        return FromInterface(layout.pods.name, layout.pods.prefix)
    return In((sets.fields.saddr,), sets.pod_cidrs) if layout.pods else None


def _not_from_pod(layout: Layout, sets: FamilySets) -> Statement | None:
    if isinstance(layout.pods, PodInterface):
        return NotFromInterface(layout.pods.name, layout.pods.prefix)
    return In((sets.fields.saddr,), sets.pod_cidrs, negated=True) if layout.pods else None


def _shared_chains(sets: FamilySets) -> Iterator[Chain]:
    f = sets.fields
    destination, port = (f.daddr, f.protocol, f.dport), (f.protocol, f.dport)
    node_port = In((f.daddr,), sets.nodeport_ips)
    yield Chain(
        "inside",
        (
            rule(GoBy(destination, sets.inside_ips)),
            rule(node_port, GoBy(port, sets.inside_nodeports)),
        ),
    )
    yield Chain(
        "no-endpoints",
        (
            rule(In(destination, sets.reject_ips), Goto("refuse")),
            rule(In(destination, sets.drop_ips), Final.DROP),
        ),
    )
    yield Chain(
        "unanswered-here",
        (rule(Jump("no-endpoints")), rule(node_port, Goto("no-endpoints-at-node-port"))),
    )
    yield Chain(
        "no-endpoints-at-node-port",
        (
            rule(In(port, sets.reject_nodeports), Goto("refuse")),
            rule(In(port, sets.drop_nodeports), Final.DROP),
        ),
    )
    yield Chain(
        "unanswered",
        (
            rule(Jump("no-endpoints")),
            rule(
                In((f.daddr,), sets.cluster_ips),
                Goto("refuse"),
                comment="no Service port has this port",
            ),
            rule(
                In((f.daddr,), sets.service_cidrs),
                Final.DROP,
                comment="no Service has this address",
            ),
        ),
    )
    # RST for TCP in both families: a client's TCP believes an ICMPv6 error only at its second SYN
    yield Chain("refuse", (rule(IsProtocol(TCP), Final.RESET), rule(Final.REJECT)))


def _counting_chains(sets: FamilySets) -> Iterator[Chain]:
    """Counts the connection at its frontend and endpoint; where the set has no room for this pair,
    the packet goes on uncounted."""
    f = sets.fields

    def counts(protocol: int, *asked: Statement) -> Rule:
        key = (f.original_daddr, f.protocol, f.original_dport, f.daddr, f.dport)
        update = Remember(sets.endpoint_counters, key, (), ENDPOINT_COUNTERS_SECONDS)
        return rule(IsProtocol(protocol), *asked, update, Final.RETURN)

    at_address = (f.original_daddr, f.protocol, f.original_dport)
    at_node_port = (f.protocol, f.original_dport)
    yield Chain(
        "count-endpoints",
        (
            *(counts(p, In(at_address, sets.counted_frontends)) for p in PROTOCOLS),
            rule(In((f.original_daddr,), sets.nodeport_ips), Goto("count-endpoints-of-node-port")),
        ),
    )
    yield Chain(
        "count-endpoints-of-node-port",
        tuple(counts(p, In(at_node_port, sets.counted_nodeports)) for p in PROTOCOLS),
    )


def _affinity_chains(layout: Layout, sets: FamilySets) -> Iterator[Chain]:
    if not layout.affinity:
        return
    f = sets.fields
    at_address = (f.original_daddr, f.protocol, f.original_dport)
    at_node_port = (f.protocol, f.original_dport)
    yield Chain(
        "remember",
        (
            rule(In((f.original_daddr,), sets.sticky_addresses), Jump("remember-at-address")),
            rule(In((f.original_daddr,), sets.nodeport_ips), Goto("remember-at-node-port")),
        ),
    )
    yield Chain(
        "remember-at-address",
        tuple(rule(IsProtocol(p), GoBy(at_address, sets.sticky_ips)) for p in PROTOCOLS),
    )
    yield Chain(
        "remember-at-node-port",
        tuple(rule(IsProtocol(p), GoBy(at_node_port, sets.sticky_nodeports)) for p in PROTOCOLS),
    )
    full = rule(
        Remember(sets.affinity_full, (f.direction,), (), FULL_SECONDS),
        comment="the map is full",
    )
    for seconds in layout.affinity:
        yield Chain(
            remember(seconds),
            (*(_remembers(sets, protocol, seconds) for protocol in PROTOCOLS), full),
        )


def _remembers(sets: FamilySets, protocol: int, seconds: int) -> Rule:
    """Remembers a client; where the map has no room for it, the packet goes on to the next rule."""
    f = sets.fields
    key = (f.saddr, f.original_daddr, f.protocol, f.original_dport)
    return rule(
        IsProtocol(protocol),
        Remember(sets.affinity, key, (f.daddr, f.dport), seconds),
        Final.RETURN,
    )


def remember(seconds: int) -> str:
    """The chain that remembers a client for so long."""
    return f"remember-{seconds}"


# --- the chains that choose an endpoint ---------------------------------------------------------

PLAIN, MASQUERADE, CLUSTER = "", "masq-", "cluster-"
INSIDE, NODEPORT, STICKY = "inside-", "nodeport-", "sticky-"


def balancer(
    width: int,
    *,
    style: str = PLAIN,
    node_port: bool,
    inside: bool,
    sticky: bool,
    hashed: bool = False,
) -> str:
    """The name of the chain that treats a packet so. `style` is PLAIN, MASQUERADE or CLUSTER."""
    where = (INSIDE if inside else "") + (NODEPORT if node_port else "")
    how = "hash" if hashed else "lb"
    return f"{STICKY if sticky else ''}{style}{where}{how}-{width}"


def width_of(chain: str) -> int:
    """The width in the name of a balancer. Raises ValueError for any other name."""
    found = _BALANCER.fullmatch(chain)
    if not found:
        raise ValueError(f"{chain!r} is no balancer")
    return int(found[1])


_BALANCER = re.compile(r".*?(?:lb|hash)-([0-9]+)")


def _balancers(layout: Layout, sets: FamilySets) -> Iterator[Chain]:
    for width in LADDER:
        for node_port in (False, True):
            for inside in (False, True):
                yield from _drawing(layout, sets, width, node_port, inside)
                if layout.hashed and width in HASH_WIDTHS:
                    yield from _hashing(layout, sets, width, node_port, inside)


def _drawing(
    layout: Layout, sets: FamilySets, width: int, node_port: bool, inside: bool
) -> Iterator[Chain]:
    """The chain that draws once, the one that draws until it hits, and those that lead to it."""
    f = sets.fields
    key = _destination(sets, node_port=node_port)
    endpoints = sets.endpoint_map(node_port=node_port, inside=inside)
    draw = _draw(width, node_port=node_port, inside=inside)
    yield Chain(draw, (rule(Translate((*key, f.random(width)), endpoints)),))

    drawing = balancer(width, node_port=node_port, inside=inside, sticky=False)
    always_filled = _draw(fewest(width), node_port=node_port, inside=inside)
    draws = (rule(Jump(draw)),) * (DRAWS if fewest(width) < width else 0)
    if inside:
        last = (rule(Jump(always_filled)), _no_endpoints_anywhere())
        yield Chain(drawing, (*_marks_own(layout), *draws, *last))
    else:
        yield Chain(drawing, (*draws, rule(Goto(always_filled))))

    by_client = f"by-client-{drawing}"
    full: tuple[Rule, ...] = ()
    if layout.affinity and width > 1:
        slots = (
            *(f.hashed(width, seed) for seed in range(1, HASH_DRAWS + 1)),
            f.hashed(fewest(width), HASH_DRAWS + 1),
        )
        hashed = tuple(rule(Translate((*key, slot), endpoints)) for slot in slots)
        yield Chain(by_client, (*hashed, *((_no_endpoints_anywhere(),) if inside else ())))
        full = (rule(In((f.direction,), sets.affinity_full), Goto(by_client)),)
    yield from _styles(
        layout, sets, width, node_port=node_port, inside=inside, hashed=False, full=full
    )


def _hashing(
    layout: Layout, sets: FamilySets, width: int, node_port: bool, inside: bool
) -> Iterator[Chain]:
    """The chain that picks the slot of a client's address, and those that lead to it.

    It picks again on a miss: a transaction may have replaced the slot in between. If that misses,
    the table has just become another one, and its first slot is filled, whatever it is now.
    """
    picks: tuple[Rule, ...] = ()
    if width > 1:
        pick = f"{INSIDE if inside else ''}{NODEPORT if node_port else ''}pick-{width}"
        slot = sets.fields.hashed(width, HASH_SEED)
        key = _destination(sets, node_port=node_port)
        endpoints = sets.endpoint_map(node_port=node_port, inside=inside)
        yield Chain(pick, (rule(Translate((*key, slot), endpoints)),))
        picks = (rule(Jump(pick)),) * 2
    name = balancer(width, node_port=node_port, inside=inside, sticky=False, hashed=True)
    first = _draw(1, node_port=node_port, inside=inside)
    if inside:
        last = (rule(Jump(first)), _no_endpoints_anywhere())
        yield Chain(name, (*_marks_own(layout), *picks, *last))
    else:
        yield Chain(name, (*picks, rule(Goto(first))))
    yield from _styles(layout, sets, width, node_port=node_port, inside=inside, hashed=True)


def _styles(
    layout: Layout,
    sets: FamilySets,
    width: int,
    *,
    node_port: bool,
    inside: bool,
    hashed: bool,
    full: tuple[Rule, ...] = (),
) -> Iterator[Chain]:
    """The chains that lead to a balancer: those that mark, and those that look for the client
    first. `full` is for a client that is not remembered."""
    f = sets.fields
    plain = balancer(width, node_port=node_port, inside=inside, sticky=False, hashed=hashed)
    before: dict[str, tuple[Rule, ...]] = {PLAIN: ()}
    if not inside:
        before[MASQUERADE] = (rule(Mark(layout.mark)),)
        off_cluster = _not_from_pod(layout, sets)
        if off_cluster and not node_port:
            before[CLUSTER] = (rule(off_cluster, Mark(layout.mark)),)
    for style, rules in before.items():
        name = balancer(
            width, style=style, node_port=node_port, inside=inside, sticky=False, hashed=hashed
        )
        if style:
            yield Chain(name, (*rules, rule(Goto(plain))))
        if layout.affinity:
            again = rule(Translate((f.saddr, f.daddr, f.protocol, f.dport), sets.affinity))
            marks = _marks_own(layout) if inside else rules
            yield Chain(f"{STICKY}{name}", (*marks, again, *full, rule(Goto(plain))))


def _destination(sets: FamilySets, *, node_port: bool) -> Concat:
    """The key of the endpoint maps before the slot."""
    f = sets.fields
    return (f.protocol, f.dport) if node_port else (f.daddr, f.protocol, f.dport)


def _no_endpoints_anywhere() -> Rule:
    """Ends the packet's way where a client inside finds no endpoint. Behind it the packet would
    find the frontend's other verdict, whose list is empty too, and be counted a second time."""
    return rule(Final.ACCEPT, comment="no endpoints anywhere")


def _marks_own(layout: Layout) -> tuple[Rule, ...]:
    return (rule(Is(Predicate.FROM_HERE), Mark(layout.mark), comment="sent by the node itself"),)


def _draw(width: int, *, node_port: bool, inside: bool) -> str:
    """The chain that draws a slot below this width once."""
    return f"{INSIDE if inside else ''}{NODEPORT if node_port else ''}draw-{width}"
