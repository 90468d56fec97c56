"""Counters on the elements: they add up to the connections that were made, and outlive changes.

Real packets in both families; the counts are read back from the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

from agent.cli.client import Client
from agent.config.settings import Settings
from agent.kernel.counters import CountersReader, KeptCounts
from agent.kernel.tables import Kernel
from rules.counts import (
    NO_ENDPOINTS,
    NO_LOCAL_ENDPOINTS,
    SOURCE_RANGES,
    UNALLOCATED,
    UNKNOWN_PORT,
    FrontendCounts,
    claim_counts,
    counted_keys,
    frontend_counts,
)
from rules.events import Upsert
from rules.service_report import ServiceLine
from tests import manifest
from tests.kernel.agent import Agent, write
from tests.kernel.conftest import SERVICE_PORTS, SLICE_PORTS, Net
from tests.kernel.proxy import Proxy
from tests.manifest import endpoint, service_document, slice_document

Start = Callable[..., Proxy]


def counted(proxy: Proxy) -> dict[str, FrontendCounts]:
    """The counts by frontend, of those that are not zero.

    Whoever asks for Services by name gets the same.
    """
    reader = CountersReader(proxy.kernel.kept or KeptCounts(), lambda: proxy.kernel, seconds=0)
    found = list(frontend_counts(proxy.state, reader.read()))
    chosen = reader.read_of(counted_keys(proxy.state, proxy.state.services))
    for claim in proxy.state.installed:
        if name := proxy.state.holder(claim):
            assert claim_counts(proxy.state, name, claim, chosen) in found
    return {c.frontend: c for c in found if c.connections or c.refused or c.dropped}


def total(counts: FrontendCounts) -> tuple[int, dict[str, int], dict[str, int]]:
    return counts.connections, counts.refused, counts.dropped


def at(net: Net, address: str, protocol: str = "tcp") -> str:
    return f"[{address}]:80/{protocol}" if net.family == 6 else f"{address}:80/{protocol}"


def test_connections_are_counted_at_the_address_that_was_asked(proxy: Start, net: Net) -> None:
    running = proxy()
    running.put(net.service(), net.slice("pod-1", "pod-2", "remote-1"))
    for client, frontend, times in (
        ("pod-3", "cluster-ip", 3),
        ("node", "cluster-ip", 2),
        ("client", "node-port", 4),
        ("client", "external-ip", 5),
        ("client", "balancer-ip", 1),
    ):
        for _ in range(times):
            net.server(client, net.at(frontend))
    net.server("pod-3", net.at("cluster-ip"), "udp")
    assert {where: total(c) for where, c in counted(running).items()} == {
        at(net, net.cluster_ip): (5, {}, {}),
        at(net, net.cluster_ip, "udp"): (1, {}, {}),
        "node port 30080/tcp": (4, {}, {}),
        at(net, net.external_ip): (5, {}, {}),
        at(net, net.balancer_ip): (1, {}, {}),
    }


def test_clients_inside_are_counted_under_policy_local(proxy: Start, net: Net) -> None:
    running = proxy(cluster_cidr="10.244.0.0/16,fd00:10:244::/48", detect_local_mode="ClusterCIDR")
    running.put(net.service(externalTrafficPolicy="Local"), net.slice("pod-1", "remote-1"))
    for _ in range(3):
        net.server("pod-3", net.at("external-ip"))
    for _ in range(2):
        net.server("client", net.at("external-ip"))
    assert total(counted(running)[at(net, net.external_ip)]) == (5, {}, {})


def test_refusals_and_drops_are_counted_by_reason(proxy: Start, net: Net) -> None:
    running = proxy()
    running.put(
        net.service(externalTrafficPolicy="Local", loadBalancerSourceRanges=["192.0.2.0/24"]),
        net.slice("remote-1"),
        net.service("empty", cluster_ips=[net.other_cluster_ip], type="ClusterIP", externalIPs=[],
                    ingress=[]),
    )  # fmt: skip
    assert net.ask("pod-3", (net.other_cluster_ip, 80), timeout=0.9).outcome == "refused"
    assert net.ask("pod-3", (net.cluster_ip, 81), "udp", timeout=0.9).outcome == "refused"
    for _ in range(2):
        assert net.ask("client", net.at("external-ip"), "udp", timeout=0.1).outcome == "silent"
    for _ in range(3):
        assert net.ask("client", net.at("balancer-ip"), "udp", timeout=0.1).outcome == "silent"
    assert net.ask("pod-3", (net.unallocated_ip, 80), "udp", timeout=0.1).outcome == "silent"
    found = counted(running)
    assert total(found[at(net, net.other_cluster_ip)]) == (0, {NO_ENDPOINTS: 1}, {})
    assert total(found[net.cluster_ip]) == (0, {UNKNOWN_PORT: 1}, {})
    dropped = (0, {}, {NO_LOCAL_ENDPOINTS: 2})
    assert total(found[at(net, net.external_ip, "udp")]) == dropped
    assert total(found[at(net, net.balancer_ip, "udp")]) == (0, {}, {SOURCE_RANGES: 3})
    assert total(found["ip6" if net.family == 6 else "ip"]) == (0, {}, {UNALLOCATED: 1})


def test_source_ranges_count_what_they_drop_alone(proxy: Start, net: Net) -> None:
    running = proxy()
    ranges = [f"{net.address('client')}/{128 if net.family == 6 else 32}"]
    running.put(net.service(loadBalancerSourceRanges=ranges), net.slice("remote-1"))
    for _ in range(4):
        net.server("client", net.at("balancer-ip"))
    assert net.ask("pod-3", net.at("balancer-ip"), "udp", timeout=0.1).outcome == "silent"
    found = counted(running)
    assert total(found[at(net, net.balancer_ip)]) == (4, {}, {})
    assert total(found[at(net, net.balancer_ip, "udp")]) == (0, {}, {SOURCE_RANGES: 1})


def test_counts_go_on_when_a_service_outgrows_its_width(proxy: Start, net: Net) -> None:
    running = proxy()
    running.put(net.service(), net.slice("pod-1"))
    for _ in range(3):
        net.server("pod-3", net.at("cluster-ip"))
    change = running.put(net.slice("pod-1", "pod-2", "remote-1", "remote-2"))
    assert any(owner.verdicts for owner in change.change.removed)  # another width
    net.server("pod-3", net.at("cluster-ip"))
    assert total(counted(running)[at(net, net.cluster_ip)]) == (4, {}, {})


def test_refusals_are_shown_after_endpoints_are_back_and_go_on(proxy: Start, net: Net) -> None:
    running = proxy()
    running.put(net.service())
    for _ in range(2):
        net.expect_refusal(net.at("cluster-ip"), "pod-3")
    refused = counted(running)[at(net, net.cluster_ip, "udp")].refused[NO_ENDPOINTS]
    running.put(net.slice("pod-1"))
    net.server("pod-3", net.at("cluster-ip"), "udp")
    assert total(counted(running)[at(net, net.cluster_ip, "udp")]) == (
        *(1, {NO_ENDPOINTS: refused}, {}),
    )
    running.put(net.slice())
    net.expect_refusal(net.at("cluster-ip"), "pod-3")
    assert counted(running)[at(net, net.cluster_ip, "udp")].refused == {NO_ENDPOINTS: refused + 1}


def test_an_address_of_another_service_begins_at_zero(proxy: Start, net: Net) -> None:
    running = proxy()
    service = net.service()
    running.put(service)
    net.expect_refusal(net.at("cluster-ip"), "pod-3")
    running.delete(service)
    running.put(net.service("heir"))
    assert not counted(running)


def test_counts_survive_a_restart_and_a_recreated_table(net: Net) -> None:
    objects = manifest.node(), net.service(), net.slice("pod-1")
    recreated = []
    for own in (True, True, False, True):  # a restart, then tables of another ownership
        running = Proxy(net.world, own=own)
        running.state.apply([Upsert(o) for o in objects])
        transaction = running.resync()
        recreated.append(any(t.delete for t in transaction.tables))
        net.server("pod-3", net.at("cluster-ip"))
        found = total(counted(running)[at(net, net.cluster_ip)])
        if len(recreated) == 4:
            running.kernel.remove()
        running.kernel.close()
    assert recreated == [False, False, True, True]
    assert found == (4, {}, {})


def test_the_kernel_still_counts_after_sigkill_and_the_next_agent_reports_it(
    net: Net, tmp_path: Path
) -> None:
    """At /v1/counters, /v1/services and /metrics; without counters it reports none."""
    place, api = tmp_path / "objects.json", str(tmp_path / "api.sock")
    objects = (
        service_document(cluster_ips=[net.cluster_ip], ports=SERVICE_PORTS, type="NodePort"),
        slice_document(endpoints=[endpoint(net.address("pod-1"))], ports=SLICE_PORTS),
    )
    write(place, *objects)
    mine, reported = at(net, net.cluster_ip), []
    try:
        for event in ("programmed", "verified"):
            with Agent(net.world, place, "--api-socket", api) as agent:
                agent.wait(event)
                for _ in range(3):
                    net.server("pod-3", (net.cluster_ip, 80))
                client = Client(api)
                found = client.get("/v1/counters", list[FrontendCounts])
                lines = client.get("/v1/services", list[ServiceLine], {"counters": "true"})
                reported.append({c.frontend: c.connections for c in found}[mine])
                by_line = {f.address: f.connections for line in lines for f in line.frontends}
                assert by_line[mine] == reported[-1]
                labels = f'frontend="{mine}",namespace="default",port="web",service="web"'
                series = f"sliceproxy_service_connections_total{{{labels}}} {reported[-1]}.0"
                assert series in net.world.run("node", scrape)
        assert reported == [3, 6]
        with Agent(net.world, place, "--no-counters", "--api-socket", api) as agent:
            agent.wait("programmed")
            assert "sliceproxy_service_connections" not in net.world.run("node", scrape)
    finally:
        with net.world.run("node", Kernel) as kernel:
            kernel.remove()


def scrape() -> str:
    with urlopen("http://127.0.0.1:10249/metrics") as answer:
        text: str = answer.read().decode()
        return text


def test_switching_counters_on_or_off_keeps_the_table(net: Net) -> None:
    """And with it what session affinity remembers; afterwards a comparison finds no difference."""
    objects = manifest.node(), net.service(), net.slice("pod-1")
    for counters, connections in ((False, 0), (True, 1), (True, 2), (False, 0)):
        options = Settings(node="node-1", counters=counters).options()
        running = Proxy(net.world, own=True, options=options)
        running.state.apply([Upsert(o) for o in objects])
        transaction = running.resync()
        assert not any(t.delete for t in transaction.tables)
        assert not running.resync()
        net.server("pod-3", net.at("cluster-ip"))
        found = counted(running).get(at(net, net.cluster_ip))
        assert (found.connections if found else 0) == connections
        running.kernel.close()
    with net.world.run("node", Kernel) as kernel:
        kernel.remove()
