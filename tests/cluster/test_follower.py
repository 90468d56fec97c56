"""The Follower against an API server over real HTTP: starts, changes, and each fault in turn."""

from __future__ import annotations

import json
import random
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog
import yaml
from structlog.testing import LogCapture

from agent.sources.kubernetes import follower as kubernetes
from agent.sources.kubernetes import formats
from agent.sources.kubernetes.connection import ConnectError, Connection, connect
from agent.sources.kubernetes.follower import ClusterFollower
from agent.sources.kubernetes.reflector import Timing
from rules.events import ApiServers, Delete, Event, Synced, Upsert
from rules.objects import Name, Object
from tests.cluster.apiserver import ApiServer
from tests.manifest import endpoint, service_document, slice_document

PATIENCE = 20.0
FAST = Timing(
    connect=2.0,
    answer=0.5,
    silence=0.5,
    backoff=(0.01, 0.05),
    optional_retry=0.05,
    page=3,
)
RESOURCES = ("services", "endpointslices", "nodes", "servicecidrs")
REQUIRED = RESOURCES[:3]
AWAY, BACK = "api_server_unreachable", "api_server_recovered"
UNUSABLE, WATCH_FAILED = "object_unusable", "watch_failed"


def node_document(name: str = "node-1") -> dict[str, Any]:
    return {"kind": "Node", "metadata": {"name": name}, "spec": {"podCIDRs": ["10.244.1.0/24"]}}


def cidr_document() -> dict[str, Any]:
    return {
        "kind": "ServiceCIDR",
        "metadata": {"name": "kubernetes"},
        "spec": {"cidrs": ["10.96.0.0/16"]},
    }


def fill(server: ApiServer, services: int = 7) -> None:
    for number in range(services):
        name = f"web-{number}"
        server.put(
            service_document(name, cluster_ips=[f"10.96.1.{number + 1}"]),
            slice_document(name, [endpoint(f"10.244.1.{number + 1}")]),
        )
    server.put(node_document(), node_document("node-2"), cidr_document())


class Inbox:
    """Takes what a Follower puts, applies it, and lets tests wait."""

    def __init__(self) -> None:
        self.lists: list[list[Event]] = []
        self.table: dict[tuple[str, str], Object] = {}
        self.news = threading.Condition()
        self.api_servers: frozenset[tuple[bytes, int]] = frozenset()
        self.fails = 0

    def put(self, events: list[Event]) -> None:
        with self.news:
            if self.fails:
                self.fails -= 1
                raise RuntimeError("the loop is broken")
            if not isinstance(events[0], ApiServers):
                self.lists.append(events)
            for event in events:
                match event:
                    case Upsert(new):
                        self.table[type(new).__name__, str(new.name)] = new
                    case Delete(kind, name):
                        del self.table[kind.__name__, str(name)]
                    case ApiServers(endpoints):
                        self.api_servers = endpoints
            self.news.notify_all()

    def wait(self, condition: Callable[[], object]) -> None:
        with self.news:
            assert self.news.wait_for(condition, PATIENCE), (sorted(self.table), self.lists[-3:])

    def wait_synced(self) -> None:
        self.wait(lambda: self.synced)

    @property
    def synced(self) -> int:
        return sum(isinstance(e, Synced) for events in self.lists for e in events)

    def has(self, kind: str, name: str) -> bool:
        return (kind, name) in self.table


class Run:
    """A Follower of an ApiServer, with its events and log lines."""

    def __init__(
        self, server: ApiServer, *, timing: Timing = FAST, connection: Connection | None = None
    ) -> None:
        self.server = server
        self.inbox = Inbox()
        self.failed: list[tuple[str, Exception]] = []
        self.capture = LogCapture()
        log = structlog.wrap_logger(
            None,
            processors=[self.capture],
            wrapper_class=structlog.make_filtering_bound_logger("info"),
        )
        self.follower = ClusterFollower(
            connection or connect(server=server.url),
            "node-1",
            "",
            self.inbox.put,
            log,
            failed=lambda name, error: self.failed.append((name, error)),
            timing=timing,
            rng=random.Random(1),
        )

    def __enter__(self) -> Run:
        self.follower.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.follower.stop()

    def logged(self, *events: str) -> list[Any]:
        return [e for e in list(self.capture.entries) if e["event"] in events]

    def wait_logged(self, event: str) -> Any:
        deadline = time.monotonic() + PATIENCE
        while not self.logged(event):
            assert time.monotonic() < deadline, (event, self.capture.entries)
            time.sleep(0.005)
        return self.logged(event)[0]

    def check(self) -> None:
        """The events lead, after a moment, to what the server has."""
        wanted = {
            (kind, str(Name(*key)) if key[0] else key[1])
            for kind in ("Service", "EndpointSlice", "ServiceCIDR")
            for key in self.server.objects(kind)
        }
        wanted.add(("Node", "node-1"))
        self.inbox.wait(lambda: set(self.inbox.table) == wanted)
        assert self.inbox.synced == 1

    def reaches(self, name: str) -> None:
        """A Service that is created now is reported."""
        self.server.put(service_document(name, cluster_ips=["10.96.9.9"]))
        self.inbox.wait(lambda: self.inbox.has("Service", f"default/{name}"))


@pytest.fixture(params=["protobuf", "json"])
def server(request: pytest.FixtureRequest) -> Iterator[ApiServer]:
    with ApiServer() as server:
        server.protobuf = request.param == "protobuf"
        fill(server)
        yield server


@pytest.fixture
def run(server: ApiServer) -> Iterator[Run]:
    with Run(server) as run:
        run.inbox.wait_synced()
        server.wait_for(lambda: server.watching(*RESOURCES))
        yield run


# --- starts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [True, False])
def test_start(server: ApiServer, streaming: bool) -> None:
    server.streaming = streaming
    with Run(server) as run:
        run.inbox.wait_synced()
        run.check()
        *_, last = next(e for e in run.inbox.lists if any(isinstance(x, Synced) for x in e))
        assert isinstance(last, Synced)
        # the lists came whole: one of each resource, and then Synced
        assert len(run.inbox.lists) == len(RESOURCES)
        server.wait_for(lambda: server.watching(*RESOURCES))
        run.reaches("late")
        lists = [s for s in server.seen if s.verb == "list"]
        pages = [s for s in lists if s.resource == "services"]
        assert len(pages) == (0 if streaming else 3)
        assert not run.capture.entries


def test_requests_are_those_that_the_cluster_role_allows(server: ApiServer) -> None:
    server.streaming = False
    with Run(server) as run:
        run.inbox.wait_synced()
        server.wait_for(lambda: server.watching(*RESOURCES))
    assert {(s.verb, s.group, s.resource) for s in server.seen} == {
        (verb, group, resource)
        for verb in ("list", "watch")
        for group, resource in (
            ("", "services"),
            ("", "nodes"),
            ("discovery.k8s.io", "endpointslices"),
            ("networking.k8s.io", "servicecidrs"),
        )
    }
    for seen in server.seen:
        if seen.resource == "services":
            assert seen.query["labelSelector"] == "!service.kubernetes.io/service-proxy-name"
            assert seen.query["fieldSelector"] == "spec.clusterIP!=None"
        if seen.resource == "endpointslices":
            assert seen.query["labelSelector"] == "!service.kubernetes.io/headless"
        if seen.resource == "nodes":
            assert seen.query["fieldSelector"] == "metadata.name=node-1"


@pytest.mark.parametrize("resource", REQUIRED)
def test_nothing_is_synced_before_all_that_is_required_is_there(
    server: ApiServer, resource: str
) -> None:
    server.answer(500, resource=resource)
    with Run(server) as run:
        others = [r for r in RESOURCES if r != resource]
        server.wait_for(lambda: server.watching(*others))
        assert not run.inbox.synced
        server.heal()
        run.inbox.wait_synced()
        run.check()


@pytest.mark.parametrize("code", [403, 404])
def test_service_cidrs_are_optional(server: ApiServer, code: int) -> None:
    if code == 404:
        server.absent.add("servicecidrs")
    else:
        server.forbidden |= {("watch", "servicecidrs"), ("list", "servicecidrs")}
    with Run(server) as run:
        run.inbox.wait_synced()
        (entry,) = run.capture.entries
        assert entry["event"] == ("resource_absent" if code == 404 else "api_server_forbidden")
        assert entry["resource"] == "servicecidrs.networking.k8s.io"
        assert entry["log_level"] == "warning"
        server.absent.clear()
        server.heal()
        run.check()


def test_an_api_server_that_starts_later(server: ApiServer) -> None:
    server.down()
    with Run(server) as run:
        entry = run.wait_logged(AWAY)
        assert entry["reason"] == "Connection refused"
        assert entry["server"] == server.url
        assert run.inbox.lists == []
        server.up()
        run.inbox.wait_synced()
        run.check()
        run.wait_logged(BACK)
    assert [e["event"] for e in run.capture.entries] == [AWAY, BACK]


def test_services_for_another_proxy(server: ApiServer) -> None:
    theirs = service_document("theirs")
    theirs["metadata"]["labels"] = {"service.kubernetes.io/service-proxy-name": "other"}
    server.put(theirs)
    inbox = Inbox()
    follower = ClusterFollower(
        connect(server=server.url),
        "node-1",
        "other",
        inbox.put,
        structlog.get_logger(),
        failed=lambda *_: None,
    )
    follower.start()
    inbox.wait_synced()
    follower.stop()
    assert [name for kind, name in inbox.table if kind == "Service"] == ["default/theirs"]


# --- changes ------------------------------------------------------------------------------------


def test_changes(run: Run) -> None:
    server = run.server
    server.put(service_document("new", cluster_ips=["10.96.2.1"]))
    server.put(slice_document("web-0", [endpoint("10.244.1.99")]))
    server.delete("Service", "web-1")
    server.delete("EndpointSlice", "web-1-ipv4")
    run.check()
    key = ("EndpointSlice", "default/web-0-ipv4")
    run.inbox.wait(lambda: run.inbox.table[key].endpoints.addresses[-1] == 99)  # type: ignore[union-attr]


def test_a_label_makes_a_service_foreign(run: Run) -> None:
    document = service_document("web-0")
    document["metadata"]["labels"] = {"service.kubernetes.io/service-proxy-name": "other"}
    run.server.put(document)
    run.inbox.wait(lambda: not run.inbox.has("Service", "default/web-0"))


def test_a_burst_arrives_whole(run: Run) -> None:
    documents = [service_document(f"burst-{n}") for n in range(300)]
    run.server.put(*documents)
    run.check()


# --- faults -------------------------------------------------------------------------------------


def test_steady_changes_are_read_at_a_pace(server: ApiServer) -> None:
    """What arrives behind the burst stays unread for the interval, which stopping ends."""
    with Run(server, timing=FAST._replace(pace=(3600.0, 3))) as run:
        run.inbox.wait_synced()
        server.wait_for(lambda: server.watching(*RESOURCES))
        run.reaches("first")  # behind the list
        run.reaches("second")
        server.put(service_document("third", cluster_ips=["10.96.9.9"]))
        server.put(slice_document("third", []))
        run.inbox.wait(lambda: run.inbox.has("EndpointSlice", "default/third-ipv4"))
        assert not run.inbox.has("Service", "default/third")
        run.follower.stop()
    assert not run.failed


def test_a_watch_cut_in_the_middle_of_a_line(run: Run) -> None:
    run.server.cut_next("services")
    run.reaches("cut")
    run.reaches("after")
    run.check()
    assert not run.capture.entries
    assert sum(len(e) for e in run.inbox.lists) == len(run.inbox.table) + 1  # nothing twice


def test_the_end_of_a_watch(run: Run) -> None:
    server = run.server
    run.reaches("before")
    before = len(server.seen)
    server.end_watches("services")
    run.reaches("after")
    (again,) = server.seen[before:]
    assert again.verb == "watch"
    assert "resourceVersion" in again.query


@pytest.mark.parametrize("code", [500, 503])
def test_errors_for_a_time(run: Run, code: int) -> None:
    server = run.server
    server.answer(code)
    server.abort()
    entry = run.wait_logged(AWAY)
    assert entry["reason"].startswith(f"it answers {code}")
    server.put(service_document("meanwhile"))
    server.delete("Service", "web-3")
    server.heal()
    run.check()
    run.wait_logged(BACK)
    assert len(run.logged(AWAY, BACK)) == 2


def test_a_busy_server_is_waited_for_as_it_asks(run: Run) -> None:
    server = run.server
    before = len(server.seen)
    server.answer(429, resource="services", times=1, retry_after=1)
    server.abort()
    run.wait_logged("api_server_busy")
    refused = time.monotonic()
    run.reaches("meanwhile")
    assert time.monotonic() - refused > 0.9
    assert len([s for s in server.seen[before:] if s.resource == "services"]) <= 4


def test_a_half_open_connection(run: Run) -> None:
    run.server.mute("services")
    run.reaches("unheard")
    entry = run.wait_logged("connection_silent")
    assert entry["resource"] == "services"
    run.check()


def test_a_server_that_accepts_and_says_nothing(run: Run) -> None:
    run.server.silence()
    run.server.abort()
    assert run.wait_logged(AWAY)["reason"] == "no answer in time"
    run.server.delete("Service", "web-2")
    run.server.heal()
    run.check()
    run.wait_logged(BACK)


@pytest.mark.parametrize("as_status", [True, False])
def test_410(run: Run, as_status: bool) -> None:
    server = run.server
    server.gone_as_status = as_status
    server.down()
    server.delete("Service", "web-4")
    server.delete("EndpointSlice", "web-4-ipv4")
    server.put(service_document("meanwhile"))
    server.put(service_document("web-5", cluster_ips=["10.96.7.7"]))
    server.compact()
    before = len(run.inbox.lists)
    server.up()
    run.check()
    news = [e for events in run.inbox.lists[before:] for e in events]
    assert len(news) == 4
    relists = {s.resource: s.relists for s in run.follower.status()}
    assert relists["services"] == relists["endpointslices"] == 1


def test_deletions_while_away_without_compaction(run: Run) -> None:
    server = run.server
    server.down()
    server.delete("Service", "web-4")
    server.up()
    run.check()
    assert all(s.relists == 0 for s in run.follower.status())


def test_a_connection_closed_in_the_middle_of_a_list(server: ApiServer) -> None:
    server.streaming = False
    server.close_in_list(times=3, resource="endpointslices")
    with Run(server) as run:
        run.inbox.wait_synced()
        run.check()


def test_410_to_a_list(server: ApiServer) -> None:
    server.streaming = False
    server.answer(410, times=1, resource="services", verb="list")
    with Run(server) as run:
        run.inbox.wait_synced()
        run.check()


def test_a_server_restored_from_a_backup(run: Run) -> None:
    server = run.server
    backup = server.backup()
    server.put(*(service_document(f"lost-{n}") for n in range(20)))
    server.put(service_document("web-0", cluster_ips=["10.96.8.8"]))
    run.check()
    server.wait_for(lambda: server.watching("services"))
    server.restore(backup)
    run.check()
    key = ("Service", "default/web-0")
    run.inbox.wait(lambda: run.inbox.table[key].cluster_ips[0][-1] == 1)  # type: ignore[union-attr]
    run.reaches("after")


def test_an_object_that_does_not_decode(run: Run) -> None:
    broken = service_document("web-0")
    broken["spec"]["ports"] = "none"
    run.server.put(broken)
    run.reaches("after")
    assert run.inbox.has("Service", "default/web-0")
    (entry,) = run.logged(UNUSABLE)
    assert entry["object"] == "Service default/web-0"
    assert ("protobuf message" if run.server.protobuf else "ports") in entry["reason"]
    run.server.compact()
    run.server.abort()
    run.reaches("later")
    assert len(run.logged(UNUSABLE)) == 1


def test_a_failure_of_our_own(run: Run) -> None:
    run.inbox.fails = 1
    run.server.put(service_document("unlucky"))
    run.wait_logged("follow_failed")
    run.check()


@pytest.mark.parametrize("streaming", [True, False])
def test_deeply_nested_fields_cost_nothing(server: ApiServer, streaming: bool) -> None:
    """The API server stores managedFields nested 1,500 deep; on old code all updates stopped."""
    nested = msgspec.Raw(b'{"f:a":' * 1500 + b"{}" + b"}" * 1500)
    hostile = service_document("hostile")
    hostile["metadata"]["managedFields"] = [{"manager": "kubectl", "fieldsV1": nested}]
    server.streaming = streaming
    server.put(hostile)
    with Run(server) as run:
        run.inbox.wait_synced()
        run.check()
        server.wait_for(lambda: server.watching(*RESOURCES))
        server.put({**hostile, "metadata": {**hostile["metadata"], "name": "hostile-2"}})
        run.reaches("after")
        run.check()
        assert not run.capture.entries


@pytest.mark.parametrize("bad", ["ends", "garbage", "bookmark"])
def test_watches_that_bring_nothing_are_replaced_by_lists(run: Run, bad: str) -> None:
    """Each change arrives, requests become rare, there is one line, and one at the recovery."""
    server = run.server
    server.spoil_watches("services", bad)
    run.reaches("unwatched")
    run.wait_logged(WATCH_FAILED)
    before, began = len(server.seen), time.monotonic()
    run.reaches("unwatched-2")
    requests = [s for s in server.seen[before:] if s.resource == "services"]
    # as many as fit between delays whose mean is half of the longest one
    longest = FAST.backoff[1]
    assert len(requests) <= 3 * (3 + (time.monotonic() - began) / longest * 2 * 3)
    assert len(run.logged(WATCH_FAILED)) == 1
    server.heal()
    server.wait_for(lambda: server.watching(*RESOURCES))
    run.reaches("watched")
    (entry,) = [run.wait_logged(BACK)]
    assert entry["was"] == WATCH_FAILED
    run.check()
    assert len(run.logged(WATCH_FAILED, BACK)) == 2


def test_a_stream_is_tried_again_after_lists_that_fail(server: ApiServer) -> None:
    """On old code one broken stream led to lists, and failing lists never led back."""
    server.spoil_watches("services", "garbage")
    server.answer(500, resource="services", verb="list")
    with Run(server) as run:
        server.wait_for(lambda: [s for s in server.seen if s.verb == "list"])
        server.spoil_watches("services", "")
        run.inbox.wait_synced()
        run.check()


def test_an_event_that_is_too_large_costs_one_list(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = run.server
    monkeypatch.setattr(formats, "MAX_EVENT_BYTES", 20_000)
    large = service_document("large")
    large["metadata"]["annotations"] = {"a": "x" * 30_000}
    server.put(large)
    run.inbox.wait(lambda: run.inbox.has("Service", "default/large"))
    entry = run.wait_logged(WATCH_FAILED)
    assert "an event of more than" in entry["reason"]
    run.reaches("after")
    run.check()
    assert [s.verb for s in server.seen if s.resource == "services"].count("list") <= 5
    assert len(run.logged(WATCH_FAILED)) == 1
    run.wait_logged(BACK)


def test_a_slice_without_the_service_label_is_ordinary(run: Run) -> None:
    document = slice_document("web-0", [endpoint("10.244.1.1")])
    document["metadata"]["labels"] = {}
    run.server.put(document)
    key = ("EndpointSlice", "default/web-0-ipv4")
    run.inbox.wait(lambda: run.inbox.table[key].service is None)  # type: ignore[union-attr]
    assert not run.capture.entries


@pytest.mark.parametrize("code", [406, 415])
def test_json_where_a_server_refuses_protobuf(server: ApiServer, code: int) -> None:
    server.protobuf = code
    with Run(server) as run:
        run.inbox.wait_synced()
        server.wait_for(lambda: server.watching(*RESOURCES))
        run.reaches("after")
        assert not run.capture.entries
        assert {s.accept for s in server.seen if s.verb == "watch"} >= {"application/json"}


def test_a_thread_that_dies_is_reported(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a log line cannot be written: on old code the others went on as if all were well."""

    class Full:
        def bind(self, **_: object) -> Full:
            return self

        def __getattr__(self, _: str) -> Callable[..., None]:
            def full(*_: object, **_fields: object) -> None:
                raise OSError(28, "No space left on device")

            return full

    run = Run(server)
    for worker in run.follower._workers:
        worker._log = Full()  # type: ignore[assignment]
    with run:
        run.inbox.wait_synced()
        run.inbox.fails = 1
        server.put(service_document("unlucky"))
        deadline = time.monotonic() + PATIENCE
        while not run.failed:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    ((name, error),) = run.failed
    assert name == "follow services"
    assert "No space left" in str(error)


def test_where_the_api_server_is(run: Run) -> None:
    port = int(run.server.url.rpartition(":")[2])
    assert run.inbox.api_servers == {(b"\x7f\0\0\1", port)}
    named = connect(server=f"https://localhost:{port}")
    assert (b"\x7f\0\0\1", port) in named.endpoints()
    assert connect(server="https://nowhere.invalid").endpoints() == frozenset()
    plain = connect(server="https://[fd00::1]/prefix")
    assert plain.endpoints() == {(socket.inet_pton(socket.AF_INET6, "fd00::1"), 443)}


def test_where_the_api_server_is_comes_before_its_objects(server: ApiServer) -> None:
    """Else an external IP equal to its address would be programmed until the name is resolved."""
    order: list[list[Event]] = []
    follower = ClusterFollower(
        connect(server=server.url),
        "node-1",
        "",
        order.append,
        structlog.get_logger(),
        failed=lambda *_: None,
    )
    follower.start()
    server.wait_for(lambda: server.watching(*RESOURCES))
    follower.stop()
    assert isinstance(order[0][0], ApiServers)
    assert sum(isinstance(e, ApiServers) for events in order for e in events) == 1


def test_addresses_stay_where_a_name_is_not_resolved_any_more(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = connect(server=server.url)
    known = connection.endpoints()
    assert known
    connection.server = "https://nowhere.invalid"
    monkeypatch.setattr("agent.sources.kubernetes.connection.RELOAD_SECONDS", 0.0)
    assert connection.endpoints() == known


# --- who we are ---------------------------------------------------------------------------------


def test_401(server: ApiServer) -> None:
    server.token = "other"
    with Run(server) as run:
        event = "api_server_unauthorized"
        entry = run.wait_logged(event)
        assert entry["credentials"] == "no credentials"
        server.token = ""
        run.inbox.wait_synced()
        run.check()
        run.wait_logged(BACK)
    assert len(run.logged(event)) == 1


@pytest.mark.parametrize("verb", ["list", "watch"])
def test_403_names_the_missing_rule(server: ApiServer, verb: str) -> None:
    server.streaming = False
    server.forbidden.add((verb, "endpointslices"))
    if verb == "watch":
        server.streaming = True
    with Run(server) as run:
        event = "api_server_forbidden"
        entry = run.wait_logged(event)
        assert (entry["verb"], entry["resource"]) == (verb, "endpointslices.discovery.k8s.io")
        assert entry["advice"] == (
            'add this rule to the agent\'s ClusterRole: - {apiGroups: ["discovery.k8s.io"], '
            'resources: ["endpointslices"], verbs: ["list", "watch"]}'
        )
        assert "system:serviceaccount" in entry["answer"]
        assert not run.inbox.synced
        server.heal()
        run.inbox.wait_synced()
        run.check()
        run.wait_logged(BACK)
    assert len(run.logged(event)) == 1


def kubeconfig(place: Path, server: str, user: dict[str, Any]) -> Path:
    file = place / "kubeconfig"
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": server}}],
        "users": [{"name": "u", "user": user}],
    }
    file.write_text(yaml.safe_dump(document))
    return file


def plugin(place: Path, script: str) -> dict[str, Any]:
    file = place / "plugin"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    api_version = "client.authentication.k8s.io/v1"
    return {"exec": {"apiVersion": api_version, "command": str(file), "interactiveMode": "Never"}}


def test_a_token_file_that_is_rotated(server: ApiServer, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("first")
    server.token = "first"
    file = kubeconfig(tmp_path, server.url, {"tokenFile": str(token)})
    with Run(server, connection=connect(str(file))) as run:
        run.inbox.wait_synced()
        token.write_text("second")
        server.token = "second"
        server.abort()
        run.reaches("after")
        assert not run.capture.entries


def test_an_exec_plugin(server: ApiServer, tmp_path: Path) -> None:
    server.token = "made-1"
    count = tmp_path / "count"
    script = (
        f'echo run >> {count}; n=$(wc -l < {count}); echo \'{{"kind": "ExecCredential", '
        '"apiVersion": "client.authentication.k8s.io/v1", "status": {"token": "made-\'$n\'"}}\''
    )
    file = kubeconfig(tmp_path, server.url, plugin(tmp_path, script))
    with Run(server, connection=connect(str(file))) as run:
        run.inbox.wait_synced()
        server.wait_for(lambda: server.watching(*RESOURCES))
        server.token = "made-2"
        server.end_watches("services")
        run.reaches("after")


def test_a_service_account(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kubernetes.config import incluster_config

    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    for name in ("token", "ca.crt"):
        (tmp_path / name).write_text(f"{name}\n")
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    plain = connect()
    assert plain.server == "https://10.96.0.1:443"
    assert plain.at_service_address
    with Run(server, connection=connect(server=server.url)) as run:
        run.inbox.wait_synced()
    assert {s.authorization for s in server.seen} == {"bearer token"}


def test_no_api_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConnectError, match="give --kubeconfig FILE"):
        connect()
    with pytest.raises(ConnectError, match="nowhere: no such file"):
        connect("/nowhere")
    with pytest.raises(ConnectError, match="--context x needs a kubeconfig"):
        connect(context="x")
    with pytest.raises(ConnectError, match="write it like https://"):
        connect(server="10.0.0.1:6443")
    file = kubeconfig(tmp_path, "http://127.0.0.1:1", {})
    with pytest.raises(ConnectError, match=r"context there: .*there"):
        connect(str(file), "there")
    file.write_text("nonsense: [")
    with pytest.raises(ConnectError, match=str(file)):
        connect(str(file))
    file = kubeconfig(tmp_path, "http://x", plugin(tmp_path, "echo no luck >&2; exit 3"))
    with pytest.raises(ConnectError, match=r"process returned 3\. no luck"):
        connect(str(file))


def test_the_order_of_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".kube").mkdir()
    file = kubeconfig(tmp_path, "http://home", {})
    file.rename(tmp_path / ".kube" / "config")
    assert connect().server == "http://home"
    file = kubeconfig(tmp_path, "http://environment", {})
    monkeypatch.setenv("KUBECONFIG", str(file))
    assert connect().server == "http://environment"
    (tmp_path / "explicit").mkdir()
    explicit = kubeconfig(tmp_path / "explicit", "http://explicit", {"token": "t"})
    assert connect(str(explicit)).server == "http://explicit"
    assert connect(str(explicit), "here").server == "http://explicit"
    assert connect(str(explicit), server="http://override/").server == "http://override"


def certificate(place: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    file, key = place / "server.crt", place / "server.key"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=test",
    ]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(file)]
    subprocess.run(command, check=True, capture_output=True)
    return file, key


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl to make a certificate")
def test_tls(tmp_path: Path) -> None:
    file, key = certificate(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(file, key)
    with ApiServer(tls=tls) as server:
        fill(server)
        server.token = "t"
        config = kubeconfig(tmp_path, server.url, {"token": "t"})
        with Run(server, connection=connect(str(config))) as run:
            assert run.wait_logged(AWAY)["reason"] == "CERTIFICATE_VERIFY_FAILED"
        document = yaml.safe_load(config.read_text())
        document["clusters"][0]["cluster"]["insecure-skip-tls-verify"] = True
        config.write_text(yaml.safe_dump(document))
        with warnings.catch_warnings(record=True) as raw:
            with Run(server, connection=connect(str(config))) as run:
                run.inbox.wait_synced()
            assert len(run.logged("tls_not_verified")) == 1
        assert not raw
        del document["clusters"][0]["cluster"]["insecure-skip-tls-verify"]
        document["clusters"][0]["cluster"]["certificate-authority"] = "server.crt"
        config.write_text(yaml.safe_dump(document))
        with Run(server, connection=connect(str(config))) as run:
            run.inbox.wait_synced()
            server.wait_for(lambda: server.watching(*RESOURCES))
            server.put(*(service_document(f"burst-{n}") for n in range(100)))
            run.check()
            server.cut_next("services")
            run.reaches("cut")
            stopped_in_time(run)
            assert not run.capture.entries


# --- stopping and status ------------------------------------------------------------------------


def stopped_in_time(run: Run) -> None:
    before = len(run.inbox.lists)
    started = time.monotonic()
    run.follower.stop()
    assert time.monotonic() - started < 1.0
    run.follower.stop()
    run.server.heal()
    run.server.put(service_document("too-late"))
    assert len(run.inbox.lists) == before


def test_stop_while_watching(run: Run) -> None:
    stopped_in_time(run)
    assert {s.state for s in run.follower.status()} == {"stopped"}


def test_stop_while_backing_off(server: ApiServer) -> None:
    server.answer(500)
    with Run(server, timing=FAST._replace(backoff=(1000.0, 1000.0))) as run:
        run.wait_logged(AWAY)
        stopped_in_time(run)


def test_stop_while_nothing_is_answered(server: ApiServer) -> None:
    server.silence()
    with Run(server, timing=Timing()) as run:
        server.wait_for(lambda: len(server.seen) == len(RESOURCES))
        stopped_in_time(run)


def test_stop_while_a_stream_is_silent(run: Run) -> None:
    run.server.silence()
    stopped_in_time(run)


def test_stop_before_start(server: ApiServer) -> None:
    stopped_in_time(Run(server))


def test_status(run: Run) -> None:
    by_name = {s.resource: s for s in run.follower.status()}
    services = by_name["services"]
    assert tuple(by_name) == RESOURCES
    assert services.state == "watching"
    assert (services.objects, services.complete) == (7, True)
    assert (services.relists, services.errors) == (0, 0)
    assert int(services.resource_version) > 0
    assert services.last_message is not None
    assert max(services.since, services.last_message) <= time.monotonic()
    assert services.last_valid is not None
    run.server.answer(500)
    run.server.abort()
    run.wait_logged(AWAY)
    assert any(s.errors for s in run.follower.status())
    # answers that show nothing of the current state are messages and not valid ones
    valid = {s.resource: s.last_valid for s in run.follower.status()}
    before = len(run.server.seen)
    run.server.wait_for(lambda: len(run.server.seen) > before + 10)
    assert {s.resource: s.last_valid for s in run.follower.status()} == valid
    run.server.heal()
    run.reaches("after")
    status = {s.resource: s for s in run.follower.status()}["services"]
    assert status.last_valid is not None
    assert status.last_valid > (valid["services"] or 0)


# --- size ---------------------------------------------------------------------------------------

MEASURED = """
import re, sys, threading, time
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
import structlog
from rules.events import ApiServers, Synced
from agent.sources.kubernetes.connection import connect
from agent.sources.kubernetes.follower import ClusterFollower
before, began = peak(), time.perf_counter()
connection = connect(server=sys.argv[1])
connected, loaded = peak(), time.perf_counter()
synced, kept = threading.Event(), []
def put(events):
    kept.extend(e for e in events if not isinstance(e, ApiServers))
    if isinstance(events[-1], Synced):
        synced.set()
follower = ClusterFollower(
    connection, "node-1", "", put, structlog.get_logger(), failed=lambda *_: None)
follower.start()
assert synced.wait(60)
done = time.perf_counter()
follower.stop()
print(f"{len(kept)} events; client loaded in {loaded - began:.2f} s, {connected - before:.0f} MB;"
      f" followed in {done - loaded:.2f} s, peak {peak():.0f} MB")
"""


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("protobuf", [True, False])
def test_five_thousand_services(
    streaming: bool, protobuf: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with ApiServer(streaming=streaming) as server:
        server.protobuf = protobuf
        for n in range(5000):
            name, octets = f"web-{n}", f"{n >> 8}.{n & 255}"
            server.put(
                service_document(name, cluster_ips=[f"10.96.{octets}"]),
                slice_document(name, [endpoint(f"10.{e}.{octets}") for e in range(1, 11)]),
            )
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, server.url],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parents[2],
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("10001 events")
    with capsys.disabled():
        way, encoding = "streamed" if streaming else "paged", "protobuf" if protobuf else "JSON"
        print(f"\n{way}, {encoding}: {done.stdout.strip()}")


def test_importing_is_cheap() -> None:
    code = (
        "import sys, json; import agent.sources.kubernetes.follower;"
        "print(json.dumps([m for m in sys.modules if m.split('.')[0] == 'kubernetes']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert json.loads(done.stdout) == []
    assert kubernetes.__name__ == "agent.sources.kubernetes.follower"
