"""The loop against a FakeKernel: what is programmed when, and every way in which that can fail.

Messages are queued before `run`, with `Stop` as the last one where nothing else ends it; the loop
takes all that is queued at once, so tests that need several turns feed it from its own reports.
"""

from __future__ import annotations

import errno
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytest

from agent import loop as subject
from agent.kernel.conntrack import Conntrack
from agent.kernel.errors import KernelError, Refused, Stale
from agent.loop import Connections, Disturbed, Failed, Loop, Reports, Stop, WorkerFailed
from agent.serve.health import Heartbeat
from agent.serve.metrics import Recorder
from rules.events import Delete, Event, NodeAddresses, Synced, Upsert
from rules.health_check import HealthCheck
from rules.language import Set, Table
from rules.objects import EndpointSlice, Name, Service
from rules.options import Options
from rules.state import State
from rules.tables import FAMILIES, SETS
from rules.text import Element
from tests.manifest import endpoint, endpoint_slice, node, service
from tests.unit.fakes.kernel import FakeKernel, FakeNetfilter
from tests.unit.test_health import log

ADDRESSES = NodeAddresses(frozenset(), ())
VIP = bytes([10, 96, 0, 10])


class NoFlows(Conntrack):
    """No connection tracking: tests would change the machine's."""

    def __init__(self) -> None:
        pass

    def close(self) -> None:
        pass

    def forget(self, *_: object, **__: object) -> dict[int, int]:
        return {}


class Seen(Recorder):
    """Keeps the names of what was reported, and calls `then` after each programming."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.then: list[Callable[[], None]] = []
        self.owned: Mapping[int, bool] = {}

    def tables_changed(self, tables: Iterable[Table], owned: Mapping[int, bool]) -> None:
        self.owned = owned

    def programmed(self, *_: object, **__: object) -> None:
        self.calls.append("programmed")
        if self.then:
            self.then.pop(0)()

    def failed(self) -> None:
        self.calls.append("failed")

    def repaired(self) -> None:
        self.calls.append("repaired")


class Node:
    """A loop on a FakeKernel, and all that it reports."""

    def __init__(
        self, netfilter: FakeNetfilter | None = None, *, own: bool = True, **options: Any
    ) -> None:
        self.netfilter = netfilter or FakeNetfilter()
        self.kernel: FakeKernel = self.netfilter.connect(own=own)
        self.lines: list[dict[str, Any]] = []
        self.seen = Seen()
        self.heartbeat = Heartbeat()
        self.checks: list[Mapping[Name, HealthCheck]] = []
        self.state = State(Options(node="node-1"))
        self.loop = Loop(
            self.state,
            self.kernel,
            log(self.lines),
            reports=Reports(self.seen, self.heartbeat, lambda c: self.checks.append(dict(c))),
            connections=Connections(NoFlows, lambda: self.netfilter.connect(own=False)),
            **options,
        )

    def run(self, *messages: subject.Message) -> None:
        for message in messages:
            self.loop.put(message)
        self.loop.run()

    def then(self, *steps: subject.Message | Callable[[], None]) -> None:
        """What happens after the first, second ... programming: a message, or a call."""
        for step in steps:
            if callable(step):
                self.seen.then.append(step)
            else:
                self.seen.then.append(lambda message=step: self.loop.put(message))  # type: ignore[misc]

    def events(self) -> list[str]:
        return [line["event"] for line in self.lines]

    def check(self) -> None:
        """The kernel has all elements of the state and no others."""
        want = {s: e for s, e in self.state.elements().items() if e}
        assert self.netfilter.elements() == want


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(subject, "RETRY_SECONDS", (0.001,))
    monkeypatch.setattr(subject, "OWNER_POLL_SECONDS", 0.001)
    yield
    gc.unfreeze()
    gc.enable()


def web(*pods: int, **fields: Any) -> list[Event]:
    endpoints = [endpoint(f"10.244.1.{pod}") for pod in pods]
    return [
        Upsert(service(cluster_ips=["10.96.0.10"], **fields)),
        Upsert(endpoint_slice("web", endpoints)),
    ]


START: list[Event] = [ADDRESSES, *web(1, 2), Synced()]


# --- starts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [ADDRESSES, Synced()])
def test_nothing_is_programmed_before_lists_and_addresses_are_complete(missing: Event) -> None:
    """And SIGTERM ends it: it waits for messages alone."""
    node_ = Node()
    node_.run([e for e in START if e != missing], Stop())
    assert node_.netfilter.tables == {}
    assert node_.heartbeat.health().programmed_at is None


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_the_order_in_which_they_arrive_does_not_matter(order: tuple[int, ...]) -> None:
    parts: list[list[Event]] = [[ADDRESSES], web(1, 2), [Synced()]]
    node_ = Node()
    node_.then(Stop())
    node_.run(*(parts[i] for i in order))
    node_.check()
    assert node_.events() == ["programmed"]
    assert node_.heartbeat.health().not_ready == []


def test_all_that_is_queued_is_one_transaction() -> None:
    node_ = Node()
    node_.then([*web(1, 2, 3)], Stop())
    node_.run(START, web(1), web(1, 2, 3), web(1, 2))
    assert len(node_.netfilter.transactions) == 2
    node_.check()


def test_a_restart_writes_nothing_and_verifies() -> None:
    first = Node()
    first.then(Stop())
    first.run(START)
    first.kernel.close()
    second = Node(first.netfilter)
    second.then(Stop())
    second.run(START)
    assert second.events() == ["verified"]
    assert len(first.netfilter.transactions) == 1


def test_health_check_ports_are_reported_after_each_programming() -> None:
    fields: dict[str, Any] = {
        "type": "LoadBalancer",
        "externalTrafficPolicy": "Local",
        "healthCheckNodePort": 31000,
    }
    node_ = Node()
    node_.then([Upsert(endpoint_slice("web", []))], Stop())
    node_.run([ADDRESSES, *web(1, 2, **fields), Synced()])
    assert [c[Name("default", "web")].endpoints(4) for c in node_.checks] == [2, 0]


def test_a_node_that_is_unknown_is_not_eligible() -> None:
    """Once the lists are complete: before, it is only not known yet."""
    eligible = []
    node_ = Node(expects_node=True)

    def look(message: subject.Message) -> Callable[[], None]:
        def call() -> None:
            eligible.append(node_.heartbeat.health().eligible)
            node_.loop.put(message)

        return call

    node_.then(look([Upsert(node())]), look(Stop()))
    node_.run(START)
    assert eligible == [False, True]


def test_manifests_need_no_node() -> None:
    node_ = Node()
    node_.then(Stop())
    node_.run(START)
    assert node_.heartbeat.health().eligible


# --- changes ------------------------------------------------------------------------------------


def test_changes_reach_the_kernel_as_differences() -> None:
    node_ = Node()
    node_.then(web(2, 3), [Delete(Service, Name("default", "web"))], Stop())
    node_.run(START)
    node_.check()
    assert not node_.netfilter.elements()
    changes = [t.change for t in node_.netfilter.transactions[1:]]
    endpoints = SETS[4].endpoints
    assert [len(c.added.get(endpoints, ())) for c in changes] == [1, 0]
    assert [len(c.removed.get(endpoints, ())) for c in changes] == [1, 2]


def test_a_change_that_changes_nothing_is_no_transaction() -> None:
    node_ = Node()
    node_.then(web(1, 2), Stop())
    node_.run(START)
    assert node_.seen.calls == ["programmed", "programmed"]
    assert len(node_.netfilter.transactions) == 1
    assert node_.events() == ["programmed"]


# --- failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        Refused(errno.ENOMEM, "elements of endpoints"),
        Refused(errno.EOPNOTSUPP, "chain nat-prerouting"),
        Stale(errno.EIO, "sending a transaction"),
    ],
    ids=["no memory", "no module", "not sent"],
)
@pytest.mark.parametrize("times", [1, 3])
def test_a_refused_start_is_tried_again(error: KernelError, times: int) -> None:
    node_ = Node()
    node_.kernel.refuse(*[error] * times)
    node_.then(Stop())
    node_.run(START)
    assert node_.events() == ["programming_failed"] * times + [
        "programmed",
        "programming_recovered",
    ]
    assert node_.lines[0]["error"] == str(error)
    assert node_.seen.calls == ["failed"] * times + ["programmed"]
    assert node_.heartbeat.health().not_ready == []
    node_.check()


def test_a_refused_change_reads_everything_back() -> None:
    node_ = Node()
    node_.then(
        lambda: (node_.kernel.refuse(Refused(errno.ENOMEM, "x")), node_.loop.put(web(2, 3)))[0],
        Stop(),
    )
    node_.run(START)
    assert node_.events() == [
        "programmed",
        "programming_failed",
        "programmed",
        "programming_recovered",
    ]
    node_.check()
    endpoints = SETS[4].endpoints
    assert len(node_.netfilter.transactions[-1].change.added[endpoints]) == 1


def test_while_it_is_refused_the_node_is_unhealthy_in_time() -> None:
    now = [0.0]
    node_ = Node()
    heartbeat = Heartbeat(120, clock=lambda: now[0])
    node_.loop._heartbeat = heartbeat
    healthy = []

    class Late(Refused):
        def __str__(self) -> str:
            now[0] += 100
            healthy.append(heartbeat.health().healthy)
            return "late"

    node_.kernel.refuse(Late(errno.ENOMEM, "x"), Late(errno.ENOMEM, "x"))
    node_.then(Stop())
    node_.run(START)
    assert healthy == [True, False]
    assert heartbeat.health().healthy


def test_tables_that_cannot_be_read_are_tried_again() -> None:
    node_ = Node()
    node_.kernel.refuse(Refused(errno.EMFILE, "reading the tables"), reading=True)
    node_.then(Stop())
    node_.run(START)
    assert node_.events() == ["programming_failed", "programmed", "programming_recovered"]
    assert "open files" in node_.lines[0]["error"]


def test_a_change_of_another_process_that_the_kernel_reports_as_stale_is_repaired() -> None:
    """Only the difference is written, in the same turn."""
    node_ = Node()

    def disturb() -> None:
        node_.netfilter.tables[4].owner = None
        node_.netfilter.change(SETS[4].cluster_ips, VIP, delete=True)
        node_.loop.put([Delete(Service, Name("default", "web"))])

    node_.then(disturb, Stop())
    node_.run(START)
    assert node_.events() == ["programmed", "tables_changed", "programmed", "tables_repaired"]
    assert node_.seen.calls == ["programmed", "programmed", "repaired"]
    node_.check()


def test_who_owns_the_tables_is_reported_as_the_kernel_has_it() -> None:
    node_ = Node()
    node_.then(Stop())
    node_.run(START)
    assert node_.seen.owned == {4: True, 6: True}
    node_.netfilter.tables[4].owner = 0
    assert [node_.kernel.owns(family) for family in FAMILIES] == [False, True]


@pytest.mark.parametrize("damage", ["element added", "element deleted", "table deleted"])
def test_a_disturbance_is_repaired(damage: str) -> None:
    node_ = Node(FakeNetfilter(ownership=False), own=False)
    node_.kernel.table_flags = 1  # the Watcher of tables without owner needs the real kernel
    netfilter, cluster_ips = node_.netfilter, SETS[4].cluster_ips

    def disturb() -> None:
        node_.kernel.table_flags = 0
        netfilter.tables[4].owner = None
        if damage == "element added":
            netfilter.change(cluster_ips, bytes([10, 9, 9, 9]))
        elif damage == "element deleted":
            netfilter.change(cluster_ips, VIP, delete=True)
        else:
            netfilter.flush(4)
        node_.loop.put(Disturbed())

    node_.then(disturb, Stop())
    node_.run(START)
    assert node_.seen.calls == ["programmed", "programmed", "repaired"]
    node_.check()


def test_a_disturbance_that_left_the_tables_right_is_no_repair() -> None:
    node_ = Node()
    node_.then(Disturbed(), Stop())
    node_.run(START)
    assert node_.events() == ["programmed", "verified"]
    assert node_.seen.calls == ["programmed", "programmed"]


def test_it_waits_for_another_owner_with_one_line_and_takes_over() -> None:
    first = Node()
    first.then(Stop())
    first.run(START)
    second = Node(first.netfilter)
    looks = [0]
    take_over = second.kernel.take_over

    def looked() -> None:
        looks[0] += 1
        if looks[0] == 3:
            first.kernel.close()
        take_over()

    second.kernel.take_over = looked  # type: ignore[method-assign]
    second.then(Stop())
    second.run([ADDRESSES, *web(1, 2, 3), Synced()])
    assert second.events() == ["waiting_for_owner", "programmed", "programming_recovered"]
    assert looks == [3]
    second.check()


def test_a_map_that_is_full_is_recreated_with_its_table() -> None:
    """In one transaction, with room for what is wanted now."""
    many = [f"10.{octet}.{n >> 8}.{n & 255}" for octet in (200, 201) for n in range(4000)]

    def slices(count: int) -> list[Event]:
        return [
            Upsert(
                endpoint_slice(
                    "web",
                    [endpoint(a, node="node-2") for a in many[start : start + 1000]],
                    name=f"web-{start}",
                )
            )
            for start in range(0, count, 1000)
        ]

    node_ = Node()
    node_.then(slices(8000), Stop())
    node_.run([ADDRESSES, web()[0], *slices(5000), Synced()])
    assert node_.events() == ["programmed", "map_full", "programmed"]
    assert node_.lines[1]["map"] == "elements of endpoints"
    assert all(t.delete and t.create for t in node_.netfilter.transactions[-1].tables)
    node_.check()


def test_sticky_clients_of_a_removed_endpoint_are_forgotten() -> None:
    node_ = Node()
    affinity = SETS[4].affinity
    client = (
        bytes([10, 244, 1, 99]) + VIP + bytes([6, 0, 0, 0]) + (80).to_bytes(2, "big") + bytes(2)
    )
    gone = bytes([10, 244, 1, 1]) + (8080).to_bytes(2, "big") + bytes(2)

    def remember() -> None:
        node_.netfilter.tables[4].sets[affinity.name].elements[client] = gone
        node_.loop.put(web(2, sessionAffinity="ClientIP"))

    destroy = node_.kernel.destroy

    def destroyed(owner: Set, elements: Sequence[Element]) -> None:
        destroy(owner, elements)
        if elements and owner is affinity:
            node_.loop.put(Stop())

    node_.kernel.destroy = destroyed  # type: ignore[method-assign]
    node_.then(remember)
    node_.run([ADDRESSES, *web(1, 2, sessionAffinity="ClientIP"), Synced()])
    assert node_.seen.calls == ["programmed", "programmed"]
    assert "sticky_clients_forgotten" in node_.events()
    assert node_.kernel.elements(affinity) == {}


def test_a_dead_worker_ends_the_loop_and_is_named() -> None:
    node_ = Node()
    with pytest.raises(WorkerFailed, match="'health' failed: OSError"):
        node_.run(START, Failed("health", OSError("boom")))


def test_an_object_with_a_problem_is_a_warning_and_the_rest_is_programmed() -> None:
    node_ = Node()
    node_.then(Stop())
    bad = service("bad", cluster_ips=["10.96.0.11"], externalIPs=["not an address"])
    node_.run([*START[:-1], Upsert(bad), Synced()])
    assert [line["log_level"] for line in node_.lines] == ["warning", "info"]
    node_.check()


# --- memory -------------------------------------------------------------------------------------


def test_the_garbage_of_failed_attempts_is_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector is off for a load; a load that lasts is a wait, and its garbage is not kept."""
    monkeypatch.setattr(subject, "LOAD_SECONDS", 0.0)

    class Garbage:
        alive = 0

        def __init__(self) -> None:
            Garbage.alive += 1
            self.itself = self

        def __del__(self) -> None:
            Garbage.alive -= 1

    gc.disable()
    node_ = Node()
    node_.run([ADDRESSES], Stop())
    assert gc.isenabled()
    old = [Garbage() for _ in range(100)]
    gc.collect()  # into the oldest generation, which an ordinary collection leaves alone
    old.clear()
    node_ = Node()
    node_.then(Stop())
    node_.run(START)
    assert Garbage.alive == 0  # not frozen with the rest
    assert gc.get_freeze_count() > 0


def test_a_load_is_not_interrupted_by_the_collector() -> None:
    gc.disable()
    node_ = Node()
    on: list[bool] = []
    node_.then(lambda: (on.append(gc.isenabled()), node_.loop.put(Stop()))[0])
    node_.run(START)
    assert on == [False]
    assert gc.isenabled()


def test_slices_of_a_service_that_is_gone_are_harmless() -> None:
    node_ = Node()
    node_.then([Delete(EndpointSlice, Name("default", "web-ipv4"))], Stop())
    node_.run([ADDRESSES, web(1)[1], Synced()])
    node_.check()


def test_services_that_gain_or_lose_endpoints_are_named_in_a_bounded_number_of_lines() -> None:
    """Not those of the start, and not a Service that is deleted."""

    def services(count: int, *pods: str) -> list[Event]:
        return [
            event
            for n in range(count)
            for event in (
                Upsert(service(f"s{n}", cluster_ips=[f"10.96.1.{n}"])),
                Upsert(endpoint_slice(f"s{n}", [endpoint(p) for p in pods])),
            )
        ]

    node_ = Node()
    node_.then(
        services(1),
        services(1, "10.244.1.1"),
        services(13),
        [Delete(Service, Name("default", "web"))],
        Stop(),
    )
    node_.run([*START[:-1], *services(13, "10.244.1.1"), Synced()])
    lines = [(x["event"], x.get("service")) for x in node_.lines if "endpoint" in x["event"]]
    assert lines[:2] == [
        ("last_endpoint_removed", "default/s0"),
        ("first_endpoint_added", "default/s0"),
    ]
    assert [event for event, _ in lines[2:]] == ["last_endpoint_removed"] * 10 + [
        "more_endpoint_changes"
    ]
