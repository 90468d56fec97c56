"""The agent's main loop: events in, one transaction out.

Sources put lists of events into a queue. The loop takes everything that is queued, applies it, and
sends one transaction; what arrives meanwhile becomes the next one. The loop never waits: an idle
node programs a change at once, a busy one in larger batches (a watch that brings changes steadily
is read every 10 ms, see `agent.sources.kubernetes.pace`). Nothing is programmed before the source's
first complete lists and the node's addresses are known.

The loop trusts its record of what it wrote until the kernel refuses a transaction as stale, or a
`Watcher` reports that another process changed the tables. Then it reads everything back, keeps the
slots it finds, and writes the difference. It does the same at a start, when most of it has been
read ahead, see `agent.kernel.readahead`.
"""

from __future__ import annotations

import gc
import queue
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import structlog

from agent.kernel.clients import ClientReader, Clients
from agent.kernel.conntrack import Conntrack
from agent.kernel.errors import Full, KernelError, OwnedByOther, Stale
from agent.kernel.flows import FlowCleaner
from agent.kernel.readahead import ReadAhead
from agent.kernel.reading import TableReader
from agent.kernel.tables import Kernel, transaction_of
from agent.kernel.watcher import Watcher
from agent.serve.health import Heartbeat
from agent.serve.metrics import Recorder
from rules.diff import Change
from rules.events import Event, NodeAddresses, Synced
from rules.feed import Feed
from rules.health_check import HealthCheck
from rules.history import History
from rules.language import Table
from rules.mirror import Part, read
from rules.objects import Name
from rules.problems import Problem
from rules.program import Claim
from rules.stale_flows import Look, Serving
from rules.state import KernelView, State
from rules.tables import FAMILIES, SETS
from rules.text import CATCH_ALL
from rules.transaction import Transaction, commands

Log = structlog.typing.FilteringBoundLogger


class Stop(NamedTuple):
    """Ends the loop after what came before it; the tables stay."""


class Disturbed(NamedTuple):
    """Another process changed our tables."""


class Failed(NamedTuple):
    """A worker cannot go on; the loop raises WorkerFailed."""

    name: str
    error: Exception


class WorkerFailed(Exception):
    """A thread of the agent ended with an error, so the agent has to end."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(f"the thread {failed.name!r} failed: {failed.error!r}")
        self.worker = failed.name
        self.error = failed.error


class Ask(NamedTuple):
    """A reader wants the next part of the state; `answer` is called with it in the loop's thread.

    `feed` is the reader's, which it does not touch.
    """

    feed: Feed
    answer: Callable[[Part], None]


Message = Sequence[Event] | Stop | Disturbed | Failed | Clients | Ask

RETRY_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
OWNER_POLL_SECONDS = 0.2
MAX_EDGE_LINES = 10
"""Of one transaction; more Services that gained or lost endpoints are counted in one line."""
LOAD_SECONDS = 30.0
"""For so long after the start the garbage collector stays off: a load makes no garbage, but many
objects, which the collector would walk again and again. Failed attempts to load make garbage."""


def reader(
    kernel: Kernel, ahead: ReadAhead | None = None, *, replace: bool = False
) -> Callable[[Table], KernelView | None]:
    """The function that `State.resync` calls for the kernel's version of a table. It reads the
    table, unless that was read ahead.

    If the table has another ownership than ours get, or with `replace`, none of its sets counts as
    up to date, so that the table is recreated.
    """

    def read(table: Table) -> KernelView | None:
        there = ahead.take(table.family) if ahead else None
        there = there or kernel.read_back(table.family, watched=True)
        if there is None:
            return None
        known = there.table.known(table)
        if replace or not kernel.fits(there.table):
            known = known._replace(sets=dict.fromkeys(known.sets))
        return KernelView(known, there.elements)

    return read


def difference(state: State, kernel: Kernel) -> list[str]:
    """The nft commands by which the agent that has `kernel` would bring it to a snapshot of its
    state. May be called from any thread. Raises KernelError."""
    with Kernel(own=False) as reading:
        reading.table_flags = kernel.table_flags
        transaction = state.snapshot().resync(reader(reading))
    return list(commands(transaction_of(transaction, kernel.families)))


class Reports(NamedTuple):
    """Where the loop reports its progress. `health_checks` gets the health check ports of all
    Services after each transaction, `problems_opened` the problems that are logged."""

    recorder: Recorder = Recorder()
    heartbeat: Heartbeat = Heartbeat()
    health_checks: Callable[[Mapping[Name, HealthCheck]], None] = lambda _: None
    history: History | None = None
    problems_opened: Callable[[Sequence[Problem]], None] = lambda _: None


class Connections(NamedTuple):
    """How workers connect to the kernel: to conntrack, and to nf_tables for reading."""

    conntrack: Callable[[], Conntrack] = Conntrack
    reading: Callable[[], TableReader] = TableReader


class Loop:
    """See the module. `put` may be called from any thread and from signal handlers.

    With `expects_node` the node counts as leaving while its Node object is unknown.
    """

    def __init__(
        self,
        state: State,
        kernel: Kernel,
        log: Log,
        *,
        show_elements: bool = False,
        reports: Reports | None = None,
        ahead: ReadAhead | None = None,
        connections: Connections = Connections(),  # noqa: B008, a tuple of functions
        expects_node: bool = False,
    ) -> None:
        self.state = state
        self._show_elements = show_elements
        self._kernel = kernel
        self._log = log
        self._ahead = ahead
        reports = reports or Reports()
        self._recorder, self._heartbeat = reports.recorder, reports.heartbeat
        self._report_health_checks, self._history = reports.health_checks, reports.history
        self._problems_opened = reports.problems_opened
        self._flows = FlowCleaner(
            log, self._worker_failed, self._recorder.flows_deleted, connections.conntrack
        )
        self._clients = ClientReader(self.put, log, self._worker_failed, connections.reading)
        self._reading = 0  # requests to the client reader that have no last answer yet
        self._looks: list[Look] = []
        self._forgotten = 0
        self._expects_node = state.local.expected = expects_node
        self._queue: queue.SimpleQueue[tuple[float, Message]] = queue.SimpleQueue()
        self._load_until = time.monotonic() + LOAD_SECONDS
        self._synced = False
        self._addresses_known = False
        self._doubt = True
        self._disturbed = False
        self._outgrown = False
        self._failures = 0
        self._retry_at: float | None = None

    def put(self, message: Message) -> None:
        """Queues a message."""
        self._queue.put((time.monotonic(), message))

    def run(self) -> None:
        """Works until `Stop`. Raises WorkerFailed."""
        watcher = None
        if not self._kernel.table_flags:
            watcher = Watcher(
                self._kernel.port,
                lambda: self.put(Disturbed()),
                self._worker_failed,
            )
            watcher.start()
        self._flows.start()
        self._clients.start()
        try:
            while self._turn():
                pass
        finally:
            if watcher:
                watcher.stop()
            if self._ahead:
                self._ahead.stop()
            self._flows.stop()
            self._clients.stop()

    def _worker_failed(self, name: str, error: Exception) -> None:
        self.put(Failed(name, error))

    def _turn(self) -> bool:
        """Applies everything that is queued, programs it, then answers readers. False after
        `Stop`."""
        going, changed = True, False
        readers: list[Ask] = []
        for at, message in self._messages():
            match message:
                case Stop():
                    going = False
                case Disturbed():
                    self._doubt = self._disturbed = True
                    self._heartbeat.queued()
                case Failed():
                    raise WorkerFailed(message)
                case Clients():
                    self._judge_clients(message)
                case Ask():
                    readers.append(message)
                case events:
                    self._take(events, at)
                    changed = True
        unknown = self._expects_node and self._synced and self.state.node is None
        self._heartbeat.eligible(not self.state.node_leaving and not unknown)
        self._report_problems()
        if going and (changed or self._doubt) and self._complete and self._due():
            self._program()
        for feed, answer in readers:
            answer(read(self.state, feed))
        return going

    def _take(self, events: Sequence[Event], at: float) -> None:
        if not self._complete:
            self._synced = self._synced or any(isinstance(e, Synced) for e in events)
            self._addresses_known = self._addresses_known or any(
                isinstance(e, NodeAddresses) for e in events
            )
        self.state.apply(events)
        self._recorder.received(events, at)
        self._heartbeat.queued()
        if self._complete:
            self._heartbeat.synced()

    @property
    def _complete(self) -> bool:
        """Whether enough is known to program the tables."""
        return self._synced and self._addresses_known

    def _messages(self) -> list[tuple[float, Message]]:
        deadlines = [self._retry_at] if self._retry_at is not None else []
        if not gc.isenabled():
            deadlines.append(self._load_until)
        timeout = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        try:
            messages = [self._queue.get(timeout=timeout)]
        except queue.Empty:
            messages = []
        if not gc.isenabled() and time.monotonic() >= self._load_until:
            gc.enable()
        while True:
            try:
                messages.append(self._queue.get_nowait())
            except queue.Empty:
                return messages

    def _due(self) -> bool:
        return self._retry_at is None or time.monotonic() >= self._retry_at

    def _report_problems(self) -> None:
        opened, closed, omitted = self.state.problems.collect(time.time())
        if opened or closed:
            self._recorder.problems_open(self.state.problems.counts())
        for problem in opened:
            self._log.warning(problem.code, **problem.fields, problem=problem.text)
        if opened:
            self._problems_opened(opened)
        for problem in closed:
            self._log.info(problem.code, **problem.fields, closed=True)
        if omitted:
            self._log.warning("problems_omitted", count=omitted, open=self.state.problems.counts())

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
                    self._log.warning("tables_changed", error=str(error))
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
            reason = str(error)
            self._note("refused_by_kernel", reason)
            self._log.error("programming_failed", error=reason, retry_in_seconds=delay)
        else:
            if self._failures:
                self._log.info("programming_recovered", failures=self._failures)
            self._failures = 0
            self._heartbeat.programmed()
            self._report_health_checks(self.state.health_checks)
            self._recorder.local_endpoints_missing(self.state.lacking)
        self._report_problems()

    def _note_full(self, error: Full) -> None:
        self._log.info("map_full", map=error.subject)
        self._doubt = self._outgrown = True

    def _wait_for_owner(self, error: OwnedByOther) -> None:
        if not self._failures:
            self._log.warning("waiting_for_owner", error=str(error))
        self._failures += 1
        self._doubt = True
        self._retry_at = time.monotonic() + OWNER_POLL_SECONDS

    def _resync(self) -> None:
        started = time.perf_counter()
        self._kernel.take_over()
        ahead, self._ahead = self._ahead, None
        transaction = self.state.resync(reader(self._kernel, ahead, replace=self._outgrown))
        self._apply(transaction, started, compared=True)
        if self._disturbed and transaction:
            self._recorder.repaired()
            self._log.warning("tables_repaired", **_summary(transaction, self.state))
            self._note("repaired", "another process changed the tables", transaction)
        self._doubt = self._disturbed = self._outgrown = False
        self._keep_heap()
        self._clear_written_sets()
        self._forget_clients(FAMILIES)
        self._look_for_stale_flows(transaction.change.stale_udp, everything=True)

    def _clear_written_sets(self) -> None:
        """Deletes what only another process adds to sets that rules write: an element for all
        keys. They are not read back; the map of session affinity is, by `_forget_clients`."""
        for table in self.state.tables():
            for owner in table.sets:
                if owner.dynamic and not owner.is_map:
                    self._kernel.destroy(owner, [(CATCH_ALL, None)])

    @staticmethod
    def _keep_heap() -> None:
        """Takes the loaded objects out of the garbage collector's sight: they stay."""
        if gc.isenabled():  # else there was only a load, which makes no garbage
            gc.collect()
        gc.freeze()
        gc.enable()

    def _apply(self, transaction: Transaction, started: float, *, compared: bool = False) -> None:
        if compared:
            self._flows.expect(self.state.udp_serving(), everything=True)
        else:
            self._flows.expect(transaction.change.udp_serving)
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
            owned = {family: self._kernel.owns(family) for family in self._kernel.families}
            self._recorder.tables_changed(self.state.tables(), owned)
        if self._history:
            self._history.record(self.state.changes, time.time(), transaction.change.operations)
        self.state.changes.clear()
        self._forget_clients(transaction.change.stale_affinity)
        if not compared:  # after the affinity map, which would bring a stale flow back
            self._look_for_stale_flows(transaction.change.stale_udp)
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
        self._report_endpoint_edges(quiet=compared)

    def _look_for_stale_flows(
        self, formerly: Mapping[Claim, Serving], *, everything: bool = False
    ) -> None:
        """To be called after the affinity map was read, which would bring a stale flow back."""
        look = Look(formerly, self.state.node_port_addresses(), everything)
        if self._reading:
            self._looks.append(look)
        else:
            self._flows.look(look)

    def _note(self, kind: str, reason: str, transaction: Transaction | None = None) -> None:
        if self._history:
            elements = transaction.change.operations if transaction else 0
            self._history.note(kind, time.time(), reason, elements)

    def _report_endpoint_edges(self, *, quiet: bool) -> None:
        """Logs the Services that began or ceased to have endpoints, unless that is all of them."""
        edges = dict(self.state.endpoint_edges)
        self.state.endpoint_edges.clear()
        names = sorted(name for name in edges if name in self.state.services)
        if quiet:
            return
        for name in names[:MAX_EDGE_LINES]:
            self._log.info(
                "first_endpoint_added" if edges[name] else "last_endpoint_removed",
                service=str(name),
            )
        if len(names) > MAX_EDGE_LINES:
            self._log.info("more_endpoint_changes", count=len(names) - MAX_EDGE_LINES)

    def _forget_clients(self, families: Collection[int]) -> None:
        """Has the affinity map read, to delete from it the clients of endpoints that were
        removed. `_judge_clients` does it, some at a time."""
        if not families:
            return
        for table in self.state.tables():
            if table.family in families and SETS[table.family].affinity in table.sets:
                self._reading += 1
                self._clients.read(table.family)
        if not self._reading:
            self._clients_judged()

    def _clients_judged(self) -> None:
        """No client is remembered for an endpoint that was removed; what they needed may go."""
        if self.state.clients_judged():
            self.put(())

    def _judge_clients(self, clients: Clients) -> None:
        stale = [c for c in clients.remembered if not self.state.is_current(*c)]
        try:
            self._kernel.destroy(SETS[clients.family].affinity, stale)
            self._forgotten += len(stale)
        except KernelError as error:
            if not self._doubt:
                self._log.warning("tables_changed", error=str(error))
            self._doubt = self._disturbed = True
        self._clients.more()
        if not clients.last:
            return
        if self._forgotten:
            self._log.info(
                "sticky_clients_forgotten", family=clients.family, clients=self._forgotten
            )
        self._forgotten = 0
        self._reading -= 1
        if not self._reading:
            for look in self._looks:
                self._flows.look(look)
            self._looks = []
            self._clients_judged()


def _summary(transaction: Transaction, state: State) -> dict[str, object]:
    """The fields of a log line about a transaction."""
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
