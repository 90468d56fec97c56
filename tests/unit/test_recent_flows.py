"""Connections for readers of the API: listened to while someone asks, bounded, nothing silent."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator

import pytest

from agent.kernel.errors import ConntrackError
from agent.serve import flows
from agent.serve.flows import KEPT, Recent, RecentFlows
from rules.flow_report import Lost, NewConnection
from rules.target import target_of
from tests.unit.fakes.flow_watch import FakeFlowWatch

PATIENCE = 20.0


def connection(number: int) -> NewConnection:
    client = target_of(bytes([10, 0, 0, 1]), number)
    where, endpoint = target_of(bytes([10, 96, 0, 10]), 80), target_of(bytes(4), 8080)
    return NewConnection(6, client, where, endpoint, client)


class Reader:
    """Recent flows of fake watches, and one who asks."""

    def __init__(self, seconds: float = 30.0) -> None:
        self.watches: list[FakeFlowWatch] = []
        self.flows = RecentFlows(
            lambda name, error: pytest.fail(f"{name}: {error}"), self._watch, seconds
        )

    def _watch(self) -> FakeFlowWatch:
        self.watches.append(FakeFlowWatch())
        return self.watches[-1]

    def until(self, sequence: int, enough: Callable[[Recent], object]) -> Recent:
        deadline = time.monotonic() + PATIENCE
        while not enough(found := self.flows.since(sequence)):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return found


@pytest.fixture
def reader() -> Iterator[Reader]:
    made = Reader()
    yield made
    made.flows.stop()


def test_nothing_runs_before_the_first_question(reader: Reader) -> None:
    assert reader.watches == []
    assert not reader.flows.listening
    first = reader.flows.since(0)
    assert (first.lost, first.seen) == (0, ())
    assert reader.flows.listening


def test_each_answer_has_the_connections_since_the_one_before(reader: Reader) -> None:
    first = reader.flows.since(0)
    for number in (1, 2):
        reader.watches[0].made.put(connection(number))
    second = reader.until(first.sequence, lambda r: len(r.seen) == 2)
    assert [s.connection for s in second.seen] == [connection(1), connection(2)]
    assert reader.flows.since(second.sequence) == Recent(second.sequence, 0, ())
    reader.watches[0].made.put(connection(3))
    third = reader.until(second.sequence, lambda r: r.seen)
    assert [s.connection for s in third.seen] == [connection(3)]
    assert len(reader.flows.since(first.sequence).seen) == 3  # another reader is not disturbed


def test_what_is_lost_is_counted_once(reader: Reader) -> None:
    """Lost by the kernel, and lost because no client asked in time."""
    first = reader.flows.since(0)
    reader.watches[0].made.put(Lost(7))
    second = reader.until(first.sequence, lambda r: r.lost)
    assert (second.lost, second.seen) == (7, ())
    for number in range(KEPT + 5):
        reader.watches[0].made.put(connection(number))
    third = reader.until(second.sequence, lambda r: r.sequence == second.sequence + KEPT + 5)
    assert (third.lost, len(third.seen)) == (5, KEPT)
    assert reader.flows.since(third.sequence).lost == 0


def test_it_listens_no_longer_when_no_one_asks_and_again_at_the_next_question() -> None:
    reader = Reader(seconds=0.05)
    first = reader.flows.since(0)
    deadline = time.monotonic() + PATIENCE
    while reader.flows.listening or reader.watches[0].open:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert reader.flows.since(first.sequence).seen == ()
    assert len(reader.watches) == 2
    reader.flows.stop()
    assert not reader.watches[1].open


def test_an_answer_of_an_earlier_agent_is_no_position(reader: Reader) -> None:
    assert reader.flows.since(10**9) == reader.flows.since(0)


def test_trouble_with_conntrack_is_the_next_answer_and_then_it_tries_again(reader: Reader) -> None:
    reader.flows.since(0)
    reader.watches[0].made.put(ConntrackError(errno.EBADMSG, "reading conntrack"))
    with pytest.raises(ConntrackError, match="reading conntrack"):
        reader.until(0, lambda _: False)
    reader.flows.since(0)
    assert len(reader.watches) == 2


def test_a_kernel_that_sends_no_events_is_an_error_with_the_remedy(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flows, "sends_events", lambda: False)
    with pytest.raises(ConntrackError, match="nf_conntrack_events: is 0; set it to 2"):
        reader.flows.since(0)
    assert reader.watches == []
