"""The answer of `healthCheckNodePort`: how many ready endpoints are on this node."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from rules.frontends import FAMILY_OF_LENGTH
from rules.objects import READY, EndpointSlice, Service
from rules.weights import weigher


class HealthCheck(NamedTuple):
    """A Service's health check port, and its ready endpoints on this node, per family.

    A count is None where the Service has no cluster IP of that family.
    """

    port: int
    ipv4: int | None
    ipv6: int | None = None

    def endpoints(self, family: int) -> int:
        """The count for a request that arrived over IPv4 (4) or IPv6 (6).

        A load balancer may probe a Service of one family over the other, so a family that the
        Service does not have answers with the count of the one that it has.
        """
        first, second = (self.ipv4, self.ipv6) if family == 4 else (self.ipv6, self.ipv4)
        return (first if first is not None else second) or 0


def health_check(
    service: Service, slices: Iterable[EndpointSlice], node: str
) -> HealthCheck | None:
    """What a Service's health check port has to answer; None if it has none.

    An endpoint is an address, however many ports it has. Drained ones do not count: a load balancer
    must not send here what would be dropped.
    """
    if not (service.proxied and service.external_local and service.health_check_node_port):
        return None
    weight = weigher(service.balancing)
    here: dict[int, set[bytes]] = {4: set(), 6: set()}
    for piece in slices:
        if piece.ports and piece.family in here:
            here[piece.family].update(
                e.address
                for e in piece.endpoints
                if e.node == node and e.conditions & READY and weight(e)
            )
    families = {FAMILY_OF_LENGTH[len(address)] for address in service.cluster_ips}
    ipv4, ipv6 = (len(here[family]) if family in families else None for family in (4, 6))
    return HealthCheck(service.health_check_node_port, ipv4, ipv6)
