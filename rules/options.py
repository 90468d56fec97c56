"""The data plane's options, with kube-proxy's defaults."""

from __future__ import annotations

import ipaddress
from enum import Enum

import msgspec

from rules.objects import Address, Network
from rules.tables import DEFAULT_MARK


class DetectLocalMode(Enum):
    """How packets from pods of this node are identified, by kube-proxy's names."""

    NONE = "None"
    CLUSTER_CIDR = "ClusterCIDR"
    NODE_CIDR = "NodeCIDR"
    BRIDGE_INTERFACE = "BridgeInterface"
    INTERFACE_NAME_PREFIX = "InterfaceNamePrefix"


class Options(msgspec.Struct, frozen=True):
    """The agent's options.

    `zone` is that of the Node object where empty. Node ports are accepted on the node's primary
    address per family if `node_port_primary`, and on its addresses in `node_port_networks`.
    `interface` is the bridge's name or the prefix, as the mode has it. `address` is the node's
    primary address of its family, whatever its Node says. Unless `allow_external_ips`, the
    `externalIPs` of Services are not served (KEP-5707). `api_servers` are the addresses
    and ports of the API server, which no Service may take; the event `ApiServers` replaces them.
    `counters` counts packets in the elements of maps and sets.
    """

    node: str
    zone: str = ""
    proxy_name: str = ""
    mark: int = DEFAULT_MARK
    masquerade_all: bool = False
    detect_local: DetectLocalMode = DetectLocalMode.NONE
    cluster_cidrs: tuple[Network, ...] = ()
    interface: str = ""
    node_port_primary: bool = True
    node_port_networks: tuple[Network, ...] = ()
    address: Address | None = None
    allow_external_ips: bool = True
    api_servers: frozenset[tuple[Address, int]] = frozenset()
    counters: bool = True


def in_networks(address: bytes, networks: tuple[Network, ...]) -> bool:
    """Whether a packed address is in one of the networks."""
    return any(ipaddress.ip_address(address) in network for network in networks)
