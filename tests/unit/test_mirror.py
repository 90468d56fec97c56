"""A mirror of a State has what the State has, however it was read, and no part of it is large."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from agent.loop import Ask
from agent.reader import StateReader
from rules import feed as subject
from rules.events import Delete, Event, NodeAddresses, Synced, Upsert
from rules.feed import MAX_ITEMS, Feed
from rules.mirror import Mirror, Part, read
from rules.objects import EndpointSlice, Name, Service
from rules.options import Options
from rules.state import State
from tests.manifest import endpoint, endpoint_slice, node, service


def content(state: State) -> dict[str, Any]:
    """All that a State knows, without what follows from it."""
    found = dict(vars(state))
    for name in ("_slice_owner", "_counts", "_feeds", "changes", "_node_problems"):
        found.pop(name, None)
    found["local"] = vars(found["local"])
    found["problems"] = found["problems"].open(), found["problems"].counts()
    claims = found["claims"]
    found["claims"] = {
        claim: (claims.claimants(claim), claims.holder(claim))
        for side in claims.all()
        for claim in side
    }
    return found


def read_all(state: State, feed: Feed, reading: Mirror) -> list[Part]:
    """All that is unread, and its parts."""
    parts = []
    while True:
        parts.append(read(state, feed))
        if reading.take(parts[-1]):
            return parts


def loaded(services: int) -> State:
    state = State(Options(node="node-1"))
    state.apply([NodeAddresses(frozenset(), ()), Upsert(node())])
    for number in range(services):
        name = f"web-{number}"
        address = f"10.{96 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"
        state.apply([Upsert(service(name, cluster_ips=[address]))])
        state.apply([Upsert(endpoint_slice(name, [endpoint("10.0.0.1")]))])
    state.apply([Synced()])
    state.resync(lambda _: None)
    return state


def test_parts_are_bounded_and_together_everything():
    state, feed, reading = loaded(3 * MAX_ITEMS + 10), Feed(), Mirror()
    parts = read_all(state, feed, reading)
    assert max(len(p.services) + len(p.claims) for p in parts) == MAX_ITEMS
    assert reading.state is not None
    assert content(reading.state) == content(state.snapshot())


def test_what_is_copied_for_each_reading_does_not_grow_with_the_services():
    """All that a change copies besides its own Service and claims."""
    state = loaded(2000)
    state.endpoint_edges.clear()  # as the loop does after each transaction
    rest = state.without_services()
    sizes = {
        name: len(value)
        for name, value in vars(rest).items()
        if isinstance(value, (dict, set, list, frozenset))
    }
    assert max(sizes.values()) < 100, sizes
    assert [len(side) for side in rest.claims.all()] == [0, 0]


def test_after_a_change_only_that_is_read():
    state, feed, reading = loaded(50), Feed(), Mirror()
    read_all(state, feed, reading)
    first = reading.state
    (part,) = read_all(state, feed, reading)
    assert (part.services, part.claims, part.rest) == ({}, {}, None)
    assert reading.state is first
    state.apply([Upsert(endpoint_slice("web-7", [endpoint("10.0.0.2")]))])
    state.step()
    (part,) = read_all(state, feed, reading)
    assert list(part.services) == [Name("default", "web-7")]
    assert len(part.claims) == 1
    assert reading.state is not None
    assert reading.state is not first
    assert content(reading.state) == content(state.snapshot())


def test_what_changes_between_two_parts_is_read_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(subject, "MAX_ITEMS", 7)
    state, feed, reading = loaded(40), Feed(), Mirror()
    for number in range(12):
        assert not reading.take(read(state, feed))
        assert reading.state is None
        state.apply([Delete(Service, Name("default", f"web-{number}"))])
        state.apply([Upsert(service(f"new-{number}", cluster_ips=[f"10.97.0.{number + 1}"]))])
        state.step()
    read_all(state, feed, reading)
    assert reading.state is not None
    assert content(reading.state) == content(state.snapshot())


def test_a_reader_that_stays_away_starts_over(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(subject, "MAX_UNREAD", 20)
    state, feed, reading = loaded(10), Feed(), Mirror()
    read_all(state, feed, reading)
    for number in range(30):
        state.apply([Upsert(service(f"new-{number}", cluster_ips=[f"10.97.0.{number + 1}"]))])
        state.step()
    assert not feed.attached
    assert read_all(state, feed, reading)[0].first
    assert reading.state is not None
    assert content(reading.state) == content(state.snapshot())


@pytest.mark.parametrize("seed", range(20))
def test_random_histories(monkeypatch: pytest.MonkeyPatch, seed: int):
    """Services that share addresses, slices that change their owner, moves of the node, repairs;
    two readers that read at different times, and give up in the middle."""
    monkeypatch.setattr(subject, "MAX_ITEMS", 3)
    monkeypatch.setattr(subject, "MAX_UNREAD", 25)
    choose, state = random.Random(seed), State(Options(node="node-1"))
    state.apply([NodeAddresses(frozenset(), ()), Upsert(node()), Synced()])
    state.resync(lambda _: None)
    readers = [(Feed(), Mirror()), (Feed(), Mirror())]

    def event() -> Event:
        name = f"web-{choose.randrange(8)}"
        makers: list[Callable[[], Event]] = [
            lambda: Upsert(
                service(
                    name,
                    cluster_ips=[f"10.96.0.{choose.randrange(1, 12)}"],
                    externalIPs=[f"192.0.2.{choose.randrange(3)}"],
                )
            ),
            lambda: Upsert(endpoint_slice(name, [endpoint(f"10.0.0.{choose.randrange(1, 5)}")])),
            lambda: Delete(Service, Name("default", name)),
            lambda: Delete(EndpointSlice, Name("default", f"{name}-ipv4")),
            lambda: Upsert(node(zone=choose.choice("ab"))),
        ]
        return choose.choice(makers)()

    for _ in range(200):
        state.apply([event() for _ in range(choose.randrange(4))])
        if choose.random() < 0.9:
            state.step()
        if choose.random() < 0.03:
            state.resync(lambda _: None)
        feed, reading = choose.choice(readers)
        if choose.random() < 0.3:
            reading.take(read(state, feed))
        elif choose.random() < 0.5:
            read_all(state, feed, reading)
            assert reading.state is not None
            assert content(reading.state) == content(state.snapshot())


def test_a_late_answer_is_no_answer_to_the_next_question():
    """A reader that gave up takes in what comes later, and asks for the state of that time."""
    state = loaded(5)
    asked: list[Ask] = []
    reader = StateReader(asked.append, 0.0)
    assert reader.take() is None
    assert reader.take() is None
    assert len(asked) == 1

    def answer(ask: Ask) -> None:
        ask.answer(read(state, ask.feed))

    reader._put = answer  # the loop has time again
    while not asked[0].feed.version > 0:
        answer(asked[0])
        reader.take()
    state.apply([Upsert(service("late", cluster_ips=["10.97.0.1"]))])
    found = reader.take()
    assert found is reader.last
    assert found is not None
    assert Name("default", "late") in found.services
