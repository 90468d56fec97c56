"""A world with servers, sliceproxy on its node, and short ways to ask who answers where."""

from __future__ import annotations

import ipaddress
import itertools
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import pytest
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTSocket

from agent.config.settings import Settings
from lab.world import Answer, World
from rules.objects import EndpointSlice, Service
from tests import manifest
from tests.kernel.proxy import Proxy

TARGET_PORT = 8080
NODE_PORT = 30080
CLUSTER_CIDR = "10.244.0.0/16,fd00:10:244::/48"
PROTOCOLS = ("tcp", "udp")
CLIENTS = ("pod-3", "node", "client")
"""One from each place: a pod of the node that is no endpoint, the node, and outside."""

SERVICE_PORTS = (
    {"name": "web", "port": 80, "nodePort": NODE_PORT},
    {"name": "dns", "port": 80, "nodePort": NODE_PORT, "protocol": "UDP"},
)
SLICE_PORTS = (
    {"name": "web", "port": TARGET_PORT},
    {"name": "dns", "port": TARGET_PORT, "protocol": "UDP"},
)
ADDRESSES = {
    4: {
        "cluster_ip": "10.96.0.10",
        "other_cluster_ip": "10.96.0.20",
        "unallocated_ip": "10.96.0.77",
        "external_ip": "203.0.113.1",
        "balancer_ip": "203.0.113.2",
        "proxied_ip": "203.0.113.3",
        "second_ip": "198.51.100.2",
    },
    6: {
        "cluster_ip": "fd00:10:96::10",
        "other_cluster_ip": "fd00:10:96::20",
        "unallocated_ip": "fd00:10:96::77",
        "external_ip": "2001:db8::1",
        "balancer_ip": "2001:db8::2",
        "proxied_ip": "2001:db8::3",
        "second_ip": "fd80:198::2",
    },
}
# Below the kernel's own choice, and no port twice in a test: a UDP flow that conntrack remembers
# is not sent through the rules again. Above the agent's own ports.
_source_ports = itertools.cycle(range(11000, 29000))

TRIES = 12
"""So many connections show that no other endpoint answers; more follow until all expected have."""
MOST_TRIES = 400
# A refusal arrives at once, or a second later when TCP repeats its SYN; the latter is not enough.
REFUSAL_SECONDS = 0.9
SILENCE_SECONDS = 0.2
ANSWER_SECONDS = 5.0


class StockedWorld(World):
    """Makes sockets by the dozen: entering a namespace takes longer than asking."""

    def __init__(self, **plan: Any) -> None:
        super().__init__(**plan)
        self._stock: dict[tuple[str, int, int], list[socket.socket]] = {}

    def socket(self, host: str, family: int, kind: int) -> socket.socket:
        stock = self._stock.setdefault((host, family, kind), [])
        while True:
            with suppress(IndexError):  # other threads ask too
                return stock.pop()
            stock.extend(self.run(host, lambda: [socket.socket(family, kind) for _ in range(12)]))

    def __exit__(self, *exception: Any) -> None:
        for stock in self._stock.values():
            for unused in stock:
                unused.close()
        super().__exit__(*exception)


class Net:
    """The world as one address family sees it. See ADDRESSES for its attributes."""

    cluster_ip: str
    other_cluster_ip: str
    unallocated_ip: str
    external_ip: str
    balancer_ip: str
    proxied_ip: str
    second_ip: str

    def __init__(self, world: World, family: int) -> None:
        self.world = world
        self.family = family
        vars(self).update(ADDRESSES[family])

    def address(self, host: str) -> str:
        found = self.world.hosts[host]
        return found.ipv6 if self.family == 6 else found.ipv4

    def packed(self, address: str) -> bytes:
        return ipaddress.ip_address(address).packed

    def at(self, frontend: str) -> tuple[str, int]:
        """Where `service` answers: at its "cluster-ip", "external-ip", "balancer-ip", or
        "node-port"."""
        if frontend == "node-port":
            return self.address("node"), NODE_PORT
        return getattr(self, frontend.replace("-", "_")), 80

    # objects

    def service(self, name: str = "web", **fields: Any) -> Service:
        """A Service with every kind of address, for TCP and UDP. `fields` are the manifest's."""
        fields = {
            "cluster_ips": [self.cluster_ip],
            "ports": SERVICE_PORTS,
            "type": "LoadBalancer",
            "externalIPs": [self.external_ip],
            "ingress": [{"ip": self.balancer_ip}],
            **fields,
        }
        return manifest.service(name, **fields)

    def endpoint(self, host: str, **fields: Any) -> dict[str, Any]:
        """The pod as an endpoint; pods named pod-* are on the node."""
        node = "node-2" if host.startswith("remote") else "node-1"
        return manifest.endpoint(self.address(host), **{"node": node, **fields})

    def slice(
        self, *hosts: str | dict[str, Any], service: str = "web", **fields: Any
    ) -> EndpointSlice:
        """A slice with these endpoints: pods' names, or what `endpoint` returned."""
        endpoints = [self.endpoint(h) if isinstance(h, str) else h for h in hosts]
        fields = {"ports": SLICE_PORTS, "family": f"IPv{self.family}", **fields}
        return manifest.endpoint_slice(service, endpoints, **fields)

    # packets

    def ask(
        self,
        client: str,
        where: tuple[str, int],
        protocol: str = "tcp",
        *,
        source: str | None = None,
        timeout: float = ANSWER_SECONDS,
    ) -> Answer:
        """One connection, from a source port that was not used before."""
        return self.world.ask(
            client,
            *where,
            protocol,
            timeout=timeout,
            source_port=next(_source_ports),
            source_address=source,
        )

    def server(self, client: str, where: tuple[str, int], protocol: str = "tcp", **how: Any) -> str:
        """The endpoint that answered one connection."""
        answer = self.ask(client, where, protocol, **how)
        assert answer.outcome == "answered", (client, where, protocol)
        return answer.server

    def answers(
        self,
        client: str,
        where: tuple[str, int],
        protocol: str = "tcp",
        *,
        enough: int = 1,
        **how: Any,
    ) -> dict[str, set[str]]:
        """Who answers many connections, and the client addresses that each of them saw.

        Asks on until `enough` endpoints have answered.
        """
        seen: dict[str, set[str]] = {}
        for number in range(MOST_TRIES):
            if number >= TRIES and len(seen) >= enough:
                break
            answer = self.ask(client, where, protocol, **how)
            assert answer.outcome == "answered", (client, where, protocol, answer)
            seen.setdefault(answer.server, set()).add(answer.client)
        return seen

    def expect(
        self,
        client: str,
        where: tuple[str, int],
        by: Iterable[str],
        *,
        seen_as: str | None,
        protocols: Sequence[str] = PROTOCOLS,
        **how: Any,
    ) -> None:
        """All endpoints in `by` answer the client, and no other; they see the address of the host
        `seen_as` (None: any address)."""
        by = set(by)
        for protocol in protocols:
            answers = self.answers(client, where, protocol, enough=len(by), **how)
            subject = (client, where, protocol)
            assert set(answers) == by, subject
            if seen_as is not None:
                assert answers == {host: {self.address(seen_as)} for host in by}, subject

    def expect_refusal(self, where: tuple[str, int], *clients: str, **how: Any) -> None:
        """Every client is refused, over both protocols, before TCP would repeat its SYN."""
        self._expect_outcome("refused", where, clients, {"timeout": REFUSAL_SECONDS, **how})

    def expect_silence(self, where: tuple[str, int], *clients: str, **how: Any) -> None:
        """No client gets any answer, over both protocols."""
        self._expect_outcome("silent", where, clients, {"timeout": SILENCE_SECONDS, **how})

    def _expect_outcome(
        self, outcome: str, where: tuple[str, int], clients: Sequence[str], how: Mapping[str, Any]
    ) -> None:
        asked = list(itertools.product(clients or CLIENTS, PROTOCOLS))
        with ThreadPoolExecutor(len(asked)) as pool:
            outcomes = list(pool.map(lambda a: self.ask(a[0], where, a[1], **how).outcome, asked))
        assert dict(zip(asked, outcomes, strict=True)) == dict.fromkeys(asked, outcome), where


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """Servers of both protocols on TARGET_PORT of every pod, near and far, and of the node."""
    if os.geteuid() != 0:
        pytest.skip("needs root to make network namespaces and nftables tables in them")
    with StockedWorld(
        pods=6, remotes=3, outside={"crowd": 150}, prefix="sliceproxy-kernel"
    ) as built:
        for host in built.hosts:
            if host.startswith(("pod-", "remote-")) or host == "node":
                for protocol in PROTOCOLS:
                    built.serve(host, TARGET_PORT, protocol)
        yield built


@pytest.fixture(params=[4, 6], ids=["ipv4", "ipv6"])
def net(world: World, request: pytest.FixtureRequest) -> Net:
    """The world, once per family."""
    return Net(world, request.param)


@pytest.fixture
def proxy(world: World) -> Iterator[Callable[..., Proxy]]:
    """Starts sliceproxy on the node with options by keyword; the cluster has a Node and
    ServiceCIDRs, but no Service yet. Its tables and what conntrack knows vanish after the test."""
    with ExitStack() as stack:

        def start(**flags: Any) -> Proxy:
            started = Proxy(world, own=True, options=Settings(node="node-1", **flags).options())
            stack.enter_context(started)
            stack.callback(started.kernel.remove)
            started.put(manifest.node(), manifest.service_cidr("10.96.0.0/16", "fd00:10:96::/112"))
            return started

        yield start
    world.run("node", _flush_conntrack)


def _flush_conntrack() -> None:
    with NFCTSocket() as conntrack:
        conntrack.flush()


CROWD = 24
"""So many clients are a `Crowd`."""


class Crowd:
    """Many clients outside: addresses of one machine."""

    def __init__(self, net: Net, addresses: list[str]) -> None:
        self.net = net
        self.addresses = addresses

    def ask(self, where: tuple[str, int], protocol: str = "tcp") -> dict[str, str]:
        """Who answers each client."""
        return {
            address: self.net.server("crowd", where, protocol, source=address)
            for address in self.addresses
        }


@pytest.fixture(scope="module")
def crowd_addresses(world: World) -> Iterator[dict[int, list[str]]]:
    addresses = {
        4: [f"172.31.0.{number}" for number in range(110, 110 + CROWD)],
        6: [f"fd00:172:31::c:{number}" for number in range(1, 1 + CROWD)],
    }
    both = [*addresses[4], *addresses[6]]
    for address in both:
        world.add_address("crowd", address, "eth0")
    yield addresses
    for address in both:
        world.remove_address("crowd", address, "eth0")


@pytest.fixture
def crowd(net: Net, crowd_addresses: dict[int, list[str]]) -> Crowd:
    return Crowd(net, crowd_addresses[net.family])
