"""The real agent against an API server over the wire: starts, changes, and each fault in turn.

The agent runs on the node of a World, the API server on its fabric. All the while a pod connects
to the Service `web`, whose endpoints change but always answer, so that no connection may fail.
After each step the kernel is held against a recomputation from what the API server has.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from lab.world import World
from tests.cluster.cluster import (
    AWAY,
    BACK,
    FAST,
    PORT,
    SERVERS,
    SILENT,
    UNUSABLE,
    VIP,
    Cluster,
    FabricServer,
    Mirror,
    cidr_document,
    node_document,
)
from tests.kernel.agent import Agent
from tests.manifest import endpoint, service_document, slice_document

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World(prefix="sliceproxy-cluster") as built:
        for host in SERVERS:
            built.serve(host, 8080)
        yield built


@pytest.fixture
def cluster(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    with FabricServer(world) as server:
        mirror = Mirror(world, server)
        try:
            yield Cluster(world, server, mirror)
        finally:
            mirror.close()


@pytest.fixture
def followed(cluster: Cluster) -> Iterator[Cluster]:
    with cluster.followed():
        yield cluster


# --- starts and changes -------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["agent", FAST], ids=["500 a page", "3 a page"])
@pytest.mark.parametrize("streaming", [True, False], ids=["streamed", "listed"])
def test_a_start_programs_all_there_is_in_one_transaction(
    cluster: Cluster, streaming: bool, module: str
) -> None:
    cluster.server.streaming = streaming
    with cluster.followed(module) as agent:
        assert not cluster.mirror.difference()  # at once, without another transaction
        assert sum(line["event"] in ("programmed", "verified") for line in agent.lines) == 1
        pages = [s for s in cluster.server.seen if (s.verb, s.resource) == ("list", "services")]
        assert len(pages) == (0 if streaming else 3 if module == FAST else 1)
        cluster.churn()
        cluster.check()


def test_nothing_is_programmed_before_everything_is_listed(cluster: Cluster) -> None:
    cluster.server.answer(500, resource="endpointslices")
    flags = ("--server", cluster.server.url)
    with Agent(cluster.world, None, *flags, module=FAST) as agent:
        agent.wait(AWAY)
        cluster.server.wait_for(lambda: cluster.server.watching("services", "nodes"))
        assert cluster.mirror.difference() == "no table of family 4"
        cluster.server.heal()
        agent.wait("programmed")
        assert not cluster.mirror.difference()


def test_every_kind_of_change_reaches_the_kernel(followed: Cluster) -> None:
    server, web = followed.server, service_document(cluster_ips=[VIP])
    two = ({"name": "http", "port": PORT}, {"name": "more", "port": 81, "nodePort": 30081})
    foreign = service_document("other-2", cluster_ips=["10.96.1.3"])
    foreign["metadata"]["labels"] = {"service.kubernetes.io/service-proxy-name": "another"}
    for change in (
        lambda: followed.web("pod-1", "remote-1"),
        lambda: followed.web("pod-2"),
        lambda: server.put(service_document(cluster_ips=[VIP], ports=two, type="NodePort")),
        lambda: server.put(web),
        lambda: server.put(service_document(cluster_ips=[VIP], sessionAffinity="ClientIP")),
        lambda: server.put(web),
        lambda: server.put(slice_document("web", [endpoint("10.244.1.13")], name="second")),
        lambda: server.delete("EndpointSlice", "second"),
        lambda: followed.other(50),
        lambda: server.put(foreign),
        lambda: followed.remove("other-1"),
        lambda: server.put(cidr_document("10.96.0.0/16", "10.97.0.0/16")),
        lambda: server.delete("ServiceCIDR", "kubernetes"),
        lambda: server.put(node_document(**{"topology.kubernetes.io/zone": "a"})),
        lambda: server.delete("Node", "node-1"),
    ):
        change()
        followed.check()
    assert followed.answers("10.96.1.2") != "answered"


def test_what_arrives_while_the_agent_is_busy_is_a_few_transactions(followed: Cluster) -> None:
    """It is stopped while 190 Services and their slices are made; then it reads them as they are
    in its sockets, a read of a watch at a time."""
    followed.server.wait_for(lambda: followed.server.watching("services", "endpointslices"))
    assert followed.agent
    first, process = len(followed.lines), followed.agent.process
    process.send_signal(signal.SIGSTOP)
    for number in range(10, 200):
        followed.other(number)
    process.send_signal(signal.SIGCONT)
    followed.check()
    count = sum(line["event"] == "programmed" for line in followed.lines[first:])
    assert 1 <= count <= 19


# --- faults -------------------------------------------------------------------------------------


def cut_in_a_line(cluster: Cluster) -> None:
    for resource in ("services", "endpointslices"):
        cluster.server.cut_next(resource)
    cluster.churn()


def errors_for_a_while(cluster: Cluster) -> None:
    first = len(cluster.lines)
    cluster.server.answer(500)
    cluster.server.abort()
    cluster.wait(AWAY, first, reason="it answers 500: made up by the test: 500")
    cluster.churn()
    cluster.server.heal()
    cluster.check()
    cluster.wait(BACK, first)


def _compacted_while_away(cluster: Cluster) -> None:
    cluster.server.down()
    cluster.churn()
    cluster.server.compact()
    cluster.server.up()


def gone_as_http_status(cluster: Cluster) -> None:
    cluster.server.gone_as_status = True
    _compacted_while_away(cluster)


def gone_as_event(cluster: Cluster) -> None:
    cluster.server.gone_as_status = False
    _compacted_while_away(cluster)


def half_open(cluster: Cluster) -> None:
    first = len(cluster.lines)
    for resource in ("services", "endpointslices"):
        cluster.server.mute(resource)
    cluster.churn()
    cluster.wait(SILENT, first, resource="services")
    cluster.wait(SILENT, first, resource="endpointslices")


def no_answers(cluster: Cluster) -> None:
    first = len(cluster.lines)
    cluster.server.silence()
    cluster.server.abort()
    cluster.churn()
    cluster.wait(AWAY, first, reason="no answer in time")
    cluster.server.heal()


def undecodable(cluster: Cluster) -> None:
    """Of `web` and its slice at once: it stays as it was, and everything else changes."""
    first, key = len(cluster.lines), ("default", "web")
    slice_key = ("default", "web-ipv4")
    good = cluster.server.objects("Service")[key]
    good_slice = cluster.server.objects("EndpointSlice")[slice_key]
    cluster.mirror.instead = {
        ("Service", key): good,
        ("EndpointSlice", slice_key): good_slice,
    }
    broken = {"kind": "Service", **good, "spec": {**good["spec"], "ports": "none"}}
    broken_slice = {"kind": "EndpointSlice", **good_slice, "endpoints": [{"addresses": 3}]}
    cluster.server.put(broken, broken_slice)
    cluster.wait(UNUSABLE, first, object="Service default/web")
    cluster.wait(UNUSABLE, first, object="EndpointSlice default/web-ipv4")
    cluster.other(60)
    cluster.check()
    cluster.server.compact()  # a list is no better
    cluster.server.abort()
    cluster.other(61)
    cluster.check()
    cluster.mirror.instead.clear()
    cluster.server.put({"kind": "Service", **good})
    cluster.churn()


def back_in_time(cluster: Cluster) -> None:
    backup = cluster.server.backup()
    for _ in range(3):
        cluster.churn()
    cluster.check()
    cluster.server.down()
    cluster.server.restore(backup)
    cluster.server.up()
    cluster.check()
    cluster.churn()


def deletions_missed(cluster: Cluster) -> None:
    cluster.server.down()
    cluster.other(70)
    for name in cluster.others[:2]:
        cluster.remove(name)
    cluster.web("remote-1")
    cluster.server.up()


def deletions_missed_and_compacted(cluster: Cluster) -> None:
    cluster.server.down()
    for name in cluster.others:
        cluster.remove(name)
    cluster.server.compact()
    cluster.server.up()
    cluster.check()
    for number in range(7):
        cluster.other(number)


def agent_killed_while_the_server_is_away(cluster: Cluster) -> None:
    """It starts without an API server; the node keeps what it has."""
    assert cluster.agent
    cluster.server.down()
    cluster.agent.kill()
    cluster.churn()
    first = cluster.agent.restart()
    cluster.wait(AWAY, first)
    assert not any(x["event"] in ("programmed", "verified") for x in cluster.lines[first:])
    assert cluster.mirror.difference()
    cluster.server.up()
    cluster.wait("programmed", first)


FAULTS: tuple[Callable[[Cluster], None], ...] = (
    cut_in_a_line,
    errors_for_a_while,
    gone_as_http_status,
    gone_as_event,
    half_open,
    no_answers,
    undecodable,
    back_in_time,
    deletions_missed,
    deletions_missed_and_compacted,
    agent_killed_while_the_server_is_away,
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_kernel_is_right_after(followed: Cluster, fault: Callable[[Cluster], None]) -> None:
    followed.server.wait_for(lambda: followed.server.watching("services", "endpointslices"))
    fault(followed)
    followed.check()
    followed.churn()
    followed.check()


def test_a_new_list_of_what_is_known_writes_nothing(followed: Cluster) -> None:
    server = followed.server
    first = len(followed.lines)
    server.down()
    server.put({"kind": "Node", "metadata": {"name": "node-2"}})
    server.compact()
    asked = len(server.seen)
    server.up()
    server.wait_for(lambda: server.watching("services", "endpointslices", "nodes"))
    again = [s for s in server.seen[asked:] if "sendInitialEvents" in s.query]
    assert {"services", "endpointslices", "nodes"} <= {s.resource for s in again}
    followed.check()
    assert not any(x["event"] in ("programmed", "verified") for x in followed.lines[first:])


@pytest.mark.parametrize("state", ["watching", "silent", "down"])
@pytest.mark.parametrize("module", ["agent", FAST], ids=["usual timing", "fast"])
def test_sigterm_ends_it_at_once_whatever_the_server_does(
    cluster: Cluster, module: str, state: str
) -> None:
    server = cluster.server
    with cluster.followed(module) as agent:
        server.wait_for(lambda: server.watching("services", "endpointslices"))
        if state == "silent":
            server.silence()
            server.abort()
            time.sleep(0.3)
        elif state == "down":
            server.down()
            agent.wait(AWAY)
        started = time.monotonic()
        assert agent.terminate() == 0
        assert time.monotonic() - started < 2.0
        assert not cluster.mirror.difference()  # the tables stay, and `web` is asked still


def test_sigterm_ends_it_at_once_while_it_connects(cluster: Cluster) -> None:
    unreachable = "http://172.31.0.77:6443"
    with Agent(cluster.world, None, "--server", unreachable) as agent:
        agent.wait("started")
        time.sleep(0.3)
        started = time.monotonic()
        assert agent.terminate() == 0
        assert time.monotonic() - started < 2.0


def test_the_kernel_is_right_after_one_fault_upon_another(followed: Cluster) -> None:
    order = list(FAULTS)
    random.Random(3).shuffle(order)
    for fault in order:
        fault(followed)
        followed.check()
