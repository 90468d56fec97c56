"""The one netlink socket: sends requests, reads answers, listens to notifications.

Every request has the next of one running sequence of numbers, and answers with other numbers are
ignored. So an answer that arrives late, because reading it failed or was given up, is never taken
for the answer to a later request.

Methods raise OSError with the errno of the system call or of the kernel's answer. Bytes that are
not netlink messages are EBADMSG.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple, Self

from rules.netlink.attributes import Malformed
from rules.netlink.messages import (
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    SEQUENCES,
    Message,
    error_of,
    message,
    messages,
)

SOL_NETLINK = 270
NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12
NETLINK_ADD_MEMBERSHIP, NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK = 1, 10, 11, 12
SO_SNDBUFFORCE, SO_RCVBUFFORCE, SO_ATTACH_FILTER = 32, 33, 26
DATAGRAM = 1 << 20
"""Larger than any message that the kernel sends."""
_RECEIVE_BUFFER = 4 << 20


class Interrupted(OSError):
    """A dump met a change of what it lists; it may lack entries or hold some twice."""

    def __init__(self) -> None:
        super().__init__(errno.EINTR, "changed while it was read")


class Overflow(OSError):
    """The receive buffer was full: messages have been lost. Reported once for each time."""

    def __init__(self) -> None:
        super().__init__(errno.ENOBUFS, os.strerror(errno.ENOBUFS))


class Failure(NamedTuple):
    """An error for one message of a batch: its position, and the errno with the kernel's words."""

    position: int
    errno: int
    detail: str


class Closing:
    """A context manager that closes itself. Subclasses implement `close`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Releases what it holds."""
        raise NotImplementedError


class NetlinkSocket(Closing):
    """A netlink socket in this network namespace. Use it as a context manager."""

    def __init__(self, protocol: int = NETLINK_NETFILTER) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol
        )
        self._sequence = 0
        self._send_buffer = 0
        self._unread = False  # an earlier request's answers may be under way
        try:
            self._socket.bind((0, 0))
            self._force(SO_RCVBUFFORCE, socket.SO_RCVBUF, _RECEIVE_BUFFER)
            self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
            self._socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()

    def fileno(self) -> int:
        """The descriptor, for poll."""
        return self._socket.fileno()

    @property
    def port(self) -> int:
        """The netlink port by which the kernel identifies this socket."""
        return int(self._socket.getsockname()[0])

    def _force(self, forced: int, polite: int, size: int) -> None:
        """A buffer above the system's limit, which CAP_NET_ADMIN may ask for."""
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, forced, size)
        except PermissionError:
            self._socket.setsockopt(socket.SOL_SOCKET, polite, size)

    # requests

    def number(self, count: int = 1) -> int:
        """Reserves sequence numbers; returns the first."""
        first = (self._sequence + 1) % SEQUENCES
        self._sequence = (self._sequence + count) % SEQUENCES
        return first

    def send(self, data: bytes | bytearray, least_buffer: int = 0) -> None:
        """Sends a datagram, whatever its size."""
        size = max(len(data) + (1 << 16), least_buffer)
        if size > self._send_buffer:
            self._force(SO_SNDBUFFORCE, socket.SO_SNDBUF, size)
            self._send_buffer = size
        self._socket.send(data)

    def receive(self, flags: int = 0) -> bytes:
        """One datagram; waits for it without MSG_DONTWAIT. Raises Overflow."""
        try:
            return self._socket.recv(DATAGRAM, flags)
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                raise Overflow from None
            raise

    def receive_some(self) -> list[bytes]:
        """Waits for datagrams: one, or more where a subclass can read several at once."""
        return [self.receive()]

    def drain(self) -> None:
        """Discards what has been received and not read."""
        while True:
            try:
                self.receive(socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except Overflow:
                continue

    def ask(self, kind: int, content: bytes, flags: int = 0) -> Iterator[tuple[bytes, int, int]]:
        """The answers to a request: a datagram, and where in it a message's content begins and
        ends. With NLM_F_DUMP until the dump is done, else one.

        Raises Interrupted at the end of a dump that met a change.
        """
        number = self.number()
        self._begin(message(kind, NLM_F_REQUEST | flags, number, content))
        interrupted = False
        while True:
            for data in self.receive_some():
                for answer, answer_flags, sequence, start, end in parsed(data):
                    if sequence != number:
                        continue
                    interrupted = interrupted or bool(answer_flags & NLM_F_DUMP_INTR)
                    if answer in (NLMSG_ERROR, NLMSG_DONE):
                        self._unread = False
                        check(answer, data[start:end], answer_flags)
                        if interrupted:
                            raise Interrupted
                        return
                    if not flags & NLM_F_DUMP:
                        self._unread = False
                        yield data, start, end
                        return
                    yield data, start, end

    def transact(self, data: bytes | bytearray, first: int, count: int) -> list[Failure]:
        """Sends a batch of messages numbered from `first` on, of which the last asks for an
        acknowledgement. Returns what failed; nothing if that was acknowledged.

        The kernel works synchronously: once the batch has been sent, the answers can be read.
        """
        failures: list[Failure] = []
        self._begin(data)
        while True:
            try:
                answer = self.receive(socket.MSG_DONTWAIT if failures else 0)
            except BlockingIOError:
                self._unread = False
                return failures
            for kind, flags, sequence, start, end in parsed(answer):
                index = (sequence - first) % SEQUENCES
                if kind != NLMSG_ERROR or index >= count:
                    continue
                code, detail = _error_of(kind, answer[start:end], flags)
                if code:
                    failures.append(Failure(index, code, detail))
                elif index == count - 1 and not failures:
                    self._unread = False
                    return []

    def _begin(self, data: bytes | bytearray) -> None:
        """Sends a request, once nothing is left of earlier ones. The kernel refuses a dump while
        another one has not been read to its end (EBUSY)."""
        if self._unread:
            self.drain()
        self._unread = True
        self.send(data)

    def check_requests(self) -> None:
        """Has rtnetlink check the whole header of a request and filter dumps by it (Linux 4.20).
        Older kernels send everything."""
        with suppress(OSError):
            self._socket.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)

    # notifications

    def join(self, group: int) -> None:
        """Subscribes to a multicast group of notifications."""
        self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)

    def ignore_port(self, port: int) -> None:
        """Drops messages whose header has this port, in the kernel (classic BPF)."""
        code = (_Filter * 4)(
            _Filter(_BPF_LOAD_WORD, 0, 0, 12),  # nlmsg_pid
            _Filter(_BPF_JUMP_IF_EQUAL, 0, 1, socket.htonl(port)),
            _Filter(_BPF_RETURN, 0, 0, 0),
            _Filter(_BPF_RETURN, 0, 0, 0xFFFFFFFF),
        )
        program = _Program(len(code), ctypes.cast(code, ctypes.POINTER(_Filter)))
        self._socket.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, bytes(program))


def parsed(data: bytes) -> Iterator[Message]:
    """The messages in a datagram. Raises OSError (EBADMSG)."""
    try:
        yield from messages(data)
    except Malformed as error:
        raise bad_message(error) from None


def bad_message(error: Malformed) -> OSError:
    """The error for bytes that are not as netlink's format has them."""
    return OSError(errno.EBADMSG, f"bad netlink message ({error})")


def check(kind: int, content: bytes, flags: int) -> None:
    """Raises the OSError that an NLMSG_ERROR or NLMSG_DONE message reports, if it does."""
    code, detail = _error_of(kind, content, flags)
    if code:
        raise OSError(code, detail or os.strerror(code))


def _error_of(kind: int, content: bytes, flags: int) -> tuple[int, str]:
    try:
        return error_of(kind, content, flags)
    except Malformed as error:
        raise bad_message(error) from None


_BPF_LOAD_WORD, _BPF_JUMP_IF_EQUAL, _BPF_RETURN = 0x20, 0x15, 0x06


class _Filter(ctypes.Structure):
    """A struct sock_filter."""

    _fields_ = (
        ("code", ctypes.c_uint16),
        ("jt", ctypes.c_uint8),
        ("jf", ctypes.c_uint8),
        ("k", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    """A struct sock_fprog."""

    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.POINTER(_Filter)))
