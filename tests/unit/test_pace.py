"""When a watch may hand over changes again."""

from __future__ import annotations

from itertools import pairwise

import pytest

from agent.sources.kubernetes.pace import Pace


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def delays(pace: Pace, clock: Clock, gap: float, count: int) -> list[float]:
    """How long each of `count` changes waits, one every `gap` seconds, where a wake-up takes all
    that have arrived; 0 for those that find the reader waiting."""
    found: list[float] = []
    began = clock.now
    while len(found) < count:
        arrives = began + len(found) * gap
        clock.now = max(clock.now, arrives)
        while len(found) < count and began + len(found) * gap <= clock.now:
            found.append(clock.now - (began + len(found) * gap))
        clock.now += pace.rest()
    return found


def test_lone_changes_are_not_delayed():
    clock = Clock()
    assert not any(delays(Pace(0.01, 1, clock), clock, 0.0101, 1000))


def test_a_burst_is_not_delayed():
    clock = Clock()
    assert not any(delays(Pace(0.01, 1000, clock), clock, 0.0001, 1000))


def test_steady_changes_are_read_once_an_interval():
    clock = Clock()
    pace = Pace(0.01, 100, clock)
    found = delays(pace, clock, 0.001, 2000)
    assert not any(found[:100])
    assert max(found) < 0.0101
    # a change that is first in its wake-up has waited longest
    wake_ups = sum(later > earlier for earlier, later in pairwise(found[200:]))
    assert wake_ups == pytest.approx(180, abs=2)


def test_a_quiet_time_saves_a_burst_and_no_more():
    clock = Clock()
    pace = Pace(0.01, 100, clock)
    delays(pace, clock, 0.001, 1000)
    clock.now += 3600
    found = delays(pace, clock, 0.001, 1000)
    assert not any(found[:100])
    assert any(found[100:130])
