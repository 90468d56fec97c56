"""The addresses of this machine, followed over rtnetlink.

Node ports answer at them, and source ranges that let the node in need them. Whatever changes, all
of them are read again: there are few, and a list cannot drift.

Of rtnetlink that is one message and two of its attributes. pyroute2 knows them all, and for that
takes 70 ms of the start and 11 MB (*measured*), so it stays with the tests and the demo.
"""

from __future__ import annotations

import ipaddress
import os
import select
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

from agent.events import Event, NodeAddresses
from rules.netlink import HEADER, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, attributes
from rules.objects import Address, parse_address

# where packets to nowhere in particular would leave from (documentation prefixes, never sent to)
_SOMEWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}
_GROUPS = 0x10 | 0x40 | 0x100 | 0x400  # RTMGRP_*: addresses and routes of IPv4, and of IPv6
_RTM_NEWADDR, _RTM_GETADDR = 20, 22
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_IFADDRMSG = struct.Struct("=BBBBI")  # the family comes first
_NLM_F_DUMP_INTR = 0x10
_RECEIVE = 1 << 16


def read() -> NodeAddresses:
    """All usable addresses (no loopback, no link-local), and the primary ones. Raises OSError."""
    addresses = set()
    for family, payload in _dump():
        if address := _usable(socket.inet_ntop(family, payload)):
            addresses.add(address)
    return NodeAddresses(frozenset(addresses), _primary(addresses))


def _usable(text: str) -> Address | None:
    try:
        return parse_address(text)
    except ValueError:
        return None


def _dump() -> list[tuple[int, bytes]]:
    """Family and bytes of all addresses; asked again if they changed meanwhile."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as route:
        route.bind((0, 0))
        while True:
            body = _IFADDRMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
            length, flags = HEADER.size + len(body), NLM_F_REQUEST | NLM_F_DUMP
            route.send(HEADER.pack(length, _RTM_GETADDR, flags, 1, 0) + body)
            found, interrupted = [], False
            for kind, flags, content in _answers(route):
                interrupted = interrupted or bool(flags & _NLM_F_DUMP_INTR)
                if kind == _RTM_NEWADDR and content[0] in _SOMEWHERE:
                    fields = dict(attributes(content[_IFADDRMSG.size :]))
                    # if both are there, IFA_ADDRESS is the other end of a point-to-point link
                    found.append((content[0], fields.get(_IFA_LOCAL) or fields[_IFA_ADDRESS]))
            if not interrupted:
                return found


def _answers(route: socket.socket) -> Iterator[tuple[int, int, bytes]]:
    """Type, flags and content of each message of a dump."""
    while True:
        data, position = route.recv(_RECEIVE), 0
        while position < len(data):
            length, kind, flags, _, _ = HEADER.unpack_from(data, position)
            content = data[position + HEADER.size : position + length]
            if kind in (NLMSG_ERROR, NLMSG_DONE):
                # negative errno; older kernels end a dump without one
                code = -int.from_bytes(content[:4], sys.byteorder, signed=True)
                if code:
                    raise OSError(code, os.strerror(code))
                yield kind, flags, content
                return
            yield kind, flags, content
            position += (length + 3) & ~3


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
        with _listener() as changes:
            self._tell(read())
            self.told.set()
            poll = select.poll()
            poll.register(changes, select.POLLIN)
            poll.register(self._wake, select.POLLIN)
            while all(fd != self._wake for fd, _ in poll.poll()):
                _drain(changes)
                self._tell(read())

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
