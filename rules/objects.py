"""Records: Services, EndpointSlices, Nodes and ServiceCIDRs as the agent uses them.

What a record holds has been parsed: addresses are packed bytes in network order, protocols are IP
protocol numbers, names are plain strings that never reach a rule. `rules.decode` and
`rules.decode_protobuf` make records from the API's encodings.

Records are never part of a reference cycle, so the garbage collector need not know them (`gc`): 16
bytes less for each.

There are two kinds of bad input. An object of the wrong shape (a string in place of a number, no
name) raises `InvalidObject`; the caller keeps the last valid version of that object. In an object
of the right shape an unusable value (not an address, a port out of range) is left out of the record
and listed in its `problems`.

Field names and meaning: https://kubernetes.io/docs/reference/kubernetes-api/.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Sequence
from enum import Enum
from functools import lru_cache
from socket import AF_INET, AF_INET6, inet_pton
from struct import iter_unpack
from typing import NamedTuple

import msgspec

TCP, UDP, SCTP = 6, 17, 132
PROTOCOLS = {"TCP": TCP, "UDP": UDP, "SCTP": SCTP}
PROTOCOL_NAMES = {number: name.lower() for name, number in PROTOCOLS.items()}

SERVICE_NAME_LABEL = "kubernetes.io/service-name"
PROXY_NAME_LABEL = "service.kubernetes.io/service-proxy-name"
HEADLESS_LABEL = "service.kubernetes.io/headless"
ZONE_LABEL = "topology.kubernetes.io/zone"
LEAVING_TAINT = "ToBeDeletedByClusterAutoscaler"
ENDPOINT_COUNTERS_ANNOTATION = "sliceproxy.io/endpoint-counters"
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
    """An object that cannot be used at all. `subject` is its kind and, if it has one, its name."""

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


class ServicePort(msgspec.Struct, frozen=True, gc=False):
    """One port of a Service. `node_port` is 0 where the Service has none."""

    name: str
    protocol: int
    port: int
    node_port: int


class Algorithm(Enum):
    """How an endpoint is chosen for a new connection."""

    RANDOM = "random"
    SOURCE_HASH = "source-hash"
    WEIGHTED = "weighted"


class Balancing(msgspec.Struct, frozen=True):
    """A Service's algorithm and its weights (`rules.weights`).

    `weights` are by packed address or pod name, `zone_weights` by zone; 0 drains. Both are empty
    under RANDOM.
    """

    algorithm: Algorithm
    weights: tuple[tuple[Address | str, int], ...] = ()
    zone_weights: tuple[tuple[Address | str, int], ...] = ()


RANDOM_CHOICE = Balancing(Algorithm.RANDOM)
"""The balancing of a Service without annotations."""


class Service(msgspec.Struct, frozen=True, gc=False):
    """The fields of a Service that the data plane uses.

    `proxied` is false for Services that have no address of their own (headless, ExternalName, not
    allocated yet). `created` is the API's RFC 3339 string, whose order is that of time.
    `affinity_seconds` is 0 without session affinity. `proxy_name` is that label's value, None
    without the label. `endpoint_counters`: its connections are counted by endpoint.
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
    balancing: Balancing = RANDOM_CHOICE
    endpoint_counters: bool = False

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


class WeightedEndpoint(Endpoint, frozen=True, gc=False):
    """An endpoint for which its slice has a weight (`rules.weights`). A class of its own, so that
    endpoints without one need no memory for it."""

    weight: int = 1

    @classmethod
    def of(cls, endpoint: Endpoint, weight: int) -> WeightedEndpoint:
        """The endpoint with this weight."""
        return cls(**msgspec.structs.asdict(endpoint), weight=weight)


class Place(NamedTuple):
    """What many endpoints have in common: all of an `Endpoint` but its address and pod."""

    conditions: int
    node: str
    zone: str
    node_hints: tuple[str, ...]
    zone_hints: tuple[str, ...]


Row = tuple[tuple[Address], Place, str]
"""An endpoint's address, place and pod, as columns give it."""


class Endpoints(msgspec.Struct, frozen=True, gc=False):
    """The endpoints of a slice, as columns: 35 bytes for each where an `Endpoint` takes 190.

    `addresses` of `length` bytes are joined, and so are `pods`, with newlines between them.
    `weights`, if there are any, has None for an endpoint without one.
    """

    length: int = 4
    addresses: bytes = b""
    places: tuple[Place, ...] = ()
    pods: str = ""
    weights: tuple[int | None, ...] = ()

    @classmethod
    def of(cls, endpoints: Sequence[Endpoint]) -> Endpoints:
        """These endpoints, all of one family and without weights."""
        return cls(
            len(endpoints[0].address) if endpoints else 4,
            b"".join(e.address for e in endpoints),
            tuple(
                Place(e.conditions, e.node, e.zone, e.node_hints, e.zone_hints) for e in endpoints
            ),
            "\n".join(e.pod for e in endpoints),
        )

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[Endpoint]:
        found = [Endpoint(address, *place, pod) for (address,), place, pod in self.rows()]
        if not self.weights:
            return iter(found)
        weighted = zip(found, self.weights, strict=True)
        return (e if w is None else WeightedEndpoint.of(e, w) for e, w in weighted)

    def rows(self) -> Iterator[Row]:
        """The endpoints without their weights and without an object for each."""
        # without endpoints there is one pod, the empty one
        return zip(
            iter_unpack(f"{self.length}s", self.addresses),
            self.places,
            self.pods.split("\n"),
            strict=False,
        )


class SlicePort(NamedTuple):
    """A port of a slice; the number is the target port and may differ between slices."""

    name: str
    protocol: int
    port: int


class EndpointSlice(msgspec.Struct, frozen=True, gc=False):
    """A slice. `family` is 4 or 6, or 0 where the slice holds no addresses a proxy can use.

    `service` is None without the label kubernetes.io/service-name: controllers of other projects
    make such slices. `proxy_name` and `headless` are labels, and `created` is, as a Service's.
    """

    name: Name
    service: Name | None
    proxy_name: str | None
    headless: bool
    family: int
    ports: tuple[SlicePort, ...]
    endpoints: Endpoints
    triggered: str = ""
    problems: tuple[str, ...] = ()
    created: str = ""


class Node(msgspec.Struct, frozen=True):
    """A Node: its zone, its addresses and the networks of its pods.

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


# --- single values ------------------------------------------------------------------------------

_USUAL_FIRST = {
    4: frozenset(range(1, 224)) - {127, 169},
    16: frozenset((*range(0x20, 0x40), 0xFC, 0xFD)),  # global and unique local
}
"""By length, first bytes of addresses that may be sent to, whatever follows."""
_LEADING_ZEROS = re.compile(r"\b0+(?=[0-9a-fA-F])")
_UNUSABLE = {
    "is_unspecified": "is the unspecified address",
    "is_loopback": "is a loopback address",
    "is_multicast": "is a multicast address",
}


def parse_plain_ipv4(text: str) -> Address | None:
    """An IPv4 address in the usual form, at a fiftieth of `ipaddress`'s time; None for all others.

    inet_pton refuses other forms: fewer than four numbers, leading zeros, blanks.
    """
    try:
        packed = inet_pton(AF_INET, text)
    except (OSError, ValueError):
        return None
    return packed if packed[0] in _USUAL_FIRST[4] else None


def parse_plain(texts: Sequence[str | None], length: int) -> bytes | None:
    """Addresses of `length` bytes in the usual form, joined; None if one of them is not such.

    With 50,000 endpoints it takes 10 ms of a start; one address after the other took 30.
    """
    family = AF_INET if length == 4 else AF_INET6
    try:
        joined = b"".join([inet_pton(family, text) for text in texts])  # type: ignore[arg-type]
    except (OSError, ValueError, TypeError):
        return None
    return joined if _USUAL_FIRST[length].issuperset(joined[::length]) else None


def parse_address(text: str, *, link_local: bool = False) -> Address:
    """The packed form of an IP address that traffic may be sent to.

    Reads what kube-proxy's ParseIPSloppy reads: numbers with leading zeros are decimal, an
    IPv4-mapped IPv6 address is an IPv4 address. Objects from before the API server refused these
    forms still have them (kubernetes issue 100895).

    Raises ValueError for anything else, for a zone index, and for addresses that the API server
    refuses for endpoints and external IPs: loopback and the like (CVE-2020-8554, validation of
    discovery/v1). `link_local` addresses are valid for load balancers only.
    """
    plain = parse_plain_ipv4(text)
    return plain if plain is not None else _parse_unusual(text, link_local)


@lru_cache(maxsize=4096)
def _parse_unusual(text: str, link_local: bool) -> Address:
    try:
        address = ipaddress.ip_address(_LEADING_ZEROS.sub("", text))
    except ValueError:
        raise ValueError(f"{text!r} is not an IP address") from None
    if getattr(address, "scope_id", None):
        raise ValueError(f"{text!r} has a zone index")
    address = getattr(address, "ipv4_mapped", None) or address
    for attribute, reason in _UNUSABLE.items():
        if getattr(address, attribute):
            raise ValueError(f"{text} {reason}")
    if address.is_link_local and not link_local:
        raise ValueError(f"{text} is a link-local address")
    return address.packed


def parse_network(text: str) -> Network:
    """A CIDR, read as `parse_address` reads addresses; host bits are cleared. Raises ValueError."""
    try:
        network = ipaddress.ip_network(_LEADING_ZEROS.sub("", text.strip()), strict=False)
    except ValueError:
        raise ValueError(f"{text!r} is not a CIDR") from None
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    if mapped and network.prefixlen >= 96:
        return ipaddress.IPv4Network((mapped, network.prefixlen - 96))
    return network


def address_text(address: Address) -> str:
    """The usual text of a packed address."""
    if len(address) == 4:
        return ".".join(map(str, address))  # a tenth of the time, for history
    return str(ipaddress.ip_address(address))
