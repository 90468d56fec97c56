"""The thread that deletes stale UDP flows: by what it judges, when, and what failures do."""

from __future__ import annotations

import errno
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from agent.kernel.conntrack import FEW, filters_of
from agent.kernel.errors import ConntrackError
from agent.kernel.flows import FlowCleaner
from rules.frontends import destination_key
from rules.objects import UDP
from rules.program import Claim
from rules.stale_flows import Flow, FlowFilter, Look
from rules.tables import SETS
from tests.unit.test_conntrack import BOTH, BY_IP, BY_PORT, CLIENT, NODE, VIP, A, B, packed

Judge = Callable[[Flow], bool]
NONE = frozenset[bytes]()


class FakeConntrack:
    """Hands each request to the test, which judges flows and then ends the request."""

    def __init__(self) -> None:
        self.requests: queue.SimpleQueue[tuple[Any, Judge, threading.Event]] = queue.SimpleQueue()
        self.errors: list[ConntrackError] = []
        self.opened = self.closed = 0

    def connect(self) -> Any:
        self.opened += 1
        return self

    def forget(self, claims: Any, is_stale: Judge) -> dict[int, int]:
        if self.errors:
            raise self.errors.pop(0)
        done = threading.Event()
        self.requests.put((claims, is_stale, done))
        while not done.wait(0.01):
            is_stale(Flow(CLIENT, VIP, A, 99))  # as a dump that continues
        return {4: 1}

    def close(self) -> None:
        self.closed += 1

    def next(self) -> tuple[Any, Judge, threading.Event]:
        return self.requests.get(timeout=10)


@pytest.fixture
def conntrack() -> FakeConntrack:
    return FakeConntrack()


@pytest.fixture
def deleted() -> queue.SimpleQueue[tuple[int, int]]:
    return queue.SimpleQueue()


@pytest.fixture
def cleaner(
    conntrack: FakeConntrack, deleted: queue.SimpleQueue[tuple[int, int]]
) -> Iterator[FlowCleaner]:
    failures: list[Exception] = []
    made = FlowCleaner(
        structlog.get_logger(),
        lambda _, error: failures.append(error),
        lambda family, flows, _: deleted.put((family, flows)),
        conntrack.connect,
    )
    made.start()
    yield made
    assert made.stop(10)
    assert not failures
    assert conntrack.closed == conntrack.opened


def test_a_flow_is_judged_by_what_was_expected_last(
    cleaner: FlowCleaner, conntrack: FakeConntrack
) -> None:
    cleaner.expect({BY_IP: BOTH, BY_PORT: BOTH}, everything=True)
    cleaner.expect({BY_IP: frozenset((B,)), BY_PORT: None})
    cleaner.look(Look({BY_IP: BOTH, BY_PORT: BOTH}, frozenset((NODE[:4],))))
    claims, is_stale, done = conntrack.next()
    assert claims == {BY_IP: BOTH, BY_PORT: BOTH}
    assert is_stale(Flow(CLIENT, VIP, A))
    assert not is_stale(Flow(CLIENT, VIP, B))
    assert is_stale(Flow(CLIENT, NODE, A))  # a claim that has ended, to what served it
    done.set()


def test_a_flow_to_an_endpoint_that_is_added_during_a_dump_stays(
    cleaner: FlowCleaner, conntrack: FakeConntrack
) -> None:
    """The worker learns of the endpoint before the kernel can send a flow to it."""
    cleaner.expect({BY_IP: frozenset((A,))}, everything=True)
    cleaner.look(Look({BY_IP: NONE}, NONE))
    _, is_stale, done = conntrack.next()
    assert is_stale(Flow(CLIENT, VIP, B))
    cleaner.expect({BY_IP: BOTH})
    assert not is_stale(Flow(CLIENT, VIP, B))
    done.set()


def test_a_complete_record_replaces_what_was_expected_before(
    cleaner: FlowCleaner, conntrack: FakeConntrack
) -> None:
    cleaner.expect({BY_IP: BOTH})
    cleaner.expect({}, everything=True)
    cleaner.look(Look({}, NONE, everything=True))
    claims, is_stale, done = conntrack.next()
    assert claims is None
    assert not is_stale(Flow(CLIENT, VIP, VIP))  # not ours any more
    done.set()


def test_looks_during_a_dump_are_merged_into_one(
    cleaner: FlowCleaner,
    conntrack: FakeConntrack,
    deleted: queue.SimpleQueue[tuple[int, int]],
) -> None:
    cleaner.look(Look({BY_IP: BOTH}, NONE))
    _, _, done = conntrack.next()
    cleaner.look(Look({BY_IP: frozenset((A,))}, NONE))
    cleaner.look(Look({BY_IP: frozenset((B,)), BY_PORT: NONE}, NONE))
    done.set()
    claims, _, done = conntrack.next()
    assert claims == {BY_IP: BOTH, BY_PORT: NONE}
    done.set()
    # each look is reported for both families, as kube-proxy counts it
    assert [deleted.get(timeout=10) for _ in range(4)] == [(4, 1), (6, 0), (4, 1), (6, 0)]
    assert conntrack.requests.empty()


def test_it_stops_in_the_middle_of_a_dump(cleaner: FlowCleaner, conntrack: FakeConntrack) -> None:
    cleaner.look(Look({BY_IP: BOTH}, NONE))
    conntrack.next()
    assert cleaner.stop(10)
    assert conntrack.closed == 1


def test_a_failure_of_conntrack_is_logged_once_and_the_next_look_connects_again(
    conntrack: FakeConntrack, cleaner: FlowCleaner
) -> None:
    with capture_logs() as lines:
        conntrack.errors = [ConntrackError(errno.EPERM, "reading conntrack")] * 2
        for failures in (1, 2):
            cleaner.look(Look({BY_IP: BOTH}, NONE))
            while conntrack.closed < failures:
                time.sleep(0.001)
        cleaner.look(Look({BY_IP: BOTH}, NONE))
        _, _, done = conntrack.next()
        done.set()
        cleaner.stop()
    warnings = [line for line in lines if line["log_level"] == "warning"]
    assert [line["event"] for line in warnings] == ["stale_flows_kept"]
    assert warnings[0]["error"].endswith("Run it as root or with CAP_NET_ADMIN.")
    assert [line["event"] for line in lines if line not in warnings] == ["stale_flows_deleted"]


def test_many_destinations_with_few_ports_are_asked_for_by_port() -> None:
    """A dump by port costs the kernel a walk; one of everything costs us each flow."""

    def claims(ports: int) -> list[Claim]:
        return [
            Claim(SETS[4].service_ips, destination_key(packed(f"10.96.0.{n}"), UDP, 53 + n % ports))
            for n in range(2 * FEW * ports)
        ]

    assert filters_of(claims(1), 4) == [FlowFilter(4, b"", 53)]
    assert filters_of(claims(FEW + 1), 4) == [None]
    assert filters_of(claims(1), 6) == []
