"""What is measured, by kube-proxy's names where it means the same, and by ours where it does not.

The parts of the agent report to a `Recorder`, which records nothing. `Metrics` is a Recorder with
a registry of its own. It is the only thing here that loads prometheus_client, when it is created,
so the loop can be run, tested and imported without that library.

Dashboards for kube-proxy keep working: a metric of kube-proxy has its name, its labels
(`ip_family` since 1.34), its buckets and its help text. There are three small differences of
meaning:

- one transaction programs both families, so durations are recorded for the families that it
  touched, and timestamps and failures for both;
- a *full* sync is a start or a repair, everything read back and compared; a *partial* one is
  every other;
- a sync that had nothing to do is not counted: there is none that runs by the clock.

What kube-proxy counts of iptables and of loopback node ports is left out, for it would be 0.

Recording costs a few microseconds for a transaction, an event or a map touched, and nothing that
is proportional to the cluster: the number of elements is carried along from change to change and
counted again only when everything is read back. Values that can be computed are computed at the
scrape (`_Now`). Times are seconds; a time of day is seconds since the epoch.
"""

from __future__ import annotations

import itertools
import os
import platform
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Protocol, TypeVar

from agent.serve.health import Heartbeat
from agent.serve.http import (
    NOT_FOUND,
    PLAIN_TEXT,
    HttpAnswer,
    HttpRequest,
    HttpServer,
    Listener,
    Log,
    TcpAddress,
    listen,
)
from agent.serve.series import FrontendSeries
from agent.worker import Failed
from rules.counts import FrontendCounts
from rules.events import Delete, Event, Upsert
from rules.language import Set, Table
from rules.objects import EndpointSlice, Service
from rules.problems import CODES
from rules.transaction import Transaction

if TYPE_CHECKING:
    from prometheus_client.core import Counter, Gauge, Histogram, Metric
    from prometheus_client.registry import Collector, CollectorRegistry

_M = TypeVar("_M", "Counter", "Gauge", "Histogram")

IP_FAMILY = {4: "IPv4", 6: "IPv6"}
_SYNC = "kubeproxy_sync_proxy_rules_"
WATCH_STATES = ("listing", "watching", "backing off", "stopped")
"""What a source does for a resource (`agent.sources.kubernetes.Status`)."""

# as kube-proxy has them (pkg/proxy/metrics); its list of the second kind begins with a 0, too
SYNC_BUCKETS = tuple(0.001 * 2**i for i in range(15))
PROGRAMMING_BUCKETS = (
    0.0,
    0.25,
    0.5,
    *(float(s) for s in range(1, 60)),
    *(float(s) for s in range(60, 120, 5)),
    *(float(s) for s in range(120, 301, 30)),
)
# ours begin lower: a change of one endpoint is programmed in well under a millisecond
FINE_BUCKETS = tuple(0.0001 * 2**i for i in range(18))

# as client-go has them
REQUEST_BUCKETS = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)

_MACHINE = platform.machine()
BUILD_INFO = {
    "major": "1",
    "minor": "36",
    "git_version": "v1.36.2",
    "git_commit": "",
    "git_tree_state": "",
    "build_date": "",
    "go_version": "",
    "compiler": "",
    "platform": "linux/" + {"x86_64": "amd64", "aarch64": "arm64"}.get(_MACHINE, _MACHINE),
}
"""The kube-proxy whose behaviour this agent has, for dashboards and alerts that join on it."""

MAX_PENDING = 10_000
"""Of so many events the latency is measured, while the kernel takes nothing."""


class Watch(Protocol):
    """How following a resource goes: what is needed here of
    `agent.sources.kubernetes.follower.WatchStatus`."""

    @property
    def resource(self) -> str:
        """Its plural name."""

    @property
    def state(self) -> str:
        """One of WATCH_STATES."""

    @property
    def last_message(self) -> float | None:
        """When the server last sent anything, by time.monotonic."""

    @property
    def last_valid(self) -> float | None:
        """When an answer last showed the current state, by time.monotonic."""

    @property
    def relists(self) -> int:
        """How often everything was listed again."""

    @property
    def errors(self) -> int:
        """How many requests failed."""


class Recorder:
    """Receives what the agent measures. This one records nothing.

    `received`, `programmed`, `failed`, `repaired` and `local_endpoints_missing` are called by the
    loop's thread alone, the others by any.
    """

    def received(self, events: Iterable[Event], at: float) -> None:
        """Events have arrived; `at` is when, by time.monotonic."""

    def programmed(
        self,
        transaction: Transaction,
        seconds: float,
        kernel_seconds: float,
        *,
        elements: Mapping[Set, int] | None = None,
    ) -> None:
        """The kernel has applied all received events. `seconds` is from computing to the kernel's
        answer, `kernel_seconds` the kernel's part. `elements`, of a full sync only, is how many
        there are now."""

    def tables_changed(self, tables: Iterable[Table], owned: Mapping[int, bool]) -> None:
        """The current tables, and by family whether the agent is the owner of the kernel's one;
        called when one changes."""

    def failed(self) -> None:
        """The kernel refused a transaction."""

    def repaired(self) -> None:
        """Another process had changed the tables, and the agent has repaired them."""

    def local_endpoints_missing(self, counts: Mapping[tuple[int, str], int]) -> None:
        """How many Service ports have policy Local, endpoints, but none here: by family and by
        traffic policy, "internal" or "external"."""

    def problems_open(self, counts: Mapping[str, int]) -> None:
        """How many problems are open, by their code (`rules.problems`)."""

    def flows_deleted(self, family: int, flows: int, seconds: float) -> None:
        """Connection tracking entries were deleted."""

    def remembered(self, family: int, clients: int) -> None:
        """So many clients have an entry in the map of session affinity."""

    def watches_from(self, watches: Callable[[], Iterable[Watch]]) -> None:
        """`watches` gives the state of the source's watches; it is called at every scrape."""

    def frontends_from(self, counts: Callable[[], Iterable[FrontendCounts]], most: int) -> None:
        """There are counters; `counts` reads them at every scrape, in the thread that answers it.
        At most `most` frontends have series of their own."""

    def requested(
        self, method: str, code: int | str, host: str, seconds: float | None = None
    ) -> None:
        """A request to the API server was answered, or not: then `code` is <error>. `seconds` is
        the time until the answer's head arrived, if there was one."""

    def probe_answered(self, path: str, code: int) -> None:
        """/healthz, /livez or /readyz was answered."""


class Metrics(Recorder):
    """See the module. `version` is sliceproxy's."""

    def __init__(
        self,
        version: str,
        *,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        from prometheus_client.metrics import disable_created_metrics
        from prometheus_client.process_collector import ProcessCollector
        from prometheus_client.registry import CollectorRegistry

        # each counter and histogram would have a second metric: when it was created
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry: CollectorRegistry = CollectorRegistry(auto_describe=True)
        self._begun = time.time()
        self._started = False
        self._services = self._endpoints = 0
        self._lacking: dict[tuple[int, str], int] = {}
        self._queued_at = 0.0
        self._frontends: Callable[[], str] | None = None
        self._arrivals: list[float] = []
        self._triggers: list[tuple[int, float]] = []
        self._heartbeat = heartbeat or Heartbeat()
        self.now = _Now(self._heartbeat)
        # by kube-proxy's names
        self._make_syncs()
        self._make_changes()
        self._make_conntrack()
        self._make_requests()
        self._make_ours(version)
        ProcessCollector(registry=self.registry)
        self.registry.register(_collector(self.now))

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        from prometheus_client.core import Counter

        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        from prometheus_client.core import Gauge

        return Gauge(name, text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        from prometheus_client.core import Histogram

        return Histogram(name, text, labels, registry=self.registry, buckets=buckets)

    def _make_syncs(self) -> None:
        full, partial = (
            f"kubeproxy_sync_{kind}_proxy_rules_duration_seconds" for kind in ("full", "partial")
        )
        latency = "SyncProxyRules latency in seconds"
        self._sync = _by_family(
            self._histogram(f"{_SYNC}duration_seconds", latency, SYNC_BUCKETS, "ip_family")
        )
        self._full, self._partial = (
            _by_family(self._histogram(name, text, SYNC_BUCKETS, "ip_family"))
            for name, text in (
                (full, f"{latency} for full resyncs"),
                (partial, f"{latency} for partial resyncs"),
            )
        )
        self._programming = _by_family(
            self._histogram(
                "kubeproxy_network_programming_duration_seconds",
                "In Cluster Network Programming Latency in seconds",
                PROGRAMMING_BUCKETS,
                "ip_family",
            )
        )
        last = self._gauge(
            f"{_SYNC}last_timestamp_seconds",
            "The last time proxy rules were successfully synced",
            "ip_family",
        )
        for child in _by_family(last).values():
            child.set_function(lambda: self._heartbeat.synced_at() or 0.0)
        queued = self._gauge(
            f"{_SYNC}last_queued_timestamp_seconds",
            "The last time a sync of proxy rules was queued",
            "ip_family",
        )
        for child in _by_family(queued).values():
            child.set_function(lambda: self._queued_at)
        self._failures = _by_family(
            self._counter(
                f"{_SYNC}nftables_sync_failures_total",
                "Cumulative proxy nftables sync failures",
                "ip_family",
            )
        )

    def _make_changes(self) -> None:
        kinds = (("service", "Service"), ("endpoint", "Endpoint"))
        self._service_changes, self._endpoint_changes = (
            self._counter(f"{_SYNC}{kind}_changes_total", f"Cumulative proxy rules {name} changes")
            for kind, name in kinds
        )
        services_pending, endpoints_pending = (
            self._gauge(f"{_SYNC}{kind}_changes_pending", f"Pending proxy rules {name} changes")
            for kind, name in kinds
        )
        services_pending.set_function(lambda: self._services)
        endpoints_pending.set_function(lambda: self._endpoints)
        self._no_local = self._gauge(
            f"{_SYNC}no_local_endpoints_total",
            "Number of services with a Local traffic policy and no endpoints",
            "ip_family",
            "traffic_policy",
        )
        for family, policy in itertools.product(IP_FAMILY.values(), ("internal", "external")):
            self._no_local.labels(family, policy)

    def _make_conntrack(self) -> None:
        self._flows = _by_family(
            self._counter(
                "kubeproxy_conntrack_reconciler_deleted_entries_total",
                "Cumulative conntrack flows deleted by conntrack reconciler",
                "ip_family",
            )
        )
        self._flow_time = _by_family(
            self._histogram(
                "kubeproxy_conntrack_reconciler_sync_duration_seconds",
                "ReconcileConntrackFlowsLatency latency in seconds",
                SYNC_BUCKETS,
                "ip_family",
            )
        )

    def _make_requests(self) -> None:
        self._asked = {
            f"/{name}": self._counter(
                f"kubeproxy_proxy_{name}_total", f"Cumulative proxy {name} HTTP status", "code"
            )
            for name in ("healthz", "livez")
        }
        for asked in self._asked.values():
            for code in ("200", "503"):
                asked.labels(code)
        self._requests = self._counter(
            "rest_client_requests_total",
            "Number of HTTP requests, partitioned by status code, method, and host.",
            "code",
            "method",
            "host",
        )
        self._request_time = self._histogram(
            "rest_client_request_duration_seconds",
            "Request latency in seconds. Broken down by verb, and host.",
            REQUEST_BUCKETS,
            "verb",
            "host",
        )
        self._gauge(
            "kubernetes_build_info",
            "A metric with a constant '1' value labeled by major, minor, git version, git commit,"
            " git tree state, build date, Go version, and compiler from which Kubernetes was built,"
            " and platform on which it is running.",
            *BUILD_INFO,
        ).labels(**BUILD_INFO).set(1)

    def _make_ours(self, version: str) -> None:
        self._operations = self._counter(
            "sliceproxy_element_operations_total",
            "Elements added to and deleted from nf_tables maps and sets",
            "operation",
            "map",
        )
        # by operation and set; `labels` costs more than counting
        self._counters: dict[tuple[str, str], Counter] = {}
        self._transaction = self._histogram(
            "sliceproxy_transaction_seconds",
            "Time that the kernel took for a transaction",
            FINE_BUCKETS,
        )
        self._latency = self._histogram(
            "sliceproxy_event_to_kernel_seconds",
            "Time from the arrival of events to the kernel's answer",
            FINE_BUCKETS,
        )
        self._remembered = _by_family(
            self._gauge(
                "sliceproxy_affinity_clients",
                "Clients remembered for session affinity, of 65536 at most",
                "family",
            )
        )
        self._repairs = self._counter(
            "sliceproxy_repairs_total",
            "How often the tables were repaired after another process had changed them",
        )
        self._problems = self._gauge(
            "sliceproxy_problems",
            "Open problems by code; the log and `sliceproxy status` name their objects",
            "code",
        )
        for code in CODES:
            self._problems.labels(code)
        self._start = self._gauge(
            "sliceproxy_start_seconds",
            "Time from the start of the process to the first complete programming",
        )
        self._gauge(
            "sliceproxy_build_info",
            "A constant 1, labelled by the versions of sliceproxy, Python and the kernel",
            "version",
            "python",
            "kernel",
        ).labels(version, platform.python_version(), platform.release()).set(1)

    # by the loop

    def received(self, events: Iterable[Event], at: float) -> None:
        """See Recorder."""
        services = endpoints = 0
        for event in events:
            match event:
                case Upsert(EndpointSlice() as piece):
                    endpoints += 1
                    if piece.triggered:
                        self._trigger(piece)
                case Upsert(Service()):
                    services += 1
                case Delete(kind, _):
                    endpoints += kind is EndpointSlice
                    services += kind is Service
        if len(self._arrivals) < MAX_PENDING:
            self._arrivals.append(at)
        self._services += services
        self._endpoints += endpoints
        if services:
            self._service_changes.inc(services)
        if endpoints:
            self._endpoint_changes.inc(endpoints)
        self._queued_at = time.time()

    def _trigger(self, piece: EndpointSlice) -> None:
        """Notes when the change that a slice reports happened, unless that was before this process
        started: it would measure how long the agent was not running."""
        try:
            happened = datetime.fromisoformat(piece.triggered).timestamp()
        except ValueError:
            return
        if happened > self._begun and piece.family and len(self._triggers) < MAX_PENDING:
            self._triggers.append((piece.family, happened))

    def programmed(
        self,
        transaction: Transaction,
        seconds: float,
        kernel_seconds: float,
        *,
        elements: Mapping[Set, int] | None = None,
    ) -> None:
        """See Recorder."""
        if transaction:
            self._transaction.observe(kernel_seconds)
            kind = self._partial if elements is None else self._full
            for family in _families(transaction):
                self._sync[family].observe(seconds)
                kind[family].observe(seconds)
            self._count_elements(transaction, elements)
        elif elements is not None:
            self.now.elements = dict(elements)
        self._done()

    def _count_elements(self, transaction: Transaction, elements: Mapping[Set, int] | None) -> None:
        change = transaction.change
        counts = self.now.elements if elements is None else dict(elements)
        for operation, sign, side in (("delete", -1, change.removed), ("add", 1, change.added)):
            for owner, items in side.items():
                self._operation(operation, owner.name).inc(len(items))
                if elements is None:
                    counts[owner] = counts.get(owner, 0) + sign * len(items)
        self.now.elements = counts

    def _operation(self, operation: str, name: str) -> Counter:
        counter = self._counters.get((operation, name))
        if counter is None:
            counter = self._counters[operation, name] = self._operations.labels(operation, name)
        return counter

    def _done(self) -> None:
        now, monotonic = time.time(), time.monotonic()
        if not self._started:
            self._started = True
            self._start.set(_age_of_process())
        for at in self._arrivals:
            self._latency.observe(monotonic - at)
        for family, happened in self._triggers:
            self._programming[family].observe(max(0.0, now - happened))
        self._arrivals.clear()
        self._triggers.clear()
        self._services = self._endpoints = 0

    def tables_changed(self, tables: Iterable[Table], owned: Mapping[int, bool]) -> None:
        """See Recorder."""
        self.now.rules = {t.family: t.rule_count for t in tables}
        self.now.owned = dict(owned)

    def failed(self) -> None:
        """See Recorder."""
        for counter in self._failures.values():
            counter.inc()

    def repaired(self) -> None:
        """See Recorder."""
        self._repairs.inc()

    def local_endpoints_missing(self, counts: Mapping[tuple[int, str], int]) -> None:
        """See Recorder."""
        if counts != self._lacking:
            self._lacking = dict(counts)
            for family, policy in itertools.product(IP_FAMILY, ("internal", "external")):
                number = counts.get((family, policy), 0)
                self._no_local.labels(IP_FAMILY[family], policy).set(number)

    def problems_open(self, counts: Mapping[str, int]) -> None:
        """See Recorder."""
        for code, count in counts.items():
            self._problems.labels(code).set(count)

    # by other threads

    def flows_deleted(self, family: int, flows: int, seconds: float) -> None:
        """See Recorder."""
        self._flows[family].inc(flows)
        self._flow_time[family].observe(seconds)

    def remembered(self, family: int, clients: int) -> None:
        """See Recorder."""
        self._remembered[family].set(clients)

    def watches_from(self, watches: Callable[[], Iterable[Watch]]) -> None:
        """See Recorder."""
        self.now.watches = watches

    def frontends_from(self, counts: Callable[[], Iterable[FrontendCounts]], most: int) -> None:
        """See Recorder."""
        series = FrontendSeries(most)
        self._frontends = lambda: series.text(counts())

    def requested(
        self, method: str, code: int | str, host: str, seconds: float | None = None
    ) -> None:
        """See Recorder."""
        self._requests.labels(str(code), method, host).inc()
        if seconds is not None:
            self._request_time.labels(method, host).observe(seconds)

    def probe_answered(self, path: str, code: int) -> None:
        """See Recorder."""
        if path in self._asked:  # kube-proxy has no /readyz, and no metric of it
            self._asked[path].labels(str(code)).inc()

    # to scrapers

    def text(self) -> bytes:
        """Everything, in Prometheus's text format."""
        from prometheus_client.exposition import generate_latest

        text = generate_latest(self.registry)
        return text + self._frontends().encode() if self._frontends else text


class _Now:
    """What is looked up at a scrape. Values are replaced or set as a whole by one thread
    and copied by the other, so that no lock is needed."""

    def __init__(
        self,
        heartbeat: Heartbeat,
    ) -> None:
        self.elements: dict[Set, int] = {}
        self.rules: dict[int, int] = {}
        self.owned: dict[int, bool] = {}
        self.watches: Callable[[], Iterable[Watch]] | None = None
        self._heartbeat = heartbeat

    def collect(self) -> Iterator[Metric]:
        """The metrics, as prometheus_client wants them."""
        from prometheus_client.core import GaugeMetricFamily

        elements = GaugeMetricFamily(
            "sliceproxy_elements", "Elements in nf_tables maps and sets", labels=["family", "map"]
        )
        for owner, count in self.elements.copy().items():
            elements.add_metric([IP_FAMILY[owner.family], owner.name], count)
        yield elements
        rules = GaugeMetricFamily(
            "sliceproxy_rules", "Rules in the table of a family", labels=["family"]
        )
        for family, count in self.rules.copy().items():
            rules.add_metric([IP_FAMILY[family]], count)
        yield rules
        owned = GaugeMetricFamily(
            "sliceproxy_table_owned",
            "Whether the kernel lets no other process change the table of a family",
            labels=["family"],
        )
        for family, is_owned in self.owned.copy().items():
            owned.add_metric([IP_FAMILY[family]], is_owned)
        yield owned
        health = self._heartbeat.health()
        yield GaugeMetricFamily(
            "sliceproxy_ready", "Whether /readyz answers 200", value=not health.not_ready
        )
        if self.watches is not None:
            yield from _watch_metrics(self.watches(), health.silent_watches)


def _watch_metrics(watches: Iterable[Watch], silent: Collection[str]) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    states = GaugeMetricFamily(
        "sliceproxy_watch_state",
        "What the source does for a resource: 1 for the state that it is in",
        labels=["resource", "state"],
    )
    ages = GaugeMetricFamily(
        "sliceproxy_watch_last_message_age_seconds",
        "Time since the API server last sent something for a resource",
        labels=["resource"],
    )
    valid = GaugeMetricFamily(
        "sliceproxy_watch_last_valid_age_seconds",
        "Time since the API server last gave a valid answer for a resource",
        labels=["resource"],
    )
    silence = GaugeMetricFamily(
        "sliceproxy_watch_silent",
        "Whether a resource has had no valid answer for longer than the limit",
        labels=["resource"],
    )
    relists, errors = (
        CounterMetricFamily(f"sliceproxy_watch_{name}", text, labels=["resource"])
        for name, text in (
            ("relists", "How often a resource was listed again"),
            ("errors", "Requests of lists and watches that failed"),
        )
    )
    now = time.monotonic()
    for watch in watches:
        for state in WATCH_STATES:
            states.add_metric([watch.resource, state], state == watch.state)
        if watch.last_valid is not None:
            valid.add_metric([watch.resource], now - watch.last_valid)
        if watch.last_message is not None:
            ages.add_metric([watch.resource], now - watch.last_message)
        silence.add_metric([watch.resource], watch.resource in silent)
        relists.add_metric([watch.resource], watch.relists)
        errors.add_metric([watch.resource], watch.errors)
    yield from (states, ages, valid, silence, relists, errors)


def _collector(now: _Now) -> Collector:
    from prometheus_client.registry import Collector

    class Now(Collector):
        def collect(self) -> Iterator[Metric]:
            return now.collect()

    return Now()


def _by_family(metric: _M) -> dict[int, _M]:
    """The metric's children by family number: they are there from the start, at 0."""
    return {number: metric.labels(name) for number, name in IP_FAMILY.items()}


def _families(transaction: Transaction) -> set[int]:
    """The families that a transaction touches."""
    change = transaction.change
    return {owner.family for side in (change.removed, change.added) for owner in side} | {
        t.family for t in transaction.tables if not t.empty
    }


def _age_of_process() -> float:
    """Seconds since the kernel started this process."""
    with open("/proc/self/stat", encoding="ascii", errors="replace") as stat:
        # the name, second and in parentheses, may hold anything; the start time is field 22
        ticks = int(stat.read().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


# --- the server ---------------------------------------------------------------------------------

_TEXT = (("Content-Type", "text/plain; version=0.0.4; charset=utf-8"),)
_KEEP_SECONDS = 0.25
"""A flood of scrapes is answered from one text for so long: making it takes milliseconds in which
the loop cannot run."""


class MetricsServer:
    """/metrics and /proxyMode at `address`, in a thread of its own, so that no load balancer waits
    for a scrape. With `hard_fail` an address that cannot be opened is an OSError of `start`."""

    def __init__(
        self,
        metrics: Metrics,
        log: Log,
        failed: Failed,
        address: TcpAddress,
        *,
        hard_fail: bool = False,
    ) -> None:
        self._metrics = metrics
        self._listener = Listener(address, "metrics", self._respond)
        self._hard_fail = hard_fail
        self._server = HttpServer("metrics", log, failed)
        self._text = b""
        self._made_at = float("-inf")

    def start(self) -> None:
        """Starts to answer. Raises OSError if `hard_fail`."""
        if self._hard_fail:
            self._server.adopt(self._listener, listen(self._listener.address))
        else:
            self._server.serve(self._listener)
        self._server.start()

    def stop(self) -> None:
        """Closes the port."""
        self._server.stop()

    def settle(self) -> bool:
        """Waits until the port has been tried. For tests."""
        return self._server.settle()

    def _respond(self, request: HttpRequest) -> HttpAnswer:
        match request.path:
            case "/metrics":
                if time.monotonic() - self._made_at >= _KEEP_SECONDS:
                    self._text, self._made_at = self._metrics.text(), time.monotonic()
                return HttpAnswer(200, _TEXT, self._text)
            case "/proxyMode":  # asked by an end-to-end test of Kubernetes, and by people
                return HttpAnswer(200, PLAIN_TEXT, b"nftables")
        return NOT_FOUND
