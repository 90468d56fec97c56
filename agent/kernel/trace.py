"""Traces the next real packets to one address through all rules of this network namespace.

A table of its own (`TRACE_TABLE`) sets the trace bit of those packets before any other rule sees
them. The table belongs to the socket of this process and does not persist, so the kernel deletes
it when the socket is closed, whatever ends the process (NFT_TABLE_F_OWNER, Linux 5.12). Other
packets are compared with one address and port while the table exists.
"""

from __future__ import annotations

import errno
import select
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress

from agent.kernel.errors import KernelError, OwnedByOther, Refused, Stale, raised_as
from agent.kernel.reading import TableReader
from agent.kernel.socket import Closing, NetlinkSocket, Overflow, parsed
from agent.kernel.tables import Kernel
from rules.language import Base, Chain, Hook
from rules.netlink.attributes import fields, integer, text
from rules.netlink.batch import Batch
from rules.netlink.messages import NLM_F_APPEND, NLM_F_CREATE
from rules.netlink.nftables import (
    NFNLGRP_NFTRACE,
    NFPROTO_NAMES,
    NFT_MSG_GETRULE,
    NFT_MSG_NEWRULE,
    NFT_TABLE_F_OWNER,
    NFTA_RULE_HANDLE,
    NFTA_RULE_TABLE,
)
from rules.netlink.rule_text import rule_text
from rules.netlink.trace import (
    TraceFilter,
    TraceMessage,
    decode_trace,
    trace_rule,
)
from rules.packet_trace import TRACE_TABLE, RuleKey, TracedPacket, traced_packet

_PRIORITY = -350
"""Before conntrack (-200) and the raw tables (-300), after reassembly (-400)."""
_CHAINS = tuple(
    Chain(hook.value[0], (), Base("filter", hook, _PRIORITY))
    for hook in (Hook.PREROUTING, Hook.OUTPUT)
)
_QUIET_SECONDS = 0.2
"""A packet without a message for so long has left the rules; it takes microseconds to pass them."""


class Trace(Closing):
    """Traces the packets that a filter chooses, from its creation until it is closed.

    Use it as a context manager. Raises KernelErrors; OwnedByOther while another trace runs here.
    """

    def __init__(self, wanted: TraceFilter) -> None:
        self._family = wanted.family
        with ExitStack() as stack:
            self._kernel = stack.enter_context(Kernel(own=False))
            with raised_as(Refused, "listening to traces"):
                self._socket = stack.enter_context(NetlinkSocket())
                self._socket.join(NFNLGRP_NFTRACE)
            self._remove()  # what a process on a kernel without owned tables left
            self._kernel.send(_table(wanted))
            self._sockets = stack.pop_all()

    def close(self) -> None:
        """Ends the trace and deletes its table."""
        try:
            self._remove()
        finally:
            self._sockets.close()

    def _remove(self) -> None:
        batch = Batch()
        batch.delete_table(self._family, TRACE_TABLE)
        try:
            self._kernel.send(batch)
        except OwnedByOther as error:
            raise InUse(error.errno, f"table {TRACE_TABLE}") from None
        except Stale as error:
            if error.errno != errno.ENOENT:
                raise

    def packets(self, seconds: float) -> Iterator[TracedPacket]:
        """Packets in the order in which they ended, of the next so many seconds.

        One whose messages were lost because they were not read in time is left out. Raises
        KernelError.
        """
        open_packets: dict[int, list[TraceMessage]] = {}
        last: dict[int, float] = {}
        end = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._socket.fileno(), select.POLLIN)
        while open_packets or time.monotonic() < end:
            left = _QUIET_SECONDS if open_packets else end - time.monotonic()
            if poll.poll(max(0.0, left) * 1000):
                for message in self._receive():
                    if message.packet in open_packets or time.monotonic() < end:
                        open_packets.setdefault(message.packet, []).append(message)
                        last[message.packet] = time.monotonic()
            for packet in [p for p, at in last.items() if time.monotonic() - at >= _QUIET_SECONDS]:
                del last[packet]
                found = self._report(open_packets.pop(packet))
                if found:
                    yield found

    def _receive(self) -> Iterator[TraceMessage]:
        with raised_as(Refused, "reading traces"), suppress(Overflow):
            data = self._socket.receive()
            for kind, _, _, start, end in parsed(data):
                if found := decode_trace(kind, data[start:end]):
                    yield found

    def _report(self, messages: list[TraceMessage]) -> TracedPacket | None:
        return traced_packet(messages, rule_texts(), _interface)


class InUse(KernelError):
    """Another trace runs in this network namespace."""

    @staticmethod
    def advice(_code: int) -> str:
        """What the operator can do."""
        return "Another `sliceproxy trace` runs on this node; wait until it has ended."


def _table(wanted: TraceFilter) -> Batch:
    batch = Batch()
    batch.new_table(wanted.family, TRACE_TABLE, NFT_TABLE_F_OWNER)
    for chain in _CHAINS:
        batch.new_chain(wanted.family, TRACE_TABLE, chain)
        batch.add(
            NFT_MSG_NEWRULE,
            wanted.family,
            trace_rule(TRACE_TABLE, chain.name, wanted),
            NLM_F_CREATE | NLM_F_APPEND,
            f"the rule of chain {chain.name}",
        )
    return batch


def rule_texts() -> dict[RuleKey, str]:
    """All rules of this network namespace, as text. Raises KernelError."""
    with raised_as(Refused, "reading the rules"), TableReader() as reader:
        return dict(_texts(reader.dump_all(NFT_MSG_GETRULE)))


def _texts(rules: Iterable[tuple[int, bytes]]) -> Iterator[tuple[RuleKey, str]]:
    for number, body in rules:
        rule = fields(body)
        family = NFPROTO_NAMES.get(number, str(number))
        yield (
            RuleKey(family, text(rule[NFTA_RULE_TABLE]), integer(rule[NFTA_RULE_HANDLE])),
            rule_text(rule),
        )


def _interface(index: int) -> str:
    """The name of an interface of this network namespace, "" for none."""
    try:
        return socket.if_indextoname(index) if index else ""
    except OSError:
        return f"interface {index}"
