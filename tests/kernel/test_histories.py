"""Random histories of a cluster: whatever happened, the kernel is as if computed from scratch.

A hypothesis state machine makes Services, slices, the Node and ServiceCIDRs come, change and go,
alone or several in one transaction. After each transaction the tables are dumped from the kernel
and held against `tests.oracle`, which reads the specification again and knows nothing of what was
there before. What an oracle cannot see is checked between two dumps: that slots are dense and
stable, that widths move only when they must, and that nothing was written that did not change.
Sometimes the agent forgets everything and starts again; then it must not write anything.

It takes about a minute, and is the same every time. SLICEPROXY_HISTORIES=20 runs twenty times as
many histories; SLICEPROXY_SHRINK=1 looks for the shortest history that fails, which takes minutes:

    SLICEPROXY_HISTORIES=20 .venv/bin/python -m pytest tests/kernel/test_histories.py -q
"""

from __future__ import annotations

import copy
import ipaddress
import os
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from agent.kernel.reading import KernelTable
from lab.world import World
from rules.diff import Elements
from rules.events import Delete, Event, NodeAddresses, Upsert
from rules.language import Set, Table
from rules.netlink.attributes import attributes
from rules.objects import EndpointSlice, Name, Node, Service, ServiceCIDR, parse_network
from rules.options import DetectLocalMode, Options
from rules.slots import HASH_WIDTHS, LADDER, fewest
from rules.state import State
from rules.tables import FAMILIES
from rules.transaction import Transaction, table_change
from tests import manifest, oracle
from tests.elements import difference
from tests.kernel.proxy import Proxy
from tests.oracle import Layout, ListOf, Objects, Picture, Target

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces")

MULTIPLIER = float(os.environ.get("SLICEPROXY_HISTORIES", "1"))
HISTORIES, STEPS = 40, 40
PHASES = (Phase.generate, *((Phase.shrink,) if os.environ.get("SLICEPROXY_SHRINK") else ()))

# --- what a cluster is made of: few names and addresses, so that they meet ------------------------

SERVICES = (
    Name("default", "a"),
    Name("default", "b"),
    Name("default", "c"),
    Name("other", "a"),
)
SLICES = {
    **{Name("default", f"piece-{n}"): (4, 6)[n % 2] for n in range(6)},
    **{Name("other", f"piece-{n}"): (4, 6)[n % 2] for n in range(4)},
}
CLUSTER_IPS = {
    4: ("10.96.0.10", "10.96.0.11", "10.96.0.12"),
    6: ("fd00:10:96::10", "fd00:10:96::11"),
}
EXTERNAL_IPS = ("198.51.100.1", "2001:db8::1", "10.96.0.10")
BALANCER_IPS = ("198.51.100.1", "198.51.100.2", "2001:db8::1")
SOURCES = (
    *("172.31.0.0/24", "fd00:172:31::/64", "10.0.0.0/8", "10.0.0.0/16", "192.0.2.0/25"),
    *("192.0.2.128/25", "198.51.100.0/31", "0.0.0.0/0", "::/0", "fd00::/16", "nonsense"),
)
ENDPOINTS = {
    4: tuple(f"10.244.{n // 6}.{n % 6 + 1}" for n in range(48)),
    6: tuple(f"fd00:10:244:{n // 6}::{n % 6 + 1:x}" for n in range(48)),
}
WEIGHTS = (
    None,
    "10.244.0.1=0,10.244.0.2=3,fd00:10:244:0::1=4",
    ",".join(f"{ENDPOINTS[n % 2 * 2 + 4][n]}={n % 5}" for n in range(24)),
    "10.244.0.1=1,10.244.0.1=2",  # not usable
)
ZONE_WEIGHTS = (None, "z1=0", "z1=2,z2=4", "z1=5,z2=0")
NODES, ZONES = ("node-1", "node-2", None), ("z1", "z2")
PORT_NAMES, PROTOCOLS = ("http", "dns", None), ("TCP", "UDP", "SCTP", None)
AGES = (*(f"2026-01-0{day}T00:00:00Z" for day in (1, 2, 3)), None)
POLICIES = ("Cluster", "Local", None)
OWN_ADDRESSES = (
    ("172.31.0.2", "fd00:172:31::2"),
    ("172.31.0.9",),
    ("fd00:172:31::7", "192.0.2.7", "172.31.0.2"),
    (),
)
POD_CIDRS = (("10.244.1.0/24", "fd00:10:244:1::/64"), ("10.244.0.0/24",), ())
CIDRS = ("10.96.0.0/16", "10.96.0.0/24", "10.97.0.0/16", "fd00:10:96::/112", "::/0", "0.0.0.0/0")

MAYBE = st.sampled_from((True, False, None))


def some(pool: tuple[Any, ...], most: int = 3) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.sampled_from(pool), unique=True, max_size=most)


@st.composite
def options(draw: st.DrawFn) -> Options:
    mode = draw(st.sampled_from(DetectLocalMode))
    interface = mode in (DetectLocalMode.BRIDGE_INTERFACE, DetectLocalMode.INTERFACE_NAME_PREFIX)
    networks = draw(st.sampled_from((None, None, ("172.31.0.0/24",), ("0.0.0.0/0", "fd00::/16"))))
    clusters = draw(st.sampled_from((("10.244.0.0/16",), ("10.0.0.0/8", "fd00:10:244::/48"))))
    return Options(
        node="node-1",
        zone=draw(st.sampled_from(("", "", "z2"))),
        proxy_name=draw(st.sampled_from(("", "", "", "mine"))),
        masquerade_all=draw(st.booleans()),
        detect_local=mode,
        cluster_cidrs=tuple(map(parse_network, clusters))
        if mode is DetectLocalMode.CLUSTER_CIDR
        else (),
        interface="cni0" if interface else "",
        node_port_primary=networks is None or draw(st.booleans()),
        node_port_networks=tuple(map(parse_network, networks or ())),
        allow_external_ips=draw(st.sampled_from((True, True, True, False))),
    )


@st.composite
def service_ports(draw: st.DrawFn) -> list[dict[str, Any]]:
    found = draw(
        st.lists(
            st.tuples(
                st.sampled_from(PORT_NAMES),
                st.sampled_from(("TCP", *PROTOCOLS)),
                st.sampled_from((80, 80, 53)),
                st.sampled_from((None, 30000, 30001)),
            ),
            min_size=1,
            max_size=3,
        )
    )
    return [
        {"name": name, "protocol": protocol, "port": port, "nodePort": node_port}
        for name, protocol, port, node_port in found
    ]


@st.composite
def service_documents(draw: st.DrawFn) -> dict[str, Any]:
    """A Service of any sort, without its name."""
    kind = draw(st.sampled_from(("ClusterIP", "NodePort", "LoadBalancer", "LoadBalancer")))
    odd = draw(st.sampled_from((None,) * 20 + ("ExternalName", "headless", "labelled", "pending")))
    families = draw(st.sampled_from(((4, 6), (4, 6), (6, 4), (4,), (6,))))
    document = manifest.service_document(
        cluster_ips=[draw(st.sampled_from(CLUSTER_IPS[family])) for family in families],
        ports=draw(service_ports()),
        created=draw(st.sampled_from(AGES)),
        type="ExternalName" if odd == "ExternalName" else kind,
        externalIPs=draw(some(EXTERNAL_IPS, 2)),
        ingress=[
            {"ip": ip, "ipMode": draw(st.sampled_from((None, None, "VIP", "Proxy")))}
            for ip in draw(some(BALANCER_IPS, 2))
        ],
        loadBalancerSourceRanges=draw(st.one_of(st.just([]), some(SOURCES), some(SOURCES[:2]))),
        internalTrafficPolicy=draw(st.sampled_from(POLICIES)),
        externalTrafficPolicy=draw(st.sampled_from(POLICIES)),
    )
    seconds = draw(st.sampled_from((None, None, 10800, 600, 1)))
    if seconds:
        document["spec"]["sessionAffinity"] = "ClientIP"
        document["spec"]["sessionAffinityConfig"] = {"clientIP": {"timeoutSeconds": seconds}}
    if odd in ("headless", "pending"):
        ip = "None" if odd == "headless" else ""
        document["spec"].update(clusterIP=ip, clusterIPs=[ip] if ip else [])
    algorithm = draw(st.sampled_from((None,) * 6 + ("weighted",) * 4 + ("source-hash", "lc")))
    if algorithm:
        weights, zones = draw(st.sampled_from(WEIGHTS)), draw(st.sampled_from(ZONE_WEIGHTS))
        document["metadata"]["annotations"] = manifest.balancing(
            algorithm, weights=weights, zone_weights=zones
        )
    if draw(st.integers(0, 23)) == 23:
        document["metadata"]["labels"] = {"service.kubernetes.io/headless": ""}
    document["metadata"]["labelled"] = odd == "labelled"
    return document


@st.composite
def endpoints(draw: st.DrawFn, family: int) -> dict[str, Any]:
    """One endpoint in any condition."""
    ready = draw(st.sampled_from((True, True, True, False, False, None)))
    result = manifest.endpoint(
        draw(st.sampled_from(ENDPOINTS[family][:12])),
        node=draw(st.sampled_from(NODES)),
        ready=ready,
        serving=draw(MAYBE),
        terminating=draw(MAYBE),
        zone=draw(st.sampled_from((None, "z1", "z2"))),
        for_zones=draw(st.sampled_from(((), (), ("z1",), ("z2",), ZONES))),
        for_nodes=draw(st.sampled_from(((), (), ("node-1",), ("node-2",)))),
    )
    if draw(st.integers(0, 7)) == 7:
        del result["conditions"]
    return result


EVERY_PORT = [
    {"name": name, "protocol": protocol, "port": 8080}
    for name in PORT_NAMES
    for protocol in ("TCP", "UDP", "SCTP")
]

slice_ports = st.just(EVERY_PORT) | st.lists(
    st.fixed_dictionaries(
        {
            "name": st.sampled_from(PORT_NAMES),
            "protocol": st.sampled_from(PROTOCOLS),
            "port": st.sampled_from((8080, 8080, 9090, None)),
        }
    ),
    max_size=3,
)


def many(family: int, count: int, seed: int) -> list[dict[str, Any]]:
    """That many ready endpoints, any of the pool, in any order, some of them here."""
    addresses = random.Random(seed).sample(ENDPOINTS[family], count)
    return [
        manifest.endpoint(
            address,
            node=NODES[ENDPOINTS[family].index(address) % 2],
            zone=ZONES[ENDPOINTS[family].index(address) // 2 % 2],
        )
        for address in addresses
    ]


# --- what holds between two dumps ----------------------------------------------------------------


def operations(side: dict[Set, list[Any]]) -> list[tuple[int, str, bytes, Any]]:
    return [(s.family, s.name, key, value) for s, items in side.items() for key, value in items]


def check_nothing_in_vain(
    sent: tuple[Transaction | None, ...], before: Elements, after: Elements
) -> None:
    """Exactly the elements that differ were removed and added, each once."""
    least = difference(before, after)
    changes = [transaction.change for transaction in sent if transaction]
    removed = [o for change in changes for o in operations(change.removed)]
    added = [o for change in changes for o in operations(change.added)]
    for done, needed in (
        (removed, operations(least.removed)),
        (added, operations(least.added)),
    ):
        assert len(done) == len(set(done)), "an element was written twice"
        assert set(done) == set(needed)
    assert not set(removed) & set(added)


VERDICTS = ("service-ips", "service-nodeports", "inside-ips", "inside-nodeports")


def check_verdicts(
    transaction: Transaction,
    before: tuple[Picture, Layout],
    after: tuple[Picture, Layout],
) -> None:
    """A verdict is written only if its frontend came, went, or changed its style or width."""
    for side in (transaction.change.removed, transaction.change.added):
        for family, name, key, _ in operations(side):
            if name not in VERDICTS:
                continue
            length = 0 if name.endswith("nodeports") else {4: 4, 6: 16}[family]
            where, inside = oracle.where_of(family, length, key), name.startswith("inside")
            assert _verdict(before, where, inside) != _verdict(after, where, inside)


def _verdict(seen: tuple[Picture, Layout], where: oracle.Where, inside: bool) -> Any:
    picture, layout = seen
    behaviour = picture.frontends.get(where)
    style = behaviour and (behaviour.inside_verdict if inside else behaviour.verdict)
    return style, layout.widths.get(ListOf(where, inside))


TABLE_OF: dict[frozenset[tuple[Target, int]], dict[int, Target]] = {}
"""The hash table of each set of endpoints that was seen, with the number of their slots."""


def check_layout(layout: Layout) -> None:
    """Slots have no hole, and the rules that draw over this width reach all of them. A hash table
    is full, and the same for the same endpoints, whatever happened before."""
    assert layout.slots.keys() == layout.widths.keys()
    for where, slots in layout.slots.items():
        count, width = len(slots), layout.widths[where]
        assert sorted(slots) == list(range(count)), f"{where} has holes"
        if where in layout.hashed:
            assert count in (0, width)
            assert width in HASH_WIDTHS
            shares = Counter(slots.values())
            assert TABLE_OF.setdefault(frozenset(shares.items()), slots) == slots
            continue
        assert width in LADDER
        assert not count or fewest(width) <= count <= width, f"{count} of {width} at {where}"


def check_stability(before: Layout, after: Layout) -> None:
    """What stays in a list stays in its slot, and a list in its width, wherever that can be.

    An endpoint that stays can keep its slot if that is below the list's new length. If it is not,
    a hole below must be filled with it; so exactly as many slots change as endpoints that went
    leave holes, and none does where nothing went. A weighted endpoint counts once for each slot.
    """
    for where in (before.slots.keys() & after.slots.keys()) - before.hashed - after.hashed:
        old, new = before.slots[where], after.slots[where]
        gone = Counter(old.values()) - Counter(new.values())
        holes = sum(1 for slot, target in old.items() if slot < len(new) and new[slot] != target)
        if len(set(old.values())) == len(old) and len(set(new.values())) == len(new):
            assert holes == sum(
                1 for slot, target in old.items() if slot < len(new) and gone[target]
            )
        assert holes <= gone.total()
        width, count = before.widths[where], len(new)
        if not count or fewest(width) <= count <= width:
            assert after.widths[where] == width, f"{where} changed its width in vain"
        else:
            assert after.widths[where] == min(w for w in LADDER if w >= count)
    for where in after.slots.keys() - before.slots.keys() - after.hashed:
        count = max(1, len(after.slots[where]))
        assert after.widths[where] == min(w for w in LADDER if w >= count)


# --- reading tables ------------------------------------------------------------------------------


class Tables:
    """Holds the tables in the kernel against their description, as `Proxy.check` does.

    Comparing some two thousand rules takes a tenth of a second, so what was found right once is
    known again by what the kernel said of it.
    """

    def __init__(self) -> None:
        self._right: set[tuple[int, bytes]] = set()
        self._described: dict[int, Table] = {}

    def check(self, table: Table, found: KernelTable | None) -> None:
        assert found is not None
        self._described[id(table)] = table  # keeps the id from being used again
        seen = (id(table), self._fingerprint(found))
        if seen not in self._right:
            assert table_change(table, found.known(table)).empty
            self._right.add(seen)

    @staticmethod
    def _fingerprint(found: KernelTable) -> bytes:
        """All that defines sets, chains and rules; no handles and no counts."""
        parts = []
        for defining, bodies in (
            ((2, 3, 4, 5, 6, 7, 9, 13), found.sets.values()),
            ((3, 4, 5, 7), found.chains.values()),
            ((2, 4, 7), (body for rules in found.rules.values() for body in rules)),
        ):
            for body in bodies:
                parts += [content for kind, content in attributes(body) if kind in defining]
        return b"".join(parts)


TABLES = Tables()


# --- the machine ---------------------------------------------------------------------------------


class Histories(RuleBasedStateMachine):
    """See the module. Rules put events into a list; `flush` sends them and checks everything."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.proxy: Proxy | None = None
        self.services: dict[Name, dict[str, Any]] = {}
        self.slices: dict[Name, dict[str, Any]] = {}
        self.cidrs: dict[str, ServiceCIDR] = {}
        self.node: Node | None = None
        self.addresses = NodeAddresses(frozenset(), ())
        self.events: list[Event] = []
        self.right = True

    @initialize(
        options=options(),
        own=st.booleans(),
        documents=st.lists(service_documents(), min_size=1, max_size=4),
        pieces=st.integers(0, 8),
        seed=st.integers(0, 255),
    )
    def start(
        self,
        options: Options,
        own: bool,
        documents: list[dict[str, Any]],
        pieces: int,
        seed: int,
    ) -> None:
        """An agent that finds no tables, and a cluster in which something is going on already."""
        self.options = options
        self.own = own
        self.proxy = Proxy(self.world, own=own, options=options)
        self.proxy.__enter__()
        self._check()
        self.node = manifest.node(zone=ZONES[seed % 2])
        self._tell(False, Upsert(self.node))
        for name, document in zip(SERVICES, documents, strict=False):
            self.put_service(name, document, more=False)
        for index in range(pieces):
            name = sorted(SLICES)[(seed + index) % len(SLICES)]
            found = many(SLICES[name], 3 * index + 1, seed)
            self._put_slice(name, "abc"[index // 2 % 3], found, EVERY_PORT, more=False)

    def teardown(self) -> None:
        if self.proxy is None:
            return
        try:
            if self.right:  # else this history has ended in a failure already
                self.restart(seed=len(self.services), reopen=True)
                self.proxy.check()
        finally:
            self.proxy.kernel.remove()
            self.proxy.kernel.close()

    # rules: Services

    @rule(name=st.sampled_from(SERVICES), document=service_documents(), more=st.booleans())
    def put_service(self, name: Name, document: dict[str, Any], more: bool) -> None:
        document = copy.deepcopy(document)
        document["metadata"].update(namespace=name.namespace, name=name.name)
        foreign = document["metadata"].pop("labelled")
        if foreign != bool(self.options.proxy_name):
            labels = document["metadata"].setdefault("labels", {})
            labels["service.kubernetes.io/service-proxy-name"] = "mine"
        self._put_service(document, more)

    @precondition(lambda self: self.services)
    @rule(data=st.data(), more=st.booleans())
    def delete_service(self, data: st.DataObject, more: bool) -> None:
        name = self._one_of(data, self.services)
        del self.services[name]
        self._tell(more, Delete(Service, name))

    @precondition(lambda self: self.services)
    @rule(data=st.data(), created=st.sampled_from(AGES), notified=st.booleans(), more=st.booleans())
    def recreate_service(
        self, data: st.DataObject, created: str | None, notified: bool, more: bool
    ) -> None:
        """The same Service, older or younger than before; its deletion is seen or missed."""
        name = self._one_of(data, self.services)
        document = copy.deepcopy(self.services[name])
        document["metadata"]["creationTimestamp"] = created
        if notified:
            self.events.append(Delete(Service, name))
        self._put_service(document, more)

    @precondition(lambda self: self.services)
    @rule(data=st.data(), document=service_documents(), more=st.booleans())
    def change_service(self, data: st.DataObject, document: dict[str, Any], more: bool) -> None:
        """One field of a Service becomes another."""
        changed = copy.deepcopy(self.services[self._one_of(data, self.services)])
        field = data.draw(
            st.sampled_from(
                (
                    *("internalTrafficPolicy", "externalTrafficPolicy", "externalIPs", "ports"),
                    *("loadBalancerSourceRanges", "sessionAffinity", "type", "ingress"),
                )
            )
        )
        if field == "ingress":
            changed["status"] = document["status"]
        elif field == "sessionAffinity":
            for part in (field, "sessionAffinityConfig"):
                changed["spec"][part] = document["spec"].get(part)
        else:
            changed["spec"][field] = document["spec"].get(field)
        self._put_service(changed, more)

    # rules: slices

    @rule(
        name=st.sampled_from(sorted(SLICES)),
        service=st.sampled_from("abc"),
        ports=slice_ports,
        data=st.data(),
        more=st.booleans(),
    )
    def put_slice(
        self, name: Name, service: str, ports: list[Any], data: st.DataObject, more: bool
    ) -> None:
        """The same address may be in several slices, older or younger ones, and twice in one."""
        found = data.draw(st.lists(endpoints(SLICES[name]), max_size=6))
        created = data.draw(st.sampled_from(AGES))
        weights = data.draw(st.sampled_from((None, None, *WEIGHTS)))
        self._put_slice(name, service, found, ports, more, created=created, weights=weights)

    @rule(
        name=st.sampled_from(sorted(SLICES)),
        service=st.sampled_from("abc"),
        count=st.integers(0, 48),
        seed=st.integers(0, 255),
        more=st.booleans(),
    )
    def put_long_slice(self, name: Name, service: str, count: int, seed: int, more: bool) -> None:
        """Up to 48 endpoints, so that widths change."""
        self._put_slice(name, service, many(SLICES[name], count, seed), EVERY_PORT, more)

    @precondition(lambda self: self.slices)
    @rule(data=st.data(), more=st.booleans())
    def change_endpoint(self, data: st.DataObject, more: bool) -> None:
        """One endpoint is added, removed, replaced, or changed in its place."""
        name = self._one_of(data, self.slices)
        document = copy.deepcopy(self.slices[name])
        found = document["endpoints"]
        index = data.draw(st.integers(0, len(found)))
        found[index : index + data.draw(st.integers(0, 1))] = data.draw(
            st.lists(endpoints(SLICES[name]), max_size=1)
        )
        self._put_slice_document(document, more)

    @precondition(lambda self: self.slices)
    @rule(data=st.data(), ready=MAYBE, serving=MAYBE, terminating=MAYBE, more=st.booleans())
    def flip_conditions(
        self,
        data: st.DataObject,
        ready: bool | None,
        serving: bool | None,
        terminating: bool | None,
        more: bool,
    ) -> None:
        """Every other endpoint of a slice, or all of them, take other conditions."""
        document = copy.deepcopy(self.slices[self._one_of(data, self.slices)])
        conditions = {"ready": ready, "serving": serving, "terminating": terminating}
        for endpoint in document["endpoints"][:: data.draw(st.integers(1, 2))]:
            endpoint["conditions"] = conditions
        self._put_slice_document(document, more)

    @precondition(lambda self: self.slices)
    @rule(data=st.data(), service=st.sampled_from("abc"), more=st.booleans())
    def move_slice(self, data: st.DataObject, service: str, more: bool) -> None:
        """A slice gets the label of another Service."""
        document = copy.deepcopy(self.slices[self._one_of(data, self.slices)])
        document["metadata"]["labels"]["kubernetes.io/service-name"] = service
        self._put_slice_document(document, more)

    @precondition(lambda self: self.slices)
    @rule(data=st.data(), seed=st.integers(0, 255), more=st.booleans())
    def shuffle_slice(self, data: st.DataObject, seed: int, more: bool) -> None:
        """The same endpoints in another order: nothing to write."""
        document = copy.deepcopy(self.slices[self._one_of(data, self.slices)])
        random.Random(seed).shuffle(document["endpoints"])
        self._put_slice_document(document, more)

    @precondition(lambda self: self.slices)
    @rule(data=st.data(), more=st.booleans())
    def delete_slice(self, data: st.DataObject, more: bool) -> None:
        name = self._one_of(data, self.slices)
        del self.slices[name]
        self._tell(more, Delete(EndpointSlice, name))

    # rules: the node and the cluster

    @rule(
        addresses=st.sampled_from(OWN_ADDRESSES),
        zone=st.sampled_from(("", *ZONES)),
        pod_cidrs=st.sampled_from(POD_CIDRS),
        there=st.sampled_from((True, True, True, False)),
        more=st.booleans(),
    )
    def change_node(
        self,
        addresses: tuple[str, ...],
        zone: str,
        pod_cidrs: tuple[str, ...],
        there: bool,
        more: bool,
    ) -> None:
        """This node's object, which keeps what it lacks from before, and another's, which does not
        matter here."""
        other = manifest.node("node-2", addresses=("172.31.0.3",), zone="z1", pod_cidrs=())
        if not there:
            self._tell(more, Delete(Node, "node-1"), Delete(Node, "node-2"))
            return
        new = manifest.node(addresses=addresses, zone=zone, pod_cidrs=pod_cidrs)
        assert self.node
        self.node = msgspec.structs.replace(
            new,
            addresses=new.addresses or self.node.addresses,
            zone=new.zone or self.node.zone,
            pod_cidrs=new.pod_cidrs or self.node.pod_cidrs,
        )
        self._tell(more, Upsert(new), Upsert(other))

    @rule(texts=st.sampled_from(OWN_ADDRESSES), primary=st.booleans(), more=st.booleans())
    def change_addresses(self, texts: tuple[str, ...], primary: bool, more: bool) -> None:
        packed = [ipaddress.ip_address(text).packed for text in texts]
        first = {len(address): address for address in reversed(packed)} if primary else {}
        self.addresses = NodeAddresses(frozenset(packed), tuple(first.values()))
        self._tell(more, self.addresses)

    @rule(name=st.sampled_from("kx"), cidrs=st.none() | some(CIDRS), more=st.booleans())
    def change_service_cidr(self, name: str, cidrs: list[str] | None, more: bool) -> None:
        """One of two overlapping ServiceCIDRs is added, changed, or (None) removed."""
        if cidrs is None:
            self.cidrs.pop(name, None)
            self._tell(more, Delete(ServiceCIDR, name))
        else:
            self.cidrs[name] = manifest.service_cidr(*cidrs, name=name)
            self._tell(more, Upsert(self.cidrs[name]))

    # rules: the agent

    @rule(seed=st.integers(0, 255), reopen=st.booleans())
    def restart(self, seed: int, reopen: bool) -> None:
        """A new agent learns the same in another order, and has nothing to write; nor had the old
        one when everything is reported once more."""
        self._send()
        assert not self.proxy.put(*self._objects()[0])
        events: list[Event] = [Upsert(o) for o in self._objects()[0]]
        events.append(self.addresses)
        random.Random(seed).shuffle(events)
        if reopen:
            self.proxy.kernel.close()
            self.proxy = Proxy(self.world, own=self.own, options=self.options)
        else:
            self.proxy.state = State(self.options)
        self.proxy.state.apply(events)
        transaction = self.proxy.resync()
        assert transaction.change.operations == 0, (
            transaction.change.removed,
            transaction.change.added,
        )
        assert all(table.empty for table in transaction.tables)
        assert not transaction
        self._check()

    # sending and checking

    def _one_of(self, data: st.DataObject, known: dict[Name, Any]) -> Name:
        return data.draw(st.sampled_from(sorted(known)))

    def _put_service(self, document: dict[str, Any], more: bool) -> None:
        new = manifest.of(document)
        self.services[new.name] = document
        self._tell(more, Upsert(new))

    def _put_slice(
        self,
        name: Name,
        service: str,
        found: list[Any],
        ports: list[Any],
        more: bool,
        *,
        created: str | None = AGES[0],
        weights: str | None = None,
    ) -> None:
        family = f"IPv{SLICES[name]}"
        document = manifest.slice_document(
            service,
            found,
            name=name.name,
            namespace=name.namespace,
            ports=ports,
            family=family,
            created=created,
            annotations={"sliceproxy.io/weights": weights} if weights else None,
        )
        if self.options.proxy_name:
            document["metadata"]["labels"]["service.kubernetes.io/service-proxy-name"] = "mine"
        self._put_slice_document(document, more)

    def _put_slice_document(self, document: dict[str, Any], more: bool) -> None:
        new = manifest.of(document)
        self.slices[new.name] = document
        self._tell(more, Upsert(new))

    def _tell(self, more: bool, *events: Event) -> None:
        """Notes events; unless there are more to come, sends all of them."""
        self.events.extend(events)
        if not more:
            self._send()

    def _objects(self) -> tuple[list[Any], Objects]:
        services = [manifest.of(d) for d in self.services.values()]
        slices = [manifest.of(d) for d in self.slices.values()]
        cidrs = list(self.cidrs.values())
        known = [*services, *slices, *cidrs, *([self.node] if self.node else [])]
        return known, Objects(
            tuple(services), tuple(slices), self.node, tuple(cidrs), self.addresses
        )

    def _send(self) -> None:
        if not self.events:
            return
        events, self.events = self.events, []
        self.right = False
        transaction = self.proxy.apply(*events)
        elements, (picture, layout) = self.before
        self._check()
        after, seen = self.before
        check_nothing_in_vain((transaction, self.proxy.followed), elements, after)
        check_verdicts(transaction, (picture, layout), seen)
        check_stability(layout, seen[1])
        self.right = True

    def _read(self) -> tuple[Elements, tuple[Picture, Layout]]:
        """Dumps both tables, and holds rules and elements against what the State says."""
        elements: dict[Set, Any] = {}
        chains = {}
        for table in self.proxy.state.tables():
            found = self.proxy.kernel.find(table.family)
            TABLES.check(table, found)
            elements.update(self.proxy.kernel.read(found))
            chains[table.family] = found.chains
        assert not difference(elements, self.proxy.state.elements())
        return elements, oracle.observed(elements, chains)

    def _check(self) -> None:
        """The kernel holds what the specification says, and each address who it belongs to."""
        self.before = self._read()
        _, (picture, layout) = self.before
        objects = self._objects()[1]
        wanted = oracle.expected(objects, self.options)
        for got, want in zip(picture, wanted, strict=True):
            assert got == want
        check_layout(layout)
        belongs = {
            oracle.where_of(c.verdicts.family, len(i.wanted.frontend.address), c.key): holder
            for c, i in self.proxy.state.installed.items()
            if (holder := self.proxy.state.holder(c))
        }
        assert belongs == oracle.holders(objects, self.options)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World(pods=0, remotes=0, prefix="sliceproxy-histories") as built:
        yield built


def test_the_kernel_holds_what_the_objects_say_whatever_happened_before(world):
    run_state_machine_as_test(
        lambda: Histories(world),
        settings=settings(
            max_examples=max(1, round(HISTORIES * MULTIPLIER)),
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=True,
            database=None,
            phases=PHASES,
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        ),
    )


def test_the_oracle_reads_an_endpoint_as_it_is_written():
    assert oracle.target_of(b"\x0a\xf4\x00\x01\x1f\x90\0\0") == Target(b"\x0a\xf4\x00\x01", 8080)


def test_both_families_are_looked_at():
    assert tuple(FAMILIES) == oracle.FAMILIES
