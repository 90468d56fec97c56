"""Metrics: names, types, help and labels as a scraper reads them, and that they count right."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from http.client import HTTPConnection
from typing import Any, NamedTuple, get_args, get_type_hints

import pytest
import structlog
from prometheus_client.parser import text_string_to_metric_families

from agent.serve.health import Heartbeat
from agent.serve.http import TcpAddress, listen
from agent.serve.metrics import (
    PROGRAMMING_BUCKETS,
    SYNC_BUCKETS,
    WATCH_STATES,
    Metrics,
    MetricsServer,
    Recorder,
)
from rules.counts import FrontendCounts
from rules.diff import Change
from rules.events import Delete, NodeAddresses, Synced, Upsert
from rules.objects import Endpoint, Endpoints, EndpointSlice, Name, Service, ServicePort, SlicePort
from rules.problems import CODES
from rules.program import Surroundings, no_local_endpoints, program
from rules.selection import NodeLocation
from rules.tables import SETS, Layout, build
from rules.transaction import TableChange, Transaction

WEB = Name("shop", "web")
SYNC = "kubeproxy_sync_proxy_rules_"


def service(**changes: Any) -> Service:
    fields: dict[str, Any] = {
        "name": WEB,
        "created": "",
        "proxy_name": None,
        "headless": False,
        "proxied": True,
        "cluster_ips": (b"\x0a\x60\0\1",),
        "external_ips": (),
        "load_balancer_ips": (),
        "ports": (ServicePort("http", 6, 80, 30080), ServicePort("alt", 6, 81, 0)),
        "internal_local": False,
        "external_local": False,
        "affinity_seconds": 0,
        "source_ranges": (),
        "health_check_node_port": 0,
    }
    return Service(**{**fields, **changes})


def piece(family: int = 4, triggered: str = "", node: str = "here") -> EndpointSlice:
    endpoint = Endpoint(b"\x0a\0\0\1" if family == 4 else bytes(15) + b"\1", 3, node)
    ports = (SlicePort("http", 6, 8080), SlicePort("alt", 6, 8081))
    return EndpointSlice(
        Name("shop", "web-x"), WEB, None, False, family, ports, Endpoints.of([endpoint]), triggered
    )


def change(added: dict[Any, int], removed: dict[Any, int] | None = None) -> Change:
    made = Change()
    for owner, count in added.items():
        made.added[owner] = [(bytes([i]), None) for i in range(count)]
    for owner, count in (removed or {}).items():
        made.removed[owner] = [(bytes([i]), None) for i in range(count)]
    return made


def step(added: dict[Any, int], removed: dict[Any, int] | None = None) -> Transaction:
    return Transaction((), change(added, removed))


NOTHING = Transaction((), Change())


def families(metrics: Metrics) -> dict[str, Any]:
    return {f.name: f for f in text_string_to_metric_families(metrics.text().decode())}


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    for family in families(metrics).values():
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return float(sample.value)
    return None


class Watched(NamedTuple):
    resource: str
    state: str
    last_message: float | None
    last_valid: float | None = None
    relists: int = 2
    errors: int = 3


WATCHES = [Watched("services", "watching", 1.0, 0.5), Watched("nodes", "backing off", None)]


@pytest.fixture
def metrics() -> Metrics:
    made = Metrics("0.1.0")
    made.watches_from(lambda: WATCHES)
    return made


# --- names --------------------------------------------------------------------------------------

FAMILY = {"ip_family"}
KUBE_PROXYS: dict[str, tuple[str, set[str], str]] = {
    # of the metrics reference of Kubernetes
    f"{SYNC}duration_seconds": ("histogram", FAMILY, "SyncProxyRules latency in seconds"),
    "kubeproxy_sync_full_proxy_rules_duration_seconds": (
        "histogram",
        FAMILY,
        "SyncProxyRules latency in seconds for full resyncs",
    ),
    "kubeproxy_sync_partial_proxy_rules_duration_seconds": (
        "histogram",
        FAMILY,
        "SyncProxyRules latency in seconds for partial resyncs",
    ),
    "kubeproxy_network_programming_duration_seconds": (
        "histogram",
        FAMILY,
        "In Cluster Network Programming Latency in seconds",
    ),
    f"{SYNC}last_timestamp_seconds": (
        "gauge",
        FAMILY,
        "The last time proxy rules were successfully synced",
    ),
    f"{SYNC}last_queued_timestamp_seconds": (
        "gauge",
        FAMILY,
        "The last time a sync of proxy rules was queued",
    ),
    f"{SYNC}nftables_sync_failures": (
        "counter",
        FAMILY,
        "Cumulative proxy nftables sync failures",
    ),
    f"{SYNC}service_changes": ("counter", set(), "Cumulative proxy rules Service changes"),
    f"{SYNC}service_changes_pending": ("gauge", set(), "Pending proxy rules Service changes"),
    f"{SYNC}endpoint_changes": ("counter", set(), "Cumulative proxy rules Endpoint changes"),
    f"{SYNC}endpoint_changes_pending": ("gauge", set(), "Pending proxy rules Endpoint changes"),
    f"{SYNC}no_local_endpoints_total": (
        "gauge",
        {"ip_family", "traffic_policy"},
        "Number of services with a Local traffic policy and no endpoints",
    ),
    "kubeproxy_conntrack_reconciler_deleted_entries": (
        "counter",
        FAMILY,
        "Cumulative conntrack flows deleted by conntrack reconciler",
    ),
    "kubeproxy_conntrack_reconciler_sync_duration_seconds": (
        "histogram",
        FAMILY,
        "ReconcileConntrackFlowsLatency latency in seconds",
    ),
    "kubeproxy_proxy_healthz": ("counter", {"code"}, "Cumulative proxy healthz HTTP status"),
    "kubeproxy_proxy_livez": ("counter", {"code"}, "Cumulative proxy livez HTTP status"),
    "rest_client_requests": (
        "counter",
        {"code", "method", "host"},
        "Number of HTTP requests, partitioned by status code, method, and host.",
    ),
    "rest_client_request_duration_seconds": (
        "histogram",
        {"verb", "host"},
        "Request latency in seconds. Broken down by verb, and host.",
    ),
    "kubernetes_build_info": (
        "gauge",
        {
            "major",
            "minor",
            "git_version",
            "git_commit",
            "git_tree_state",
            "build_date",
            "go_version",
            "compiler",
            "platform",
        },
        "A metric with a constant '1' value labeled by major, minor, git version, git commit, git"
        " tree state, build date, Go version, and compiler from which Kubernetes was built, and"
        " platform on which it is running.",
    ),
}
OURS: dict[str, tuple[str, set[str]]] = {
    "sliceproxy_affinity_clients": ("gauge", {"family"}),
    "sliceproxy_elements": ("gauge", {"family", "map"}),
    "sliceproxy_element_operations": ("counter", {"operation", "map"}),
    "sliceproxy_transaction_seconds": ("histogram", set()),
    "sliceproxy_event_to_kernel_seconds": ("histogram", set()),
    "sliceproxy_watch_state": ("gauge", {"resource", "state"}),
    "sliceproxy_watch_last_message_age_seconds": ("gauge", {"resource"}),
    "sliceproxy_watch_last_valid_age_seconds": ("gauge", {"resource"}),
    "sliceproxy_problems": ("gauge", {"code"}),
    "sliceproxy_watch_silent": ("gauge", {"resource"}),
    "sliceproxy_ready": ("gauge", set()),
    "sliceproxy_watch_relists": ("counter", {"resource"}),
    "sliceproxy_watch_errors": ("counter", {"resource"}),
    "sliceproxy_repairs": ("counter", set()),
    "sliceproxy_rules": ("gauge", {"family"}),
    "sliceproxy_table_owned": ("gauge", {"family"}),
    "sliceproxy_start_seconds": ("gauge", set()),
    "sliceproxy_build_info": ("gauge", {"version", "python", "kernel"}),
}


def exercise(metrics: Recorder) -> None:
    metrics.received([Upsert(service()), Upsert(piece()), Synced()], time.monotonic())
    metrics.programmed(step({SETS[4].endpoints: 2}), 0.01, 0.001)
    metrics.tables_changed([build(Layout(4)), build(Layout(6))], {4: True, 6: False})
    metrics.failed()
    metrics.repaired()
    metrics.local_endpoints_missing({(4, "external"): 3})
    metrics.flows_deleted(4, 2, 0.01)
    metrics.requested("GET", 200, "10.96.0.1:443", 0.2)
    metrics.requested("GET", "<error>", "10.96.0.1:443")
    metrics.problems_open({CODES[0]: 2})
    metrics.probe_answered("/healthz", 200)


def test_all_names_types_labels_and_help_texts(metrics: Metrics) -> None:
    exercise(metrics)
    found = families(metrics)
    assert {n for n in found if not n.startswith("process_")} == {*KUBE_PROXYS, *OURS}
    for name, (kind, labels, text) in KUBE_PROXYS.items():
        assert (found[name].type, found[name].documentation) == (kind, text)
        assert {label for s in found[name].samples for label in s.labels} - {"le"} == labels
    for name, (kind, labels) in OURS.items():
        assert found[name].type == kind
        assert {label for s in found[name].samples for label in s.labels} - {"le"} == labels
    assert {"process_cpu_seconds", "process_resident_memory_bytes"} <= set(found)
    assert {"process_open_fds", "process_start_time_seconds"} <= set(found)


def test_what_promtool_would_say(metrics: Metrics) -> None:
    exercise(metrics)
    for family in families(metrics).values():
        assert re.fullmatch(r"[a-z][a-z0-9_]*", family.name)
        assert family.documentation
        assert all(s.name.endswith("_total") for s in family.samples if family.type == "counter")
        if family.name.startswith("sliceproxy_"):
            assert family.name.islower()
            assert "total" not in family.name
            assert not re.search(r"milli|micro|minutes|kilobytes", family.name)
            assert family.documentation[0].isupper()
            assert not family.documentation.endswith(".")


def test_buckets_are_kube_proxys() -> None:
    assert (SYNC_BUCKETS[0], SYNC_BUCKETS[-1], len(SYNC_BUCKETS)) == (0.001, 16.384, 15)
    assert PROGRAMMING_BUCKETS[:5] == (0, 0.25, 0.5, 1, 2)
    assert PROGRAMMING_BUCKETS[-8:] == (115, 120, 150, 180, 210, 240, 270, 300)
    assert len(PROGRAMMING_BUCKETS) == 81
    assert sorted(set(PROGRAMMING_BUCKETS)) == list(PROGRAMMING_BUCKETS)


def test_what_can_be_zero_is_there_from_the_start(metrics: Metrics) -> None:
    assert value(metrics, "kubeproxy_proxy_healthz_total", code="503") == 0
    assert value(metrics, f"{SYNC}nftables_sync_failures_total", ip_family="IPv6") == 0
    labels = {"ip_family": "IPv4", "traffic_policy": "internal"}
    assert value(metrics, f"{SYNC}no_local_endpoints_total", **labels) == 0
    assert value(metrics, "sliceproxy_repairs_total") == 0


# --- counting -----------------------------------------------------------------------------------


def test_changes_are_pending_until_they_are_programmed() -> None:
    heartbeat = Heartbeat()
    metrics = Metrics("0.1.0", heartbeat=heartbeat)
    events = [
        Upsert(service()),
        Upsert(piece()),
        Delete(EndpointSlice, WEB),
        NodeAddresses(frozenset(), ()),
    ]
    metrics.received(events, time.monotonic() - 500)
    metrics.received([Delete(Service, WEB)], time.monotonic())
    assert value(metrics, f"{SYNC}service_changes_total") == 2
    assert value(metrics, f"{SYNC}endpoint_changes_total") == 2
    assert value(metrics, f"{SYNC}service_changes_pending") == 2
    assert value(metrics, f"{SYNC}endpoint_changes_pending") == 2
    assert value(metrics, f"{SYNC}last_timestamp_seconds", ip_family="IPv4") == 0
    metrics.programmed(NOTHING, 0, 0)
    heartbeat.programmed()
    assert value(metrics, f"{SYNC}service_changes_pending") == 0
    assert value(metrics, f"{SYNC}endpoint_changes_pending") == 0
    assert value(metrics, "sliceproxy_event_to_kernel_seconds_count") == 2
    assert value(metrics, "sliceproxy_event_to_kernel_seconds_sum") == pytest.approx(500, abs=5)
    last = value(metrics, f"{SYNC}last_timestamp_seconds", ip_family="IPv6")
    assert last == pytest.approx(time.time(), abs=5)
    assert (value(metrics, "sliceproxy_start_seconds") or 0) > 0
    # nothing was to be written: no sync is counted
    assert value(metrics, f"{SYNC}duration_seconds_count", ip_family="IPv4") == 0


def test_elements_are_carried_along(metrics: Metrics) -> None:
    four, six = SETS[4].endpoints, SETS[6].endpoints
    metrics.programmed(step({four: 5, six: 1}), 0.002, 0.001)
    metrics.programmed(step({four: 1}, {four: 3}), 0.002, 0.001)
    assert value(metrics, "sliceproxy_elements", family="IPv4", map="endpoints") == 3
    assert value(metrics, "sliceproxy_elements", family="IPv6", map="endpoints") == 1
    operations = "sliceproxy_element_operations_total"
    assert value(metrics, operations, operation="add", map="endpoints") == 7
    assert value(metrics, operations, operation="delete", map="endpoints") == 3
    assert value(metrics, f"{SYNC}duration_seconds_count", ip_family="IPv4") == 2
    assert value(metrics, f"{SYNC}duration_seconds_count", ip_family="IPv6") == 1
    partial = "kubeproxy_sync_partial_proxy_rules_duration_seconds_count"
    assert value(metrics, partial, ip_family="IPv4") == 2
    assert value(metrics, "sliceproxy_transaction_seconds_count") == 2


def test_a_full_sync_replaces_the_counts(metrics: Metrics) -> None:
    four, ips = SETS[4].endpoints, SETS[4].service_ips
    metrics.programmed(step({four: 5}), 0.002, 0.001)
    counts = Counter({four: 9, ips: 2})
    metrics.programmed(step({ips: 1}), 0.002, 0.001, elements=counts)
    assert value(metrics, "sliceproxy_elements", family="IPv4", map="endpoints") == 9
    assert value(metrics, "sliceproxy_elements", family="IPv4", map="service-ips") == 2
    full = "kubeproxy_sync_full_proxy_rules_duration_seconds_count"
    assert value(metrics, full, ip_family="IPv4") == 1
    metrics.programmed(step({ips: 1}), 0.002, 0.001)
    assert counts == {four: 9, ips: 2}  # not ours to change
    metrics.programmed(NOTHING, 0.002, 0, elements={four: 1})
    assert value(metrics, "sliceproxy_elements", family="IPv4", map="endpoints") == 1


def test_a_table_that_changes_touches_its_family(metrics: Metrics) -> None:
    tables = (TableChange(4), TableChange(6, delete=True))
    metrics.programmed(Transaction(tables, Change()), 0.002, 0.001)
    assert value(metrics, f"{SYNC}duration_seconds_count", ip_family="IPv4") == 0
    assert value(metrics, f"{SYNC}duration_seconds_count", ip_family="IPv6") == 1


def test_network_programming_latency_begins_at_the_trigger(metrics: Metrics) -> None:
    def stamp(seconds: float) -> str:
        text = datetime.fromtimestamp(time.time() + seconds, UTC).isoformat()
        return text.replace("+00:00", "000Z")  # nanoseconds, as Go prints them

    metrics.received(
        [
            Upsert(piece(4, stamp(0.2))),  # the control plane's clock is ahead of ours
            Upsert(piece(6, stamp(0.2))),
            Upsert(piece(4, stamp(-3600))),  # happened before this process began
            Upsert(piece(4, "nonsense")),
            Upsert(piece(4)),
        ],
        time.monotonic(),
    )
    name = "kubeproxy_network_programming_duration_seconds"
    assert value(metrics, f"{name}_count", ip_family="IPv4") == 0
    metrics.programmed(NOTHING, 0, 0)
    assert value(metrics, f"{name}_count", ip_family="IPv4") == 1
    assert value(metrics, f"{name}_count", ip_family="IPv6") == 1
    assert value(metrics, f"{name}_bucket", ip_family="IPv4", le="0.25") == 1
    metrics.programmed(NOTHING, 0, 0)
    assert value(metrics, f"{name}_count", ip_family="IPv4") == 1


def test_failures_repairs_and_flows(metrics: Metrics) -> None:
    exercise(metrics)
    assert value(metrics, f"{SYNC}nftables_sync_failures_total", ip_family="IPv4") == 1
    assert value(metrics, "sliceproxy_repairs_total") == 1
    name = "kubeproxy_conntrack_reconciler_deleted_entries_total"
    assert value(metrics, name, ip_family="IPv4") == 2
    labels = {"code": "200", "method": "GET", "host": "10.96.0.1:443"}
    assert value(metrics, "rest_client_requests_total", **labels) == 1
    assert value(metrics, "kubeproxy_proxy_healthz_total", code="200") == 1
    external = {"ip_family": "IPv4", "traffic_policy": "external"}
    assert value(metrics, f"{SYNC}no_local_endpoints_total", **external) == 3
    metrics.local_endpoints_missing({})
    assert value(metrics, f"{SYNC}no_local_endpoints_total", **external) == 0
    rules = sum(len(c.rules) for c in build(Layout(4)).chains)
    assert value(metrics, "sliceproxy_rules", family="IPv4") == rules


def test_watches(metrics: Metrics) -> None:
    state = "sliceproxy_watch_state"
    assert value(metrics, state, resource="services", state="watching") == 1
    assert value(metrics, state, resource="services", state="listing") == 0
    assert value(metrics, state, resource="nodes", state="backing off") == 1
    age = "sliceproxy_watch_last_message_age_seconds"
    assert value(metrics, age, resource="nodes") is None
    expected = pytest.approx(time.monotonic() - 1, abs=5)
    assert value(metrics, age, resource="services") == expected
    assert value(metrics, "sliceproxy_watch_relists_total", resource="services") == 2
    assert value(metrics, "sliceproxy_watch_errors_total", resource="nodes") == 3


def test_the_states_are_those_of_the_source() -> None:
    from agent.sources.kubernetes.follower import WatchStatus

    assert get_args(get_type_hints(WatchStatus)["state"]) == WATCH_STATES


def counts(service: str, connections: int, **more: dict[str, int]) -> FrontendCounts:
    return FrontendCounts("shop", service, "http", "10.96.0.1:80/tcp", connections, **more)


def of(service: str, **more: str) -> dict[str, str]:
    frontend = "others" if not service else "10.96.0.1:80/tcp"
    namespace, port = ("shop", "http") if service else ("", "")
    return {
        "namespace": namespace, "service": service, "port": port, "frontend": frontend, **more,
    }  # fmt: skip


CONNECTIONS = "sliceproxy_service_connections_total"


def test_frontends_have_series_by_reason() -> None:
    metrics = Metrics("0")
    found = [counts("web", 7, refused={"no_endpoints": 3}, dropped={"source_ranges": 2})]
    metrics.frontends_from(lambda: found, 10)
    assert value(metrics, CONNECTIONS, **of("web")) == 7
    refused = value(metrics, "sliceproxy_service_refused_total", **of("web", reason="no_endpoints"))
    dropped = value(
        metrics, "sliceproxy_service_dropped_total", **of("web", reason="source_ranges")
    )
    assert (refused, dropped) == (3, 2)


def test_frontends_beyond_the_bound_are_summed_and_the_sum_never_falls() -> None:
    """Also when one of them is deleted, and when the deletion of another makes room."""
    metrics = Metrics("0")
    found = [counts("a", 1), counts("b", 10), counts("c", 100)]
    metrics.frontends_from(lambda: found, 1)

    def scrape() -> tuple[float | None, float | None]:
        text = metrics.text().decode()
        assert text.count(CONNECTIONS + "{") == 2
        first, *_ = (s for s in "abc" if f'service="{s}"' in text)
        lines = [x for x in text.splitlines() if x.startswith(CONNECTIONS)]
        by = {f'service="{first}"' in x: float(x.rpartition(" ")[2]) for x in lines}
        return by[True], by[False]

    assert scrape() == (1, 110)
    found[:] = [counts("a", 2), counts("b", 11), counts("c", 101)]
    assert scrape() == (2, 112)
    found[:] = [counts("a", 2), counts("c", 101)]
    assert scrape() == (2, 112)
    found[:] = [counts("c", 102), counts("d", 5)]
    text = metrics.text().decode()
    assert 'service="d"} 5' in text or 'service="d",' in text
    assert f'{CONNECTIONS}{{frontend="others",namespace="",port="",service=""}} 113.0' in text


def test_connections_do_not_fall_while_refusals_grow() -> None:
    metrics = Metrics("0")
    found = [counts("web", 7, refused={"no_endpoints": 1})]
    metrics.frontends_from(lambda: found, 10)
    assert value(metrics, CONNECTIONS, **of("web")) == 7
    found[:] = [counts("web", 5, refused={"no_endpoints": 4})]
    assert value(metrics, CONNECTIONS, **of("web")) == 7
    found[:] = [counts("web", 0)]
    assert value(metrics, CONNECTIONS, **of("web")) == 0


# --- Services without an endpoint here ----------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "node", "expected"),
    [
        ({}, "there", set()),
        ({"internal_local": True}, "here", set()),
        (
            {"internal_local": True},
            "there",
            {(4, "internal", "http", 6), (4, "internal", "alt", 6)},
        ),
        ({"external_local": True}, "there", {(4, "external", "http", 6)}),  # one has a node port
    ],
)
def test_services_with_nothing_here(
    changes: dict[str, Any], node: str, expected: set[tuple[int, str, str, int]]
) -> None:
    around = Surroundings(NodeLocation("here", ""))
    assert no_local_endpoints(program(service(**changes), [piece(node=node)], around)) == expected


def test_no_endpoints_anywhere_is_no_lack_of_local_ones() -> None:
    around = Surroundings(NodeLocation("here", ""))
    assert not no_local_endpoints(program(service(internal_local=True), [], around))


# --- what it costs ------------------------------------------------------------------------------


def test_a_recorder_that_keeps_nothing_takes_all_reports() -> None:
    recorder = Recorder()
    exercise(recorder)
    assert vars(recorder) == {}


def test_importing_does_not_load_prometheus_client() -> None:
    code = "import agent.serve.metrics, sys; sys.exit('prometheus_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_recording_a_change_does_not_depend_on_how_many_elements_there_are(
    metrics: Metrics,
) -> None:
    """Counts calls, not time: as many for a change beside a million elements as beside none."""
    sets = [s for f in (4, 6) for s in SETS[f].always]
    one = step({SETS[4].endpoints: 1}, {SETS[4].endpoints: 1})
    event = [Upsert(piece())]

    def calls() -> int:
        count = 0

        def seen(_frame: object, what: str, _argument: object) -> None:
            nonlocal count
            count += what in ("call", "c_call")

        sys.setprofile(seen)
        try:
            metrics.received(event, 0.0)
            metrics.programmed(one, 0.002, 0.001)
        finally:
            sys.setprofile(None)
        return count

    metrics.programmed(NOTHING, 0, 0, elements={})
    calls()  # the counters of the map exist from now on
    few = calls()
    metrics.programmed(NOTHING, 0, 0, elements=dict.fromkeys(sets, 1_000_000))
    assert calls() == few < 250


# --- the server ---------------------------------------------------------------------------------


def test_the_server(metrics: Metrics) -> None:
    with listen(TcpAddress("127.0.0.1", 0)) as sock:
        address = TcpAddress("127.0.0.1", sock.getsockname()[1])
    server = MetricsServer(
        metrics, structlog.get_logger(), lambda *_: None, address, hard_fail=True
    )
    server.start()
    server.settle()
    try:
        connection = HTTPConnection(*address, timeout=5)
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        assert answer.status == 200
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert b"sliceproxy_build_info" in answer.read()
        connection = HTTPConnection(*address, timeout=5)
        connection.request("GET", "/proxyMode")
        assert connection.getresponse().read() == b"nftables"
        connection = HTTPConnection(*address, timeout=5)
        connection.request("GET", "/")
        assert connection.getresponse().status == 404
    finally:
        server.stop()
