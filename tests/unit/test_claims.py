"""Who has a key that several Services claim, which problems that opens, and what it costs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from rules.events import ApiServers, Delete, Event, NodeAddresses, Upsert
from rules.frontends import destination_key
from rules.lookup import Destination
from rules.objects import TCP, Object, Service, parse_address
from rules.options import Options
from rules.problems import MAX_REPORTED, MAX_TEXT
from rules.program import Claim
from rules.state import State
from rules.tables import SETS
from rules.target import target_of
from tests.manifest import endpoint, endpoint_slice, node, service

OLD, YOUNG = "2026-01-01T00:00:00Z", "2026-02-02T00:00:00Z"
DNS_IP, OWN, SHARED = "10.96.0.10", "172.31.0.2", "203.0.113.1"


def at(address: str, port: int) -> Claim:
    return Claim(SETS[4].service_ips, destination_key(parse_address(address), TCP, port))


def started(*objects: Object, **options: Any) -> State:
    state = State(Options(node="node-1", **options))
    state.apply([NodeAddresses(frozenset(), ()), Upsert(node())])
    state.resync(lambda _: None)
    return put(state, *objects)


def put(state: State, *objects: Object) -> State:
    return apply(state, *map(Upsert, objects))


def apply(state: State, *events: Event) -> State:
    state.apply(events)
    state.step()
    return state


def one(name: str, ip: str, port: int = 80, created: str = OLD, **spec: Any) -> Service:
    ports = [{"name": "http", "port": port, **spec.pop("more", {})}]
    return service(name, cluster_ips=[ip], ports=ports, created=created, **spec)


def behind(name: str, *addresses: str) -> Object:
    return endpoint_slice(name, [endpoint(a, node="n") for a in addresses])


def lost(state: State) -> dict[str, str]:
    """The Services with an address conflict, and its text."""
    return {
        p.subject.service: p.text for p in state.problems.open() if p.code == "address_conflict"
    }


THIEF = one("thief", "10.96.0.66", 53, OLD, externalIPs=[DNS_IP])
VICTIM = one("dns", DNS_IP, 53, YOUNG)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_a_cluster_ip_has_precedence_over_an_older_external_ip(order):
    """A tenant with an older `externalIPs: [10.96.0.10]` takes nothing of a re-created DNS."""
    objects = (VICTIM, behind("dns", "10.244.9.1"), THIEF, behind("thief", "10.244.9.2"))
    state = started()
    for index in order:
        put(state, objects[index])
    (target,) = state.installed[at(DNS_IP, 53)].slots
    assert target == target_of(parse_address("10.244.9.1"), 8080)
    assert set(lost(state)) == {"default/thief"}


def test_a_cluster_ip_without_endpoints_keeps_its_key():
    state = started(VICTIM, THIEF, behind("thief", "10.244.9.2"))
    assert state.holder(at(DNS_IP, 53)) == VICTIM.name
    assert not state.installed[at(DNS_IP, 53)].slots


def test_of_two_external_ips_the_one_with_endpoints_serves_then_the_older():
    """As kube-proxy has it; and back when the older one has endpoints again."""
    older = one("older", "10.96.0.1", created=OLD, externalIPs=[SHARED])
    younger = one("younger", "10.96.0.2", created=YOUNG, externalIPs=[SHARED])
    state = started(older, younger, behind("younger", "10.244.9.2"))
    assert state.holder(at(SHARED, 80)) == younger.name
    assert set(lost(state)) == {"default/older"}
    put(state, behind("older", "10.244.9.1"))
    assert state.holder(at(SHARED, 80)) == older.name
    assert set(lost(state)) == {"default/younger"}
    put(state, behind("younger"))
    assert state.holder(at(SHARED, 80)) == older.name
    apply(state, Delete(Service, older.name))
    assert state.holder(at(SHARED, 80)) == younger.name
    assert not lost(state)


NODE_PORT = one("ported", "10.96.0.3", created=YOUNG, type="NodePort", more={"nodePort": 30080})
AT_NODE = one("grabber", "10.96.0.4", 30080, OLD, externalIPs=[OWN])


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_a_node_port_has_precedence_over_an_external_ip_that_is_the_nodes(order):
    objects = (NODE_PORT, behind("ported", "10.244.9.1"), AT_NODE, behind("grabber", "10.244.9.2"))
    state = started()
    for index in order:
        put(state, objects[index])
    assert at(OWN, 30080) not in state.installed
    assert lost(state) == {
        "default/grabber": f"{OWN}:30080/tcp belongs to Service default/ported; remove the address "
        "from one of the Services"
    }


def test_the_external_ip_is_served_when_the_node_port_or_the_nodes_address_is_gone():
    state = started(NODE_PORT, AT_NODE, behind("grabber", "10.244.9.2"))
    apply(state, Delete(Service, NODE_PORT.name))
    assert state.holder(at(OWN, 30080)) == AT_NODE.name
    assert at(OWN, 30080) in state.installed
    assert not lost(state)
    put(state, NODE_PORT)
    assert at(OWN, 30080) not in state.installed
    put(state, node(addresses=["172.31.0.9"]))
    assert state.holder(at(OWN, 30080)) == AT_NODE.name
    assert at(OWN, 30080) in state.installed
    assert not lost(state)


def test_the_own_node_port_of_a_service_is_no_conflict():
    both = one("both", "10.96.0.5", 30080, externalIPs=[OWN], more={"nodePort": 30080})
    state = started(both, behind("both", "10.244.9.1"))
    assert not state.problems.open()
    assert at(OWN, 30080) not in state.installed


def test_an_external_ip_at_the_api_servers_address_is_refused():
    """Also as a load balancer IP; at other ports, and as a cluster IP, it is served."""
    api = "172.31.0.99"
    servers = frozenset({(parse_address(api), 6443), (parse_address("10.96.0.1"), 443)})
    evil = one("evil", "10.96.0.66", 6443, type="LoadBalancer", ingress=[{"ip": api}])
    other = one("other", "10.96.0.67", 8080, externalIPs=[api])
    kubernetes = one("kubernetes", "10.96.0.1", 443)
    state = started(evil, other, kubernetes, api_servers=servers)
    assert at(api, 6443) not in state.installed
    assert not any(o.name.startswith("reject") and k == at(api, 6443).key for o, k in _keys(state))
    assert {at(api, 8080), at("10.96.0.1", 443), at("10.96.0.66", 6443)} <= state.installed.keys()
    (problem,) = state.problems.open()
    assert (problem.code, problem.subject.service) == ("api_server_address", "default/evil")
    assert f"{api}:6443/tcp" in problem.text


def _keys(state: State) -> list[tuple[Any, bytes]]:
    return [(owner, key) for owner, content in state.elements().items() for key in content]


def test_the_api_servers_address_may_change_while_running():
    evil = one("evil", "10.96.0.66", 6443, externalIPs=["172.31.0.99"])
    state = started(evil)
    assert at("172.31.0.99", 6443) in state.installed
    apply(state, ApiServers(frozenset({(parse_address("172.31.0.99"), 6443)})))
    assert at("172.31.0.99", 6443) not in state.installed
    apply(state, ApiServers(frozenset()))
    assert at("172.31.0.99", 6443) in state.installed
    assert not state.problems.open()


def test_500_services_that_want_one_address_are_reported_once_each():
    """In bounded lines; and the endpoints of one of them are no reason to report the others."""
    crowd = [
        one(f"s{n}", f"10.97.{n >> 8}.{n & 255}", externalIPs=[SHARED, "203.0.113.2"])
        for n in range(500)
    ]
    state = started(*crowd)
    assert len(lost(state)) == 499
    assert all(len(text) <= MAX_TEXT for text in lost(state).values())
    collected = state.problems.collect(1.0)
    assert len(collected.opened) == MAX_REPORTED
    assert collected.omitted == 499 - MAX_REPORTED
    for name in ("s7", "s8", "s499"):
        before = len(state.problems.open())
        put(state, behind(name, "10.244.9.1"))
        after = state.problems.collect(2.0)
        assert len(after.opened) + len(after.closed) <= 2
        assert len(state.problems.open()) == before
    assert "default/s1" in lost(state)


def test_a_key_is_read_as_it_is_made():
    where = Destination(parse_address("10.96.0.10"), TCP, 53)
    assert Destination.of(destination_key(*where)) == where
    assert Destination.of(destination_key(b"", TCP, 53)) == Destination(b"", TCP, 53)
