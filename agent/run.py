"""The agent, put together: sources and signals in front of the loop, the kernel behind it, health
and metrics beside it.

Order of a start: the kernel's socket first, since nothing works without it, and a thread that reads
the tables back; then the loop, which takes the failures of all threads; then the health and metrics
servers, so that probes are answered before anything is awaited; the node's addresses and the source
of Services last. Nothing waits: the loop begins to program when the first complete lists and the
addresses have arrived, and SIGTERM ends it at any time. Whatever ends it, the parts are stopped in
the reverse order, and the tables stay.
"""

from __future__ import annotations

import errno
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from agent import __version__, log
from agent.config.data_plane import serves_localhost
from agent.config.file import ConfigFile
from agent.config.settings import Settings
from agent.kernel import kube_proxy
from agent.kernel.addresses import AddressFollower
from agent.kernel.affinity import AffinityWatch
from agent.kernel.counters import CountersReader, KeptCounts
from agent.kernel.errors import KernelError
from agent.kernel.readahead import ReadAhead, read_ahead
from agent.kernel.reading import TableReader
from agent.kernel.sysctl import configure
from agent.kernel.tables import Kernel
from agent.loop import Failed, Loop, Reports, Stop, WorkerFailed, difference
from agent.reader import StateReader
from agent.serve import frontends
from agent.serve.health import HealthServer, Heartbeat, WatchAges
from agent.serve.http import TcpAddress, UnixAddress, raise_descriptor_limit
from agent.serve.localhost_ports import LocalhostPorts
from agent.serve.metrics import Metrics, MetricsServer, Recorder, Watch
from agent.worker import Worker
from rules.events import Event
from rules.health_check import HealthCheck
from rules.history import History
from rules.objects import Name
from rules.problems import Problem
from rules.state import State
from rules.tables import FAMILIES

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from agent.serve.api import ApiServer
    from agent.sources.kubernetes.connection import Connection


SWITCH_SECONDS = 0.0005
"""How long the loop waits for the interpreter while another thread computes, for instance an
answer of the API. The loop gives it up at each system call, a few times for each change, and with
Python's 5 ms such a change took 27 ms (docs/design/0010-insight.md)."""


class CannotRun(Exception):
    """The agent cannot start or go on; the message gives the reason and the remedy."""


class Part(Protocol):
    """What runs in threads of its own."""

    def start(self) -> None:
        """Begins."""

    def stop(self) -> object:
        """Ends, and returns when it has."""


Start = Callable[[Part], None]
"""Starts a part that is to be stopped at the end."""


def run(places: tuple[str, ...], settings: Settings, file: ConfigFile | None) -> None:
    """Runs until SIGTERM or SIGINT; the tables stay. Services come from manifests in `places`, or
    from the API server if there are none.

    Raises CannotRun, or NotPermitted without CAP_NET_ADMIN. What ends it later is one log line and
    SystemExit.
    """
    logger = log.configure(settings.log_level)
    if file and file.without_meaning:
        logger.warning("configuration_ignored", file=file.path, fields=file.without_meaning)
    sys.unraisablehook = lambda error: logger.debug("ignored_error", error=repr(error.exc_value))
    try:
        _run(places, settings, logger)
    except (WorkerFailed, MemoryError, OSError) as error:
        logger.critical("ended", reason=str(error) or repr(error), advice=_advice(error))
        raise SystemExit(2) from None


def _advice(error: BaseException) -> str:
    """What the operator can do."""
    if isinstance(error, WorkerFailed):
        error = error.error
    if isinstance(error, MemoryError) or getattr(error, "errno", 0) == errno.ENOMEM:
        return "raise the memory limit of the container"
    if getattr(error, "errno", 0) in (errno.EMFILE, errno.ENFILE):
        return "raise the limit of open files (ulimit -n, LimitNOFILE)"
    return "restart the agent; the tables stay in place"


def _run(places: tuple[str, ...], settings: Settings, logger: FilteringBoundLogger) -> None:
    gc.disable()  # until the loop has programmed everything once, see `loop.LOAD_SECONDS`
    raise_descriptor_limit()
    sys.setswitchinterval(SWITCH_SECONDS)

    def failed(name: str, error: Exception) -> None:
        loop.put(Failed(name, error))

    def start(part: Part) -> None:
        stack.callback(part.stop)
        part.start()

    with ExitStack() as stack:
        kept = KeptCounts() if settings.counters else None
        kernel = stack.enter_context(_kernel(settings, kept, logger))
        ahead = read_ahead(kernel, logger)
        if ahead:
            stack.callback(ahead.stop)
        served = _served(settings, logger, failed)
        ports = _localhost_ports(settings, logger, failed)
        loop = Loop(
            State(settings.options()),
            kernel,
            logger,
            show_elements=settings.log_level == "debug",
            reports=_also_to(ports, served.reports) if ports else served.reports,
            ahead=ahead,
            expects_node=not places,
        )
        _start_servers(served, start)
        start(StopSignals(lambda: loop.put(Stop()), failed))
        put = _receiver(loop, ports)
        source = _source(places, settings, put, logger, served, failed=failed, start=start)
        logger.info("started", node=loop.state.options.node, owns_tables=bool(kernel.table_flags))
        if ahead:
            _use_earlier_tables(served.reports.heartbeat, ahead, logger)
        if not places:  # a trial with manifests must not configure the machine
            _set_oom_score(settings.oom_score_adj, logger)
            configure(settings.conntrack(), logger)
        _warn_of_kube_proxy(kernel, logger)
        start(AddressFollower(loop.put, failed))
        start(AffinityWatch(served.reports.recorder.remembered, logger, failed))
        if ports:
            start(ports)
        counters = CountersReader(kept, TableReader) if kept else None
        if counters and settings.metrics_frontends:
            scraped = frontends.FrontendReader(
                StateReader(loop.put, frontends.STATE_SECONDS), counters
            )
            served.reports.recorder.frontends_from(scraped.read, settings.metrics_frontends)
        api = _api_server(
            settings, loop, served, logger, failed=failed, kernel=kernel, counters=counters
        )
        if api:
            start(api)
        start(source)
        loop.run()
        logger.info("stopped", tables="left in place")


def _kernel(settings: Settings, kept: KeptCounts | None, logger: FilteringBoundLogger) -> Kernel:
    kernel = Kernel(own=not settings.no_own, kept=kept)
    if kernel.families != FAMILIES:
        logger.warning(
            "address_family_unavailable", advice="Services are programmed for IPv4 alone"
        )
    return kernel


def _localhost_ports(
    settings: Settings, logger: FilteringBoundLogger, failed: Callable[[str, Exception], None]
) -> LocalhostPorts | None:
    """The forwarder of node ports on loopback addresses, if they are asked for."""
    if not serves_localhost(settings.nodeport_addresses):
        return None
    return LocalhostPorts(logger, failed, settings.proxy_name)


def _also_to(ports: LocalhostPorts, reports: Reports) -> Reports:
    """`reports`, and the ports learn when the kernel has rules."""

    def report(checks: Mapping[Name, HealthCheck]) -> None:
        reports.health_checks(checks)
        ports.programmed()

    return reports._replace(health_checks=report)


def _receiver(loop: Loop, ports: LocalhostPorts | None) -> Callable[[Sequence[Event]], None]:
    """Where a source puts its events."""
    if not ports:
        return loop.put

    def put(events: Sequence[Event]) -> None:
        loop.put(events)
        ports.update(events)

    return put


class _Following:
    """What depends on the source, which is made last: how old its watches are, how the API server
    is reached, and who posts problems."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self.watches: Callable[[], Sequence[Watch]] = list
        self.connection: Connection | None = None
        self.post: Callable[[Sequence[Problem]], None] = lambda _: None

    def problems_opened(self, problems: Sequence[Problem]) -> None:
        """Has the problems posted as Events, if that is asked for."""
        self.post(problems)

    def ages(self) -> Mapping[str, float]:
        """Seconds since the last valid answer, by resource."""
        now = time.monotonic()
        return {w.resource: now - (w.last_valid or self._started) for w in self.watches()}


class _Served(NamedTuple):
    """What the loop reports to, and the servers that answer with it."""

    reports: Reports
    following: _Following
    servers: Sequence[Part]


def _use_earlier_tables(
    heartbeat: Heartbeat, ahead: ReadAhead, logger: FilteringBoundLogger
) -> None:
    """Until this run has programmed something, the node forwards by what an earlier one left."""
    heartbeat.earlier_tables = lambda: ahead.unchanged
    logger.info("earlier_tables_found", age="unknown; at least since this start")


class StopSignals(Worker):
    """Calls `stop` at SIGTERM and SIGINT. Made in the main thread.

    Python runs a signal's handler in the main thread, and that may sleep in a lock by then: what
    arrives between its last look and the sleep waits for the next wake-up. The wakeup descriptor
    is written by the C handler at once.
    """

    def __init__(self, stop: Callable[[], None], failed: Callable[[str, Exception], None]) -> None:
        super().__init__("signals", failed)
        self._call = stop
        self._readable, self._writable = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(self._writable, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _signal, _frame: None)

    def work(self) -> None:
        """Waits for the signals until `stop`."""
        while self.wait_readable(self._readable):
            os.read(self._readable, 64)
            self._call()


def _source(
    places: tuple[str, ...],
    settings: Settings,
    put: Callable[[Sequence[Event]], None],
    logger: FilteringBoundLogger,
    served: _Served,
    *,
    failed: Callable[[str, Exception], None],
    start: Start,
) -> Part:
    """What puts Services into the loop, not started. Raises CannotRun."""
    if places:
        from agent.sources.manifests.follower import ManifestError, ManifestFollower

        try:
            return ManifestFollower(places, put, logger, failed)
        except ManifestError as error:
            raise CannotRun(str(error)) from None
    from agent.sources.kubernetes.connection import ConnectError, connect
    from agent.sources.kubernetes.follower import ClusterFollower

    try:
        connection = connect(settings.kubeconfig, settings.context, settings.server)
    except ConnectError as error:
        raise CannotRun(str(error)) from None
    chosen = settings.options()
    follower = ClusterFollower(
        connection,
        chosen.node,
        chosen.proxy_name,
        put,
        logger,
        failed=failed,
        requested=served.reports.recorder.requested,
    )
    served.reports.recorder.watches_from(follower.status)
    served.following.watches = follower.status
    served.following.connection = connection
    if settings.post_events:
        from agent.sources.kubernetes.event_poster import EventPoster

        poster = EventPoster(
            connection,
            chosen.node,
            logger,
            failed,
            requested=served.reports.recorder.requested,
        )
        served.following.post = poster.opened
        start(poster)
    return follower


def _served(
    settings: Settings, logger: FilteringBoundLogger, failed: Callable[[str, Exception], None]
) -> _Served:
    """The health and metrics servers, not started."""
    following = _Following()
    heartbeat, hard = Heartbeat(settings.healthz_timeout), settings.bind_address_hard_fail
    watches = WatchAges(following.ages, settings.watch_silence_limit, logger)
    heartbeat.silent_watches = watches.silent
    bind = settings.metrics()
    metrics = Metrics(__version__, heartbeat=heartbeat) if bind else None
    recorder = metrics or Recorder()
    healthz = settings.healthz()
    health = HealthServer(
        heartbeat,
        logger,
        failed,
        TcpAddress(*healthz) if healthz else None,
        hard_fail=hard,
        answered=recorder.probe_answered,
        each_tick=watches.report,
    )
    servers: list[Part] = [health]
    if metrics and bind:
        servers.append(MetricsServer(metrics, logger, failed, TcpAddress(*bind), hard_fail=hard))
    history = History(_seconds, settings.history_size)
    reports = Reports(recorder, heartbeat, health.update, history, following.problems_opened)
    return _Served(reports, following, servers)


def _start_servers(served: _Served, start: Start) -> None:
    """Raises CannotRun if an address cannot be opened that must be (`bind_address_hard_fail`)."""
    try:
        for server in served.servers:
            start(server)
    except OSError as error:
        raise CannotRun(f"cannot serve health and metrics: {error}") from None


def _seconds(text: str) -> float | None:
    """A time of the API (RFC 3339) as seconds since the epoch; None if it is none."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def _api_server(
    settings: Settings,
    loop: Loop,
    served: _Served,
    logger: FilteringBoundLogger,
    *,
    failed: Callable[[str, Exception], None],
    kernel: Kernel,
    counters: CountersReader | None,
) -> ApiServer | None:
    """The read-only API, if it is asked for."""
    bind = settings.api()
    if not settings.api_socket and bind is None:
        return None
    # 1 MB of modules that an agent without the API does not need
    from agent.kernel.addresses import interface_towards
    from agent.kernel.facts import collect, conntrack, with_state
    from agent.kernel.lookups import kernel_elements
    from agent.serve.api import STATE_SECONDS, Api, ApiServer, Sources
    from agent.serve.flows import RecentFlows
    from rules.doctor import Facts, examine

    def with_server(facts: Facts) -> Facts:
        connection = served.following.connection
        if connection is None:
            return facts
        return msgspec.structs.replace(
            facts,
            api_server=connection.server,
            api_server_is_service=connection.at_service_address,
        )

    history = served.reports.history
    assert history is not None
    sources = Sources(
        state=StateReader(loop.put, STATE_SECONDS).take,
        heartbeat=served.reports.heartbeat,
        history=history,
        watches=served.following.watches,
        options=_chosen(settings),
        examine=lambda state: examine(with_server(with_state(collect(), state))),
        conntrack=lambda: found[:2] if (found := conntrack()) else None,
        version=__version__,
        elements=kernel_elements,
        difference=partial(difference, kernel=kernel),
        owns_tables=bool(kernel.table_flags),
        started=time.time(),
        counts=counters.read if counters else None,
        counts_of=counters.read_of if counters else None,
        counts_by_endpoint=counters.read_by_endpoint if counters else None,
        flows=RecentFlows(failed),
        interface=interface_towards,
    )
    return ApiServer(
        Api(sources),
        logger,
        failed,
        UnixAddress(settings.api_socket) if settings.api_socket else None,
        TcpAddress(*bind) if bind else None,
    )


def _chosen(settings: Settings) -> dict[str, str]:
    """The options that are not at their defaults."""
    usual = Settings()
    return {
        name: str(value)
        for name in Settings.__struct_fields__
        if (value := getattr(settings, name)) != getattr(usual, name)
    }


def _set_oom_score(score: int, logger: FilteringBoundLogger) -> None:
    try:
        Path("/proc/self/oom_score_adj").write_text(str(score))
    except OSError as error:
        logger.info("oom_score_not_set", wanted=score, error=str(error))


def _warn_of_kube_proxy(kernel: Kernel, logger: FilteringBoundLogger) -> None:
    try:
        found = kube_proxy.find(kernel)
    except KernelError as error:
        found = [str(error)]
    if found:
        logger.warning(
            "kube_proxy_found",
            found=found,
            advice="remove its rules after stopping kube-proxy: sliceproxy cleanup --kube-proxy",
        )
