"""Connections by endpoint, of the Services that ask: they add up to those at the frontends.

Real packets in both families; the counts are read back from the kernel.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent.cli.client import Client
from agent.kernel.counters import CountersReader, KeptCounts
from agent.kernel.tables import Kernel
from rules.counts import frontend_counts
from rules.endpoint_counts import is_counted, with_connections
from rules.endpoint_report import EndpointTable, endpoints
from rules.frontends import destination_key
from rules.netlink.batch import Batch
from rules.objects import TCP, Service
from rules.tables import ENDPOINT_COUNTERS_SIZE, SETS, TABLE
from rules.target import target_of
from tests.kernel.agent import Agent, write
from tests.kernel.conftest import PROTOCOLS, SERVICE_PORTS, Net
from tests.kernel.proxy import Proxy
from tests.manifest import endpoint, service_document, slice_document

Start = Callable[..., Proxy]

ASKED = {"sliceproxy.io/endpoint-counters": "true"}
ENDPOINTS = ("pod-1", "pod-2", "remote-1")


def counted_service(net: Net, **fields: Any) -> Service:
    return net.service(annotations=ASKED, **fields)


def neighbour(net: Net, **fields: Any) -> Service:
    """A Service with a cluster IP only, which does not ask."""
    return net.service(
        "neighbour",
        cluster_ips=[net.other_cluster_ip],
        ports=[{k: v for k, v in port.items() if k != "nodePort"} for port in SERVICE_PORTS],
        type="ClusterIP",
        externalIPs=[],
        ingress=[],
        **fields,
    )


def by_endpoint(running: Proxy, net: Net, name: str = "web") -> dict[str, Counter[str]] | None:
    """Connections by protocol and host, as `endpoints` shows them; None where it shows none."""
    table = endpoints(running.state, f"default/{name}")
    if not is_counted(running.state, table):
        return None
    reader = CountersReader(KeptCounts(), lambda: running.kernel, seconds=0)
    hosts = {net.address(host): host for host in net.world.hosts}
    return {
        port.protocol: Counter(
            {hosts[row.address]: row.connections for row in port.rows if row.connections}
        )
        for port in with_connections(running.state, table, reader.read_by_endpoint()).ports
    }


def at_frontends(running: Proxy, name: str = "web") -> int:
    """Connections at all addresses and ports of a Service."""
    reader = CountersReader(KeptCounts(), lambda: running.kernel, seconds=0)
    found = frontend_counts(running.state, reader.read())
    return sum(c.connections for c in found if c.service == name)


def elements(running: Proxy, net: Net) -> int:
    return len(running.kernel.elements(SETS[net.family].endpoint_counters))


def test_connections_add_up_by_endpoint_and_no_other_service_is_counted(
    proxy: Start, net: Net
) -> None:
    running = proxy()
    running.put(counted_service(net), net.slice(*ENDPOINTS))
    running.put(neighbour(net), net.slice("pod-2", service="neighbour"))
    made = {protocol: Counter[str]() for protocol in PROTOCOLS}
    for client, frontend in (
        *(("pod-3", "cluster-ip"), ("node", "cluster-ip"), ("pod-1", "cluster-ip")),
        *(("client", "node-port"), ("node", "node-port")),
        *(("client", "external-ip"), ("client", "balancer-ip")),
    ):
        for protocol in PROTOCOLS:
            for _ in range(4):
                made[protocol][net.server(client, net.at(frontend), protocol)] += 1
    for _ in range(3):
        net.server("pod-3", (net.other_cluster_ip, 80))
    assert by_endpoint(running, net) == made
    assert at_frontends(running) == sum(c.total() for c in made.values()) == 56
    assert at_frontends(running, "neighbour") == 3
    assert by_endpoint(running, net, "neighbour") is None
    running.check()


def test_an_endpoint_on_the_node_itself_is_counted(proxy: Start, net: Net) -> None:
    """Its packets are delivered, not forwarded: they pass the input hook."""
    running = proxy()
    running.put(counted_service(net), net.slice("node"))
    for client in ("client", "pod-3", "node"):
        net.server(client, net.at("cluster-ip" if client != "client" else "node-port"))
    assert by_endpoint(running, net) == {"tcp": {"node": 3}, "udp": {}}


def test_clients_that_session_affinity_remembers_are_counted(proxy: Start, net: Net) -> None:
    running = proxy()
    running.put(counted_service(net, sessionAffinity="ClientIP"), net.slice(*ENDPOINTS))
    (server,) = {net.server("pod-3", net.at("cluster-ip")) for _ in range(5)}
    assert by_endpoint(running, net) == {"tcp": {server: 5}, "udp": {}}
    running.check()


def test_counts_stay_while_endpoints_move_between_slots(proxy: Start, net: Net) -> None:
    running = proxy()
    running.put(counted_service(net), net.slice(*ENDPOINTS))
    made = Counter(net.server("pod-3", net.at("cluster-ip")) for _ in range(24))
    running.put(net.slice("remote-1", "pod-2"))
    del made["pod-1"]  # not shown any more
    assert by_endpoint(running, net) == {"tcp": made, "udp": {}}
    made.update(net.server("pod-3", net.at("cluster-ip")) for _ in range(6))
    assert by_endpoint(running, net) == {"tcp": made, "udp": {}}


def test_a_service_that_asks_no_longer_is_not_counted_and_the_set_ends(
    proxy: Start, net: Net
) -> None:
    running = proxy()
    running.put(counted_service(net), net.slice("pod-1"))
    net.server("pod-3", net.at("cluster-ip"))
    assert elements(running, net) == 1
    transaction = running.put(net.service())
    assert not any(t.delete for t in transaction.tables)
    assert "endpoint-counters" not in running.kernel.set_names(net.family)
    net.server("pod-3", net.at("cluster-ip"))
    assert by_endpoint(running, net) is None
    running.check()


def test_nothing_is_counted_without_counters(proxy: Start, net: Net) -> None:
    running = proxy(counters=False)
    running.put(counted_service(net), net.slice("pod-1"))
    net.server("pod-3", net.at("cluster-ip"))
    assert by_endpoint(running, net) is None
    assert "endpoint-counters" not in running.kernel.set_names(net.family)
    running.check()


def test_a_full_set_counts_no_more_endpoints_and_connects_all_the_same(
    proxy: Start, net: Net
) -> None:
    running = proxy()
    running.put(counted_service(net), net.slice("pod-1"))
    net.server("pod-3", net.at("cluster-ip"))
    owner = SETS[net.family].endpoint_counters
    key = destination_key(net.packed(net.cluster_ip), TCP, 80)
    missing = ENDPOINT_COUNTERS_SIZE - 1
    for first in range(1, missing + 1, 4096):
        batch = Batch()
        numbers = range(first, min(first + 4096, missing + 1))
        filling = [(key + target_of(net.packed(net.second_ip), n), None) for n in numbers]
        batch.add_elements(TABLE, owner, filling)
        running.kernel.send(batch)
    running.put(net.slice("pod-2"))
    assert net.server("pod-3", net.at("cluster-ip")) == "pod-2"
    assert by_endpoint(running, net) == {"tcp": {}, "udp": {}}
    running.put(net.slice("pod-1"))
    net.server("pod-3", net.at("cluster-ip"))
    assert by_endpoint(running, net) == {"tcp": {"pod-1": 2}, "udp": {}}


def test_the_agent_shows_them_also_after_a_restart(net: Net, tmp_path: Path) -> None:
    """At /v1/services/NAMESPACE/NAME?counters=true, and as a column of `endpoints`."""
    place, api = tmp_path / "objects.json", str(tmp_path / "api.sock")
    document = service_document(cluster_ips=[net.cluster_ip], annotations=ASKED)
    write(place, document, slice_document(endpoints=[endpoint(net.address("pod-1"))]))
    reported = []
    try:
        for event in ("programmed", "verified"):
            with Agent(net.world, place, "--api-socket", api) as agent:
                agent.wait(event)
                for _ in range(3):
                    net.server("pod-3", (net.cluster_ip, 80))
                path, client = "/v1/services/default/web", Client(api)
                table = client.get(path, EndpointTable, {"counters": "true"})
                reported += [row.connections for port in table.ports for row in port.rows]
                plain = client.get(path, EndpointTable)
                assert [row.connections for port in plain.ports for row in port.rows] == [None]
                shown = text_of(api)
                assert "connections" in shown
                assert str(reported[-1]) in shown.split()
        assert reported == [3, 6]
    finally:
        with net.world.run("node", Kernel) as kernel:
            kernel.remove()


def text_of(api: str) -> str:
    command = [sys.executable, "-m", "agent", "endpoints", "default/web", f"--socket={api}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
