"""The loop's State for a reader in another thread."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable

from agent.loop import Ask
from rules.feed import Feed
from rules.mirror import Mirror, Part
from rules.state import State


class StateReader:
    """Asks the loop, through `put`, for what has changed; `take` is called by one thread."""

    def __init__(self, put: Callable[[Ask], None], seconds: float) -> None:
        self._put = put
        self._seconds = seconds
        self._feed = Feed()
        self._mirror = Mirror()
        self._parts: queue.SimpleQueue[Part] = queue.SimpleQueue()
        self._asked = False

    @property
    def last(self) -> State | None:
        """The state as it was taken last; None before."""
        return self._mirror.state

    def take(self) -> State | None:
        """The state as it is now, the same object if nothing has changed; None if the loop does
        not answer for so many `seconds`. It stays as it is until the next call."""
        deadline = time.monotonic() + self._seconds
        late = self._asked  # the answer to an earlier call, which gave up
        while True:
            if not self._asked:
                self._put(Ask(self._feed, self._parts.put))
                self._asked = True
            try:
                part = self._parts.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return None
            self._asked = False
            if self._mirror.take(part) and not late:
                return self._mirror.state
            late = False
