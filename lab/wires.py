"""The links, addresses and routes of a World, over rtnetlink."""

from __future__ import annotations

import errno
import ipaddress
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pyroute2 import IPRoute, NetlinkError

from lab.hosts import BOTH_FAMILIES, Host, WorldError

_RT_SCOPE_LINK = 253
_RT_SCOPE_HOST = 254
_RT_TABLE_LOCAL = 255
_RTN_LOCAL = 2
_IFA_F_NODAD = 0x02
_WORKER_SECONDS = 30
_POD_GATEWAY_IPV4 = "169.254.1.1"
_POD_GATEWAY_IPV6 = "fe80::1"


def port_name(machine: str) -> str:
    """The name of the bridge's port for a machine."""
    return f"to-{machine}"


def veth_name(pod: Host) -> str:
    """The name of a pod's interface on its machine."""
    return f"vethpod{pod.name.rpartition('-')[2]}"


def make_bridge(fabric: Host, iproute: IPRoute) -> None:
    """Makes the fabric: a bridge that forwards between machines and drops everything else."""
    # Snooping would hold back neighbour solicitations until it has learnt the groups.
    _add_link(iproute, ifname="br0", kind="bridge", br_mcast_snooping=0)
    _raise(iproute, "br0")
    _add_fabric_addresses(iproute, "br0", fabric)
    # What arrives for an unknown address is to vanish.  Without a route IPv6 would report it as
    # unreachable; with one, it finds that forwarding is off and drops without a word.
    for family in BOTH_FAMILIES:
        _add_route(iproute, "default", family, oif=interface_index(iproute, "br0"))


def make_wire(far_name: str, far_host: Host, iproute: IPRoute) -> None:
    """Make eth0, with its other end in another namespace.

    Both ends are born where they stay, so two worlds never meet in the caller's namespace.
    """
    peer = {"ifname": far_name, "net_ns_fd": far_host.namespace}
    _add_link(iproute, ifname="eth0", kind="veth", peer=peer)


def plug_in(machines: Sequence[Host], iproute: IPRoute) -> None:
    """Adds the machines' interfaces to the bridge."""
    bridge = interface_index(iproute, "br0")
    for machine in machines:
        port = port_name(machine.name)
        iproute.link("set", index=interface_index(iproute, port), master=bridge)
        _raise(iproute, port)


def configure_machine(machine: Host, hosts: Mapping[str, Host], iproute: IPRoute) -> None:
    """Gives a machine its addresses and routes."""
    _raise(iproute, "lo")
    _raise(iproute, "eth0")
    _add_fabric_addresses(iproute, "eth0", machine)
    node, elsewhere = hosts["node"], hosts["elsewhere"]
    router = hosts["fabric"] if machine in (node, elsewhere) else node
    for family in BOTH_FAMILIES:
        _add_route(iproute, "default", family, gateway=router.address(family))
    if machine == node:
        _add_route(iproute, "10.244.2.0/24", socket.AF_INET, gateway=elsewhere.ipv4)
        _add_route(iproute, "fd00:10:244:2::/64", socket.AF_INET6, gateway=elsewhere.ipv6)
    if machine == elsewhere:
        _add_route(iproute, "10.244.1.0/24", socket.AF_INET, gateway=node.ipv4)
        _add_route(iproute, "fd00:10:244:1::/64", socket.AF_INET6, gateway=node.ipv6)


def route_to_pods(machine: Host, pods: Sequence[Host], iproute: IPRoute) -> None:
    """Routes a machine's pods, each over its own veth."""
    for pod in pods:
        veth = veth_name(pod)
        _raise(iproute, veth)
        # Of scope link, so that masquerading takes the machine's address instead.
        add_address(iproute, veth, ipaddress.ip_interface(_POD_GATEWAY_IPV4), scope=_RT_SCOPE_LINK)
        add_address(iproute, veth, ipaddress.ip_interface(f"{_POD_GATEWAY_IPV6}/64"))
        index = interface_index(iproute, veth)
        for family, length in ((socket.AF_INET, 32), (socket.AF_INET6, 128)):
            # Without prefsrc the machine itself would send from the gateway address.
            _add_route(
                iproute,
                f"{pod.address(family)}/{length}",
                family,
                oif=index,
                prefsrc=machine.address(family),
                **({"scope": _RT_SCOPE_LINK} if family == socket.AF_INET else {}),
            )


def configure_pod(pod: Host, iproute: IPRoute) -> None:
    """Gives a pod its addresses and its default route."""
    _raise(iproute, "lo")
    _raise(iproute, "eth0")
    for family in BOTH_FAMILIES:
        add_address(iproute, "eth0", ipaddress.ip_interface(pod.address(family)))
    index = interface_index(iproute, "eth0")
    _add_route(
        iproute, "default", socket.AF_INET, gateway=_POD_GATEWAY_IPV4, oif=index, flags=["onlink"]
    )
    _add_route(iproute, "default", socket.AF_INET6, gateway=_POD_GATEWAY_IPV6, oif=index)


def _add_link(iproute: IPRoute, kind: str, **attributes: Any) -> None:
    try:
        iproute.link("add", kind=kind, **attributes)
    except NetlinkError as error:
        if error.code != errno.EOPNOTSUPP:
            raise
        raise WorldError(
            f"this kernel cannot make a {kind} interface: load the module {kind}, or use a kernel"
            f" with CONFIG_{kind.upper()}"
        ) from error


def interface_index(iproute: IPRoute, interface: str) -> int:
    """The index of an interface in this namespace. Raises WorldError if it does not exist."""
    found = iproute.link_lookup(ifname=interface)
    if not found:
        raise WorldError(f"there is no interface {interface} in this namespace")
    return int(found[0])


def _raise(iproute: IPRoute, interface: str) -> None:
    iproute.link("set", index=interface_index(iproute, interface), state="up")


def _add_fabric_addresses(iproute: IPRoute, interface: str, host: Host) -> None:
    add_address(iproute, interface, ipaddress.ip_interface(f"{host.ipv4}/24"))
    add_address(iproute, interface, ipaddress.ip_interface(f"{host.ipv6}/64"))


def add_address(
    iproute: IPRoute,
    interface: str,
    address: ipaddress.IPv4Interface | ipaddress.IPv6Interface,
    scope: int | None = None,
) -> None:
    """Adds an address to an interface; it is usable at once."""
    attributes: dict[str, Any] = {}
    if address.version == 6:
        attributes["flags"] = _IFA_F_NODAD
    elif scope is not None:
        attributes["scope"] = scope
    elif interface == "lo":
        # Masquerading towards a pod falls back to the addresses of lo first, and would take a
        # service address of wider scope for the node's own.
        attributes["scope"] = _RT_SCOPE_HOST
    index = interface_index(iproute, interface)
    iproute.addr(
        "add",
        index=index,
        address=str(address.ip),
        prefixlen=address.network.prefixlen,
        **attributes,
    )
    if address.version == 6:
        _wait_until_local(iproute, index, str(address.ip))


def _wait_until_local(iproute: IPRoute, index: int, address: str) -> None:
    """Returns when the kernel receives packets to this new IPv6 address.

    Even without duplicate address detection a kernel worker does that some time later
    (`addrconf_dad_work`): it joins the group of neighbour solicitations, then adds the local
    route. A solicitation that arrives earlier is lost, and repeated after a second.
    """
    deadline = time.monotonic() + _WORKER_SECONDS
    while not any(
        (route["type"], route.get_attr("RTA_OIF"), route.get_attr("RTA_DST"))
        == (_RTN_LOCAL, index, address)
        for route in iproute.get_routes(family=socket.AF_INET6, table=_RT_TABLE_LOCAL)
    ):
        if time.monotonic() > deadline:
            raise WorldError(f"the kernel has not added the local route of {address}: is it up?")
        time.sleep(0.001)


def _add_route(
    iproute: IPRoute, destination: str, family: socket.AddressFamily, **attributes: Any
) -> None:
    iproute.route("add", dst=destination, family=family, **attributes)
