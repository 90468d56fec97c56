"""Events in, one transaction out.

Sources put lists of events into a queue. The loop takes whatever has come, applies it, and sends
one transaction; what comes meanwhile waits in the queue and becomes the next one. There is no
delay: an idle node programs a change at once, a busy one in larger batches.

The loop trusts its memory of what it wrote, until something says that it should not: the kernel
refuses a transaction as stale, or a `Watcher` saw somebody else change the tables. Then it reads
everything back, keeps the slots it finds, and writes the difference. At a start it does the same;
what there is has been read ahead by then, see `agent.kernel.readahead`.
"""

from __future__ import annotations

import gc
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import structlog

from agent.kernel.conntrack import Flows
from agent.kernel.errors import Full, KernelError, OwnedByOther, Stale
from agent.kernel.readahead import ReadAhead, read_now
from agent.kernel.tables import Kernel
from agent.kernel.watcher import Watcher
from agent.serve.health import Heartbeat
from agent.serve.metrics import Recorder
from rules.diff import Change
from rules.events import Event, Synced
from rules.health_check import HealthCheck
from rules.language import Table
from rules.objects import Name
from rules.program import Claim
from rules.stale_flows import Serving
from rules.state import KernelView, State
from rules.tables import FAMILIES
from rules.transaction import Transaction, commands

Log = structlog.typing.FilteringBoundLogger


class Stop(NamedTuple):
    """Ends the loop after what came before it; the tables stay."""


class Disturbed(NamedTuple):
    """Somebody else changed our tables."""


class Failed(NamedTuple):
    """A part of the agent cannot go on; the loop raises its error."""

    error: Exception


Message = Sequence[Event] | Stop | Disturbed | Failed

RETRY_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
OWNER_POLL_SECONDS = 0.2


def reader(
    kernel: Kernel, ahead: ReadAhead | None = None, *, anew: bool = False
) -> Callable[[Table], KernelView | None]:
    """Reads back what the kernel has in place of a table, for `State.resync`, unless that was read
    ahead.

    A table that has not the ownership that our tables get must be made `anew`, so nothing of it
    counts as being as wanted.
    """

    def read(table: Table) -> KernelView | None:
        there = ahead.take(table.family) if ahead else None
        there = there or read_now(kernel, table.family)
        if there is None:
            return None
        known = there.table.known(table)
        if anew or not kernel.fits(there.table):
            known = known._replace(sets=dict.fromkeys(known.sets))
        return KernelView(known, there.elements)

    return read


class Observers(NamedTuple):
    """Who is told how it goes. `checks` gets the health check ports after each transaction."""

    recorder: Recorder = Recorder()
    heartbeat: Heartbeat = Heartbeat()
    checks: Callable[[Mapping[Name, HealthCheck]], None] = lambda _: None


_NOBODY = Observers()


class Loop:
    """The agent's main loop. `put` may be called from any thread and from signal handlers."""

    def __init__(
        self,
        state: State,
        kernel: Kernel,
        log: Log,
        *,
        show_elements: bool = False,
        observers: Observers = _NOBODY,
        ahead: ReadAhead | None = None,
    ) -> None:
        self.state = state
        self._show_elements = show_elements
        self._kernel = kernel
        self._log = log
        self._ahead = ahead
        self._flows = Flows(log)
        self._recorder, self._heartbeat, self._tell_checks = observers
        self._queue: queue.SimpleQueue[tuple[float, Message]] = queue.SimpleQueue()
        self._synced = False
        self._doubt = True
        self._disturbed = False
        self._outgrown = False
        self._failures = 0
        self._retry_at: float | None = None

    def put(self, message: Message) -> None:
        """Hands the loop something to do."""
        self._queue.put((time.monotonic(), message))

    def run(self) -> None:
        """Works until `Stop`. Raises what a `Failed` message carries."""
        watcher = None
        if not self._kernel.table_flags:
            watcher = Watcher(
                self._kernel.port,
                lambda: self.put(Disturbed()),
                lambda _, error: self.put(Failed(error)),
            )
            watcher.start()
        try:
            while self._turn():
                pass
        finally:
            if watcher:
                watcher.stop()
            if self._ahead:
                self._ahead.stop()

    def _turn(self) -> bool:
        """Takes in everything that has come, then programs it. False once told to stop."""
        going = True
        for at, message in self._messages():
            match message:
                case Stop():
                    going = False
                case Disturbed():
                    self._doubt = self._disturbed = True
                    self._heartbeat.queued()
                case Failed(error):
                    raise error
                case events:
                    self._synced = self._synced or any(isinstance(e, Synced) for e in events)
                    self.state.apply(events)
                    self._recorder.told(events, at)
                    self._heartbeat.queued()
                    if self._synced:
                        self._heartbeat.synced()
        self._heartbeat.eligible(not self.state.node_leaving)
        self._report_notices()
        if going and self._synced and self._due():
            self._program()
        return going

    def _messages(self) -> list[tuple[float, Message]]:
        timeout = None if self._retry_at is None else max(0.0, self._retry_at - time.monotonic())
        try:
            messages = [self._queue.get(timeout=timeout)]
        except queue.Empty:
            return []
        while True:
            try:
                messages.append(self._queue.get_nowait())
            except queue.Empty:
                return messages

    def _due(self) -> bool:
        return self._retry_at is None or time.monotonic() >= self._retry_at

    def _report_notices(self) -> None:
        for notice in self.state.notices:
            self._log.warning(notice.event, subject=notice.subject, detail=notice.detail)
        self.state.notices.clear()

    # programming

    def _program(self) -> None:
        self._retry_at = None
        try:
            if not self._doubt:
                try:
                    started = time.perf_counter()
                    self._apply(self.state.step(), started)
                except Full as error:
                    self._note_full(error)
                except Stale as error:
                    self._log.warning("tables are not as they were left", error=str(error))
                    self._doubt = self._disturbed = True
            if self._doubt:
                self._resync()
        except OwnedByOther as error:
            self._wait_for_owner(error)
        except KernelError as error:
            if isinstance(error, Full):
                self._note_full(error)
            self._doubt = True
            delay = RETRY_SECONDS[min(self._failures, len(RETRY_SECONDS) - 1)]
            self._failures += 1
            self._retry_at = time.monotonic() + delay
            self._recorder.failed()
            self._log.error("programming failed", error=str(error), retry_in_seconds=delay)
        else:
            if self._failures:
                self._log.info("programming works again", failures=self._failures)
            self._failures = 0
            self._heartbeat.programmed()
            self._tell_checks(self.state.health_checks)
            self._recorder.lacks(self.state.lacking)
        self._report_notices()

    def _note_full(self, error: Full) -> None:
        self._log.info("a map is full; its table is made anew", map=error.subject)
        self._doubt = self._outgrown = True

    def _wait_for_owner(self, error: OwnedByOther) -> None:
        if not self._failures:
            self._log.warning("waiting for the tables' owner to go", error=str(error))
        self._failures += 1
        self._doubt = True
        self._retry_at = time.monotonic() + OWNER_POLL_SECONDS

    def _resync(self) -> None:
        started = time.perf_counter()
        self._kernel.take_over()
        ahead, self._ahead = self._ahead, None
        transaction = self.state.resync(reader(self._kernel, ahead, anew=self._outgrown))
        self._apply(transaction, started, compared=True)
        if self._disturbed and transaction:
            self._recorder.repaired()
        self._doubt = self._disturbed = self._outgrown = False
        # what was loaded stays, so the collector need not walk it again and again
        gc.freeze()
        gc.enable()
        for family in FAMILIES:
            self._forget(family)
        self._forget_flows(transaction.change.stale_udp, everything=True)

    def _apply(self, transaction: Transaction, started: float, *, compared: bool = False) -> None:
        sent_at = time.perf_counter()
        size = self._kernel.apply(transaction) if transaction else 0
        done_at = time.perf_counter()
        self._recorder.programmed(
            transaction,
            done_at - started,
            done_at - sent_at,
            elements=self.state.element_counts if compared else None,
        )
        if transaction.tables:
            self._recorder.has_rules(self.state.tables())
        for family in transaction.change.stale_affinity:
            self._forget(family)
        if not compared:  # behind the affinity map, which would bring a stale flow back
            self._forget_flows(transaction.change.stale_udp)
        if self._show_elements:
            for command in commands(transaction):
                self._log.debug("change", command=command)
        if transaction or compared:
            self._log.info(
                "programmed" if transaction else "verified",
                **_summary(transaction, self.state),
                ms=round((done_at - started) * 1e3, 2),
                kernel_ms=round((done_at - sent_at) * 1e3, 2),
                bytes=size,
            )

    def _forget_flows(self, formerly: Mapping[Claim, Serving], *, everything: bool = False) -> None:
        """UDP flows that lead nowhere are deleted from conntrack."""
        started = time.perf_counter()
        deleted = self._flows.forget(formerly, self.state.flow_is_stale, everything=everything)
        for family, flows in deleted.items():
            self._recorder.forgot_flows(family, flows, time.perf_counter() - started)

    def _forget(self, family: int) -> None:
        """Sticky clients of endpoints that went are forgotten, right behind the transaction."""
        if not any(s.dynamic for t in self.state.tables() if t.family == family for s in t.sets):
            return
        count = self._kernel.forget(family, self.state.is_current)
        if count:
            self._log.info("sticky clients forgotten", family=family, clients=count)


def _summary(transaction: Transaction, state: State) -> dict[str, object]:
    """What a log line says of a transaction."""
    change = transaction.change
    summary: dict[str, object] = {
        "added": sum(map(len, change.added.values())),
        "removed": sum(map(len, change.removed.values())),
    }
    maps = _by_map(change)
    if maps:
        summary["elements"] = maps
    tables = [t for t in transaction.tables if not t.empty]
    if tables:
        summary["tables_changed"] = len(tables)
    summary["services"] = len(state.programs)
    return summary


def _by_map(change: Change) -> str:
    """For instance `endpoints +1 -1, service-ips +1`, both families together."""
    counts: dict[str, list[int]] = {}
    for index, side in enumerate((change.added, change.removed)):
        for owner, items in side.items():
            counts.setdefault(owner.name, [0, 0])[index] += len(items)
    return ", ".join(
        f"{name}{f' +{added}' if added else ''}{f' -{removed}' if removed else ''}"
        for name, (added, removed) in sorted(counts.items())
    )
