"""The trace of a packet and the packet itself come to the same end.

Every asker of a World asks every address of a few sets of Services, and `rules.trace` is asked the
same. Answered or refused or silent, by which endpoints, with whose source address: what the packet
met must be what the trace says, for each way of telling pods and of masquerading.
"""

from __future__ import annotations

import ipaddress
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, product
from typing import Any, NamedTuple

import pytest
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTSocket

from agent.config.settings import Settings
from lab.world import World
from rules.diff import Elements
from rules.events import NodeAddresses
from rules.objects import TCP, UDP, Object, address_text, parse_address
from rules.options import Options
from rules.tables import FAMILIES, SETS
from rules.target import address_of, port_of
from rules.trace import Branch, End, Masquerade, Packet, Trace, trace
from tests.kernel.proxy import Proxy
from tests.manifest import endpoint, endpoint_slice, node, service, service_cidr

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ip"), reason="needs root to make network namespaces"
)

SERVED, ASKED = 8080, 80
HOSTS = ("pod-1", "pod-2", "pod-3", "remote-1", "remote-2", "node")
OUTSIDE = ("client", "stranger")
ASKERS = ("pod-1", "pod-3", "node", *OUTSIDE)
# no node ports: a datagram of the node from one of them to the same would be its own answer
SOURCE_PORTS = cycle((*range(10000, 30000), *range(33000, 60000)))
PROTOCOLS = {"tcp": TCP, "udp": UDP}
ENOUGH = 80  # draws of one endpoint of three: all are met but for one run in 10^13
MOST_DOUBTFUL = 20  # questions asked again alone; more are no accident
PATIENCE = 3.0  # seconds for an answer that must come
MIXED = 1.0  # seconds where both may come
SILENCE = 0.4  # seconds after which an answer that must not come counts as silence

NODE_V4, NODE_V6 = "172.31.0.2", "fd00:172:31::2"
EXTRA_V4, EXTRA_V6 = "192.0.2.77", "2001:db8:77::77"  # others of the node, routed to it
GATEWAYS = ("169.254.1.1", "fe80::1")  # the node's side of the pods' wires

MODES = {
    "pods by cluster CIDR": Settings(
        node="node-1", cluster_cidr="10.244.0.0/16,fd00:10:244::/48", nodeport_addresses=()
    ).options(),
    "pods by node CIDR": Settings(node="node-1", detect_local_mode="NodeCIDR").options(),
    "pods by interface prefix": Settings(
        node="node-1",
        detect_local_mode="InterfaceNamePrefix",
        pod_interface_name_prefix="vethpod",
        nodeport_addresses=(
            "172.31.0.0/24",
            "fd00:172:31::/64",
            "192.0.2.0/24",
            "2001:db8:77::/64",
        ),
    ).options(),
    "pods by one interface": Settings(
        node="node-1", detect_local_mode="BridgeInterface", pod_bridge_interface="vethpod1"
    ).options(),
    "pods not identified": Settings(node="node-1").options(),
    "masquerade all": Settings(
        node="node-1", cluster_cidr="10.244.0.0/16,fd00:10:244::/48", masquerade_all=True
    ).options(),
}


def forget_connections(world: World) -> None:
    """No earlier connection decides about a later one."""

    def flush() -> None:
        with NFCTSocket() as conntrack:
            conntrack.flush()

    world.run("node", flush)


@pytest.fixture(scope="module")
def trace_world() -> Iterator[World]:
    with World() as world:
        for host in HOSTS:
            world.serve(host, SERVED, "tcp")
            world.serve(host, SERVED, "udp")
        for address in (EXTRA_V4, EXTRA_V6):
            world.add_address("node", address)
        yield world


@pytest.fixture(params=MODES)
def trace_proxy(trace_world: World, request: pytest.FixtureRequest) -> Iterator[Proxy]:
    chosen: Options = MODES[request.param]
    forget_connections(trace_world)
    with Proxy(trace_world, options=chosen) as proxy:
        proxy.put(node(), service_cidr("10.96.0.0/16", "fd00:10:96::/112"))
        own = frozenset(map(parse_address, (NODE_V4, NODE_V6, EXTRA_V4, EXTRA_V6)))
        primary = (parse_address(NODE_V4), parse_address(NODE_V6))
        proxy.apply(NodeAddresses(own, primary))
        try:
            yield proxy
        finally:
            proxy.kernel.remove()


# --- the Services -------------------------------------------------------------------------------


class Addresses(NamedTuple):
    """All addresses of one Service of the test, by its number."""

    number: int

    @property
    def cluster(self) -> tuple[str, str]:
        return f"10.96.0.{self.number}", f"fd00:10:96::{self.number}"

    @property
    def external(self) -> tuple[str, str]:
        return f"203.0.113.{self.number}", f"2001:db8:113::{self.number}"

    @property
    def balanced(self) -> tuple[str, str]:
        return f"198.18.0.{self.number}", f"2001:db8:18::{self.number}"

    @property
    def node_port(self) -> int:
        return 30000 + self.number


def served(name: str, number: int, **spec: Any) -> Object:
    """A Service of every kind at once: cluster IP, external IP, load balancer IP, node port."""
    at = Addresses(number)
    ports = [
        {"name": protocol, "port": ASKED, "protocol": protocol.upper(), "nodePort": at.node_port}
        for protocol in PROTOCOLS
    ]
    return service(
        name,
        type="LoadBalancer",
        cluster_ips=at.cluster,
        externalIPs=list(at.external),
        ingress=[{"ip": a} for a in at.balanced],
        ports=ports,
        **spec,
    )


def slices(world: World, name: str, *hosts: str, **conditions: Any) -> Iterator[Object]:
    ports = [{"name": p, "port": SERVED, "protocol": p.upper()} for p in PROTOCOLS]
    for family in ("ipv4", "ipv6"):
        found = [
            endpoint(
                getattr(world.hosts[host], family),
                node="node-2" if host.startswith("remote") else "node-1",
                **conditions,
            )
            for host in hosts
        ]
        yield endpoint_slice(name, found, ports=ports, name=f"{name}-{family}-{len(hosts)}")


EXTERNAL_LOCAL = {"externalTrafficPolicy": "Local"}
ALL_LOCAL = {**EXTERNAL_LOCAL, "internalTrafficPolicy": "Local"}
GUARDED = ["172.31.0.100/32", "fd00:172:31::100/128"]
GUARDED_WITH_NODE = [*GUARDED, "172.31.0.2/32", "fd00:172:31::2/128", "10.244.1.11/32"]


def plain_services(world: World) -> Iterator[Object]:
    """Policies and what is in the lists: here and elsewhere, only there, only here, nothing."""
    places = {
        "everywhere": ("pod-1", "pod-2", "remote-1"),
        "elsewhere": ("remote-1", "remote-2"),
        "on-the-node": ("node", "remote-1"),
        "nowhere": (),
    }
    policies: dict[str, dict[str, Any]] = {
        "cluster": {},
        "external": EXTERNAL_LOCAL,
        "all": ALL_LOCAL,
    }
    for number, (place, policy) in enumerate(product(places, policies), 10):
        name = f"{place}-{policy}"
        yield served(name, number, **policies[policy])
        yield from slices(world, name, *places[place])


def special_services(world: World) -> Iterator[Object]:
    """Source ranges, endpoints that leave, an address that two Services want."""
    for number, (policy, ranges) in enumerate(
        product(("Cluster", "Local"), (GUARDED, GUARDED_WITH_NODE)), 40
    ):
        name = f"guarded-{number}"
        yield served(
            name, number, externalTrafficPolicy=policy, loadBalancerSourceRanges=list(ranges)
        )
        yield from slices(world, name, "pod-2", "remote-1")
    leaving = {"ready": False, "serving": True, "terminating": True}
    yield served("leaving", 50, **ALL_LOCAL)
    yield from slices(world, "leaving", "pod-1", "remote-1", **leaving)
    yield served("leaving-here", 51, **EXTERNAL_LOCAL)
    yield from slices(world, "leaving-here", "pod-1", "pod-2", **leaving)
    yield from slices(world, "leaving-here", "remote-1")
    yield service(
        "rival",
        created="2026-06-01T00:00:00Z",
        cluster_ips=Addresses(52).cluster,
        externalIPs=list(Addresses(50).external),
        ports=[{"name": "tcp", "port": ASKED}],
    )
    yield from slices(world, "rival", "pod-3")


# --- asking both --------------------------------------------------------------------------------


class Question(NamedTuple):
    """Who asks which address."""

    who: str
    address: str
    port: int
    protocol: str


def destinations(proxy: Proxy) -> Iterator[tuple[str, int]]:
    """Every address of every Service, one port beside it, and addresses without a Service."""
    for item in proxy.state.services.values():
        for packed in (*item.cluster_ips, *item.external_ips, *item.load_balancer_ips):
            yield str(ipaddress.ip_address(packed)), ASKED
        for port in {p.node_port for p in item.ports if p.node_port}:
            for address in (NODE_V4, NODE_V6, EXTRA_V4, EXTRA_V6):
                yield address, port
    first = next(iter(proxy.state.services.values()))
    for packed in (*first.cluster_ips, *first.external_ips):
        yield str(ipaddress.ip_address(packed)), ASKED + 1
    yield from product(("10.96.99.99", "fd00:10:96::99", "203.0.113.250"), (ASKED,))
    yield from product((NODE_V4, NODE_V6), (SERVED, 29999))
    yield "10.244.1.12", SERVED


def questions(destinations: Iterable[tuple[str, int]]) -> list[Question]:
    """Everybody asks every destination, in TCP and UDP."""
    return [
        Question(who, address, port, protocol)
        for (address, port), who, protocol in product(
            dict.fromkeys(destinations), ASKERS, PROTOCOLS
        )
    ]


class Meeting(NamedTuple):
    """What a packet meets: an outcome of World.ask, who answered, and whether the server saw
    another source address or port than the asker's."""

    outcome: str
    server: str | None = None
    changed: bool = False


class Differing(NamedTuple):
    """A question whose packet and trace came to other ends."""

    question: Question
    predicted: set[Meeting]
    met: set[Meeting]


class Inquiry:
    """Asks the world and the trace, and compares."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.world = proxy.world
        self.elements: Elements = proxy.in_kernel()
        self.tables = {table.family: table for table in proxy.state.tables()}
        self.own = frozenset(
            ipaddress.ip_address(a).packed
            for a in (NODE_V4, NODE_V6, EXTRA_V4, EXTRA_V6, *GATEWAYS)
        )

    def source(self, question: Question) -> str:
        """The address that the kernel gives the question."""
        asker = self.world.hosts[question.who]
        six = ":" in question.address
        if question.who == "node" and ipaddress.ip_address(question.address).packed in self.own:
            return question.address
        return asker.ipv6 if six else asker.ipv4

    def trace(self, question: Question) -> Trace:
        pod = question.who.startswith("pod")
        interface = f"vethpod{question.who[-1]}" if pod else "eth0"
        from_node = question.who == "node"
        packet = Packet(
            ipaddress.ip_address(self.source(question)).packed,
            ipaddress.ip_address(question.address).packed,
            PROTOCOLS[question.protocol],
            question.port,
            "" if from_node else interface,
            from_node,
            self.own,
        )
        family = 6 if ":" in question.address else 4
        return trace(self.tables[family], self.elements, packet)

    def meet(self, question: Question, timeout: float) -> Meeting:
        """What the packet meets. Masquerading draws the port (fully-random), so it shows for the
        node's own packets too."""
        port = next(SOURCE_PORTS)
        answer = self.world.ask(
            question.who,
            question.address,
            question.port,
            "udp" if question.protocol == "udp" else "tcp",
            timeout=timeout,
            source_port=port,
        )
        changed = (answer.client, answer.client_port) != (self.source(question), port)
        return Meeting(answer.outcome, answer.server, changed and answer.outcome == "answered")

    def host(self, target: bytes) -> str:
        address = address_text(address_of(target))
        assert port_of(target) == SERVED
        found = [h.name for h in self.world.hosts.values() if address in (h.ipv4, h.ipv6)]
        return found[0]

    def expected(self, question: Question, branch: Branch) -> Meeting:
        """What one branch of a trace leads to."""
        match branch.end:
            case End.SENT:
                server, changed = self.host(branch.target), branch.masquerade is not Masquerade.NO
                # remote pods answer a client on the fabric past the node, which knows no answer
                # from there: the World's way to show that something should be masqueraded
                if server.startswith("remote") and question.who in OUTSIDE and not changed:
                    return Meeting("silent")
                return Meeting("answered", server, changed)
            case End.DROPPED:
                return Meeting("silent")
            case End.REFUSED:
                return Meeting("refused")
            case End.PASSED:
                return self.untouched(question)

    def untouched(self, question: Question) -> Meeting:
        """What the machines answer without any rule."""
        packed = ipaddress.ip_address(question.address).packed
        listening = question.port == SERVED
        if packed in self.own:
            return Meeting("answered", "node") if listening else Meeting("refused")
        for host in self.world.hosts.values():
            if question.address in (host.ipv4, host.ipv6):
                return Meeting("answered", host.name)
        return Meeting("silent")

    def compare(self, question: Question) -> Differing | None:
        branches = self.trace(question).branches
        predicted = {self.expected(question, branch) for branch in branches}
        met = set()
        silent = [meeting.outcome == "silent" for meeting in predicted]
        timeout = SILENCE if all(silent) else MIXED if any(silent) else PATIENCE
        for _ in range(ENOUGH if len(predicted) > 1 else 3):
            met.add(self.meet(question, timeout))
            if timeout == SILENCE or met - predicted or (met == predicted and len(predicted) > 1):
                break
        return None if met == predicted else Differing(question, predicted, met)

    def differing(self, questions: Sequence[Question]) -> list[Differing]:
        """The questions whose packets and traces come to other ends, each time."""
        assert questions
        with ThreadPoolExecutor(24) as pool:
            doubtful = [found for found in pool.map(self.compare, questions) if found]
        # Masquerading draws ports, and may have drawn the source port of a packet of the node:
        # then the kernel gives that packet another port. Asked alone, it keeps its own.
        if len(doubtful) > MOST_DOUBTFUL:
            return doubtful
        return [again for found in doubtful if (again := self.compare_alone(found.question))]

    def compare_alone(self, question: Question) -> Differing | None:
        forget_connections(self.world)
        return self.compare(question)


def test_every_kind_policy_and_emptiness(trace_proxy: Proxy) -> None:
    trace_proxy.put(*plain_services(trace_proxy.world))
    trace_proxy.check()
    assert Inquiry(trace_proxy).differing(questions(destinations(trace_proxy))) == []


def test_guarded_leaving_and_contested(trace_proxy: Proxy) -> None:
    trace_proxy.put(*special_services(trace_proxy.world))
    trace_proxy.check()
    assert Inquiry(trace_proxy).differing(questions(destinations(trace_proxy))) == []


@pytest.mark.parametrize("policy", ["Cluster", "Local"])
def test_a_sticky_client_stays_where_the_trace_says(trace_proxy: Proxy, policy: str) -> None:
    world, kernel, at = trace_proxy.world, trace_proxy.kernel, Addresses(60)
    trace_proxy.put(
        served("sticky", 60, sessionAffinity="ClientIP", externalTrafficPolicy=policy),
        *slices(world, "sticky", "pod-1", "pod-2", "remote-1"),
    )
    asked = questions(
        [
            *product((*at.cluster, *at.external), (ASKED,)),
            *product((NODE_V4, NODE_V6), (at.node_port,)),
        ]
    )
    inquiry = Inquiry(trace_proxy)
    unknown = {question: inquiry.trace(question) for question in asked}
    with ThreadPoolExecutor(24) as pool:
        first = list(pool.map(lambda question: inquiry.meet(question, MIXED), asked))

    affinity = [SETS[family].affinity for family in FAMILIES]
    inquiry.elements = {**inquiry.elements, **{s: kernel.elements(s) for s in affinity}}
    for question, meeting in zip(asked, first, strict=True):
        (branch,) = inquiry.trace(question).branches
        assert branch.target in unknown[question].targets
        assert branch.remembered == 10800
        assert inquiry.expected(question, branch)[:2] == meeting[:2], question
    assert inquiry.differing(asked) == []
