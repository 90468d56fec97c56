"""UDP flows that clients keep alive with one socket, while endpoints are added and removed.

A client here never closes its socket, so conntrack sees one flow for as long as it lives: the
same endpoint answers, or none, until the entry is deleted. It does not connect its socket
either: an ICMP error does not stop it, as it does not stop a resolver.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import structlog

from agent.kernel.conntrack import Conntrack, decode
from agent.kernel.flows import FlowCleaner
from agent.kernel.sysctl import ConntrackSettings, apply
from lab.world import World
from rules.events import Upsert
from rules.netlink.attributes import attributes
from rules.objects import EndpointSlice, Service
from rules.stale_flows import Flow, Look
from rules.state import State
from rules.transaction import Transaction
from tests.kernel.agent import Agent, write
from tests.kernel.namespaces import notifications
from tests.kernel.proxy import Proxy
from tests.manifest import (
    endpoint,
    endpoint_slice,
    node,
    service,
    service_cidr,
    service_document,
    slice_document,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces")

PORT, NODE_PORT = 53, 30053
_NFNLGRP_CONNTRACK_DESTROY = 3
PORTS = [{"name": "dns", "port": PORT, "protocol": "UDP", "nodePort": NODE_PORT}]
TARGETS = [{"name": "dns", "port": 8080, "protocol": "UDP"}]
PODS = ("pod-1", "pod-2", "remote-1")
VIP = {4: "10.96.0.10", 6: "fd00:10:96::10"}
EXTERNAL = {4: "203.0.113.1", 6: "2001:db8::1"}
NODE = {4: "172.31.0.2", 6: "fd00:172:31::2"}

# who asks, and at which address and port
WAYS = {
    "cluster IP": ("pod-3", VIP, PORT),
    "external IP": ("client", EXTERNAL, PORT),
    "node port": ("client", NODE, NODE_PORT),
    "cluster IP, from the node": ("node", VIP, PORT),
}

both_families = pytest.mark.parametrize("family", [4, 6])
every_way = pytest.mark.parametrize("way", list(WAYS))


class Client:
    """One socket on a host. Each question is one datagram."""

    def __init__(self, world: World, host: str, family: int) -> None:
        number = socket.AF_INET if family == 4 else socket.AF_INET6
        self._socket = world.socket(host, number, socket.SOCK_DGRAM)
        self._socket.bind(("", 0))
        self.port: int = self._socket.getsockname()[1]

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(self, address: str, port: int, patience: float = 1.0) -> str | None:
        """The name of the host that answers one datagram, None if none does in time."""
        # what is rejected on the very host that sends is EPERM, at once
        with contextlib.suppress(PermissionError):
            self._socket.sendto(b"who\n", (address, port))
        self._socket.settimeout(patience)
        try:
            return self._socket.recv(512).decode().split()[0]
        except TimeoutError:
            return None


class NotedConntrack(Conntrack):
    """Notes when stale flows have been deleted, and how many."""

    def __init__(self) -> None:
        super().__init__()
        self.done = threading.Event()
        self.deleted: dict[int, int] = {}

    def forget(self, claims: Any, is_stale: Any) -> dict[int, int]:
        self.deleted = super().forget(claims, is_stale)
        self.done.set()
        return self.deleted


class UdpProxy(Proxy):
    """As the agent's loop does it: a worker deletes stale flows behind the transaction. The next
    step waits for it."""

    def __init__(self, world: World) -> None:
        self.deleted: dict[int, int] = {}
        self._everything = False
        self.conntrack = world.run("node", NotedConntrack)
        self._failures: list[Exception] = []
        self._cleaner = FlowCleaner(
            structlog.get_logger(),
            lambda _, error: self._failures.append(error),
            lambda *_: None,
            lambda: self.conntrack,
        )
        world.run("node", self._cleaner.start)
        super().__init__(world)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._cleaner.stop()
        assert not self._failures

    def _send(self, transaction: Transaction) -> Transaction:
        if self._everything:
            self._cleaner.expect(self.state.udp_serving(), everything=True)
        else:
            self._cleaner.expect(transaction.change.udp_serving)
        sent = super()._send(transaction)
        formerly = sent.change.stale_udp
        self.deleted = {}
        if formerly or self._everything:
            self.conntrack.done.clear()
            addresses = self.state.node_port_addresses()
            self._cleaner.look(Look(formerly, addresses, self._everything))
            assert self.conntrack.done.wait(30)
            self.deleted = self.conntrack.deleted
        return sent

    def resync(self) -> Transaction:
        self._everything = True
        try:
            return super().resync()
        finally:
            self._everything = False

    def flow(self, client: Client, family: int) -> Flow | None:
        """The client's flow, if conntrack has one."""
        flows = [
            f
            for f in self.conntrack.dump_udp(family)
            if int.from_bytes(f.source[-4:-2], "big") == client.port
        ]
        assert len(flows) <= 1
        return flows[0] if flows else None

    def identity(self, client: Client, family: int) -> bytes:
        """The kernel's id for the client's flow."""
        flow = self.flow(client, family)
        assert flow
        return dict(attributes(flow.entry))[12]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as built:
        for host in PODS:
            built.serve(host, 8080, "udp")
        yield built


@pytest.fixture
def proxy(world: World) -> Iterator[UdpProxy]:
    built = UdpProxy(world)
    with built:
        built.put(node(), service_cidr("10.96.0.0/16", "fd00:10:96::/112"))
        yield built
        built.kernel.remove()
        for family in (4, 6):
            built.conntrack.delete(built.conntrack.dump_udp(family))


def dns(**spec: Any) -> Service:
    spec = {"type": "NodePort", "externalIPs": list(EXTERNAL.values())} | spec
    return service("dns", ports=PORTS, **spec)


def slices(world: World, *pods: str, leaving: Sequence[str] = ()) -> list[EndpointSlice]:
    """The slices of both families; pods that are `leaving` serve while they terminate."""
    return [
        endpoint_slice(
            "dns",
            [
                endpoint(
                    world.hosts[pod].address(number),
                    node="node-1" if pod.startswith("pod") else "node-2",
                    ready=pod not in leaving,
                    serving=True,
                    terminating=pod in leaving,
                )
                for pod in (*pods, *leaving)
            ],
            ports=TARGETS,
            family=name,
        )
        for number, name in ((socket.AF_INET, "IPv4"), (socket.AF_INET6, "IPv6"))
    ]


@both_families
@every_way
def test_a_client_of_a_removed_endpoint_reaches_another_at_once(
    world: World, proxy: UdpProxy, way: str, family: int
) -> None:
    host, addresses, port = WAYS[way]
    proxy.put(dns(), *slices(world, *PODS))
    with Client(world, host, family) as client:
        first = client.ask(addresses[family], port)
        assert first in PODS
        assert {client.ask(addresses[family], port) for _ in range(5)} == {first}
        others = [pod for pod in PODS if pod != first]
        proxy.put(*slices(world, *others))
        assert proxy.deleted == {family: 1}
        assert client.ask(addresses[family], port) in others


@both_families
@every_way
def test_nothing_is_deleted_while_an_endpoint_serves(
    world: World, proxy: UdpProxy, way: str, family: int
) -> None:
    host, addresses, port = WAYS[way]
    proxy.put(dns(), *slices(world, *PODS))
    with Client(world, host, family) as client:
        mine = client.ask(addresses[family], port)
        assert mine
        identity = proxy.identity(client, family)
        others = [pod for pod in PODS if pod != mine]
        for change in (
            slices(world, mine, others[0]),  # another one is removed
            slices(world, mine, *others),  # and added
            slices(world, *others, leaving=[mine]),  # this one is leaving
            [dns(externalTrafficPolicy="Local", internalTrafficPolicy="Local")],
            [dns(sessionAffinity="ClientIP")],
        ):
            proxy.put(*change)
            assert proxy.deleted == {}
            assert client.ask(addresses[family], port) == mine
            assert proxy.identity(client, family) == identity
        # it has left, which changes no list any more
        sent = proxy.put(*slices(world, *others))
        assert not sent.change
        assert proxy.deleted == {family: 1}


@both_families
def test_a_client_keeps_its_flow_over_a_restart(world: World, proxy: UdpProxy, family: int) -> None:
    proxy.put(dns(), *slices(world, *PODS))
    with contextlib.ExitStack() as stack:
        flows = []
        for host, addresses, port in WAYS.values():
            client = stack.enter_context(Client(world, host, family))
            server = client.ask(addresses[family], port)
            assert server
            identity = proxy.identity(client, family)
            flows.append((client, addresses[family], port, server, identity))
        proxy.state = _restarted(proxy.state)
        proxy.resync()
        assert proxy.deleted == {}
        for client, address, port, server, identity in flows:
            assert client.ask(address, port) == server
            assert proxy.identity(client, family) == identity


@both_families
def test_only_flows_that_became_stale_during_a_restart_are_deleted(
    world: World, proxy: UdpProxy, family: int
) -> None:
    proxy.put(dns(), *slices(world, *PODS))
    with contextlib.ExitStack() as stack:
        servers = {}
        for _ in range(12):
            client = stack.enter_context(Client(world, "pod-3", family))
            servers[client] = client.ask(VIP[family], PORT)
        identities = {c: proxy.identity(c, family) for c in servers}
        gone = servers[next(iter(servers))]
        left = [pod for pod in PODS if pod != gone]
        proxy.state = _restarted(proxy.state, slices(world, *left))
        proxy.resync()
        assert proxy.deleted == {family: list(servers.values()).count(gone)}
        for client, server in servers.items():
            again = client.ask(VIP[family], PORT)
            assert again in left if server == gone else again == server
            if server != gone:
                assert proxy.identity(client, family) == identities[client]


def _restarted(before: State, changed: Sequence[EndpointSlice] = ()) -> State:
    """The state of a new agent that has received everything and programmed nothing."""
    after = State(before.options)
    assert before.node
    after.services = dict(before.services)
    after.apply([Upsert(before.node), *map(Upsert, before.local.service_cidrs.values())])
    after.slices = {n: tuple(changed) or o for n, o in before.slices.items()}
    after._dirty = set(after.services)
    return after


@both_families
@every_way
def test_a_flow_begun_without_endpoints_recovers_when_one_appears(
    world: World, proxy: UdpProxy, way: str, family: int
) -> None:
    host, addresses, port = WAYS[way]
    proxy.put(dns(), *slices(world))
    with Client(world, host, family) as client:
        assert client.ask(addresses[family], port, patience=0.1) is None
        assert client.ask(addresses[family], port, patience=0.1) is None
        assert proxy.flow(client, family) is None  # refused before conntrack keeps it
        proxy.put(*slices(world, "pod-1"))
        assert client.ask(addresses[family], port) == "pod-1"
        # the last one is removed, and added again
        proxy.put(*slices(world))
        assert proxy.deleted == {family: 1}
        assert client.ask(addresses[family], port, patience=0.1) is None
        proxy.put(*slices(world, "pod-2"))
        assert client.ask(addresses[family], port) == "pod-2"


@both_families
@pytest.mark.parametrize("way", ["external IP", "node port"])
@pytest.mark.parametrize("restart", [False, True], ids=["running", "restart"])
def test_a_flow_begun_before_the_service_recovers(
    world: World, proxy: UdpProxy, way: str, family: int, restart: bool
) -> None:
    """Nothing refuses it, so conntrack keeps it untranslated."""
    host, addresses, port = WAYS[way]
    with Client(world, host, family) as client:
        assert client.ask(addresses[family], port, patience=0.1) is None
        flow = proxy.flow(client, family)
        assert flow
        assert flow.target == flow.destination
        if restart:
            proxy.state.services[dns().name] = dns()
            proxy.state.slices[dns().name] = tuple(slices(world, "pod-1"))
            proxy.state._dirty.add(dns().name)
            proxy.resync()
        else:
            proxy.put(dns())
            assert proxy.deleted == {}
            proxy.put(*slices(world, "pod-1"))
        assert proxy.deleted == {family: 1}
        assert client.ask(addresses[family], port) == "pod-1"


@both_families
@pytest.mark.parametrize("restart", [False, True], ids=["running", "restart"])
def test_flows_of_a_deleted_service_go_and_no_others(
    world: World, proxy: UdpProxy, family: int, restart: bool
) -> None:
    other = service("other", ports=PORTS, cluster_ips=["10.96.0.11", "fd00:10:96::11"])
    others = [
        endpoint_slice(
            "other",
            [endpoint(world.hosts["pod-1"].address(number))],
            ports=TARGETS,
            family=name,
        )
        for number, name in ((socket.AF_INET, "IPv4"), (socket.AF_INET6, "IPv6"))
    ]
    proxy.put(dns(), *slices(world, *PODS), other, *others)
    other_vip = {4: "10.96.0.11", 6: "fd00:10:96::11"}[family]
    direct = world.hosts["pod-2"].address(socket.AF_INET if family == 4 else socket.AF_INET6)
    with contextlib.ExitStack() as stack:
        gone, kept, straight = (
            stack.enter_context(Client(world, "pod-3", family)) for _ in range(3)
        )
        assert gone.ask(VIP[family], PORT)
        assert kept.ask(other_vip, PORT) == "pod-1"
        assert straight.ask(direct, 8080) == "pod-2"
        identities = [proxy.identity(c, family) for c in (kept, straight)]
        if restart:
            after = _restarted(proxy.state)
            del after.services[dns().name], after.slices[dns().name]
            after._dirty = set(after.services)
            proxy.state = after
            proxy.resync()
        else:
            proxy.delete(dns(), *slices(world))
        assert proxy.deleted == {family: 1}
        assert proxy.flow(gone, family) is None
        assert gone.ask(VIP[family], PORT, patience=0.1) is None
        assert [proxy.identity(c, family) for c in (kept, straight)] == identities


@both_families
def test_an_endpoint_that_leaves_the_local_list_keeps_its_flows(
    world: World, proxy: UdpProxy, family: int
) -> None:
    local = dns(externalTrafficPolicy="Local")
    # none is ready: terminating ones are used instead, here those of this node, inside all
    proxy.put(local, *slices(world, leaving=["pod-1", "remote-1"]))
    with Client(world, "client", family) as client:
        assert client.ask(EXTERNAL[family], PORT) == "pod-1"
        identity = proxy.identity(client, family)
        proxy.put(*slices(world, "pod-2", leaving=["pod-1", "remote-1"]))
        assert client.ask(EXTERNAL[family], PORT) == "pod-1"
        assert proxy.identity(client, family) == identity
        # and if nothing local is left at all, new flows are dropped but this one continues
        moved = [
            endpoint_slice(
                "dns",
                [endpoint(world.hosts["pod-1"].address(number), node="node-2")],
                ports=TARGETS,
                family=name,
            )
            for number, name in ((socket.AF_INET, "IPv4"), (socket.AF_INET6, "IPv6"))
        ]
        proxy.put(*moved)
        assert client.ask(EXTERNAL[family], PORT) == "pod-1"
        assert proxy.identity(client, family) == identity
        with Client(world, "client", family) as late:
            assert late.ask(EXTERNAL[family], PORT, patience=0.1) is None
            assert proxy.flow(late, family) is None
        proxy.put(*slices(world, "pod-2"))
        assert proxy.deleted == {family: 1}
        assert client.ask(EXTERNAL[family], PORT) == "pod-2"


@both_families
def test_many_claims_at_once_take_one_dump(world: World, proxy: UdpProxy, family: int) -> None:
    ports = [{"name": f"p{n}", "port": 1000 + n, "protocol": "UDP"} for n in range(20)]
    targets = [{"name": f"p{n}", "port": 8080, "protocol": "UDP"} for n in range(20)]
    number, name = (socket.AF_INET, "IPv4") if family == 4 else (socket.AF_INET6, "IPv6")

    def pod(host: str) -> EndpointSlice:
        address = world.hosts[host].address(number)
        return endpoint_slice("wide", [endpoint(address)], ports=targets, family=name)

    proxy.put(service("wide", ports=ports), pod("pod-1"))
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(world, "pod-3", family)) for _ in range(20)]
        asked = list(zip(clients, range(1000, 1020), strict=True))
        assert {c.ask(VIP[family], port) for c, port in asked} == {"pod-1"}
        proxy.put(pod("pod-2"))
        assert proxy.deleted == {family: 20}
        assert {c.ask(VIP[family], port) for c, port in asked} == {"pod-2"}


@both_families
def test_a_flow_that_leads_elsewhere_meanwhile_is_not_deleted(
    world: World, proxy: UdpProxy, family: int
) -> None:
    """Its tuple, and mostly its id, are those of the entry that was read."""
    proxy.put(dns(), *slices(world, "pod-1"))
    with Client(world, "pod-3", family) as client:
        assert client.ask(VIP[family], PORT) == "pod-1"
        read = proxy.flow(client, family)
        assert read
        proxy.put(*slices(world, "pod-2"))
        assert proxy.conntrack.delete([read]) == 0
        assert client.ask(VIP[family], PORT) == "pod-2"
        assert proxy.conntrack.delete([read]) == 0
        assert proxy.flow(client, family)


class Destroyed:
    """The UDP entries whose end conntrack reports, from now on."""

    def __init__(self, world: World) -> None:
        self._socket = world.run("node", notifications, _NFNLGRP_CONNTRACK_DESTROY)

    def __enter__(self) -> Destroyed:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def flows(self) -> list[Flow]:
        """Those that have ended since it was asked last."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                data = self._socket.recv(1 << 16)
                found.append(decode(data, 16, len(data)))
        return [flow for flow in found if flow]


def test_over_a_restart_of_the_agent_itself(world: World, tmp_path: Path) -> None:
    place = tmp_path / "cluster.json"

    def put(*pods: str) -> None:
        addresses = [endpoint(world.hosts[pod].ipv4) for pod in pods]
        write(
            place,
            service_document("dns", ports=PORTS, cluster_ips=[VIP[4]]),
            slice_document("dns", addresses, ports=TARGETS, family="IPv4"),
        )

    put("pod-1", "pod-2")
    with contextlib.ExitStack() as stack:
        ended = stack.enter_context(Destroyed(world))
        agent = stack.enter_context(Agent(world, place))
        agent.wait("programmed")
        clients = {pod: _client_of(pod, world, stack) for pod in ("pod-1", "pod-2")}
        agent.kill()
        first = agent.restart()
        agent.wait("verified", since=first)
        assert agent.terminate() == 0  # so it has done all that it does at a start
        assert ended.flows() == []
        assert all(c.ask(VIP[4], PORT) == pod for pod, c in clients.items())

        put("pod-2")
        first = agent.restart()
        line = agent.wait("stale_flows_deleted", since=first)
        flows = ended.flows()
        assert (line["family"], line["flows"]) == (4, len(flows))
        assert {f.target[:4] for f in flows} == {socket.inet_aton(world.hosts["pod-1"].ipv4)}
        assert [c.ask(VIP[4], PORT) for c in clients.values()] == ["pod-2", "pod-2"]

        first = len(agent.lines)
        put("pod-1")
        agent.wait("stale_flows_deleted", since=first)
        assert [c.ask(VIP[4], PORT) for c in clients.values()] == ["pod-1", "pod-1"]
        assert not [line for line in agent.lines if line.get("level") == "warning"]


def _client_of(pod: str, world: World, stack: contextlib.ExitStack) -> Client:
    """A client whose flow leads to this pod."""
    while True:
        client = stack.enter_context(Client(world, "pod-3", 4))
        if client.ask(VIP[4], PORT) == pod:
            return client


def test_settings_in_a_namespace_that_is_not_the_machines(world: World) -> None:
    """The most connections are the machine's affair; the rest can be set."""
    now = int(Path("/proc/sys/net/netfilter/nf_conntrack_max").read_text())
    settings = ConntrackSettings(max_per_core=now + 1, min=0)  # below what the table is made for
    outcome = world.run("elsewhere", lambda: apply(settings, cores=1))
    assert list(outcome.failed) == [f"nf_conntrack_max={now + 1}"]
    assert outcome.changed.keys() <= {
        "nf_conntrack_tcp_timeout_established",
        "nf_conntrack_tcp_timeout_close_wait",
    }
    assert int(Path("/proc/sys/net/netfilter/nf_conntrack_max").read_text()) == now
