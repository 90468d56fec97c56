"""The examples are in order, fit the demo, and can be rendered and asked about."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from agent.cli.main import main
from agent.sources.manifests.follower import read
from lab import questions
from lab.world import World
from rules.objects import EndpointSlice, Node, Service, ServiceCIDR, address_text

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted(EXAMPLES.glob("*.yaml"))
NODE = ["--node", "node-1", "--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48"]
API_VERSIONS = {
    "Service": "v1",
    "Node": "v1",
    "EndpointSlice": "discovery.k8s.io/v1",
    "ServiceCIDR": "networking.k8s.io/v1",
}
OBJECTS = read([str(EXAMPLES)]).objects


def sliceproxy(*arguments: str) -> Result:
    result = CliRunner().invoke(main, [*arguments, "--from", str(EXAMPLES), *NODE])
    # 1: a client is refused or dropped
    assert result.exit_code in (0, 1), (result.output, result.exception)
    assert not result.stderr
    return result


def of_kind(kind):
    return [item for item in OBJECTS if isinstance(item, kind)]


def test_there_is_a_cluster():
    names = [file.stem for file in FILES]
    assert names == ["cluster", "dns", "empty", "sessions", "shop", "web"]
    assert [str(s.name) for s in of_kind(Service)] == [
        *("kube-system/dns", "default/empty", "default/sessions", "default/shop", "default/web"),
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_object_decodes_without_problems(file):
    content = read([str(file)])
    assert not content.problems
    assert not [item.problems for item in content.objects if item.problems]
    documents = list(yaml.safe_load_all(file.read_text()))
    assert len(content.objects) == len(documents)
    for document in documents:
        assert document["apiVersion"] == API_VERSIONS[document["kind"]]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_file_starts_with_a_comment_and_is_narrow(file):
    lines = file.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert max(map(len, lines)) <= 100


def test_every_slice_belongs_to_a_service_and_fits_it():
    services = {service.name: service for service in of_kind(Service)}
    for piece in of_kind(EndpointSlice):
        service = services[piece.service]
        assert {(p.name, p.protocol) for p in piece.ports} == {
            (p.name, p.protocol) for p in service.ports
        }
        assert piece.family in {4 if len(a) == 4 else 6 for a in service.cluster_ips}


def test_cluster_ips_are_in_the_service_cidrs():
    networks = [network for item in of_kind(ServiceCIDR) for network in item.cidrs]
    for service in of_kind(Service):
        for address in map(ipaddress.ip_address, service.cluster_ips):
            assert any(address in network for network in networks), service.name


def test_endpoints_and_nodes_are_where_the_world_has_them():
    hosts = World(pods=6, remotes=8).hosts
    played_by = {pod: hosts[name] for name, pod in questions.PODS.items()}
    (node,) = of_kind(Node)
    assert [address_text(a) for a in node.addresses] == [hosts["node"].ipv4, hosts["node"].ipv6]
    for piece in of_kind(EndpointSlice):
        for endpoint in piece.endpoints:
            host = played_by[endpoint.pod]
            assert address_text(endpoint.address) in (host.ipv4, host.ipv6)
            assert endpoint.node == {"node": "node-1", "elsewhere": "node-2"}[host.machine]


def test_it_renders():
    output = sliceproxy("render").output
    assert "10.96.0.80 . tcp . 80 . 3 : 10.244.2.12 . 8080" in output
    assert "fd00:10:96::80 . tcp . 80 . 3 : fd00:10:244:2::12 . 8080" in output


@pytest.mark.parametrize(
    "service",
    ["kube-system/dns", "default/empty", "default/sessions", "default/shop", "default/web"],
)
def test_its_endpoints_can_be_shown(service):
    assert sliceproxy("endpoints", service).output


@pytest.mark.parametrize(
    "target",
    ["10.96.0.80:80", "172.31.0.2:30080", "10.96.0.10:53/udp", "203.0.113.44:80", "10.96.0.99:80"],
)
def test_its_addresses_can_be_explained(target):
    assert sliceproxy("explain", target).output
