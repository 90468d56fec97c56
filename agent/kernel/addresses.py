"""The addresses of this machine, followed over rtnetlink. pyroute2 has the messages' formats.

Node ports answer at them, and source ranges that let the node in need them. Whatever changes, all
of them are read again: there are few, and a list cannot drift.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from pyroute2.netlink.rtnl import (
    RTM_GETADDR,
    RTM_GETROUTE,
    RTNLGRP_IPV4_IFADDR,
    RTNLGRP_IPV4_ROUTE,
    RTNLGRP_IPV6_IFADDR,
    RTNLGRP_IPV6_ROUTE,
    rt_type,
)
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from agent.kernel.socket import NETLINK_ROUTE, Interrupted, NetlinkSocket
from agent.worker import Failed, Worker
from rules.events import Event, NodeAddresses
from rules.netlink.messages import NLM_F_DUMP, NLMSG_HEADER
from rules.objects import Address, address_text, parse_address

_RT_TABLE_LOCAL = 255
_FAMILY = {4: socket.AF_INET, 16: socket.AF_INET6}
_READ_TRIES = 5

# where packets to nowhere in particular would leave from (documentation prefixes, never sent to)
_SOMEWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}
_GROUPS = (RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV6_IFADDR, RTNLGRP_IPV6_ROUTE)


def read(route: NetlinkSocket) -> NodeAddresses:
    """All addresses that the node answers at but loopback ones, and the primary ones.

    Link-local addresses and host routes of type `local` are among them: `nodePortAddresses` may
    select them. They are never primary. Raises OSError.
    """
    addresses, others = set(), set()
    for message in _dump(route, RTM_GETADDR, ifaddrmsg()):
        text = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
        if address := _usable(text):
            addresses.add(address)
        elif address := _usable(text, link_local=True):
            others.add(address)
    others |= _local_routes(route)
    return NodeAddresses(frozenset(addresses | others), _primary(addresses))


def route_socket() -> NetlinkSocket:
    """A socket for `read`. Its dumps are filtered in the kernel (Linux 4.20): a router's table may
    have a million routes that are of no interest."""
    route = NetlinkSocket(NETLINK_ROUTE)
    route.check_requests()
    return route


def _local_routes(route: NetlinkSocket) -> set[Address]:
    """Destinations of host routes of type `local`: what the kernel takes for its own (AnyIP)."""
    found = set()
    for length, family in _FAMILY.items():
        wanted = _route_message(family=family, table=_RT_TABLE_LOCAL, type=rt_type["local"])
        try:
            messages = _dump(route, RTM_GETROUTE, wanted)
        except OSError as error:
            if error.errno != errno.ENOENT:  # the table appears with the first address
                raise
            continue
        for message in messages:
            # older kernels send everything
            is_local = (message["table"], message["type"]) == (wanted["table"], wanted["type"])
            if not is_local or message["dst_len"] != 8 * length:
                continue
            if address := _usable(message.get_attr("RTA_DST"), link_local=True):
                found.add(address)
    return found


def _route_message(**values: Any) -> Any:
    message = rtmsg()
    message.update(values)
    return message


def _dump(route: NetlinkSocket, kind: int, wanted: Any) -> list[Any]:
    """What a dump lists. A change in its middle is notified, too, and then all is read again."""
    found: list[Any] = []
    for _ in range(_READ_TRIES):
        found.clear()
        with suppress(Interrupted):
            found.extend(_asked(route, kind, wanted, NLM_F_DUMP))
            break
    return found


def _asked(route: NetlinkSocket, kind: int, wanted: Any, flags: int = 0) -> Iterator[Any]:
    """The answers to a request, of the request's class."""
    wanted.encode()
    header = NLMSG_HEADER.size
    for data, start, end in route.ask(kind, bytes(wanted.data[header:]), flags):
        message = type(wanted)(data[start - header : end])
        message.decode()
        yield message


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
    wanted = _route_message(
        family=_FAMILY[len(address)],
        dst_len=8 * len(address),
        attrs=[("RTA_DST", address_text(address))],
    )
    try:
        with NetlinkSocket(NETLINK_ROUTE) as route:
            for message in _asked(route, RTM_GETROUTE, wanted):
                return socket.if_indextoname(message.get_attr("RTA_OIF"))
    except OSError:
        pass
    return ""


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
            with _listener() as changes, route_socket() as route:
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
