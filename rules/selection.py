"""Which endpoints this node uses, and why.

The rules are kube-proxy's (KEP-1669 terminating endpoints, KEP-2433 topology hints, KEP-3015 same
node and zone; `docs/semantics.md` has them on a page):

- the *cluster list*: the ready endpoints, narrowed to those hinted for this node if every ready
  one carries node hints and one names this node, else likewise for this zone; if there is no ready
  one, those that are serving while they terminate;
- the *local list*: the ready endpoints on this node, else the local ones that are serving while
  they terminate. Hints do not apply.

A selection is a `Basis` and the endpoints that meet it. The reason for a single endpoint's fate is
derived from the basis on demand, so programming does not compute reasons.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import NamedTuple

from rules.objects import READY, SERVING, TERMINATING, Endpoint, EndpointSlice, Service
from rules.target import Target, packed_port


class NodeLocation(NamedTuple):
    """This node: its name and its zone, "" if it has none."""

    node: str
    zone: str


class Basis(Enum):
    """What the used endpoints have in common."""

    READY = "ready"
    NODE_HINTS = "ready and hinted for this node"
    ZONE_HINTS = "ready and hinted for this zone"
    TERMINATING = "serving while terminating, as none is ready"
    LOCAL_READY = "ready and on this node"
    LOCAL_TERMINATING = "serving while terminating on this node, as none here is ready"
    NONE = "no usable endpoint"


class Selection(NamedTuple):
    """The used endpoints, in the order in which the slices hold them, and what they meet."""

    basis: Basis
    targets: tuple[Target, ...]


def candidates(
    slices: Iterable[EndpointSlice], family: int, port_name: str, protocol: int
) -> dict[Target, Endpoint]:
    """The endpoints of one Service port in one family, from all its slices, each once.

    A slice's port matches by name and protocol. While the controller moves an endpoint between
    slices, both may hold a copy. A ready copy counts before one that is not; otherwise the copy in
    the younger slice counts, which the controller wrote last.
    """
    found: dict[Target, Endpoint] = {}
    ages: dict[Target, str] = {}
    for piece in slices:
        if piece.family != family:
            continue
        for name, number, port in piece.ports:
            if name == port_name and number == protocol:
                tail = packed_port(port)
                copies = [(endpoint.address + tail, endpoint) for endpoint in piece.endpoints]
                if not found:
                    found = dict(copies)
                    if len(found) == len(copies):  # as nearly always: one slice, each address once
                        ages = dict.fromkeys(found, piece.created)
                        continue
                    found = {}
                for target, endpoint in copies:
                    if target not in found or _precedence(endpoint, piece.created) > _precedence(
                        found[target], ages[target]
                    ):
                        found[target] = endpoint
                        ages[target] = piece.created
    return found


def service_is_ours(service: Service, proxy_name: str) -> bool:
    """Whether this proxy serves the Service: by its `service-proxy-name` label alone."""
    return service.proxy_name == (proxy_name or None)


def slice_is_ours(piece: EndpointSlice) -> bool:
    """Whether the slice may give endpoints. The slices of headless Services carry the label
    `headless`; a Service with a cluster IP may carry that label too, and is served."""
    return not piece.headless


def serving(found: Mapping[Target, Endpoint]) -> frozenset[Target]:
    """The endpoints that serve, wherever they are and whether a list has them or not."""
    return frozenset(t for t, e in found.items() if e.conditions & (READY | SERVING))


def _precedence(endpoint: Endpoint, created: str) -> tuple[bool, str, int]:
    """The order among copies of one endpoint; the greatest counts."""
    return bool(endpoint.conditions & READY), created, _rank(endpoint)


def _rank(endpoint: Endpoint) -> int:
    if endpoint.conditions & READY:
        return 2
    return int(_leaving(endpoint))


def _leaving(endpoint: Endpoint) -> bool:
    return endpoint.conditions & (SERVING | TERMINATING) == SERVING | TERMINATING


def cluster_list(found: Mapping[Target, Endpoint], place: NodeLocation) -> Selection:
    """What this node uses under traffic policy Cluster."""
    ready = [(t, e) for t, e in found.items() if e.conditions & READY]
    if not ready:
        leaving = tuple(t for t, e in found.items() if _leaving(e))
        return Selection(Basis.TERMINATING if leaving else Basis.NONE, leaving)
    if all(e.node_hints for _, e in ready):
        hinted = tuple(t for t, e in ready if place.node in e.node_hints)
        if hinted:
            return Selection(Basis.NODE_HINTS, hinted)
    if place.zone and all(e.zone_hints for _, e in ready):
        hinted = tuple(t for t, e in ready if place.zone in e.zone_hints)
        if hinted:
            return Selection(Basis.ZONE_HINTS, hinted)
    return Selection(Basis.READY, tuple([t for t, _ in ready]))  # a generator takes a call for each


def local_list(found: Mapping[Target, Endpoint], place: NodeLocation) -> Selection:
    """What this node uses under traffic policy Local."""
    here = [(t, e) for t, e in found.items() if e.node == place.node]
    if not here:
        return _NONE_HERE
    ready = tuple(t for t, e in here if e.conditions & READY)
    if ready:
        return Selection(Basis.LOCAL_READY, ready)
    leaving = tuple(t for t, e in here if _leaving(e))
    return Selection(Basis.LOCAL_TERMINATING if leaving else Basis.NONE, leaving)


_NONE_HERE = Selection(Basis.NONE, ())


def reason(endpoint: Endpoint, target: Target, selection: Selection, place: NodeLocation) -> str:
    """Why this endpoint is used under this selection, or why not: a clause for people."""
    if target in selection.targets:
        return selection.basis.value
    ready = endpoint.conditions & READY
    local = selection.basis in (Basis.LOCAL_READY, Basis.LOCAL_TERMINATING)
    if local and endpoint.node != place.node:
        return f"on {endpoint.node or 'an unknown node'}, and the policy is Local"
    if selection.basis is Basis.NODE_HINTS and ready:
        return f"hinted for {', '.join(endpoint.node_hints)}"
    if selection.basis is Basis.ZONE_HINTS and ready:
        return f"hinted for {', '.join(endpoint.zone_hints)}"
    if selection.basis is Basis.NONE and endpoint.node != place.node and _rank(endpoint):
        return f"on {endpoint.node or 'an unknown node'}, and the policy is Local"
    if _leaving(endpoint):
        return "terminating, and others are ready"
    return "not ready" if not endpoint.conditions & TERMINATING else "terminating, not serving"
