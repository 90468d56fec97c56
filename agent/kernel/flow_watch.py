"""New connections, from conntrack's own stream of events.

The kernel sends events only while a socket is subscribed: it asks so for each connection that is
made (`nf_conntrack_events` is 2, the default since Linux 5.19; before that connections carried an
event cache in any case). Nothing is added to the path of packets, and nothing runs while no socket
is open.

A connection is reported when conntrack confirms it, after its first packet has passed all rules. So
one that was refused or dropped is not reported: there is none.
"""

from __future__ import annotations

import select
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from agent.kernel.conntrack import (
    CTA_TUPLE_ORIG,
    CTA_TUPLE_REPLY,
    IPCTNL_MSG_CT_NEW,
    NFNL_SUBSYS_CTNETLINK,
    tuple_of,
)
from agent.kernel.errors import ConntrackError, raised_as
from agent.kernel.socket import Closing, NetlinkSocket, Overflow, parsed
from rules.flow_report import Lost, NewConnection
from rules.netlink.attributes import fields
from rules.netlink.messages import NFGENMSG
from rules.objects import PROTOCOL_NAMES

NFNLGRP_CONNTRACK_NEW = 1
EVENTS = Path("/proc/sys/net/netfilter/nf_conntrack_events")
_NEW = NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_NEW
_SOCKETS = Path("/proc/thread-self/net/netlink")
"""Of this thread's network namespace; /proc/net is that of the first thread."""


class FlowWatch(Closing):
    """Listens to new connections in this network namespace, from its creation on.

    Use it as a context manager. Raises ConntrackError.
    """

    def __init__(self) -> None:
        with raised_as(ConntrackError, "listening to conntrack"):
            self._socket = NetlinkSocket()
            self._socket.join(NFNLGRP_CONNTRACK_NEW)
        self._dropped = 0

    def close(self) -> None:
        """Stops listening."""
        self._socket.close()

    def events(self, seconds: float | None = None) -> Iterator[NewConnection | Lost]:
        """New connections as they are made, for so long or without end; and where events were lost
        because they were not read in time, how many.

        Raises ConntrackError.
        """
        end = None if seconds is None else time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._socket.fileno(), select.POLLIN)
        while True:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                return
            if not poll.poll(None if left is None else left * 1000):
                return
            yield from self._receive()

    def _receive(self) -> Iterator[NewConnection | Lost]:
        with raised_as(ConntrackError, "reading conntrack"):
            try:
                data = self._socket.receive()
            except Overflow:
                yield Lost(self._lost())
                return
            for kind, _, _, start, end in parsed(data):
                if kind == _NEW and (found := decode(data[start:end])):
                    yield found

    def _lost(self) -> int:
        """How many messages the socket has lost since the last call; at least 1."""
        before = self._dropped
        with suppress(OSError, ValueError, IndexError):
            head, *lines = _SOCKETS.read_text().splitlines()
            port, drops = head.split().index("Pid"), head.split().index("Drops")
            for columns in map(str.split, lines):
                if int(columns[port]) == self._socket.port:
                    self._dropped = max(self._dropped, int(columns[drops]))
        return max(1, self._dropped - before)


def decode(content: bytes) -> NewConnection | None:
    """A new connection from the content of a message; None without ports (ICMP). Raises
    Malformed."""
    entry = fields(content[NFGENMSG.size :])
    protocol, client, destination = tuple_of(entry[CTA_TUPLE_ORIG])
    _, endpoint, seen_as = tuple_of(entry[CTA_TUPLE_REPLY])
    if protocol not in PROTOCOL_NAMES or not client or not endpoint:
        return None
    return NewConnection(protocol, client, destination, endpoint, seen_as)


def sends_events() -> bool:
    """Whether the kernel reports new connections here (the sysctl nf_conntrack_events)."""
    with suppress(OSError):
        return EVENTS.read_text().strip() != "0"
    return True
