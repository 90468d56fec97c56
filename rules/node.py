"""What is known of this node, and what follows from it: addresses, pods, node ports, layouts.

When the Node object is deleted, or loses its addresses, zone or pod CIDRs, their last known values
stay in use: the node still forwards packets (kube-proxy does the same).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import msgspec

from rules.events import ApiServers, NodeAddresses
from rules.frontends import FAMILY_OF_LENGTH
from rules.language import Set
from rules.objects import Address, Network, Node, ServiceCIDR
from rules.options import DetectLocalMode, Options, in_networks
from rules.program import SetElement, Surroundings
from rules.selection import NodeLocation
from rules.tables import FAMILIES, SETS, PodInterface

_BY_INTERFACE = (DetectLocalMode.BRIDGE_INTERFACE, DetectLocalMode.INTERFACE_NAME_PREFIX)


class LocalNode:
    """What is known of the node that the options name.

    `object` is its Node with the last known addresses, zone and pod CIDRs; None until there is
    one. `exists` is whether the API has it now. `leaving`: it is being deleted, or was.
    `expected`: the source has a Node for each node, as the API server does; manifests may do
    without.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.object: Node | None = None
        self.exists = False
        self.expected = False
        self.leaving = False
        self.addresses = NodeAddresses(frozenset(), ())
        self.service_cidrs: dict[str, ServiceCIDR] = {}
        self.api_servers = options.api_servers
        self.changed = True
        """Whether something has changed since a State last looked; that is where this is reset."""

    def snapshot(self) -> LocalNode:
        """This node as it is now."""
        twin = copy.copy(self)
        twin.service_cidrs = self.service_cidrs.copy()
        return twin

    def apply(self, event: NodeAddresses | ApiServers) -> None:
        """Takes in addresses."""
        self.changed = True
        match event:
            case NodeAddresses():
                self.addresses = event
            case ApiServers(endpoints):
                self.api_servers = endpoints

    def put(self, new: Node) -> bool:
        """Takes in the Node object. Returns whether it is this node's."""
        if new.name != self.options.node:
            return False
        self.changed = self.changed or not self.exists
        self.exists, self.leaving = True, new.leaving
        last = self.object
        if last:
            new = msgspec.structs.replace(
                new,
                addresses=new.addresses or last.addresses,
                zone=new.zone or last.zone,
                pod_cidrs=new.pod_cidrs or last.pod_cidrs,
            )
        self.changed = self.changed or new != last
        self.object = new
        return True

    def delete(self, name: str) -> bool:
        """The Node object was deleted. Returns whether it was this node's."""
        if name != self.options.node:
            return False
        self.exists, self.leaving, self.changed = False, True, True
        return True

    def put_service_cidr(self, new: ServiceCIDR) -> None:
        """A ServiceCIDR was added or has changed."""
        self.changed = self.changed or self.service_cidrs.get(new.name) != new
        self.service_cidrs[new.name] = new

    def delete_service_cidr(self, name: str) -> None:
        """The ServiceCIDR was deleted."""
        self.changed = self.service_cidrs.pop(name, None) is not None or self.changed

    # what follows

    def surroundings(self) -> Surroundings:
        """What every Service's program depends on."""
        zone = self.options.zone or (self.object.zone if self.object else "")
        identified = frozenset(f for f in FAMILIES if self.pods(f) is not None)
        return Surroundings(
            NodeLocation(self.options.node, zone),
            self.primary(),
            self.options.masquerade_all,
            identified,
            self.options.allow_external_ips,
            self.api_servers,
            self.options.counters,
        )

    def primary(self) -> tuple[Address, ...]:
        """The node's primary address per family: as the options say, else its Node, its routes."""
        first: dict[int, Address] = {}
        declared = self.object.addresses if self.object else ()
        chosen = (self.options.address,) if self.options.address else ()
        for address in (*chosen, *declared, *self.addresses.primary):
            first.setdefault(len(address), address)
        return tuple(first.values())

    def own(self) -> frozenset[Address]:
        """All known addresses of this node."""
        declared = self.object.addresses if self.object else ()
        return self.addresses.addresses | {*self.primary(), *declared}

    def pods(self, family: int) -> bool | PodInterface | None:
        """How the rules identify a pod of this node, as `Layout.pods`."""
        mode = self.options.detect_local
        if mode in _BY_INTERFACE:
            prefix = mode is DetectLocalMode.INTERFACE_NAME_PREFIX
            return PodInterface(self.options.interface, prefix=prefix)
        return True if any(n.version == family for n in self.pod_cidrs()) else None

    def pod_cidrs(self) -> tuple[Network, ...]:
        """The networks by which the rules identify pods of this node."""
        if self.options.detect_local is DetectLocalMode.CLUSTER_CIDR:
            return self.options.cluster_cidrs
        if self.options.detect_local is DetectLocalMode.NODE_CIDR and self.object:
            return self.object.pod_cidrs
        return ()

    def node_port_addresses(self) -> tuple[Address, ...]:
        """The addresses at which node ports answer."""
        primary, networks = self.primary(), self.options.node_port_networks
        first = primary if self.options.node_port_primary else ()
        own = self.addresses.addresses or frozenset(primary)
        return tuple(dict.fromkeys((*first, *(a for a in sorted(own) if in_networks(a, networks)))))

    def elements(self) -> Iterator[SetElement]:
        """The elements that depend on the node and on no Service."""
        for address in self.node_port_addresses():
            yield SETS[FAMILY_OF_LENGTH[len(address)]].nodeport_ips, address, None
        cidrs = [n for c in self.service_cidrs.values() for n in c.cidrs]
        for family, sets in SETS.items():
            yield from _ranges(sets.service_cidrs, (n for n in cidrs if n.version == family))
            yield from _ranges(sets.pod_cidrs, (n for n in self.pod_cidrs() if n.version == family))

    def is_inside(self, client: Address, *, local_endpoint: bool) -> bool:
        """Whether a client is this node or one of its pods, as far as its address shows.

        Where rules identify pods by interface, the pod CIDRs and the endpoints on this node stand
        in. A pod that is taken for a client outside loses its stickiness early, no more.
        """
        if client in self.addresses.addresses or client in self.primary():
            return True
        if self.options.detect_local in _BY_INTERFACE:
            cidrs = self.object.pod_cidrs if self.object else ()
            return in_networks(client, cidrs) or local_endpoint
        return in_networks(client, self.pod_cidrs())


def _ranges(owner: Set, networks: Iterable[Network]) -> Iterator[SetElement]:
    """Networks as ranges that neither overlap nor touch, as the kernel's sets require."""
    bounds = sorted((int(n.network_address), int(n.broadcast_address)) for n in networks)
    merged: list[tuple[int, int]] = []
    for low, high in bounds:
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    length = owner.key_length
    for low, high in merged:
        yield owner, low.to_bytes(length, "big"), high.to_bytes(length, "big")
