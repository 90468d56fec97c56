"""Services, EndpointSlices, Nodes and ServiceCIDRs: the few fields that matter, checked.

The API's JSON is decoded by msgspec into private mirrors of the API's shapes (unknown fields are
skipped without being built) and from there parsed, once, into the public records below. What a
record holds has been parsed: addresses are packed bytes in network order, protocols are IP
protocol numbers, names are plain strings that never reach a rule.

Two kinds of trouble are told apart. An object whose shape is wrong (a string where a number
belongs, no name) raises `InvalidObject`; the caller keeps what it knew of that object. A
well-formed object with a value nobody can use (an address that is none, a port out of range) is a
record without that value, and says so in its `problems`.

Field names and meaning: https://kubernetes.io/docs/reference/kubernetes-api/.
"""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import msgspec

TCP, UDP, SCTP = 6, 17, 132
PROTOCOLS = {"TCP": TCP, "UDP": UDP, "SCTP": SCTP}
PROTOCOL_NAMES = {number: name.lower() for name, number in PROTOCOLS.items()}

SERVICE_NAME_LABEL = "kubernetes.io/service-name"
PROXY_NAME_LABEL = "service.kubernetes.io/service-proxy-name"
HEADLESS_LABEL = "service.kubernetes.io/headless"
ZONE_LABEL = "topology.kubernetes.io/zone"
LEAVING_TAINT = "ToBeDeletedByClusterAutoscaler"
TRIGGER_TIME_ANNOTATION = "endpoints.kubernetes.io/last-change-trigger-time"

MAX_ENDPOINTS_PER_SLICE = 1000  # the API server's own limit (validation of discovery/v1)
MAX_AFFINITY_SECONDS = 86400
DEFAULT_AFFINITY_SECONDS = 10800

# conditions of an endpoint, as bits of Endpoint.conditions
READY, SERVING, TERMINATING = 1, 2, 4

Address = bytes
"""An IP address, packed in network order: 4 bytes for IPv4, 16 for IPv6."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class InvalidObject(ValueError):
    """An object that cannot be used at all; `subject` names it as far as it has a name."""

    def __init__(self, subject: str, reason: str) -> None:
        super().__init__(f"{subject}: {reason}")
        self.subject = subject
        self.reason = reason


class Name(NamedTuple):
    """A namespace and a name."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class ServicePort(msgspec.Struct, frozen=True):
    """One port of a Service. `node_port` is 0 where the Service has none."""

    name: str
    protocol: int
    port: int
    node_port: int


class Service(msgspec.Struct, frozen=True):
    """A Service as far as the data plane cares.

    `proxied` is false for Services that have no address of their own (headless, ExternalName, not
    allocated yet). `created` is the API's RFC 3339 string, whose order is that of time.
    `affinity_seconds` is 0 without session affinity. `proxy_name` is that label's value, None
    without the label.
    """

    name: Name
    created: str
    proxy_name: str | None
    headless: bool
    proxied: bool
    cluster_ips: tuple[Address, ...]
    external_ips: tuple[Address, ...]
    load_balancer_ips: tuple[Address, ...]
    ports: tuple[ServicePort, ...]
    internal_local: bool
    external_local: bool
    affinity_seconds: int
    source_ranges: tuple[Network, ...]
    health_check_node_port: int
    problems: tuple[str, ...] = ()

    @property
    def age(self) -> tuple[str, Name]:
        """The order in which Services win an address that two of them claim: oldest first."""
        return (self.created or "9999", self.name)


class Endpoint(msgspec.Struct, frozen=True, gc=False):
    """One endpoint of a slice. `conditions` are READY, SERVING and TERMINATING bits, or-ed."""

    address: Address
    conditions: int
    node: str = ""
    zone: str = ""
    node_hints: tuple[str, ...] = ()
    zone_hints: tuple[str, ...] = ()
    pod: str = ""


class SlicePort(NamedTuple):
    """A port of a slice; the number is the target port and may differ between slices."""

    name: str
    protocol: int
    port: int


class EndpointSlice(msgspec.Struct, frozen=True):
    """A slice. `family` is 4 or 6, or 0 where the slice holds no addresses a proxy can use.

    `proxy_name` and `headless` are labels, as a Service's; `created` is as a Service's, too.
    """

    name: Name
    service: Name
    proxy_name: str | None
    headless: bool
    family: int
    ports: tuple[SlicePort, ...]
    endpoints: tuple[Endpoint, ...]
    triggered: str = ""
    problems: tuple[str, ...] = ()
    created: str = ""


class Node(msgspec.Struct, frozen=True):
    """A Node: where it is, which addresses are its own, which networks its pods have.

    `leaving`: it is being deleted, or the cluster autoscaler is about to.
    """

    name: str
    zone: str
    addresses: tuple[Address, ...]
    pod_cidrs: tuple[Network, ...]
    leaving: bool = False
    problems: tuple[str, ...] = ()


class ServiceCIDR(msgspec.Struct, frozen=True):
    """A range from which cluster IPs are allocated."""

    name: str
    cidrs: tuple[Network, ...]
    problems: tuple[str, ...] = ()


Object = Service | EndpointSlice | Node | ServiceCIDR


# --- the API's shapes ---------------------------------------------------------------------------


class _Shape(msgspec.Struct, rename="camel"):
    pass


class _Metadata(_Shape):
    name: str
    namespace: str | None = None
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None


class _AnyObject(_Shape):
    metadata: _Metadata
    kind: str | None = None
    api_version: str | None = None


class _ServicePortShape(_Shape):
    port: int
    name: str | None = None
    protocol: str | None = None
    node_port: int | None = None


class _ClientIP(_Shape):
    timeout_seconds: int | None = None


class _AffinityConfig(_Shape):
    client_ip: _ClientIP | None = msgspec.field(default=None, name="clientIP")


class _ServiceSpec(_Shape):
    type: str | None = None
    cluster_ip: str | None = msgspec.field(default=None, name="clusterIP")
    cluster_ips: list[str] | None = msgspec.field(default=None, name="clusterIPs")
    external_ips: list[str] | None = msgspec.field(default=None, name="externalIPs")
    ports: list[_ServicePortShape] | None = None
    session_affinity: str | None = None
    session_affinity_config: _AffinityConfig | None = None
    internal_traffic_policy: str | None = None
    external_traffic_policy: str | None = None
    load_balancer_source_ranges: list[str] | None = None
    health_check_node_port: int | None = None


class _Ingress(_Shape):
    ip: str | None = None
    ip_mode: str | None = None


class _LoadBalancerStatus(_Shape):
    ingress: list[_Ingress] | None = None


class _ServiceStatus(_Shape):
    load_balancer: _LoadBalancerStatus | None = None


class _ServiceShape(_Shape):
    metadata: _Metadata
    spec: _ServiceSpec
    status: _ServiceStatus | None = None


class _Conditions(_Shape):
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class _Hint(_Shape):
    name: str


class _Hints(_Shape):
    for_zones: list[_Hint] | None = None
    for_nodes: list[_Hint] | None = None


class _TargetRef(_Shape):
    name: str | None = None


class _EndpointShape(_Shape):
    addresses: list[str]
    conditions: _Conditions | None = None
    hints: _Hints | None = None
    target_ref: _TargetRef | None = None
    node_name: str | None = None
    zone: str | None = None


class _SlicePortShape(_Shape):
    name: str | None = None
    protocol: str | None = None
    port: int | None = None


class _SliceShape(_Shape):
    metadata: _Metadata
    address_type: str
    endpoints: list[_EndpointShape] | None = None
    ports: list[_SlicePortShape] | None = None


class _NodeAddress(_Shape):
    type: str
    address: str


class _NodeStatus(_Shape):
    addresses: list[_NodeAddress] | None = None


class _Taint(_Shape):
    key: str


class _NodeSpec(_Shape):
    taints: list[_Taint] | None = None
    pod_cidr: str | None = msgspec.field(default=None, name="podCIDR")
    pod_cidrs: list[str] | None = msgspec.field(default=None, name="podCIDRs")


class _NodeShape(_Shape):
    metadata: _Metadata
    spec: _NodeSpec | None = None
    status: _NodeStatus | None = None


class _CIDRSpec(_Shape):
    cidrs: list[str] | None = None


class _ServiceCIDRShape(_Shape):
    metadata: _Metadata
    spec: _CIDRSpec


class _ListShape(_Shape):
    kind: str | None = None
    api_version: str | None = None
    items: list[msgspec.Raw] | None = None


# --- parsing ------------------------------------------------------------------------------------

_UNUSABLE = {
    "is_unspecified": "is the unspecified address",
    "is_loopback": "is a loopback address",
    "is_link_local": "is a link-local address",
    "is_multicast": "is a multicast address",
}


_OCTETS = {str(number): number for number in range(256)}


def _plain_ipv4(text: str) -> Address | None:
    """An IPv4 address as nearly all are, in little time; None for what needs a closer look."""
    try:
        packed = bytes([_OCTETS[octet] for octet in text.split(".")])
    except KeyError:
        return None
    usual = len(packed) == 4 and 0 < packed[0] < 224 and packed[0] not in (127, 169)
    return packed if usual else None


def parse_address(text: str) -> Address:
    """The packed form of an IP address that traffic may be sent to.

    Raises ValueError for anything else: no address, a zone index, or an address that the API
    server refuses for endpoints and external IPs (loopback and the like: kubernetes CVE-2020-8554
    and validation of discovery/v1).
    """
    plain = _plain_ipv4(text)
    return plain if plain is not None else _parse_closely(text)


@lru_cache(maxsize=4096)
def _parse_closely(text: str) -> Address:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise ValueError(f"{text!r} is not an IP address") from None
    if getattr(address, "scope_id", None):
        raise ValueError(f"{text!r} has a zone index")
    if getattr(address, "ipv4_mapped", None):
        raise ValueError(f"{text!r} is an IPv4 address written as IPv6")
    for attribute, reason in _UNUSABLE.items():
        if getattr(address, attribute):
            raise ValueError(f"{text} {reason}")
    return address.packed


def parse_network(text: str) -> Network:
    """A CIDR, host bits cleared. Raises ValueError."""
    try:
        return ipaddress.ip_network(text.strip(), strict=False)
    except ValueError:
        raise ValueError(f"{text!r} is not a CIDR") from None


def address_text(address: Address) -> str:
    """The usual text of a packed address."""
    return str(ipaddress.ip_address(address))


class _Problems(list[str]):
    """Collects what is wrong with single values of an object that is otherwise good."""

    def usable(self, where: str, parse: Callable[[str], _T], texts: list[str]) -> tuple[_T, ...]:
        """The values of `texts` that parse, once each, in their order."""
        parsed: dict[_T, None] = {}
        for text in texts:
            try:
                parsed[parse(text)] = None
            except ValueError as error:
                self.append(f"{where}: {error}; ignored")
        return tuple(parsed)

    def protocol(self, where: str, name: str | None) -> int:
        """The protocol's number, 0 if nobody knows it."""
        number = PROTOCOLS.get("TCP" if name is None else name, 0)
        if not number:
            self.append(f"{where}: protocol {name!r} is not TCP, UDP or SCTP; port ignored")
        return number

    def port(self, where: str, number: int, lowest: int = 1) -> bool:
        """Whether `number` is a port."""
        if lowest <= number <= 65535:
            return True
        self.append(f"{where}: {number} is not a port ({lowest} to 65535); port ignored")
        return False

    def choice(self, where: str, value: str | None, known: tuple[str, ...]) -> str:
        """`value` if it is one of `known`, else the first of them."""
        if value is None or value == "":
            return known[0]
        if value not in known:
            self.append(f"{where}: {value!r} is none of {', '.join(known)}; taken as {known[0]}")
            return known[0]
        return value


_T = TypeVar("_T")
_P = TypeVar("_P", bound=tuple[Any, ...])


def _name(metadata: _Metadata) -> Name:
    if not metadata.name:
        raise ValueError("metadata.name is empty")
    return Name(sys.intern(metadata.namespace or "default"), metadata.name)


@lru_cache(maxsize=1024)
def _first(ports: Any) -> Any:
    return ports


def _alike(ports: _P) -> _P:
    """These ports as they are in memory already: most Services have the same as others."""
    first: _P = _first(ports)
    return first


def _service(shape: _ServiceShape) -> Service:
    spec, problems, labels = shape.spec, _Problems(), shape.metadata.labels or {}
    kind = problems.choice(
        "spec.type", spec.type, ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName")
    )
    addresses = spec.cluster_ips or ([spec.cluster_ip] if spec.cluster_ip else [])
    proxied = kind != "ExternalName" and bool(addresses) and addresses[0] not in ("", "None")
    ingress = shape.status and shape.status.load_balancer and shape.status.load_balancer.ingress
    local = ("Cluster", "Local")
    name = _name(shape.metadata)
    return Service(
        name=Name(name.namespace, sys.intern(name.name)),  # its slices have the same string
        created=shape.metadata.creation_timestamp or "",
        proxy_name=labels.get(PROXY_NAME_LABEL),
        headless=HEADLESS_LABEL in labels,
        proxied=proxied,
        cluster_ips=problems.usable("spec.clusterIPs", parse_address, addresses) if proxied else (),
        external_ips=problems.usable("spec.externalIPs", parse_address, spec.external_ips or []),
        load_balancer_ips=problems.usable(
            "status.loadBalancer.ingress",
            parse_address,
            # a load balancer in Proxy mode delivers to node ports; its IP is not ours to answer
            [i.ip for i in ingress or () if i.ip and i.ip_mode != "Proxy"],
        )
        if kind == "LoadBalancer"
        else (),
        ports=_service_ports(spec.ports or [], problems),
        internal_local=problems.choice(
            "spec.internalTrafficPolicy", spec.internal_traffic_policy, local
        )
        == "Local",
        external_local=problems.choice(
            "spec.externalTrafficPolicy", spec.external_traffic_policy, local
        )
        == "Local",
        affinity_seconds=_affinity_seconds(spec, problems),
        source_ranges=_source_ranges(spec, problems) if kind == "LoadBalancer" else (),
        health_check_node_port=_health_check_node_port(spec, problems),
        problems=tuple(problems),
    )


def _service_ports(shapes: list[_ServicePortShape], problems: _Problems) -> tuple[ServicePort, ...]:
    ports: dict[tuple[int, int], ServicePort] = {}
    for index, shape in enumerate(shapes):
        where = f"spec.ports[{index}]"
        protocol = problems.protocol(where, shape.protocol)
        if not protocol or not problems.port(f"{where}.port", shape.port):
            continue
        node_port = shape.node_port or 0
        if node_port and not problems.port(f"{where}.nodePort", node_port):
            continue
        if (protocol, shape.port) in ports:
            problems.append(f"{where}: port {shape.port} is there twice; the first one counts")
            continue
        ports[protocol, shape.port] = ServicePort(
            sys.intern(shape.name or ""), protocol, shape.port, node_port
        )
    return _alike(tuple(ports.values()))


def _affinity_seconds(spec: _ServiceSpec, problems: _Problems) -> int:
    kind = problems.choice("spec.sessionAffinity", spec.session_affinity, ("None", "ClientIP"))
    if kind == "None":
        return 0
    config = spec.session_affinity_config and spec.session_affinity_config.client_ip
    seconds = config.timeout_seconds if config else None
    if seconds is None:
        return DEFAULT_AFFINITY_SECONDS
    if not 1 <= seconds <= MAX_AFFINITY_SECONDS:
        problems.append(
            f"spec.sessionAffinityConfig.clientIP.timeoutSeconds: {seconds} is not within 1 to "
            f"{MAX_AFFINITY_SECONDS}; taken as {DEFAULT_AFFINITY_SECONDS}"
        )
        return DEFAULT_AFFINITY_SECONDS
    return seconds


def _health_check_node_port(spec: _ServiceSpec, problems: _Problems) -> int:
    number = spec.health_check_node_port or 0
    return number if number and problems.port("spec.healthCheckNodePort", number) else 0


def _source_ranges(spec: _ServiceSpec, problems: _Problems) -> tuple[Network, ...]:
    """The ranges, per family merged so that none overlaps another.

    A list of which no range parses would open the address to everybody; then nobody is let in.
    """
    texts = spec.load_balancer_source_ranges or []
    ranges = problems.usable("spec.loadBalancerSourceRanges", parse_network, texts)
    if texts and not ranges:
        problems.append("spec.loadBalancerSourceRanges: no usable range; nobody is let in")
        return (ipaddress.ip_network("0.0.0.0/32"), ipaddress.ip_network("::/128"))
    four = [n for n in ranges if isinstance(n, ipaddress.IPv4Network)]
    six = [n for n in ranges if isinstance(n, ipaddress.IPv6Network)]
    return (*ipaddress.collapse_addresses(four), *ipaddress.collapse_addresses(six))


_FAMILIES = {"IPv4": 4, "IPv6": 6, "FQDN": 0}
_PACKED_LENGTH = {4: 4, 6: 16}


def _slice(shape: _SliceShape) -> EndpointSlice:
    labels = shape.metadata.labels or {}
    name, problems = _name(shape.metadata), _Problems()
    service = labels.get(SERVICE_NAME_LABEL)
    if not service:
        raise ValueError(f"has no label {SERVICE_NAME_LABEL}, so it belongs to no Service")
    family = _FAMILIES.get(shape.address_type)
    if family is None:
        raise ValueError(f"addressType {shape.address_type!r} is none of IPv4, IPv6, FQDN")
    endpoints = shape.endpoints or []
    if len(endpoints) > MAX_ENDPOINTS_PER_SLICE:
        raise ValueError(
            f"{len(endpoints)} endpoints, and the API allows {MAX_ENDPOINTS_PER_SLICE} in a slice;"
            " split it into several slices"
        )
    return EndpointSlice(
        name=name,
        service=Name(name.namespace, sys.intern(service)),
        proxy_name=labels.get(PROXY_NAME_LABEL),
        headless=HEADLESS_LABEL in labels,
        family=family,
        ports=_slice_ports(shape.ports or [], problems),
        endpoints=_endpoints(endpoints, _PACKED_LENGTH[family], problems) if family else (),
        triggered=(shape.metadata.annotations or {}).get(TRIGGER_TIME_ANNOTATION, ""),
        problems=tuple(problems),
        created=sys.intern(shape.metadata.creation_timestamp or ""),
    )


def _slice_ports(shapes: list[_SlicePortShape], problems: _Problems) -> tuple[SlicePort, ...]:
    ports = []
    for index, shape in enumerate(shapes):
        where = f"ports[{index}]"
        protocol = problems.protocol(where, shape.protocol)
        # a nil port number is legal and means "all ports": nothing a proxy could send to
        if protocol and shape.port is not None and problems.port(f"{where}.port", shape.port):
            ports.append(SlicePort(sys.intern(shape.name or ""), protocol, shape.port))
    return _alike(tuple(ports))


def _endpoints(
    shapes: list[_EndpointShape], length: int, problems: _Problems
) -> tuple[Endpoint, ...]:
    endpoints = []
    for index, shape in enumerate(shapes):
        if not shape.addresses:
            problems.append(f"endpoints[{index}]: has no address; ignored")
            continue
        try:
            address = parse_address(shape.addresses[0])
        except ValueError as error:
            problems.append(f"endpoints[{index}]: {error}; ignored")
            continue
        if len(address) != length:
            problems.append(
                f"endpoints[{index}]: {shape.addresses[0]} is not of the slice's addressType;"
                " ignored"
            )
            continue
        hints = shape.hints
        endpoints.append(
            Endpoint(
                address,
                _conditions(shape.conditions),
                sys.intern(shape.node_name or ""),
                sys.intern(shape.zone or ""),
                tuple(sys.intern(h.name) for h in hints.for_nodes or ()) if hints else (),
                tuple(sys.intern(h.name) for h in hints.for_zones or ()) if hints else (),
                (shape.target_ref and shape.target_ref.name) or "",
            )
        )
    return tuple(endpoints)


def _conditions(shape: _Conditions | None) -> int:
    """`ready` absent means true, `serving` absent as `ready`, `terminating` absent false."""
    if shape is None:
        return READY | SERVING
    ready = shape.ready is not False
    serving = ready if shape.serving is None else shape.serving
    return ready * READY | serving * SERVING | bool(shape.terminating) * TERMINATING


def _node(shape: _NodeShape) -> Node:
    problems = _Problems()
    spec, status = shape.spec or _NodeSpec(), shape.status or _NodeStatus()
    cidrs = spec.pod_cidrs or ([spec.pod_cidr] if spec.pod_cidr else [])
    # the order in which kube-proxy and the kubelet prefer them
    addresses = [
        a.address
        for kind in ("InternalIP", "ExternalIP")
        for a in status.addresses or ()
        if a.type == kind
    ]
    return Node(
        name=_name(shape.metadata).name,
        zone=(shape.metadata.labels or {}).get(ZONE_LABEL, ""),
        addresses=problems.usable("status.addresses", parse_address, addresses),
        pod_cidrs=problems.usable("spec.podCIDRs", parse_network, cidrs),
        leaving=shape.metadata.deletion_timestamp is not None
        or any(taint.key == LEAVING_TAINT for taint in spec.taints or ()),
        problems=tuple(problems),
    )


def _service_cidr(shape: _ServiceCIDRShape) -> ServiceCIDR:
    problems = _Problems()
    cidrs = problems.usable("spec.cidrs", parse_network, shape.spec.cidrs or [])
    return ServiceCIDR(_name(shape.metadata).name, cidrs, tuple(problems))


# --- decoding -----------------------------------------------------------------------------------

_PARSERS: dict[str, tuple[msgspec.json.Decoder[Any], Callable[[Any], Object]]] = {
    "Service": (msgspec.json.Decoder(_ServiceShape), _service),
    "EndpointSlice": (msgspec.json.Decoder(_SliceShape), _slice),
    "Node": (msgspec.json.Decoder(_NodeShape), _node),
    "ServiceCIDR": (msgspec.json.Decoder(_ServiceCIDRShape), _service_cidr),
}
KINDS = tuple(_PARSERS)
_GROUPS = {
    "Service": "",
    "EndpointSlice": "discovery.k8s.io",
    "Node": "",
    "ServiceCIDR": "networking.k8s.io",
}

_list_decoder = msgspec.json.Decoder(_ListShape)
_any_decoder = msgspec.json.Decoder(_AnyObject)


def decode(kind: str, data: bytes | msgspec.Raw) -> Object:
    """One object of a known kind from the API's JSON. Raises InvalidObject."""
    decoder, parse = _PARSERS[kind]
    try:
        return parse(decoder.decode(data))
    except ValueError as error:  # msgspec's errors are ValueErrors that say where
        raise InvalidObject(_subject(kind, data), str(error)) from None
    except RecursionError:
        raise InvalidObject(_subject(kind, data), "is nested too deep") from None


def _subject(kind: str, data: bytes | msgspec.Raw) -> str:
    try:
        metadata = _any_decoder.decode(data).metadata
    except (ValueError, RecursionError):
        return f"{kind} without a name"
    return f"{kind} {metadata.namespace or 'default'}/{metadata.name}"


def decode_any(data: bytes) -> Iterator[Object | InvalidObject]:
    """The objects of one JSON document: a single object, a `List`, or a list answer of the API.

    Objects of kinds that this program does not use are skipped. What cannot be used comes as an
    InvalidObject in its place, so that one bad object does not hide the others.
    """
    try:
        document = _list_decoder.decode(data)
    except (ValueError, RecursionError) as error:
        yield InvalidObject("document", str(error))
        return
    if document.items is None:
        yield from _decode_known(document.kind, document.api_version, data)
        return
    # the items of an API list carry no kind of their own: "ServiceList" says it for all
    item_kind = (document.kind or "List").removesuffix("List")
    for raw in document.items:
        kind, version = item_kind, document.api_version
        if not kind:
            try:
                item = _any_decoder.decode(raw)
            except (ValueError, RecursionError) as error:
                yield InvalidObject("an item of a List", str(error))
                continue
            kind, version = item.kind or "", item.api_version
        yield from _decode_known(kind, version, raw)


def _decode_known(
    kind: str | None, version: str | None, data: bytes | msgspec.Raw
) -> Iterator[Object | InvalidObject]:
    if not kind:
        yield InvalidObject(_subject("object", data), "has no kind")
    elif kind in _PARSERS and _is_of_group(version, _GROUPS[kind]):
        try:
            yield decode(kind, data)
        except InvalidObject as error:
            yield error


def _is_of_group(version: str | None, group: str) -> bool:
    """Whether an apiVersion is of the API group; Knative, for one, has Services of its own."""
    if version is None:
        return True
    return version.rpartition("/")[0] == group
