"""What one Service can make is bounded, and it is said what is left out."""

from __future__ import annotations

from typing import Any

import msgspec

from rules import program
from rules.diff import Shared, _moves
from rules.events import Upsert
from rules.frontends import frontend_count, frontends
from rules.objects import EndpointSlice, Service, SlicePort, parse_address
from rules.options import Options
from rules.program import MAX_ELEMENTS, MAX_FRONTENDS, Surroundings
from rules.selection import NodeLocation
from rules.slots import MAX_ENDPOINTS, assign
from rules.state import State
from rules.tables import SETS, Layout, build
from tests.manifest import balancing, endpoint, endpoint_slice, service

PORTS = [{"name": f"p{n}", "port": 1 + n} for n in range(100)]
EXTERNAL = [f"203.0.{n >> 8}.{n & 255}" for n in range(1000)]


def slices(count: int, ports: int = 1, node: str = "n") -> list[EndpointSlice]:
    """Endpoints at 10.0.0.0 and up, 1,000 to a slice."""
    numbers = [{"name": f"p{n}", "port": 8080 + n} for n in range(ports)]
    addresses = [f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}" for n in range(count)]
    return [
        endpoint_slice(
            "web",
            [endpoint(a, node=node) for a in addresses[start : start + 1000]],
            name=f"web-{start:06}",
            ports=numbers,
        )
        for start in range(0, count, 1000)
    ]


def made(item: Service, pieces: list[EndpointSlice]) -> State:
    state = State(Options(node="node-1"))
    state.apply([*map(Upsert, pieces), Upsert(item)])
    state.step()
    return state


def size(state: State) -> int:
    return sum(map(len, state.elements().values()))


def problem(state: State) -> tuple[str, str]:
    (found,) = state.problems.open()
    assert found.subject.service == "default/web"
    return found.code, found.text


def test_a_service_with_a_million_elements_gets_so_many_as_are_allowed():
    """76 KiB of JSON made 1,012,520 elements: external IPs times ports times endpoints."""
    wide = service(externalIPs=EXTERNAL, ports=PORTS, type="NodePort")
    state = made(wide, slices(10, ports=100))
    assert size(state) <= MAX_ELEMENTS + 10
    assert len(state.installed) == MAX_FRONTENDS
    code, text = problem(state)
    assert code == "too_many_elements"
    assert text.startswith(f"{100_200 - MAX_FRONTENDS} of 100200 addresses and ports")


def test_the_excess_is_rejected_by_whole_frontends_and_cluster_ips_are_served_first():
    ports = [{"name": "p0", "port": 80, "nodePort": 30080}]
    ingress = [{"ip": "198.51.100.1"}]
    many = service(externalIPs=EXTERNAL, ports=ports, type="LoadBalancer", ingress=ingress)
    state = made(many, slices(2000))
    kinds = [i.wanted.frontend.kind.value for i in state.installed.values()]
    assert {"cluster IP", "node port", "load balancer IP", "external IP"} == set(kinds)
    assert all(len(i.slots) in (0, 2000) for i in state.installed.values())
    assert kinds.count("external IP") == MAX_ELEMENTS // 2001 - 3
    assert size(state) <= MAX_ELEMENTS + 10
    assert [f.kind.value for f in frontends(many)][:5] == [
        *("cluster IP", "cluster IP", "node port", "node port", "load balancer IP")
    ]


def test_slots_of_weights_and_hash_tables_count_as_elements():
    """A list of 2,000 endpoints may have 16,000 slots, and its table has 16,384 entries."""
    ports = [{"name": "p0", "port": 80}]
    for algorithm, each in (("weighted", 16_000), ("source-hash", 16_384)):
        annotations = balancing(algorithm, weights="10.0.0.1=65535")
        state = made(
            service(
                cluster_ips=["10.96.0.10"],
                externalIPs=EXTERNAL,
                ports=ports,
                annotations=annotations,
            ),
            slices(2000),
        )
        assert len(state.installed) == MAX_ELEMENTS // (each + 1)
        assert size(state) <= MAX_ELEMENTS + 10
        assert "too_many_elements" in {p.code for p in state.problems.open()}


def test_weights_that_need_too_many_slots_are_rounded_and_reported():
    annotations = balancing("weighted", weights="10.0.0.0=65535,10.0.0.1=2")
    state = made(service(cluster_ips=["10.96.0.10"], annotations=annotations), _renamed(slices(2)))
    (installed,) = state.installed.values()
    assert len(installed.slots) == 1024
    assert len(set(installed.slots)) == 2
    code, text = problem(state)
    assert code == "weights_rounded"
    assert "http/tcp IPv4 (65537 slots, at most 1024)" in text


def test_one_endpoint_of_a_wide_service_is_assigned_once_for_all_its_frontends(monkeypatch):
    """Not once for each of 100 external IPs: the work is that of one list."""
    assigned = []

    def counting(before: Any, wanted: Any) -> Any:
        assigned.append(len(wanted))
        return assign(before, wanted)

    monkeypatch.setattr("rules.diff.assign", counting)
    wide = service(externalIPs=EXTERNAL[:100], ports=PORTS[:1])
    state = made(wide, slices(50))
    assigned.clear()
    state.apply([Upsert(slices(49)[0])])
    transaction = state.step()
    assert [n for n in assigned if n] == [49]
    assert sum(map(len, transaction.change.removed.values())) == 101


def test_moves_are_shared_between_equal_pairs_alone():
    shared = Shared()
    old, new = (b"a", b"b"), (b"a", b"c")
    assert shared.moves(old, new) is shared.moves(old, new)
    assert shared.moves(old, new) == tuple(_moves(old, new)) == ((1, b"b", b"c"),)
    assert shared.moves(new, old) == ((1, b"c", b"b"),)
    assert shared.moves(old, old) == ()


def test_more_endpoints_than_slots_are_cut_and_reported():
    state = made(service(cluster_ips=["10.96.0.10"]), _renamed(slices(MAX_ENDPOINTS + 7)))
    (installed,) = state.installed.values()
    assert len(installed.slots) == MAX_ENDPOINTS
    code, text = problem(state)
    assert code == "too_many_endpoints"
    assert f"{MAX_ENDPOINTS + 7} endpoints" in text


def _renamed(pieces: list[EndpointSlice]) -> list[EndpointSlice]:
    """For the port of `manifest.service`."""
    ports = (SlicePort("http", 6, 8080),)
    return [msgspec.structs.replace(piece, ports=ports) for piece in pieces]


def test_the_problem_closes_when_the_service_fits_again():
    state = made(service(externalIPs=EXTERNAL, ports=PORTS), [])
    assert problem(state)[0] == "too_many_elements"
    state.apply([Upsert(service(externalIPs=EXTERNAL[:2], ports=PORTS))])
    state.step()
    assert not state.problems.open()


def test_frontends_are_counted_without_being_made():
    item = service(
        externalIPs=[*EXTERNAL[:3], "2001:db8::1"],
        cluster_ips=["10.96.0.10"],
        ports=[{"port": 80, "nodePort": 30080}, {"name": "b", "port": 81}],
    )
    assert frontend_count(item) == len(list(frontends(item))) == 2 + 1 + 6
    assert frontend_count(item, external_ips=False) == 3


def test_a_service_without_usable_ports_has_its_cluster_ip_in_the_set():
    """So a packet to it is rejected, as to any unknown port of a cluster IP."""
    state = made(service(ports=[{"port": 80, "protocol": "QUIC"}]), [])
    elements = state.elements()
    assert set(elements[SETS[4].cluster_ips]) == {parse_address("10.96.0.10")}
    assert set(elements[SETS[6].cluster_ips]) == {parse_address("fd00:10:96::10")}


def test_local_endpoints_are_counted_in_linear_time(monkeypatch):
    """Counted in comparisons, not in seconds: a tuple's `in` compared each with all before it."""
    compared = 0

    class Key(bytes):
        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return bytes.__eq__(self, other)

        __hash__ = bytes.__hash__

    def counting(*args: Any) -> Any:
        result = program.program(*args)
        shared = tuple((owner, Key(key), value) for owner, key, value in result.shared)
        return msgspec.structs.replace(result, shared=shared)

    monkeypatch.setattr("rules.state.program", counting)
    made(service(ports=PORTS[:1]), slices(2000, node="node-1"))
    assert compared < 10 * 2000


def test_tables_are_not_kept_for_each_timeout_that_was_ever_used():
    """Each held 310 KiB for good."""
    for seconds in range(1, 41):
        build(Layout(4, affinity=(seconds,)))
    assert build.cache_info().currsize <= 8


def test_a_program_depends_on_its_surroundings_alone():
    around = Surroundings(NodeLocation("node-1", ""))
    item, pieces = service(), slices(3)
    assert program.program(item, pieces, around) == program.program(item, pieces, around)
