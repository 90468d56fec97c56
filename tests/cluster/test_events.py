"""Problems become Kubernetes Events on their objects, over HTTP, at the API server of tests."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
import structlog

from agent.sources.kubernetes.connection import connect
from agent.sources.kubernetes.event_poster import (
    QUEUED,
    REPEAT_SECONDS,
    EventPoster,
    PostTiming,
    event_of,
)
from lab.world import World
from rules.problems import ADDRESS_CONFLICT, NODE_UNKNOWN, Problem, Subject
from tests.cluster.apiserver import ApiServer
from tests.cluster.cluster import FabricServer, cidr_document, node_document
from tests.kernel.agent import Agent
from tests.manifest import service_document

PATIENCE = 20.0
AT_ONCE = PostTiming(burst=1000, interval=0.001, spread=0.0)
WEB = Problem(ADDRESS_CONFLICT, Subject("Service", "shop/web", "shop/web"), "10.0.0.1:80 is taken")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def created(server: ApiServer) -> int:
    """How often the server was asked to create an Event."""
    return sum(seen.verb == "create" for seen in server.seen)


class Posting:
    """A poster with a server. `lines` are what it logs, above debug unless `debug`."""

    def __init__(self, server: ApiServer, timing: PostTiming) -> None:
        self.server = server
        self.clock = Clock()
        self.lines: list[dict[str, Any]] = []
        self.failed: list[Exception] = []
        self.requests: list[tuple[str, int | str]] = []
        log = structlog.wrap_logger(
            structlog.PrintLogger(), processors=[self._take], wrapper_class=structlog.BoundLogger
        )
        self.poster = EventPoster(
            connect(server=server.url),
            "node-1",
            log,
            lambda _, error: self.failed.append(error),
            requested=lambda method, code, *_: self.requests.append((method, code)),
            timing=timing,
            clock=self.clock,
        )

    def _take(self, _logger: object, level: str, event: dict[str, Any]) -> str:
        self.lines.append({"level": level, **event})
        return ""

    def post(self, *problems: Problem) -> None:
        """Posts, and waits until the server has been asked as often as there are problems."""
        before = created(self.server)
        self.poster.opened(problems)
        self.server.wait_for(lambda: created(self.server) >= before + len(problems))


@contextmanager
def posting(server: ApiServer, timing: PostTiming = AT_ONCE) -> Iterator[Posting]:
    started = Posting(server, timing)
    started.poster.start()
    try:
        yield started
    finally:
        assert started.poster.stop(PATIENCE)
        assert not started.failed


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as running:
        yield running


def other(number: int) -> Problem:
    name = f"shop/web-{number}"
    return Problem(ADDRESS_CONFLICT, Subject("Service", name, name), "10.0.0.1:80 is taken")


def test_a_problem_is_an_event_on_its_object(server: ApiServer) -> None:
    with posting(server) as to:
        to.post(WEB)
    (event,) = server.events.values()
    assert event["metadata"]["namespace"] == "shop"
    assert event["regarding"] == {
        **{"kind": "Service", "namespace": "shop", "name": "web", "apiVersion": "v1"},
    }
    assert (event["type"], event["reason"], event["note"]) == (
        *("Warning", "AddressConflict", WEB.text),
    )
    assert event["reportingInstance"] == "sliceproxy-node-1"


def found_by_describe(server: ApiServer, document: dict[str, Any]) -> list[str]:
    """The reasons of the Events that `kubectl describe` prints: those whose name, namespace, kind
    and UID are the object's (GetFieldSelector in client-go's events client)."""
    metadata = document["metadata"]
    wanted = {
        "name": metadata["name"],
        "namespace": metadata.get("namespace"),
        "kind": document["kind"],
        "uid": metadata["uid"],
    }
    return [
        event["reason"]
        for event in server.events.values()
        if {key: event["regarding"].get(key) for key in wanted} == wanted
    ]


def with_uid(document: dict[str, Any], uid: str) -> dict[str, Any]:
    document["metadata"]["uid"] = uid
    return document


def test_kubectl_describe_finds_the_events_by_the_objects_uid(server: ApiServer) -> None:
    """Of a Service and of a Node; another namespace's Service of that name has none."""
    web = with_uid(service_document("web", namespace="shop"), "uid-of-shop-web")
    twin = with_uid(service_document("web", namespace="other"), "uid-of-other-web")
    node = with_uid(node_document(), "uid-of-node-1")
    server.put(web, twin, node)
    with posting(server) as to:
        to.post(WEB, Problem(NODE_UNKNOWN, Subject("Node", "node-1"), "x"))
    assert found_by_describe(server, web) == ["AddressConflict"]
    assert found_by_describe(server, node) == ["NodeUnknown"]
    assert found_by_describe(server, twin) == []


def test_an_object_is_asked_for_with_the_rights_to_list_it(server: ApiServer) -> None:
    """One list of one object for each Event, so posting needs no right but to create Events. An
    object that cannot be listed, or does not exist, has an Event without a UID."""
    server.put(with_uid(service_document("web", namespace="shop"), "u"))
    with posting(server) as to:
        to.post(WEB)
    assert to.requests == [("GET", 200), ("POST", 201)]  # as the metrics of requests have them
    assert [(seen.verb, seen.resource) for seen in server.seen] == [
        *(("list", "services"), ("create", "events")),
    ]
    server.forbidden.add(("list", "services"))
    with posting(server) as to:
        to.post(other(1))
    events = [event["regarding"].get("uid") for event in server.events.values()]
    assert events == ["u", None]


def test_an_event_about_a_node_is_in_the_namespace_default(server: ApiServer) -> None:
    node = Problem(NODE_UNKNOWN, Subject("Node", "node-1"), "no such Node")
    with posting(server) as to:
        to.post(node)
    ((namespace, _),) = server.events
    assert namespace == "default"


def test_nodes_that_find_the_same_problem_make_one_event(server: ApiServer) -> None:
    """The second is answered 409, which is no error."""
    for _ in range(2):
        with posting(server) as to:
            to.post(WEB)
        assert to.lines == []
    assert len(server.events) == 1
    assert created(server) == 2


def test_a_problem_that_opens_again_is_posted_again_only_after_an_hour(server: ApiServer) -> None:
    with posting(server) as to:
        to.post(WEB)
        to.poster.opened([WEB])
        to.post(other(1))  # in order: the server has been asked twice, not three times
        assert created(server) == 2
        to.clock.now += REPEAT_SECONDS
        to.post(WEB)


def test_longest_names_and_texts_are_valid(server: ApiServer) -> None:
    name = f"{'n' * 63}/{'s' * 63}"
    long = Problem(ADDRESS_CONFLICT, Subject("Service", name, name), "ä" * 2000)
    node = Problem(NODE_UNKNOWN, Subject("Node", "a." * 126 + "b"), "x")
    with posting(server) as to:
        to.post(long, node)
    assert len(server.events) == 2


def test_forbidden_is_one_line_and_then_silence(server: ApiServer) -> None:
    server.forbidden.add(("create", "events"))
    with posting(server) as to:
        to.post(WEB)
        while to.poster.alive:
            time.sleep(0.01)
        to.poster.opened([other(1)])
    (line,) = to.lines
    assert (line["level"], line["event"]) == ("warning", "events_forbidden")
    assert 'cannot create resource "events"' in line["answer"]
    assert created(server) == 1


def test_a_namespace_that_is_deleted_silences_no_others(server: ApiServer) -> None:
    server.terminating.add("shop")
    elsewhere = Problem(ADDRESS_CONFLICT, Subject("Service", "a/b", "a/b"), "x")
    with posting(server) as to:
        to.post(WEB, elsewhere)
    assert [line["level"] for line in to.lines] == ["debug"]
    assert [namespace for namespace, _ in server.events] == ["a"]


def test_errors_and_a_server_that_is_away_are_debug_lines(server: ApiServer) -> None:
    server.answer(500, times=1, resource="events", verb="create")
    server.down()
    with posting(server) as to:
        to.poster.opened([other(0)])
        while not to.lines:
            time.sleep(0.01)
        server.up()
        to.post(other(1), other(2))
    assert len(to.lines) == 2
    assert {line["level"] for line in to.lines} == {"debug"}
    assert len(server.events) == 1


def test_so_many_at_once_and_then_one_for_each_interval(server: ApiServer) -> None:
    with posting(server, PostTiming(burst=3, interval=0.05, spread=0.0)) as to:
        to.poster.opened([other(number) for number in range(10)])
        server.wait_for(lambda: created(server) == 3)
        to.clock.now += 0.05
        server.wait_for(lambda: created(server) == 4)
        assert len(server.events) == 4


def test_what_waits_is_bounded_and_the_caller_never_waits(server: ApiServer) -> None:
    to = Posting(server, AT_ONCE)  # not started: nothing is taken from the queue
    done = threading.Event()

    def many() -> None:
        to.poster.opened([other(number) for number in range(10 * QUEUED)])
        done.set()

    threading.Thread(target=many, daemon=True).start()
    assert done.wait(PATIENCE)
    to.poster.start()
    server.wait_for(lambda: created(server) == QUEUED)
    assert to.poster.stop(PATIENCE)
    assert created(server) == QUEUED


def test_stopping_does_not_wait_for_the_pace(server: ApiServer) -> None:
    with posting(server, PostTiming(burst=1, interval=1e6, spread=0.0)) as to:
        to.post(WEB)
        to.poster.opened([other(1)])


def test_the_name_depends_on_object_and_problem_alone() -> None:
    now = datetime.now(UTC)

    def name(problem: Problem, node: str, uid: str = "1") -> str:
        return str(event_of(problem, uid, node, now)["metadata"]["name"])

    assert name(WEB, "a") == name(WEB, "b")
    assert name(WEB, "a") != name(Problem("other", WEB.subject, WEB.text), "a")
    assert name(WEB, "a") != name(WEB, "a", uid="2")  # the Service was deleted and made again


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces")
@pytest.mark.parametrize("allowed", [True, False])
def test_the_agent_posts_what_it_logs(
    allowed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Two Services want one external address; without the right there is one line more."""
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    both = {"externalIPs": ["203.0.113.1"]}
    with (
        World(pods=1, remotes=0, prefix="sliceproxy-events") as world,
        FabricServer(world) as server,
    ):
        if not allowed:
            server.forbidden.add(("create", "events"))
        server.put(
            node_document(),
            cidr_document("10.96.0.0/16"),
            service_document("web", cluster_ips=["10.96.0.10"], **both),
            service_document("shop", cluster_ips=["10.96.0.20"], **both),
        )
        with Agent(world, None, "--server", server.url, "--post-events") as agent:
            line = agent.wait("address_conflict")
            if allowed:
                server.wait_for(lambda: server.events)
                (event,) = server.events.values()
                assert f"default/{event['regarding']['name']}" == line["service"]
                assert event["note"] == line["problem"]
            else:
                agent.wait("events_forbidden")
            assert agent.terminate() == 0
