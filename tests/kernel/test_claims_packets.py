"""Who answers at an address that two Services claim, asked with packets."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rules.objects import Service
from tests.kernel.conftest import CLUSTER_CIDR, NODE_PORT, Net
from tests.kernel.proxy import Proxy

Start = Callable[..., Proxy]
OLD, YOUNG = "2026-01-01T00:00:00Z", "2026-02-02T00:00:00Z"


def tenant(net: Net, **fields: object) -> Service:
    """An older Service of another tenant, with a cluster IP of its own."""
    plain = {"cluster_ips": [net.other_cluster_ip], "type": "ClusterIP", "ingress": []}
    return net.service("tenant", created=OLD, **{**plain, **fields})


@pytest.mark.parametrize("first", ["tenant", "web"])
def test_an_older_services_external_ip_does_not_take_a_cluster_ip(
    proxy: Start, net: Net, first: str
) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    thief = tenant(net, externalIPs=[net.cluster_ip]), net.slice("pod-4", service="tenant")
    web = net.service(created=YOUNG), net.slice("pod-1", "pod-2")
    for objects in (thief, web) if first == "tenant" else (web, thief):
        p.put(*objects)
    net.expect("pod-3", net.at("cluster-ip"), ("pod-1", "pod-2"), seen_as="pod-3")


def test_an_older_services_external_ip_does_not_take_a_node_port(proxy: Start, net: Net) -> None:
    """The node's own address, at another Service's node port; once that is gone, it is served."""
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    ports = [
        {"name": "web", "port": NODE_PORT},
        {"name": "dns", "port": NODE_PORT, "protocol": "UDP"},
    ]
    own = [net.address("node")]
    web = net.service(created=YOUNG)
    p.put(tenant(net, externalIPs=own, ports=ports), net.slice("pod-4", service="tenant"))
    p.put(web, net.slice("pod-1", "pod-2"))
    net.expect("client", net.at("node-port"), ("pod-1", "pod-2"), seen_as="node")
    p.delete(web)
    net.expect("client", net.at("node-port"), ("pod-4",), seen_as="node")


def test_of_two_external_ips_the_one_with_endpoints_serves(proxy: Start, net: Net) -> None:
    p = proxy(cluster_cidr=CLUSTER_CIDR)
    older = tenant(net, externalIPs=[net.external_ip])
    p.put(older, net.service(created=YOUNG), net.slice("pod-1", "pod-2"))
    net.expect("client", net.at("external-ip"), ("pod-1", "pod-2"), seen_as="node")
    p.put(net.slice("pod-4", service="tenant"))
    net.expect("client", net.at("external-ip"), ("pod-4",), seen_as="node")
