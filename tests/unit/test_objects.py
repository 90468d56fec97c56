"""Decoding: valid objects, unusable values, and what is no object at all."""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules.decode import KINDS, decode, decode_any, shallow
from rules.objects import (
    DEFAULT_AFFINITY_SECONDS,
    READY,
    SCTP,
    SERVING,
    TCP,
    TERMINATING,
    UDP,
    Endpoint,
    EndpointSlice,
    InvalidObject,
    Name,
    Node,
    Service,
    ServiceCIDR,
    ServicePort,
    SlicePort,
    parse_address,
    parse_network,
    parse_plain,
)
from tests import manifest
from tests.fuzzing import fuzzed

RECORDINGS = sorted((Path(__file__).parent.parent / "recordings").glob("*list-*.json"))
KIND_OF = {
    "ServiceList": Service,
    "EndpointSliceList": EndpointSlice,
    "NodeList": Node,
    "ServiceCIDRList": ServiceCIDR,
}


def packed(text: str) -> bytes:
    return ipaddress.ip_address(text).packed


def service(change: dict[str, Any] | None = None, **spec: Any) -> Service:
    """A Service whose spec has these fields, whose document has those changes."""
    document = {**manifest.service_document(), **(change or {})}
    document["spec"].update(spec)
    result = decode("Service", json.dumps(document).encode())
    assert isinstance(result, Service)
    return result


def slice_of(*endpoints: Any, **fields: Any) -> EndpointSlice:
    """A slice with these endpoints, documents or addresses; `fields` replace those of the top."""
    documents = [manifest.endpoint(e) if isinstance(e, str) else e for e in endpoints]
    document = {**manifest.slice_document("web", documents, family="IPv4"), **fields}
    result = decode("EndpointSlice", json.dumps(document).encode())
    assert isinstance(result, EndpointSlice)
    return result


# --- recordings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda p: p.stem)
def test_what_an_api_server_said_decodes_without_a_problem(path):
    found = list(decode_any(path.read_bytes()))
    document = json.loads(path.read_bytes())
    assert len(found) == len(document["items"]) > 0
    assert not [o for o in found if isinstance(o, InvalidObject)]
    assert {type(o) for o in found} == {KIND_OF[document["kind"]]}
    assert [problem for o in found for problem in o.problems] == []


def test_every_endpoint_of_a_recording_is_there():
    data = next(p for p in RECORDINGS if p.stem == "list-endpointslices").read_bytes()
    items = {
        (i["metadata"]["namespace"], i["metadata"]["name"]): i for i in json.loads(data)["items"]
    }
    for found in decode_any(data):
        item = items[tuple(found.name)]
        assert found.service.name == item["metadata"]["labels"]["kubernetes.io/service-name"]
        addresses = [packed(e["addresses"][0]) for e in item.get("endpoints") or ()]
        assert [e.address for e in found.endpoints] == addresses
        assert [p.port for p in found.ports] == [p["port"] for p in item.get("ports") or ()]


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda p: p.stem)
def test_an_object_reads_the_same_alone_as_in_a_list(path):
    kind = json.loads(path.read_bytes())["kind"].removesuffix("List")
    for found, item in zip(
        decode_any(path.read_bytes()), json.loads(path.read_bytes())["items"], strict=True
    ):
        alone = json.dumps({**item, "kind": kind}).encode()
        assert list(decode_any(alone)) == [found]


# --- Services ------------------------------------------------------------------------------------


def test_a_service_in_full():
    found = manifest.service(
        "web",
        namespace="shop",
        type="LoadBalancer",
        cluster_ips=["10.96.0.1", "fd00::1"],
        externalIPs=["198.51.100.1", "198.51.100.1"],
        ports=[
            {"name": "dns", "port": 53, "protocol": "UDP", "nodePort": 30053},
            {"port": 53},
            {"name": "sig", "port": 53, "protocol": "SCTP"},
        ],
        ingress=[
            {"ip": "198.51.100.2"},
            {"ip": "198.51.100.3", "ipMode": "Proxy"},
            {"ip": "198.51.100.4", "ipMode": "VIP"},
            {"hostname": "lb.example.com"},
        ],
        loadBalancerSourceRanges=[" 10.0.0.0/9 ", "10.128.0.0/9", "fd00::1/64"],
        internalTrafficPolicy="Local",
        externalTrafficPolicy="Local",
        sessionAffinity="ClientIP",
        sessionAffinityConfig={"clientIP": {"timeoutSeconds": 600}},
        healthCheckNodePort=32000,
    )
    assert found == Service(
        name=Name("shop", "web"),
        created=manifest.CREATED,
        proxy_name=None,
        headless=False,
        proxied=True,
        cluster_ips=(packed("10.96.0.1"), packed("fd00::1")),
        external_ips=(packed("198.51.100.1"),),
        load_balancer_ips=(packed("198.51.100.2"), packed("198.51.100.4")),
        ports=(
            ServicePort("dns", UDP, 53, 30053),
            ServicePort("", TCP, 53, 0),
            ServicePort("sig", SCTP, 53, 0),
        ),
        internal_local=True,
        external_local=True,
        affinity_seconds=600,
        source_ranges=(ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/64")),
        health_check_node_port=32000,
    )


def test_a_service_of_which_only_what_must_be_is_there():
    found = decode("Service", b'{"metadata":{"name":"a"},"spec":{}}')
    assert found == Service(
        Name("default", "a"), "", None, False, False, (), (), (), (), False, False, 0, (), 0
    )


@pytest.mark.parametrize(
    "spec",
    [
        {"type": "ExternalName", "externalName": "example.com"},
        {"clusterIP": "None", "clusterIPs": ["None"]},
        {"clusterIP": "None", "clusterIPs": None},
        {"clusterIP": "", "clusterIPs": []},
        {"clusterIP": None, "clusterIPs": None},
    ],
)
def test_services_without_an_address_of_their_own_are_not_proxied(spec):
    found = service(**spec)
    assert not found.proxied
    assert found.cluster_ips == ()
    assert found.problems == ()


def test_the_singular_cluster_ip_counts_where_there_is_no_plural():
    found = service(clusterIP="10.96.0.7", clusterIPs=None)
    assert found.cluster_ips == (packed("10.96.0.7"),)


@pytest.mark.parametrize("kind", ["ClusterIP", "NodePort", "LoadBalancer"])
def test_load_balancer_ips_and_source_ranges_count_whatever_the_type_is_now(kind):
    found = service(
        {"status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.2"}]}}},
        type=kind,
        loadBalancerSourceRanges=["10.0.0.0/8"],
    )
    assert found.load_balancer_ips == (packed("198.51.100.2"),)
    assert found.source_ranges == (ipaddress.ip_network("10.0.0.0/8"),)


@pytest.mark.parametrize("ip", ["169.254.20.1", "fe80::1"])
def test_a_load_balancer_ip_may_be_link_local(ip):
    found = service({"status": {"loadBalancer": {"ingress": [{"ip": ip}, {"ip": "127.0.0.1"}]}}})
    assert found.load_balancer_ips == (packed(ip),)
    assert found.problems == (
        "status.loadBalancer.ingress: 127.0.0.1 is a loopback address; ignored",
    )
    assert service(externalIPs=[ip]).external_ips == ()


@pytest.mark.parametrize(
    ("config", "seconds"),
    [
        (None, DEFAULT_AFFINITY_SECONDS),
        ({}, DEFAULT_AFFINITY_SECONDS),
        ({"clientIP": None}, DEFAULT_AFFINITY_SECONDS),
        ({"clientIP": {}}, DEFAULT_AFFINITY_SECONDS),
        ({"clientIP": {"timeoutSeconds": 1}}, 1),
        ({"clientIP": {"timeoutSeconds": 86400}}, 86400),
    ],
)
def test_session_affinity_lasts_three_hours_unless_it_says_otherwise(config, seconds):
    found = service(sessionAffinity="ClientIP", sessionAffinityConfig=config)
    assert (found.affinity_seconds, found.problems) == (seconds, ())


def test_ages_order_as_time_and_then_as_names():
    old, young = manifest.service("b"), manifest.service("a", created="2026-01-01T00:00:01Z")
    assert old.age < young.age
    assert manifest.service("a").age < manifest.service("b").age
    assert manifest.service("b", namespace="a").age < manifest.service("a", namespace="b").age
    unknown = service({"metadata": {"name": "a", "namespace": "a"}})
    assert young.age < unknown.age


# --- single unusable values ----------------------------------------------------------------------

REFUSED = [
    ("", "is not an IP address"),
    ("example.com", "is not an IP address"),
    ("10.0.0", "is not an IP address"),
    ("10.0.0.256", "is not an IP address"),
    ("10..0.1", "is not an IP address"),
    ("::ffff:127.0.0.1", "is a loopback address"),
    ("::ffff:169.254.169.254", "is a link-local address"),
    ("127.000.000.001", "is a loopback address"),
    ("10.0.0.1/32", "is not an IP address"),
    ("10.0.0.1 ", "is not an IP address"),
    ("10.0.0.1; flush ruleset", "is not an IP address"),
    ("fd00::1%eth0", "has a zone index"),
    ("fe80::1%eth0", "has a zone index"),
    ("fe80::1", "is a link-local address"),
    ("169.254.169.254", "is a link-local address"),
    ("127.0.0.1", "is a loopback address"),
    ("127.255.0.9", "is a loopback address"),
    ("::1", "is a loopback address"),
    ("0.0.0.0", "is the unspecified address"),
    ("::", "is the unspecified address"),
    ("224.0.0.1", "is a multicast address"),
    ("ff02::1", "is a multicast address"),
]


@pytest.mark.parametrize(("text", "because"), REFUSED)
def test_an_address_that_traffic_may_not_be_sent_to_is_refused(text, because):
    with pytest.raises(ValueError, match=because):
        parse_address(text)


@pytest.mark.parametrize(
    ("text", "usual"),
    [
        ("010.008.000.012", "10.8.0.12"),
        ("10.0.0.000000001", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("::ffff:10.010.020.030", "10.10.20.30"),
        ("0:0:0:0:000000:ffff:10.1.2.3", "10.1.2.3"),
        ("::ffff:0a01:0203", "10.1.2.3"),
        ("2001:0db8:0000:0000:0000:0000:0000:000a", "2001:db8::a"),
    ],
)
def test_old_forms_of_addresses_are_read_as_kube_proxy_reads_them(text, usual):
    """The cases are those of ParseIPSloppy: zeros never mean octal, mapped means IPv4."""
    assert parse_address(text) == packed(usual)
    assert service(clusterIPs=[text]).cluster_ips == (packed(usual),)


@pytest.mark.parametrize(
    ("text", "usual"),
    [
        ("010.000.0.0/8", "10.0.0.0/8"),
        ("::ffff:10.1.2.3/104", "10.0.0.0/8"),
        ("::ffff:0:0/95", "::fffe:0:0/95"),
    ],
)
def test_old_forms_of_networks_are_read_as_kube_proxy_reads_them(text, usual):
    assert parse_network(text) == ipaddress.ip_network(usual)


@fuzzed(100)
@given(st.ip_addresses())
def test_an_address_is_refused_or_is_its_packed_form(address):
    address = getattr(address, "ipv4_mapped", None) or address
    try:
        assert parse_address(str(address)) == address.packed
    except ValueError:
        assert (
            address.is_loopback
            or address.is_link_local
            or address.is_multicast
            or address.is_unspecified
        )


@fuzzed(100)
@given(st.text(max_size=20))
def test_any_text_is_an_address_or_a_value_error(text):
    for parse in (parse_address, parse_network):
        with contextlib.suppress(ValueError):
            parse(text)


@pytest.mark.parametrize(("text", "because"), REFUSED)
def test_an_endpoint_with_such_an_address_is_left_out_and_the_others_stay(text, because):
    found = slice_of("10.0.0.1", text, "10.0.0.2")
    assert [e.address for e in found.endpoints] == [packed("10.0.0.1"), packed("10.0.0.2")]
    (problem,) = found.problems
    assert problem.startswith("endpoints[1]: ")
    assert because in problem
    assert problem.endswith("; ignored")


def test_an_endpoint_of_another_family_than_its_slice_is_left_out():
    found = slice_of("10.0.0.1", "fd00::1")
    assert len(found.endpoints) == 1
    assert found.problems == ("endpoints[1]: fd00::1 is not of the slice's addressType; ignored",)


def test_an_endpoint_without_an_address_is_left_out():
    found = slice_of({"addresses": []}, "10.0.0.1")
    assert len(found.endpoints) == 1
    assert found.problems == ("endpoints[0]: has no address; ignored",)


@pytest.mark.parametrize(("text", "because"), REFUSED)
@pytest.mark.parametrize("field", ["externalIPs", "clusterIPs"])
def test_such_an_address_of_a_service_is_left_out_too(field, text, because):
    if field == "clusterIPs":
        found = service(clusterIPs=["10.96.0.1", text])
        assert found.cluster_ips == (packed("10.96.0.1"),)
    else:
        found = service(externalIPs=[text, "198.51.100.1"])
        assert found.external_ips == (packed("198.51.100.1"),)
    (problem,) = found.problems
    assert problem.startswith(f"spec.{field}: ")
    assert because in problem


def test_a_load_balancer_ip_that_is_none_is_left_out():
    ingress = [{"ip": "nonsense"}, {"ip": ""}, {"ip": None}, {}, {"ip": "198.51.100.2"}]
    found = manifest.service(type="LoadBalancer", ingress=ingress)
    assert found.load_balancer_ips == (packed("198.51.100.2"),)
    assert len(found.problems) == 1
    assert found.problems[0].startswith("status.loadBalancer.ingress: 'nonsense'")


BAD_PORTS = (-1, 0, 65536, 99999, 2**31, 10**30)


@pytest.mark.parametrize("number", BAD_PORTS)
def test_a_port_out_of_range_is_left_out(number):
    found = service(ports=[{"name": "bad", "port": number}, {"name": "good", "port": 80}])
    assert [p.name for p in found.ports] == ["good"]
    (problem,) = found.problems
    assert problem == (f"spec.ports[0].port: {number} is not a port (1 to 65535); port ignored")
    ports = [{"name": "bad", "port": number}, {"name": "good", "port": 8080}]
    piece = slice_of("10.0.0.1", ports=ports)
    assert piece.ports == (SlicePort("good", TCP, 8080),)
    assert len(piece.problems) == 1


@pytest.mark.parametrize("number", [n for n in BAD_PORTS if n])
def test_a_node_port_out_of_range_takes_its_port_with_it(number):
    found = service(ports=[{"port": 80, "nodePort": number}, {"port": 81, "nodePort": 30000}])
    assert [p.port for p in found.ports] == [81]
    assert "spec.ports[0].nodePort" in found.problems[0]


@pytest.mark.parametrize("number", [n for n in BAD_PORTS if n])
def test_a_health_check_node_port_out_of_range_is_none(number):
    found = service(healthCheckNodePort=number)
    assert found.health_check_node_port == 0
    (problem,) = found.problems
    assert "spec.healthCheckNodePort" in problem


@pytest.mark.parametrize("name", ["ICMP", "tcp", "TCP; flush ruleset", "6"])
def test_an_unknown_protocol_is_left_out(name):
    found = service(ports=[{"port": 80, "protocol": name}, {"port": 81}])
    assert [p.port for p in found.ports] == [81]
    assert "is not TCP, UDP or SCTP" in found.problems[0]
    assert slice_of("10.0.0.1", ports=[{"port": 80, "protocol": name}]).ports == ()


def test_a_port_that_is_there_twice_counts_once():
    found = service(ports=[{"name": "a", "port": 80}, {"name": "b", "port": 80}])
    assert [p.name for p in found.ports] == ["a"]
    assert found.problems == ("spec.ports[1]: port 80 is a duplicate; the first one is used",)
    both = service(ports=[{"name": "a", "port": 80}, {"name": "b", "port": 80, "protocol": "UDP"}])
    assert [p.protocol for p in both.ports] == [TCP, UDP]
    assert both.problems == ()


@pytest.mark.parametrize(
    ("field", "attribute", "default"),
    [
        ("internalTrafficPolicy", "internal_local", False),
        ("externalTrafficPolicy", "external_local", False),
        ("sessionAffinity", "affinity_seconds", 0),
        ("type", "proxied", True),
    ],
)
@pytest.mark.parametrize("value", ["Nonsense", "local", '"; flush ruleset; #'])
def test_an_unknown_enum_value_is_taken_as_the_default(field, attribute, default, value):
    found = service(**{field: value})
    assert getattr(found, attribute) == default
    (problem,) = found.problems
    assert problem.startswith(f"spec.{field}: {value!r} is none of ")


@pytest.mark.parametrize("value", ["", None])
def test_an_empty_enum_value_is_the_default_without_a_word(value):
    fields = ("internalTrafficPolicy", "externalTrafficPolicy", "sessionAffinity", "type")
    assert service(**dict.fromkeys(fields, value)).problems == ()


@pytest.mark.parametrize("seconds", [0, -1, 86401, 2**40])
def test_a_timeout_out_of_range_is_the_default(seconds):
    found = service(
        sessionAffinity="ClientIP",
        sessionAffinityConfig={"clientIP": {"timeoutSeconds": seconds}},
    )
    assert found.affinity_seconds == DEFAULT_AFFINITY_SECONDS
    assert "is not within 1 to 86400" in found.problems[0]


def test_a_source_range_that_is_none_is_left_out():
    found = service(
        type="LoadBalancer", loadBalancerSourceRanges=["10.0.0.0/8", "10.0.0.0/33", "all"]
    )
    assert found.source_ranges == (ipaddress.ip_network("10.0.0.0/8"),)
    assert len(found.problems) == 2


def test_source_ranges_of_which_none_is_usable_refuse_all_sources():
    found = service(type="LoadBalancer", loadBalancerSourceRanges=["all"])
    assert {n.num_addresses for n in found.source_ranges} == {1}
    assert {int(n.network_address) for n in found.source_ranges} == {0}
    assert found.problems[-1].endswith("no usable range; all sources are refused")


@fuzzed(100)
@given(st.lists(st.ip_addresses().filter(lambda a: not getattr(a, "ipv4_mapped", None)).flatmap(
    lambda a: st.integers(0, a.max_prefixlen).map(lambda n: f"{a}/{n}")), max_size=6)
)  # fmt: skip
def test_source_ranges_neither_overlap_nor_touch_and_lose_no_address(texts):
    found = service(type="LoadBalancer", loadBalancerSourceRanges=texts).source_ranges
    for family in (4, 6):
        mine = [n for n in found if n.version == family]
        bounds = sorted((int(n.network_address), int(n.broadcast_address)) for n in mine)
        assert all(a[1] < b[0] for a, b in itertools.pairwise(bounds))
        given_networks = [ipaddress.ip_network(t, strict=False) for t in texts]
        wanted = [n for n in given_networks if n.version == family]
        assert all(any(w.subnet_of(n) for n in mine) for w in wanted)
        assert list(ipaddress.collapse_addresses(wanted)) == mine


def test_null_lists_are_empty_lists():
    found = service(
        {"metadata": {"name": "a", "labels": None, "annotations": None}, "status": None},
        externalIPs=None,
        ports=None,
        loadBalancerSourceRanges=None,
        sessionAffinityConfig=None,
    )
    assert (found.external_ips, found.ports, found.proxy_name) == ((), (), None)
    assert found.problems == ()
    piece = slice_of(endpoints=None, ports=None)
    assert (*piece.endpoints, *piece.ports, *piece.problems) == ()
    bare = {"addresses": ["10.0.0.1"], "hints": None, "targetRef": None, "nodeName": None}
    (found_endpoint,) = slice_of({**bare, "conditions": None, "zone": None}).endpoints
    assert found_endpoint == Endpoint(packed("10.0.0.1"), READY | SERVING)
    hints = {"forZones": None, "forNodes": None}
    assert list(slice_of({**bare, "hints": hints}).endpoints) == [found_endpoint]
    node = decode("Node", b'{"metadata":{"name":"n"},"spec":null,"status":null}')
    assert node == Node("n", "", (), ())
    cidr = decode("ServiceCIDR", b'{"metadata":{"name":"c"},"spec":{"cidrs":null}}')
    assert cidr == ServiceCIDR("c", ())


def test_a_node_has_its_internal_addresses_first():
    document = {
        "metadata": {"name": "n", "labels": {"topology.kubernetes.io/zone": "z"}},
        "spec": {"podCIDR": "10.244.1.0/24"},
        "status": {
            "addresses": [
                {"type": "Hostname", "address": "n"},
                {"type": "ExternalIP", "address": "198.51.100.9"},
                {"type": "InternalIP", "address": "10.0.0.9"},
                {"type": "InternalIP", "address": "n.example.com"},
            ]
        },
    }
    node = decode("Node", json.dumps(document).encode())
    assert node.addresses == (packed("10.0.0.9"), packed("198.51.100.9"))
    assert node.pod_cidrs == (ipaddress.ip_network("10.244.1.0/24"),)
    assert node.zone == "z"
    assert len(node.problems) == 1


# --- whole unusable objects ----------------------------------------------------------------------


def invalid(kind: str, document: Any) -> InvalidObject:
    with pytest.raises(InvalidObject) as caught:
        decode(kind, json.dumps(document).encode())
    return caught.value


METADATA = {"name": "a", "namespace": "b"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("document", [{}, [], None, 1, "text", {"metadata": None}, {"spec": {}}])
def test_what_has_no_metadata_is_invalid_and_has_no_name(kind, document):
    error = invalid(kind, document)
    assert error.subject == f"{kind} without a name"
    assert error.reason


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["", None, 1, ["a"], {"a": 1}])
def test_a_name_must_be_a_text(kind, name):
    rest = {"Service": {"spec": {}}, "ServiceCIDR": {"spec": {}}, "EndpointSlice": {}}.get(kind, {})
    document = {
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        **rest,
    }
    assert "name" in str(invalid(kind, document))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("type", 1),
        ("clusterIP", ["10.0.0.1"]),
        ("clusterIPs", "10.0.0.1"),
        ("clusterIPs", [None]),
        ("externalIPs", {"a": 1}),
        ("externalIPs", [1]),
        ("ports", {}),
        ("ports", [None]),
        ("ports", [{}]),
        ("ports", [{"port": "80"}]),
        ("ports", [{"port": 80.5}]),
        ("ports", [{"port": None}]),
        ("ports", [{"port": 80, "nodePort": "30000"}]),
        ("ports", [{"port": 80, "name": 1}]),
        ("sessionAffinity", True),
        ("sessionAffinityConfig", "ClientIP"),
        ("sessionAffinityConfig", {"clientIP": {"timeoutSeconds": "600"}}),
        ("loadBalancerSourceRanges", "10.0.0.0/8"),
        ("healthCheckNodePort", "1"),
        ("externalTrafficPolicy", ["Local"]),
    ],
)
def test_a_service_field_of_the_wrong_type_makes_the_service_invalid(field, value):
    document = manifest.service_document(namespace="shop")
    document["spec"][field] = value
    error = invalid("Service", document)
    assert error.subject == "Service shop/web"
    assert f"$.spec.{field}" in error.reason or "spec" in error.reason
    assert str(error) == f"{error.subject}: {error.reason}"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"addressType": None}, "addressType"),
        ({"addressType": 4}, "addressType"),
        ({"addressType": "IPv5"}, "'IPv5' is none of IPv4, IPv6, FQDN"),
        ({"addressType": ""}, "is none of"),
        ({"endpoints": {}}, "endpoints"),
        ({"endpoints": [None]}, "endpoints[0]"),
        ({"endpoints": [{}]}, "addresses"),
        ({"endpoints": [{"addresses": None}]}, "addresses"),
        ({"endpoints": [{"addresses": "10.0.0.1"}]}, "addresses"),
        ({"endpoints": [{"addresses": [1]}]}, "addresses"),
        ({"endpoints": [{"addresses": ["10.0.0.1"], "conditions": {"ready": 1}}]}, "ready"),
        ({"endpoints": [{"addresses": ["10.0.0.1"], "hints": {"forZones": ["z"]}}]}, "forZones"),
        ({"endpoints": [{"addresses": ["10.0.0.1"], "nodeName": 1}]}, "nodeName"),
        ({"ports": [{"port": "http"}]}, "port"),
        ({"metadata": {**METADATA, "labels": {"kubernetes.io/service-name": None}}}, "labels"),
        ({"metadata": {**METADATA, "labels": []}}, "labels"),
    ],
)
def test_a_slice_of_the_wrong_shape_is_invalid(change, word):
    document = {**manifest.slice_document("web", [manifest.endpoint("10.0.0.1")]), **change}
    error = invalid("EndpointSlice", document)
    assert error.subject.startswith("EndpointSlice ")
    assert word in error.reason


@pytest.mark.parametrize("labels", [None, {}, {"kubernetes.io/service-name": ""}])
def test_a_slice_without_the_service_label_belongs_to_no_service(labels):
    found = slice_of("10.0.0.1", metadata={**METADATA, "labels": labels})
    assert (found.service, found.problems) == (None, ())


@pytest.mark.parametrize(
    ("conditions", "bits"),
    [
        ({}, READY | SERVING),
        ({"ready": False}, SERVING),
        ({"ready": True, "serving": False}, READY | SERVING),
        ({"ready": False, "serving": False}, 0),
        ({"ready": False, "terminating": True}, SERVING | TERMINATING),
    ],
)
def test_serving_is_true_where_it_is_absent_or_the_endpoint_is_published(conditions, bits):
    (found,) = slice_of({"addresses": ["10.0.0.1"], "conditions": conditions}).endpoints
    assert found.conditions == bits


def test_a_slice_has_at_most_a_thousand_endpoints():
    addresses = [f"10.0.{n >> 8}.{n & 255}" for n in range(1, 1002)]
    assert len(slice_of(*addresses[:1000]).endpoints) == 1000
    error = invalid(
        "EndpointSlice",
        manifest.slice_document("web", [manifest.endpoint(a) for a in addresses], name="big"),
    )
    assert error.subject == "EndpointSlice default/big"
    assert error.reason.startswith("1001 endpoints, and the API allows 1000 in a slice; split")


def test_a_slice_of_names_has_no_endpoints_and_no_problem():
    found = slice_of(manifest.endpoint("example.com"), addressType="FQDN")
    assert (found.family, *found.endpoints, *found.problems) == (0,)


NFT_SYNTAX = ('"; flush ruleset; #', "x }\nflush ruleset\n{", "$(reboot)", "a\0b", "' ; drop", "*")


@pytest.mark.parametrize("text", NFT_SYNTAX)
def test_names_that_mean_something_to_nft_are_just_names(text):
    document = manifest.service_document(text, namespace=text)
    document["metadata"].update(annotations={text: text}, labels={text: text})
    found = decode("Service", json.dumps(document).encode())
    assert found.name == Name(text, text)
    piece = slice_of(
        manifest.endpoint("10.0.0.1", node=text, zone=text, for_zones=[text], for_nodes=[text]),
        ports=[{"name": text, "port": 80}],
    )
    assert next(iter(piece.endpoints)).node == text
    assert piece.ports[0].name == text


# --- documents -----------------------------------------------------------------------------------


def test_one_bad_object_does_not_hide_the_others():
    good = manifest.service_document("good")
    items = [good, None, 7, [], {}, {"metadata": {"name": "bad"}, "spec": 1}, good]
    found = list(decode_any(json.dumps({"kind": "ServiceList", "items": items}).encode()))
    assert [isinstance(o, InvalidObject) for o in found] == [False, *[True] * 5, False]
    assert found[5].subject == "Service default/bad"
    found = list(decode_any(json.dumps({"kind": "List", "items": items}).encode()))
    assert [isinstance(o, InvalidObject) for o in found] == [False, *[True] * 5, False]


def test_unused_kinds_are_skipped():
    pod = {"kind": "Pod", "metadata": {"name": "p"}}
    assert list(decode_any(json.dumps(pod).encode())) == []
    assert list(decode_any(json.dumps({"kind": "PodList", "items": [pod, 1]}).encode())) == []
    mixed = {"kind": "List", "items": [pod, manifest.service_document()]}
    assert [type(o) for o in decode_any(json.dumps(mixed).encode())] == [Service]


def test_null_items_are_no_items():
    assert list(decode_any(b'{"kind":"ServiceList","items":null}')) == []
    assert list(decode_any(b'{"kind":"ServiceList","items":[]}')) == []


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"nul", b"[]", b"1", b'"text"', b"\xff\xfe", b'{"kind":1}', b'{"items":{}}', b"{}"],
)
def test_what_is_no_object_is_one_invalid_object(data):
    (found,) = decode_any(data)
    assert isinstance(found, InvalidObject)
    assert found.reason


DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize("data", [DEEP, DEEP[:150_000], b'{"kind":"List","items":[' + DEEP + b"]}"])
def test_nesting_without_end_is_one_invalid_object(data):
    (found,) = decode_any(data)
    assert isinstance(found, InvalidObject)


DEEPLY_NESTED = b'{"f:metadata":' * 1500 + b'{"] \\" }":1}' + b"}" * 1500


@pytest.mark.parametrize("deep", [DEEP, DEEPLY_NESTED])
def test_nesting_in_fields_that_are_not_read_costs_nothing(deep):
    """The API server stores managedFields nested 1,500 deep, in 9 KB of a Service."""
    metadata = b'"metadata":{"name":"%s","managedFields":[{"fieldsV1":' + deep + b"}]}"
    item = b"{" + metadata + b',"spec":{"clusterIP":"10.96.0.1","x":' + deep + b"}}"
    found = decode("Service", item % b"deep")
    assert (found.name.name, found.cluster_ips) == ("deep", (packed("10.96.0.1"),))
    items = [item % name for name in (b"a", b"b")]
    data = b'{"kind":"ServiceList","items":[' + b",".join(items) + b"]}"
    assert [o.name.name for o in decode_any(data)] == ["a", "b"]


def test_nesting_in_a_field_that_is_read_costs_that_object():
    data = b'{"kind":"ServiceList","items":[{"metadata":{"name":"a"},"spec":{"ports":'
    data += DEEP + b'}},{"metadata":{"name":"b"},"spec":{}}]}'
    bad, good = decode_any(data)
    assert isinstance(bad, InvalidObject)
    assert bad.subject == "Service default/a"
    assert good.name.name == "b"


@fuzzed(100)
@given(
    st.recursive(
        st.none() | st.text(max_size=4),
        lambda i: st.lists(i) | st.dictionaries(st.text(max_size=4), i),
    )
)
def test_shallow_leaves_ordinary_documents_as_they_are(document):
    data = json.dumps(document).encode()
    assert shallow(data) == data


# hypothesis: arbitrary JSON, and good objects of which one value has become something else

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
shapes = st.fixed_dictionaries(
    {},
    optional={
        "kind": st.sampled_from((*KINDS, *(f"{k}List" for k in KINDS), "List", "Pod"))
        | json_values,
        "metadata": st.fixed_dictionaries(
            {"name": st.text(max_size=8) | json_values},
            optional={"namespace": json_values, "labels": json_values},
        )
        | json_values,
        "spec": json_values,
        "status": json_values,
        "items": st.lists(json_values, max_size=3) | json_values,
        "endpoints": json_values,
        "addressType": st.sampled_from(("IPv4", "IPv6", "FQDN")) | json_values,
        "ports": json_values,
    },
)


def check_documents(data: bytes) -> None:
    """Every result is a record or an InvalidObject with a subject and a reason."""
    for found in decode_any(data):
        assert isinstance(found, (Service, EndpointSlice, Node, ServiceCIDR, InvalidObject))
        if isinstance(found, InvalidObject):
            assert found.subject
            assert found.reason


@fuzzed(100)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_never_raise(data):
    check_documents(data)


@fuzzed(100)
@given(json_values | shapes)
def test_arbitrary_json_never_raises(value):
    check_documents(json.dumps(value).encode())
    check_documents(json.dumps({"kind": "List", "items": [value]}).encode())


GOOD = [
    manifest.service_document(
        type="LoadBalancer",
        ports=[{"name": "http", "port": 80, "nodePort": 30000, "protocol": "TCP"}],
        externalIPs=["198.51.100.1"],
        ingress=[{"ip": "198.51.100.2", "ipMode": "VIP"}],
        loadBalancerSourceRanges=["10.0.0.0/8"],
        internalTrafficPolicy="Local",
        externalTrafficPolicy="Cluster",
        sessionAffinity="ClientIP",
        sessionAffinityConfig={"clientIP": {"timeoutSeconds": 600}},
        healthCheckNodePort=32000,
    ),
    manifest.slice_document(
        "web", [manifest.endpoint("10.0.0.1", for_zones=["z1"], for_nodes=["n"], zone="z1")]
    ),
    {
        "kind": "Node",
        "metadata": {"name": "n", "labels": {"topology.kubernetes.io/zone": "z"}},
        "spec": {"podCIDRs": ["10.244.1.0/24"], "podCIDR": "10.244.1.0/24"},
        "status": {"addresses": [{"type": "InternalIP", "address": "10.0.0.9"}]},
    },
    {"kind": "ServiceCIDR", "metadata": {"name": "c"}, "spec": {"cidrs": ["10.96.0.0/16"]}},
]


def paths(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value in a document."""
    found = []
    if isinstance(value, list):
        value = dict(enumerate(value))
    for key, inner in value.items() if isinstance(value, dict) else ():
        found += [(*before, key), *paths(inner, (*before, key))]
    return found


@fuzzed(500)
@given(st.data(), st.sampled_from(GOOD), json_values)
def test_a_good_object_with_one_value_replaced_never_raises(data, document, value):
    document = json.loads(json.dumps(document))
    *way, last = data.draw(st.sampled_from(paths(document)))
    place = document
    for step in way:
        place = place[step]
    place[last] = value
    check_documents(json.dumps(document).encode())


@pytest.mark.parametrize("document", GOOD, ids=lambda d: d["kind"])
def test_a_good_object_with_one_value_missing_or_null_never_raises(document):
    for *way, last in paths(document):
        for null in (False, True):
            changed = json.loads(json.dumps(document))
            place = changed
            for step in way:
                place = place[step]
            if null:
                place[last] = None
            else:
                del place[last]
            check_documents(json.dumps(changed).encode())


# --- endpoints as columns ------------------------------------------------------------------------


@given(st.lists(st.ip_addresses(), max_size=4), st.sampled_from([4, 16]))
def test_addresses_read_together_are_those_read_one_by_one(addresses, length):
    """Or they are left to the slower reader, which must be so for all that it refuses."""
    joined = parse_plain([str(a) for a in addresses], length)
    if joined is not None:
        one_by_one = [parse_address(str(a)) for a in addresses]
        assert joined == b"".join(one_by_one)
        assert all(len(a) == length for a in one_by_one)


@pytest.mark.parametrize("text", [text for text, _ in REFUSED])
@pytest.mark.parametrize("length", [4, 16])
def test_no_refused_address_is_read_quickly(text, length):
    assert parse_plain(["10.0.0.1" if length == 4 else "fd00::1", text], length) is None


def test_a_pod_whose_name_has_a_newline_moves_no_other():
    names = ["one\ntwo", "three"]
    rows = [
        {**manifest.endpoint(f"10.0.0.{n}"), "targetRef": {"kind": "Pod", "name": name}}
        for n, name in enumerate(names, 1)
    ]
    assert [e.pod for e in slice_of(*rows).endpoints] == ["one two", "three"]
