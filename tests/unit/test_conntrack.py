"""Which UDP flows are stale, which changes make one look, and the bytes from and to the kernel."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.kernel.conntrack import (
    decode,
    delete_request,
    dump_request,
    filters_of,
    parse,
)
from rules.events import Delete, Upsert
from rules.frontends import destination_key
from rules.lookup import Destination, claim_met, claims_at
from rules.netlink.attributes import Malformed, attribute, attributes, nest
from rules.objects import TCP, UDP, EndpointSlice
from rules.options import Options
from rules.program import Claim
from rules.stale_flows import (
    Flow,
    FlowFilter,
    Look,
    Record,
    Serving,
    flow_filter,
    is_stale,
    is_udp,
    must_look,
)
from rules.state import State
from rules.tables import SETS
from tests.fuzzing import fuzzed
from tests.manifest import endpoint, endpoint_slice, node, service


def packed(address: str) -> bytes:
    return ipaddress.ip_address(address).packed


def at(address: str, port: int) -> bytes:
    return packed(address) + struct.pack("!Hxx", port)


VIP, NODE, OTHER = at("10.96.0.10", 53), at("172.31.0.2", 30053), at("1.1.1.1", 53)
A, B, C = at("10.244.1.1", 5353), at("10.244.1.2", 5353), at("10.244.1.1", 9999)
CLIENT = at("10.244.1.9", 40000)
BY_IP = Claim(SETS[4].service_ips, destination_key(packed("10.96.0.10"), UDP, 53))
BY_NODE_IP = Claim(SETS[4].service_ips, destination_key(packed("172.31.0.2"), UDP, 30053))
BY_PORT = Claim(SETS[4].service_nodeports, destination_key(b"", UDP, 30053))
BOTH, NONE = frozenset((A, B)), frozenset[bytes]()


def on_node(address: bytes) -> bool:
    return address == NODE[:4]


@pytest.mark.parametrize(
    ("destination", "target", "claims", "formerly", "stale"),
    [
        pytest.param(VIP, A, {BY_IP: BOTH}, {}, False, id="to an endpoint that serves"),
        pytest.param(VIP, A, {BY_IP: {B}}, {}, True, id="to one that no longer serves"),
        pytest.param(VIP, C, {BY_IP: BOTH}, {}, True, id="to another port of an endpoint"),
        pytest.param(VIP, A, {BY_IP: ()}, {}, True, id="to the last one, which was removed"),
        pytest.param(VIP, VIP, {BY_IP: BOTH}, {}, True, id="never translated"),
        pytest.param(
            VIP, VIP, {BY_IP: ()}, {}, False, id="never translated, and still no endpoint"
        ),
        pytest.param(VIP, VIP, {BY_IP: {VIP}}, {}, False, id="the endpoint has the same address"),
        pytest.param(VIP, A, {}, {}, False, id="no Service's address"),
        pytest.param(VIP, A, {}, {BY_IP: BOTH}, True, id="a deleted Service's, to its endpoint"),
        pytest.param(VIP, C, {}, {BY_IP: BOTH}, False, id="a deleted Service's, to another target"),
        pytest.param(VIP, VIP, {}, {BY_IP: BOTH}, False, id="a deleted Service's, untranslated"),
        pytest.param(VIP, A, {BY_IP: BOTH}, {BY_IP: {A}}, False, id="still right after a change"),
        pytest.param(OTHER, A, {BY_IP: {B}}, {}, False, id="elsewhere"),
        pytest.param(NODE, A, {BY_PORT: BOTH}, {}, False, id="node port, serves"),
        pytest.param(NODE, A, {BY_PORT: {B}}, {}, True, id="node port, no longer serves"),
        pytest.param(NODE, NODE, {BY_PORT: BOTH}, {}, True, id="node port, never translated"),
        pytest.param(NODE, A, {}, {BY_PORT: {A}}, True, id="node port, deleted"),
        pytest.param(
            at("172.31.0.9", 30053), A, {BY_PORT: {B}}, {}, False, id="port of another machine"
        ),
        pytest.param(
            NODE,
            A,
            {BY_NODE_IP: {A}, BY_PORT: {B}},
            {},
            False,
            id="an address has precedence over a port",
        ),
        pytest.param(
            NODE, A, {BY_PORT: {A}}, {BY_NODE_IP: {B}}, False, id="a node port takes over"
        ),
    ],
)
def test_a_flow_is_stale(
    destination: bytes,
    target: bytes,
    claims: dict[Claim, Serving],
    formerly: dict[Claim, Serving],
    stale: bool,
) -> None:
    flow = Flow(CLIENT, destination, target)
    current: Callable[[Claim], Serving | None] = {c: frozenset(s) for c, s in claims.items()}.get
    assert is_stale(flow, current, on_node, formerly) is stale


def test_an_untranslated_flow_in_another_zone_is_another_stage_of_the_way() -> None:
    serving = {BY_IP: BOTH}.get
    assert is_stale(Flow(CLIENT, VIP, VIP, 0), serving, on_node, {})
    assert not is_stale(Flow(CLIENT, VIP, VIP, 5), serving, on_node, {})
    assert is_stale(Flow(CLIENT, VIP, C, 5), serving, on_node, {})


@pytest.mark.parametrize(
    ("before", "after", "look"),
    [
        (NONE, NONE, False),
        (NONE, {A}, True),
        ({A}, NONE, True),
        ({A}, {A}, False),
        ({A}, {A, B}, False),
        ({A, B}, {B}, True),
        ({A}, {B}, True),
    ],
)
def test_when_to_look(before: set[bytes], after: set[bytes], look: bool) -> None:
    assert must_look(frozenset(before), frozenset(after)) is look


@fuzzed(100)
@given(
    before=st.frozensets(st.sampled_from([A, B, C])),
    after=st.frozensets(st.sampled_from([A, B, C])),
    came=st.booleans(),
    goes=st.booleans(),
)
def test_a_flow_that_no_look_covers_is_not_stale(
    before: Serving, after: Serving, came: bool, goes: bool
) -> None:
    """Every flow that became stale by a change is found, because the change makes one look."""
    had, has = (None if came else before), (None if goes else after)
    looked = must_look(had or NONE, has or NONE)
    formerly = {BY_IP: had or NONE} if looked else {}
    for target in (A, B, C, VIP):
        flow = Flow(CLIENT, VIP, target)
        was = is_stale(flow, lambda _: had, on_node, {})
        now = is_stale(flow, lambda _: has, on_node, formerly)
        if had is not None and has is not None and now and not was:
            assert looked
        if target in (had or ()) and target not in (has or ()):
            assert looked
            assert now
        if target in (has or ()):
            assert not now


def test_claims_and_filters() -> None:
    vip, own = Destination.of(BY_IP.key), Destination.of(BY_NODE_IP.key)
    assert claims_at(vip, on_node) == (BY_IP,)
    assert claims_at(own, on_node) == (BY_NODE_IP, BY_PORT)
    assert claim_met(own, on_node, {BY_PORT}) == BY_PORT
    assert claim_met(own, on_node, {BY_PORT, BY_NODE_IP}) == BY_NODE_IP
    assert claim_met(vip, on_node, {BY_PORT, BY_NODE_IP}) is None
    by_ip6 = Claim(SETS[6].service_ips, destination_key(packed("fd00::1"), UDP, 53))
    assert claims_at(Destination.of(by_ip6.key), on_node) == (by_ip6,)
    assert flow_filter(BY_IP) == FlowFilter(4, packed("10.96.0.10"), 53)
    assert flow_filter(BY_PORT) == FlowFilter(4, b"", 30053)
    assert flow_filter(by_ip6) == FlowFilter(6, packed("fd00::1"), 53)
    assert set(filters_of([BY_IP, BY_PORT, by_ip6], 4)) == {
        flow_filter(BY_IP),
        flow_filter(BY_PORT),
    }
    assert filters_of([BY_IP, BY_PORT, by_ip6], 6) == [FlowFilter(6, b"", 53)]
    assert is_udp(BY_IP)
    assert is_udp(BY_PORT)
    assert not is_udp(Claim(SETS[4].service_ips, destination_key(packed("1.1.1.1"), TCP, 53)))
    assert not is_udp(Claim(SETS[4].service_nodeports, destination_key(b"", TCP, 53)))


# --- bytes --------------------------------------------------------------------------------------


def conntrack_tuple(kind: int, source: bytes, destination: bytes, protocol: int = UDP) -> bytes:
    first = 1 if len(source) == 8 else 3
    return nest(
        kind,
        nest(1, attribute(first, source[:-4]), attribute(first + 1, destination[:-4])),
        nest(
            2,
            attribute(1, bytes([protocol])),
            attribute(2, source[-4:-2]),
            attribute(3, destination[-4:-2]),
        ),
    )


def entry(flow: Flow, *rest: bytes, protocol: int = UDP) -> bytes:
    """What the kernel sends: tuples, zone, status, mark, id, use, timeout."""
    return b"".join(
        (
            conntrack_tuple(1, flow.source, flow.destination, protocol),
            conntrack_tuple(2, flow.target, flow.source, protocol),
            attribute(18, struct.pack("!H", flow.zone)) if flow.zone else b"",
            *rest,
            attribute(3, struct.pack("!I", 8)),
            attribute(8, bytes(4)),
            attribute(12, b"iden"),
        )
    )


def read(content: bytes, family: int = 2) -> Flow | None:
    data = b"\0" * 16 + struct.pack("=BBH", family, 0, 0) + content
    return decode(data, 16, len(data))


def targets(length: int) -> st.SearchStrategy[bytes]:
    addresses = st.binary(min_size=length, max_size=length)
    return st.builds(lambda a, p: a + struct.pack("!Hxx", p), addresses, st.integers(0, 65535))


@fuzzed(100)
@given(
    st.sampled_from([4, 16]).flatmap(lambda n: st.tuples(targets(n), targets(n), targets(n))),
    st.sampled_from([0, 0, 1, 4242]),
)
def test_an_entry_is_read_by_offsets_or_by_attributes(
    three: tuple[bytes, bytes, bytes], zone: int
) -> None:
    flow = Flow(*three, zone)
    content = entry(flow)
    family = 2 if len(flow.source) == 8 else 10
    assert read(content, family) == parse(content) == flow._replace(entry=content)


def test_odd_entries_are_read_too() -> None:
    flow = Flow(CLIENT, VIP, A)
    shuffled = b"".join(
        (
            attribute(12, b"iden"),
            conntrack_tuple(2, flow.target, flow.source),
            conntrack_tuple(1, flow.source, flow.destination),
        )
    )
    assert read(shuffled) == flow._replace(entry=shuffled)


def test_what_is_not_udp_is_no_flow() -> None:
    assert read(entry(Flow(CLIENT, VIP, A), protocol=TCP)) is None
    assert read(b"") is None
    with pytest.raises(Malformed):
        read(entry(Flow(CLIENT, VIP, A))[:60])


def test_a_deletion_names_tuple_zone_and_id() -> None:
    flow = Flow(CLIENT, VIP, A, 7)
    known = flow._replace(entry=entry(flow))
    message = delete_request(known, 9, 4)
    length, kind, flags, sequence, _ = struct.unpack_from("=IHHII", message)
    assert (length, kind, flags, sequence) == (len(message), 0x102, 5, 9)
    sent = dict(attributes(message[20:]))
    assert set(sent) == {2, 12, 18}
    assert sent[12] == b"iden"
    assert sent[18] == struct.pack("!H", 7)
    assert conntrack_tuple(2, A, CLIENT) in message


def test_a_deletion_without_a_tuple_would_flush_everything() -> None:
    for entry_read in (b"", attribute(12, b"iden")):
        with pytest.raises(ValueError, match="was not read from conntrack"):
            delete_request(Flow(CLIENT, VIP, A, 0, entry_read), 1)


def test_a_dump_asks_for_no_ipv6_address() -> None:
    """The kernel's filter sends all flows but those to that address."""
    aimed = dump_request(4, FlowFilter(4, packed("10.96.0.10"), 53))
    assert packed("10.96.0.10") in aimed
    assert dict(attributes(dict(attributes(aimed[4:]))[25]))[1] == struct.pack("=I", 2 | 8 | 32)
    aimed6 = dump_request(6, FlowFilter(6, packed("fd00::1"), 53))
    assert packed("fd00::1") not in aimed6
    assert dict(attributes(dict(attributes(aimed6[4:]))[25]))[1] == struct.pack("=I", 8 | 32)
    everything = dump_request(4)
    assert dict(attributes(dict(attributes(everything[4:]))[25]))[1] == struct.pack("=I", 8)


# --- which changes make one look ------------------------------------------------------------------

DNS = {"name": "dns", "port": 53, "protocol": "UDP", "nodePort": 30053}
HTTP = {"name": "http", "port": 80}


def pods(*numbers: int, **conditions: Any) -> EndpointSlice:
    return endpoint_slice(
        "web",
        [endpoint(f"10.244.1.{n}", **conditions) for n in numbers],
        ports=[{"name": "dns", "port": 5353, "protocol": "UDP"}, {"name": "http", "port": 8080}],
        family="IPv4",
    )


class Node:
    """A state, and the flow worker's record of what it has programmed."""

    def __init__(self) -> None:
        self.state = State(Options(node="node-1"))
        self._record = Record()

    def look(self, *events: Upsert | Delete) -> dict[Claim, Serving]:
        """The claims to look at after these events."""
        self.state.apply(events)
        change = self.state.step().change
        self._record.expect(change.udp_serving)
        self._record.begin(Look(change.stale_udp, self.state.node_port_addresses()))
        return change.stale_udp

    def is_stale(self, destination: bytes, target: bytes) -> bool:
        return self._record.is_stale(Flow(CLIENT, destination, target))


@pytest.fixture
def here() -> Node:
    result = Node()
    web = service(ports=[DNS, HTTP], cluster_ips=["10.96.0.10"], type="NodePort")
    result.look(Upsert(node()), Upsert(web), Upsert(pods(1, 2)))
    return result


def test_only_udp_and_only_losses_make_one_look(here: Node) -> None:
    two = frozenset((A, B))
    assert here.look(Upsert(pods(1, 2, 3))) == {}
    assert here.look(Upsert(pods(1, 2))) == {
        BY_IP: two | {at("10.244.1.3", 5353)},
        BY_PORT: two | {at("10.244.1.3", 5353)},
    }
    # they serve while they terminate: the flows go on, also when others become ready
    assert here.look(Upsert(pods(1, 2, ready=False, serving=True, terminating=True))) == {}
    other = endpoint_slice(
        "web",
        [endpoint("10.244.1.7")],
        name="more",
        ports=[{"name": "dns", "port": 5353, "protocol": "UDP"}],
    )
    assert here.look(Upsert(other)) == {}
    assert not here.is_stale(VIP, A)
    # until they no longer serve, although no list changes by that
    gone = here.look(Upsert(pods(1, 2, ready=False, serving=False, terminating=True)))
    assert gone.keys() == {BY_IP, BY_PORT}
    assert here.is_stale(VIP, A)


def test_the_first_endpoint_makes_one_look(here: Node) -> None:
    assert here.look(Upsert(pods())).keys() == {BY_IP, BY_PORT}
    assert here.look(Upsert(pods(1))) == {BY_IP: NONE, BY_PORT: NONE}


def test_a_deleted_service_makes_one_look(here: Node) -> None:
    gone = here.look(Delete(type(service()), service().name))
    assert gone == {BY_IP: BOTH, BY_PORT: BOTH}
    assert here.is_stale(VIP, A)
    assert here.is_stale(NODE, A)
    assert here.look() == {}
    assert not here.is_stale(VIP, A)  # another program's by now


def test_an_address_that_begins_to_answer_at_node_ports(here: Node) -> None:
    new = here.look(Upsert(node(addresses=["172.31.0.7"])))
    assert new == {BY_PORT: NONE}
    assert here.is_stale(at("172.31.0.7", 30053), at("172.31.0.7", 30053))


def test_without_changes_there_is_no_look(here: Node) -> None:
    assert here.look() == {}
    assert here.look(Upsert(pods(1, 2))) == {}
