"""What the trace says of single rules and of whole programs.

`tests/kernel/test_trace_against_kernel.py` holds the same against packets; here are the things
that packets do not show: steps, slots, incomplete elements, and the words no table uses yet.
"""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from msgspec.structs import replace

from agent.config.settings import Settings
from rules.events import Upsert
from rules.language import (
    Base,
    Chain,
    Fields,
    Final,
    FromInterface,
    GoBy,
    Goto,
    Hook,
    In,
    IsProtocol,
    Jump,
    Mark,
    Marked,
    NotFromInterface,
    Rule,
    Set,
    Statement,
    Table,
    Translate,
    Unmark,
    rule,
)
from rules.objects import TCP, UDP, Object
from rules.state import State
from rules.tables import SETS
from rules.target import target_of, target_text
from rules.trace import (
    Effect,
    Elements,
    End,
    Masquerade,
    Match,
    Packet,
    Trace,
    UnknownChain,
    trace,
)
from tests.manifest import endpoint, endpoint_slice, node, service, service_cidr


def packed(text: str) -> bytes:
    return ipaddress.ip_address(text).packed


def target(address: str, port: int = 8080) -> bytes:
    return target_of(packed(address), port)


# --- single words -------------------------------------------------------------------------------

F = Fields.of(4)
PACKET = Packet(packed("10.0.0.1"), packed("10.0.0.2"), TCP, 80, "eth0")
PREROUTING = Base("nat", Hook.PREROUTING, -100)


def table(*chains: Chain) -> Table:
    return Table(4, "t", (), chains)


def one(*rules: Rule, others: tuple[Chain, ...] = ()) -> Table:
    return table(Chain("start", rules, PREROUTING), *others)


def ends(described: Table, elements: Elements | None = None, packet: Packet = PACKET) -> set[End]:
    return set(trace(described, elements or {}, packet).ends)


NETS = Set(4, "nets", (F.saddr,), interval=True)
PAIRS = Set(4, "pairs", (F.daddr, F.dport, F.saddr), interval=True)
HERE = {NETS: {packed("10.0.0.0"): packed("10.0.0.255")}}


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        (IsProtocol(TCP), True),
        (IsProtocol(UDP), False),
        (FromInterface("eth0"), True),
        (FromInterface("eth"), False),
        (FromInterface("eth", prefix=True), True),
        (NotFromInterface("eth0"), False),
        (NotFromInterface("eth", prefix=True), False),
        (NotFromInterface("cni0"), True),
        (In((F.saddr,), NETS), True),
        (In((F.saddr,), NETS, negated=True), False),
        (Marked(1), False),
    ],
)
def test_a_condition_lets_the_rule_go_on_if_it_holds(condition: Statement, holds: bool) -> None:
    found = ends(one(rule(condition, Final.DROP)), HERE)
    assert found == {End.DROPPED if holds else End.PASSED}


@pytest.mark.parametrize(
    ("low", "high", "holds"),
    [
        (("10.0.0.2", 80, "10.0.0.0"), ("10.0.0.2", 80, "10.0.0.255"), True),
        (("10.0.0.2", 80, "10.0.0.2"), ("10.0.0.2", 80, "10.0.0.255"), False),
        # between the bounds as one long number, but not in each field
        (("10.0.0.2", 79, "10.0.0.9"), ("10.0.0.2", 81, "10.0.0.10"), False),
    ],
)
def test_a_range_holds_in_every_field(
    low: tuple[str, int, str], high: tuple[str, int, str], holds: bool
) -> None:
    def key(daddr: str, port: int, saddr: str) -> bytes:
        return target_of(packed(daddr), port) + packed(saddr)

    elements = {PAIRS: {key(*low): key(*high)}}
    found = ends(one(rule(In((F.daddr, F.dport, F.saddr), PAIRS), Final.DROP)), elements)
    assert found == {End.DROPPED if holds else End.PASSED}


def test_marks_are_set_and_cleared_by_bits() -> None:
    described = one(
        rule(Mark(6)),
        rule(Unmark(2)),
        rule(Marked(2), Final.DROP),
        rule(Marked(4), Final.RESET),
    )
    found = trace(described, {}, PACKET)
    assert found.ends == {End.REFUSED}
    assert [s.effect for s in found.steps] == [Effect.MARKS, Effect.UNMARKS, Effect.REFUSES]


def test_a_jump_returns_and_a_goto_does_not() -> None:
    empty, drop = Chain("empty", ()), rule(Final.DROP)
    onward = Chain("onward", (rule(Goto("empty")), drop))
    assert ends(one(rule(Jump("empty")), drop, others=(empty,))) == {End.DROPPED}
    assert ends(one(rule(Goto("empty")), drop, others=(empty,))) == {End.PASSED}
    # behind a goto within a jump the packet is where the jump was made
    found = trace(one(rule(Jump("onward")), rule(Final.RESET), others=(onward, empty)), {}, PACKET)
    assert found.ends == {End.REFUSED}


def test_return_leaves_the_chain_only() -> None:
    back = Chain("back", (rule(Final.RETURN), rule(Final.DROP)))
    assert ends(one(rule(Jump("back")), rule(Final.RESET), others=(back,))) == {End.REFUSED}
    assert ends(one(rule(Final.RETURN), rule(Final.DROP))) == {End.PASSED}


def test_base_chains_come_by_priority() -> None:
    late = Chain("late", (rule(Final.DROP),), replace(PREROUTING, priority=1))
    early = Chain("early", (rule(Final.RESET),), replace(PREROUTING, priority=0))
    assert ends(table(late, early)) == {End.REFUSED}


def test_a_translation_ends_the_hook_and_is_seen_behind_it() -> None:
    targets = Set(4, "targets", (F.daddr,), data=(F.daddr, F.dport))
    found = trace(
        table(
            Chain("first", (rule(Translate((F.daddr,), targets)), rule(Final.DROP)), PREROUTING),
            Chain("second", (rule(Final.DROP),), replace(PREROUTING, priority=0)),
            Chain("forward", (rule(Final.RESET),), Base("filter", Hook.FORWARD, 0)),
        ),
        {targets: {PACKET.destination: target("10.0.0.9", 81)}},
        PACKET,
    )
    (branch,) = found.branches
    assert (branch.end, branch.target, branch.slot) == (End.REFUSED, target("10.0.0.9", 81), None)
    (step,) = found.steps
    assert (step.effect, step.detail) == (Effect.SENDS, "10.0.0.9:81")
    assert step.matched == (Match("targets", "10.0.0.2 : 10.0.0.9 . 81"),)


def test_a_verdict_to_a_chain_of_another_program_is_an_error() -> None:
    verdicts = Set(4, "verdicts", (F.daddr,), verdicts=True)
    with pytest.raises(UnknownChain, match="lb-9"):
        trace(
            one(rule(GoBy((F.daddr,), verdicts))), {verdicts: {PACKET.destination: "lb-9"}}, PACKET
        )


# --- draws --------------------------------------------------------------------------------------

SLOTS = Set(4, "slots", (F.daddr, F.dport, F.random(8)), data=(F.daddr, F.dport))


def slots(*numbers: int) -> Elements:
    prefix = target_of(PACKET.destination, PACKET.port)
    return {SLOTS: {prefix + n.to_bytes(4, sys.byteorder): target(f"10.1.0.{n}") for n in numbers}}


def draw(width: int, offset: int = 0) -> Rule:
    return rule(Translate((F.daddr, F.dport, F.random(width, offset)), SLOTS))


def drawn(found: Trace) -> list[tuple[End, int | None]]:
    return [(branch.end, branch.slot) for branch in found.branches]


def test_a_draw_can_hit_every_slot_in_its_range() -> None:
    found = trace(one(draw(2), rule(Final.DROP)), slots(0, 1, 2), PACKET)
    assert drawn(found) == [(End.SENT, 0), (End.SENT, 1)]
    assert found.targets == {target("10.1.0.0"), target("10.1.0.1")}


def test_a_draw_that_may_miss_also_continues() -> None:
    found = trace(one(draw(3), rule(Final.DROP)), slots(0, 2), PACKET)
    assert drawn(found) == [(End.SENT, 0), (End.SENT, 2), (End.DROPPED, None)]


def test_drawing_again_is_one_step_and_ends_in_a_range_that_is_full() -> None:
    found = trace(one(draw(4), draw(4), draw(2), rule(Final.DROP)), slots(0, 1, 2), PACKET)
    assert drawn(found) == [(End.SENT, 0), (End.SENT, 1), (End.SENT, 2)]
    (step,) = found.steps
    assert (step.effect, step.detail, len(step.matched)) == (Effect.DRAWS, "3", 3)


def test_an_offset_draws_from_the_other_list() -> None:
    assert drawn(trace(one(draw(2, 4)), slots(0, 1, 4, 5), PACKET)) == [
        (End.SENT, 4),
        (End.SENT, 5),
    ]


def test_a_draw_from_nothing_continues() -> None:
    found = trace(one(draw(2), rule(Final.RESET)), {}, PACKET)
    assert drawn(found) == [(End.REFUSED, None)]
    assert [s.effect for s in found.steps] == [Effect.MISSES, Effect.REFUSES]


# --- whole programs -----------------------------------------------------------------------------

NODE = packed("172.31.0.2")
POD, REMOTE = "10.244.1.11", "10.244.2.11"


def stepped(*objects: Object, **chosen: Any) -> State:
    state = State(Settings(node="node-1", **({"cluster_cidr": "10.244.0.0/16"} | chosen)).options())
    state.apply([Upsert(o) for o in (node(), service_cidr("10.96.0.0/16"), *objects)])
    state.step()
    return state


def web(*addresses: str, **spec: Any) -> Iterator[Object]:
    yield service(
        type="NodePort",
        cluster_ips=["10.96.0.10"],
        externalIPs=["203.0.113.1"],
        ports=[{"name": "http", "port": 80, "nodePort": 30080}],
        **spec,
    )
    found = [
        endpoint(a, node="node-1" if a.startswith("10.244.1.") else "node-2") for a in addresses
    ]
    yield endpoint_slice("web", found)


def ask(
    state: State,
    source: str,
    address: str = "10.96.0.10",
    port: int = 80,
    elements: Elements | None = None,
) -> Trace:
    packet = Packet(
        packed(source),
        packed(address),
        TCP,
        port,
        from_node=packed(source) == NODE,
        own=frozenset({NODE}),
    )
    return trace(state.tables()[0], elements or state.elements(), packet)


def masquerades(found: Trace) -> dict[str, Masquerade]:
    return {target_text(branch.target): branch.masquerade for branch in found.branches}


def test_only_the_endpoint_that_asks_is_a_hairpin() -> None:
    found = ask(stepped(*web(POD, "10.244.1.12")), POD)
    assert masquerades(found) == {
        f"{POD}:8080": Masquerade.HAIRPIN,
        "10.244.1.12:8080": Masquerade.NO,
    }


@pytest.mark.parametrize("source", ["172.31.0.2", "198.51.100.1"])
def test_clients_that_are_no_pods_are_masqueraded_to_cluster_ips(source: str) -> None:
    found = ask(stepped(*web(POD)), source)
    assert masquerades(found) == {f"{POD}:8080": Masquerade.MARK}
    assert Match("pod-cidrs", "") in [m for s in found.steps for m in s.matched]


def test_external_addresses_under_policy_local_by_who_asks() -> None:
    state = stepped(*web(POD, REMOTE, externalTrafficPolicy="Local"))
    for address, port in (("203.0.113.1", 80), ("172.31.0.2", 30080)):
        outside = ask(state, "198.51.100.1", address, port)
        assert masquerades(outside) == {f"{POD}:8080": Masquerade.NO}
        assert [branch.slot for branch in outside.branches] == [0]
        inside = ask(state, "10.244.1.99", address, port)
        assert [branch.slot for branch in inside.branches] == [0, 1]
        assert set(masquerades(inside).values()) == {Masquerade.NO}
        own = ask(state, "172.31.0.2", address, port)
        assert own.targets == inside.targets
        assert set(masquerades(own).values()) == {Masquerade.MARK}


@pytest.mark.parametrize(
    ("address", "port", "end"),
    [
        ("10.96.0.10", 81, End.REFUSED),
        ("10.96.0.99", 80, End.DROPPED),
        ("203.0.113.1", 81, End.PASSED),
        ("172.31.0.2", 30081, End.PASSED),
        ("203.0.113.1", 80, End.DROPPED),
        ("172.31.0.2", 30080, End.DROPPED),
        ("10.96.0.10", 80, End.SENT),
    ],
)
def test_ends_of_a_service_without_local_endpoints(address: str, port: int, end: End) -> None:
    state = stepped(*web(REMOTE, externalTrafficPolicy="Local"))
    assert ask(state, "198.51.100.1", address, port).ends == {end}


def test_an_unknown_client_is_remembered_and_a_known_one_decided() -> None:
    state = stepped(*web(POD, REMOTE, sessionAffinity="ClientIP"))
    unknown = ask(state, "10.244.1.99")
    assert len(unknown.branches) == 2
    assert {branch.remembered for branch in unknown.branches} == {10800}
    assert Effect.MISSES in [s.effect for s in unknown.steps]
    key = packed("10.244.1.99") + packed("10.96.0.10") + b"\x06\0\0\0" + b"\0\x50\0\0"
    elements: Elements = {**state.elements(), SETS[4].affinity: {key: target(REMOTE)}}
    (branch,) = ask(state, "10.244.1.99", elements=elements).branches
    assert (branch.end, branch.target, branch.slot) == (End.SENT, target(REMOTE), None)
    assert branch.remembered == 10800
    assert len(ask(state, "10.244.1.98", elements=elements).branches) == 2


def test_an_endpoint_with_the_nodes_address_is_delivered_and_remembered() -> None:
    state = stepped(*web("172.31.0.2", sessionAffinity="ClientIP"))
    (branch,) = ask(state, "10.244.1.99").branches
    assert (branch.end, branch.remembered) == (End.SENT, 10800)
    assert "remember" in [step.chain for step in branch.steps]


def test_pods_identified_by_interface() -> None:
    state = stepped(
        *web(POD, REMOTE, externalTrafficPolicy="Local"),
        cluster_cidr="",
        detect_local_mode="InterfaceNamePrefix",
        pod_interface_name_prefix="veth",
    )
    packet = Packet(packed("10.9.9.9"), packed("203.0.113.1"), TCP, 80, "vethabc")
    inside = trace(state.tables()[0], state.elements(), packet)
    assert len(inside.branches) == 2
    assert inside.steps[0].matched == (Match("iifname", "vethabc"),)
    outside = Packet(packed("10.9.9.9"), packed("203.0.113.1"), TCP, 80, "eth0")
    assert len(trace(state.tables()[0], state.elements(), outside).branches) == 1


def test_targets_are_written_with_brackets_where_needed() -> None:
    assert target_text(target("10.0.0.1")) == "10.0.0.1:8080"
    assert target_text(target("fd00::1", 53)) == "[fd00::1]:53"


@pytest.mark.parametrize(("address", "port"), [("10.96.0.10", 80), ("172.31.0.2", 30080)])
def test_a_connection_that_is_counted_by_endpoint_is_not_remembered(
    address: str, port: int
) -> None:
    asked = {"sliceproxy.io/endpoint-counters": "true"}
    state = stepped(*web(REMOTE, annotations=asked))
    (branch,) = ask(state, "198.51.100.1", address, port).branches
    assert Effect.COUNTS in [step.effect for step in branch.steps]
    assert (branch.end, branch.remembered) == (End.SENT, 0)
