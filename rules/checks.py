"""From the API's fields to records: every value is checked here, whatever its encoding was.

The functions take an object's shape, that is, an object whose attributes are the API's fields in
snake_case: a msgspec structure from JSON or a protobuf message. An absent field is None or the
protobuf default; both are false, and each function treats them alike. Fields whose absence means
something else than the zero value are passed in by the decoder.
"""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar

from rules.language import ADDRESS_LENGTH
from rules.objects import (
    DEFAULT_AFFINITY_SECONDS,
    ENDPOINT_COUNTERS_ANNOTATION,
    HEADLESS_LABEL,
    LEAVING_TAINT,
    MAX_AFFINITY_SECONDS,
    MAX_ENDPOINTS_PER_SLICE,
    PROTOCOLS,
    PROXY_NAME_LABEL,
    RANDOM_CHOICE,
    READY,
    SERVICE_NAME_LABEL,
    SERVING,
    TERMINATING,
    TRIGGER_TIME_ANNOTATION,
    ZONE_LABEL,
    Address,
    Endpoints,
    EndpointSlice,
    Name,
    Network,
    Node,
    Place,
    Service,
    ServiceCIDR,
    ServicePort,
    SlicePort,
    parse_address,
    parse_network,
    parse_plain,
)
from rules.weights import ALGORITHM_ANNOTATION, WEIGHTS_ANNOTATION, balancing, weighted_endpoints

_T = TypeVar("_T")
_P = TypeVar("_P", bound=tuple[Any, ...])


class Metadata(NamedTuple):
    """An object's metadata. `created` is RFC 3339 or empty; `deleting`: it has a deletion time."""

    name: str
    namespace: str
    created: str
    deleting: bool
    labels: Mapping[str, str]
    annotations: Mapping[str, str]

    @property
    def full_name(self) -> Name:
        """The name of a namespaced object. Raises ValueError without a name."""
        return Name(sys.intern(self.namespace or "default"), self.own_name)

    @property
    def own_name(self) -> str:
        """The name of a cluster-scoped object. Raises ValueError without a name."""
        if not self.name:
            raise ValueError("metadata.name is empty")
        return self.name


class UnusableValues(list[str]):
    """What is wrong with values of an object that is otherwise valid: its `problems`."""

    def usable(
        self, where: str, parse: Callable[[str], _T], texts: Sequence[str]
    ) -> tuple[_T, ...]:
        """The values of `texts` that parse, once each, in their order."""
        if not texts:
            return ()
        parsed: dict[_T, None] = {}
        for text in texts:
            try:
                parsed[parse(text)] = None
            except ValueError as error:
                self.append(f"{where}: {error}; ignored")
        return tuple(parsed)

    def protocol(self, where: str, name: str | None) -> int:
        """The protocol's number, TCP if `name` is empty, 0 if it is unknown."""
        number = PROTOCOLS.get(name or "TCP", 0)
        if not number:
            self.append(f"{where}: protocol {name!r} is not TCP, UDP or SCTP; port ignored")
        return number

    def port(self, where: str, number: int) -> bool:
        """Whether `number` is a port."""
        if 1 <= number <= 65535:
            return True
        self.append(f"{where}: {number} is not a port (1 to 65535); port ignored")
        return False

    def choice(self, where: str, value: str | None, known: tuple[str, ...]) -> str:
        """`value` if it is one of `known`, else the first of them."""
        if not value:
            return known[0]
        if value not in known:
            self.append(f"{where}: {value!r} is none of {', '.join(known)}; taken as {known[0]}")
            return known[0]
        return value


@lru_cache(maxsize=1024)
def _first(ports: Any) -> Any:
    return ports


def _shared(ports: _P) -> _P:
    """Equal ports are one object in memory: most Services have the same as others."""
    first: _P = _first(ports)
    return first


# --- Service ------------------------------------------------------------------------------------

_TYPES = ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName")
_POLICIES = ("Cluster", "Local")
_parse_load_balancer_ip = partial(parse_address, link_local=True)


def service(shape: Any, metadata: Metadata) -> Service:
    """A Service. Raises ValueError if it has no name."""
    spec, problems = shape.spec, UnusableValues()
    kind = problems.choice("spec.type", spec.type, _TYPES)
    addresses = spec.cluster_ips or ([spec.cluster_ip] if spec.cluster_ip else [])
    proxied = kind != "ExternalName" and bool(addresses) and addresses[0] not in ("", "None")
    balancer = shape.status and shape.status.load_balancer
    name = metadata.full_name
    internal = problems.choice(
        "spec.internalTrafficPolicy", spec.internal_traffic_policy, _POLICIES
    )
    external = problems.choice(
        "spec.externalTrafficPolicy", spec.external_traffic_policy, _POLICIES
    )
    annotations = metadata.annotations
    asks = ALGORITHM_ANNOTATION in annotations
    chosen = balancing(annotations, problems) if asks else RANDOM_CHOICE
    counters = ENDPOINT_COUNTERS_ANNOTATION in annotations and _switch(
        ENDPOINT_COUNTERS_ANNOTATION, annotations, problems
    )
    return Service(
        name=name,
        created=metadata.created,
        proxy_name=metadata.labels.get(PROXY_NAME_LABEL),
        headless=HEADLESS_LABEL in metadata.labels,
        proxied=proxied,
        cluster_ips=problems.usable("spec.clusterIPs", parse_address, addresses) if proxied else (),
        external_ips=problems.usable("spec.externalIPs", parse_address, spec.external_ips or ()),
        # whatever the type is now: they are served until the controller takes them back
        load_balancer_ips=problems.usable(
            "status.loadBalancer.ingress",
            _parse_load_balancer_ip,
            # a load balancer in Proxy mode delivers to node ports; its IP is not ours to answer
            [i.ip for i in (balancer and balancer.ingress) or () if i.ip and i.ip_mode != "Proxy"],
        ),
        ports=_service_ports(spec.ports or (), problems),
        internal_local=internal == "Local",
        external_local=external == "Local",
        affinity_seconds=_affinity_seconds(spec, problems),
        source_ranges=_source_ranges(spec, problems),
        health_check_node_port=_health_check_node_port(spec, problems),
        problems=tuple(problems),
        balancing=chosen,
        endpoint_counters=counters,
    )


def _switch(name: str, annotations: Mapping[str, str], problems: UnusableValues) -> bool:
    """An annotation that is "true" or "false"; anything else is a problem, and false."""
    text = annotations[name]
    if text not in ("true", "false"):
        problems.append(f"{name}: {text[:64]!r} is neither true nor false; taken as false")
    return text == "true"


def _service_ports(shapes: Sequence[Any], problems: UnusableValues) -> tuple[ServicePort, ...]:
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
            problems.append(f"{where}: port {shape.port} is a duplicate; the first one is used")
            continue
        ports[protocol, shape.port] = ServicePort(
            sys.intern(shape.name or ""), protocol, shape.port, node_port
        )
    return _shared(tuple(ports.values()))


def _affinity_seconds(spec: Any, problems: UnusableValues) -> int:
    kind = problems.choice("spec.sessionAffinity", spec.session_affinity, ("None", "ClientIP"))
    if kind == "None":
        return 0
    config = spec.session_affinity_config and spec.session_affinity_config.client_ip
    seconds: int | None = config.timeout_seconds if config else None
    if seconds is None:
        return DEFAULT_AFFINITY_SECONDS
    if not 1 <= seconds <= MAX_AFFINITY_SECONDS:
        problems.append(
            f"spec.sessionAffinityConfig.clientIP.timeoutSeconds: {seconds} is not within 1 to "
            f"{MAX_AFFINITY_SECONDS}; taken as {DEFAULT_AFFINITY_SECONDS}"
        )
        return DEFAULT_AFFINITY_SECONDS
    return seconds


def _health_check_node_port(spec: Any, problems: UnusableValues) -> int:
    number: int = spec.health_check_node_port or 0
    return number if number and problems.port("spec.healthCheckNodePort", number) else 0


def _source_ranges(spec: Any, problems: UnusableValues) -> tuple[Network, ...]:
    """The ranges, per family merged so that none overlaps another.

    Without any range an address is open to all sources. So a list of which no range parses
    becomes one that no source matches.
    """
    texts = spec.load_balancer_source_ranges
    if not texts:
        return ()
    ranges = problems.usable("spec.loadBalancerSourceRanges", parse_network, texts)
    if not ranges:
        problems.append("spec.loadBalancerSourceRanges: no usable range; all sources are refused")
        return (ipaddress.ip_network("0.0.0.0/32"), ipaddress.ip_network("::/128"))
    four = [n for n in ranges if isinstance(n, ipaddress.IPv4Network)]
    six = [n for n in ranges if isinstance(n, ipaddress.IPv6Network)]
    return (*ipaddress.collapse_addresses(four), *ipaddress.collapse_addresses(six))


# --- EndpointSlice ------------------------------------------------------------------------------

_FAMILIES = {"IPv4": 4, "IPv6": 6, "FQDN": 0}


class EndpointFields(NamedTuple):
    """The fields of a slice's endpoints, as columns; of addresses the first, None if there is
    none."""

    addresses: Sequence[str | None]
    places: Sequence[Place]
    pods: Sequence[str]


def endpoint_slice(
    shape: Any,
    metadata: Metadata,
    ports: Sequence[Any],
    fields: Callable[[Sequence[Any]], EndpointFields],
) -> EndpointSlice:
    """An EndpointSlice. Raises ValueError if it cannot be used as a whole.

    `fields` gives those of the shapes of endpoints.
    """
    labels, problems, name = metadata.labels, UnusableValues(), metadata.full_name
    family = _FAMILIES.get(shape.address_type)
    if family is None:
        raise ValueError(f"addressType {shape.address_type!r} is none of IPv4, IPv6, FQDN")
    shapes = shape.endpoints or ()
    if len(shapes) > MAX_ENDPOINTS_PER_SLICE:
        raise ValueError(
            f"{len(shapes)} endpoints, and the API allows {MAX_ENDPOINTS_PER_SLICE} in a slice;"
            " split it into several slices"
        )
    owner = labels.get(SERVICE_NAME_LABEL)
    annotations = metadata.annotations
    weights = annotations.get(WEIGHTS_ANNOTATION)
    endpoints = (
        _endpoints(fields(shapes), ADDRESS_LENGTH[family], problems) if family else Endpoints()
    )
    if weights is not None:
        endpoints = weighted_endpoints(weights, endpoints, problems)
    return EndpointSlice(
        name=name,
        service=Name(name.namespace, owner) if owner else None,
        proxy_name=labels.get(PROXY_NAME_LABEL),
        headless=HEADLESS_LABEL in labels,
        family=family,
        ports=_slice_ports(ports, problems),
        endpoints=endpoints,
        triggered=annotations.get(TRIGGER_TIME_ANNOTATION, ""),
        problems=tuple(problems),
        created=sys.intern(metadata.created),
    )


def condition_bits(ready: bool | None, serving: bool | None, terminating: bool | None) -> int:
    """Conditions as bits. `ready` and `serving` absent mean true, `terminating` absent false.

    A published endpoint, one that is ready, counts as serving, as in kube-proxy.
    """
    published = ready is not False
    serves = published or serving is not False
    return published * READY | serves * SERVING | bool(terminating) * TERMINATING


def _slice_ports(shapes: Sequence[Any], problems: UnusableValues) -> tuple[SlicePort, ...]:
    ports = []
    for index, shape in enumerate(shapes):
        where = f"ports[{index}]"
        protocol = problems.protocol(where, shape.protocol)
        # a nil port number is legal and means "all ports": nothing a proxy could send to
        if protocol and shape.port is not None and problems.port(f"{where}.port", shape.port):
            ports.append(SlicePort(sys.intern(shape.name or ""), protocol, shape.port))
    return _shared(tuple(ports))


@lru_cache(maxsize=16384)
def place(
    conditions: int,
    node: str,
    zone: str,
    node_hints: tuple[str, ...] = (),
    zone_hints: tuple[str, ...] = (),
) -> Place:
    """The place with these values, one object for all that are equal."""
    return Place(conditions, sys.intern(node), sys.intern(zone), node_hints, zone_hints)


@lru_cache(maxsize=16384)
def _alone(only: Place) -> tuple[Place, ...]:
    return (only,)


def _endpoints(fields: EndpointFields, length: int, problems: UnusableValues) -> Endpoints:
    addresses, places, pods = fields
    joined = parse_plain(addresses, length)
    if joined is None:
        parsed = [
            _endpoint_address(index, text, length, problems) for index, text in enumerate(addresses)
        ]
        usable = [index for index, address in enumerate(parsed) if address is not None]
        joined = b"".join(address for address in parsed if address is not None)
        places, pods = [places[i] for i in usable], [pods[i] for i in usable]
    names = "\n".join(pods)
    if names.count("\n") >= len(pods):  # no pod of Kubernetes has such a name
        names = "\n".join([pod.replace("\n", " ") for pod in pods])
    return Endpoints(
        length, joined, _alone(places[0]) if len(places) == 1 else tuple(places), names
    )


def _endpoint_address(
    index: int, text: str | None, length: int, problems: UnusableValues
) -> Address | None:
    """The address, in whatever form; None if it cannot be used."""
    if text is None:
        problems.append(f"endpoints[{index}]: has no address; ignored")
        return None
    try:
        address = parse_address(text)
    except ValueError as error:
        problems.append(f"endpoints[{index}]: {error}; ignored")
        return None
    if len(address) != length:
        problems.append(f"endpoints[{index}]: {text} is not of the slice's addressType; ignored")
        return None
    return address


# --- Node and ServiceCIDR -----------------------------------------------------------------------


def node(shape: Any, metadata: Metadata) -> Node:
    """A Node. Raises ValueError if it has no name."""
    problems, spec, status = UnusableValues(), shape.spec, shape.status
    addresses = (status and status.addresses) or ()
    cidrs = (spec and (spec.pod_cidrs or (spec.pod_cidr and [spec.pod_cidr]))) or ()
    # the order in which kube-proxy and the kubelet prefer them
    preferred = [
        a.address for kind in ("InternalIP", "ExternalIP") for a in addresses if a.type == kind
    ]
    return Node(
        name=metadata.own_name,
        zone=metadata.labels.get(ZONE_LABEL, ""),
        addresses=problems.usable("status.addresses", parse_address, preferred),
        pod_cidrs=problems.usable("spec.podCIDRs", parse_network, cidrs),
        leaving=metadata.deleting
        or any(taint.key == LEAVING_TAINT for taint in (spec and spec.taints) or ()),
        problems=tuple(problems),
    )


def service_cidr(shape: Any, metadata: Metadata) -> ServiceCIDR:
    """A ServiceCIDR. Raises ValueError if it has no name."""
    problems = UnusableValues()
    cidrs = problems.usable("spec.cidrs", parse_network, shape.spec.cidrs or ())
    return ServiceCIDR(metadata.own_name, cidrs, tuple(problems))
