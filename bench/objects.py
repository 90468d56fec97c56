"""A cluster's objects as the API server sends them, as bytes, made before anything is measured.

They have all that a real server sends with them (managed fields, owner references, ids), as in
tests/recordings, because what is skipped has to be read, too.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from tests.cluster import protobuf

NODE = "node-1"
PORT = 8080
PER_SLICE = 100
"""So many endpoints the EndpointSlice controller puts into a slice."""
NODES = 100
FIRST_VERSION = 1_000_000

_CLUSTER_IPS = int(ipaddress.IPv4Address("10.96.0.0")) + 256
_PODS = int(ipaddress.IPv4Address("10.128.0.0"))
_STAMP = "2026-11-22T13:59:38Z"


class Size(NamedTuple):
    """How many Services there are, and endpoints in each."""

    services: int
    endpoints: int

    @classmethod
    def parse(cls, text: str) -> Size:
        services, _, endpoints = text.partition("x")
        return cls(int(services), int(endpoints))

    def __str__(self) -> str:
        return f"{self.services}x{self.endpoints}"

    @property
    def total(self) -> int:
        return self.services * self.endpoints


def text_of(number: int) -> str:
    return f"{number >> 24}.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"


def cluster_ip(service: int) -> str:
    return text_of(_CLUSTER_IPS + service)


def generation(octet: int, index: int) -> str:
    """The address of endpoint `index` after it was replaced: octet.x.x.x."""
    return text_of(octet << 24 | index)


class Encoding(NamedTuple):
    """How a server answers. `event` encodes an event of a watch: its type and an object in JSON;
    `page` a list of objects of a kind."""

    content_type: str
    event: Callable[[str, bytes], bytes]
    page: Callable[[str, bytes], bytes]


def _json_event(kind: str, item: bytes) -> bytes:
    return b'{"type":"%s","object":%s}\n' % (kind.encode(), item)


def _protobuf_event(kind: str, item: bytes) -> bytes:
    return protobuf.watch_event(kind, msgspec.json.decode(item))


def _protobuf_page(kind: str, body: bytes) -> bytes:
    return protobuf.whole_list(kind, msgspec.json.decode(body))


ENCODINGS = {
    "json": Encoding("application/json", _json_event, lambda _, body: body),
    "protobuf": Encoding(
        "application/vnd.kubernetes.protobuf;stream=watch", _protobuf_event, _protobuf_page
    ),
}


class Cluster:
    """Services named service-0 and on, with their endpoints, and this Node.

    `extra` are further Services and EndpointSlices, by resource. Objects are JSON, events are in
    the encoding that the server is asked for first, or another.
    """

    def __init__(
        self,
        size: Size,
        extra: dict[str, list[bytes]] | None = None,
        encoding: str = "protobuf",
    ) -> None:
        self.size = size
        self.encoding = ENCODINGS[encoding]
        self.version = FIRST_VERSION
        self._extra = extra or {}

    def objects(self, plural: str) -> Iterator[bytes]:
        """All objects of a resource."""
        match plural:
            case "services":
                for index in range(self.size.services):
                    yield service(f"service-{index}", cluster_ip(index))
            case "endpointslices":
                for index in range(self.size.services):
                    yield from self.slices(index, self.addresses(index))
            case "nodes":
                yield node()
            case "servicecidrs":
                yield service_cidr()
        yield from self._extra.get(plural, ())

    def addresses(self, index: int, octet: int | None = None) -> list[str]:
        """The endpoints of a Service, those of its beginning or of a later generation."""
        each = self.size.endpoints
        numbers = range(index * each, (index + 1) * each)
        if octet is None:
            return [text_of(_PODS + n) for n in numbers]
        return [generation(octet, n) for n in numbers]

    def slices(self, index: int, addresses: Sequence[str], version: int = 0) -> Iterator[bytes]:
        """The slices of a Service."""
        for number, start in enumerate(range(0, len(addresses), PER_SLICE)):
            part = addresses[start : start + PER_SLICE]
            name = f"service-{index}-{number}"
            yield endpoint_slice(name, f"service-{index}", part, version=version, first=start)

    def change(self, index: int, addresses: Sequence[str]) -> list[bytes]:
        """Watch events that give a Service these endpoints."""
        first = self.version + 1
        found = list(self.slices(index, addresses, first))
        self.version += 1
        return [self.encoding.event("MODIFIED", one) for one in found]

    def stream(self, plural: str) -> Iterator[bytes]:
        """The events of a streamed list, with the bookmark that ends it."""
        for item in self.objects(plural):
            yield self.encoding.event("ADDED", item)
        version = "v1" if plural in ("services", "nodes") else f"{GROUPS[plural]}/v1"
        yield self.encoding.event(
            "BOOKMARK",
            b'{"kind":"%s","apiVersion":"%s","metadata":{"resourceVersion":"%d","annotations":'
            b'{"k8s.io/initial-events-end":"true"}}}'
            % (KINDS[plural].encode(), version.encode(), FIRST_VERSION),
        )


KINDS = {
    "services": "Service",
    "endpointslices": "EndpointSlice",
    "nodes": "Node",
    "servicecidrs": "ServiceCIDR",
}
GROUPS = {"endpointslices": "discovery.k8s.io", "servicecidrs": "networking.k8s.io"}


def _identifier(name: str) -> str:
    digits = f"{hash(name) & (1 << 128) - 1:032x}"[:32]
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


_SERVICE_FIELDS = (
    '"managedFields":[{"manager":"kubectl-create","operation":"Update","apiVersion":"v1","time":"'
    + _STAMP
    + '","fieldsType":"FieldsV1","fieldsV1":{"f:metadata":{"f:labels":{".":{},"f:app":{}}},"f:spec"'
    ':{"f:internalTrafficPolicy":{},"f:ports":{".":{},"k:{\\"port\\":80,\\"protocol\\":\\"TCP\\"}":'
    '{".":{},"f:name":{},"f:port":{},"f:protocol":{},"f:targetPort":{}}},"f:selector":{},'
    '"f:sessionAffinity":{},"f:type":{}}}}]'
)
_SLICE_FIELDS = (
    '"managedFields":[{"manager":"kube-controller-manager","operation":"Update","apiVersion":'
    '"discovery.k8s.io/v1","time":"' + _STAMP + '","fieldsType":"FieldsV1","fieldsV1":'
    '{"f:addressType":{},"f:endpoints":{},"f:metadata":{"f:annotations":{".":{},'
    '"f:endpoints.kubernetes.io/last-change-trigger-time":{}},"f:generateName":{},"f:labels":'
    '{".":{},"f:endpointslice.kubernetes.io/managed-by":{},"f:kubernetes.io/service-name":{}},'
    '"f:ownerReferences":{".":{},"k:{\\"uid\\":\\"4c023ab2-085b-4402-b023-00244e487612\\"}":{}}},'
    '"f:ports":{}}}]'
)


def service(
    name: str, address: str, *, port: int = 80, protocol: str = "TCP", sticky: bool = False
) -> bytes:
    affinity = (
        '"ClientIP","sessionAffinityConfig":{"clientIP":{"timeoutSeconds":10800}}'
        if sticky
        else '"None"'
    )
    return (
        f'{{"kind":"Service","apiVersion":"v1","metadata":{{"name":"{name}","namespace":"default",'
        f'"uid":"{_identifier(name)}","resourceVersion":"{FIRST_VERSION}",'
        f'"creationTimestamp":"{_STAMP}","labels":{{"app":"{name}"}},{_SERVICE_FIELDS}}},"spec":{{'
        f'"ports":[{{"name":"http","protocol":"{protocol}","port":{port},"targetPort":{PORT}}}],'
        f'"selector":{{"app":"{name}"}},"clusterIP":"{address}","clusterIPs":["{address}"],'
        f'"type":"ClusterIP","sessionAffinity":{affinity},"ipFamilies":["IPv4"],'
        '"ipFamilyPolicy":"SingleStack","internalTrafficPolicy":"Cluster"},'
        '"status":{"loadBalancer":{}}}'
    ).encode()


def endpoint_slice(
    name: str,
    service_name: str,
    addresses: Sequence[str],
    *,
    version: int = 0,
    first: int = 0,
    port: int = PORT,
    protocol: str = "TCP",
) -> bytes:
    uid = _identifier(service_name)
    endpoints = ",".join(
        f'{{"addresses":["{address}"],"conditions":{{"ready":true,"serving":true,"terminating":'
        f'false}},"targetRef":{{"kind":"Pod","namespace":"default","name":"{service_name}-{n}",'
        f'"uid":"{uid}"}},"nodeName":"node-{_node_of(address)}","zone":"zone-a"}}'
        for n, address in enumerate(addresses, first)
    )
    return (
        '{"kind":"EndpointSlice","apiVersion":"discovery.k8s.io/v1","metadata":{'
        f'"name":"{name}","generateName":"{service_name}-","namespace":"default","uid":"{uid}",'
        f'"resourceVersion":"{version or FIRST_VERSION}","generation":1,"creationTimestamp":'
        f'"{_STAMP}","labels":{{"endpointslice.kubernetes.io/managed-by":'
        f'"endpointslice-controller.k8s.io","kubernetes.io/service-name":"{service_name}"}},'
        f'"annotations":{{"endpoints.kubernetes.io/last-change-trigger-time":"{_STAMP}"}},'
        f'"ownerReferences":[{{"apiVersion":"v1","kind":"Service","name":"{service_name}","uid":'
        f'"{uid}","controller":true,"blockOwnerDeletion":true}}],{_SLICE_FIELDS}}},'
        f'"addressType":"IPv4","endpoints":[{endpoints}],'
        f'"ports":[{{"name":"http","protocol":"{protocol}","port":{port}}}]}}'
    ).encode()


def _node_of(address: str) -> int:
    """Pods are spread over NODES nodes, of which this one is one."""
    return int(address.rpartition(".")[2]) % NODES + 1


def node() -> bytes:
    return msgspec.json.encode(
        {
            "kind": "Node",
            "apiVersion": "v1",
            "metadata": {
                "name": NODE,
                "uid": _identifier(NODE),
                "resourceVersion": str(FIRST_VERSION),
                "creationTimestamp": _STAMP,
                "labels": {"topology.kubernetes.io/zone": "zone-a"},
            },
            "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24"]},
            "status": {"addresses": [{"type": "InternalIP", "address": "172.31.0.2"}]},
        }
    )


def service_cidr() -> bytes:
    return msgspec.json.encode(
        {
            "kind": "ServiceCIDR",
            "apiVersion": "networking.k8s.io/v1",
            "metadata": {
                "name": "kubernetes",
                "uid": _identifier("cidr"),
                "resourceVersion": str(FIRST_VERSION),
                "creationTimestamp": _STAMP,
            },
            "spec": {"cidrs": ["10.96.0.0/12"]},
        }
    )
