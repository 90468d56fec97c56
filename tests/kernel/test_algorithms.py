"""Algorithms, weights and drain with real packets, in both families."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest

from lab.world import World
from rules.events import Upsert
from rules.objects import TCP, UDP, Service
from rules.state import State
from rules.target import address_of
from rules.trace import End, Packet, trace
from tests import manifest
from tests.kernel.conftest import CLUSTER_CIDR, CROWD, PROTOCOLS, SILENCE_SECONDS, Crowd, Net
from tests.kernel.proxy import Proxy
from tests.kernel.test_packets import Conversations, both_protocols

Start = Callable[..., Proxy]

ENDPOINTS = ("pod-1", "pod-2", "pod-4", "remote-1")
FRONTENDS = ("cluster-ip", "external-ip", "balancer-ip", "node-port")
NUMBERS = {"tcp": TCP, "udp": UDP}
CONNECTIONS = 800


def asks(
    net: Net, algorithm: str, *, fields: dict[str, Any] | None = None, **texts: str
) -> Service:
    """A Service that asks for an algorithm; `texts` are its weights and zone weights."""
    return net.service(annotations=manifest.balancing(algorithm, **texts), **(fields or {}))


def weights_text(net: Net, weights: Mapping[str, int]) -> str:
    return ",".join(f"{net.address(host)}={weight}" for host, weight in weights.items())


def chi_square(seen: Mapping[str, int], weights: Mapping[str, int]) -> float:
    """How far connections are from a distribution in proportion to the weights."""
    whole, total = sum(weights.values()), sum(seen.values())
    expected = {host: total * weight / whole for host, weight in weights.items()}
    return sum((seen.get(host, 0) - n) ** 2 / n for host, n in expected.items())


TOO_FAR = 25.0
"""Three endpoints have two degrees of freedom: random choices are as far once in 270,000 times."""


# --- weighted ------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("frontend", ["cluster-ip", "node-port"])
def test_connections_are_in_proportion_to_the_weights(
    proxy: Start, net: Net, frontend: str, protocol: str
) -> None:
    weights = {"pod-1": 5, "pod-2": 2, "remote-1": 1}
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(asks(net, "weighted", weights=weights_text(net, weights)), net.slice(*weights))
    seen = Counter(net.server("client", net.at(frontend), protocol) for _ in range(CONNECTIONS))
    assert chi_square(seen, weights) < TOO_FAR
    assert chi_square(seen, dict.fromkeys(weights, 1)) > 4 * TOO_FAR, "the test can fail"


def test_weights_of_a_slice_and_of_zones_count(proxy: Start, net: Net) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(
        asks(net, "weighted", zone_weights="a=4,b=1"),
        net.slice(
            net.endpoint("pod-1", zone="a", pod="web-1"),
            net.endpoint("pod-2", zone="b", pod="web-2"),
            net.endpoint("remote-1", zone="b", pod="web-3"),
            annotations={"sliceproxy.io/weights": "web-3=7"},
        ),
    )
    seen = Counter(net.server("pod-3", net.at("cluster-ip"), "udp") for _ in range(CONNECTIONS))
    assert chi_square(seen, {"pod-1": 4, "pod-2": 1, "remote-1": 7}) < TOO_FAR


def test_without_an_algorithm_weights_have_no_effect(proxy: Start, net: Net) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    hosts = ("pod-1", "pod-2", "remote-1")
    weights = {"sliceproxy.io/weights": weights_text(net, dict.fromkeys(hosts[:2], 0))}
    p.put(net.service(annotations=weights), net.slice(*hosts, annotations=weights))
    seen = Counter(net.server("client", net.at("cluster-ip"), "udp") for _ in range(CONNECTIONS))
    assert chi_square(seen, dict.fromkeys(hosts, 1)) < TOO_FAR


def test_weights_may_change_while_connections_are_made(proxy: Start, net: Net) -> None:
    """Each connection during a hundred changes is answered, by one of the endpoints."""
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(asks(net, "weighted"), net.slice(*ENDPOINTS))
    for number in range(100):
        weights = {host: (number * (place + 3)) % 7 for place, host in enumerate(ENDPOINTS)}
        weights["pod-1"] = 1 + number % 50
        algorithm = ("weighted", "source-hash", "random")[number % 3]
        p.put(asks(net, algorithm, weights=weights_text(net, weights)))
        for protocol in PROTOCOLS:
            answered = net.server("client", net.at("cluster-ip"), protocol)
            assert algorithm == "random" or weights[answered]
    p.check()


def test_no_connection_is_lost_while_slots_are_replaced(proxy: Start, net: Net) -> None:
    """Packets between the look-up of a verdict and that of a slot meet tables that change."""
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(asks(net, "source-hash"), net.slice(*ENDPOINTS))
    where, stop = net.at("cluster-ip"), Event()
    lost: list[object] = []

    def connect(client: str, protocol: str) -> int:
        count = 0
        while not stop.is_set():
            answer = net.ask(client, where, protocol, timeout=0.9)
            count += 1
            if answer.outcome != "answered":
                lost.append((client, protocol, answer))
        return count

    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(connect, *a) for a in (("client", "tcp"), ("pod-3", "udp"))]
        try:
            for number in range(CHANGES):
                hosts = ENDPOINTS[number % 3 :]
                weights = weights_text(net, {ENDPOINTS[-1]: 1 + number % 9})
                algorithm = ("source-hash", "source-hash", "weighted", "random")[number % 4]
                p.put(asks(net, algorithm, weights=weights), net.slice(*hosts))
        finally:
            stop.set()
    assert sum(a.result() for a in asked) > CHANGES
    assert not lost
    p.check()


CHANGES = 200


# --- source-hash ---------------------------------------------------------------------------------


def predicted(
    p: Proxy, net: Net, clients: list[str], where: tuple[str, int], protocol: str
) -> dict[str, str]:
    """Where the trace says that each client is sent: the host."""
    (table,) = (t for t in p.state.tables() if t.family == net.family)
    elements = p.state.elements()
    hosts = {net.packed(net.address(host)): host for host in p.world.hosts}
    found = {}
    for client in clients:
        packet = Packet(net.packed(client), net.packed(where[0]), NUMBERS[protocol], where[1])
        (branch,) = trace(table, elements, packet).branches
        assert branch.end is End.SENT
        found[client] = hosts[address_of(branch.target)]
    return found


@pytest.mark.parametrize("policy", ["Cluster", "Local"])
@pytest.mark.parametrize("frontend", FRONTENDS)
def test_a_hash_of_the_clients_address_names_the_endpoint(
    proxy: Start, net: Net, crowd: Crowd, frontend: str, policy: str
) -> None:
    """As the trace computes it, and again with each connection."""
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(
        asks(net, "source-hash", fields={"externalTrafficPolicy": policy}),
        net.slice(*ENDPOINTS),
    )
    where = net.at(frontend)
    local = policy == "Local" and frontend != "cluster-ip"
    for protocol in PROTOCOLS:
        first = crowd.ask(where, protocol)
        assert first == predicted(p, net, crowd.addresses, where, protocol)
        assert first == crowd.ask(where, protocol)
        assert set(first.values()) == set(ENDPOINTS[:3] if local else ENDPOINTS)


def test_clients_on_the_node_have_an_endpoint_of_their_own_too(proxy: Start, net: Net) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(
        asks(net, "source-hash", fields={"externalTrafficPolicy": "Local"}), net.slice(*ENDPOINTS)
    )
    for client in ("pod-3", "pod-5", "node"):
        for frontend in FRONTENDS:
            servers = {net.server(client, net.at(frontend)) for _ in range(20)}
            assert len(servers) == 1, (client, frontend)


def test_a_client_has_the_same_endpoint_whatever_happened_before(
    proxy: Start, net: Net, crowd: Crowd
) -> None:
    """Endpoints are added and removed in another order, as on a node that started later."""
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(asks(net, "source-hash"), net.slice(*ENDPOINTS))
    first = crowd.ask(net.at("cluster-ip"), "udp")
    for hosts in ((), ("pod-6",), ("pod-6", "remote-2", "pod-4"), tuple(reversed(ENDPOINTS))):
        p.put(net.slice(*hosts))
    assert crowd.ask(net.at("cluster-ip"), "udp") == first


def test_few_clients_move_when_an_endpoint_is_removed_or_added(
    proxy: Start, net: Net, crowd: Crowd
) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    where = net.at("cluster-ip")
    p.put(asks(net, "source-hash"), net.slice(*ENDPOINTS))
    before = crowd.ask(where, "udp")
    p.put(net.slice(*ENDPOINTS[1:]))
    after = crowd.ask(where, "udp")
    stayed = [c for c in crowd.addresses if after[c] == before[c]]
    could = [c for c in crowd.addresses if before[c] != "pod-1"]
    assert len(could) - len(stayed) <= 3
    assert len(stayed) >= CROWD // 2
    p.put(net.slice(*ENDPOINTS))
    assert crowd.ask(where, "udp") == before


@pytest.mark.parametrize("algorithm", ["weighted", "source-hash"])
def test_a_restart_writes_nothing(proxy: Start, net: Net, algorithm: str) -> None:
    """The slots are read back, with their repetitions, though history has put them in an order
    that a new agent would not choose."""
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    objects = (
        manifest.node(),
        manifest.service_cidr("10.96.0.0/16", "fd00:10:96::/112"),
        asks(net, algorithm, weights=weights_text(net, {"pod-1": 3, "pod-2": 2})),
        net.slice(*ENDPOINTS),
    )
    p.put(*objects)
    p.put(net.slice(*ENDPOINTS[1:], "remote-2"))
    p.put(asks(net, algorithm, weights=weights_text(net, {"pod-2": 5, "pod-4": 0})))
    p.put(*objects)
    before = p.in_kernel()
    p.state = State(p.state.options)
    p.state.apply([Upsert(o) for o in objects])
    transaction = p.resync()
    assert not transaction.change.operations
    assert all(table.empty for table in transaction.tables)
    assert p.in_kernel() == before
    p.check()


# --- session affinity ----------------------------------------------------------------------------


STICKY = {"sessionAffinity": "ClientIP"}


def test_a_remembered_client_stays_and_a_new_one_is_placed_by_its_hash(
    proxy: Start, net: Net, crowd: Crowd
) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    where = net.at("cluster-ip")
    p.put(asks(net, "source-hash", fields=STICKY), net.slice(*ENDPOINTS[:2]))
    known, new = crowd.addresses[: CROWD // 2], crowd.addresses[CROWD // 2 :]
    before = {c: net.server("crowd", where, source=c) for c in known}
    assert before == predicted(p, net, known, where, "tcp")
    p.put(net.slice(*ENDPOINTS))
    placed = predicted(p, net, crowd.addresses, where, "tcp")
    assert any(placed[c] != before[c] for c in known), "the table moved some of them"
    assert {c: net.server("crowd", where, source=c) for c in known} == before
    assert {c: net.server("crowd", where, source=c) for c in new} == {c: placed[c] for c in new}


@pytest.mark.parametrize("algorithm", ["weighted", "source-hash"])
def test_a_remembered_client_leaves_a_drained_endpoint(
    proxy: Start, net: Net, crowd: Crowd, algorithm: str
) -> None:
    """As with kube-proxy's IPVS mode, which sets expire_quiescent_template."""
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    where = net.at("cluster-ip")
    p.put(asks(net, algorithm, fields=STICKY), net.slice(*ENDPOINTS))
    before = {c: net.server("crowd", where, source=c) for c in crowd.addresses}
    assert "pod-1" in before.values()
    p.put(asks(net, algorithm, weights=weights_text(net, {"pod-1": 0}), fields=STICKY))
    after = {c: net.server("crowd", where, source=c) for c in crowd.addresses}
    assert "pod-1" not in after.values()
    assert all(after[c] == before[c] for c in crowd.addresses if before[c] != "pod-1")


# --- drain ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("algorithm", "port"), [("weighted", 9103), ("source-hash", 9104)])
def test_a_drained_endpoint_keeps_its_connections_and_gets_no_new_ones(
    proxy: Start, net: Net, world: World, algorithm: str, port: int
) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    where, ports = net.at("cluster-ip"), both_protocols(port)
    flows = {"client": 9201, "pod-3": 9202, "node": 9203}

    def datagram(client: str) -> str:
        """Who answers a datagram of this client's flow."""
        source = flows[client]
        return world.ask(client, *where, "udp", source_port=source, timeout=5.0).server

    p.put(asks(net, algorithm), net.slice("pod-1", ports=ports))
    with Conversations(net, port) as conversations, world.serve("pod-1", port, "udp"):
        for client in flows:
            conversations.open(client, where)
            assert datagram(client) == "pod-1"
        p.put(net.slice("pod-2", "remote-1", name="others"))
        transaction = p.put(asks(net, algorithm, weights=weights_text(net, {"pod-1": 0})))
        assert transaction.change.stale_udp == {}, "its flows are not looked for"
        conversations.expect_all_to_work()
        for client in flows:
            assert datagram(client) == "pod-1", "a UDP flow moved"
            for protocol in PROTOCOLS:
                assert set(net.answers(client, where, protocol)) <= {"pod-2", "remote-1"}
        conversations.expect_all_to_work()


def test_where_all_are_drained_connections_are_refused(proxy: Start, net: Net) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    weights = weights_text(net, dict.fromkeys(ENDPOINTS, 0))
    p.put(asks(net, "weighted", weights=weights), net.slice(*ENDPOINTS))
    for frontend in FRONTENDS:
        net.expect_refusal(net.at(frontend))
    (problem,) = p.state.problems.open()
    assert (problem.code, problem.subject.name) == ("all_drained", "default/web")
    p.put(asks(net, "weighted"))
    assert p.state.problems.empty
    net.expect("client", net.at("cluster-ip"), ENDPOINTS, seen_as="node")


def test_drained_on_this_node_is_silence_under_policy_local(proxy: Start, net: Net) -> None:
    """As where a node has no endpoint; a load balancer learns of it at the health check port."""
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    local = {"externalTrafficPolicy": "Local", "healthCheckNodePort": 32000}
    weights = weights_text(net, {"pod-1": 0, "pod-2": 0})
    hosts = ("pod-1", "pod-2", "remote-1")
    p.put(asks(net, "weighted", fields=local), net.slice(*hosts))
    (check,) = p.state.health_checks.values()
    assert check.endpoints(net.family) == 2
    p.put(asks(net, "weighted", weights=weights, fields=local))
    net.expect_silence(net.at("balancer-ip"), "client", timeout=SILENCE_SECONDS)
    net.expect("pod-3", net.at("balancer-ip"), ("remote-1",), seen_as=None)
    (check,) = p.state.health_checks.values()
    assert check.endpoints(net.family) == 0


def test_clients_in_a_drained_zone_go_to_the_other_zones(proxy: Start, net: Net) -> None:
    """Hints are looked at without the drained endpoints."""
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(manifest.node(zone="a"))
    hinted = net.slice(
        net.endpoint("pod-1", zone="a", for_zones=("a",)),
        net.endpoint("remote-1", zone="b", for_zones=("b",)),
    )
    p.put(asks(net, "weighted"), hinted)
    net.expect("pod-3", net.at("cluster-ip"), ("pod-1",), seen_as=None)
    p.put(asks(net, "weighted", zone_weights="a=0"))
    net.expect("pod-3", net.at("cluster-ip"), ("remote-1",), seen_as=None)
