"""Packets and connections by frontend, for the scrapes of /metrics."""

from __future__ import annotations

import queue
from collections.abc import Callable
from contextlib import suppress

from agent.kernel.counters import CountersReader
from agent.kernel.errors import KernelError
from rules.counts import FrontendCounts, frontend_counts
from rules.state import State

SNAPSHOT_SECONDS = 1.0
"""How long a scrape waits for the loop."""


class FrontendReader:
    """Reads the counters and assigns them to frontends. While the loop is busy, it uses the state
    of the last scrape.

    `ask` has the loop call its argument with a snapshot of the state.
    """

    def __init__(
        self, ask: Callable[[Callable[[State], None]], None], counters: CountersReader
    ) -> None:
        self._ask = ask
        self._counters = counters
        self._last: State | None = None

    def read(self) -> list[FrontendCounts]:
        """What was counted at each frontend. Empty before the loop's first answer, and while the
        counters are not readable."""
        answers: queue.SimpleQueue[State] = queue.SimpleQueue()
        self._ask(answers.put)
        with suppress(queue.Empty):
            self._last = answers.get(timeout=SNAPSHOT_SECONDS)
        if self._last is None:
            return []
        try:
            return list(frontend_counts(self._last, self._counters.read()))
        except KernelError:
            return []
