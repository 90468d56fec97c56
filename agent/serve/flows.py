"""New connections for readers of the API: the agent listens only while someone asks.

The first question opens the stream of conntrack's events, and it is closed when no question has
followed for `LISTENING_SECONDS`. A reader asks again and again, each time for what has come since
its last question. So nothing is held for a reader that has gone, and no answer is without end. What
is kept is bounded; readers learn how many connections they have missed.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from agent.kernel.errors import ConntrackError
from agent.kernel.flow_watch import FlowWatch, sends_events
from agent.worker import Failed, Worker
from rules.flow_report import Lost, NewConnection

LISTENING_SECONDS = 10.0
"""How long the agent listens after the last question."""
KEPT = 2000
"""So many connections are kept for the next question, 1 MB."""
_TURN_SECONDS = 0.5


class Seen(NamedTuple):
    """A connection, and when it was reported, in seconds since the epoch."""

    time: float
    connection: NewConnection


class Recent(NamedTuple):
    """The answer to a question: `sequence` belongs into the next one, `lost` counts connections
    since the last one that were not kept or that the kernel had no room to report."""

    sequence: int
    lost: int
    seen: tuple[Seen, ...]


class RecentFlows:
    """See the module. Questions come from one thread; `stop` may come from another."""

    def __init__(
        self,
        failed: Failed,
        watch: Callable[[], FlowWatch] = FlowWatch,
        listening_seconds: float = LISTENING_SECONDS,
    ) -> None:
        self._failed = failed
        self._watch = watch
        self._seconds = listening_seconds
        self._kept = _Kept()
        self._listener: _Listener | None = None

    @property
    def listening(self) -> bool:
        """Whether the agent has the kernel report connections."""
        return self._listener is not None and self._listener.listening

    def since(self, sequence: int) -> Recent:
        """What has come since an answer; with 0 nothing, from now on. Raises ConntrackError."""
        listener = self._listener
        if listener and listener.error:
            self._listener = None
            raise listener.error
        if not listener or not listener.asked_again():
            if not sends_events():
                raise ConntrackError(errno.ENODATA, "nf_conntrack_events", "is 0; set it to 2")
            self._kept.clear()
            self._listener = _Listener(self._watch(), self._kept, self._failed, self._seconds)
            self._listener.start()
        return self._kept.since(sequence)

    def stop(self) -> None:
        """Ends listening."""
        if self._listener:
            self._listener.stop()


class _Kept:
    """The newest connections, numbered. What the kernel has lost takes numbers, too, so whoever
    has asked before learns how many are missing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._items: deque[tuple[int, Seen]] = deque(maxlen=KEPT)
        self._sequence = 1

    def add(self, event: NewConnection | Lost) -> None:
        with self._lock:
            if isinstance(event, Lost):
                self._sequence += event.lost
                return
            self._sequence += 1
            self._items.append((self._sequence, Seen(time.time(), event)))

    def clear(self) -> None:
        with self._lock:
            self._items.clear()

    def since(self, sequence: int) -> Recent:
        with self._lock:
            if not 0 < sequence <= self._sequence:
                return Recent(self._sequence, 0, ())
            seen = tuple(one for number, one in self._items if number > sequence)
            lost = self._sequence - sequence - len(seen)
            return Recent(self._sequence, lost, seen)


class _Listener(Worker):
    """Reads the kernel's events until questions have ended."""

    def __init__(self, watch: FlowWatch, kept: _Kept, failed: Failed, seconds: float) -> None:
        super().__init__("flows", failed)
        self._events = watch
        self._kept = kept
        self._seconds = seconds
        self._lock = threading.Lock()
        self._until = time.monotonic() + seconds
        self.listening = True
        self.error: ConntrackError | None = None

    def asked_again(self) -> bool:
        """Extends its time; false if it has ended already."""
        with self._lock:
            self._until = time.monotonic() + self._seconds
            return self.listening

    def work(self) -> None:
        """See the class. Trouble with conntrack is left for the next question."""
        with self._events as events:
            try:
                while self._wanted():
                    for event in events.events(min(_TURN_SECONDS, self._seconds)):
                        self._kept.add(event)
            except ConntrackError as error:
                self.error = error
            finally:
                self.listening = False

    def _wanted(self) -> bool:
        with self._lock:
            self.listening = not self.stopping and time.monotonic() < self._until
            return self.listening
