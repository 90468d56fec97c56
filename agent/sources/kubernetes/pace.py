"""How often something is done that may be wanted at any time: a watch hands over what it has read,
an Event is posted.

Why a watch has a pace: a wake-up of a thread on a cold CPU takes more than the work for one change,
0.5 ms of CPU against 0.07 ms for each of ten changes that are read and programmed together. So
where changes arrive steadily, they are read some at a time. A lone change is never delayed, and
neither is a burst: a rolling restart of hundreds of pods is programmed change by change.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """Allows `burst` turns at any time and one more every `interval` seconds (the generic cell
    rate algorithm, a token bucket with one number of state)."""

    def __init__(
        self, interval: float, burst: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._interval = interval
        self._saved = interval * (burst - 1)
        self._clock = clock
        self._next = float("-inf")

    def rest(self) -> float:
        """To be called after each turn: the seconds until the next one is allowed."""
        now = self._clock()
        self._next = max(self._next, now - self._saved) + self._interval
        return max(0.0, self._next - now)
