"""What `healthCheckNodePort` has to answer: how many ready endpoints are on this node."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from rules.objects import READY, EndpointSlice, Service


class HealthCheck(NamedTuple):
    """A Service's health check port, and how many ready endpoints it has on this node."""

    port: int
    endpoints: int


def health_check(
    service: Service, slices: Iterable[EndpointSlice], node: str
) -> HealthCheck | None:
    """What a Service's health check port has to answer; None if it has none.

    An endpoint is an address, however many ports it has. In a Service of both families a pod has
    one of each, so the families are not added up.
    """
    if not (service.proxied and service.external_local and service.health_check_node_port):
        return None
    here: dict[int, set[bytes]] = {4: set(), 6: set()}
    for piece in slices:
        for endpoint in piece.endpoints if piece.ports else ():
            if endpoint.node == node and endpoint.conditions & READY:
                here[piece.family].add(endpoint.address)
    return HealthCheck(service.health_check_node_port, max(map(len, here.values())))
