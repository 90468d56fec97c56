"""Session affinity: who keeps whom, for how long, and that nothing of it is left behind."""

from __future__ import annotations

import ipaddress
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import pytest
import structlog

from agent.kernel.affinity import AffinityWatch
from agent.loop import reader
from lab.world import World
from rules.events import Upsert
from rules.frontends import destination_key
from rules.netlink.batch import Batch
from rules.objects import UDP, Service, parse_address
from rules.state import State
from rules.tables import AFFINITY_SIZE, SETS, TABLE, remember
from rules.target import target_of
from tests import manifest
from tests.kernel.conftest import (
    CLIENTS,
    CLUSTER_CIDR,
    CROWD,
    PROTOCOLS,
    SERVICE_PORTS,
    SILENCE_SECONDS,
    Crowd,
    Net,
)
from tests.kernel.proxy import Proxy

Start = Callable[..., Proxy]

ENDPOINTS = ("pod-1", "pod-2", "pod-4", "remote-1")
FRONTENDS = ("cluster-ip", "external-ip", "balancer-ip", "node-port")
CONNECTIONS = 200
"""So many clients do not all get one endpoint of four by chance: 1 in 10^13."""
PATIENCE_SECONDS = 15.0
"""How long to wait for what happens after a second or two."""


def sticky(net: Net, name: str = "web", *, seconds: int | None = None, **fields: Any) -> Service:
    """A Service with session affinity, for so many seconds or the API's default."""
    config = {} if seconds is None else {"clientIP": {"timeoutSeconds": seconds}}
    return net.service(name, sessionAffinity="ClientIP", sessionAffinityConfig=config, **fields)


def neighbour(net: Net, **fields: Any) -> Service:
    """Another Service with session affinity, which has a cluster IP only."""
    ports = [{k: v for k, v in port.items() if k != "nodePort"} for port in SERVICE_PORTS]
    return sticky(
        net,
        "neighbour",
        cluster_ips=[net.other_cluster_ip],
        ports=ports,
        type="ClusterIP",
        externalIPs=[],
        ingress=[],
        **fields,
    )


def remembered(p: Proxy, family: int, service_ip: str | None = None) -> dict[str, str]:
    """What the affinity map holds: endpoint by client, both as text; of one service address."""
    length = 4 if family == 4 else 16
    found = {}
    for key, value in p.kernel.elements(SETS[family].affinity).items():
        assert isinstance(value, bytes)
        client, address = key[:length], key[length : 2 * length]
        if service_ip is None or address == Net(p.world, family).packed(service_ip):
            found[_text(client)] = _text(value[:length])
    return found


def _text(address: bytes) -> str:
    return str(ipaddress.ip_address(address))


def wait_until_forgotten(p: Proxy, family: int, service_ip: str | None = None) -> None:
    """Until the affinity map holds no client any more, of the service address."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while remembered(p, family, service_ip):
        assert time.monotonic() < deadline, "the clients are remembered for too long"
        time.sleep(0.02)


# --- it holds ------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("policy", ["Cluster", "Local"])
@pytest.mark.parametrize("frontend", FRONTENDS)
def test_a_client_keeps_its_endpoint(
    proxy: Start, net: Net, frontend: str, policy: str, protocol: str
) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(sticky(net, externalTrafficPolicy=policy), net.slice(*ENDPOINTS))
    servers = {net.server("client", net.at(frontend), protocol) for _ in range(CONNECTIONS)}
    assert len(servers) == 1
    if policy == "Local" and frontend != "cluster-ip":
        assert servers < {"pod-1", "pod-2", "pod-4"}


@pytest.mark.parametrize("client", ["pod-3", "pod-1", "node"])
def test_pods_and_the_node_keep_their_endpoints(proxy: Start, net: Net, client: str) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    for policy in ("Cluster", "Local"):
        p.put(sticky(net, externalTrafficPolicy=policy), net.slice(*ENDPOINTS))
        for frontend in FRONTENDS:
            for protocol in PROTOCOLS:
                servers = {net.server(client, net.at(frontend), protocol) for _ in range(20)}
                assert len(servers) == 1, (policy, frontend, protocol)


def test_a_remembered_client_is_masqueraded_as_a_new_one_is(proxy: Start, net: Net) -> None:
    """Also the pod that is remembered for itself."""
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    for policy in ("Cluster", "Local"):
        p.put(sticky(net, externalTrafficPolicy=policy), net.slice("pod-1"))
        local = policy == "Local"
        for _ in range(2):
            net.expect("pod-3", net.at("cluster-ip"), ("pod-1",), seen_as="pod-3")
            net.expect("client", net.at("cluster-ip"), ("pod-1",), seen_as="node")
            net.expect("pod-1", net.at("cluster-ip"), ("pod-1",), seen_as="node")
            for frontend in FRONTENDS[1:]:
                for client in CLIENTS:
                    seen_as = client if local else "node"
                    net.expect(client, net.at(frontend), ("pod-1",), seen_as=seen_as)


def test_a_remembered_node_is_masqueraded_under_policy_local(
    proxy: Start, net: Net, world: World
) -> None:
    p = proxy()
    world.add_address("node", net.second_ip)
    try:
        p.put(sticky(net, externalTrafficPolicy="Local"), net.slice("pod-1"))
        for frontend in FRONTENDS[1:]:
            net.expect("node", net.at(frontend), ("pod-1",), seen_as="node", source=net.second_ip)
    finally:
        world.remove_address("node", net.second_ip)


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_clients_are_spread_over_the_endpoints_and_keep_them(
    proxy: Start, net: Net, crowd: Crowd, frontend: str
) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(sticky(net), net.slice(*ENDPOINTS))
    for protocol in PROTOCOLS:
        first = crowd.ask(net.at(frontend), protocol)
        assert len(set(first.values())) > 1
        assert set(first.values()) <= set(ENDPOINTS)
        for _ in range(3):
            assert crowd.ask(net.at(frontend), protocol) == first
    assert len(p.kernel.elements(SETS[net.family].affinity)) == CROWD * len(PROTOCOLS)


def test_the_map_holds_who_was_sent_where(proxy: Start, net: Net, crowd: Crowd) -> None:
    p = proxy()
    p.put(sticky(net), net.slice(*ENDPOINTS[:3]))
    servers = crowd.ask(net.at("cluster-ip"))
    assert remembered(p, net.family) == {
        client: net.address(server) for client, server in servers.items()
    }


def test_the_endpoints_of_one_service_are_not_those_of_another(
    proxy: Start, net: Net, crowd: Crowd
) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(sticky(net), net.slice("pod-1", "pod-2"))
    p.put(neighbour(net), net.slice("pod-4", "pod-5", service="neighbour"))
    own = crowd.ask(net.at("cluster-ip"))
    other = crowd.ask((net.other_cluster_ip, 80))
    assert set(own.values()) == {"pod-1", "pod-2"}
    assert set(other.values()) == {"pod-4", "pod-5"}
    assert crowd.ask(net.at("cluster-ip")) == own
    assert crowd.ask((net.other_cluster_ip, 80)) == other


def test_a_service_without_affinity_spreads_beside_one_that_has_it(proxy: Start, net: Net) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(net.service(), net.slice("pod-1", "pod-2"))
    p.put(neighbour(net), net.slice("pod-4", service="neighbour"))
    for frontend in FRONTENDS:
        net.expect("client", net.at(frontend), ("pod-1", "pod-2"), seen_as="node")
    assert remembered(p, net.family) == {}


# --- it ends -------------------------------------------------------------------------------------


def test_clients_are_forgotten_after_the_timeout(proxy: Start, net: Net, crowd: Crowd) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(sticky(net, seconds=1), net.slice(*ENDPOINTS))
    started = time.monotonic()
    first = crowd.ask(net.at("cluster-ip"))
    assert remembered(p, net.family)
    wait_until_forgotten(p, net.family)
    assert time.monotonic() - started >= 1
    assert crowd.ask(net.at("cluster-ip")) != first


def test_new_connections_renew_the_timeout(proxy: Start, world: World) -> None:
    """Both families at once, as it takes a while."""
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    nets = (Net(world, 4), Net(world, 6))
    for net in nets:
        p.put(
            sticky(net, f"web-{net.family}", seconds=2),
            net.slice(*ENDPOINTS, service=f"web-{net.family}"),
        )

    def ask(client: str) -> list[str]:
        return [net.server(client, net.at("cluster-ip")) for net in nets]

    clients = ("pod-1", "pod-2", "pod-3", "pod-4", "pod-5", "pod-6", "client", "stranger")
    first = {client: ask(client) for client in clients}
    started = time.monotonic()
    while time.monotonic() < started + 2.5:
        time.sleep(0.2)
        assert {client: ask(client) for client in clients} == first
    for net in nets:
        wait_until_forgotten(p, net.family)


def test_services_have_timeouts_of_their_own(proxy: Start, net: Net, crowd: Crowd) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(sticky(net, seconds=1), net.slice(*ENDPOINTS))
    p.put(neighbour(net, seconds=600), net.slice(*ENDPOINTS, service="neighbour"))
    p.check()
    crowd.ask(net.at("cluster-ip"))
    kept = crowd.ask((net.other_cluster_ip, 80))
    wait_until_forgotten(p, net.family, net.cluster_ip)
    assert len(remembered(p, net.family, net.other_cluster_ip)) == CROWD
    assert crowd.ask((net.other_cluster_ip, 80)) == kept


def test_a_changed_timeout_counts_from_the_next_connection(
    proxy: Start, net: Net, crowd: Crowd
) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(sticky(net, seconds=86400), net.slice(*ENDPOINTS))
    first = crowd.ask(net.at("cluster-ip"))
    p.put(sticky(net, seconds=1))
    p.check()
    assert crowd.ask(net.at("cluster-ip")) == first
    wait_until_forgotten(p, net.family)


def test_a_longer_timeout_keeps_clients_beyond_the_shorter_one(
    proxy: Start, net: Net, crowd: Crowd
) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(sticky(net, seconds=2), net.slice(*ENDPOINTS))
    p.put(neighbour(net, seconds=2), net.slice(*ENDPOINTS, service="neighbour"))
    crowd.ask(net.at("cluster-ip"))
    p.put(sticky(net, seconds=600))
    first = crowd.ask(net.at("cluster-ip"))
    crowd.ask((net.other_cluster_ip, 80))
    wait_until_forgotten(p, net.family, net.other_cluster_ip)
    assert crowd.ask(net.at("cluster-ip")) == first


# --- endpoints and Services that go --------------------------------------------------------------


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_clients_of_a_removed_endpoint_move_and_the_others_stay(
    proxy: Start, net: Net, crowd: Crowd, frontend: str
) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(sticky(net), net.slice(*ENDPOINTS))
    first = crowd.ask(net.at(frontend))
    gone = first[crowd.addresses[0]]
    staying = {client: server for client, server in first.items() if server != gone}
    p.put(net.slice(*(host for host in ENDPOINTS if host != gone)))
    assert remembered(p, net.family) == {c: net.address(s) for c, s in staying.items()}
    second = crowd.ask(net.at(frontend))
    assert gone not in second.values()
    assert {client: second[client] for client in staying} == staying
    assert crowd.ask(net.at(frontend)) == second
    p.put(net.slice(*ENDPOINTS))
    assert crowd.ask(net.at(frontend)) == second  # no client moves back
    p.check()


@pytest.mark.parametrize("restart", [False, True])
def test_a_pod_remembered_as_its_own_client_is_answered_until_it_is_forgotten(
    proxy: Start, net: Net, restart: bool
) -> None:
    """Its endpoint is removed, and its affinity to itself is not yet: also where another agent
    begins at that moment. Then it gets the other endpoint, and no hairpin stays."""
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    where, hairpins = net.at("cluster-ip"), SETS[net.family].hairpins
    p.put(sticky(net), net.slice("pod-1"))
    assert net.server("pod-1", where) == "pod-1"
    p.state.apply([Upsert(net.slice("pod-2"))])
    if restart:
        heir = State(p.state.options)
        heir.apply([Upsert(o) for o in (sticky(net), net.slice("pod-2"), manifest.node())])
        p.state = heir
    p.kernel.apply(p.state.resync(reader(p.kernel)) if restart else p.state.step())
    assert net.server("pod-1", where) == "pod-1"
    p.check()
    p.forget_clients(net.family)
    assert net.server("pod-1", where) == "pod-2"
    assert set(p.kernel.elements(hairpins)) == {net.packed(net.address("pod-2")) * 2}
    p.check()


def test_hairpins_do_not_stay_where_no_client_is_remembered(proxy: Start, net: Net) -> None:
    """Without session affinity they are removed with the endpoint."""
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(net.service(), net.slice("pod-1"))
    p.state.apply([Upsert(net.slice("pod-2"))])
    p.kernel.apply(p.state.step())
    hairpins = p.kernel.elements(SETS[net.family].hairpins)
    assert set(hairpins) == {net.packed(net.address("pod-2")) * 2}


UNUSABLE = {
    "not ready": {"ready": False},
    "leaving": {"ready": False, "serving": True, "terminating": True},
    "hinted elsewhere": {"for_zones": ["b"]},
}


@pytest.mark.parametrize("fields", UNUSABLE.values(), ids=UNUSABLE)
def test_clients_of_an_endpoint_that_is_no_longer_used_move_on(
    proxy: Start, net: Net, crowd: Crowd, fields: dict[str, Any]
) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    here = {"for_zones": ["a"]}
    others = [net.endpoint(host, **here) for host in ENDPOINTS[1:]]
    p.put(manifest.node(zone="a"), sticky(net))
    p.put(net.slice(net.endpoint("pod-1", **here), *others))
    first = crowd.ask(net.at("cluster-ip"))
    p.put(net.slice(net.endpoint("pod-1", **fields), *others))
    second = crowd.ask(net.at("cluster-ip"))
    assert "pod-1" not in second.values()
    assert {c: s for c, s in first.items() if s != "pod-1"}.items() <= second.items()


def test_no_client_is_remembered_for_a_service_without_endpoints(
    proxy: Start, net: Net, crowd: Crowd
) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(sticky(net), net.slice(*ENDPOINTS))
    for frontend in FRONTENDS:
        crowd.ask(net.at(frontend))
    p.put(net.slice())
    assert remembered(p, net.family) == {}
    for frontend in FRONTENDS:
        net.expect_refusal(net.at(frontend))
    p.put(net.slice("pod-2"))
    assert set(crowd.ask(net.at("cluster-ip")).values()) == {"pod-2"}


def test_an_outside_client_moves_to_the_nodes_endpoints_when_the_policy_becomes_local(
    proxy: Start, net: Net, crowd: Crowd
) -> None:
    """The endpoints elsewhere are still there for clients inside, but not for it."""
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(sticky(net), net.slice("pod-1", "remote-1"))
    for frontend in FRONTENDS[1:]:
        assert set(crowd.ask(net.at(frontend)).values()) == {"pod-1", "remote-1"}
    p.put(sticky(net, externalTrafficPolicy="Local"))
    for frontend in FRONTENDS[1:]:
        for client in crowd.addresses:
            answer = net.ask("crowd", net.at(frontend), source=client, timeout=SILENCE_SECONDS)
            assert (answer.server, answer.client) == ("pod-1", client), frontend


def test_a_target_port_that_changes_moves_the_clients(
    proxy: Start, net: Net, world: World, crowd: Crowd
) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(sticky(net), net.slice("pod-1"))
    crowd.ask(net.at("cluster-ip"))
    with world.serve("pod-1", 9004):
        p.put(net.slice("pod-1", ports=[{"name": "web", "port": 9004}]))
        assert remembered(p, net.family) == {}
        crowd.ask(net.at("cluster-ip"))
        values = p.kernel.elements(SETS[net.family].affinity).values()
        assert {value[-4:-2] for value in values} == {(9004).to_bytes(2, "big")}


@pytest.mark.parametrize("end", ["deleted", "without affinity"])
def test_a_service_leaves_no_clients_behind_and_others_keep_theirs(
    proxy: Start, net: Net, crowd: Crowd, end: str
) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(sticky(net), net.slice(*ENDPOINTS))
    p.put(neighbour(net), net.slice(*ENDPOINTS, service="neighbour"))
    for frontend in FRONTENDS:
        crowd.ask(net.at(frontend))
    kept = crowd.ask((net.other_cluster_ip, 80))
    if end == "deleted":
        p.delete(sticky(net))
    else:
        p.put(net.service())
    p.check()
    assert remembered(p, net.family) == {c: net.address(s) for c, s in kept.items()}
    assert crowd.ask((net.other_cluster_ip, 80)) == kept
    if end == "without affinity":
        net.expect("client", net.at("cluster-ip"), ENDPOINTS, seen_as="node")
        p.put(sticky(net))
        assert len(set(crowd.ask(net.at("cluster-ip")).values())) > 1


def test_clients_of_a_removed_address_are_forgotten(proxy: Start, net: Net, crowd: Crowd) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(sticky(net), net.slice(*ENDPOINTS))
    for frontend in FRONTENDS:
        crowd.ask(net.at(frontend))
    p.put(sticky(net, externalIPs=[], type="ClusterIP", ingress=[]))
    p.check()
    assert remembered(p, net.family, net.external_ip) == {}
    assert remembered(p, net.family, net.balancer_ip) == {}
    assert len(remembered(p, net.family, net.cluster_ip)) == CROWD


def test_an_address_handed_over_takes_no_clients_along(
    proxy: Start, net: Net, crowd: Crowd
) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    heir = sticky(net, "heir", created="2026-02-01T00:00:00Z", cluster_ips=[net.other_cluster_ip])
    p.put(sticky(net), net.slice("pod-1", "pod-2"))
    p.put(heir, net.slice("pod-4", service="heir"))
    crowd.ask(net.at("external-ip"))
    p.delete(sticky(net))
    assert remembered(p, net.family) == {}
    assert set(crowd.ask(net.at("external-ip")).values()) == {"pod-4"}


# --- rules come and go ---------------------------------------------------------------------------


def sticky_parts(p: Proxy, family: int) -> tuple[set[str], set[str]]:
    """The sets and chains in the kernel that are there for affinity only."""
    found = p.kernel.find(family)
    assert found is not None
    sets = {s.name for s in SETS[family].sticky} & found.sets.keys()
    chains = {name for name in found.chains if name.startswith(("sticky-", "remember-"))}
    return sets, chains


def test_rules_for_affinity_come_with_the_first_service_and_go_with_the_last(
    proxy: Start, net: Net
) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    other_family = 10 - net.family
    steps = (
        (lambda: None, ()),
        (lambda: p.put(net.service(), net.slice("pod-1")), ()),
        (lambda: p.put(sticky(net)), (10800,)),
        (lambda: p.put(neighbour(net, seconds=60)), (60, 10800)),
        (lambda: p.put(sticky(net, seconds=60)), (60,)),
        (lambda: p.put(net.service()), (60,)),
        (lambda: p.delete(neighbour(net)), ()),
        (lambda: p.put(sticky(net, seconds=5)), (5,)),
        (lambda: p.delete(net.service()), ()),
    )
    for step, timeouts in steps:
        step()
        p.check()
        sets, chains = sticky_parts(p, net.family)
        assert bool(sets) == bool(timeouts)
        assert {c for c in chains if c[-1].isdigit() and c.startswith("remember-")} == {
            remember(seconds) for seconds in timeouts
        }
        assert bool(chains) == bool(timeouts)
        assert sticky_parts(p, other_family) == (set(), set())


def test_clients_stay_remembered_over_a_resync(proxy: Start, net: Net, crowd: Crowd) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(sticky(net), net.slice(*ENDPOINTS))
    first = crowd.ask(net.at("cluster-ip"))
    assert not p.resync()
    assert crowd.ask(net.at("cluster-ip")) == first


def test_connections_that_were_not_let_through_are_not_remembered(proxy: Start, net: Net) -> None:
    p = proxy()
    p.put(
        sticky(net, loadBalancerSourceRanges=["172.31.0.96/28", "fd00:172:31::100/120"]),
        net.slice("pod-1"),
    )
    net.expect_silence(net.at("balancer-ip"), "stranger")
    assert remembered(p, net.family) == {}
    net.expect("client", net.at("balancer-ip"), ("pod-1",), seen_as="node")
    assert len(remembered(p, net.family)) == 1


def test_the_map_has_the_size_that_is_documented(proxy: Start, net: Net) -> None:
    p = proxy()
    p.put(sticky(net), net.slice("pod-1"))
    assert SETS[net.family].affinity.size == AFFINITY_SIZE
    p.check()


# --- a map that is full --------------------------------------------------------------------------


def fill(p: Proxy, family: int, of: Service) -> None:
    """The map of a family as a flood leaves it: full of clients of one Service."""
    owner = SETS[family].affinity
    destination = destination_key(of.cluster_ips[0], UDP, 80)
    length = len(of.cluster_ips[0])
    target = target_of(bytes(length), 9)
    first = int.from_bytes(parse_address("198.18.0.0" if family == 4 else "2001:db8:f::"), "big")
    have = len(p.kernel.elements(owner))
    batch = Batch()
    batch.add_elements(
        TABLE,
        owner,
        (
            ((first + number).to_bytes(length, "big") + destination, target)
            for number in range(AFFINITY_SIZE - have)
        ),
    )
    p.kernel.send(batch)


def expect_full(p: Proxy, family: int) -> None:
    """A dump may miss elements while the map's hash table is rebuilt, so it is tried again."""
    owner = SETS[family].affinity
    assert any(len(p.kernel.elements(owner)) == AFFINITY_SIZE for _ in range(20))


def flood(net: Net, world: World, where: tuple[str, int], clients: int) -> None:
    """A datagram from each of so many clients, which one pod invents."""
    base = int(ipaddress.ip_address("198.18.0.0" if net.family == 4 else "2001:db8:f::"))
    family = socket.AF_INET if net.family == 4 else socket.AF_INET6
    ports = struct.pack("!HHHH", 9999, where[1], 8, 0)
    server = net.packed(where[0])
    with world.run("pod-6", socket.socket, family, socket.SOCK_RAW, socket.IPPROTO_RAW) as sender:
        for number in range(clients):
            source = (base + AFFINITY_SIZE + number).to_bytes(len(server), "big")
            if net.family == 4:
                head = struct.pack("!BBHHHBBH", 0x45, 0, 28, 0, 0, 64, 17, 0)
                packet = head + source + server + ports
            else:
                total = source + server + struct.pack("!II", 8, 17) + ports
                words = sum(struct.unpack(f"!{len(total) // 2}H", total))
                while words >> 16:
                    words = (words & 0xFFFF) + (words >> 16)
                udp = ports[:6] + struct.pack("!H", ~words & 0xFFFF)
                packet = struct.pack("!IHBB", 0x60000000, 8, 17, 64) + source + server + udp
            sender.sendto(packet, (where[0], 0))


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_a_flood_to_one_service_does_not_move_the_clients_of_another(
    proxy: Start, net: Net, crowd: Crowd, frontend: str
) -> None:
    """The map is full, so new clients are not remembered: they are placed by their address."""
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    flooded = neighbour(net)
    p.put(flooded, net.slice("pod-6", service="neighbour"))
    p.put(sticky(net), net.slice(*ENDPOINTS[:3], "pod-5", "remote-2"))
    half = crowd.addresses[: CROWD // 2]
    before = Crowd(net, half).ask(net.at(frontend))
    fill(p, net.family, flooded)
    # one client more meets the full map, which the flood itself would do, too
    net.server("client", (net.other_cluster_ip, 80), "tcp")
    first = crowd.ask(net.at(frontend))
    assert {c: first[c] for c in half} == before  # those remembered stay
    assert len(set(first.values())) > 1
    for _ in range(3):
        assert crowd.ask(net.at(frontend)) == first
    expect_full(p, net.family)


def test_without_a_flood_before_a_client_that_meets_a_full_map_moves_at_most_once(
    proxy: Start, net: Net, crowd: Crowd
) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    service = sticky(net)
    p.put(service, net.slice(*ENDPOINTS))
    fill(p, net.family, service)
    crowd.ask(net.at("cluster-ip"))
    second = crowd.ask(net.at("cluster-ip"))
    for _ in range(3):
        assert crowd.ask(net.at("cluster-ip")) == second


def test_a_pod_that_invents_clients_fills_the_map_and_moves_no_others(
    proxy: Start, net: Net, world: World, crowd: Crowd
) -> None:
    """With real packets; the map is as good as full before, as 65,536 of them take long."""
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    flooded = neighbour(net)
    p.put(flooded, net.slice("pod-6", service="neighbour"))
    p.put(sticky(net), net.slice(*ENDPOINTS))
    fill(p, net.family, flooded)
    free = sorted(p.kernel.elements(SETS[net.family].affinity).items())[:500]
    batch = Batch()
    batch.delete_elements(TABLE, SETS[net.family].affinity, free)
    p.kernel.send(batch)
    flood(net, world, (net.other_cluster_ip, 80), 1000)
    expect_full(p, net.family)
    first = crowd.ask(net.at("cluster-ip"))
    for _ in range(3):
        assert crowd.ask(net.at("cluster-ip")) == first


def test_a_full_map_is_counted_and_logged_once_and_so_is_room(proxy: Start, net: Net) -> None:
    p = proxy()
    service = sticky(net)
    p.put(service, net.slice("pod-1"))
    counts: dict[int, int] = {}
    lines: list[dict[str, Any]] = []

    def keep(_logger: object, _level: str, event: Any) -> Any:
        lines.append(dict(event))
        raise structlog.DropEvent

    logger = structlog.wrap_logger(
        None, processors=[keep], wrapper_class=structlog.make_filtering_bound_logger(0)
    )
    failures: list[Exception] = []
    watch = p.world.run(
        "node",
        lambda: AffinityWatch(
            counts.__setitem__, logger, lambda _, error: failures.append(error), seconds=0.02
        ),
    )
    p.world.run("node", watch.start)  # a thread is born in the namespace of the one that starts it

    def wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, (counts, lines, failures)
            time.sleep(0.02)

    try:
        net.server("client", net.at("cluster-ip"))
        wait(lambda: counts.get(net.family) == 1)
        fill(p, net.family, service)
        net.server("stranger", net.at("cluster-ip"))
        wait(lambda: bool(lines))
        assert (lines[0]["event"], lines[0]["family"]) == ("affinity_full", net.family)
        net.server("stranger", net.at("cluster-ip"))
        p.put(net.service())  # without affinity there is no map
        wait(lambda: len(lines) == 2)
        assert lines[1]["event"] == "affinity_has_room"
        wait(lambda: counts[net.family] == 0)
    finally:
        watch.stop()
    assert not failures
