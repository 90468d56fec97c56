"""Deletes stale UDP flows from conntrack, in a thread of its own.

A conntrack table may hold millions of flows, and a dump lists them one by one; the loop must not
wait for that. So the loop hands over what a flow is judged by, and continues:

- `expect`, before each transaction: which targets serve a UDP claim from now on. Only claims that
  change are handed over, so the work is that of the change.
- `look`, after the transaction and after stale clients have been deleted from the affinity map,
  which would bring a stale flow back: the claims that may have stale flows.

The thread keeps its own record of what serves, so no thread ever reads another one's data. A new
target is expected before the kernel can send a flow to it. The thread takes in what is expected
before it judges a flow that it has received, so it never judges a flow by less than the kernel knew
when it made the flow: a flow to an endpoint that was added during a dump stays.

Looks that queue up during a dump are merged into one. Between two dumps the thread rests, so that
churn in a large table does not keep a CPU busy.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

import structlog

from agent.kernel.conntrack import Conntrack
from agent.kernel.errors import ConntrackError
from agent.worker import Failed, Worker
from rules.program import Claim
from rules.stale_flows import Flow, Look, Record, Serving, merged
from rules.tables import FAMILIES

REST = 4
"""So many times the duration of a dump pass until the next one."""
MOST_REST_SECONDS = 2.0
_MAILBOX = 64  # from so much unread mail on the thread is woken to read it

Log = structlog.typing.FilteringBoundLogger
Deleted = Callable[[int, int, float], None]
"""Called in the worker's thread with a family, how many flows, and how many seconds it took."""


class Expected(NamedTuple):
    """What serves each claim from now on, None for a claim without a Service. With `everything`
    no other UDP claim exists."""

    serving: Mapping[Claim, Serving | None]
    everything: bool = False


class FlowCleaner(Worker):
    """See the module. What goes wrong with conntrack is logged once: the agent does all else
    without it."""

    def __init__(
        self,
        log: Log,
        failed: Failed,
        deleted: Deleted,
        connect: Callable[[], Conntrack] = Conntrack,
    ) -> None:
        super().__init__("flow cleaner", failed)
        self._log = log
        self._deleted = deleted
        self._connect = connect
        self._conntrack: Conntrack | None = None
        self._failing = False
        self._mail: deque[Expected | Look] = deque()  # append and popleft are atomic
        self._news = threading.Event()
        # only the thread itself uses these
        self._record = Record()
        self._waiting: list[Look] = []

    def expect(self, serving: Mapping[Claim, Serving | None], *, everything: bool = False) -> None:
        """To be called before the transaction that gives these claims these targets."""
        if serving or everything:
            self._mail.append(Expected(serving, everything))
            if len(self._mail) >= _MAILBOX:
                self._news.set()

    def look(self, look: Look) -> None:
        """Has stale flows deleted, some time after this call."""
        if look.formerly or look.everything:
            self._mail.append(look)
            self._news.set()

    def stop(self, seconds: float | None = None) -> bool:
        """Ends it; a dump that is under way is given up."""
        self._stopping.set()
        self._news.set()
        return super().stop(seconds)

    def work(self) -> None:
        """Looks whenever asked to."""
        try:
            while not self.stopping:
                self._news.wait()
                self._news.clear()
                self._take_in()
                if self._waiting and not self.stopping:
                    started = time.perf_counter()
                    self._forget(merged(self._waiting))
                    self.pause(min(REST * (time.perf_counter() - started), MOST_REST_SECONDS))
        finally:
            self._disconnect()

    def _take_in(self) -> None:
        while self._mail:
            match self._mail.popleft():
                case Look() as look:
                    self._waiting.append(look)
                case Expected(serving, everything):
                    self._record.expect(serving, everything=everything)

    def _forget(self, look: Look) -> None:
        self._waiting = []
        self._record.begin(look)
        started = time.perf_counter()
        try:
            if self._conntrack is None:
                self._conntrack = self._connect()
            claims = None if look.everything else look.formerly
            found = self._conntrack.forget(claims, self._is_stale)
        except _Stopped:
            return
        except ConntrackError as error:
            self._disconnect()
            if not self._failing:
                self._log.warning("stale_flows_kept", error=str(error))
            self._failing = True
            return
        self._failing = False
        seconds = time.perf_counter() - started
        for family in FAMILIES:
            flows = found.get(family, 0)
            if flows:
                self._log.info("stale_flows_deleted", family=family, flows=flows)
            self._deleted(family, flows, seconds)  # kube-proxy counts every look, found or not

    def _is_stale(self, flow: Flow) -> bool:
        if self.stopping:
            raise _Stopped
        if self._mail:
            self._take_in()
        return self._record.is_stale(flow)

    def _disconnect(self) -> None:
        if self._conntrack:
            self._conntrack.close()
            self._conntrack = None


class _Stopped(Exception):
    """The worker is to end during a dump."""
