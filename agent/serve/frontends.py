"""Packets and connections by frontend, for the scrapes of /metrics."""

from __future__ import annotations

from agent.kernel.counters import CountersReader
from agent.kernel.errors import KernelError
from agent.reader import StateReader
from rules.counts import FrontendCounter, FrontendCounts

STATE_SECONDS = 1.0
"""How long a scrape waits for the loop."""


class FrontendReader:
    """Reads the counters and assigns them to frontends. While the loop is busy, it uses the state
    of the last scrape."""

    def __init__(self, states: StateReader, counters: CountersReader) -> None:
        self._states = states
        self._counters = counters
        self._frontends = FrontendCounter()

    def read(self) -> list[FrontendCounts]:
        """What was counted at each frontend. Empty before the loop's first answer, and while the
        counters are not readable."""
        state = self._states.take() or self._states.last
        if state is None:
            return []
        try:
            return list(self._frontends.read(state, self._counters.read()))
        except KernelError:
            return []
