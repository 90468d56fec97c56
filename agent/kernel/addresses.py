"""The addresses of this machine, followed over rtnetlink with pyroute2.

Node ports answer at them, and source ranges that let the node in need them. Whatever changes, all
of them are read again: there are few, and a list cannot drift.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

from pyroute2.iproute.linux import IPRoute
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl import (
    RTNLGRP_IPV4_IFADDR,
    RTNLGRP_IPV4_ROUTE,
    RTNLGRP_IPV6_IFADDR,
    RTNLGRP_IPV6_ROUTE,
)

from agent.kernel.socket import NETLINK_ROUTE, NetlinkSocket
from agent.worker import Failed, Worker
from rules.events import Event, NodeAddresses
from rules.objects import Address, parse_address

# where packets to nowhere in particular would leave from (documentation prefixes, never sent to)
_SOMEWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}
_RT_TABLE_LOCAL, _RTN_LOCAL = 255, 2
_GROUPS = (RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV6_IFADDR, RTNLGRP_IPV6_ROUTE)


def read(route: Any) -> NodeAddresses:
    """All addresses that the node answers at but loopback ones, and the primary ones.

    Link-local addresses and host routes of type `local` are among them: `nodePortAddresses` may
    select them. They are never primary.
    """
    addresses, others = set(), set()
    for message in route.get_addr():
        text = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
        if address := _usable(text):
            addresses.add(address)
        elif address := _usable(text, link_local=True):
            others.add(address)
    others |= _local_routes(route)
    return NodeAddresses(frozenset(addresses | others), _primary(addresses))


def _local_routes(route: Any) -> set[Address]:
    """Destinations of host routes of type `local`: what the kernel takes for its own (AnyIP)."""
    found = set()
    for family, length in ((socket.AF_INET, 32), (socket.AF_INET6, 128)):
        for message in route.get_routes(family=family, table=_RT_TABLE_LOCAL):
            destination = message.get_attr("RTA_DST")
            is_own = (message["type"], message["dst_len"]) == (_RTN_LOCAL, length)
            if is_own and destination and (address := _usable(destination, link_local=True)):
                found.add(address)
    return found


def _usable(text: str, *, link_local: bool = False) -> Address | None:
    try:
        return parse_address(text, link_local=link_local)
    except ValueError:
        return None


def _primary(addresses: set[Address]) -> tuple[Address, ...]:
    """Per family the source address of the default route, else the lowest address."""
    found = []
    for family, somewhere in _SOMEWHERE.items():
        length = 4 if family == socket.AF_INET else 16
        address = _source_towards(family, somewhere)
        candidates = sorted(a for a in addresses if len(a) == length)
        if address in candidates:
            found.append(address)
        elif candidates:
            found.append(candidates[0])
    return tuple(found)


def _source_towards(family: int, destination: str) -> Address:
    """The source address that the kernel picks; connecting a datagram socket sends nothing."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((destination, 9))
            return ipaddress.ip_address(probe.getsockname()[0]).packed
    except OSError:
        return b""


def interface_towards(address: Address) -> str:
    """The interface of the route to an address, by which its packets come in unless routing is
    asymmetric; "" if there is no route."""
    try:
        with IPRoute() as route:
            (message,) = route.route("get", dst=str(ipaddress.ip_address(address)))
            (link,) = route.get_links(message.get_attr("RTA_OIF"))
    except NetlinkError:
        return ""
    return str(link.get_attr("IFLA_IFNAME"))


class AddressFollower(Worker):
    """Reports the node's addresses at start, then sets `ready`, and reports them when they change.

    `ready` is also set if it fails.
    """

    def __init__(self, put: Callable[[Sequence[Event]], None], failed: Failed) -> None:
        super().__init__("node addresses", failed)
        self.ready = threading.Event()
        self._put = put
        self._last: NodeAddresses | None = None

    def work(self) -> None:
        """Listens until `stop`."""
        try:
            with _listener() as changes, IPRoute() as route:
                self._report(read(route))
                self.ready.set()
                while self.wait_readable(changes.fileno()):
                    changes.drain()
                    self._report(read(route))
        finally:
            self.ready.set()

    def _report(self, addresses: NodeAddresses) -> None:
        if addresses != self._last:
            self._last = addresses
            self._put([addresses])


def _listener() -> NetlinkSocket:
    """Notifications about addresses and routes. What they say is not read: everything is read
    again after any of them, also after an overflow."""
    listener = NetlinkSocket(NETLINK_ROUTE)
    for group in _GROUPS:
        listener.join(group)
    return listener
