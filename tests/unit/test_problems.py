"""Problems as data: opened, counted, closed, bounded; and those of the node itself."""

from __future__ import annotations

from typing import Any

import pytest

from rules.events import Delete, NodeAddresses, Synced, Upsert
from rules.objects import Node, Object, parse_address
from rules.options import DetectLocalMode, Options
from rules.problems import (
    CODES,
    MAX_KEPT,
    MAX_REPORTED,
    MAX_TEXT,
    UNUSABLE_VALUE,
    Problems,
    Subject,
    listed,
)
from rules.state import State
from rules.tables import SETS
from tests.manifest import endpoint, endpoint_slice, node, service

WEB = Subject("Service", "default/web", "default/web")


def test_a_problem_opens_is_counted_and_closes():
    problems = Problems()
    problems.found(UNUSABLE_VALUE, WEB, "one")
    problems.found(UNUSABLE_VALUE, WEB, "one")
    (opened,) = problems.collect(5.0).opened
    assert (opened.text, opened.since, opened.count) == ("one", 5.0, 1)
    problems.found(UNUSABLE_VALUE, WEB, "two")
    assert not any(problems.collect(6.0))
    (known,) = problems.open()
    assert (known.text, known.since, known.count) == ("two", 5.0, 2)
    problems.gone(UNUSABLE_VALUE, WEB)
    assert problems.collect(7.0).closed == (known,)
    assert not problems.open()
    assert problems.counts() == dict.fromkeys(CODES, 0)


def test_what_closes_and_opens_between_two_collects_is_not_reported():
    problems = Problems()
    problems.found(UNUSABLE_VALUE, WEB, "one")
    problems.collect(1.0)
    problems.gone(UNUSABLE_VALUE, WEB)
    problems.found(UNUSABLE_VALUE, WEB, "one")
    assert not any(problems.collect(2.0))
    assert problems.open()[0].since == 1.0
    other = Subject("Node", "n")
    problems.found(UNUSABLE_VALUE, other, "x")
    problems.gone(UNUSABLE_VALUE, other)
    assert not any(problems.collect(3.0))


def test_texts_lines_and_the_registry_are_bounded():
    problems = Problems()
    for number in range(MAX_KEPT + 500):
        problems.found(UNUSABLE_VALUE, Subject("Service", f"a/{number}"), "x" * 5000)
    assert len(problems.open()) == MAX_KEPT
    assert all(len(p.text) == MAX_TEXT for p in problems.open())
    assert problems.counts()[UNUSABLE_VALUE] == MAX_KEPT + 500
    collected = problems.collect(1.0)
    assert len(collected.opened) == MAX_REPORTED
    assert collected.omitted == MAX_KEPT - MAX_REPORTED
    for number in range(MAX_KEPT + 500):
        problems.gone(UNUSABLE_VALUE, Subject("Service", f"a/{number}"))
    assert problems.counts()[UNUSABLE_VALUE] == 0
    assert not problems.open()


def test_a_list_names_the_first_few():
    assert listed(["a"]) == "a"
    assert listed("abcde") == "a; b; c; and 2 more"
    assert listed([]) == ""


def test_an_object_with_a_thousand_bad_values_has_one_problem():
    state = State(Options(node="node-1"))
    bad = service(externalIPs=[f"127.0.{n >> 8}.{n & 255}" for n in range(1, 1001)])
    state.apply([Upsert(bad)])
    (problem,) = state.problems.open()
    assert problem.code == "unusable_value"
    assert "and 997 more" in problem.text
    assert len(problem.text) <= MAX_TEXT
    state.apply([Upsert(service())])
    assert not state.problems.open()


def test_the_fields_of_a_line_name_the_service():
    piece = endpoint_slice("web", [endpoint("127.0.0.1")], name="web-x")
    state = State(Options(node="node-1"))
    state.apply([Upsert(piece)])
    (problem,) = state.problems.open()
    assert problem.fields == {"service": "default/web", "endpointslice": "default/web-x"}


# --- the node -----------------------------------------------------------------------------------


def running(*objects: Object, expected: bool = True, **options: Any) -> State:
    state = State(Options(node="node-1", **options))
    state.local.expected = expected
    return put(state, NodeAddresses(frozenset({parse_address("172.31.0.2")}), ()), *objects)


def put(state: State, *events: Any) -> State:
    state.apply(Upsert(e) if isinstance(e, Object) else e for e in events)
    state.step()
    return state


def codes(state: State) -> list[str]:
    return [p.code for p in state.problems.open()]


NODE_CIDR = {"detect_local": DetectLocalMode.NODE_CIDR}


def test_a_node_of_another_name_is_reported_once_the_source_is_complete():
    state = running()
    assert not codes(state)
    put(state, Synced())
    (problem,) = state.problems.open()
    assert problem.code == "node_unknown"
    assert problem.subject == Subject("Node", "node-1")
    assert "--node" in problem.text
    put(state, node())
    assert not codes(state)


def test_manifests_may_do_without_a_node():
    assert not codes(put(running(expected=False), Synced()))


def test_missing_pod_cidrs_are_reported_in_mode_node_cidr_alone():
    bare = node(pod_cidrs=())
    assert codes(running(bare, Synced(), **NODE_CIDR)) == ["pod_cidrs_missing"]
    assert not codes(running(bare, Synced()))
    assert not codes(put(running(bare, Synced(), **NODE_CIDR), node()))


def local(*addresses: str) -> Object:
    return endpoint_slice("web", [endpoint(a, node="node-1") for a in addresses])


def test_endpoints_on_this_node_outside_its_pod_cidrs_are_reported():
    """Pods in the host's network have the node's address and are no reason to worry."""
    state = running(node(), service(), local("10.244.1.5", "172.31.0.2"), Synced(), **NODE_CIDR)
    assert not codes(state)
    put(state, local("10.244.1.5", "10.9.9.9", "10.9.9.8"))
    (problem,) = state.problems.open()
    assert problem.code == "endpoints_outside_pod_cidrs"
    assert problem.text.startswith("2 endpoints on this node are outside its pod CIDRs")
    assert "10.9.9.8; 10.9.9.9" in problem.text
    put(state, node(pod_cidrs=["10.0.0.0/8"]))
    assert not codes(state)
    put(state, node(pod_cidrs=["10.244.1.0/24"]))
    put(state, local("10.244.1.5"))
    assert not codes(state)


@pytest.mark.parametrize("emptied", [False, True], ids=["deleted", "emptied"])
def test_a_node_that_is_gone_keeps_what_was_known_of_it(emptied):
    state = running(node(zone="z1"), service(), Synced(), **NODE_CIDR)
    before, around = state.elements(), state.surroundings()
    assert before[SETS[4].nodeport_ips]
    assert before[SETS[4].pod_cidrs]
    assert around.place.zone == "z1"
    if emptied:
        put(state, node(addresses=(), pod_cidrs=()))
        assert not state.node_leaving
    else:
        put(state, Delete(Node, "node-1"))
        assert state.node_leaving
        assert codes(state) == ["node_unknown"]
        assert "last known" in state.problems.open()[0].text
    assert state.elements() == before
    assert state.surroundings() == around
    put(state, node(addresses=["172.31.0.7"], zone="z2"))
    assert state.surroundings().place.zone == "z2"
    assert state.surroundings().node_addresses == (parse_address("172.31.0.7"),)
    assert not codes(state)
