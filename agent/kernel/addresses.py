"""The addresses of this machine, followed over rtnetlink.

Node ports answer at them, and source ranges that let the node in need them. Whatever changes, all
of them are read again: there are few, and a list cannot drift.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from agent.kernel.socket import NETLINK_ROUTE, Interrupted, NetlinkSocket
from agent.worker import Failed, Worker
from rules.events import Event, NodeAddresses
from rules.netlink.attributes import Fields, attribute, fields
from rules.netlink.messages import NLM_F_DUMP
from rules.objects import Address, address_text, parse_address

# include/uapi/linux/rtnetlink.h, if_addr.h
RTM_GETADDR, RTM_GETROUTE = 22, 26
IFA_ADDRESS, IFA_LOCAL, RTA_DST, RTA_OIF = 1, 2, 1, 4
RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV6_IFADDR, RTNLGRP_IPV6_ROUTE = 5, 7, 9, 11
RT_TABLE_LOCAL, RTN_LOCAL = 255, 2
_IFADDRMSG = struct.Struct("=BBBBI")
_RTMSG = struct.Struct("=BBBBBBBBI")
"""struct rtmsg: family, lengths of destination and source, TOS, table, protocol, scope, type,
flags."""
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
    for message in _dump(route, RTM_GETADDR, _IFADDRMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
        found = _attributes(message, _IFADDRMSG)
        own = found.get(IFA_LOCAL) or found.get(IFA_ADDRESS, b"")
        if address := _usable(own):
            addresses.add(address)
        elif address := _usable(own, link_local=True):
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
    for family, length in ((socket.AF_INET, 32), (socket.AF_INET6, 128)):
        request = _RTMSG.pack(family, 0, 0, 0, RT_TABLE_LOCAL, 0, 0, RTN_LOCAL, 0)
        for message in _dump(route, RTM_GETROUTE, request):
            _, bits, _, _, table, _, _, kind, _ = _RTMSG.unpack_from(message)
            if (bits, table, kind) == (length, RT_TABLE_LOCAL, RTN_LOCAL):
                destination = _attributes(message, _RTMSG).get(RTA_DST, b"")
                if address := _usable(destination, link_local=True):
                    found.add(address)
    return found


def _dump(route: NetlinkSocket, kind: int, request: bytes) -> list[bytes]:
    """What a dump lists. A change in its middle is notified, too, and then all is read again."""
    found: list[bytes] = []
    for _ in range(_READ_TRIES):
        found.clear()
        with suppress(Interrupted):
            for data, start, end in route.ask(kind, request, NLM_F_DUMP):
                found.append(data[start:end])
            break
    return found


def _attributes(message: bytes, header: struct.Struct) -> Fields:
    return fields(message[header.size :])


def _usable(packed: bytes, *, link_local: bool = False) -> Address | None:
    try:
        return parse_address(address_text(packed), link_local=link_local)
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
    request = _RTMSG.pack(_FAMILY[len(address)], 8 * len(address), 0, 0, 0, 0, 0, 0, 0)
    try:
        with NetlinkSocket(NETLINK_ROUTE) as route:
            for data, start, end in route.ask(RTM_GETROUTE, request + attribute(RTA_DST, address)):
                index = _attributes(data[start:end], _RTMSG).get(RTA_OIF, b"")
                return socket.if_indextoname(int.from_bytes(index, sys.byteorder))
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
