"""Every statement about what a Service means that a packet can show, over both families."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import msgspec
import pytest
from pyroute2 import IPRoute

from agent.kernel.addresses import read as read_addresses
from agent.kernel.addresses import route_socket
from lab.world import World
from rules.decode import decode
from rules.frontends import destination_key
from rules.objects import HEADLESS_LABEL, PROXY_NAME_LABEL, SCTP
from rules.tables import SETS, balancer
from rules.target import target_of
from tests import manifest
from tests.kernel.conftest import (
    CLIENTS,
    CLUSTER_CIDR,
    NODE_PORT,
    PROTOCOLS,
    REFUSAL_SECONDS,
    SERVICE_PORTS,
    SLICE_PORTS,
    TARGET_PORT,
    Net,
)
from tests.kernel.proxy import Proxy

Start = Callable[..., Proxy]

DETECTORS: dict[str, dict[str, Any]] = {
    "ClusterCIDR": {"cluster_cidr": CLUSTER_CIDR},
    "NodeCIDR": {"detect_local_mode": "NodeCIDR"},
    "BridgeInterface": {
        "detect_local_mode": "BridgeInterface",
        "pod_bridge_interface": "vethpod3",
    },
    "InterfaceNamePrefix": {
        "detect_local_mode": "InterfaceNamePrefix",
        "pod_interface_name_prefix": "vethpod",
    },
}
EXTERNAL = ("external-ip", "balancer-ip", "node-port")
ALL = ("cluster-ip", *EXTERNAL)

detectors = pytest.mark.parametrize("detector", DETECTORS)
any_detector = pytest.mark.parametrize("detector", [None, *DETECTORS])


# --- cluster IPs: whose address ------------------------------------------------------------------


@detectors
def test_a_pod_keeps_its_address_at_a_cluster_ip(proxy: Start, net: Net, detector: str) -> None:
    p = proxy(**DETECTORS[detector])
    p.put(net.service(), net.slice("pod-1", "pod-2", "remote-1"))
    net.expect("pod-3", net.at("cluster-ip"), ("pod-1", "pod-2", "remote-1"), seen_as="pod-3")


@detectors
def test_a_client_outside_the_cluster_is_masqueraded_at_a_cluster_ip(
    proxy: Start, net: Net, detector: str
) -> None:
    p = proxy(**DETECTORS[detector])
    p.put(net.service(), net.slice("pod-1", "remote-1"))
    net.expect("client", net.at("cluster-ip"), ("pod-1", "remote-1"), seen_as="node")


@detectors
def test_the_node_is_masqueraded_at_a_cluster_ip(
    proxy: Start, net: Net, node_second: str, detector: str
) -> None:
    """As its packets come from no pod; an address that endpoints cannot answer shows it."""
    p = proxy(**DETECTORS[detector])
    p.put(net.service(), net.slice("pod-1", "remote-1"))
    for source in (None, node_second):
        net.expect(
            "node", net.at("cluster-ip"), ("pod-1", "remote-1"), seen_as="node", source=source
        )


def test_every_client_keeps_its_address_at_a_cluster_ip_without_a_detector(
    proxy: Start, net: Net
) -> None:
    p = proxy()
    p.put(net.service(), net.slice("pod-1", "pod-2"))
    for client in CLIENTS:
        net.expect(client, net.at("cluster-ip"), ("pod-1", "pod-2"), seen_as=client)


def test_a_detector_that_knows_one_family_leaves_the_other_alone(proxy: Start, net: Net) -> None:
    cidr = CLUSTER_CIDR.split(",")[0]
    p = proxy(cluster_cidr=cidr)
    p.put(net.service(), net.slice("pod-1"))
    seen_as = "node" if net.family == 4 else "client"
    net.expect("client", net.at("cluster-ip"), ("pod-1",), seen_as=seen_as)


def test_pods_of_the_node_are_those_in_the_cidrs_of_its_node_object(proxy: Start, net: Net) -> None:
    p = proxy(**DETECTORS["NodeCIDR"])
    p.put(manifest.node(pod_cidrs=[f"{net.address('pod-2')}"]), net.service(), net.slice("pod-1"))
    net.expect("pod-2", net.at("cluster-ip"), ("pod-1",), seen_as="pod-2")
    net.expect("pod-3", net.at("cluster-ip"), ("pod-1",), seen_as="node")
    p.put(manifest.node(pod_cidrs=[f"{net.address('pod-3')}"]))
    net.expect("pod-2", net.at("cluster-ip"), ("pod-1",), seen_as="node")
    net.expect("pod-3", net.at("cluster-ip"), ("pod-1",), seen_as="pod-3")
    p.check()


def test_a_bridge_is_matched_by_its_whole_name_and_a_prefix_by_its_beginning(
    proxy: Start, net: Net
) -> None:
    p = proxy(**DETECTORS["BridgeInterface"])  # vethpod3
    p.put(net.service(), net.slice("pod-1"))
    net.expect("pod-2", net.at("cluster-ip"), ("pod-1",), seen_as="node")


@pytest.mark.parametrize("bridge", ["vethpod", "vethpod33"])
def test_a_bridge_with_a_shorter_or_longer_name_is_another(
    proxy: Start, net: Net, bridge: str
) -> None:
    p = proxy(detect_local_mode="BridgeInterface", pod_bridge_interface=bridge)
    p.put(net.service(), net.slice("pod-1"))
    net.expect("pod-3", net.at("cluster-ip"), ("pod-1",), seen_as="node")


@pytest.mark.parametrize("detector", [None, *DETECTORS])
def test_masquerade_all_masquerades_pods_at_a_cluster_ip_too(
    proxy: Start, net: Net, detector: str | None
) -> None:
    p = proxy(masquerade_all=True, **(DETECTORS[detector] if detector else {}))
    p.put(net.service(), net.slice("pod-1", "remote-1"))
    for client in CLIENTS:
        net.expect(client, net.at("cluster-ip"), ("pod-1", "remote-1"), seen_as="node")


def test_a_pod_that_reaches_itself_sees_the_nodes_address(proxy: Start, net: Net) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(net.service(), net.slice("pod-1", "pod-2"))
    for protocol in PROTOCOLS:
        answers = net.answers("pod-1", net.at("cluster-ip"), protocol, enough=2)
        assert answers == {"pod-1": {net.address("node")}, "pod-2": {net.address("pod-1")}}


@pytest.mark.parametrize("policy", ["Cluster", "Local"])
@pytest.mark.parametrize("detector", [None, "ClusterCIDR"])
def test_a_pod_reaches_itself_at_every_address(
    proxy: Start, net: Net, detector: str | None, policy: str
) -> None:
    p = proxy(**(DETECTORS[detector] if detector else {}))
    p.put(
        net.service(externalTrafficPolicy=policy, internalTrafficPolicy=policy), net.slice("pod-1")
    )
    for frontend in ALL:
        net.expect("pod-1", net.at(frontend), ("pod-1",), seen_as="node")


def test_a_pod_that_reaches_itself_while_terminating_sees_the_nodes_address(
    proxy: Start, net: Net
) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    leaving = net.endpoint("pod-1", ready=False, serving=True, terminating=True)
    p.put(net.service(), net.slice(leaving))
    net.expect("pod-1", net.at("cluster-ip"), ("pod-1",), seen_as="node")


@pytest.mark.parametrize("others", [0, 0x10001])
def test_a_pod_that_reaches_itself_loses_the_mark_bit_and_keeps_others(
    proxy: Start, net: Net, world: World, others: int
) -> None:
    """A hairpin at an external address is marked, and another rule masquerades it first."""
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(net.service(), net.slice("pod-1"))
    commands = "\n".join(
        (
            "add table inet other",
            "add chain inet other first { type filter hook prerouting priority -150; }",
            f"add rule inet other first ct direction original meta mark set {others:#x}",
            "add chain inet other last { type filter hook postrouting priority 150; }",
            f"add rule inet other last ct direction original meta mark != {others:#x} drop",
        )
    )
    world.run("node", nft, commands)
    try:
        for frontend in ALL:
            net.expect("pod-1", net.at(frontend), ("pod-1",), seen_as="node")
    finally:
        world.run("node", nft, "delete table inet other")


# --- cluster IPs: internalTrafficPolicy ----------------------------------------------------------


def test_internal_policy_local_uses_the_nodes_endpoints_only(proxy: Start, net: Net) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(
        net.service(internalTrafficPolicy="Local"),
        net.slice("pod-1", "pod-2", "remote-1", "remote-2"),
    )
    for client, seen_as in (("pod-3", "pod-3"), ("node", "node"), ("client", "node")):
        net.expect(client, net.at("cluster-ip"), ("pod-1", "pod-2"), seen_as=seen_as)


def test_internal_policy_local_without_endpoints_here_is_silent(proxy: Start, net: Net) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(net.service(internalTrafficPolicy="Local"), net.slice("remote-1"))
    p.check()
    net.expect_silence(net.at("cluster-ip"))
    p.put(net.slice("remote-1", "pod-1"))
    net.expect("client", net.at("cluster-ip"), ("pod-1",), seen_as="node")
    p.put(net.slice("remote-1"))
    net.expect_silence(net.at("cluster-ip"))
    p.check()


def test_internal_policy_local_does_not_concern_external_addresses(proxy: Start, net: Net) -> None:
    p = proxy()
    p.put(net.service(internalTrafficPolicy="Local"), net.slice("remote-1"))
    for frontend in EXTERNAL:
        net.expect("client", net.at(frontend), ("remote-1",), seen_as="node")


def test_external_policy_local_does_not_concern_the_cluster_ip(proxy: Start, net: Net) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(net.service(externalTrafficPolicy="Local"), net.slice("remote-1"))
    net.expect("client", net.at("cluster-ip"), ("remote-1",), seen_as="node")
    net.expect("pod-3", net.at("cluster-ip"), ("remote-1",), seen_as="pod-3")


# --- external IPs, load balancer IPs, node ports -------------------------------------------------


@any_detector
def test_external_policy_cluster_masquerades_everybody(
    proxy: Start, net: Net, detector: str | None
) -> None:
    p = proxy(**(DETECTORS[detector] if detector else {}))
    p.put(net.service(), net.slice("pod-1", "pod-2", "remote-1"))
    for client, frontend in product(CLIENTS, EXTERNAL):
        net.expect(client, net.at(frontend), ("pod-1", "pod-2", "remote-1"), seen_as="node")


@any_detector
def test_external_policy_local_keeps_an_outside_clients_address(
    proxy: Start, net: Net, detector: str | None
) -> None:
    p = proxy(**(DETECTORS[detector] if detector else {}))
    p.put(
        net.service(externalTrafficPolicy="Local"),
        net.slice("pod-1", "pod-2", "remote-1", "remote-2"),
    )
    p.check()
    for frontend in EXTERNAL:
        net.expect("client", net.at(frontend), ("pod-1", "pod-2"), seen_as="client")


@detectors
def test_external_policy_local_gives_pods_of_the_node_all_endpoints(
    proxy: Start, net: Net, detector: str
) -> None:
    p = proxy(**DETECTORS[detector])
    p.put(net.service(externalTrafficPolicy="Local"), net.slice("pod-1", "pod-2", "remote-1"))
    for frontend in EXTERNAL:
        net.expect("pod-3", net.at(frontend), ("pod-1", "pod-2", "remote-1"), seen_as="pod-3")


@any_detector
def test_external_policy_local_gives_the_node_all_endpoints_and_masquerades_it(
    proxy: Start, net: Net, node_second: str, detector: str | None
) -> None:
    p = proxy(**(DETECTORS[detector] if detector else {}))
    p.put(net.service(externalTrafficPolicy="Local"), net.slice("pod-1", "remote-1"))
    for frontend, source in product(EXTERNAL, (None, node_second)):
        net.expect("node", net.at(frontend), ("pod-1", "remote-1"), seen_as="node", source=source)


def test_external_policy_local_treats_pods_as_outside_without_a_detector(
    proxy: Start, net: Net
) -> None:
    p = proxy()
    p.put(net.service(externalTrafficPolicy="Local"), net.slice("pod-1", "remote-1"))
    for frontend in EXTERNAL:
        net.expect("pod-3", net.at(frontend), ("pod-1",), seen_as="pod-3")


def test_external_policy_local_without_endpoints_here_is_silent_only_outside(
    proxy: Start, net: Net
) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(net.service(externalTrafficPolicy="Local"), net.slice("remote-1", "remote-2"))
    p.check()
    for frontend in EXTERNAL:
        net.expect_silence(net.at(frontend), "client")
        net.expect("pod-3", net.at(frontend), ("remote-1", "remote-2"), seen_as="pod-3")
        net.expect("node", net.at(frontend), ("remote-1", "remote-2"), seen_as="node")


def test_external_policy_may_change(proxy: Start, net: Net) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(net.service(), net.slice("pod-1", "remote-1"))
    p.put(net.service(externalTrafficPolicy="Local"))
    for frontend in EXTERNAL:
        net.expect("client", net.at(frontend), ("pod-1",), seen_as="client")
        net.expect("pod-3", net.at(frontend), ("pod-1", "remote-1"), seen_as="pod-3")
    p.put(net.service())
    for frontend in EXTERNAL:
        net.expect("client", net.at(frontend), ("pod-1", "remote-1"), seen_as="node")
    p.check()


def test_an_endpoint_in_the_hosts_network_answers(proxy: Start, net: Net) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(net.service(externalTrafficPolicy="Local"), net.slice("node"))
    net.expect("pod-3", net.at("cluster-ip"), ("node",), seen_as="pod-3")
    net.expect("node", net.at("cluster-ip"), ("node",), seen_as="node")
    for frontend in EXTERNAL:
        net.expect("client", net.at(frontend), ("node",), seen_as="client")
        net.expect("node", net.at(frontend), ("node",), seen_as="node")


def test_an_external_ip_that_is_an_address_of_the_node_works_like_any(
    proxy: Start, net: Net, world: World
) -> None:
    p = proxy()
    world.add_address("node", net.external_ip)
    try:
        p.put(net.service(), net.slice("pod-1", "remote-1"))
        for client in CLIENTS:
            net.expect(client, net.at("external-ip"), ("pod-1", "remote-1"), seen_as="node")
        p.put(net.slice())
        net.expect_refusal(net.at("external-ip"))
    finally:
        world.remove_address("node", net.external_ip)


def test_a_balancer_in_proxy_mode_has_an_address_of_its_own(proxy: Start, net: Net) -> None:
    p = proxy()
    ingress = [
        {"ip": net.proxied_ip, "ipMode": "Proxy"},
        {"ip": net.balancer_ip, "ipMode": "VIP"},
        {"hostname": "lb.example.com"},
    ]
    p.put(net.service(ingress=ingress), net.slice("pod-1"))
    net.expect_silence((net.proxied_ip, 80))
    net.expect("client", net.at("balancer-ip"), ("pod-1",), seen_as="node")


def test_balancer_ips_count_whatever_the_services_type_is_now(proxy: Start, net: Net) -> None:
    """As kube-proxy has it: the status keeps them until the controller has cleaned up."""
    p = proxy()
    p.put(net.service(type="NodePort"), net.slice("pod-1"))
    net.expect("client", net.at("balancer-ip"), ("pod-1",), seen_as="node")
    net.expect("client", net.at("node-port"), ("pod-1",), seen_as="node")


def test_a_port_that_only_another_address_has_is_not_there(proxy: Start, net: Net) -> None:
    p = proxy()
    p.put(net.service(), net.slice("pod-1"))
    net.expect_refusal((net.address("node"), 80))
    net.expect_refusal((net.cluster_ip, NODE_PORT))
    net.expect_silence((net.external_ip, NODE_PORT))


# --- node ports: where ---------------------------------------------------------------------------


@pytest.fixture
def node_second(world: World, net: Net) -> Iterator[str]:
    """A second address of the node, one that endpoints do not answer."""
    world.add_address("node", net.second_ip)
    yield net.second_ip
    world.remove_address("node", net.second_ip)


def tell_addresses(p: Proxy) -> None:
    """What the agent does when the addresses of its machine change."""

    def read() -> Any:
        with route_socket() as route:
            return read_addresses(route)

    p.apply(p.world.run("node", read))


def test_node_ports_answer_at_the_primary_address_only(
    proxy: Start, net: Net, node_second: str
) -> None:
    p = proxy()
    tell_addresses(p)
    p.put(net.service(), net.slice("pod-1"))
    for client in CLIENTS:
        net.expect(client, net.at("node-port"), ("pod-1",), seen_as="node")
    net.expect_refusal((node_second, NODE_PORT))


def test_node_ports_answer_at_the_addresses_in_the_networks_only(
    proxy: Start, net: Net, node_second: str
) -> None:
    p = proxy(nodeport_addresses=("198.51.100.0/24", "fd80:198::/64"))
    tell_addresses(p)
    p.put(net.service(), net.slice("pod-1", "remote-1"))
    for client in CLIENTS:
        net.expect(client, (node_second, NODE_PORT), ("pod-1", "remote-1"), seen_as="node")
    net.expect_refusal(net.at("node-port"))


def test_node_ports_follow_the_addresses_of_the_node(proxy: Start, net: Net, world: World) -> None:
    p = proxy(nodeport_addresses=("0.0.0.0/0", "::/0"))
    tell_addresses(p)
    p.put(net.service(), net.slice("pod-1"))
    net.expect_silence((net.second_ip, NODE_PORT))
    world.add_address("node", net.second_ip)
    try:
        net.expect_refusal((net.second_ip, NODE_PORT))
        tell_addresses(p)
        p.check()
        for where in ((net.second_ip, NODE_PORT), net.at("node-port")):
            net.expect("client", where, ("pod-1",), seen_as="node")
    finally:
        world.remove_address("node", net.second_ip)
    tell_addresses(p)
    p.check()


def test_node_ports_at_all_addresses_include_local_routes_and_link_local_ones(
    proxy: Start, net: Net, world: World
) -> None:
    """As kube-proxy's `fib daddr type local` does."""
    p = proxy(nodeport_addresses=("0.0.0.0/0", "::/0"))
    p.put(net.service(), net.slice("pod-1"))

    def route(action: str) -> None:
        with IPRoute() as routes:
            loopback = routes.link_lookup(ifname="lo")[0]
            length = 32 if net.family == 4 else 128
            destination = f"{net.second_ip}/{length}"
            scope = 254 if net.family == 4 else 0
            routes.route(
                action, dst=destination, oif=loopback, type="local", table=255, scope=scope
            )

    world.run("node", route, "add")
    try:
        tell_addresses(p)
        net.expect("client", (net.second_ip, NODE_PORT), ("pod-1",), seen_as="node")
        if net.family == 4:  # an IPv6 one needs a zone index
            net.expect("pod-3", ("169.254.1.1", NODE_PORT), ("pod-1",), seen_as="node")
    finally:
        world.run("node", route, "del")
    tell_addresses(p)
    p.check()


def test_networks_of_one_family_give_no_node_ports_in_the_other(proxy: Start, net: Net) -> None:
    p = proxy(nodeport_addresses=("172.31.0.0/24",))
    tell_addresses(p)
    p.put(net.service(), net.slice("pod-1"))
    if net.family == 4:
        net.expect("client", net.at("node-port"), ("pod-1",), seen_as="node")
    else:
        net.expect_refusal(net.at("node-port"))


@pytest.mark.parametrize("networks", [(), ("0.0.0.0/0", "::/0"), ("127.0.0.0/8", "::1/128")])
def test_node_ports_do_not_answer_at_loopback_addresses(
    proxy: Start, net: Net, networks: tuple[str, ...]
) -> None:
    p = proxy(nodeport_addresses=networks)
    tell_addresses(p)
    p.put(net.service(), net.slice("pod-1", "node"))
    for address in {4: ("127.0.0.1", "127.0.0.2"), 6: ("::1",)}[net.family]:
        net.expect_refusal((address, NODE_PORT), "node")


def test_a_node_port_answers_in_the_families_that_the_service_has(proxy: Start, net: Net) -> None:
    p = proxy()
    other = {4: "fd00:10:96::10", 6: "10.96.0.10"}[net.family]
    p.put(net.service(cluster_ips=[other], externalIPs=[], ingress=[]), net.slice("pod-1"))
    net.expect_refusal(net.at("node-port"))


# --- loadBalancerSourceRanges --------------------------------------------------------------------

# client is in them; stranger, node and pods are not
CLIENT_RANGES = ["172.31.0.96/28", "fd00:172:31::100/120"]
NODE_RANGES = ["172.31.0.2/32", "fd00:172:31::2/128"]
POD_RANGES = ["10.244.1.0/24", "fd00:10:244:1::/64"]


@pytest.mark.parametrize("policy", ["Cluster", "Local"])
def test_a_balancer_ip_lets_in_the_source_ranges_only(proxy: Start, net: Net, policy: str) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(
        net.service(loadBalancerSourceRanges=CLIENT_RANGES, externalTrafficPolicy=policy),
        net.slice("pod-1"),
    )
    p.check()
    seen_as = "client" if policy == "Local" else "node"
    net.expect("client", net.at("balancer-ip"), ("pod-1",), seen_as=seen_as)
    net.expect_silence(net.at("balancer-ip"), "stranger", "pod-3", "node")


def test_source_ranges_do_not_guard_other_addresses(proxy: Start, net: Net) -> None:
    p = proxy()
    p.put(net.service(loadBalancerSourceRanges=CLIENT_RANGES), net.slice("pod-1"))
    for frontend in ("cluster-ip", "external-ip", "node-port"):
        for client in ("stranger", "pod-3", "node"):
            net.expect(client, net.at(frontend), ("pod-1",), seen_as=None)


def test_source_ranges_guard_each_port_and_only_their_service(proxy: Start, net: Net) -> None:
    p = proxy()
    neighbour = net.service(
        "neighbour",
        cluster_ips=[net.other_cluster_ip],
        externalIPs=[],
        ports=[{"name": "web", "port": 81}, {"name": "dns", "port": 81, "protocol": "UDP"}],
    )
    p.put(net.service(loadBalancerSourceRanges=CLIENT_RANGES), net.slice("pod-1"))
    p.put(neighbour, net.slice("pod-2", service="neighbour"))
    net.expect_silence(net.at("balancer-ip"), "stranger")
    net.expect("stranger", (net.balancer_ip, 81), ("pod-2",), seen_as="node")


def test_pods_and_the_node_are_let_in_where_the_ranges_have_them(proxy: Start, net: Net) -> None:
    p = proxy()
    p.put(net.service(loadBalancerSourceRanges=NODE_RANGES + POD_RANGES), net.slice("pod-1"))
    for client in ("pod-3", "node"):
        net.expect(client, net.at("balancer-ip"), ("pod-1",), seen_as="node")
    net.expect_silence(net.at("balancer-ip"), "client")


def test_a_balancer_ip_may_ask_itself_if_the_node_may(proxy: Start, net: Net, world: World) -> None:
    """Where a balancer delivers to its own address on the node, the node asks from it."""
    p = proxy()
    world.add_address("node", net.balancer_ip)
    try:
        p.put(net.service(loadBalancerSourceRanges=NODE_RANGES), net.slice("pod-1"))
        net.expect(
            "node", net.at("balancer-ip"), ("pod-1",), seen_as="node", source=net.balancer_ip
        )
        p.put(net.service(loadBalancerSourceRanges=CLIENT_RANGES))
        net.expect_silence(net.at("balancer-ip"), "node", source=net.balancer_ip)
    finally:
        world.remove_address("node", net.balancer_ip)


def test_ranges_may_overlap_touch_and_change(proxy: Start, net: Net) -> None:
    p = proxy()
    p.put(net.service(), net.slice("pod-1"))
    overlapping = [*CLIENT_RANGES, "172.31.0.96/29", "172.31.0.112/28", "fd00:172:31::100/121"]
    for ranges, let_in in (
        (CLIENT_RANGES, True),
        (overlapping, True),
        (NODE_RANGES, False),
        (["0.0.0.0/0", "::/0"], True),
        ([], True),
    ):
        p.put(net.service(loadBalancerSourceRanges=ranges))
        p.check()
        if let_in:
            net.expect("client", net.at("balancer-ip"), ("pod-1",), seen_as="node")
        else:
            net.expect_silence(net.at("balancer-ip"), "client")


def test_ranges_of_the_other_family_admit_no_client(proxy: Start, net: Net) -> None:
    p = proxy()
    p.put(
        net.service(loadBalancerSourceRanges=["::/0" if net.family == 4 else "0.0.0.0/0"]),
        net.slice("pod-1"),
    )
    net.expect_silence(net.at("balancer-ip"))


def test_a_client_outside_the_ranges_learns_nothing_of_missing_endpoints(
    proxy: Start, net: Net
) -> None:
    p = proxy()
    p.put(net.service(loadBalancerSourceRanges=CLIENT_RANGES), net.slice())
    net.expect_silence(net.at("balancer-ip"), "stranger")
    net.expect_refusal(net.at("balancer-ip"), "client")


def test_ranges_that_become_narrower_stop_a_udp_flow_that_has_had_no_answer(
    proxy: Start, net: Net, world: World
) -> None:
    """Conntrack knows the flow, so nat chains are not asked about it again."""
    deaf = 9999  # nothing answers, and a router on the path drops the ICMP error
    ports = [{"name": "dns", "port": deaf, "protocol": "UDP"}]
    p = proxy()
    p.put(
        net.service(loadBalancerSourceRanges=[*CLIENT_RANGES, "0.0.0.0/0", "::/0"]),
        net.slice("pod-1", ports=ports),
    )
    family = socket.AF_INET if net.family == 4 else socket.AF_INET6
    received = world.socket("pod-1", family, socket.SOCK_DGRAM)
    sender = world.socket("stranger", family, socket.SOCK_DGRAM)
    with received, sender:
        received.bind(("", deaf))
        received.settimeout(2)
        sender.sendto(b"before", net.at("balancer-ip"))
        assert received.recv(64) == b"before"
        p.put(net.service(loadBalancerSourceRanges=CLIENT_RANGES))
        received.settimeout(0.3)
        sender.sendto(b"after", net.at("balancer-ip"))
        with pytest.raises(TimeoutError):
            received.recv(64)
    p.check()


# --- no endpoint to answer -----------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["Cluster", "Local"])
@pytest.mark.parametrize("detector", [None, "ClusterCIDR"])
def test_a_service_without_endpoints_refuses_everybody(
    proxy: Start, net: Net, detector: str | None, policy: str
) -> None:
    p = proxy(**(DETECTORS[detector] if detector else {}))
    p.put(net.service(externalTrafficPolicy=policy, internalTrafficPolicy=policy))
    for frontend in ALL:
        net.expect_refusal(net.at(frontend))
    p.put(net.slice("pod-1"))
    for frontend in ALL:
        net.expect("client", net.at(frontend), ("pod-1",), seen_as=None)
    p.put(net.slice())
    p.check()
    for frontend in ALL:
        net.expect_refusal(net.at(frontend))


def test_tcp_learns_of_a_refusal_without_repeating_its_syn(proxy: Start, net: Net) -> None:
    """A program that just connects, as the world's own question looks for ICMP errors itself."""
    p = proxy()
    p.put(net.service())
    kind = socket.AF_INET6 if net.family == 6 else socket.AF_INET
    for client, frontend in product(CLIENTS, ALL):
        with net.world.socket(client, kind, socket.SOCK_STREAM) as sock:
            sock.settimeout(REFUSAL_SECONDS)
            with pytest.raises(ConnectionRefusedError):
                sock.connect(net.at(frontend))


def test_an_unknown_port_of_a_cluster_ip_is_refused(proxy: Start, net: Net) -> None:
    p = proxy()
    p.put(net.service(), net.slice("pod-1"))
    net.expect_refusal((net.cluster_ip, 81))


def test_a_port_is_known_for_its_protocol_only(proxy: Start, net: Net) -> None:
    p = proxy()
    p.put(net.service(ports=SERVICE_PORTS[:1]), net.slice("pod-1"))
    net.expect("client", net.at("cluster-ip"), ("pod-1",), seen_as=None, protocols=("tcp",))
    assert (
        net.ask("client", net.at("cluster-ip"), "udp", timeout=REFUSAL_SECONDS).outcome == "refused"
    )


def test_an_unallocated_cluster_ip_is_silent(proxy: Start, net: Net) -> None:
    p = proxy()
    p.put(net.service(), net.slice("pod-1"))
    net.expect_silence((net.unallocated_ip, 80))


def test_an_unallocated_cluster_ip_is_dropped_on_the_node(
    proxy: Start, net: Net, world: World
) -> None:
    """The packet is not merely lost: an address that would answer is not reached either."""
    p = proxy()
    with served_at(world, "elsewhere", net.unallocated_ip):
        net.expect_silence((net.unallocated_ip, TARGET_PORT))
        p.delete(manifest.service_cidr(name="kubernetes"))
        net.expect("client", (net.unallocated_ip, TARGET_PORT), ("elsewhere",), seen_as="client")


@contextlib.contextmanager
def served_at(world: World, host: str, address: str) -> Iterator[None]:
    """The host has the address and answers there, and the node has a route to it."""
    length = 128 if ":" in address else 32

    def route(action: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        gateway = world.hosts[host].address(family)
        with IPRoute() as iproute:
            iproute.route(action, dst=f"{address}/{length}", family=family, gateway=gateway)

    with contextlib.ExitStack() as stack:
        world.add_address(host, address)
        stack.callback(world.remove_address, host, address)
        world.run("node", route, "add")
        stack.callback(world.run, "node", route, "del")
        for protocol in PROTOCOLS:
            stack.enter_context(world.serve(host, TARGET_PORT, protocol, address=address))
        yield


def test_a_deleted_service_is_silent_and_a_new_one_answers(proxy: Start, net: Net) -> None:
    p = proxy()
    for _ in range(2):
        p.put(net.service(), net.slice("pod-1"))
        net.expect("client", net.at("cluster-ip"), ("pod-1",), seen_as="client")
        p.delete(net.service())
        p.check()
        net.expect_silence(net.at("cluster-ip"))
        net.expect_silence(net.at("external-ip"))
        net.expect_refusal(net.at("node-port"))  # no process listens there


def test_other_traffic_passes_untouched(proxy: Start, net: Net) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(net.service(), net.slice("pod-1"))
    for client in CLIENTS:
        for server in ("pod-1", "remote-1", "node"):
            where = (net.address(server), TARGET_PORT)
            net.expect(client, where, (server,), seen_as=client)


@pytest.mark.parametrize("proxy_name", ["", "other"])
def test_services_of_another_proxy_are_left_to_it(proxy: Start, net: Net, proxy_name: str) -> None:
    p = proxy(proxy_name=proxy_name)
    service = manifest.service_document(cluster_ips=[net.cluster_ip], ports=SERVICE_PORTS)
    slices = manifest.slice_document(
        "web", [net.endpoint("pod-1")], ports=SLICE_PORTS, family=f"IPv{net.family}"
    )
    service["metadata"]["labels"] = {PROXY_NAME_LABEL: "other"}
    for document in (service, slices):
        p.put(decode(document["kind"], msgspec.json.encode(document)))
    own = net.service("own", cluster_ips=[net.other_cluster_ip])
    p.put(own, net.slice("pod-2", service="own"))
    answering, silent = (net.cluster_ip, "pod-1"), net.other_cluster_ip
    if not proxy_name:
        answering, silent = (net.other_cluster_ip, "pod-2"), net.cluster_ip
    net.expect("client", (answering[0], 80), (answering[1],), seen_as="client")
    net.expect_silence((silent, 80))


def test_a_service_with_a_cluster_ip_and_the_headless_label_is_served(
    proxy: Start, net: Net
) -> None:
    """Only EndpointSlices are selected by that label; its slices here do not have it."""
    document = manifest.service_document(cluster_ips=[net.cluster_ip], ports=SERVICE_PORTS)
    document["metadata"]["labels"] = {HEADLESS_LABEL: ""}
    p = proxy()
    p.put(manifest.of(document), net.slice("pod-1"))
    net.expect("client", net.at("cluster-ip"), ("pod-1",), seen_as="client")


def test_slices_with_a_proxy_name_count_and_headless_ones_do_not(proxy: Start, net: Net) -> None:
    p = proxy()
    p.put(net.service(), net.slice("pod-1"))
    for pod, label in (("pod-2", PROXY_NAME_LABEL), ("pod-4", HEADLESS_LABEL)):
        document = manifest.slice_document(
            "web",
            [net.endpoint(pod)],
            name=f"web-{pod}",
            ports=SLICE_PORTS,
            family=f"IPv{net.family}",
        )
        document["metadata"]["labels"][label] = "any"
        p.put(manifest.of(document))
    net.expect("client", net.at("cluster-ip"), ("pod-1", "pod-2"), seen_as="client")


def test_external_addresses_of_a_family_without_a_cluster_ip_are_left_alone(
    proxy: Start, net: Net, world: World
) -> None:
    """Whatever else answers there, another load balancer for instance."""
    other = Net(world, 10 - net.family)
    p = proxy()
    p.put(
        net.service(cluster_ips=[other.cluster_ip], ports=[{"name": "web", "port": 80}]),
        net.slice("pod-1"),
        other.slice("pod-2"),
    )
    assert p.in_kernel()[SETS[net.family].service_ips] == {}
    assert p.in_kernel()[SETS[net.family].reject_ips] == {}
    for frontend in ("external-ip", "balancer-ip"):
        net.expect_silence(net.at(frontend))


def test_external_ips_are_not_served_where_the_cluster_does_not_allow_them(
    proxy: Start, net: Net
) -> None:
    p = proxy(allow_service_external_ips=False)
    p.put(net.service(), net.slice("pod-1"))
    net.expect_silence(net.at("external-ip"))
    net.expect("client", net.at("balancer-ip"), ("pod-1",), seen_as="node")
    net.expect("client", net.at("cluster-ip"), ("pod-1",), seen_as="client")


def test_names_may_begin_with_a_digit(proxy: Start, net: Net) -> None:
    """KEP-5311 (RelaxedServiceNameValidation)."""
    p = proxy()
    p.put(net.service("1web"), net.slice("pod-1", service="1web"))
    net.expect("client", net.at("cluster-ip"), ("pod-1",), seen_as="client")


# --- which endpoints -----------------------------------------------------------------------------

# conditions of an endpoint: (ready, serving, terminating)
READY = (True, True, False)
UNSAID = (None, None, None)
STARTING = (False, False, False)
NOT_READY_SERVING = (False, True, False)
LEAVING = (False, True, True)
GONE = (False, False, True)
NO_ENDPOINT: tuple[str, ...] = ()

# pod-1, pod-2, remote-1; who answers under policy Cluster; who under policy Local
CONDITIONS = {
    "all ready": ((READY, READY, READY), ("pod-1", "pod-2", "remote-1"), ("pod-1", "pod-2")),
    "unsaid is ready": (
        (UNSAID, UNSAID, STARTING),
        ("pod-1", "pod-2"),
        ("pod-1", "pod-2"),
    ),
    "serving is not ready": (
        (NOT_READY_SERVING, READY, NOT_READY_SERVING),
        ("pod-2",),
        ("pod-2",),
    ),
    "serving is not leaving": ((NOT_READY_SERVING,) * 3, NO_ENDPOINT, NO_ENDPOINT),
    "leaving not while ready": ((READY, LEAVING, LEAVING), ("pod-1",), ("pod-1",)),
    "all leaving": ((LEAVING, GONE, LEAVING), ("pod-1", "remote-1"), ("pod-1",)),
    "leaving beside starting": ((LEAVING, STARTING, STARTING), ("pod-1",), ("pod-1",)),
    "leaving here, ready elsewhere": ((LEAVING, GONE, READY), ("remote-1",), ("pod-1",)),
    "all gone": ((GONE, GONE, GONE), NO_ENDPOINT, NO_ENDPOINT),
}


@pytest.mark.parametrize("case", CONDITIONS)
def test_conditions_decide_which_endpoints_answer(proxy: Start, net: Net, case: str) -> None:
    conditions, cluster, local = CONDITIONS[case]
    p = proxy()
    endpoints = [
        net.endpoint(host, ready=ready, serving=serving, terminating=terminating)
        for host, (ready, serving, terminating) in zip(
            ("pod-1", "pod-2", "remote-1"), conditions, strict=True
        )
    ]
    for policy, answering in (("Cluster", cluster), ("Local", local)):
        p.put(net.service(externalTrafficPolicy=policy), net.slice(*endpoints))
        if answering:
            net.expect("client", net.at("external-ip"), answering, seen_as=None)
        else:
            net.expect_refusal(net.at("external-ip"))


def test_policy_local_is_silent_where_only_others_leave(proxy: Start, net: Net) -> None:
    p = proxy()
    leaving = net.endpoint("remote-1", ready=False, serving=True, terminating=True)
    p.put(net.service(externalTrafficPolicy="Local"), net.slice(leaving, "remote-1"))
    p.put(net.slice(leaving))
    net.expect_silence(net.at("external-ip"), "client")
    net.expect("node", net.at("external-ip"), ("remote-1",), seen_as="node")


A, B = {"for_zones": ["a"]}, {"for_zones": ["b"]}
HERE, THERE = {"for_nodes": ["node-1"]}, {"for_nodes": ["node-2"]}
UNREADY = {"ready": False}

# hints of pod-1, pod-2, remote-1 on a node in zone a; who answers under policy Cluster
HINTS = {
    "for this zone": ((A, B, A), ("pod-1", "remote-1")),
    "for several zones": (
        (B, {"for_zones": ["b", "a"]}, B),
        ("pod-2",),
    ),
    "for other zones only": ((B, B, B), ("pod-1", "pod-2", "remote-1")),
    "missing at one": ((A, B, {}), ("pod-1", "pod-2", "remote-1")),
    "missing at one that is not ready": ((A, B, UNREADY), ("pod-1",)),
    "of one that is not ready": ((A | UNREADY, B, B), ("pod-2", "remote-1")),
    "for this node": ((HERE, THERE, THERE), ("pod-1",)),
    "for other nodes only": ((THERE, THERE, THERE), ("pod-1", "pod-2", "remote-1")),
    "for nodes, missing at one": ((HERE, THERE, {}), ("pod-1", "pod-2", "remote-1")),
    "node before zone": ((B | HERE, A | THERE, A | THERE), ("pod-1",)),
    "zone, as no node is this": ((B | THERE, A | THERE, A | THERE), ("pod-2", "remote-1")),
    "zone, as a node is missing": ((B | HERE, A | THERE, A), ("pod-2", "remote-1")),
}


@pytest.mark.parametrize("case", HINTS)
def test_hints_narrow_the_cluster_list_if_they_are_complete(
    proxy: Start, net: Net, case: str
) -> None:
    hints, answering = HINTS[case]
    p = proxy()
    endpoints = [
        net.endpoint(host, **hint)
        for host, hint in zip(("pod-1", "pod-2", "remote-1"), hints, strict=True)
    ]
    p.put(manifest.node(zone="a"), net.service(), net.slice(*endpoints))
    for frontend in ("cluster-ip", "external-ip"):
        net.expect("node", net.at(frontend), answering, seen_as="node")


def test_hints_do_not_narrow_the_local_list(proxy: Start, net: Net) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    endpoints = [net.endpoint("pod-1", **A), net.endpoint("pod-2", **B)]
    p.put(
        manifest.node(zone="a"),
        net.service(externalTrafficPolicy="Local", internalTrafficPolicy="Local"),
        net.slice(*endpoints, net.endpoint("remote-1", **A)),
    )
    net.expect("client", net.at("external-ip"), ("pod-1", "pod-2"), seen_as="client")
    net.expect("client", net.at("cluster-ip"), ("pod-1", "pod-2"), seen_as="node")
    net.expect("pod-3", net.at("external-ip"), ("pod-1", "remote-1"), seen_as="pod-3")


def test_hints_follow_the_nodes_zone(proxy: Start, net: Net) -> None:
    p = proxy()
    p.put(net.service(), net.slice(net.endpoint("pod-1", **A), net.endpoint("pod-2", **B)))
    # a Node that loses its zone keeps the last one
    for zone, answering in (("a", ("pod-1",)), ("b", ("pod-2",)), ("", ("pod-2",))):
        p.put(manifest.node(zone=zone))
        net.expect("pod-3", net.at("cluster-ip"), answering, seen_as="pod-3")


def test_endpoints_come_and_go(proxy: Start, net: Net) -> None:
    p = proxy()
    p.put(net.service())
    everyone = ("pod-1", "pod-2", "pod-4", "pod-5", "remote-1", "remote-2", "remote-3")
    steps = (everyone[:1], everyone[:4], everyone, everyone[3:], everyone[5:], everyone[::-2])
    for hosts in steps:
        p.put(net.slice(*hosts))
        p.check()
        net.expect("node", net.at("cluster-ip"), hosts, seen_as="node")


# --- slices and ports ----------------------------------------------------------------------------


def test_a_service_has_the_endpoints_of_all_its_slices(proxy: Start, net: Net) -> None:
    p = proxy()
    first = net.slice("pod-1", "pod-2", name="web-1")
    second = net.slice("remote-1", name="web-2")
    p.put(net.service(), first, second, net.slice("remote-2", service="other"))
    net.expect("node", net.at("cluster-ip"), ("pod-1", "pod-2", "remote-1"), seen_as="node")
    p.delete(first)
    net.expect("node", net.at("cluster-ip"), ("remote-1",), seen_as="node")
    p.check()


@pytest.mark.parametrize("order", ["web-1", "web-3"])
def test_an_address_in_two_slices_counts_once_and_its_ready_copy_wins(
    proxy: Start, net: Net, order: str
) -> None:
    p = proxy()
    both = net.slice("pod-1", "pod-2", name="web-2")
    unready = net.slice(net.endpoint("pod-1", ready=False), name=order)
    p.put(net.service(externalIPs=[], ingress=[], ports=[{"name": "web", "port": 80}]))
    p.put(both, unready)
    p.check()
    assert len(p.kernel.elements(SETS[net.family].endpoints)) == 2
    net.expect("node", net.at("cluster-ip"), ("pod-1", "pod-2"), seen_as="node", protocols=("tcp",))
    p.delete(both)
    p.put(net.slice("pod-2", name="web-2"))
    net.expect("node", net.at("cluster-ip"), ("pod-2",), seen_as="node", protocols=("tcp",))


@pytest.fixture
def special_ports(world: World) -> Iterator[None]:
    """Only pod-1 also answers at 9001, and only pod-2 at 9002."""
    with contextlib.ExitStack() as stack:
        for protocol in PROTOCOLS:
            stack.enter_context(world.serve("pod-1", 9001, protocol))
            stack.enter_context(world.serve("pod-2", 9002, protocol))
        yield


def both_protocols(port: int) -> list[dict[str, Any]]:
    """Ports of a slice that lead `web` and `dns` to one target port."""
    return [{**entry, "port": port} for entry in SLICE_PORTS]


@pytest.mark.usefixtures("special_ports")
def test_a_named_target_port_may_differ_between_slices(proxy: Start, net: Net) -> None:
    p = proxy()
    p.put(
        net.service(),
        net.slice("pod-1", name="web-1", ports=both_protocols(9001)),
        net.slice("pod-2", name="web-2", ports=both_protocols(9002)),
        net.slice("remote-1", name="web-3"),
    )
    for frontend in ALL:
        net.expect("node", net.at(frontend), ("pod-1", "pod-2", "remote-1"), seen_as="node")


@pytest.mark.usefixtures("special_ports")
def test_ports_of_a_service_have_endpoints_of_their_own(proxy: Start, net: Net) -> None:
    p = proxy()
    ports = [
        {"name": "web", "port": 80},
        {"name": "admin", "port": 443},
        {"name": "other", "port": 444},
    ]
    slices = [
        {"name": "web", "port": TARGET_PORT},
        {"name": "admin", "port": 9001},
        {"name": "unknown", "port": 9002},
    ]
    p.put(net.service(ports=ports), net.slice("pod-1", "remote-1", ports=slices))
    tcp = {"protocols": ("tcp",), "seen_as": "node"}
    net.expect("node", (net.cluster_ip, 80), ("pod-1", "remote-1"), **tcp)
    net.expect_refusal((net.cluster_ip, 444))
    p.put(net.slice("pod-1", ports=slices))
    net.expect("node", (net.cluster_ip, 443), ("pod-1",), **tcp)


@pytest.mark.parametrize(
    "ports",
    [[], [{"name": "web"}, {"name": "dns", "protocol": "UDP"}], [{"name": "", "port": 8080}]],
    ids=["no ports", "no numbers", "another name"],
)
def test_a_slice_without_the_port_gives_no_endpoints(
    proxy: Start, net: Net, ports: list[dict[str, Any]]
) -> None:
    p = proxy()
    p.put(net.service(), net.slice("pod-1", ports=ports))
    net.expect_refusal(net.at("cluster-ip"))
    p.put(net.slice("pod-2", name="web-2"))
    net.expect("client", net.at("cluster-ip"), ("pod-2",), seen_as="client")


def test_only_the_first_address_of_an_endpoint_counts(proxy: Start, net: Net) -> None:
    p = proxy()
    endpoint = net.endpoint("pod-1")
    endpoint["addresses"].append(net.address("pod-2"))
    p.put(net.service(), net.slice(endpoint))
    net.expect("client", net.at("cluster-ip"), ("pod-1",), seen_as="client")


def test_each_family_has_its_own_slices(proxy: Start, world: World) -> None:
    p = proxy()
    four, six = Net(world, 4), Net(world, 6)
    p.put(four.service(cluster_ips=[four.cluster_ip, six.cluster_ip]))
    p.put(four.slice("pod-1", name="web-4"), six.slice("pod-2", name="web-6"))
    four.expect("client", four.at("cluster-ip"), ("pod-1",), seen_as="client")
    six.expect("client", six.at("cluster-ip"), ("pod-2",), seen_as="client")
    six.expect("client", six.at("node-port"), ("pod-2",), seen_as="node")
    p.put(six.slice(name="web-6"))
    six.expect_refusal(six.at("cluster-ip"))
    four.expect("client", four.at("cluster-ip"), ("pod-1",), seen_as="client")


@pytest.mark.parametrize("frontend", ALL)
def test_sctp_has_its_elements(proxy: Start, net: Net, frontend: str) -> None:
    """This kernel has no SCTP sockets, so the elements have to do."""
    p = proxy()
    ports = [{"name": "sctp", "port": 80, "nodePort": NODE_PORT, "protocol": "SCTP"}]
    target = [{"name": "sctp", "port": TARGET_PORT, "protocol": "SCTP"}]
    p.put(net.service(ports=ports), net.slice("pod-1", "remote-1", ports=target))
    p.check()
    sets, node_port = SETS[net.family], frontend == "node-port"
    address, port = net.at(frontend)
    key = destination_key(b"" if node_port else net.packed(address), SCTP, port)
    verdicts = p.kernel.elements(sets.service_nodeports if node_port else sets.service_ips)
    endpoints = p.kernel.elements(sets.endpoint_map(node_port=node_port, inside=False))
    style = "" if frontend == "cluster-ip" else "masq-"
    assert verdicts[key] == balancer(
        2, style=style, node_port=node_port, inside=False, sticky=False
    )
    assert {target for slot, target in endpoints.items() if slot.startswith(key)} == {
        target_of(net.packed(net.address(host)), TARGET_PORT) for host in ("pod-1", "remote-1")
    }


# --- one address, two Services -------------------------------------------------------------------


def rivals(net: Net) -> tuple[Any, Any]:
    """Two Services that want one external IP, one balancer IP and one node port; the older one
    is later by name."""
    older = net.service("older", created="2026-01-01T00:00:00Z")
    younger = net.service(
        "another", created="2026-01-02T00:00:00Z", cluster_ips=[net.other_cluster_ip]
    )
    return older, younger


@pytest.mark.parametrize("older_first", [True, False])
def test_the_older_of_two_services_has_a_contested_address(
    proxy: Start, net: Net, older_first: bool
) -> None:
    p = proxy()
    older, younger = rivals(net)
    p.put(net.slice("pod-1", service="older"), net.slice("pod-2", service="another"))
    for service in (older, younger) if older_first else (younger, older):
        p.put(service)
    p.check()
    for frontend in EXTERNAL:
        net.expect("client", net.at(frontend), ("pod-1",), seen_as="node")
    net.expect("client", (net.other_cluster_ip, 80), ("pod-2",), seen_as="client")


def test_a_deleted_service_hands_its_addresses_over_and_takes_them_back(
    proxy: Start, net: Net
) -> None:
    p = proxy()
    older, younger = rivals(net)
    p.put(older, younger)
    p.put(net.slice("pod-1", service="older"), net.slice("pod-2", service="another"))
    for _ in range(2):
        p.delete(older)
        p.check()
        for frontend in EXTERNAL:
            net.expect("client", net.at(frontend), ("pod-2",), seen_as="node")
        p.put(older)
        p.check()
        for frontend in EXTERNAL:
            net.expect("client", net.at(frontend), ("pod-1",), seen_as="node")


def test_two_services_share_an_address_at_different_ports(proxy: Start, net: Net) -> None:
    p = proxy()
    ports = [{"name": "web", "port": 81}, {"name": "dns", "port": 81, "protocol": "UDP"}]
    p.put(net.service(), net.slice("pod-1"))
    p.put(
        net.service("another", cluster_ips=[net.other_cluster_ip], ports=ports),
        net.slice("pod-2", service="another"),
    )
    net.expect("client", (net.external_ip, 80), ("pod-1",), seen_as="node")
    net.expect("client", (net.external_ip, 81), ("pod-2",), seen_as="node")


# --- connections and marks -----------------------------------------------------------------------


class Conversations:
    """TCP connections to a listener on pod-1 that stay open. Use as a context manager."""

    def __init__(self, net: Net, port: int) -> None:
        self._net = net
        self._kind = socket.AF_INET6 if net.family == 6 else socket.AF_INET
        self._stack = contextlib.ExitStack()
        self._listener = self._socket("pod-1")
        self._listener.bind((net.address("pod-1"), port))
        self._listener.listen()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []

    def _socket(self, host: str) -> socket.socket:
        opened = self._net.world.socket(host, self._kind, socket.SOCK_STREAM)
        opened.settimeout(5)
        return self._stack.enter_context(opened)

    def __enter__(self) -> Conversations:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def open(self, client: str, where: tuple[str, int]) -> None:
        near = self._socket(client)
        near.connect(where)
        far, _ = self._listener.accept()
        far.settimeout(5)
        self._pairs.append((near, self._stack.enter_context(far)))

    def expect_all_to_work(self) -> None:
        """In each of them, what the client sends reaches the endpoint and returns."""
        for near, far in self._pairs:
            near.sendall(b"question")
            far.sendall(far.recv(100))
            assert near.recv(100) == b"question"


def test_a_tcp_connection_continues_when_its_endpoint_is_removed(proxy: Start, net: Net) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    p.put(net.service(), net.slice("pod-1", ports=both_protocols(9003)))
    changes = (
        lambda: None,
        lambda: p.put(net.slice("pod-2")),
        lambda: p.put(net.slice()),
        lambda: p.delete(net.service()),
    )
    with Conversations(net, 9003) as conversations:
        for client, frontend in product(CLIENTS, ALL):
            conversations.open(client, net.at(frontend))
        for change in changes:
            change()
            conversations.expect_all_to_work()


def test_a_udp_flow_stays_with_its_endpoint(proxy: Start, net: Net, world: World) -> None:
    p = proxy()
    p.put(net.service(), net.slice("pod-1", "pod-2", "remote-1"))
    for port in (9100, 9101, 9102):
        servers = {
            world.ask("node", *net.at("cluster-ip"), "udp", source_port=port).server
            for _ in range(20)
        }
        assert len(servers) == 1


def nft(commands: str) -> None:
    """Runs nft commands in the namespace of the calling thread."""
    nftables = pytest.importorskip("nftables")
    code, _, error = nftables.Nftables().cmd(commands)
    assert code == 0, error


@pytest.mark.parametrize("bit", [0, 14, 15, 31])
def test_masquerading_uses_the_configured_bit_and_clears_it(
    proxy: Start, net: Net, world: World, bit: int
) -> None:
    """And leaves the bits of others as they were: a packet without them is dropped at the end."""
    p = proxy(masquerade_bit=bit)
    p.put(net.service(), net.slice("pod-1", "remote-1"))
    others = 0xFFFFFFFF & ~(1 << bit)
    commands = "\n".join(
        (
            "add table inet other",
            "add chain inet other first { type filter hook prerouting priority -150; }",
            f"add rule inet other first ct direction original meta mark set {others:#x}",
            "add chain inet other last { type filter hook postrouting priority 150; }",
            f"add rule inet other last ct direction original meta mark != {others:#x} drop",
        )
    )
    world.run("node", nft, commands)
    try:
        for client in ("pod-3", "client"):
            net.expect(client, net.at("external-ip"), ("pod-1", "remote-1"), seen_as="node")
    finally:
        world.run("node", nft, "delete table inet other")


def test_a_mark_of_another_bit_does_not_masquerade(proxy: Start, net: Net, world: World) -> None:
    p = proxy(masquerade_bit=15)
    p.put(net.service(), net.slice("pod-1"))
    commands = "\n".join(
        (
            "add table inet other",
            "add chain inet other first { type filter hook prerouting priority -150; }",
            "add rule inet other first meta mark set 0x4000",
        )
    )
    world.run("node", nft, commands)
    try:
        net.expect("client", net.at("cluster-ip"), ("pod-1",), seen_as="client")
        net.expect("client", net.at("external-ip"), ("pod-1",), seen_as="node")
    finally:
        world.run("node", nft, "delete table inet other")
