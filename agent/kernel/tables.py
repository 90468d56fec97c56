"""The netlink socket to nf_tables: applies transactions, reads tables back, owns them.

Ownership. From Linux 6.9 on a table may belong to a netlink socket and outlive it (flags `owner`
and `persist`): nobody else can change or flush it, `nft flush ruleset` passes it by, and when the
owner dies the table stays: an orphan that anybody may change, until the next owner takes it over
by asking for the same flags. Elsewhere tables are made without flags, and a `Watcher` tells when
somebody else changed them.

The kernel works synchronously: when a batch has been sent, the answer is there to be read.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NamedTuple

from rules import netlink
from rules.diff import Elements
from rules.language import Chain, Set, Table
from rules.netlink import (
    FAMILY_OF_NUMBER,
    NLM_F_DUMP,
    NLMSG_DONE,
    NLMSG_ERROR,
    TABLE_OWNER,
    TABLE_PERSIST,
    Batch,
    attributes,
    string,
)
from rules.tables import FAMILIES, SETS, TABLE
from rules.text import Element, Key, Value
from rules.transaction import Known, Transaction, encode

_SOL_NETLINK = 270
_NETLINK_NETFILTER = 12
_NETLINK_ADD_MEMBERSHIP, _NETLINK_CAP_ACK, _NETLINK_EXT_ACK = 1, 10, 11
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE, _SO_ATTACH_FILTER = 32, 33, 26
_NFNLGRP_NFTABLES = 7
_NLM_F_DUMP_INTR = 0x10
_NLM_F_ACK_TLVS = 0x200
_RECEIVE = 1 << 20
_SET_COUNT = 20  # NFTA_SET_COUNT
_DUMP_TRIES, _DUMP_PAUSE = 5, 0.05
_SEND_BUFFER = 8 << 20

OWNED = TABLE_OWNER | TABLE_PERSIST


class KernelError(Exception):
    """The kernel refused something. `errno` is its reason, `subject` what it was about."""

    def __init__(self, code: int, subject: str, detail: str = "") -> None:
        words = f"{subject}: {detail or os.strerror(code)} ({errno.errorcode.get(code, code)})"
        super().__init__(f"{words}. {self.advice(code)}".rstrip())
        self.errno = code
        self.subject = subject

    @staticmethod
    def advice(_code: int) -> str:
        """What the operator can do, in a sentence."""
        return ""


class NotPermitted(KernelError):
    """The process has no CAP_NET_ADMIN in this network namespace."""

    @staticmethod
    def advice(_code: int) -> str:
        """What the operator can do."""
        return "Run it as root or with CAP_NET_ADMIN."


class OwnedByOther(KernelError):
    """The tables belong to another process that is alive."""

    @staticmethod
    def advice(_code: int) -> str:
        """What the operator can do."""
        return "Another sliceproxy is running on this node; stop it first."


class Stale(KernelError):
    """The tables are not as we believed; read them back and compare."""


class Full(Stale):
    """A set has as many elements as it was made for (`Set.room`); the table must be made anew."""


class Refused(KernelError):
    """The kernel cannot do this, or not now (no memory, a missing module)."""

    @staticmethod
    def advice(code: int) -> str:
        """What the operator can do."""
        if code in (errno.EOPNOTSUPP, errno.ENOENT, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT):
            return (
                "The kernel needs nf_tables with nat, fib, masq and reject (Linux 5.13 or later)."
            )
        return ""


_STALE = {errno.ENOENT, errno.EEXIST, errno.EBUSY, errno.ERESTART, errno.ENOTEMPTY}


class Found(NamedTuple):
    """One table as the kernel has it: raw bodies of sets and chains, expressions of rules.

    `owner` is the netlink port of the owning socket, 0 for an orphan, None without ownership.
    """

    family: int
    flags: int
    owner: int | None
    sets: dict[str, bytes]
    chains: dict[str, bytes]
    rules: dict[str, list[bytes]]

    def known(self, want: Table) -> Known:
        """What of it is just as in `want`."""
        described = {s.name: s for s in want.sets}
        chains = {c.name: c for c in want.chains}
        return Known(
            {
                name: described[name]
                if name in described
                and netlink.says(body, netlink.set_body(TABLE, described[name]))
                else None
                for name, body in self.sets.items()
            },
            {
                name: chains[name] if name in chains and self._is(chains[name]) else None
                for name in self.chains
            },
        )

    def _is(self, chain: Chain) -> bool:
        body, rules = self.chains[chain.name], self.rules.get(chain.name, [])
        has_hook = any(kind == 4 for kind, _ in attributes(body))
        return (
            has_hook == (chain.base is not None)
            and netlink.says(body, netlink.chain_body(TABLE, chain))
            and len(rules) == len(chain.rules)
            and all(
                netlink.says(theirs, netlink.rule_body(TABLE, chain.name, ours, self.family))
                for theirs, ours in zip(rules, chain.rules, strict=True)
            )
        )


class Kernel:
    """A connection to nf_tables in this network namespace. Use it as a context manager.

    With `own`, tables are made to belong to this connection where the kernel can do that. Raises
    NotPermitted without CAP_NET_ADMIN.
    """

    def __init__(self, *, own: bool = True) -> None:
        self._socket = _netlink_socket()
        self._sequence = 0
        self._send_buffer = 0
        self._own = own
        self.table_flags = self._supported_flags() if own else 0

    def __enter__(self) -> Kernel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection. Owned tables stay, orphaned."""
        self._socket.close()

    @property
    def port(self) -> int:
        """The netlink port by which the kernel knows this connection."""
        return int(self._socket.getsockname()[0])

    def _supported_flags(self) -> int:
        """`owner,persist` if a table with them can be made. The trial is taken back in the same
        transaction, so nobody sees it."""
        batch = Batch()
        batch.new_table(4, f"{TABLE}-trial", OWNED)
        batch.delete_table(4, f"{TABLE}-trial")
        try:
            self.send(batch)
        except OwnedByOther as error:  # nobody owns what is made only now: it is the namespace
            raise NotPermitted(error.errno, "nf_tables") from None
        except (Refused, Stale):
            return 0
        return OWNED

    # writing

    def apply(self, transaction: Transaction) -> int:
        """Applies everything or nothing. Returns the bytes sent.

        Raises OwnedByOther, Stale, or Refused.
        """
        return self.send(encode(transaction, self.table_flags))

    def send(self, batch: Batch, generation: int | None = None) -> int:
        """Sends a batch and waits for the kernel's word on it."""
        data = batch.encode(generation)
        self._fit_send_buffer(len(data))
        self._socket.send(data)
        self._check(batch)
        return len(data)

    def _fit_send_buffer(self, size: int) -> None:
        if size > self._send_buffer:
            self._send_buffer = max(_SEND_BUFFER, size + (1 << 16))
            _force(self._socket, _SO_SNDBUFFORCE, socket.SO_SNDBUF, self._send_buffer)

    def _check(self, batch: Batch) -> None:
        """Reads the answers. Either the end of the batch is acknowledged, or messages failed."""
        failures: list[KernelError] = []
        while True:
            try:
                data = self._socket.recv(_RECEIVE, socket.MSG_DONTWAIT if failures else 0)
            except BlockingIOError:
                raise failures[0] from None
            except OSError as error:
                raise Stale(error.errno or errno.EIO, "the answer to a transaction") from None
            for kind, sequence, flags, body in _messages(data):
                if kind != NLMSG_ERROR:
                    continue
                code, detail = _error(body, flags)
                if not code and sequence == batch.end_sequence and not failures:
                    return
                if code:
                    failures.append(_failure(code, batch.subject(sequence), detail))

    # reading

    def generation(self) -> int:
        """The number of the ruleset's generation in this namespace."""
        for _, body in self._request(netlink.GETGEN, 0, b"", 0):
            return int.from_bytes(dict(attributes(body)).get(1, b""), "big")
        return 0

    def find(self, family: int) -> Found | None:
        """The table of a family, without its elements; None if there is none."""
        info = self.info(family)
        if info is None:
            return None
        flags, owner = info
        table = string(1, TABLE)
        sets = {
            netlink.text(dict(attributes(body))[2]): body
            for body in self.dump(netlink.GETSET, family, table)
        }
        chains: dict[str, bytes] = {}
        for body in self.dump(netlink.GETCHAIN, family):
            fields = dict(attributes(body))
            if netlink.text(fields[1]) == TABLE:
                chains[netlink.text(fields[3])] = body
        rules: dict[str, list[bytes]] = {}
        for body in self.dump(netlink.GETRULE, family, table):
            rules.setdefault(netlink.text(dict(attributes(body))[2]), []).append(body)
        return Found(family, flags, owner, sets, chains, rules)

    def info(self, family: int) -> tuple[int, int | None] | None:
        """Flags and owner of the table, None if there is none."""
        for body in self.dump(netlink.GETTABLE, family):
            fields = dict(attributes(body))
            if netlink.text(fields[1]) == TABLE:
                flags = int.from_bytes(fields.get(2, b""), "big")
                if not flags & OWNED:
                    return flags, None
                # an owner that dies takes its flag along: what persists without one is an orphan
                return flags, int.from_bytes(fields.get(7, b""), "big")
        return None

    def elements(self, owner: Set) -> dict[Key, Value]:
        """All elements of a set of our tables."""
        request = string(1, TABLE) + string(2, owner.name)
        found: list[Element] = []
        for body in self.dump(netlink.GETSETELEM, owner.family, request):
            for kind, payload in attributes(body):
                if kind == 3:
                    found.extend(netlink.decode_elements(owner, payload))
        if owner.interval and len(owner.key) == 1:
            return netlink.join_ranges(found)
        return dict(found)

    def read(self, found: Found) -> Elements:
        """The elements of all known sets of a table that was found, but for dynamic ones."""
        sets = SETS[found.family]
        return {
            s: self._all_elements(s, found.sets[s.name])
            for s in (*sets.always, *sets.sticky)
            if s.name in found.sets and not s.dynamic
        }

    def _all_elements(self, owner: Set, body: bytes) -> dict[Key, Value]:
        """The elements of a set, as many as the kernel says it has, where it says so.

        A dump that meets the set's hash table while it grows may miss some, unnoticed; the table
        grows for a moment after a load.
        """
        elements = self.elements(owner)
        count = int.from_bytes(dict(attributes(body)).get(_SET_COUNT, b""), "big")
        for _ in range(_DUMP_TRIES):
            if owner.interval or len(elements) >= count:
                break
            time.sleep(_DUMP_PAUSE)
            elements = self.elements(owner)
        return elements

    def dump(self, kind: int, family: int, body: bytes = b"") -> list[bytes]:
        """The bodies of all answers to a dump (`kind` is netlink.GET*), of any tables.

        It is asked again if the ruleset changed while it ran.
        """
        while True:
            answers = []
            interrupted = False
            for flags, answer in self._request(kind, family, body, NLM_F_DUMP):
                interrupted = interrupted or bool(flags & _NLM_F_DUMP_INTR)
                answers.append(answer)
            if not interrupted:
                return answers

    def _request(
        self, kind: int, family: int, body: bytes, flags: int
    ) -> Iterator[tuple[int, bytes]]:
        self._sequence += 1
        self._socket.send(netlink.message(kind, family, body, flags, self._sequence))
        done = False
        while not done:
            received = itertools.chain.from_iterable(map(_messages, self._receive()))
            for answer, sequence, answer_flags, content in received:
                if sequence != self._sequence:
                    continue
                if answer == NLMSG_ERROR:
                    code, detail = _error(content, answer_flags)
                    raise _failure(code, "reading the tables", detail)
                if answer == NLMSG_DONE:
                    done = True
                    break
                yield answer_flags, content[4:]
                done = not flags & NLM_F_DUMP

    def _receive(self) -> list[bytes]:
        """Waits for answers to a request: what is there, one datagram or several."""
        return [self._socket.recv(_RECEIVE)]

    # owning

    def take_over(self) -> None:
        """Takes over tables that a dead agent left, and checks that nobody else has them.

        Raises OwnedByOther.
        """
        for family in FAMILIES:
            info = self.info(family)
            if info is None or info[1] in (None, self.port):
                continue
            if info[1]:
                raise OwnedByOther(errno.EPERM, f"table {TABLE}")
            batch = Batch()
            batch.new_table(family, TABLE, OWNED)
            self.send(batch)

    def remove(self) -> bool:
        """Deletes the tables. Returns whether there were any. Raises OwnedByOther."""
        self.take_over()
        families = [family for family in FAMILIES if self.info(family)]
        batch = Batch()
        for family in families:
            batch.delete_table(family, TABLE)
        if families:
            self.send(batch)
        return bool(families)

    def fits(self, found: Found) -> bool:
        """Whether a table has the ownership that this connection gives its tables."""
        return bool(found.flags & OWNED) == bool(self.table_flags)

    # session affinity

    def forget(self, family: int, current: Callable[[Key, Value], bool]) -> int:
        """Deletes what the affinity map holds beyond what is `current`; returns how many.

        Costs what the map holds.
        """
        affinity = SETS[family].affinity
        stale = [e for e in self.elements(affinity).items() if not current(*e)]
        if stale:
            self._delete_if_there(affinity, stale)
        return len(stale)

    def _delete_if_there(self, owner: Set, elements: list[Element]) -> None:
        """Deletes elements that may expire meanwhile: all at once, else one by one."""
        try:
            batch = Batch()
            batch.delete_elements(TABLE, owner, elements)
            self.send(batch)
        except Stale:
            if len(elements) > 1:
                for element in elements:
                    self._delete_if_there(owner, [element])


def _netlink_socket() -> socket.socket:
    try:
        connection = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER
        )
    except OSError as error:
        raise Refused(error.errno or errno.EIO, "a netlink socket to netfilter") from None
    connection.bind((0, 0))
    _force(connection, _SO_RCVBUFFORCE, socket.SO_RCVBUF, _RECEIVE * 4)
    connection.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
    connection.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
    return connection


def _force(connection: socket.socket, forced: int, polite: int, size: int) -> None:
    """A buffer above the system's limit, which CAP_NET_ADMIN may ask for."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, forced, size)
    except PermissionError:
        connection.setsockopt(socket.SOL_SOCKET, polite, size)


def _messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Type, sequence number, flags and content of each message."""
    position = 0
    while position + 16 <= len(data):
        length, kind, flags, sequence, _ = netlink.HEADER.unpack_from(data, position)
        if length < 16:
            return
        yield kind, sequence, flags, data[position + 16 : position + length]
        position += (length + 3) & ~3


def _error(body: bytes, flags: int) -> tuple[int, str]:
    """errno (0 for an acknowledgement) and the kernel's own words, if it has any."""
    code = -struct.unpack_from("=i", body)[0]
    detail = ""
    if flags & _NLM_F_ACK_TLVS:
        detail = netlink.text(dict(attributes(body[20:])).get(1, b""))
    return code, detail


def _failure(code: int, subject: str, detail: str) -> KernelError:
    if code == errno.EPERM:
        kind: type[KernelError] = NotPermitted if not _may_administer() else OwnedByOther
    elif code == errno.ENFILE:
        kind = Full
    elif code in _STALE:
        kind = Stale
    else:
        kind = Refused
    return kind(code, subject, detail)


def _may_administer() -> bool:
    """Whether this process has CAP_NET_ADMIN."""
    with open("/proc/self/status", encoding="ascii") as status:
        line = next(line for line in status if line.startswith("CapEff"))
    return bool(int(line.split()[1], 16) >> 12 & 1)


class _Filter(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_uint16),
        ("jt", ctypes.c_uint8),
        ("jf", ctypes.c_uint8),
        ("k", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.POINTER(_Filter)))


class Watcher(threading.Thread):
    """Calls `disturbed` when somebody else changes our tables.

    Our own transactions are filtered out in the kernel, by the netlink port in the header of their
    notifications: a cold start would flood the socket otherwise. If the buffer overflows all the
    same, that counts as a change.
    """

    def __init__(self, own_port: int, disturbed: Callable[[], None]) -> None:
        super().__init__(name="nf_tables watcher", daemon=True)
        self._disturbed = disturbed
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._socket = _netlink_socket()
        self._socket.setblocking(False)
        self._ignore(own_port)
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, _NFNLGRP_NFTABLES)

    def _ignore(self, port: int) -> None:
        """Drops messages whose header names this port (classic BPF: load word, compare, return)."""
        swapped = socket.htonl(port)
        code = (_Filter * 4)(
            _Filter(0x20, 0, 0, 12),
            _Filter(0x15, 0, 1, swapped),
            _Filter(0x06, 0, 0, 0),
            _Filter(0x06, 0, 0, 0xFFFFFFFF),
        )
        program = _Program(len(code), ctypes.cast(code, ctypes.POINTER(_Filter)))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, bytes(program))

    def run(self) -> None:
        """Listens until `stop`."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while all(fd != self._wake for fd, _ in poll.poll()):
            self._receive()
        self._receive()
        self._socket.close()
        os.close(self._wake)

    def _receive(self) -> None:
        """Tells of everything that has come."""
        while True:
            try:
                data = self._socket.recv(_RECEIVE)
            except BlockingIOError:
                return
            except OSError:  # ENOBUFS: something was lost, and it may have been about us
                self._disturbed()
                continue
            if any(_is_ours(kind, body) for kind, _, _, body in _messages(data)):
                self._disturbed()

    def stop(self) -> None:
        """Ends the thread, once it has told of everything that came before."""
        os.eventfd_write(self._wake, 1)
        self.join()


def _is_ours(kind: int, body: bytes) -> bool:
    if kind & 0xFF == netlink.NEWGEN or body[0] not in FAMILY_OF_NUMBER:
        return False
    return netlink.text(dict(attributes(body[4:])).get(1, b"")) == TABLE
