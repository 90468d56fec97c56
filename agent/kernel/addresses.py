"""The addresses of this machine, followed over rtnetlink with pyroute2.

Node ports answer at them, and source ranges that let the node in need them. Whatever changes, all
of them are read again: there are few, and a list cannot drift.
"""

from __future__ import annotations

import ipaddress
import os
import select
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

from pyroute2.iproute.linux import IPRoute
from pyroute2.netlink.rtnl import (
    RTMGRP_IPV4_IFADDR,
    RTMGRP_IPV4_ROUTE,
    RTMGRP_IPV6_IFADDR,
    RTMGRP_IPV6_ROUTE,
)

from rules.events import Event, NodeAddresses
from rules.objects import Address, parse_address

# where packets to nowhere in particular would leave from (documentation prefixes, never sent to)
_SOMEWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}
_GROUPS = RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR | RTMGRP_IPV4_ROUTE | RTMGRP_IPV6_ROUTE


def read(route: Any) -> NodeAddresses:
    """All usable addresses (no loopback, no link-local), and the primary ones."""
    addresses = set()
    for message in route.get_addr():
        text = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
        if address := _usable(text):
            addresses.add(address)
    return NodeAddresses(frozenset(addresses), _primary(addresses))


def _usable(text: str) -> Address | None:
    try:
        return parse_address(text)
    except ValueError:
        return None


def _primary(addresses: set[Address]) -> tuple[Address, ...]:
    """Per family the source address of the default route, else the lowest address there is."""
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


class Follower(threading.Thread):
    """Tells the node's addresses at start, then sets `told`, and tells them when they change."""

    def __init__(
        self, put: Callable[[Sequence[Event]], None], failed: Callable[[Exception], None]
    ) -> None:
        super().__init__(name="node addresses", daemon=True)
        self.told = threading.Event()
        self._put = put
        self._failed = failed
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._last: NodeAddresses | None = None

    def run(self) -> None:
        """Listens until `stop`."""
        try:
            self._follow()
        except Exception as error:
            self._failed(error)
        finally:
            self.told.set()
            os.close(self._wake)

    def _follow(self) -> None:
        with _listener() as changes, IPRoute() as route:
            self._tell(read(route))
            self.told.set()
            poll = select.poll()
            poll.register(changes, select.POLLIN)
            poll.register(self._wake, select.POLLIN)
            while all(fd != self._wake for fd, _ in poll.poll()):
                _drain(changes)
                self._tell(read(route))

    def _tell(self, addresses: NodeAddresses) -> None:
        if addresses != self._last:
            self._last = addresses
            self._put([addresses])

    def stop(self) -> None:
        """Ends the thread."""
        os.eventfd_write(self._wake, 1)
        self.join()


def _listener() -> socket.socket:
    listener = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    listener.bind((0, _GROUPS))
    listener.setblocking(False)
    return listener


def _drain(changes: socket.socket) -> None:
    """Whatever was told is read again anyway, also when the buffer overflowed (ENOBUFS)."""
    while True:
        try:
            changes.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            continue
