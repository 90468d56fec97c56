"""A Service's addresses: where it answers, from which list, and what a client's address becomes.

| frontend | list by | masqueraded |
|---|---|---|
| cluster IP | internalTrafficPolicy | all but pods of this node, if these can be identified |
| load balancer IP, external IP, node port | externalTrafficPolicy | policy Cluster: all |
| the same, policy Local, asked from inside | the cluster list | what the node itself sends |

Every frontend is a *claim* on a key of one verdict map. Two frontends with one key cannot both
have it: within a Service the first in the order of `frontends` has it, between Services the order
of `rules.claims` decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

from rules.objects import PROTOCOL_NAMES, Address, Service, ServicePort, address_text
from rules.tables import FAMILIES
from rules.target import packed_port

FAMILY_OF_LENGTH = {4: 4, 16: 6}


class Kind(Enum):
    """What sort of address a frontend is."""

    CLUSTER_IP = "cluster IP"
    LOAD_BALANCER_IP = "load balancer IP"
    EXTERNAL_IP = "external IP"
    NODE_PORT = "node port"


class Frontend(NamedTuple):
    """One address, protocol and port. The address of a node port is empty: any of the node's."""

    kind: Kind
    family: int
    address: Address
    protocol: int
    port: int
    service_port: ServicePort
    local: bool

    @property
    def key(self) -> bytes:
        """The key in the verdict maps: address (unless a node port), protocol, port; each padded
        to 4 bytes, in network order."""
        return destination_key(self.address, self.protocol, self.port)

    @property
    def external(self) -> bool:
        """Whether clients from outside the cluster are meant to use it."""
        return self.kind is not Kind.CLUSTER_IP

    def __str__(self) -> str:
        where = address_text(self.address) if self.address else "node port"
        if self.family == 6 and self.address:
            where = f"[{where}]"
        separator = ":" if self.address else " "
        return f"{where}{separator}{self.port}/{PROTOCOL_NAMES[self.protocol]}"


def destination_key(address: Address, protocol: int, port: int) -> bytes:
    """A concatenation of address, protocol and port as the kernel holds it."""
    return address + bytes((protocol, 0, 0, 0)) + packed_port(port)


def frontends(service: Service, *, external_ips: bool = True) -> Iterator[Frontend]:
    """All addresses at which the Service answers, in the order in which they are served.

    That order counts where two of them have one key, and where a Service has more of them than are
    served (`program.MAX_ELEMENTS`): cluster IPs, node ports, load balancer IPs, external IPs, each
    as the spec lists them.

    A Service answers only in the families in which it has a cluster IP: an external or load
    balancer IP of another family is left untouched. `external_ips` is false where the cluster does
    not serve `spec.externalIPs` (feature gate AllowServiceExternalIPs, KEP-5707).
    """
    for kind, addresses, local in _addresses(service, external_ips=external_ips):
        for address in addresses:
            family = FAMILY_OF_LENGTH[len(address)]
            for port in service.ports:
                yield Frontend(kind, family, address, port.protocol, port.port, port, local)
        if kind is Kind.CLUSTER_IP:
            yield from _node_ports(service)


def _addresses(
    service: Service, *, external_ips: bool
) -> Iterator[tuple[Kind, tuple[Address, ...], bool]]:
    """The addresses by kind, and whether their traffic policy is Local."""
    if not service.proxied:
        return
    lengths = {len(address) for address in service.cluster_ips}
    for kind, addresses, local in (
        (Kind.CLUSTER_IP, service.cluster_ips, service.internal_local),
        (Kind.LOAD_BALANCER_IP, service.load_balancer_ips, service.external_local),
        (Kind.EXTERNAL_IP, service.external_ips if external_ips else (), service.external_local),
    ):
        if addresses:
            yield kind, tuple([a for a in addresses if len(a) in lengths]), local


def _node_ports(service: Service) -> Iterator[Frontend]:
    """A node port answers in every family in which the Service has a cluster IP."""
    ports = [port for port in service.ports if port.node_port]
    if not ports:
        return
    local = service.external_local
    families = {FAMILY_OF_LENGTH[len(address)] for address in service.cluster_ips}
    for family in FAMILIES:
        for port in ports if family in families else ():
            yield Frontend(Kind.NODE_PORT, family, b"", port.protocol, port.node_port, port, local)


def frontend_count(service: Service, *, external_ips: bool = True) -> int:
    """How many frontends a Service has, found without making them."""
    addresses = sum(len(a) for _, a, _ in _addresses(service, external_ips=external_ips))
    families = {len(address) for address in service.cluster_ips if service.proxied}
    node_ports = sum(bool(port.node_port) for port in service.ports)
    return addresses * len(service.ports) + len(families) * node_ports
