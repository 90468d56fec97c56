"""Watches for changes that other processes make to our tables."""

from __future__ import annotations

import socket
from collections.abc import Callable

from agent.kernel.errors import Refused, raised_as
from agent.kernel.socket import NetlinkSocket, parsed
from agent.worker import Failed, Worker
from rules.netlink.attributes import Malformed, fields, text
from rules.netlink.nftables import (
    FAMILY_OF_NFPROTO,
    NFNL_SUBSYS_NFTABLES,
    NFNLGRP_NFTABLES,
    NFT_MSG_NEWGEN,
    NFTA_TABLE_NAME,
)
from rules.tables import TABLE


class Watcher(Worker):
    """Calls `disturbed` when another process changes our tables.

    Our own transactions are filtered out in the kernel, by the netlink port in the header of their
    notifications: a cold start would flood the socket otherwise. Whatever cannot be read counts
    as a change: an overflow of the buffer, and messages of another shape than expected.
    """

    def __init__(self, own_port: int, disturbed: Callable[[], None], failed: Failed) -> None:
        """Listens from now on. Raises Refused."""
        self._disturbed = disturbed
        with raised_as(Refused, "watching the tables"):
            super().__init__("nf_tables watcher", failed)
            self._socket = NetlinkSocket()
        self._socket.ignore_port(own_port)
        self._socket.join(NFNLGRP_NFTABLES)

    def work(self) -> None:
        """Listens until `stop`, and reports everything that came before it."""
        with self._socket:
            while self.wait_readable(self._socket.fileno()):
                self._receive()
            self._receive()

    def _receive(self) -> None:
        while True:
            try:
                data = self._socket.receive(socket.MSG_DONTWAIT)
                ours = any(_is_ours(m[0], data[m[3] : m[4]]) for m in parsed(data))
            except BlockingIOError:
                return
            except (OSError, Malformed):  # ENOBUFS: something was lost, and it may have been ours
                ours = True
            if ours:
                self._disturbed()


def _is_ours(kind: int, content: bytes) -> bool:
    """Whether a notification is about one of our tables. Every message but those of a generation
    begins with the table's name, whatever it is about."""
    if kind >> 8 != NFNL_SUBSYS_NFTABLES or kind & 0xFF == NFT_MSG_NEWGEN:
        return False
    if not content or content[0] not in FAMILY_OF_NFPROTO:
        return False
    return text(fields(content[4:]).get(NFTA_TABLE_NAME, b"")) == TABLE
